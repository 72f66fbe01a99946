"""One side of a comparison: a finished run, or what `peft-mllm evaluate --output` has written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from peft_mllm.errors import DataError
from peft_mllm.files import file_digest, read_json, read_lines
from peft_mllm.spec import NamedSpec
from peft_mllm.study.results import FILE, Prediction, Score, read_result

SCORES = "scores.json"


@dataclass(frozen=True)
class Side:
    """What one system answered.

    Attributes:
        name: what tables call it.
        directory: where it lies.
        model: the base.
        scores: by task.
        predictions: by task, in the order of the file.
        tasks: how each task was set up, to find its images again.
    """

    name: str
    directory: Path
    model: str
    scores: Mapping[str, Score]
    predictions: Mapping[str, Sequence[Prediction]]
    tasks: Mapping[str, NamedSpec]


def read_side(directory: Path) -> Side:
    """Read a directory.

    Raises:
        DataError: it is neither, or its predictions are not those that were scored.
    """
    if (directory / FILE).is_file():
        side = _of_run(directory)
    elif (directory / SCORES).is_file():
        side = _of_scores(directory)
    else:
        raise DataError(
            f"{directory}: has neither {FILE} nor {SCORES}. Give a finished run, or the --output of "
            "`peft-mllm evaluate` for one target."
        )
    for task, score in side.scores.items():
        file = directory / (score.predictions or "")
        if score.predictions_sha256 and file_digest(file) != score.predictions_sha256:
            raise DataError(f"{file}: was changed after it was scored ({task}). Evaluate again.")
    return side


def _of_run(directory: Path) -> Side:
    result = read_result(directory)
    named = [result.spec.get("task"), *result.spec.get("evaluate", ())]
    tasks = [NamedSpec.model_validate(each) for each in named if each]
    return Side(
        name=result.name,
        directory=directory,
        model=result.model.source,
        scores=result.scores,
        predictions=result.predictions,
        tasks={task.name: task for task in tasks},
    )


def _of_scores(directory: Path) -> Side:
    file = directory / SCORES
    try:
        content = read_json(file)
        scores = TypeAdapter(dict[str, Score]).validate_python(content["scores"])
        tasks = TypeAdapter(list[NamedSpec]).validate_python(content["tasks"])
        name, model = str(content["target"]), str(content["model"]["source"])
    except (OSError, ValueError, ValidationError, KeyError, TypeError) as error:
        raise DataError(f"{file}: is not what `peft-mllm evaluate` writes ({error}). Evaluate again.") from error
    return Side(
        name=Path(name).name or name,
        directory=directory,
        model=model,
        scores=scores,
        predictions={task: _predictions(directory, score.predictions) for task, score in scores.items()},
        tasks={task.name: task for task in tasks},
    )


def _predictions(directory: Path, name: str | None) -> list[Prediction]:
    file = directory / (name or "")
    if not name or not file.is_file() or not file.resolve().is_relative_to(directory.resolve()):
        raise DataError(f"{directory / SCORES}: its predictions {name!r} are not in {directory}. Evaluate again.")
    try:
        lines: list[dict[str, Any]] = read_lines(file)
        return TypeAdapter(list[Prediction]).validate_python(lines)
    except (ValueError, ValidationError) as error:
        raise DataError(f"{file}: is not what `peft-mllm evaluate` writes ({error}). Evaluate again.") from error
