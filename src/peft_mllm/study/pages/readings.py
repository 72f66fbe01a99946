"""What each section's figures say, in words: made from the figures, and claiming no more than they do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from statistics import fmean, median

from peft_mllm.study import wording
from peft_mllm.study.analysis import Block, Effect, Front, Line
from peft_mllm.study.drawings.comparisons import matched_groups, overall_groups, p_value
from peft_mllm.study.drawings.maps import final_transfers
from peft_mllm.study.drawings.rows import grouped
from peft_mllm.study.measures import MEASURES
from peft_mllm.study.view import View, words

LEVEL = 0.05
VERDICTS = {
    "holds": "hold",
    "does not hold": "do not hold",
    "cannot be told": "cannot be told",
    "not tested": "are not tested",
}
FEW = 4
"""Sentences of a kind; of more, their sum."""


def pooled_effects(view: View) -> list[Effect]:
    """What each factor does over all cells."""
    return [effect for effect in view.analysis.effects if not effect.where]


def is_told(effect: Effect) -> bool:
    """Whether it is more than chance."""
    return effect.p_adjusted is not None and effect.p_adjusted < LEVEL


def effect(each: Effect) -> str:
    """It, where it is."""
    verb = "raises" if each.value.value > 0 else "lowers"
    return (
        f"Going from {words(each.axis)} {each.low_level} to {each.high_level} {verb} the score: {change(each)},"
        f" {each.agree} of {each.cells} matched cells with that sign."
    )


def change(each: Effect) -> str:
    """The mean difference with its interval and p."""
    limits = wording.interval(each.value, signed=True)
    inside = "; ".join(filter(None, [limits, p_value(each.p_adjusted)]))
    return f"{wording.figure(each.value.value, signed=True)}" + (f" ({inside})" if inside else "")


def best_of(view: View, block: Block) -> list[Line]:
    """The lines that are told apart from each other one of their block."""
    return [line for line in view.members(block) if line.best]


# --- one paragraph for each section ---


def overview(view: View) -> str:
    """What the table holds."""
    analysis = view.analysis
    trained = [line for line in analysis.lines if view.trained(line)]
    counted = {axis: len(view.labels(axis)) for axis in view.axes if axis != "seed"}
    parts = wording.and_list([f"{count} {_plural(axis, count)}" for axis, count in counted.items()], most=8)
    said = f"{len(analysis.lines)} lines from {len(analysis.outcomes)} runs: {parts}."
    seeds = sorted({line.seeds for line in trained})
    if seeds:
        many = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
        said += f" A trained line is the mean over {many} {'seed' if seeds == [1] else 'seeds'}."
    return f"{said} Intervals are 95{wording.GLUE}%, {view.over}; gains are paired by question."


def _plural(axis: str, count: int) -> str:
    name = words(axis)
    return name if count == 1 else f"{name}es" if name.endswith("s") else f"{name}s"


def groups(view: View) -> str:
    """How many blocks are decided."""
    blocks = view.analysis.blocks
    decided = sum(bool(best_of(view, block)) for block in blocks)
    gaps = [each for block in blocks for each in block.differences]
    clear = sum(each.p_adjusted is not None and each.p_adjusted < LEVEL for each in gaps)
    several = f" In {decided or 'none'} of {len(blocks)} the highest line is told apart from all others."
    return (
        f"A block holds the lines that differ in the {words(view.analysis.contrast)} alone."
        f"{several if len(blocks) > 1 else ''} Of {len(gaps)} pairs, {clear or 'none'} are told apart at"
        f" {100 * LEVEL:g}{wording.GLUE}% after Holm's correction."
    )


def ranks(view: View) -> str:
    """Who leads, and how surely."""
    said = []
    for title, some in overall_groups(view).items():
        first = min(some, key=lambda each: each.rank.mean)
        where = f"With {title}, " if title else ""
        limits = f"{first.rank.low:.1f} to {first.rank.high:.1f}"
        said.append(
            f"{where}{view.rival(first.factors)} has the best mean rank, {first.rank.mean:.1f} ({limits}), and is"
            f" first in {100 * first.rank.first:.0f}{wording.GLUE}% of the draws."
        )
    return " ".join([*said[:FEW], "Ranks are a picture and no test."])


def effects(view: View) -> str:
    """The pooled effects, each told or not."""
    pooled = pooled_effects(view) or list(view.analysis.effects)
    return " ".join(effect(each) if is_told(each) else _not_told(each) for each in pooled[:FEW])


def _not_told(each: Effect) -> str:
    return (
        f"{words(each.axis).capitalize()} {each.low_level} and {each.high_level} cannot be told apart: {change(each)}."
    )


def curves(view: View) -> str:
    """Validation losses at their lowest."""
    losses: dict[str, list[float]] = {}
    for outcome in view.analysis.outcomes:
        training = outcome.result.training if outcome.result else None
        loss = (training.best or {}).get("eval_loss") if training else None
        if isinstance(loss, (int, float)):
            losses.setdefault(outcome.factors.get(view.analysis.contrast, ""), []).append(float(loss))
    means = {level: fmean(values) for level, values in losses.items()}
    if len(means) < 2:
        return ""
    low, high = min(means, key=means.__getitem__), max(means, key=means.__getitem__)
    return (
        f"The lowest validation loss of a run is, over all runs, {means[low]:.3g} on average with {low}, the best,"
        f" and {means[high]:.3g} with {high}, the worst. A wide band means that the seed decides."
    )


def stability(view: View) -> str:
    """How far seeds move a score, and whether size matters."""
    lines = [line for line in view.analysis.lines if line.sd is not None and view.trained(line)]
    by_level = _by_level(view, ((line.factors, line.sd) for line in lines), median)
    said = f"The median standard deviation over seeds is {wording.figure(median(line.sd or 0.0 for line in lines))}"
    if len(by_level) > 1:
        steady, shaky = _ends(by_level)
        said += f": least with {steady} ({by_level[steady]:.1f}), most with {shaky} ({by_level[shaky]:.1f})"
    pairs = [
        _smallest_and_largest(some)
        for some in grouped(lines, lambda line: line.factors.get(view.analysis.contrast, "")).values()
        if len({line.factors.get("size", "") for line in some}) > 1
    ]
    if not pairs:
        return f"{said}."
    grows = sum(large > small for small, large in pairs)
    return f"{said}. Of {len(pairs)} with several sizes it is larger at the largest than at the smallest in {grows}."


def _smallest_and_largest(lines: Iterable[Line]) -> tuple[float, float]:
    """The median deviation at both ends of a method's sizes."""
    sizes = grouped(lines, lambda line: line.factors.get("size", "")).values()
    ordered = sorted(sizes, key=lambda each: median(line.figures.get("trainable", 0.0) for line in each))
    small, large = (median(line.sd or 0.0 for line in each) for each in (ordered[0], ordered[-1]))
    return small, large


