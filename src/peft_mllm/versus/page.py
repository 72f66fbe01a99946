"""The comparison of two as one HTML page that holds everything, images too, and needs no network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from peft_mllm.files import atomic_write
from peft_mllm.pages import templates
from peft_mllm.pictures import pictures
from peft_mllm.study import wording
from peft_mllm.versus.pairs import Comparison, Contest, Pair

SHOWN = 24
"""Questions of each kind that the page shows, spread evenly over the task."""


@dataclass(frozen=True)
class Card:
    """One question that divides the two."""

    pair: Pair
    images: Sequence[str]


@dataclass(frozen=True)
class Group:
    """The questions that one has right and the other wrong."""

    title: str
    count: int
    cards: Sequence[Card]


@dataclass(frozen=True)
class Section:
    """One task of the page."""

    contest: Contest
    sentence: str
    groups: Sequence[Group]
    note: str


def write_page(comparison: Comparison, path: Path, *, shown: int = SHOWN) -> None:
    """Write the page.

    Args:
        comparison: what to show.
        path: the page; replaced as a whole or not at all.
        shown: questions of each kind and task that are shown.

    Raises:
        DiskError: the page cannot be written.
    """
    atomic_write(path, render(comparison, shown=shown), what="the page")


def render(comparison: Comparison, *, shown: int = SHOWN) -> str:
    """The page as text."""
    sections = [
        _section(contest, sentence, comparison, shown)
        for contest, sentence in zip(comparison.contests, comparison.sentences(), strict=True)
    ]
    page = templates("versus").get_template("versus.html.j2")
    return page.render(names=comparison.names, sides=(comparison.a, comparison.b), sections=sections, words=wording)


def _section(contest: Contest, sentence: str, comparison: Comparison, shown: int) -> Section:
    chosen = [_spread(pairs, shown) for pairs in (contest.only_a, contest.only_b)]
    expected = {pair.id: pair.a.images for pairs in chosen for pair in pairs}
    named = comparison.a.tasks.get(contest.task) or comparison.b.tasks.get(contest.task)
    images, note = pictures(named, expected) if expected else ({}, "")
    first, second = comparison.names
    groups = [
        Group(title, len(pairs), [Card(pair, images.get(pair.id, ())) for pair in some])
        for title, pairs, some in (
            (f"{first} is right where {second} is wrong", contest.only_a, chosen[0]),
            (f"{second} is right where {first} is wrong", contest.only_b, chosen[1]),
        )
    ]
    return Section(contest, sentence, groups, note)


def _spread(pairs: Sequence[Pair], most: int) -> list[Pair]:
    """Up to so many, evenly spaced, in their order."""
    if len(pairs) <= most:
        return list(pairs)
    return [pairs[i * len(pairs) // most] for i in range(most)]
