"""Opening a split of a task: read and checked as a whole before anything starts, then used one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from peft_mllm.data.check import Length, Report
from peft_mllm.data.supply import refuse_long
from peft_mllm.record import Record
from peft_mllm.screen import Screen
from peft_mllm.seeds import derive
from peft_mllm.tasks import Split, Task


@dataclass(frozen=True)
class Opened:
    """A split of a task that was read and checked before anything started."""

    name: str
    task: Task
    records: Sequence[Record]
    report: Report | None


def open_split(
    task: Task,
    name: str,
    split: Split,
    *,
    measure: Callable[[Record], Length],
    limit: int | None,
    screen: Screen,
) -> Opened:
    """Read and check a split, and say what was read.

    Raises:
        DataError: everything that is wrong with it, over-long samples among it.
    """
    with screen.bar(f"checking {name} {split}", 1) as bar:
        report = task.report(split, measure=measure, progress=lambda done, total: bar.advance(to=done, total=total))
    records = first(task.records(split), limit)
    if report is None:
        refuse_long(records, measure)
    else:
        screen.note(f"{name} {split}: {report.summary()}")
    return Opened(name=name, task=task, records=records, report=report)


def first(records: Sequence[Record], limit: int | None) -> Sequence[Record]:
    """The first records, or all of them."""
    return records if limit is None or limit >= len(records) else records[:limit]


def split_off(records: Sequence[Record], fraction: float, seed: int) -> tuple[Sequence[Record], Sequence[Record]]:
    """Training and validation records; who goes where is a function of seed and record id."""
    held_out = {i for i, record in enumerate(records) if derive(seed, "validation", record.id) < fraction * 2**63}
    kept = [records[i] for i in range(len(records)) if i not in held_out]
    return kept, [records[i] for i in sorted(held_out)]