def data_size(view: View) -> str:
    """What more data brought each method."""
    levels = view.labels("data_size")
    at = {level: [line for line in view.analysis.lines if line.factors.get("data_size") == level] for level in levels}
    first, last = (
        _by_level(view, ((line.factors, line.score.value) for line in at[level] if line.score), fmean)
        for level in (levels[0], levels[-1])
    )
    gained = {level: last[level] - first[level] for level in first if level in last}
    if not gained:
        return ""
    least, most = _ends(gained)
    said = f"From {levels[0]} to {levels[-1]} the score moves most with {most} ({_signed(gained[most])})"
    return f"{said} and least with {least} ({_signed(gained[least])})." if len(gained) > 1 else f"{said}."


def transfer(view: View) -> str:
    """What training on one task does to others."""
    away = [each for each in final_transfers(view) if each.source != each.target and each.change is not None]
    by_level = _by_level(view, ((each.factors, each.change) for each in away), fmean)
    if not by_level:
        return ""
    mean = fmean(each.change for each in away if each.change is not None)
    said = f"Training on one task moves the score on another by {_signed(mean)} on average against zero-shot"
    if len(by_level) == 1:
        return f"{said}."
    worst, best = _ends(by_level)
    return f"{said}: {_signed(by_level[best])} with {best}, {_signed(by_level[worst])} with {worst}."


def after_best(view: View) -> str:
    """What is lost beyond the best point."""
    by_level = _by_level(view, ((line.factors, line.robustness) for line in view.analysis.lines), fmean)
    if not by_level:
        return ""
    worst, best = _ends(by_level)
    said = "From the best point to the last that was scored, the trained task's score moves by"
    said = f"{said} {_signed(by_level[best])} with {best}"
    return f"{said} and by {_signed(by_level[worst])} with {worst}." if best != worst else f"{said}."


def hallucination(view: View) -> str:
    """How much is made up, against the base."""
    by_level = _by_level(view, ((line.factors, line.hallucination) for line in view.analysis.lines), fmean)
    if not by_level:
        return ""
    least, most = _ends(by_level)
    return (
        f"With {least} the least is made up ({wording.figure(by_level[least])}{wording.GLUE}% on average over its"
        f" lines), with {most} the most ({wording.figure(by_level[most])}{wording.GLUE}%)."
    )


