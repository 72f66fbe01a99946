"""The page's head: what can be told from a study, and what cannot. A question stands in one of the two."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from peft_mllm.study import wording
from peft_mllm.study.analysis import Block, Difference, Line
from peft_mllm.study.outcomes import ZERO_SHOT
from peft_mllm.study.pages.readings import FEW, LEVEL, best_of, change, effect, is_told, pooled_effects
from peft_mllm.study.view import View, words


def told(view: View) -> list[str]:
    """What can be told, the widest first."""
    return [*_decided(view), *_gains(view), *(effect(each) for each in pooled_effects(view) if is_told(each))]


def untold(view: View) -> list[str]:
    """What cannot be told."""
    return [*_undecided(view), *_blind(view), *_unmoved(view)]


def _decided(view: View) -> Iterator[str]:
    blocks = view.analysis.blocks
    if len(blocks) <= FEW:
        for block in blocks:
            if best_of(view, block):
                yield block.sentence
            yield from _lower(view, block)
        return
    winners = Counter(line.factors.get(view.analysis.contrast, "") for block in blocks for line in best_of(view, block))
    if winners:
        names = wording.and_list([f"{name} in {count}" for name, count in winners.most_common()], most=6)
        total = sum(winners.values())
        yield f"One line is told apart from every other in {total} of {len(blocks)} blocks: {names}."
    pairs = [each for block in blocks if _has_seeds(view, block) for each in block.differences]
    apart = sum(map(_is_apart, pairs))
    if apart:
        yield f"{apart} of {len(pairs)} pairs of lines are told apart."


def _lower(view: View, block: Block) -> Iterator[str]:
    """Lines below others; those that are below the best alone are in its sentence."""
    if not _has_seeds(view, block):
        return
    names = _names(block)
    best = names[:1] if best_of(view, block) else []
    above = {name: [other for other in names if other not in best and _beats(block, other, name)] for name in names}
    below: dict[tuple[str, ...], list[str]] = {}
    for name, others in above.items():
        if others:
            below.setdefault(tuple(others), []).append(name)
    for higher, lower in below.items():
        rest = [name for name in names if name not in lower]
        all_others = not best and list(higher) == rest and len(rest) > 1
        than = f"each of the other {len(rest)}" if all_others else wording.and_list(list(higher), most=6)
        verb = "is" if len(lower) == 1 else "are"
        yield _at(view, block, f"{wording.and_list(lower, most=6)} {verb} lower than {than}.")


def _gains(view: View) -> Iterator[str]:
    """Where every line gains over zero-shot, or loses."""
    blocks = [block for block in view.analysis.blocks if _has_seeds(view, block)]
    whole = [block for block in blocks if _all_gain(view, block)]
    if len(blocks) <= FEW:
        for block in whole:
            gains = [line.gain.value for line in _trained(view, block) if line.gain]
            span = f"{wording.figure(min(gains))} to {wording.figure(max(gains))}"
            yield _at(view, block, f"every line gains over zero-shot, by {span}{wording.GLUE}{_points(view)}.")
    elif whole:
        yield f"Every line gains over zero-shot in {len(whole)} of {len(blocks)} blocks."


def _all_gain(view: View, block: Block) -> bool:
    """Each one's interval is above 0: all together are then as sure as the least sure one."""
    lines = _trained(view, block)
    lows = [line.gain.low for line in lines if line.gain is not None and line.gain.low is not None]
    return len(lines) > 1 and len(lows) == len(lines) and min(lows) > 0


def _points(view: View) -> str:
    return "points" if view.unit == "%" else view.unit


def _undecided(view: View) -> Iterator[str]:
    blocks = view.analysis.blocks
    open_blocks = [block for block in blocks if not best_of(view, block)]
    if len(blocks) <= FEW:
        for block in open_blocks:
            yield _which_is_best(view, block)
    elif open_blocks:
        yield (
            f"In {len(open_blocks)} of {len(blocks)} blocks the highest line cannot be told apart from at least one"
            " other."
        )


def _which_is_best(view: View, block: Block) -> str:
    """The block's sentence; only of the highest, where others are told apart from them and said to be."""
    names = _names(block)
    if not _has_seeds(view, block) or not any(map(_is_apart, block.differences)):
        return block.sentence
    group = [name for name in names if name == names[0] or not _beats(block, names[0], name)]
    return _at(view, block, f"which of {wording.and_list(group, most=6)} is best cannot be told.")


def _blind(view: View) -> Iterator[str]:
    if view.seeds == 1:
        yield "Every line is one run: nothing here says how far a score moves with another seed."
    if places := [view.where(factors) for factors in view.analysis.untimed]:
        yield (
            f"With equal time nothing can be compared ({wording.and_list(places)}): when the fastest run was done,"
            " fewer than two lines had been evaluated with every seed."
        )
    if view.analysis.missing:
        yield f"{view.analysis.missing} planned runs have no result yet."


def _unmoved(view: View) -> Iterator[str]:
    for each in pooled_effects(view):
        if not is_told(each):
            yield (
                f"Whether {words(each.axis)} {each.low_level} or {each.high_level} is better cannot be told: the change"
                f" is {change(each)}."
            )


# --- of one block ---


def _names(block: Block) -> list[str]:
    """Of the lines that were compared, the highest first: the higher one of a pair stands first."""
    names = dict.fromkeys(name for each in block.differences for name in (each.first, each.second))
    firsts = Counter(each.first for each in block.differences)
    return sorted(names, key=lambda name: -firsts[name])


def _beats(block: Block, higher: str, lower: str) -> bool:
    pair = {higher, lower}
    return any(
        _is_apart(each) and {each.first, each.second} == pair and (each.value > 0) == (each.first == higher)
        for each in block.differences
    )


def _is_apart(each: Difference) -> bool:
    return each.p_adjusted is not None and each.p_adjusted < LEVEL


def _has_seeds(view: View, block: Block) -> bool:
    """One seed tells two runs apart, and no two methods."""
    return max((line.seeds for line in _trained(view, block)), default=0) > 1


def _trained(view: View, block: Block) -> Sequence[Line]:
    return [line for line in view.members(block) if line.factors.get("method") != ZERO_SHOT]


def _at(view: View, block: Block, said: str) -> str:
    """With its place, where there are several blocks."""
    if len(view.analysis.blocks) > 1:
        return f"{view.block_title(block)}: {said}"
    return said[:1].upper() + said[1:] if said.startswith(("every", "which")) else said
