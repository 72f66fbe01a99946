"""Which figure of which metric says how much a model makes up, on one scale: per cent, more is worse.

A metric measures it in its own way, and two metrics' figures must not be compared; runs on the same task may be.

    chair    share of captions that name an object that is not there               100 * CHAIRs
    listed   share of lists that name a thing that is not there                    hallucination_rate
    pope     share of its "yes" that is said of an object that is not there        100 * (1 - precision)
    amber    share of what is not there (or is not so) that it affirms             100 - recall of "no"
    mmhal    share of answers that the judge rates below 3                         100 * hallucination_rate
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from peft_mllm.study.results import Result, Score


@dataclass(frozen=True)
class Figure:
    """Where a metric says it.

    Attributes:
        value: its name among the metric's values.
        scale: what brings it to per cent.
        more_is_better: whether the value falls where hallucination rises; 100 minus it is then taken.
        meaning: what the per cent are of, in words for a table.
        of_what: the value that must not be 0, where the share would be one of nothing.
    """

    value: str
    scale: float
    more_is_better: bool
    meaning: str
    of_what: str = ""

    def of(self, score: Score) -> float | None:
        """The per cent; None where a score lacks the value, or it would be a share of nothing."""
        if self.value not in score.values or score.values.get(self.of_what) == 0:
            return None
        share = self.scale * score.values[self.value]
        return 100 - share if self.more_is_better else share


FIGURES: Mapping[str, Figure] = {
    "chair": Figure("CHAIRs", 100, False, "captions that name an object that is not there"),
    "listed": Figure("hallucination_rate", 1, False, "lists that name a thing that is not there"),
    "pope": Figure("precision", 100, True, "answers yes that are said of an object that is not there", "yes_ratio"),
    "amber": Figure("recall", 1, True, "untrue statements that are affirmed"),
    "mmhal": Figure("hallucination_rate", 100, False, "answers that are rated as hallucinated"),
}
"""By the metric's name."""


def hallucinations(result: Result) -> dict[str, float]:
    """Per cent by task, of each task whose metric measures it; in the order of the run's scores."""
    found = {task: figure.of(score) for task, score in result.scores.items() if (figure := figure_of(score))}
    return {task: share for task, share in found.items() if share is not None}


def hallucination_of(result: Result, task: str | None = None) -> float | None:
    """Per cent of one task, or of the first that measures it; None where none does.

    Args:
        result: a finished run.
        task: the task's name; compare runs on the same one.
    """
    found = hallucinations(result)
    return next(iter(found.values()), None) if task is None else found.get(task)


def figure_of(score: Score) -> Figure | None:
    """The figure of a score's metric, whatever its variant; None where it measures no hallucination."""
    return FIGURES.get(score.metric.partition(":")[0])
