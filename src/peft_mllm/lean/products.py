"""Linears of one input, with what a method put on them: y = [W1 x; W2 x; ...], forward and backward.

A frozen linear needs nothing saved for its gradient, dx = dy W. What is saved is what its tuner needs. (Held as one
matrix, q|k|v and gate|up were no quicker: 1.00 of this on a CPU; the sum over them is taken inside the products.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peft_mllm.lean.tuners import Kept, LowRank, Place, Tuner, understood


@dataclass(frozen=True)
class Site:
    """One linear of a product.

    Attributes:
        linear: the frozen linear.
        tuner: what the method put on it, if anything.
        columns: its columns of y.
    """

    linear: nn.Linear
    tuner: Tuner | None
    columns: slice

    def at(self, place: Place) -> Tuner | None:
        """Its tuner, if it has one at this place."""
        return self.tuner if self.tuner is not None and self.tuner.place == place else None


class Products:
    """Some frozen linears of one input."""

    def __init__(self, read: Sequence[tuple[nn.Linear, Tuner | None]]):
        self.sites: list[Site] = []
        self.width = 0
        for linear, tuner in read:
            self.sites.append(Site(linear, tuner, slice(self.width, self.width + linear.out_features)))
            self.width += linear.out_features

    @classmethod
    def of(cls, *modules: nn.Module) -> Products | None:
        """The product of a layer's modules; None where one of them is not understood."""
        read = [each for each in map(understood, modules) if each is not None]
        return cls(read) if len(read) == len(modules) else None

    @property
    def parameters(self) -> list[Tensor]:
        """What the method trains in them."""
        return [p for site in self.sites if site.tuner is not None for p in site.tuner.parameters]

    @property
    def reads_input(self) -> bool:
        """Whether the backward pass needs x."""
        return any(site.at("input") or site.at("beside") for site in self.sites)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """Rows x (N, D) to y (N, width) in x's type, and three things a site that the backward pass needs."""
        y = x.new_empty(len(x), self.width)
        kept: list[Tensor | None] = []
        for site in self.sites:
            out, read, before = y[:, site.columns], x, None
            more: Kept = (None, None)
            if tuner := site.at("input"):
                read, more = tuner.change(x)
            torch.mm(read, site.linear.weight.to(x.dtype).T, out=out)
            if site.linear.bias is not None:
                out.add_(site.linear.bias.to(x.dtype))
            if isinstance(tuner := site.at("beside"), LowRank):
                more = tuner.add(out, x)
            elif tuner := site.at("output"):
                before = out.clone()
                changed, more = tuner.change(before)
                out.copy_(changed)
            kept += [before, *more]
        return y, kept

    def backward(
        self, grad: Tensor, x: Any, kept: Sequence[Any], *, wanted: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        """The gradient of x, if wanted, and those of the parameters.

        Args:
            grad: of y.
            x: as it was in `forward`, where `reads_input`.
            kept: what `forward` kept.
            wanted: whether x has a gradient.
        """
        result: Tensor | None = None
        of_parameters: list[Tensor] = []
        for i, site in enumerate(self.sites):
            out, weight = grad[:, site.columns], site.linear.weight
            before, more = kept[3 * i], (kept[3 * i + 1], kept[3 * i + 2])
            if tuner := site.at("output"):
                out, some = tuner.back(out, before, more)
                of_parameters += some
            if tuner := site.at("input"):
                part, some = tuner.back(out @ weight.to(out.dtype), x, more)
                of_parameters += some
                result = part if result is None else result.add_(part)
            elif wanted:
                frozen = weight.to(out.dtype)
                result = out @ frozen if result is None else result.addmm_(out, frozen)
            if isinstance(tuner := site.at("beside"), LowRank):
                of_parameters += tuner.back_into(result if wanted else None, out, x, more)
        cast = [each.to(p.dtype) for each, p in zip(of_parameters, self.parameters, strict=True)]
        return result if wanted else None, cast
