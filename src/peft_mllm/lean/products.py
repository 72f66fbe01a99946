"""Linears of one input, with what methods put on them: y = [W1 x; W2 x; ...], forward and backward.

A frozen linear needs nothing saved for its gradient, dx = dy W. What is saved is what its tuners need. (Held as one
matrix, q|k|v and gate|up were no quicker: 1.00 of this on a CPU; the sum over them is taken inside the products.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peft_mllm.lean.rows import Rows
from peft_mllm.lean.tuners import Kept, LowRank, Place, Tuner, understood

NOTHING: Kept = (None, None)


@dataclass(frozen=True)
class Site:
    """One linear of a product.

    Attributes:
        linear: the frozen linear.
        tuners: what each run's method put on it, if anything.
        columns: its columns of y.
    """

    linear: nn.Linear
    tuners: tuple[Tuner | None, ...]
    columns: slice

    def at(self, place: Place, run: int) -> Tuner | None:
        """A run's tuner, if it has one at this place."""
        tuner = self.tuners[run]
        return tuner if tuner is not None and tuner.place == place else None

    @property
    def changes_input(self) -> list[bool]:
        """Of each run, whether the linear reads something else than x."""
        return [self.at("input", run) is not None for run in range(len(self.tuners))]


class Products:
    """Some frozen linears of one input, with the tuners of one run, or of several that share them.

    Args:
        linears: of one input.
        tuners: of each linear, those of each run.
        rows: whose rows are whose; all are the one run's if left out.
    """

    def __init__(
        self, linears: Sequence[nn.Linear], tuners: Sequence[Sequence[Tuner | None]], rows: Rows | None = None
    ):
        self.rows = rows or Rows()
        self.sites: list[Site] = []
        self.width = 0
        for linear, own in zip(linears, tuners, strict=True):
            self.sites.append(Site(linear, tuple(own), slice(self.width, self.width + linear.out_features)))
            self.width += linear.out_features

    @classmethod
    def of(cls, *modules: nn.Module) -> Products | None:
        """The product of a layer's modules; None where one of them is not understood."""
        read = [each for each in map(understood, modules) if each is not None]
        if len(read) < len(modules):
            return None
        return cls([linear for linear, _ in read], [[tuner] for _, tuner in read])

    @classmethod
    def joined(cls, runs: Sequence[Products], rows: Rows) -> Products:
        """The same linears with the tuners of several runs."""
        sites = zip(*(run.sites for run in runs), strict=True)
        return cls([site.linear for site in runs[0].sites], [[own.tuners[0] for own in each] for each in sites], rows)

    @property
    def parameters(self) -> list[Tensor]:
        """What the methods train in them."""
        return [p for site in self.sites for tuner in site.tuners if tuner is not None for p in tuner.parameters]

    @property
    def reads_input(self) -> bool:
        """Whether the backward pass needs x."""
        return any(tuner is not None and tuner.place != "output" for site in self.sites for tuner in site.tuners)

    @property
    def keeps(self) -> int:
        """How many things `forward` keeps: three a tuner, or the place of one."""
        return 3 * sum(len(site.tuners) for site in self.sites)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """Rows x (N, D) to y (N, width) in x's type, and three things a tuner that the backward pass needs."""
        y = x.new_empty(len(x), self.width)
        kept: list[Tensor | None] = []
        for site in self.sites:
            found: dict[int, tuple[Tensor | None, ...]] = {}
            for runs, at in self.rows.at_once(site.changes_input):
                self._forward(site, runs, x[at], y[at, site.columns], found)
            for run in range(len(site.tuners)):
                kept += found[run]
        return y, kept

    def _forward(
        self, site: Site, runs: Sequence[int], x: Tensor, out: Tensor, found: dict[int, tuple[Tensor | None, ...]]
    ) -> None:
        """Runs that are alike: their rows of x to their rows of a site's columns."""
        own, stretches = site.tuners, self._within(runs)
        read = x
        if site.at("input", runs[0]):
            parts = []
            for run, at in zip(runs, stretches, strict=True):
                part, more = self._changed(own[run], x[at], run)
                parts.append(part)
                found[run] = (None, *more)
            read = torch.cat(parts) if len(parts) > 1 else parts[0]
        torch.mm(read, site.linear.weight.to(x.dtype).T, out=out)
        if site.linear.bias is not None:
            out.add_(site.linear.bias.to(x.dtype))
        for run, at in zip(runs, stretches, strict=True):
            if isinstance(tuner := site.at("beside", run), LowRank):
                with self.rows.drawing(run, x.device):
                    found[run] = (None, *tuner.add(out[at], x[at]))
            elif site.at("output", run):
                before = out[at].clone()
                changed, more = self._changed(own[run], before, run)
                out[at] = changed
                found[run] = (before, *more)
            else:
                found.setdefault(run, (None, *NOTHING))

    def _changed(self, tuner: Tuner | None, t: Tensor, run: int) -> tuple[Tensor, Kept]:
        assert tuner is not None, "it was found at its place"
        with self.rows.drawing(run, t.device):
            return tuner.change(t)

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
        result = grad.new_empty(len(grad), self.sites[0].linear.in_features) if wanted else None
        of_parameters: list[Tensor] = []
        for number, site in enumerate(self.sites):
            count = len(site.tuners)
            mine = kept[3 * number * count : 3 * (number + 1) * count]
            found: dict[int, list[Tensor]] = {}
            for runs, at in self.rows.at_once(site.changes_input):
                read = None if x is None else x[at]
                into = None if result is None else result[at]
                self._backward(site, runs, grad[at, site.columns], read, mine, into, found, first=number == 0)
            of_parameters += [gradient for run in range(count) for gradient in found[run]]
        cast = [each.to(p.dtype) for each, p in zip(of_parameters, self.parameters, strict=True)]
        return result, cast

    def _backward(
        self,
        site: Site,
        runs: Sequence[int],
        out: Tensor,
        x: Tensor | None,
        kept: Sequence[Any],
        result: Tensor | None,
        found: dict[int, list[Tensor]],
        *,
        first: bool,
    ) -> None:
        """Runs that are alike: the gradient of a site's columns to that of x, written or added, and of parameters."""
        stretches = self._within(runs)
        weight = site.linear.weight.to(out.dtype)
        out = self._through_outputs(site, runs, out, kept, found)
        if site.at("input", runs[0]):
            part = torch.mm(out, weight, out=result) if first and result is not None else out @ weight
            for run, at in zip(runs, stretches, strict=True):
                tuner = site.tuners[run]
                assert tuner is not None, "runs at once are alike"
                assert x is not None, "the backward pass of such a tuner reads it"
                part[at], found[run] = tuner.back(part[at], x[at], _of(kept, run)[1])
            if result is not None and not first:
                result.add_(part)
            return
        if result is not None:
            torch.mm(out, weight, out=result) if first else result.addmm_(out, weight)
        for run, at in zip(runs, stretches, strict=True):
            if isinstance(tuner := site.at("beside", run), LowRank):
                assert x is not None, "the backward pass of such a tuner reads it"
                into = None if result is None else result[at]
                found[run] = tuner.back_into(into, out[at], x[at], _of(kept, run)[1])
            else:
                found.setdefault(run, [])

    def _through_outputs(
        self, site: Site, runs: Sequence[int], out: Tensor, kept: Sequence[Any], found: dict[int, list[Tensor]]
    ) -> Tensor:
        """The gradient of the linear's own output, where tuners changed it after."""
        if not any(site.at("output", run) for run in runs):
            return out
        parts = []
        for run, at in zip(runs, self._within(runs), strict=True):
            part = out[at]
            if tuner := site.at("output", run):
                before, more = _of(kept, run)
                part, found[run] = tuner.back(part, before, more)
            parts.append(part)
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _within(self, runs: Sequence[int]) -> list[slice]:
        """Each run's rows among those of the runs that are computed at once."""
        stretches = self.rows.stretches
        if len(stretches) == 1:
            return [stretches[0]]
        begin = stretches[runs[0]].start
        return [slice(stretches[run].start - begin, stretches[run].stop - begin) for run in runs]


def _of(kept: Sequence[Any], run: int) -> tuple[Any, Kept]:
    """What a run's tuner at a site kept: what it changed, and two more."""
    return kept[3 * run], (kept[3 * run + 1], kept[3 * run + 2])
