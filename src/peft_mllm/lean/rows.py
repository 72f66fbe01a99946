"""Whose rows are whose: several runs lie in one row of tokens, one after the other, each with its own tuners.

Frozen linears multiply the rows of all runs at once. On one CPU thread that changes no bit of any run: a row of a
product does not depend on how many others there are, but where there are few (`FEW`), and these are multiplied by
themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby, pairwise

import torch
from torch import Tensor

from peft_mllm.lean.generator import generator_state, set_generator_state

FEW = 32
"""Rows below which a product may be computed by another kernel, which rounds otherwise."""


@dataclass
class Rows:
    """The rows of each run in what is computed now; it is set anew before each forward pass.

    Attributes:
        stretches: of each run, in order and without a gap.
        draws: of each run, the state of the generator that its dropout goes on from; None where it draws nothing.
    """

    stretches: Sequence[slice] = (slice(None),)
    draws: list[Tensor | None] = field(default_factory=lambda: [None])

    def lay(self, lengths: Sequence[int]) -> None:
        """From now on the runs have so many rows each."""
        ends = [0]
        for length in lengths:
            ends.append(ends[-1] + length)
        self.stretches = [slice(begin, end) for begin, end in pairwise(ends)]

    def at_once(self, alike: Sequence[bool]) -> Iterator[tuple[list[int], slice]]:
        """Neighbouring runs that are multiplied at once, and their rows.

        Args:
            alike: something of each run; only those of which it is the same are taken together.
        """
        if len(self.stretches) == 1:
            yield [0], self.stretches[0]
            return
        few = any(at.stop - at.start < FEW for at in self.stretches)
        for _, group in groupby(range(len(alike)), key=lambda run: (alike[run], run if few else 0)):
            runs = list(group)
            yield runs, slice(self.stretches[runs[0]].start, self.stretches[runs[-1]].stop)

    @contextmanager
    def drawing(self, run: int, device: torch.device) -> Iterator[None]:
        """Until the context ends, torch's generator goes on where this run's stopped."""
        state = self.draws[run]
        if state is None:
            yield
            return
        set_generator_state(state, device)
        yield
        self.draws[run] = generator_state(device)
