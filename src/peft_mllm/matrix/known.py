"""What a run asks of the matrix: is this combination known to fail? Imports no torch.

Verdicts hold for the versions of peft and transformers that they were found with. With others nothing is refused;
a note says what was known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peft_mllm.errors import MethodError
from peft_mllm.matrix.result import DECISIVE, Matrix, Pair, installed, shipped

# what every run needs; what a method says by itself when it attaches is left to it, since it knows the real model
ESSENTIAL = ("computes", "trains", "frozen", "generates", "reloads", "positions", "mask")
SAYS = {
    "computes": "cannot be trained",
    "trains": "cannot be trained",
    "frozen": "changes weights that are to stay frozen",
    "generates": "cannot answer",
    "reloads": "cannot be loaded again",
    "positions": "loses the positions of image tokens",
    "mask": "changes what image tokens see",
    "connector": "cannot be trained together with the connector",
    "checkpointing": "does not work with gradient checkpointing",
}
KEEPS = "`prefix` is our own and keeps them; so do methods that change linears, such as `lora`."
REMEDY = {
    "connector": "Leave connector frozen, or choose another method.",
    "checkpointing": "Set speed.recompute: none, or choose another method.",
    "positions": KEEPS,
    "mask": KEEPS,
}
OTHERWISE = "Choose another method; docs/matrix.md shows what works with what."


@dataclass(frozen=True)
class Combination:
    """What a run would do.

    Attributes:
        method: name on the shelf.
        options: all options of the method, defaults too.
        family: name of the family.
        model_type: of the model's config, where it is known.
        connector: whether the connector is tuned.
        checkpointing: whether gradients are checkpointed.
    """

    method: str
    options: Mapping[str, Any]
    family: str
    model_type: str | None
    connector: bool = False
    checkpointing: bool = False

    @property
    def needs(self) -> tuple[str, ...]:
        """The probes that must have gone well."""
        asked = {"connector": self.connector, "checkpointing": self.checkpointing}
        return (*ESSENTIAL, *(probe for probe, wanted in asked.items() if wanted))


def consult(
    combination: Combination, matrix: Matrix | None = None, versions: Mapping[str, str] | None = None
) -> list[str]:
    """Refuse what is known to fail.

    Args:
        combination: what is to be run.
        matrix: the shipped one if left out.
        versions: the installed ones if left out.

    Returns:
        notes on what is known of other versions than those installed.

    Raises:
        MethodError: says what fails, why, and what to do instead.
    """
    matrix = shipped() if matrix is None else matrix
    versions = installed() if versions is None else versions
    known = _first_failure(combination, matrix)
    if known is None:
        return []
    probe, why, candidate = known
    tried_with = " and ".join(f"{name} {matrix.versions[name]}" for name in DECISIVE)
    where = combination.model_type or combination.family
    said = f"{candidate} {SAYS[probe]} on {where} models: {why.rstrip('.')} (tried with {tried_with})."
    if any(matrix.versions[name] != versions[name] for name in DECISIVE):
        here = " and ".join(f"{name} {versions[name]}" for name in DECISIVE)
        return [
            f"{said} Whether that is so with {here} is not known: `peft-mllm matrix --methods '{candidate}'` tries it."
        ]
    raise MethodError(f"{said} {REMEDY.get(probe, OTHERWISE)}")


def _first_failure(combination: Combination, matrix: Matrix) -> tuple[str, str, str] | None:
    """Probe, reason and candidate of what fails on every tiny model that stands for the combination's."""
    for candidate in _candidates(combination, matrix):
        pairs = _pairs(combination, candidate, matrix)
        for probe in combination.needs:
            reasons = [pair.failed[probe] for pair in pairs if probe in pair.failed]
            if reasons and len(reasons) == len(pairs):
                return probe, reasons[0], candidate
    return None


def _candidates(combination: Combination, matrix: Matrix) -> list[str]:
    """The rows whose marks the options have; of those the most special."""
    fitting = {
        name: each["marks"]
        for name, each in matrix.candidates.items()
        if each["method"] == combination.method and _has(combination.options, each["marks"])
    }
    most = max(map(len, fitting.values()), default=0)
    return [name for name, marks in fitting.items() if len(marks) == most]


def _has(options: Mapping[str, Any], marks: Mapping[str, Any]) -> bool:
    """Whether options are as marked; peft's types are written in either case."""
    return all(str(options.get(key)).upper() == str(value).upper() for key, value in marks.items())


def _pairs(combination: Combination, candidate: str, matrix: Matrix) -> list[Pair]:
    """The pairs on tiny models of the same architecture; without such of the same family; else all."""
    tried = [pair for pair in matrix.pairs if pair.candidate == candidate and "attaches" in pair.ok]
    facts = [(pair, matrix.members[pair.member]) for pair in tried]
    same_type = [pair for pair, fact in facts if fact["model_type"] == combination.model_type]
    same_family = [pair for pair, fact in facts if fact["family"] == combination.family]
    return same_type or same_family or tried
