"""Whether a decoder layer has the standard form, and which of it functions can compute, given the method in it.

    x <- x + o(attention(rotary(qkv(norm(x)))));  x <- x + down(silu(gate(y)) up(y)), y = norm(x)

A layer is known by what stands in it, never by its name; and before a function takes the place of modules, both are
asked the same and must say the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peft_mllm.anatomy import Anatomy
from peft_mllm.lean.functions import MLP, Heads, Norm, gated, heads, product
from peft_mllm.lean.kernels import Kernels, rotate
from peft_mllm.lean.products import Products
from peft_mllm.lean.rows import Rows
from peft_mllm.lean.tuners import LowRank

MLP_ROLES = ("gate", "up", "down")
OUTWARD = ("o", *MLP_ROLES)
PROBE = 8
"""Tokens that a function and the modules it stands for are asked with."""
EPS = ("variance_epsilon", "eps", "epsilon")
"""What norms call the number that they add to the mean square."""


@dataclass(frozen=True)
class Parts:
    """A layer of the standard form, and what of it is computed by functions.

    Attributes:
        attention: its attention module.
        norms: before attention and MLP.
        inward: its q, k and v modules, or one that gives them all.
        outward: its o module.
        mlp: its MLP module.
        inner: the MLP's gate, up and down modules.
        adapters: what a method put into it.
        heads, out, gated: the functions for q|k|v, o and the MLP; None leaves them to their modules.
    """

    attention: Any
    norms: tuple[nn.Module, nn.Module]
    inward: tuple[nn.Module, ...]
    outward: nn.Module
    mlp: nn.Module
    inner: tuple[nn.Module, ...]
    adapters: tuple[BaseTunerLayer, ...]
    heads: Heads | None = None
    out: Products | None = None
    gated: MLP | None = None

    @property
    def by_functions(self) -> bool:
        """Whether any of it is."""
        return bool(self.heads or self.out or self.gated)

    @property
    def whole(self) -> bool:
        """Whether all of it is."""
        return bool(self.heads and self.out and self.gated)

    @property
    def adapted(self) -> bool:
        """Whether its adapters act as they did when it was read: not switched off, not merged."""
        return not any(each.disable_adapters or each.merged for each in self.adapters)

    @property
    def drops(self) -> bool:
        """Whether a function of it has dropout that acts now."""
        products = [self.heads and self.heads.products, self.out, *(self.gated.both if self.gated else ())]
        tuners = [tuner for each in products if each for site in each.sites for tuner in site.tuners]
        return any(isinstance(tuner, LowRank) and tuner.drops for tuner in tuners)

    def counts(self, width: int) -> tuple[int, int]:
        """How many heads of all `width` ask, and how many there are of keys and of values."""
        groups: int = self.attention.num_key_value_groups
        keys = width // (self.attention.head_dim * (groups + 2))
        return keys * groups, keys

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        """Turned queries (R, H, T, d) and keys (R, K, T, d), and values (R, K, T, d), of hidden states x (R, T, D)."""
        if self.heads is not None:
            return heads(x, cos, sin, self.heads)
        normed = self.norms[0](x)
        fused = torch.cat([module(normed) for module in self.inward], dim=-1)
        queries, keys = self.counts(fused.shape[-1])
        query, key, value = fused.unflatten(-1, (-1, self.attention.head_dim)).split((queries, keys, keys), dim=2)
        turned = [rotate(each.clone(), cos, sin) for each in (query, key)]
        return tuple(each.transpose(1, 2) for each in (*turned, value))

    def after(self, mixed: Tensor, x: Tensor) -> Tensor:
        """The layer's end: the attention's output (R, T, H d) and the layer's input x (R, T, D) to (R, T, D)."""
        x = x + (self.outward(mixed) if self.out is None else product(mixed, self.out))
        if self.gated is None:
            return x + self.mlp(self.norms[1](x))
        if "forward" in vars(self.mlp):  # somebody wants it to be computed again, and not kept (recompute.py)
            return x + checkpoint(gated, x, self.gated, use_reentrant=False)
        return x + gated(x, self.gated)


