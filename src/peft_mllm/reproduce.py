"""Run a finished run again from its result.json, and say how much of it came again.

    again = rerun(Path("runs/lora"))                          # a directory of its own; resumes like every run
    level = compare_with(Path("runs/lora"), again).level

Four levels, each needs all that is below it: the adapter and every loss to the bit; every answer letter by letter;
every task's score, so far as the questions can tell (0 lies in the 95 % interval of the paired difference); or not.
Base and data are compared before anything is trained: with others it would be another run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from peft_mllm.errors import DataError, ModelError, SpecError
from peft_mllm.files import read_json, write_json
from peft_mllm.provenance import data_fingerprint
from peft_mllm.record import IMAGE_MARK, Record
from peft_mllm.rundir import ADAPTER, RunDir, verify
from peft_mllm.spec import Spec
from peft_mllm.specfile import parse_spec
from peft_mllm.study.results import FILE, Point, Prediction, Result, read_result
from peft_mllm.versus import Contest, compare_runs
from peft_mllm.world import World

if TYPE_CHECKING:
    from torch import Tensor

    from peft_mllm.run import Runner

Level = Literal["bit-identical", "same answers", "same within the interval", "not reproduced"]

SUFFIX = "-reproduced"
REPORT = "reproduction.json"
NOTHING_TRAINED = "nothing was trained"


@dataclass(frozen=True)
class Likeness:
    """Numbers of one run beside those of another.

    Attributes:
        compared: how many tensors, or losses.
        equal: to the bit; None where they cannot be compared.
        largest: the largest difference of two; None where there is none, or shapes differ.
        where: of which tensor, or step.
        note: why they cannot be compared, or what only one has.
    """

    compared: int = 0
    equal: bool | None = None
    largest: float | None = None
    where: str = ""
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        return {name: getattr(self, name) for name in ("compared", "equal", "largest", "where", "note")}


@dataclass(frozen=True)
class Reproduction:
    """A run and its rerun.

    Attributes:
        run: the first one's directory.
        again: the other's.
        adapter: its tensors.
        losses: of training and validation, at each step that was logged.
        contests: both runs' answers and scores by task; A is the first.
        environment: what differs, there and here.
    """

    run: Path
    again: Path
    adapter: Likeness
    losses: Likeness
    contests: Sequence[Contest]
    environment: Mapping[str, tuple[Any, Any]]

    @property
    def level(self) -> Level:
        """How much came again."""
        if not any(changed(contest) for contest in self.contests):
            return "bit-identical" if self.adapter.equal and self.losses.equal else "same answers"
        return "same within the interval" if all(map(within, self.contests)) else "not reproduced"

    @property
    def reproduced(self) -> bool:
        """Whether at least the scores are the same within their intervals."""
        return self.level != "not reproduced"

    def to_json(self) -> dict[str, Any]:
        """One object, for `--json` and the report beside the rerun."""
        return {
            "run": str(self.run),
            "again": str(self.again),
            "level": self.level,
            "reproduced": self.reproduced,
            "adapter": self.adapter.to_json(),
            "losses": self.losses.to_json(),
            "tasks": {each.task: _contest_json(each) for each in self.contests},
            "environment": {key: {"there": there, "here": here} for key, (there, here) in self.environment.items()},
        }


def changed(contest: Contest) -> list[str]:
    """The ids of the questions that were answered with other words."""
    return [pair.id for pair in contest.pairs if pair.a.prediction != pair.b.prediction]


def within(contest: Contest) -> bool:
    """Whether a task's two scores may be the same: 0 lies in the interval of their difference.

    A headline that is no mean over questions has no such interval; McNemar's test takes its place.
    """
    low, high = contest.difference.low, contest.difference.high
    return not contest.told_apart if low is None or high is None else low <= 0 <= high


def _contest_json(contest: Contest) -> dict[str, Any]:
    return {**contest.to_json(), "within": within(contest), "other_answers": changed(contest)}


def rerun(run: Path, output: Path | None = None, *, quiet: bool = False) -> Path:
    """Run a finished run's spec again, in a directory of its own; the same call resumes it.

    Args:
        run: the finished run.
        output: where; RUN-reproduced if left out.
        quiet: show nothing.

    Returns:
        the directory.

    Raises:
        DataError: there is no finished run, or the data is not what it was.
        ModelError: the base is not what it was.
        UserError: whatever a run raises.
    """
    from peft_mllm.run import run as run_spec

    there = _finished(run)
    target = output or run.resolve().with_name(run.resolve().name + SUFFIX)
    if target.resolve() == run.resolve():
        raise SpecError(f"{target} is the run itself. Give another --output.")

    def before(runner: Runner) -> None:
        _refuse_another_base(there, runner.fingerprint)
        if runner.train_split is not None:
            _refuse_other_training_data(there, runner.train_split.name, data_fingerprint(runner.train_split.records))
        _refuse_other_questions(there, {asked.name: asked.records for asked in runner.questions})

    run_spec(_spec_again(there, target), quiet=quiet, before=before)
    return target


def compare_with(run: Path, again: Path) -> Reproduction:
    """Compare a run with its rerun, and write the outcome beside the rerun as reproduction.json.

    Raises:
        DataError: one is not finished, they were not asked the same, or trained on other data.
        ModelError: they have not the same base.
    """
    there, here = _finished(run), _finished(again)
    _refuse_another_base(there, here.model.fingerprint)
    for source in here.data.values():
        _refuse_other_training_data(there, source.task, source.fingerprint)
    outcome = Reproduction(
        run=run,
        again=again,
        adapter=_adapters(there, here),
        losses=_losses(there, here),
        contests=compare_runs(run, again).contests,
        environment=_environments(there, here),
    )
    write_json(again / REPORT, outcome.to_json(), what="the comparison")
    return outcome


def _finished(run: Path) -> Result:
    if not (run / FILE).is_file():
        status = RunDir(run).status() or {} if run.is_dir() else {}
        state = f" (it is {status['state']}, step {status.get('step')})" if status else ""
        raise DataError(f"{run} is no finished run{state}: it has no {FILE}. `peft-mllm train` finishes one.")
    return read_result(run)


def _spec_again(there: Result, target: Path) -> Spec:
    """The spec as it was, for as many samples in a step as it had in all processes together."""
    spec = parse_spec({**there.spec, "output_dir": str(target)})
    size, micro_batches = World().size, spec.train.gradient_accumulation_steps * _processes(there)
    if micro_batches % size:
        raise SpecError(
            f"A step of {there.directory} is {micro_batches} micro-batches, which {size} processes cannot share "
            "evenly. Start another number of processes."
        )
    # a rerun reports to nobody: its trackers may not be here, and its curve is there already
    train = spec.train.model_copy(update={"gradient_accumulation_steps": micro_batches // size, "report_to": ()})
    return spec.model_copy(update={"train": train})


def _processes(result: Result) -> int:
    assert result.directory is not None, "read from a directory"
    return int(read_json(result.directory / FILE).get("processes", 1))


# --- what must be the same to begin with ---


def _refuse_another_base(there: Result, fingerprint: str) -> None:
    if there.model.fingerprint not in ("", fingerprint):
        raise ModelError(
            f"The base is not the one of {there.directory}: the fingerprint of {there.model.source} is "
            f"{fingerprint[:16]}, and was {there.model.fingerprint[:16]}. With another base this would be another run; "
            "get the weights that were used."
        )


def _refuse_other_training_data(there: Result, task: str, fingerprint: str) -> None:
    known = next((source.fingerprint for source in there.data.values() if source.task == task), "")
    if known not in ("", fingerprint):
        raise DataError(
            f"The training data of {task} is not that of {there.directory}: its fingerprint is {fingerprint[:16]}, "
            f"and was {known[:16]}. With other data this would be another run; get the files that were used."
        )


def _refuse_other_questions(there: Result, asked: Mapping[str, Sequence[Record]]) -> None:
    if asked.keys() != there.scores.keys():
        missing = sorted(asked.keys() ^ there.scores.keys())
        raise DataError(f"{there.directory} was not scored on the same tasks: {', '.join(missing)} only here or there.")
    for task, records in asked.items():
        known = {each.id: _as_answered(each) for each in there.predictions.get(task, ())}
        other = [record.id for record in records if known.get(record.id) != _as_asked(record)]
        if known and (other or len(known) != len(records)):
            raise DataError(
                f"The questions of {task} are not those of {there.directory}: {len(records)} here, {len(known)} "
                f"there, {len(other)} that differ{f' ({other[0]} for instance)' if other else ''}. With other "
                "questions the scores cannot be compared; get the files that were used."
            )


def _as_answered(line: Prediction) -> tuple[str, str, tuple[str, ...]]:
    return line.question, line.answer, tuple(line.images)


def _as_asked(record: Record) -> tuple[str, str, tuple[str, ...]]:
    """As the line of a prediction has it."""
    question = record.question[-1].text.replace(IMAGE_MARK, "").strip()
    return question, record.answer, tuple(image.key for image in record.images)


# --- what came again ---


def _adapters(there: Result, here: Result) -> Likeness:
    """Every tensor of both adapters."""
    if there.adapter is None and here.adapter is None:
        return Likeness(note=NOTHING_TRAINED)
    assert there.directory is not None, "read from a directory"
    assert here.directory is not None, "read from a directory"
    folders = there.directory / ADAPTER, here.directory / ADAPTER
    for folder in folders:
        doubts = verify(folder)
        if doubts:
            return Likeness(note=f"{folder}: {doubts[0]}")
    return _tensors(*folders)


def _tensors(there: Path, here: Path) -> Likeness:
    from safetensors import safe_open

    def held(folder: Path) -> dict[tuple[str, str], Path]:
        files = sorted(folder.rglob("*.safetensors"))
        return {(file.relative_to(folder).as_posix(), name): file for file in files for name in _names(file)}

    mine, others = held(there), held(here)
    if mine.keys() != others.keys():
        only = sorted(mine.keys() ^ others.keys())
        return Likeness(equal=False, note=f"{len(only)} tensors are in one alone, such as {only[0][1]}")
    differing: dict[str, float] = {}
    for file, name in mine:
        with (
            safe_open(mine[file, name], framework="pt") as first,
            safe_open(others[file, name], framework="pt") as second,
        ):
            pair = first.get_tensor(name), second.get_tensor(name)
        if pair[0].dtype != pair[1].dtype or pair[0].shape != pair[1].shape:
            return Likeness(len(mine), equal=False, where=name, note=f"{name} has another shape or type")
        if not _same_bits(*pair):
            differing[name] = float((pair[0].double() - pair[1].double()).abs().max())
    if not all(map(math.isfinite, differing.values())):
        return Likeness(len(mine), equal=False, note="one has values that are not finite")
    where = max(differing, key=lambda name: differing[name], default="")
    return Likeness(len(mine), equal=not differing, largest=differing.get(where, 0.0), where=where)


def _names(file: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        return list(opened.keys())


def _same_bits(first: Tensor, second: Tensor) -> bool:
    import torch

    return torch.equal(*(tensor.contiguous().view(-1).view(torch.uint8) for tensor in (first, second)))


def _losses(there: Result, here: Result) -> Likeness:
    """The losses that both have logged."""
    if not there.points and not here.points:
        return Likeness(note=NOTHING_TRAINED if there.training is None or not there.training.steps else "no log")
    mine, others = _curve(there.points), _curve(here.points)
    both = mine.keys() & others.keys()
    note = f"{len(mine.keys() ^ others.keys())} are in one log alone" if mine.keys() != others.keys() else ""
    if not both:
        return Likeness(note=note)
    apart = {key: abs(mine[key] - others[key]) for key in sorted(both)}
    worst = max(apart, key=lambda key: apart[key])
    where = f"{worst[0]}, step {worst[1]}" if apart[worst] else ""
    return Likeness(len(both), equal=not apart[worst] and not note, largest=apart[worst], where=where, note=note)


def _curve(points: Sequence[Point]) -> dict[tuple[str, int], float]:
    """Kind of loss and step -> the loss."""
    # a step's training line and evaluation line are two points
    training = {("loss", point.step): point.loss for point in points if point.loss is not None}
    validation = {("eval_loss", point.step): point.eval_loss for point in points if point.eval_loss is not None}
    return {**training, **validation}


def _environments(there: Result, here: Result) -> dict[str, tuple[Any, Any]]:
    """What differs between two machines."""
    mine = {**there.environment, "processes": _processes(there), "spec_id": there.spec_id}
    others = {**here.environment, "processes": _processes(here), "spec_id": here.spec_id}
    keys = [*mine, *(key for key in others if key not in mine)]
    return {
        key: (mine.get(key, "not recorded"), others.get(key, "not recorded"))
        for key in keys
        if mine.get(key) != others.get(key)
    }
