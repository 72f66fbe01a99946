"""From a task's records to the batches of a run: splits, checks before training, samples on demand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from peft_mllm.data.check import Length, Report
from peft_mllm.data.encode import Sample
from peft_mllm.data.trees import Batch, Pixels, collate, collate_padded, plant
from peft_mllm.errors import DataError
from peft_mllm.record import Record

Encode = Callable[[Record], Sample]
SHOWN = 20
"""Over-long samples that a message lists."""


@dataclass(frozen=True)
class Supply:
    """Makes batches of records, as trees or as padded rows.

    Attributes:
        records: where samples come from.
        encode: a family's encoding.
        pixels: a family's image preparation.
        pad_id: token id under padding.
        trees: whether the model takes trees at all.
        share: whether samples with one image share its prefix.
    """

    records: Sequence[Record]
    encode: Encode
    pixels: Pixels
    pad_id: int
    trees: bool
    share: bool

    def unshared(self) -> Supply:
        """The same, with every sample in a tree of its own."""
        return replace(self, share=False)

    def batch(self, indices: Sequence[int]) -> Batch:
        """The batch of these records."""
        samples = [self.encode(self.records[i]) for i in indices]
        if not self.trees:
            return collate_padded(samples, pixels=self.pixels, pad_id=self.pad_id)
        return collate(plant(samples, share=self.share), pixels=self.pixels, pad_id=self.pad_id)

    def batches(self, size: int, *, rank: int, world_size: int) -> Iterator[Batch]:
        """All records in order, `size` at a time; every `world_size`-th batch from `rank` on."""
        for start in range(rank * size, len(self.records), world_size * size):
            yield self.batch(range(start, min(start + size, len(self.records))))


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
