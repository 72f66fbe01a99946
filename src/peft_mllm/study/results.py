"""Reading finished runs: `result.json`, and beside it `metrics.jsonl` and `predictions/*.jsonl`.

The dataclasses mirror the file's objects; pydantic checks them, so a file that does not fit is refused with
the field's name. Predictions are read when they are first asked for: a study has thousands of such files.
Imports no torch: a report is made from files, on any machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peft_mllm.errors import DataError
from peft_mllm.files import json_digest, read_json
from peft_mllm.metrics import METRICS
from peft_mllm.study.lines import checked, read_objects

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
    """The frozen model underneath.

    Attributes:
        parts: parameters of llm, lm_head, connector, vision and elsewhere; none in older files.
        embeddings: parameters of the token table, which are in a part and compute nothing.
        layers: of the decoder.
        width: of its hidden states.
        patches: positions that the vision tower computes for an image; 0 where that depends on the image.
    """

    source: str
    family: str = ""
    parameters: int = 0
    fingerprint: str = ""
    parts: Mapping[str, int] = field(default_factory=dict)
    embeddings: int = 0
    layers: int = 0
    width: int = 0
    patches: int = 0


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
    """What the training took; all zero where nothing was trained.

    Attributes:
        tokens: that were computed.
        sequence_tokens: of all samples as often as they were seen, whole: what nothing shared would compute.
        images: likewise, passes through the vision tower.
    """

    steps: int = 0
    epochs: float = 0.0
    seconds: float = 0.0
    tokens: int = 0
    answer_tokens: int = 0
    sequence_tokens: int = 0
    images: int = 0
    tokens_per_second: float = 0.0
    best: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Score:
    """One task's figures; the first of `values` is the headline.

    Attributes:
        held_out_of: the split that the questions were taken from, where it is not `split`.
        prompt_tokens: of all questions as the model reads them, each whole.
        new_tokens: of all answers, end marks left out.
    """

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
    held_out_of: str | None = None
    prompt_tokens: int = 0
    new_tokens: int = 0

    @property
    def headline(self) -> float:
        """The figure that a table shows."""
        return next(iter(self.values.values()))

    @property
    def unit(self) -> str:
        """`%` where the metric counts in per cent, nothing for other figures."""
        name = self.metric.partition(":")[0]
        return "%" if name in METRICS and METRICS[name].unit == "per cent" else ""


@dataclass(frozen=True)
class Adapter:
    """What was saved."""

    directory: str = ""
    bytes: int = 0


@dataclass(frozen=True, slots=True)
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


@dataclass(frozen=True, slots=True)
class Grade:
    """Of a prediction, what statistics need."""

    id: str
    score: float


@dataclass(frozen=True, slots=True)
class Point:
    """One line of metrics.jsonl: a training step has `loss`, an evaluation `eval_loss`."""

    step: int
    loss: float | None = None
    eval_loss: float | None = None
    epoch: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    seconds: float | None = None


class Predictions(Mapping[str, Sequence[Prediction]]):
    """Predictions by task, each read when it is first asked for; a task without a file has none.

    Raises:
        DataError: on reading: a line does not fit; with file, line and field.
    """

    def __init__(self, files: Mapping[str, Path | None]):
        self._files = files
        self._read: dict[str, list[Prediction]] = {}

    def __getitem__(self, task: str) -> list[Prediction]:
        if task not in self._read:
            file = self._files[task]
            self._read[task] = [] if file is None else read_objects(file, Prediction)
        return self._read[task]

    def __contains__(self, task: object) -> bool:
        return task in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def grades(self, task: str) -> tuple[tuple[str, ...], NDArray[np.float64]]:
        """The questions' ids, and their scores (questions,), without keeping the rest."""
        file = self._files[task]
        grades: Sequence[Grade | Prediction] = self._read.get(task, ())
        if not grades and file is not None:
            grades = read_objects(file, Grade)
        return tuple(grade.id for grade in grades), np.array([grade.score for grade in grades], dtype=np.float64)


@dataclass(frozen=True)
class ScoredPoint:
    """A checkpoint of the training that was scored.

    Attributes:
        step: of the training.
        epoch: likewise.
        eval_loss: the validation loss there.
        best: whether that is the lowest.
        scores: by task.
        predictions: by task, as of `Result`.
    """

    step: int
    epoch: float
    eval_loss: float | None = None
    best: bool = False
    scores: Mapping[str, Score] = field(default_factory=dict)
    predictions: Mapping[str, Sequence[Prediction]] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """One finished run.

    Attributes:
        retention: losses and accuracies of other tasks' answers and of plain text, `before` and `after`, by subject.
        curve: the checkpoints that were scored, in order of steps.
        predictions: by task, in the order of the file; a task without a file has none.
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
    curve: Sequence[ScoredPoint] = ()
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
    def parts(self) -> Mapping[str, int]:
        """Parameters of the base by part."""
        return self.model.parts

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
    result = checked(Result, content, file)
    return replace(
        result,
        curve=[replace(point, predictions=_predictions(directory, point.scores)) for point in result.curve],
        predictions=_predictions(directory, result.scores),
        points=_points(directory / "metrics.jsonl"),
        directory=directory,
    )


def _predictions(directory: Path, scores: Mapping[str, Score]) -> Predictions:
    return Predictions({task: _file_of(directory, score) for task, score in scores.items()})


def _file_of(directory: Path, score: Score) -> Path | None:
    if not score.predictions:
        return None
    file = directory / score.predictions
    if not file.resolve().is_relative_to(directory.resolve()):
        raise DataError(f"{directory / FILE}: predictions {score.predictions!r} are not in the run's directory.")
    if not file.is_file():
        raise DataError(f"{file}: missing, yet {FILE} names it. Copy it too, or evaluate again.")
    return file


def _points(file: Path) -> list[Point]:
    """A step's training line and evaluation line are two points; of two alike, the later counts."""
    lines = read_objects(file, Point) if file.is_file() else []
    latest = {(point.step, point.loss is None): point for point in lines}
    return [latest[key] for key in sorted(latest)]


def _object(file: Path) -> dict[str, Any]:
    try:
        content = read_json(file)
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}). Is this a finished run?") from error
    except ValueError as error:
        raise DataError(f"{file}: {error}. Run it again.") from error
    if not isinstance(content, dict):
        raise DataError(f"{file}: not a JSON object. Run it again.")
    seal = content.pop("sha256", None)
    if seal is not None and seal != json_digest(content):
        raise DataError(f"{file}: its content does not match its sha256. Run it again.")
    return content
