"""A matrix as data: what was tried with which versions, and how each pair went. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peft_mllm.assets import MATRIX
from peft_mllm.files import atomic_write, read_json

SCHEMA = 1
DECISIVE = ("peft", "transformers")
"""What a verdict depends on; torch is recorded beside them."""


@dataclass(frozen=True)
class Pair:
    """How a candidate does on a tiny model.

    Attributes:
        candidate: name of the row.
        member: name of the tiny model.
        ok: probes that went well.
        failed: probe -> what a user would run into.
        none: probe -> why there was nothing to try.
    """

    candidate: str
    member: str
    ok: tuple[str, ...] = ()
    failed: Mapping[str, str] = field(default_factory=dict)
    none: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Matrix:
    """All pairs that were tried.

    Attributes:
        made: the day, in ISO's form.
        versions: of torch and the deciding packages.
        probes: name -> what it tries, in a sentence.
        candidates: name -> method and marks.
        members: name -> family and model_type.
        pairs: in the order of candidates and members.
    """

    made: str
    versions: Mapping[str, str]
    probes: Mapping[str, str]
    candidates: Mapping[str, Mapping[str, Any]]
    members: Mapping[str, Mapping[str, str]]
    pairs: tuple[Pair, ...]

    def at(self, candidate: str, member: str) -> Pair | None:
        """The pair, where it was tried."""
        return self._by_name.get((candidate, member))

    @cached_property
    def _by_name(self) -> dict[tuple[str, str], Pair]:
        return {(pair.candidate, pair.member): pair for pair in self.pairs}

    def summary(self) -> str:
        """How many pairs went how, and each failure in a line."""
        failed = [pair for pair in self.pairs if pair.failed]
        lines = [f"{pair.candidate} on {pair.member}: {_said(pair)}" for pair in failed]
        return "\n".join([*lines, f"{len(self.pairs)} pairs, {len(failed)} of them with something that fails."])

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {"schema": SCHEMA, **asdict(self)}

    def write(self, path: Path) -> None:
        """As JSON with a line for each pair, so that a difference between two is read at a glance."""
        whole = self.to_json()
        pairs = whole.pop("pairs")
        head = json.dumps(whole, indent=1)[:-2]
        lines = ",\n".join(f"  {json.dumps(pair)}" for pair in pairs)
        atomic_write(path, f'{head},\n "pairs": [\n{lines}\n ]\n}}\n', what="the matrix")

    @classmethod
    def read(cls, path: Path) -> Matrix:
        """What `write` wrote.

        Raises:
            ValueError: it is none, or of another time.
        """
        whole = read_json(path)
        if not isinstance(whole, dict) or whole.pop("schema", None) != SCHEMA:
            raise ValueError(f"{path} is no matrix of schema {SCHEMA}")
        pairs = tuple(Pair(**pair | {"ok": tuple(pair["ok"])}) for pair in whole.pop("pairs"))
        return cls(**whole, pairs=pairs)


def _said(pair: Pair) -> str:
    return "; ".join(f"{probe}: {why}" for probe, why in pair.failed.items())


def installed() -> dict[str, str]:
    """The versions that a matrix made now would record."""
    return {name: version(name) for name in (*DECISIVE, "torch")}


@cache
def shipped() -> Matrix:
    """The matrix that came with this package."""
    return Matrix.read(MATRIX)
