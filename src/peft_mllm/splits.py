"""The data of a run: splits of its tasks, read and checked as a whole before anything starts, then used one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from peft_mllm.data.check import Length, Report
from peft_mllm.data.supply import refuse_long
from peft_mllm.errors import DataError, SpecError
from peft_mllm.record import Record
from peft_mllm.screen import Screen
from peft_mllm.seeds import derive
from peft_mllm.spec import DataSpec, Scored
from peft_mllm.tasks import Split, Task

Measure = Callable[[Record], Length]


@dataclass(frozen=True)
class Opened:
    """A split of a task that was read and checked before anything started.

    Attributes:
        name: the task's.
        task: itself.
        records: what is used of it.
        report: of the check, where there was one; of the whole split that was read.
        split: what it is used as.
        source: the split that it was read from: for records that were held out, `train`.
    """

    name: str
    task: Task
    records: Sequence[Record]
    report: Report | None
    split: Split
    source: Split


def open_split(
    task: Task,
    name: str,
    split: Split,
    *,
    measure: Measure,
    limit: int | None,
    screen: Screen,
    draw: int | None = None,
) -> Opened:
    """Read and check a split, and say what was read.

    Args:
        task: what it is a split of.
        name: the task's.
        split: which.
        measure: a record's length.
        limit: so many records at most.
        screen: where progress is shown.
        draw: the seed by which they are drawn; None takes the first.

    Raises:
        DataError: everything that is wrong with it, over-long samples among it.
    """
    with screen.bar(f"checking {name} {split}", 1) as bar:
        report = task.report(split, measure=measure, progress=lambda done, total: bar.advance(to=done, total=total))
    every = task.records(split)
    records = first(every, limit) if draw is None else drawn(every, limit, draw)
    if report is None:
        refuse_long(records, measure)
    else:
        screen.note(f"{name} {split}: {report.summary()}")
    return Opened(name=name, task=task, records=records, report=report, split=split, source=split)


def first(records: Sequence[Record], limit: int | None) -> Sequence[Record]:
    """The first records, or all of them."""
    return records if limit is None or limit >= len(records) else records[:limit]


def drawn(records: Sequence[Record], limit: int | None, seed: int) -> Sequence[Record]:
    """So many records in their order; who is drawn is a function of seed and record id.

    A smaller draw lies in every larger one of the same seed.
    """
    if limit is None or limit >= len(records):
        return records
    lots = sorted((derive(seed, "subset", record.id), i) for i, record in enumerate(records))
    return [records[i] for i in sorted(i for _, i in lots[:limit])]


def split_off(records: Sequence[Record], fraction: float, seed: int) -> tuple[Sequence[Record], Sequence[Record]]:
    """Training and validation records; who goes where is a function of seed and record id."""
    held_out = {i for i, record in enumerate(records) if derive(seed, "validation", record.id) < fraction * 2**63}
    kept = [records[i] for i in range(len(records)) if i not in held_out]
    return kept, [records[i] for i in sorted(held_out)]


@dataclass
class Splits:
    """What a run needs of its tasks' data; each split is read once, and only when it is asked for.

    Attributes:
        tasks: by name; the first is the one that is learned.
        data: how much of each is used.
        seed: of the run.
        measure: a record's length for the model.
        screen: where progress is shown.
        read: what was read before, which runs of one base may share.
    """

    tasks: Mapping[str, Task]
    data: DataSpec
    seed: int
    measure: Measure
    screen: Screen
    read: dict[tuple[object, ...], Opened | None] = field(default_factory=dict)

    def training(self) -> Opened:
        """What is learned: the task's training records without those that are held out.

        Raises:
            DataError: there are none.
        """
        name = next(iter(self.tasks))
        train = self._open(name, "train")
        if train is not None and self._own_validation(name) is None and self.data.validation_fraction:
            kept, _ = split_off(train.records, self.data.validation_fraction, self.seed)
            train = replace(train, records=kept)
        if train is None or not train.records:
            raise DataError(f"{name}: there is nothing to train on. Give the task training data.")
        return train

    def validation(self, name: str | None = None) -> Opened | None:
        """A task's validation split, or what is held out of its training split where it has none of its own.

        None where there is neither; without a name, of the task that is learned.
        """
        name = name or next(iter(self.tasks))
        own = self._own_validation(name)
        if own is not None or not self.data.validation_fraction:
            return own
        train = self._open(name, "train")
        _, held_out = split_off(train.records if train else (), self.data.validation_fraction, self.seed)
        return replace(train, records=held_out, split="validation") if train and held_out else None

    def questions(self, scored: Scored) -> list[Opened]:
        """What is asked after training, of each task that has it.

        Raises:
            SpecError: validation data is to be scored, and a task has none.
            DataError: a test split is empty.
        """
        if scored == "validation":
            return [self._validation_questions(name) for name in self.tasks]
        tests = [self._open(name, "test") for name in self.tasks]
        found = [opened for opened in tests if opened is not None]
        for asked in found:
            if not asked.records:
                raise DataError(f"{asked.name}: its test split is empty, there is nothing to score.")
        return found

    def _validation_questions(self, name: str) -> Opened:
        opened = self.validation(name)
        if opened is None:
            raise SpecError(
                f"scored: validation, but {name} has no validation data. Hold out some of its training data with "
                "data.validation_fraction, or leave scored at test."
            )
        return replace(opened, records=first(opened.records, self.data.max_eval_samples))

    def _own_validation(self, name: str) -> Opened | None:
        own = self._open(name, "validation")
        return own if own is not None and own.records else None

    def _open(self, name: str, split: Split) -> Opened | None:
        task = self.tasks[name]
        key = (id(task), split, self.data, self._draw(split))
        if key not in self.read:
            self.read[key] = self._opened(name, split) if task.has(split) else None
        return self.read[key]

    def _draw(self, split: Split) -> int | None:
        """The seed by which training records are drawn; None where they are not."""
        return self.seed if split == "train" and self.data.subset == "random" else None

    def _opened(self, name: str, split: Split) -> Opened:
        data, training = self.data, split == "train"
        return open_split(
            self.tasks[name],
            name,
            split,
            measure=self.measure,
            limit=data.max_train_samples if training else data.max_eval_samples,
            screen=self.screen,
            draw=self._draw(split),
        )
