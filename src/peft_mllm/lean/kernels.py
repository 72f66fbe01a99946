"""The elementwise work of a decoder's layer, forward and backward, in float32 inside.

They are all that `torch.compile` has to fuse; what is between them are matrix products and attention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from peft_mllm.errors import SpecError


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The norm x / rms(x) * w of rows (N, D), in the type that the product of both has."""
    exact = _exact(x)
    normed = (exact * _inverse_rms(exact, eps)).to(x.dtype)
    return normed.mul_(weight) if weight.dtype == x.dtype else normed * weight


def rms_norm_back(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The gradient of x (N, D): with g = grad * w and r = 1 / rms(x) it is r (g - x r^2 mean(g x))."""
    exact = _exact(x)
    factor, scaled = _inverse_rms(exact, eps), _exact(grad) * weight
    along = (scaled * exact).mean(-1, keepdim=True) * factor.square()
    return scaled.addcmul_(exact, along, value=-1).mul_(factor).to(x.dtype)


def silu_product(gate_up: Tensor) -> Tensor:
    """The product silu(g) u, where (g, u) are the halves of (N, 2 F)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def silu_product_back(grad: Tensor, gate_up: Tensor) -> Tensor:
    """The gradient of (g, u): (grad u silu'(g), grad silu(g))."""
    gate, up = gate_up.chunk(2, dim=-1)
    result = torch.empty_like(gate_up)
    of_gate, of_up = result.chunk(2, dim=-1)
    torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=of_gate)
    torch.mul(F.silu(gate), grad, out=of_up)
    return result


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn heads (R, T, H, d) in place by angles (R or 1, T, 1, d); the pairs are (i, i + d / 2)."""
    exact, half = _exact(states), sin.shape[-1] // 2
    a, b = exact[..., :half], exact[..., half:]
    of_a, of_b = a * sin[..., half:], b * sin[..., :half]
    a.mul_(cos[..., :half]).sub_(of_b)  # rounded as the models round it: no addcmul
    b.mul_(cos[..., half:]).add_(of_a)
    return states if exact is states else states.copy_(exact)


def rotate_back(grad: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The gradient of what `rotate` turned, in place: it is turned the other way."""
    return rotate(grad, cos, -sin.roll(sin.shape[-1] // 2, dims=-1))


def _exact(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


@dataclass(frozen=True)
class Kernels:
    """The functions above, as they are or compiled."""

    rms_norm: Callable[..., Tensor] = rms_norm
    rms_norm_back: Callable[..., Tensor] = rms_norm_back
    silu_product: Callable[..., Tensor] = silu_product
    silu_product_back: Callable[..., Tensor] = silu_product_back
    rotate: Callable[..., Tensor] = rotate
    rotate_back: Callable[..., Tensor] = rotate_back

    @classmethod
    def compiled(cls) -> Kernels:
        """Each compiled for any number of tokens, when it is first called.

        Raises:
            SpecError: there is no compiler for it here.
        """
        made = cls(**{name: torch.compile(function, dynamic=True) for name, function in vars(cls()).items()})
        try:
            made.silu_product(torch.zeros(2, 2))
        except Exception as error:  # whatever the compiler raises, the remedy is one
            reason = str(error).strip().splitlines()[0]
            raise SpecError(f"speed.compile: torch.compile does not work here ({reason}). Set it to false.") from error
        return made
