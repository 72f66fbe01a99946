"""Claims on stability over seeds, on overfitting, and on what a model makes up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from peft_mllm.study.hallucination import FIGURES
from peft_mllm.study.inference.variance import Spread, margin, p_value
from peft_mllm.study.outcomes import Answers
from peft_mllm.study.pairing import Scored
from peft_mllm.study.paper.evidence import Contrast, Finding, all_above, combined, contrast, pooled, together
from peft_mllm.study.paper.groups import Group
from peft_mllm.study.paper.matching import Evidence, Pair, between_methods, ends, methods_of, seen_by, unseen_by, versus
from peft_mllm.study.paper.names import canonical_task
from peft_mllm.study.paper.spreads import all_steadier, steadier
from peft_mllm.study.statistics import Estimate

FIRST_BEST = {"adapter": 1, "lora": 3, "ia3": 1, "prefix": 1}
"""The point after the lowest validation loss at which each method is claimed to carry over best."""
POINTS = (1, 2, 3, 4)
LEAST_RUNS = 3
"""For an interval of a figure that has no figure for each question."""


def size_and_stability(study: Evidence) -> Finding:
    """Claim 10: a small adapter is steadier on seen tasks and less so on unseen ones; a small LoRA and prefix differ.

    LoRA is claimed to be the reverse of adapter, and a long prefix to be less steady on unseen tasks.
    """
    small_first = {name: _smallest_first(study, name, "size") for name in ("adapter", "lora", "prefix")}
    large_first = {name: [(b, a) for a, b in found] for name, found in small_first.items()}
    unseen, (seen, words) = unseen_by(study.seen), seen_by(study.seen, study.groups)
    ratios = {
        "adapter": (
            steadier("adapter on unseen tasks, large against small", large_first["adapter"], unseen),
            steadier(f"adapter {words}, small against large", small_first["adapter"], seen),
        ),
        "lora": (
            steadier("lora on unseen tasks, small against large", small_first["lora"], unseen),
            steadier(f"lora {words}, large against small", large_first["lora"], seen),
        ),
        "prefix": (steadier("prefix on unseen tasks, small against large", small_first["prefix"], unseen),),
    }
    return all_steadier([ratio for name in methods_of(study.groups) for ratio in ratios.get(name, ())])


def rate_and_stability(study: Evidence) -> Finding:
    """Claim 11: IA3 and prefix are steadier at smaller learning rates."""
    trained = unseen_by(())
    return all_steadier(
        [
            steadier(f"{name}, low against high rate", _smallest_first(study, name, "learning_rate"), trained)
            for name in ("ia3", "prefix")
            if name in methods_of(study.groups)
        ]
    )


def carries_over_early(study: Evidence) -> Finding:
    """Claim 12: other tasks are done best at the first point of overfitting; with LoRA at the third."""
    return all_above(
        [
            _between_points(study, method, claimed, other)
            for method, claimed in FIRST_BEST.items()
            for other in POINTS
            if other != claimed and method in methods_of(study.groups)
        ]
    )


def adapter_makes_up_least(study: Evidence) -> Finding:
    """Claim 13: adapter hallucinates least and less with more training; prefix more with more training."""
    others = [name for name in methods_of(study.groups) if name != "adapter"]
    least = all_above([_made_up_less("adapter", other, study.groups) for other in others])
    falls, rises = _along_the_curve(study, "adapter", -1.0), _along_the_curve(study, "prefix", 1.0)
    return together([least, all_above([falls, rises])])


def adapter_best_judged(study: Evidence) -> Finding:
    """Claim 14: adapter has the highest score and the lowest hallucination rate on MMHal-Bench."""
    found: list[Contrast | None] = []
    for other in methods_of(study.groups):
        if other != "adapter":
            cells = versus(study.groups, "adapter", other)
            found.append(contrast(f"score, adapter minus {other}", cells, _judged))
            found.append(_made_up_less("adapter", other, study.groups, metric="mmhal"))
    return all_above(found)


def _smallest_first(study: Evidence, method: str, field: str) -> list[Pair]:
    groups = [group for group in study.groups if group.method == method]
    return [(small, large) for large, small in ends(groups, field, also=("parameters",))]


def _between_points(study: Evidence, method: str, claimed: int, other: int) -> Contrast | None:
    """The score on other tasks at one point of the curve minus that at another."""
    sources = {canonical_task(group.trained) for group in study.groups}
    seen = {canonical_task(task) for task in study.seen}
    gathered: dict[str, list[Scored]] = {}
    for group in study.groups:
        for task in group.tasks if group.method == method else ():
            if task == group.trained or canonical_task(task) not in sources - seen:
                continue
            points = [(1.0, group.scored_at(task, claimed)), (-1.0, group.scored_at(task, other))]
            if (difference := combined(points)) is not None:
                gathered.setdefault(task, []).append(difference)
    return pooled(f"{method}: point {claimed} minus point {other}", gathered)


# --- what is made up: a figure for each run, not for each question ---


def _made_up_less(first: str, second: str, groups: Sequence[Group], *, metric: str = "") -> Contrast | None:
    """The second method's per cent minus the first's, by seed, on each task that measures it."""
    differences: list[float] = []
    for methods in between_methods(groups):
        if not {first, second} <= methods.keys():
            continue
        own, other = (_by_seed(methods[name], metric) for name in (first, second))
        differences += [other[key] - own[key] for key in own if key in other]
    return _mean_of(f"made up, {second} minus {first}, %", differences)


def _along_the_curve(study: Evidence, method: str, sign: float) -> Contrast | None:
    """The per cent at the last scored point minus that at the first, times the sign that is claimed."""
    changes = []
    for group in study.groups:
        for outcome in group.cell.outcomes if group.method == method else ():
            if len(outcome.curve) > 1:
                first, last = (_made_up(outcome.curve[place].scores, group.trained) for place in (0, -1))
                changes += [sign * (last[task] - first[task]) for task in first if task in last]
    return _mean_of(f"{method}: {'rise' if sign > 0 else 'fall'} of what is made up with training, %", changes)


def _by_seed(group: Group, metric: str) -> dict[tuple[int | None, str], float]:
    return {
        (outcome.seed, task): share
        for outcome in group.cell.outcomes
        for task, share in _made_up(outcome.scores, group.trained, metric).items()
    }


def _made_up(scores: Mapping[str, Answers], trained: str, metric: str = "") -> dict[str, float]:
    """Per cent by task, on tasks that were not trained on."""
    found = {}
    for task, answers in scores.items():
        name = answers.metric.partition(":")[0]
        figure = FIGURES.get(name)
        if figure and figure.value in answers.values and task != trained and metric in ("", name):
            share = figure.scale * answers.values[figure.value]
            found[task] = 100 - share if figure.more_is_better else share
    return found


def _mean_of(what: str, values: Sequence[float]) -> Contrast | None:
    """The mean of one figure per run; runs are the sample."""
    if not values:
        return None
    value = float(np.mean(values))
    variance = float(np.var(values, ddof=1)) / len(values) if len(values) >= LEAST_RUNS else 0.0
    if not variance:
        return Contrast(what, Estimate(value), 1.0, len(values), 1, 1)
    spread = Spread(variance, len(values) - 1)
    half = margin(spread)
    return Contrast(
        what, Estimate(value, value - half, value + half), p_value(value, spread), len(values), 1, len(values)
    )


def _judged(group: Group) -> list[str]:
    return [
        task
        for task in group.tasks
        if any(
            outcome.scores[task].metric.partition(":")[0] == "mmhal"
            for outcome in group.cell.outcomes
            if task in outcome.scores
        )
    ]
