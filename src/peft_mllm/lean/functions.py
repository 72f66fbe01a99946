"""The two halves of a pre-norm decoder layer as one autograd function each; between them stands the attention.

    q, k, v = rotary(W_qkv norm(x));  x <- x + W_o attention(q, k, v);  x <- x + W_down (silu(g) u), g, u = W_gu norm(x)

Saved for the backward pass: x, the attention's own q, k, v and output, x again, g and u. Norms, angles and silu are
computed again, which costs little: it is all elementwise. In bytes a token and layer at bfloat16 that is 12 h + 4 f
(h the hidden, f the inner width); autograd by itself saves about twice of it.

The functions take a method's parameters only so that autograd knows of them; they are read where the method has them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from peft_mllm.lean.kernels import Kernels
from peft_mllm.lean.products import Products


@dataclass(frozen=True)
class Norm:
    """A frozen RMS norm: the module that holds its weight (D,), and what is added to the mean square."""

    module: nn.Module
    eps: float

    @property
    def weight(self) -> Tensor:
        """(D,)."""
        return next(self.module.parameters())


@dataclass(frozen=True)
class Heads:
    """norm, q|k|v, rotary.

    Attributes:
        norm: before the attention.
        products: q, k and v, or one linear that gives them all.
        width: of a head.
        queries: how many heads ask.
        keys: how many there are of keys, and of values.
        kernels: the elementwise work.
    """

    norm: Norm
    products: Products
    width: int
    queries: int
    keys: int
    kernels: Kernels


@dataclass(frozen=True)
class MLP:
    """norm, gate|up, silu, down."""

    norm: Norm
    gate_up: Products
    down: Products
    kernels: Kernels

    @property
    def both(self) -> tuple[Products, Products]:
        """Its products."""
        return self.gate_up, self.down


def compute_type(x: Tensor, weight: Tensor) -> torch.dtype:
    """In which products are computed: autocast's, or the weights' own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def heads(x: Tensor, cos: Tensor, sin: Tensor, of: Heads) -> tuple[Tensor, ...]:
    """Turned queries (R, H, T, d) and keys (R, K, T, d), and values (R, K, T, d), of hidden states x (R, T, D)."""
    made: tuple[Tensor, ...] = _Heads.apply(x, cos, sin, of, *of.products.parameters)
    return made


def gated(x: Tensor, of: MLP) -> Tensor:
    """W_down (silu(g) u) of hidden states x (R, T, D), without the residual."""
    made: Tensor = _MLP.apply(x, of, *of.gate_up.parameters, *of.down.parameters)
    return made


def product(x: Tensor, of: Products) -> Tensor:
    """The output of a linear, with what a method put on it, for x (..., D)."""
    made: Tensor = _Product.apply(x, of, *of.parameters)
    return made


class _Heads(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, of: Heads, *parameters: Tensor) -> tuple[Tensor, ...]:
        rows = x.flatten(0, 1)
        dtype = compute_type(x, of.products.sites[0].linear.weight)
        normed = of.kernels.rms_norm(rows, of.norm.weight, of.norm.eps).to(dtype)
        fused, kept = of.products.forward(normed)
        heads = fused.view(*x.shape[:2], -1, of.width)  # (R, T, H + 2 K, d)
        of.kernels.rotate(heads[:, :, : of.queries + of.keys], cos, sin)
        ctx.of, ctx.dtype = of, dtype
        ctx.save_for_backward(x, cos, sin, *kept)
        return tuple(part.transpose(1, 2) for part in heads.split((of.queries, of.keys, of.keys), dim=2))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        of: Heads = ctx.of
        x, cos, sin, *kept = ctx.saved_tensors
        rows = x.flatten(0, 1)
        grad = torch.cat([each.transpose(1, 2) for each in grads], dim=2)  # (R, T, H + 2 K, d)
        of.kernels.rotate_back(grad[:, :, : of.queries + of.keys], cos, sin)
        normed = _normed(of.kernels, rows, of.norm, ctx.dtype, of.products)
        grad_normed, of_parameters = of.products.backward(
            grad.flatten(0, 1).flatten(1), normed, kept, wanted=ctx.needs_input_grad[0]
        )
        return _through_norm(of.kernels, grad_normed, x, of.norm), None, None, None, *of_parameters


class _MLP(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, of: MLP, *parameters: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        dtype = compute_type(x, of.down.sites[0].linear.weight)
        normed = of.kernels.rms_norm(rows, of.norm.weight, of.norm.eps).to(dtype)
        gate_up, kept = of.gate_up.forward(normed)
        y, kept_down = of.down.forward(of.kernels.silu_product(gate_up))
        ctx.of, ctx.dtype = of, dtype
        ctx.save_for_backward(x, gate_up, *kept_down, *kept)
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        of: MLP = ctx.of
        x, gate_up, *kept = ctx.saved_tensors
        rows = x.flatten(0, 1)
        product = of.kernels.silu_product(gate_up) if of.down.reads_input else None
        grad_product, of_down = of.down.backward(grad.flatten(0, 1), product, kept[: of.down.keeps], wanted=True)
        grad_gate_up = of.kernels.silu_product_back(grad_product, gate_up)
        del product, grad_product  # a backward pass holds most right here
        normed = _normed(of.kernels, rows, of.norm, ctx.dtype, of.gate_up)
        kept = kept[of.down.keeps :]
        grad_normed, of_gate_up = of.gate_up.backward(grad_gate_up, normed, kept, wanted=ctx.needs_input_grad[0])
        return _through_norm(of.kernels, grad_normed, x, of.norm), None, *of_gate_up, *of_down


class _Product(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, of: Products, *parameters: Tensor) -> Tensor:
        rows = x.flatten(0, -2).to(compute_type(x, of.sites[0].linear.weight))
        y, kept = of.forward(rows)
        ctx.of, ctx.like = of, (x.shape, x.dtype)
        ctx.save_for_backward(rows if of.reads_input else None, *kept)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, *kept = ctx.saved_tensors
        result, of_parameters = ctx.of.backward(grad.flatten(0, -2), rows, kept, wanted=ctx.needs_input_grad[0])
        shape, dtype = ctx.like
        return None if result is None else result.view(shape).to(dtype), None, *of_parameters


def _normed(kernels: Kernels, rows: Tensor, norm: Norm, dtype: torch.dtype, products: Products) -> Tensor | None:
    """The norm's output once more, where the products' backward pass needs it."""
    return kernels.rms_norm(rows, norm.weight, norm.eps).to(dtype) if products.reads_input else None


def _through_norm(kernels: Kernels, grad: Tensor | None, x: Tensor, norm: Norm) -> Tensor | None:
    """The gradient of x (R, T, D), where that of the norm's output (N, D) is there."""
    return None if grad is None else kernels.rms_norm_back(grad, x.flatten(0, 1), norm.weight, norm.eps).view(x.shape)
