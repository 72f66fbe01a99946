"""What a claim is decided by: a contrast of matched runs, pooled over them, and the verdict on what it should be.

A contrast is a weighted sum of groups that differ in one factor alone, paired by seed and question. With several
seeds it is tested as any factor's effect is (inference/effects.py); several contrasts of one claim are adjusted after
Holm. One seed shows nothing of what another would do, and a claim is about methods, not about two runs. Then the
tasks are the sample, each trained by itself: a t test of their mean differences, from three tasks on, and no verdict
from fewer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from peft_mllm.study.inference.differences import holm
from peft_mllm.study.inference.effects import Cell, factor_effect
from peft_mllm.study.inference.intervals import UNBOUNDED
from peft_mllm.study.inference.variance import Seeds, Spread, margin, p_value
from peft_mllm.study.pairing import Scored, matched, on_shared
from peft_mllm.study.paper.groups import Group, shown_by_rivals
from peft_mllm.study.statistics import CONFIDENCE, Estimate
from peft_mllm.study.wording import figure, interval

HOLDS = "holds"
FAILS = "does not hold"
OPEN = "cannot be told"
UNTESTED = "not tested"

PARTLY = "the study has not the runs for the rest of the claim"

LEVEL = 1 - CONFIDENCE
LEAST_TASKS = 3
"""For a verdict from one seed."""
NEGLIGIBLE = 1.0
"""Points. What is claimed to change nothing must change less than this; every score here is out of 100."""

Tasks = Callable[[Group], Sequence[str]]
Parts = Sequence[tuple[float, Group]]


@dataclass(frozen=True)
class Contrast:
    """A pooled difference, in points.

    Attributes:
        p: two-sided, of no difference.
        cells: matched cells that were pooled.
        seeds: the fewest that a cell has.
    """

    what: str
    value: Estimate
    p: float
    cells: int
    tasks: int
    seeds: int

    def __str__(self) -> str:
        within = interval(self.value, signed=True) or f"one seed and {self.tasks} of {LEAST_TASKS} tasks: no interval"
        over = f", {self.tasks} tasks" if self.tasks > 1 else ""
        alone = ", one seed" if self.seeds == 1 and over else ""
        return f"{self.what} {figure(self.value.value, signed=True)} ({within}{over}{alone})"


@dataclass(frozen=True)
class Finding:
    """A verdict and the figures that decide it."""

    verdict: str
    because: str


def contrast(what: str, cells: Iterable[Parts], tasks: Tasks) -> Contrast | None:
    """Pool the weighted sums of matched groups.

    Args:
        what: in words, such as `tuned minus frozen`.
        cells: each a weighted sum of groups, such as ((1, tuned), (-1, frozen)).
        tasks: which scores of a cell's first group count.

    Returns:
        None where no cell has scores of single questions for all of its groups.
    """
    gathered: dict[str, list[Scored]] = {}
    shown: dict[str, list[Seeds | None]] = {}
    for parts in cells:
        for task in tasks(parts[0][1]):
            scored = [(weight, group.scored(task)) for weight, group in parts]
            if (difference := combined(scored)) is not None:
                gathered.setdefault(task, []).append(difference)
                shown.setdefault(task, []).append(_shown(parts, task))
    return pooled(what, gathered, shown=shown)


def _shown(parts: Parts, task: str) -> Seeds | None:
    """What the block shows of seeds, where a contrast is one line minus another."""
    if sorted(weight for weight, _ in parts) != [-1.0, 1.0]:
        return None
    return shown_by_rivals(parts[0][1], parts[1][1], task)


def pooled(
    what: str, gathered: Mapping[str, Sequence[Scored]], *, shown: Mapping[str, Sequence[Seeds | None]] | None = None
) -> Contrast | None:
    """Pool differences, given by task, over cells with equal weight.

    Args:
        what: in words.
        gathered: the differences of each cell.
        shown: what the block of each cell shows of seeds, on that cell's own seeds and questions.
    """
    aligned = {task: matched(each) for task, each in gathered.items()}
    differences = {task: each for task, each in aligned.items() if each}
    cells = [(task, each) for task, of in differences.items() for each in of]
    if not cells:
        return None
    seeds = min(len(each) for _, each in cells)
    if seeds == 1:
        value, p = _over_tasks([float(np.mean([each.mean() for each in of])) for of in differences.values()])
    else:
        between = [
            known if len(aligned_to.seeds) == len(each) else None
            for task, of in differences.items()
            for each, aligned_to, known in zip(
                of, gathered[task], (shown or {}).get(task) or [None] * len(of), strict=True
            )
        ]
        found = factor_effect(
            [
                Cell(str(place), task, each, np.zeros_like(each), between=known)
                for place, ((task, each), known) in enumerate(zip(cells, between, strict=True))
            ]
        )
        value, p = Estimate(found.pooled.value, found.pooled.low, found.pooled.high), found.pooled.p
    return Contrast(what, value, p, len(cells), len(differences), seeds)


def _over_tasks(means: Sequence[float]) -> tuple[Estimate, float]:
    """The mean of tasks, whose own differences are the sample."""
    value = float(np.mean(means))
    if len(means) < LEAST_TASKS:
        return Estimate(value), 1.0
    spread = Spread(float(np.var(means, ddof=1)) / len(means), len(means) - 1)
    if spread.variance == 0:
        return Estimate(value), 1.0
    half = margin(spread)
    return Estimate(value, value - half, value + half), p_value(value, spread)


def combined(parts: Sequence[tuple[float, Scored | None]]) -> Scored | None:
    """The weighted sum of scores on the seeds and questions that all have; None where there are none."""
    there = [(weight, scored) for weight, scored in parts if scored is not None]
    found = on_shared([scored for _, scored in there]) if there and len(there) == len(parts) else None
    if found is None:
        return None
    weights = np.array([weight for weight, _ in there])
    total = np.tensordot(weights, np.stack([each.scores for each in found]), axes=1)
    return replace(found[0], scores=total, bounds=UNBOUNDED)


# --- verdicts ---


def all_above(contrasts: Sequence[Contrast | None]) -> Finding:
    """Holds where every contrast is told apart from 0 and above it; fails where one is told apart and below.

    What cannot be measured (None) leaves a claim open that all else speaks for.
    """
    known = [each for each in contrasts if each is not None]
    if not known:
        return nothing()
    adjusted = holm([each.p for each in known])
    signs = [sign(each, p) for each, p in zip(known, adjusted, strict=True)]
    return decided(signs, whole=len(known) == len(contrasts), because=listed(known))


def decided(signs: Sequence[int], *, whole: bool, because: str) -> Finding:
    """The verdict on contrasts that are told apart as claimed (1), the other way round (-1), or not at all (0)."""
    if -1 in signs:
        return Finding(FAILS, because)
    if whole:
        return Finding(HOLDS if set(signs) == {1} else OPEN, because)
    return Finding(OPEN, f"{because}; {PARTLY}")


def negligible(found: Contrast | None) -> Finding:
    """Holds where the whole interval is within a point of 0; fails where it is more than that, either way."""
    if found is None or found.value.low is None or found.value.high is None:
        return nothing()
    low, high = found.value.low, found.value.high
    inside = low > -NEGLIGIBLE and high < NEGLIGIBLE
    outside = low > NEGLIGIBLE or high < -NEGLIGIBLE
    return Finding(HOLDS if inside else FAILS if outside else OPEN, str(found))


def no_gain(found: Contrast | None) -> Finding:
    """Holds where the gain is less than a point by its whole interval; fails where it is told apart from 0."""
    if found is None or found.value.low is None or found.value.high is None:
        return nothing()
    low, high = found.value.low, found.value.high
    return Finding(FAILS if low > 0 else HOLDS if high < NEGLIGIBLE else OPEN, str(found))


def together(findings: Iterable[Finding]) -> Finding:
    """All parts of one claim: it fails with one of them, and holds with all that the claim has."""
    each = list(findings)
    verdicts = [finding.verdict for finding in each]
    because = "; ".join(dict.fromkeys(finding.because for finding in each if finding.because))
    if FAILS in verdicts:
        return Finding(FAILS, because)
    if set(verdicts) <= {UNTESTED}:
        return nothing()
    if UNTESTED in verdicts:
        return Finding(OPEN, because if because.endswith(PARTLY) else f"{because}; {PARTLY}")
    return Finding(HOLDS if set(verdicts) == {HOLDS} else OPEN, because)


def sign(found: Contrast, p: float) -> int:
    """1 and -1 where a contrast is told apart from 0, and 0 where it is not."""
    return 0 if p >= LEVEL else 1 if found.value.value > 0 else -1


def nothing() -> Finding:
    """The study has not the runs for it."""
    return Finding(UNTESTED, "")


def listed(contrasts: Sequence[Contrast], *, most: int = 4) -> str:
    """The contrasts in words, those that decide first."""
    ordered = sorted(contrasts, key=lambda each: each.p)
    more = f"; {len(ordered) - most} more" if len(ordered) > most else ""
    return "; ".join(map(str, ordered[:most])) + more
