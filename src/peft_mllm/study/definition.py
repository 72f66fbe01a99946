"""What a study is: axes, fixed values and a protocol, in a YAML file.

study = load_study("studies/main-tiny.yaml", ["axes.seed=[1]"])
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PrivateAttr, field_validator

from peft_mllm.document import Document, Key, read_document, validated
from peft_mllm.errors import SpecError
from peft_mllm.spec import Frozen

Protocol = Literal["fair", "paper"]


class UnfitError(SpecError):
    """What a study says at a key cannot be; `Study.naming_places` adds file and line.

    Args:
        key: in the study's file, as far as it is known.
        problem: and its remedy, in words.
    """

    def __init__(self, key: Key, problem: str) -> None:
        self.key = key
        super().__init__(f"{_dotted(key)}: {problem}")


@dataclass(frozen=True)
class _Source:
    """The file that a study was read from; studies that say the same are equal, wherever they were read."""

    document: Document | None = field(default=None, compare=False)


class Search(Frozen):
    """What every method may try before the runs that count; the same number of trials for each."""

    trials: Mapping[str, Any]
    """By method: keys with the values to try, such as `{learning_rate: [1e-4, 2e-4], rank: [8, 16]}` (all
    combinations), or a list of mappings (as they are)."""
    on: Mapping[str, Any] = Field(default_factory=dict)
    """Label by axis: trials are made there alone, and chosen for all other labels of that axis; the rest is searched
    everywhere."""
    seed: int = Field(default=0, ge=0)
    """Of the trials; none of the study's own."""


class Matched(Frozen):
    """Sizes that are computed, so that methods train about as many parameters."""

    parameters: tuple[int, ...] = Field(min_length=1)
    """Each method that has a size takes the one whose count is nearest; others take part as they are."""


class Study(Frozen):
    """A list of runs and the comparison of their results."""

    title: str
    """Heading of the report."""
    question: str = ""
    """What the study is to answer, in a sentence or two."""
    protocol: Protocol = "fair"
    """`fair`: every method has the same trials on validation data, and at least 3 seeds; `paper`: values as given."""
    contrast: str = "method"
    """The axis whose labels compete, all else equal."""
    fixed: Mapping[str, Any] = Field(default_factory=dict)
    """Keys of a run's spec that all runs share."""
    axes: Mapping[str, Any]
    """What varies: a key of a run's spec or a short name of one, with the values that it takes."""
    exclude: tuple[Mapping[str, Any], ...] = ()
    """Combinations to leave out: label, or list of labels, by axis."""
    seen: tuple[str, ...] = ()
    """Tasks that the base can already do: what a run loses there was forgotten."""
    search: Search | None = None
    """Trials of the fair protocol."""
    matched: Matched | None = None
    """Adds an axis `parameters`."""
    output_dir: str
    """Directory of the runs and of the report."""
    _source: _Source = PrivateAttr(default=_Source())

    def place(self, *candidates: Key) -> str:
        """`file:line` of the key that is said in the file, or most of which is; empty for a study of no file."""
        document = self._source.document
        if document is None:
            return ""
        return document.place(max(candidates, key=lambda key: _reach(document.data, key)))

    @contextmanager
    def naming_places(self) -> Iterator[None]:
        """Within it, what is said at a key and cannot be ends with file, line and key."""
        try:
            yield
        except UnfitError as error:
            place = self.place(error.key)
            raise SpecError(f"{place}: {error}" if place else str(error)) from None

    @field_validator("axes")
    @classmethod
    def _with_methods_and_tasks(cls, axes: Mapping[str, Any]) -> Mapping[str, Any]:
        for needed in ("method", "task"):
            if needed not in axes:
                raise ValueError(f"a study needs the axis '{needed}', be it with one value")
        return axes


def load_study(path: str | Path, overrides: Sequence[str] = ()) -> Study:
    """Read a study file and apply overrides such as `axes.seed=[1]`, `fixed.train.max_steps=10`.

    Raises:
        SpecError: everything that is wrong, each with file, line and key.
    """
    document = read_document(path, "study")
    for assignment in overrides:
        document.override(assignment)
    study = validated(document, Study)
    study._source = _Source(document)
    return study


def _reach(data: Any, key: Key) -> int:
    """How many parts of a key there are in plain data."""
    for depth, part in enumerate(key):
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            return depth
    return len(key)


def _dotted(key: Key) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key).removeprefix(".")
