"""What a study is: axes, fixed values and a protocol, in a YAML file.

study = load_study("studies/main-tiny.yaml", ["axes.seed=[1]"])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from peft_mllm.document import read_document, validated
from peft_mllm.spec import Frozen

Protocol = Literal["fair", "paper"]


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
    return validated(document, Study)
