"""Which samples meet in which step: a pure function of seed, epoch and data, so that resuming is a number."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from peft_mllm.seeds import derive


@dataclass(frozen=True)
class Plan:
    """The order of training.

    Attributes:
        size: samples in the training data.
        micro_batch: samples computed at once.
        micro_batches: micro-batches of a step, over all processes.
        seed: of the run.
        groups: one label a sample, to keep samples of equal labels in neighbouring places; None shuffles freely.
    """

    size: int
    micro_batch: int
    micro_batches: int
    seed: int
    groups: tuple[Hashable, ...] | None = None

    @property
    def steps_per_epoch(self) -> int:
        """The last step of an epoch may be smaller: no sample is dropped, none is seen twice."""
        return math.ceil(self.size / (self.micro_batch * self.micro_batches))

    def step(self, number: int) -> list[list[int]]:
        """The micro-batches of a step (counted from 0 over all epochs), as sample indices."""
        epoch, within = divmod(number, self.steps_per_epoch)
        order = self.order(epoch)
        width = self.micro_batch * self.micro_batches
        samples = order[within * width : (within + 1) * width]
        return [samples[i : i + self.micro_batch] for i in range(0, len(samples), self.micro_batch)]

    def order(self, epoch: int) -> list[int]:
        """A permutation of all samples for an epoch."""
        return self._orders(epoch)

    @cached_property
    def _orders(self):  # type: ignore[no-untyped-def]  # an lru_cache has no useful type
        # two epochs: the present one, and the next one a prefetching worker may have begun
        return lru_cache(maxsize=2)(self._shuffle)

    def _shuffle(self, epoch: int) -> list[int]:
        generator = np.random.Generator(np.random.PCG64(derive(self.seed, "order", epoch)))
        if self.groups is None:
            return generator.permutation(self.size).tolist()
        members: dict[Hashable, list[int]] = {}
        for index, label in enumerate(self.groups):
            members.setdefault(label, []).append(index)
        labels: Sequence[Hashable] = list(members)
        return [index for at in generator.permutation(len(labels)) for index in members[labels[at]]]