def pareto(view: View) -> str:
    """Which methods are on the fronts."""
    said = []
    for (x, y), some in grouped(view.analysis.fronts, lambda front: (front.x, front.y)).items():
        if x not in MEASURES or y not in MEASURES:
            continue
        counted = Counter(level for front in some for level in _levels(view, front)).most_common(4)
        names = wording.and_list([f"{name} ({count})" if len(some) > 1 else name for name, count in counted])
        said.append(f"{MEASURES[y].words} against {MEASURES[x].words}: {names}")
    if not said:
        return ""
    blocks = len(view.analysis.blocks)
    what = (
        f"The fronts of {blocks} blocks, with the number of those that a method is on" if blocks > 1 else "The fronts"
    )
    return f"{what}: {'; '.join(said[:FEW])}."


def _levels(view: View, front: Front) -> dict[str, None]:
    """Each once, in order of lines: a set's order is another in every process."""
    lines = (view.analysis.lines[place] for place in front.lines)
    return dict.fromkeys(line.factors.get(view.analysis.contrast, "") for line in lines)


def matched(view: View) -> str:
    """Who wins with an equal budget."""
    wins: dict[str, Counter[str]] = {}
    for some in matched_groups(view).values():
        by_time = some[0].by == "time"
        ordered = sorted(some, key=lambda each: each.value.value, reverse=not by_time)
        if len(ordered) > 1:
            wins.setdefault(some[0].by, Counter())[ordered[0].factors.get(view.analysis.contrast, "")] += 1
    said = []
    for by, counts in wins.items():
        figure = "has the highest score" if by == "parameters" else "reaches the lowest validation loss"
        if counts.total() == 1:
            said.append(f"With equal {by} {next(iter(counts))} {figure}.")
            continue
        names = wording.and_list([f"{name} ({count})" for name, count in counts.most_common(4)])
        said.append(f"With equal {by}, most often {names} {figure}, of {counts.total()} comparisons.")
    missing = dict.fromkeys(name for each in view.analysis.matched for name in each.missing)
    if missing:
        said.append(
            f"Not in every one: {wording.and_list(list(missing))}, of which a seed was not yet evaluated by then."
        )
    if "time" in wins:
        said.append("Time is this machine's, other runs beside it.")
    if said and view.seeds > 1:
        said.append("The intervals say which of these leads are more than chance.")
    return " ".join(said)


def search(view: View) -> str:
    """How much was tried for each, and what it brought."""
    trials = view.analysis.trials
    counts = Counter(trial.factors.get(view.analysis.contrast, "") for trial in trials)
    equal = len(set(counts.values())) == 1
    each = next(iter(counts.values()))
    budget = f"Every method got {each} trials" if equal else "The methods did not get equally many trials"
    spans = []
    for some in grouped(trials, lambda trial: tuple(sorted(trial.factors.items()))).values():
        known = [trial.score for trial in some if trial.score is not None]
        spans += [max(known) - min(known)] if len(known) > 1 else []
    moved = f"; between the best and the worst trial lie {wording.figure(fmean(spans))} on average" if spans else ""
    return f"{budget}, scored on validation data alone{moved}."


def paper(view: View) -> str:
    """How near ours is, and what became of the claims."""
    said = []
    gaps = [cell.difference for cell in view.analysis.paper if cell.difference is not None]
    if gaps:
        said.append(
            f"{len(gaps)} cells have a figure of the paper and ours: ours is {_signed(fmean(gaps))} away on average,"
            f" {wording.figure(fmean(map(abs, gaps)))} in size."
        )
    verdicts = Counter(claim.verdict for claim in view.analysis.claims)
    if verdicts:
        names = wording.and_list([f"{verdicts[each]} {many}" for each, many in VERDICTS.items() if verdicts[each]])
        said.append(f"Of the paper's {verdicts.total()} claims, on our runs {names}.")
    return " ".join(said)


def _by_level(
    view: View, pairs: Iterable[tuple[Mapping[str, str], float | None]], mean: Callable[[Iterable[float]], float]
) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for factors, value in pairs:
        if value is not None:
            values.setdefault(factors.get(view.analysis.contrast, ""), []).append(value)
    return {level: mean(some) for level, some in values.items()}


def _ends(values: Mapping[str, float]) -> tuple[str, str]:
    """The level with the lowest value and that with the highest."""
    return min(values, key=values.__getitem__), max(values, key=values.__getitem__)


def _signed(value: float) -> str:
    return wording.figure(value, signed=True)


def _with_unit(view: View, value: float) -> str:
    return f"{wording.figure(value)}{wording.GLUE}{view.unit}".strip()
