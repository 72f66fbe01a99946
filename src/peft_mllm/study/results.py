"""Reading finished runs: `result.json`, and beside it `metrics.jsonl` and `predictions/*.jsonl`.

The dataclasses mirror the file's objects; pydantic checks them, so a file that does not fit is refused with
the field's name. Imports no torch: a report is made from files, on any machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from peft_mllm.errors import DataError
from peft_mllm.files import read_json, read_lines, read_sealed

SCHEMA = 1
FILE = "result.json"


@dataclass(frozen=True)
class Method:
    """How the model was made trainable."""

    name: str
    location: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Model:
    """The frozen model underneath."""

    source: str
    family: str = ""
    parameters: int = 0
    fingerprint: str = ""


@dataclass(frozen=True)
class Part:
    """What is trained in one part of the model, and how fast."""

    parameters: int
    learning_rate: float | None = None


@dataclass(frozen=True)
class Source:
    """The training data: read = used + quarantined."""

    task: str
    read: int = 0
    used: int = 0
    quarantined: int = 0
    fingerprint: str = ""


@dataclass(frozen=True)
class Training:
    """What the training took; all zero where nothing was trained."""

    steps: int = 0
    epochs: float = 0.0
    seconds: float = 0.0
    tokens: int = 0
    answer_tokens: int = 0
    tokens_per_second: float = 0.0
    best: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Score:
    """One task's figures; the first of `values` is the headline."""

    split: str
    metric: str
    n: int
    values: Mapping[str, float]
    rule: str = ""
    unparsed: int = 0
    seconds: float = 0.0
    predictions: str | None = None
    predictions_sha256: str = ""
    answering: str = ""

    @property
    def headline(self) -> float:
        """The figure that a table shows."""
        return next(iter(self.values.values()))

    @property
    def unit(self) -> str:
        """`%` for accuracies, nothing for other figures."""
        return "%" if "accuracy" in next(iter(self.values)) else ""


@dataclass(frozen=True)
class Adapter:
    """What was saved."""

    directory: str = ""
    bytes: int = 0


@dataclass(frozen=True)
class Prediction:
    """One question's outcome; `question` is its text, where the file has it.

    Attributes:
        question_sha256: of its words, images, choices and reference.
        images: the keys of its images.
    """

    id: str
    prediction: str
    answer: str
    score: float
    parsed: str | None = None
    question: str = ""
    question_sha256: str = ""
    images: Sequence[str] = ()


@dataclass(frozen=True)
class Point:
    """One line of metrics.jsonl: a training step has `loss`, an evaluation `eval_loss`."""

    step: int
    loss: float | None = None
    eval_loss: float | None = None
    epoch: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Result:
    """One finished run.

    Attributes:
        retention: losses and accuracies of other tasks' answers and of plain text, `before` and `after`, by subject.
        predictions: by task, in the order of the file; a task whose file is not there has none.
        points: metrics.jsonl in order of steps; where a resumed run wrote a step twice, the later counts.
    """

    schema: int
    name: str
    method: Method
    model: Model
    spec: Mapping[str, Any] = field(default_factory=dict)
    spec_id: str = ""
    trainable: Mapping[str, Part] = field(default_factory=dict)
    data: Mapping[str, Source] = field(default_factory=dict)
    training: Training | None = None
    scores: Mapping[str, Score] = field(default_factory=dict)
    retention: Mapping[str, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)
    peak_memory_bytes: int | None = None
    adapter: Adapter | None = None
    environment: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    notes: Sequence[str] = ()
    predictions: Mapping[str, Sequence[Prediction]] = field(default_factory=dict)
    points: Sequence[Point] = ()
    directory: Path | None = None

    @property
    def trainable_parameters(self) -> int:
        """Over all parts."""
        return sum(part.parameters for part in self.trainable.values())

    @property
    def is_zero_shot(self) -> bool:
        """Whether the model was evaluated as it is: nothing in it was trained."""
        return self.trainable_parameters == 0

    @property
    def seconds(self) -> float:
        """Of training; 0 where nothing was trained."""
        return self.training.seconds if self.training else 0.0

    @property
    def adapter_bytes(self) -> int:
        """Size of what was saved; 0 where nothing was."""
        return self.adapter.bytes if self.adapter else 0


def find_results(folder: Path) -> list[Path]:
    """The run directories in a folder, or the folder itself if it is one; sorted by path.

    Raises:
        DataError: there is none.
    """
    found = sorted(path.parent for path in folder.rglob(FILE)) if folder.is_dir() else []
    if not found:
        raise DataError(f"{folder}: no {FILE} in it or below. Run `peft-mllm train` or `study` first.")
    return found


def read_results(directories: Iterable[Path]) -> list[Result]:
    """Read several run directories, in the order given."""
    return [read_result(directory) for directory in directories]


def read_result(directory: Path) -> Result:
    """Read one run directory.

    Raises:
        DataError: a file is missing, is not JSON, or does not fit; with file, line and field.
    """
    file = directory / FILE
    content = _object(file)
    if content.get("schema") != SCHEMA:
        raise DataError(
            f"{file}: schema {content.get('schema')!r}, and this version reads {SCHEMA}. "
            "Read it with the version that wrote it, or run again."
        )
    scores = content.get("scores") or {}
    beside = {
        "predictions": {task: _predictions(directory, score) for task, score in scores.items()},
        "points": _points(directory / "metrics.jsonl"),
        "directory": directory,
    }
    result: Result = _checked(TypeAdapter(Result), {**content, **beside}, file)
    return result


def _predictions(directory: Path, score: Any) -> list[Prediction]:
    name = score.get("predictions") if isinstance(score, dict) else None
    if not name:
        return []
    file = directory / name
    if not file.resolve().is_relative_to(directory.resolve()):
        raise DataError(f"{directory / FILE}: predictions {name!r} are not in the run's directory.")
    if not file.is_file():
        raise DataError(f"{file}: missing, yet {FILE} names it. Copy it too, or evaluate again.")
    return _read_lines(file, TypeAdapter(Prediction))


def _points(file: Path) -> list[Point]:
    """A step's training line and evaluation line are two points; of two alike, the later counts."""
    latest = {(point.step, point.loss is None): point for point in _read_lines(file, TypeAdapter(Point))}
    return [latest[key] for key in sorted(latest)]


def _object(file: Path) -> dict[str, Any]:
    try:
        content = read_json(file)
        if isinstance(content, dict) and "sha256" in content:
            content = read_sealed(file)
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}). Is this a finished run?") from error
    except ValueError as error:
        raise DataError(f"{file}: {error}. Run it again.") from error
    if not isinstance(content, dict):
        raise DataError(f"{file}: not a JSON object. Run it again.")
    return content


def _read_lines(file: Path, kind: TypeAdapter[Any]) -> list[Any]:
    try:
        lines = read_lines(file)
    except ValueError as error:
        raise DataError(str(error)) from error
    return [_checked(kind, line, f"{file}:{number}") for number, line in enumerate(lines, start=1)]


def _checked(kind: TypeAdapter[Any], value: Any, place: Path | str) -> Any:
    try:
        return kind.validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{place}: {where}: {first['msg']}.") from error
