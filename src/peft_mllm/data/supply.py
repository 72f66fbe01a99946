"""From a task's records to the batches of a run: splits, checks before training, samples on demand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from peft_mllm.data.check import Length, Report
from peft_mllm.data.encode import Sample
from peft_mllm.data.seeing import Pixels
from peft_mllm.data.trees import Batch, Tree, collate, collate_padded, cut, pack, plant
from peft_mllm.errors import DataError
from peft_mllm.record import Record

Encode = Callable[[Record], Sample]
Layout = Literal["packed", "rows", "padded"]
"""How samples lie in a batch: trees in one row without padding, a tree in each row with a mask, a sample in each."""
SHOWN = 20
"""Over-long samples that a message lists."""


@dataclass(frozen=True)
class Supply:
    """Makes batches of records.

    Attributes:
        records: where samples come from.
        encode: a family's encoding.
        pixels: a family's image preparation.
        pad_id: token id under padding.
        layout: what the model takes.
        share: whether samples with one image share its prefix.
        tokens: that are computed at once, at most, where one sample is not longer; None is no limit.
    """

    records: Sequence[Record]
    encode: Encode
    pixels: Pixels
    pad_id: int
    layout: Layout
    share: bool
    tokens: int | None = None

    def batches(self, indices: Sequence[int]) -> list[Batch]:
        """These records in as few batches as the limit of tokens allows."""
        samples = [self.encode(self.records[i]) for i in indices]
        return [self.lay(trees) for trees in self._within(plant(samples, share=self.share and self.layout != "padded"))]

    def lay(self, trees: Sequence[Tree]) -> Batch:
        """One batch of these trees."""
        if self.layout == "padded":
            samples = [sample for tree in trees for sample in tree.samples]
            return collate_padded(samples, pixels=self.pixels, pad_id=self.pad_id)
        lay = pack if self.layout == "packed" else collate
        return lay(trees, pixels=self.pixels, pad_id=self.pad_id)

    def all(self, size: int, *, rank: int, world_size: int) -> Iterator[Batch]:
        """All records in order, `size` at a time; every `world_size`-th of these parts from `rank` on."""
        for start in range(rank * size, len(self.records), world_size * size):
            yield from self.batches(range(start, min(start + size, len(self.records))))

    def _within(self, trees: Sequence[Tree]) -> Iterator[list[Tree]]:
        """The trees in order, as many at a time as the limit of tokens allows; a tree too large is cut in parts."""
        if self.tokens is None:
            yield list(trees)
            return
        some: list[Tree] = []
        for part in (part for tree in trees for part in cut(tree, self.tokens)):
            if some and self._computed([*some, part]) > self.tokens:
                yield some
                some = []
            some.append(part)
        yield some

    def _computed(self, trees: Sequence[Tree]) -> int:
        """Tokens that a batch of these trees computes, padding included."""
        lengths = [tree.length for tree in trees]
        return sum(lengths) if self.layout == "packed" else len(lengths) * max(lengths)


def measure_with(encode: Encode, max_length: int) -> Callable[[Record], Length]:
    """A record's length for a model, for the data check."""

    def measure(record: Record) -> Length:
        sample = encode(record)
        return Length(total=len(sample.ids), answer=sample.answer_tokens, limit=max_length)

    return measure


def refuse_long(records: Sequence[Record], measure: Callable[[Record], Length]) -> None:
    """Raise for records that do not fit; they are never cut, since a cut takes the answer first.

    Raises:
        DataError: lists them.
    """
    long = [
        f"{record.source or record.id}: {length.total} tokens, {length.limit} fit"
        for record in records
        if (length := measure(record)).total > length.limit
    ]
    if long:
        more = f"\nand {len(long) - SHOWN} more" if len(long) > SHOWN else ""
        listed = "\n".join(long[:SHOWN])
        raise DataError(f"{len(long)} samples are too long:\n{listed}{more}\nRaise data.max_length, or leave them out.")


def account_of(task: str, records: Sequence[Record], report: Report | None, fingerprint: str) -> dict[str, Any]:
    """The reconciliation of what was read, for result.json."""
    read = {"read": report.read, "used": report.used, "quarantined": report.quarantined} if report else None
    counted = read or {"read": len(records), "used": len(records), "quarantined": 0}
    findings = dict(report.counts) if report else {}
    return {
        "task": task,
        **counted,
        "findings": findings,
        "trained_on": len(records),
        "fingerprint": fingerprint,
    }
