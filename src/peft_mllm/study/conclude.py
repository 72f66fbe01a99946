"""What may be concluded from a comparison: one or two sentences that claim no more than the figures do."""

from __future__ import annotations

from collections.abc import Sequence

from peft_mllm.study.compare import Comparison, Row
from peft_mllm.study.statistics import Estimate
from peft_mllm.study.wording import GLUE, and_list, count, figure, interval


def conclusion(comparison: Comparison) -> str:
    """Say which run is best, or which cannot be told apart and what then decides between them."""
    ranked = sorted(comparison.trained, key=_score, reverse=True)
    if not ranked:
        return f"No trained run has a score on {comparison.task}."
    first = ranked[0]
    if len(ranked) == 1:
        return f"{first.run} reaches {_reached(first, comparison)}.{_forgot(first, comparison)}"
    if first.best:
        return f"{first.run} is best: {_reached(first, comparison)}.{_forgot(first, comparison)}"
    return _undecided(ranked, comparison)


def _undecided(ranked: Sequence[Row], comparison: Comparison) -> str:
    """The runs that overlap with the highest, and the cheaper and the gentler of them."""
    group = [ranked[0], *(row for row in ranked[1:] if not ranked[0].lies_above(row))]
    names = and_list([f"{row.run} ({_with_unit(row.score, comparison)})" for row in group])
    sentences = [f"On {comparison.task}, {names} cannot be told apart by {group[0].questions} questions."]
    if all(row.gain and not _differs(row.gain) for row in group):
        sentences.append("None of them can be told apart from zero-shot either.")
    sentences.append(_decides(group, comparison))
    return " ".join(filter(None, sentences))


def _decides(group: Sequence[Row], comparison: Comparison) -> str:
    """What speaks for one of several equals."""
    cheapest = min(group, key=lambda row: row.trainable)
    words = f"Of these, {cheapest.run} trains the fewest parameters ({count(cheapest.trainable)})"
    gentlest = _gentlest(group)
    if gentlest is None or gentlest.forgotten is None:
        return f"{words}."
    lost = _points(gentlest.forgotten.value, comparison)
    joined = " and" if gentlest is cheapest else f", {gentlest.run}"
    return f"{words}{joined} forgot least of the seen tasks ({lost})."


def _reached(row: Row, comparison: Comparison) -> str:
    limits = interval(row.score)
    words = f"{_with_unit(row.score, comparison)} on {comparison.task}" + (f" ({limits})" if limits else "")
    if row.gain is None:
        return words
    if not _differs(row.gain):
        return f"{words}, which cannot be told apart from zero-shot"
    side = "above" if row.gain.value > 0 else "below"
    return f"{words}, {_points(abs(row.gain.value), comparison)} {side} zero-shot"


def _forgot(row: Row, comparison: Comparison) -> str:
    """The price in the seen tasks, and who paid the least."""
    if row.forgotten is None:
        return ""
    lost = row.forgotten.value
    verb = "forgot" if lost >= 0 else "gained"
    words = f" It {verb} {_points(abs(lost), comparison)} on the seen tasks"
    gentlest = _gentlest(comparison.trained)
    if gentlest is None or gentlest is row or gentlest.forgotten is None:
        return f"{words}."
    return f"{words}; {gentlest.run} forgot least ({_points(gentlest.forgotten.value, comparison)})."


def _gentlest(rows: Sequence[Row]) -> Row | None:
    """The run that forgot least, if more than one is known to compare."""
    known = [(row.forgotten.value, row) for row in rows if row.forgotten is not None]
    return min(known, key=lambda pair: pair[0])[1] if len(known) > 1 else None


def _differs(gain: Estimate) -> bool:
    return gain.low is not None and gain.high is not None and (gain.low > 0 or gain.high < 0)


def _score(row: Row) -> float:
    return row.score.value if row.score else 0.0


def _with_unit(score: Estimate | None, comparison: Comparison) -> str:
    return GLUE.join(filter(None, [figure(score.value if score else None), comparison.unit]))


def _points(value: float, comparison: Comparison) -> str:
    return f"{figure(value)}{GLUE}points" if comparison.unit == "%" else figure(value)
