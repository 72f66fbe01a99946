"""What a contest shows: all pairs with Holm's correction, groups that cannot be told apart, ranks, and a sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from peft_mllm.study.analysis import Block, Difference, Rank
from peft_mllm.study.contest import Contest, Structure
from peft_mllm.study.inference.differences import Comparison
from peft_mllm.study.inference.groups import group
from peft_mllm.study.inference.ranks import Ranking, rank_stability
from peft_mllm.study.overview import Row
from peft_mllm.study.pairing import Group, on_common_questions, pairwise_differences
from peft_mllm.study.verdict import Standing, verdict


@dataclass(frozen=True)
class Decided:
    """A block with what its lines are told about it.

    Attributes:
        letters: by line's place, of those that were compared.
        best: the place of the line that is told apart from all others and above; None if there is none.
        left_out: places of lines that cannot be compared with each other one.
    """

    block: Block
    letters: Mapping[int, str]
    best: int | None
    left_out: tuple[int, ...]


def decide(contest: Contest, rows: Sequence[Row], structure: Structure) -> Decided:
    """Compare the lines of a contest.

    Args:
        contest: who competes.
        rows: all lines of the study, by place.
        structure: gives the lines their names.
    """
    scored = [place for place in contest.members if rows[place].own is not None]
    places = {structure.name(place): place for place in sorted(scored, key=lambda place: _height(rows[place]))}
    groups = {name: own for name, place in places.items() if (own := rows[place].own) is not None}
    comparisons, apart = pairwise_differences(groups)
    names = [name for name in groups if any(name in (each.first, each.second) for each in comparisons)]
    # the letters follow the table's order, which is by the means of all seeds that a line has
    means = {name: -float(height) for height, name in enumerate(names)}
    found = group(means, comparisons) if names else None
    letters = {places[name]: "".join(each) for name, each in found.letters.items()} if found else {}
    best = _best(comparisons, names)
    standing = Standing(
        names=tuple(places),
        compared=tuple(names),
        best=best,
        group=found.best if found else (),
        seeds=max((each.difference.seeds for each in comparisons), default=0),
        questions=max((each.difference.questions for each in comparisons), default=0),
    )
    ordered = _ordered(contest, rows)
    scores = {name: known.scores for name, known in on_common_questions(groups).items()}
    block = Block(
        factors=contest.factors,
        lines=tuple(ordered),
        differences=(*map(_difference, comparisons), *(_untested(pair, groups) for pair in apart)),
        ranks=ranks_of(rank_stability([scores])) if len(scores) > 1 else (),
        sentence=verdict(standing, {name: rows[place] for name, place in places.items()}, contest.factors),
        letters=tuple(letters.get(place, "") for place in ordered),
    )
    left_out = dict.fromkeys(places[name] for pair in apart for name in pair)
    return Decided(block, letters, places[best] if best else None, tuple(left_out) if len(places) > 1 else ())


def _height(row: Row) -> tuple[float, str]:
    """Highest score first; of equals by name, whatever the order in which runs ended."""
    return (-row.score.value if row.score else float("inf"), str(sorted(row.cell.factors.items())))


def _ordered(contest: Contest, rows: Sequence[Row]) -> list[int]:
    every = [*contest.members, *([] if contest.base is None else [contest.base])]
    own = [place for place in every if rows[place].own is not None]
    return [*sorted(own, key=lambda place: _height(rows[place])), *(place for place in every if place not in own)]


def _best(comparisons: Sequence[Comparison], names: Sequence[str]) -> str | None:
    """The line that is above each other one and told apart from it; one alone is best of nothing."""
    if len(names) < 2 or max(each.difference.seeds for each in comparisons) == 1:
        return None  # one seed tells two runs apart, and no two methods
    for name in names:
        own = [each for each in comparisons if name in (each.first, each.second)]
        if len(own) == len(names) - 1 and all(
            each.told_apart and (each.difference.value > 0) == (each.first == name) for each in own
        ):
            return name
    return None


def _difference(each: Comparison) -> Difference:
    found = each.difference
    return Difference(each.first, each.second, found.value, found.low, found.high, found.p, each.adjusted)


def _untested(pair: tuple[str, str], groups: Mapping[str, Group]) -> Difference:
    """A difference of headlines, with nothing to test it by."""
    first, second = (groups[name].values.mean() for name in pair)
    return Difference(*pair, float(first - second), None, None, None, None)


def ranks_of(ranking: Ranking) -> tuple[Rank, ...]:
    """The ranks as data, best first."""
    return tuple(Rank(name, each.mean, each.low, each.high, each.first) for name, each in ranking.ranks.items())