def read(layer: nn.Module, anatomy: Anatomy) -> Parts | None:
    """The parts of a layer; None where it has not the standard form."""
    inside, paths = dict(layer.named_modules()), {**anatomy.attention, **anatomy.mlp}
    inward = [role for role in ("q", "k", "v", "qkv") if role in paths]
    needed = [*inward, *OUTWARD]
    linears = {role: inside[paths[role]] for role in needed if paths.get(role) in inside}
    norms = [anatomy.norms[place] for place in ("attention", "mlp") if anatomy.norms.get(place) in inside]
    if len(linears) < len(needed) or len(norms) < 2 or anatomy.self_attention not in inside:
        return None
    mlp_path = paths["down"].rpartition(".")[0]
    attention, mlp = inside[anatomy.self_attention], inside[mlp_path]
    known: dict[nn.Module, set[str]] = {
        layer: {anatomy.self_attention, mlp_path, *norms},
        attention: {"rotary_emb", *(paths[role].rpartition(".")[2] for role in (*inward, "o"))},
        mlp: {"act_fn", *(paths[role].rpartition(".")[2] for role in MLP_ROLES)},
    }
    odd = any({name for name, _ in module.named_children()} - names for module, names in known.items())
    # weights of a module's own, or a number of a layer's: sinks, or a factor on the residual
    odd |= any(True for module in known for _ in module.parameters(recurse=False))
    odd |= any(isinstance(value, float) for value in vars(layer).values())
    if odd or not {"head_dim", "num_key_value_groups", "scaling"} <= vars(attention).keys():
        return None
    return Parts(
        attention=attention,
        norms=(inside[norms[0]], inside[norms[1]]),
        inward=tuple(linears[role] for role in inward),
        outward=linears["o"],
        mlp=mlp,
        inner=tuple(linears[role] for role in MLP_ROLES),
        adapters=tuple(module for module in inside.values() if isinstance(module, BaseTunerLayer)),
    )


def with_functions(parts: Parts, kernels: Kernels) -> Parts:
    """The parts with functions in the place of the modules that are understood."""
    gate, up, down = parts.inner
    before, between = map(_norm, parts.norms)
    inward, gate_up, last = Products.of(*parts.inward), Products.of(gate, up), Products.of(down)
    made = replace(parts, out=Products.of(parts.outward))
    if before and inward:
        counts = parts.counts(inward.width)
        made = replace(made, heads=Heads(before, inward, parts.attention.head_dim, *counts, kernels))
    if between and gate_up and last:
        made = replace(made, gated=MLP(between, gate_up, last, kernels))
    return _proven(made, parts)


def joined(plain: Parts, runs: Sequence[Parts], *, before: Rows, after: Rows) -> Parts:
    """A layer that several runs share, with the tuners of all.

    Args:
        plain: the layer without a method.
        runs: the layer in each run's model, the whole of it by functions.
        before: whose rows are whose in its attention.
        after: likewise after it.
    """
    heads = [run.heads for run in runs if run.heads is not None]
    out = [run.out for run in runs if run.out is not None]
    gated = [run.gated for run in runs if run.gated is not None]
    return replace(
        plain,
        adapters=tuple(adapter for run in runs for adapter in run.adapters),
        heads=replace(heads[0], products=Products.joined([each.products for each in heads], before)),
        out=Products.joined(out, after),
        gated=replace(
            gated[0],
            gate_up=Products.joined([each.gate_up for each in gated], after),
            down=Products.joined([each.down for each in gated], after),
        ),
    )


def _norm(module: nn.Module) -> Norm | None:
    """A frozen norm that may be RMS's, by what it holds."""
    eps = next((getattr(module, name) for name in EPS if hasattr(module, name)), None)
    held = dict(module.named_parameters())
    if eps is None or held.keys() != {"weight"} or held["weight"].requires_grad or [*module.children()]:
        return None
    return Norm(module, eps)


@torch.no_grad()
def _proven(made: Parts, plain: Parts) -> Parts:
    """`made` without those functions that do not say what the modules say: a model's norm or activation is another."""
    like = next(plain.norms[0].parameters())
    if like.is_meta:
        return made
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, PROBE, like.numel(), generator=generator).to(like)
    half = torch.randn(1, PROBE, 1, plain.attention.head_dim // 2, generator=generator).to(like)
    told = x, torch.cat([half, half], -1).cos(), torch.cat([half, half], -1).sin()
    with _without_dropout(plain):
        if made.heads and not all(map(_close, made.project(*told), plain.project(*told))):
            made = replace(made, heads=None)
        if made.gated and not _close(gated(x, made.gated), plain.mlp(plain.norms[1](x))):
            made = replace(made, gated=None)
    return made


@contextmanager
def _without_dropout(parts: Parts) -> Iterator[None]:
    training = [module for each in parts.adapters for module in each.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _close(ours: Tensor, theirs: Tensor) -> bool:
    rounding = 1e-4 if theirs.dtype in (torch.float32, torch.float64) else 3e-2
    return bool((ours - theirs).norm() <= rounding * theirs.norm())
