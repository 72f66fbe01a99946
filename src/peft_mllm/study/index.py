"""A study's own file, `study.json`: which runs it has, what each stands for, and where it lies.

The runner writes it, whole, whenever a run becomes known; the report is made from it and from the result files.
It holds nothing that the study's definition and the results do not say again, so losing it loses nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from peft_mllm.errors import DataError
from peft_mllm.files import read_json, write_json

FILE = "study.json"
SCHEMA = 1

Stage = Literal["trial", "final"]


@dataclass(frozen=True)
class Planned:
    """One run of a study.

    Attributes:
        id: of its spec.
        directory: relative to the study's.
        stage: a trial of the search, scored on validation data, or a run that counts, scored on test data.
        factors: label by axis, without the seed.
        seed: None where nothing is drawn.
        tried: what a trial tries: `learning_rate 0.003`.
        chosen: whether this trial was chosen for the runs that count.
        values: what the search chose for a run that counts, in words; empty without a search.
    """

    id: str
    directory: str
    stage: Stage
    factors: Mapping[str, str]
    seed: int | None
    tried: str = ""
    chosen: bool = False
    values: str = ""


@dataclass(frozen=True)
class Index:
    """A study as its report needs it.

    Attributes:
        protocol: `fair` or `paper`.
        facts: of the protocol, as term and text, for the reader: trials per method, seeds, data order ...
        contrast: the axis whose levels compete.
        axes: labels by axis, in the study's order.
        seen: tasks that the base could already do.
        runs: all that are known; the runs that count are known when their trials are done.
        expected: how many runs the whole study has.
    """

    title: str
    question: str
    protocol: str
    facts: Sequence[tuple[str, str]]
    contrast: str
    axes: Mapping[str, Sequence[str]]
    seen: Sequence[str]
    runs: Sequence[Planned]
    expected: int
    schema: int = SCHEMA
    definition: Mapping[str, Any] = field(default_factory=dict)


def write_index(directory: Path, index: Index) -> None:
    """Replace the study's file as a whole.

    Raises:
        DiskError: it cannot be written.
    """
    write_json(directory / FILE, asdict(index), what="the study's index")


def read_index(directory: Path) -> Index:
    """Read the study's file.

    Raises:
        DataError: it is not there, is not JSON, or does not fit; with field.
    """
    file = directory / FILE
    try:
        content = read_json(file)
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}). Has `peft-mllm study run` begun there?") from error
    except ValueError as error:
        raise DataError(f"{file}: {error}. `peft-mllm study run` writes it again.") from error
    try:
        return TypeAdapter(Index).validate_python(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{file}: {where}: {first['msg']}. `peft-mllm study run` writes it again.") from error
