"""The decoder's layers: Qwen-7B's attention, MLP and norms.

x <- x + c_proj(Attention(c_attn(RMSNorm(x))));  x <- x + c_proj(w1(y) silu(w2(y))), y = RMSNorm(x)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from peft_mllm.models.qwen_vl.configuration import QwenVLConfig
from peft_mllm.models.qwen_vl.rotary import rotate


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention step by step; query, key and value (B, heads, T, width), the mask additive."""
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class QwenVLRMSNorm(nn.Module):
    """x / rms(x) * w, the norm in float32."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, states: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        exact = states.float()
        normed = exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + self.eps)
        return normed.to(states.dtype) * self.weight


@dataclass(frozen=True)
class Places:
    """Where the tokens of a forward are.

    Attributes:
        cos, sin: rotary factors, (R, 1, T, width).
        query_scale: logN's factor (R, 1, T, 1); None where it does not act.
    """

    cos: Tensor
    sin: Tensor
    query_scale: Tensor | None


class QwenVLAttention(nn.Module):
    """Causal self-attention with one fused projection [q; k; v]."""

    def __init__(self, config: QwenVLConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.kv_channels
        self.scaling = self.head_dim**-0.5 if config.scale_attn_weights else 1.0
        self.num_key_value_groups = 1
        self.is_causal = True
        width = config.kv_channels * config.num_attention_heads
        self.c_attn = nn.Linear(config.hidden_size, 3 * width)
        self.c_proj = nn.Linear(width, config.hidden_size, bias=not config.no_bias)

    def forward(
        self,
        hidden_states: Tensor,
        places: Places,
        attention_mask: Any = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """(R, T, D) -> (R, T, D), and the weights where the backend gives them."""
        fused = self.c_attn(hidden_states).unflatten(-1, (3, -1, self.head_dim))  # (R, T, 3, heads, width)
        query, key, value = fused.permute(2, 0, 3, 1, 4)
        query, key = rotate(query, places.cos, places.sin), rotate(key, places.cos, places.sin)
        if places.query_scale is not None:
            query = query * places.query_scale.to(query.dtype)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attention: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.config.attn_dropout_prob if self.training else 0.0
        mixed, weights = attention(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return self.c_proj(mixed.flatten(2)), weights


class QwenVLMLP(nn.Module):
    """c_proj(w1(x) * silu(w2(x))): w2 is the gate."""

    def __init__(self, config: QwenVLConfig):
        super().__init__()
        inner, bias = config.intermediate_size // 2, not config.no_bias
        self.w1 = nn.Linear(config.hidden_size, inner, bias=bias)
        self.w2 = nn.Linear(config.hidden_size, inner, bias=bias)
        self.c_proj = nn.Linear(inner, config.hidden_size, bias=bias)

    def forward(self, states: Tensor) -> Tensor:
        """(R, T, D) -> (R, T, D)."""
        return self.c_proj(F.silu(self.w2(states)) * self.w1(states))


class QwenVLBlock(GradientCheckpointingLayer):
    """One pre-norm layer of the decoder."""

    def __init__(self, config: QwenVLConfig, layer_idx: int):
        super().__init__()
        self.ln_1 = QwenVLRMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.attn = QwenVLAttention(config, layer_idx)
        self.ln_2 = QwenVLRMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mlp = QwenVLMLP(config)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """(R, T, D) -> (R, T, D)."""
        mixed, _ = self.attn(self.ln_1(hidden_states), **kwargs)
        hidden_states = hidden_states + mixed
        return hidden_states + self.mlp(self.ln_2(hidden_states))
