"""What a run has in common with the others in its process; a run by itself shares with nobody.

Runs of one base read the same data, see the same images and compute with the same frozen weights. Where they live in
one process (together/), they are given one `Common`, and each of these is there once.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from peft_mllm.data.encode import Sample
from peft_mllm.features import Held
from peft_mllm.loading import load_family
from peft_mllm.models import Family
from peft_mllm.models.base import Labels
from peft_mllm.record import Record
from peft_mllm.spec import ModelSpec
from peft_mllm.splits import Opened
from peft_mllm.tasks import Task
from peft_mllm.training import Compute
from peft_mllm.tuned import Tuned

SAMPLES = 2048
"""Encoded samples that are kept: with 650 tokens each some 50 MB."""


class Encodings:
    """Encoded samples by what they are made of, the ones used last."""

    def __init__(self) -> None:
        self._samples: OrderedDict[tuple[object, ...], Sample] = OrderedDict()

    def before(self, encode: Callable[..., Sample]) -> Callable[..., Sample]:
        """A family's `encode` that does nothing twice."""

        def remembered(record: Record, *, answer: bool = True, labels: Labels = "answer") -> Sample:
            key = (record.id, record.turns, record.images, answer, labels)  # dropout is a function of the id, too
            sample = self._samples.pop(key, None) or encode(record, answer=answer, labels=labels)
            self._samples[key] = sample
            if len(self._samples) > SAMPLES:
                self._samples.popitem(last=False)
            return sample

        return remembered


@dataclass(frozen=True)
class Common:
    """What may be there once for several runs.

    Attributes:
        load: the base model, and the weights' type to it; each run may put its method on what it gets.
        tasks: by their options.
        opened: splits that were read and checked, by what decides them.
        encodings: samples that were encoded.
        held: vision features in memory; None where the run has its own.
        compute: a model, and the tokens that it may compute at once, to how its gradients are computed.
        clock: seconds that this run has taken, since any moment.
        stop: whether somebody asked to stop; None where the run hears of it itself.
        runs: how many there are.
    """

    load: Callable[[ModelSpec, str], Family] = lambda spec, dtype: load_family(spec, dtype=dtype)
    tasks: dict[str, Task] = field(default_factory=dict)
    opened: dict[tuple[object, ...], Opened | None] = field(default_factory=dict)
    encodings: Encodings = field(default_factory=Encodings)
    held: Held | None = None
    compute: Callable[[Tuned, int | None], Compute] = lambda tuned, limit: tuned.add_gradients
    clock: Callable[[], float] = time.monotonic
    stop: Callable[[], bool] | None = None
    runs: int = 1
