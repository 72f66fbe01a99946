"""The tower of Qwen-VL: a ViT, and the resampler that makes 256 tokens of whatever patches there are.

    x_0 = LN(conv(image) + position);  x <- x + Attention(LN(x));  x <- x + MLP(LN(x))
    features = LN(Attention(q = LN(query) + p, k = LN(W x) + p', v = LN(W x))) P

Position tables are 16 x 16 and interpolated to the grid of patches. LayerNorm's epsilon is 1e-6 throughout.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from peft_mllm.models.qwen_vl.configuration import IMAGE_TOKENS, QwenVLConfig

RESAMPLER_HEAD_DIM = 128
LayerNorm = partial(nn.LayerNorm, eps=1e-6)


class Positions(nn.Module):
    """A learned table of positions, added to the tokens of a grid.

    In the checkpoint it is a bare parameter. Here it is a module, because peft opens modules.
    """

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(IMAGE_TOKENS, width))

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, T, D) -> (N, T, D)."""
        return tokens + on_grid(self.weight, tokens.shape[1]).to(tokens.dtype)


class Projection(nn.Module):
    """x P, without a bias; a module for the same reason."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, width))

    def forward(self, features: Tensor) -> Tensor:
        """(N, 256, D) -> (N, 256, D)."""
        return features @ self.weight


class VisionAttention(nn.Module):
    """Self-attention whose fused projection holds q, k and v of one head next to each other, head by head."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, T, D) -> (N, T, D)."""
        fused = self.in_proj(tokens).unflatten(-1, (self.heads, -1))  # (N, T, heads, 3 * head width)
        query, key, value = fused.transpose(1, 2).chunk(3, dim=-1)
        mixed = F.scaled_dot_product_attention(query, key, value)  # nothing is masked: any backend would do
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class VisionMLP(nn.Module):
    """Two linears with the exact GELU between."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.c_fc = nn.Linear(width, inner)
        self.c_proj = nn.Linear(inner, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, T, D) -> (N, T, D)."""
        return self.c_proj(F.gelu(self.c_fc(tokens)))


class VisionBlock(GradientCheckpointingLayer):
    """One pre-norm block of the ViT."""

    def __init__(self, width: int, heads: int, inner: int):
        super().__init__()
        self.ln_1 = LayerNorm(width)
        self.attn = VisionAttention(width, heads)
        self.ln_2 = LayerNorm(width)
        self.mlp = VisionMLP(width, inner)

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, T, D) -> (N, T, D)."""
        tokens = tokens + self.attn(self.ln_1(tokens))
        return tokens + self.mlp(self.ln_2(tokens))


class VisionBlocks(nn.Module):
    """The ViT's blocks in order."""

    def __init__(self, layers: int, width: int, heads: int, inner: int):
        super().__init__()
        self.resblocks = nn.ModuleList(VisionBlock(width, heads, inner) for _ in range(layers))

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, T, D) -> (N, T, D)."""
        for block in self.resblocks:
            tokens = block(tokens)
        return tokens


class ResamplerAttention(nn.Module):
    """Multi-head attention with the parameters of torch's: `in_proj` is [q; k; v] in three blocks."""

    def __init__(self, width: int):
        super().__init__()
        self.heads = width // RESAMPLER_HEAD_DIM
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Query (N, Q, D), key and value (N, T, D) -> (N, Q, D)."""
        parts = zip((query, key, value), self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3), strict=True)
        projected = [F.linear(each, w, b).unflatten(-1, (self.heads, -1)).transpose(1, 2) for each, w, b in parts]
        return self.out_proj(F.scaled_dot_product_attention(*projected).transpose(1, 2).flatten(2))


class Resampler(nn.Module):
    """256 learned queries that attend to the patches: the connector of Qwen-VL."""

    def __init__(self, width: int, patch_width: int):
        super().__init__()
        self.query = nn.Parameter(torch.empty(IMAGE_TOKENS, width))
        self.kv_proj = nn.Linear(patch_width, width, bias=False)
        self.attn = ResamplerAttention(width)
        self.ln_q = LayerNorm(width)
        self.ln_kv = LayerNorm(width)
        # A fixed table that the checkpoint stores: a buffer, so that opening the resampler never trains it.
        self.pos_embed: Tensor
        self.register_buffer("pos_embed", torch.empty(IMAGE_TOKENS, width))

    def forward(self, patches: Tensor) -> Tensor:
        """(N, T, patch width) -> (N, 256, width)."""
        value = self.ln_kv(self.kv_proj(patches))
        key = value + on_grid(self.pos_embed, patches.shape[1]).to(value.dtype)
        query = self.ln_q(self.query) + self.pos_embed.to(value.dtype)
        return self.attn(query.expand(len(patches), -1, -1), key, value)


class VisionTower(nn.Module):
    """ViT, resampler, norm and projection: pixels to what the decoder reads."""

    def __init__(self, config: QwenVLConfig):
        super().__init__()
        visual = config.visual
        width, patch, out = visual["width"], visual["patch_size"], visual["output_dim"]
        self.patch_size = patch
        self.conv1 = nn.Conv2d(3, width, kernel_size=patch, stride=patch, bias=False)
        self.positional_embedding = Positions(width)
        self.ln_pre = LayerNorm(width)
        self.transformer = VisionBlocks(visual["layers"], width, visual["heads"], int(width * visual["mlp_ratio"]))
        self.attn_pool = Resampler(out, width)
        self.ln_post = LayerNorm(out)
        self.proj = Projection(out)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, 256, D)."""
        patches = self.conv1(pixel_values.to(self.conv1.weight.dtype)).flatten(2).transpose(1, 2)  # (N, T, width)
        tokens = self.transformer(self.ln_pre(self.positional_embedding(patches)))
        return self.proj(self.ln_post(self.attn_pool(tokens)))

    def blank_image(self) -> Tensor:
        """(1, 3, H, W) of zeros with as many patches as the position tables: the cheapest image there is."""
        side = math.isqrt(IMAGE_TOKENS) * self.patch_size
        return torch.zeros(1, 3, side, side, device=self.conv1.weight.device)


def on_grid(table: Tensor, tokens: int) -> Tensor:
    """A square table (256, D) interpolated to another square grid (T, D), bicubic, in float32."""
    side, wanted = math.isqrt(len(table)), math.isqrt(tokens)
    if side == wanted:
        return table
    grid = table.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(wanted, wanted), mode="bicubic", align_corners=False)
    return grid.permute(0, 2, 3, 1).flatten(0, 2).to(table.dtype)


def sincos_table(width: int) -> Tensor:
    """The fixed positions (256, width) of a 16 x 16 grid: half of the width tells the column, half the row.

    Each half is [sin(t w), cos(t w)] with w_i = 10000^(-i / (width / 4)).
    """
    side, quarter = math.isqrt(IMAGE_TOKENS), width // 4
    omega = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(side, dtype=torch.float64)[:, None] * omega  # (side, width / 4)
    half = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, width / 2)
    columns, rows = half.repeat(side, 1), half.repeat_interleave(side, dim=0)
    return torch.cat([columns, rows], dim=1).float()
