"""What may be concluded from a contest, in words: no more than the figures say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from peft_mllm.study.contest import TASK
from peft_mllm.study.ledger import TRAINABLE
from peft_mllm.study.overview import Row
from peft_mllm.study.statistics import Estimate
from peft_mllm.study.wording import GLUE, and_list, count, figure, interval

UNTIL = 0.05
"""Points; what was forgotten is called nothing where it would be printed as 0.0."""


@dataclass(frozen=True)
class Standing:
    """How a contest ended.

    Attributes:
        names: lines with a score, highest first.
        compared: those that could be compared.
        best: told apart from all others and above; None if there is none.
        group: the highest and all that cannot be told apart from it.
        seeds, questions: that the comparison rests on; no question where only the scores of whole runs are known.
    """

    names: tuple[str, ...]
    compared: tuple[str, ...]
    best: str | None
    group: tuple[str, ...]
    seeds: int
    questions: int


def verdict(standing: Standing, rows: Mapping[str, Row], factors: Mapping[str, str]) -> str:
    """One to three sentences.

    Args:
        standing: how it ended.
        rows: by name.
        factors: what the lines share, for the place.
    """
    place = _place(factors)
    if not standing.names:
        return f"{_capital(place)} no trained line has a score."
    if len(standing.names) == 1:
        name = standing.names[0]
        return f"{_capital(place)} {name} reaches {_score(rows[name])}{_against_zero(rows[name])}; it is the only line."
    if len(standing.compared) < 2:
        return (
            f"{_capital(place)} {standing.names[0]} has the highest mean, {_score(rows[standing.names[0]])}; the lines "
            "cannot be compared: they have too few seeds or questions in common."
        )
    return " ".join(filter(None, [*_outcome(standing, rows, place), _price(standing, rows)]))


def _outcome(standing: Standing, rows: Mapping[str, Row], place: str) -> Sequence[str]:
    questions = [_number(standing.questions, "question")] if standing.questions else []  # 0: scores of whole runs alone
    basis = ", ".join([_number(standing.seeds, "seed"), *questions])
    if standing.seeds == 1:
        return _of_single_runs(standing, rows, place, basis)
    if standing.best is not None:
        row = rows[standing.best]
        return [
            f"{_capital(place)} {standing.best} is best: {_score(row)}, told apart from every other line "
            f"({basis}){_against_zero(row)}."
        ]
    group = [f"{name} ({_short(rows[name])})" for name in standing.group]
    rest = [name for name in standing.compared if name not in standing.group]
    lower = (
        f"; {and_list(rest)} {'is' if len(rest) == 1 else 'are'} told apart from {standing.group[0]}, and lower"
        if rest
        else ""
    )
    sentences = [f"{_capital(place)} {and_list(group, most=6)} cannot be told apart ({basis}){lower}."]
    if all(_like_zero_shot(rows[name]) for name in standing.group):
        sentences.append("None of them can be told apart from zero-shot either.")
    return sentences


def _of_single_runs(standing: Standing, rows: Mapping[str, Row], place: str, basis: str) -> Sequence[str]:
    """With one seed two runs may be told apart, and no two methods."""
    first = standing.compared[0]
    apart = [name for name in standing.compared if name not in standing.group]
    words = f"{_capital(place)} {first} has the highest score, {_score(rows[first])}"
    if apart:
        those = "that" if len(apart) == 1 else "those"
        words += f"; on these questions its run is told apart from {those} of {and_list(apart)}"
    return [f"{words} ({basis}).", "Methods cannot be told apart by one seed: another may change the order."]


def _price(standing: Standing, rows: Mapping[str, Row]) -> str:
    """What speaks for one of several equals, or what the best one costs."""
    if standing.seeds == 1:
        return ""
    if standing.best is not None:
        lost = rows[standing.best].forgotten
        if lost is None or abs(lost.value) < UNTIL:
            return ""
        told = "" if _differs(lost) else ", which cannot be told apart from none"
        return f"It {'forgot' if lost.value > 0 else 'gained'} {_points(abs(lost.value))} on the seen tasks{told}."
    if any(rows[name].mean_of(TRAINABLE) is None for name in standing.group):
        return ""
    if any(rows[name].mean_of(TRAINABLE) is None for name in standing.group):
        return ""
    cheapest = min(standing.group, key=lambda name: (_trainable(rows[name]), name))
    words = f"Of these, {cheapest} trains the fewest parameters ({count(round(_trainable(rows[cheapest])))})"
    known = {name: found.value for name in standing.group if (found := rows[name].forgotten) is not None}
    if len(known) < len(standing.group):
        return f"{words}."
    gentlest = min(known, key=lambda name: (known[name], name))
    joined = " and" if gentlest == cheapest else f", and {gentlest}"
    return f"{words}{joined} forgot least of the seen tasks ({_points(known[gentlest])})."


def _place(factors: Mapping[str, str]) -> str:
    """`on scenes_next with connector tuned,`."""
    task = factors.get(TASK)
    others = [
        label if axis == "model" else f"{axis.replace('_', ' ')} {label}"
        for axis, label in factors.items()
        if axis != TASK
    ]
    words = [f"on {task}"] if task else []
    words += [f"with {and_list(others)}"] if others else []
    return f"{' '.join(words) or 'over all lines'},"


def _capital(words: str) -> str:
    return words[:1].upper() + words[1:]


def _number(many: int, what: str) -> str:
    return f"{many}{GLUE}{what}{'s' if many != 1 else ''}"


def _score(row: Row) -> str:
    limits = interval(row.score)
    return _short(row) + (f" ({limits})" if limits else "")


def _short(row: Row) -> str:
    return GLUE.join(filter(None, [figure(row.score.value if row.score else None), _unit(row)]))


def _unit(row: Row) -> str:
    answers = row.cell.outcomes[0].scores.get(row.task)
    return answers.unit if answers else ""


def _against_zero(row: Row) -> str:
    if row.gain is None:
        return ""
    if not _differs(row.gain):
        return ", not to be told apart from zero-shot"
    unit = _points(abs(row.gain.value)) if _unit(row) == "%" else figure(abs(row.gain.value))
    return f", {unit} {'above' if row.gain.value > 0 else 'below'} zero-shot"


def _like_zero_shot(row: Row) -> bool:
    return row.gain is not None and not _differs(row.gain)


def _points(value: float) -> str:
    return f"{figure(value)}{GLUE}points"


def _differs(estimate: Estimate) -> bool:
    return estimate.low is not None and estimate.high is not None and (estimate.low > 0 or estimate.high < 0)


def _trainable(row: Row) -> float:
    return row.mean_of(TRAINABLE) or 0.0
