"""The normalisation of short answers by the VQA scorers.

Source: GT-Vision-Lab/VQA `vqaEval.py` (Agrawal et al. 2015) and mmf's `EvalAIAnswerProcessor`, which differ in
their first step. In order:

    1. punctuation    a mark goes, or becomes a space where it touches no space
    2. periods        every period that no digit follows goes
    3. words          lower case, number words to digits, articles out, contractions get their apostrophe

The official code has oddities, and published figures were made with them, so they are kept: one comma between
digits makes every mark of the answer go without a space; only the first 32 periods go, because a flag stands
where the number of substitutions is expected; and the table of contractions has slips.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache, lru_cache
from pathlib import Path

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_MOST_PERIODS = 32
_REMEMBERED = 1 << 17  # people give the same answers again and again

_NUMBERS = {
    word: str(number)
    for number, words in enumerate(
        [("none", "zero"), "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
    for word in ([words] if isinstance(words, str) else words)
}
_ARTICLES = frozenset({"a", "an", "the"})

# The table of the VizWiz scorer went through a word processor: all its apostrophes are curly but these.
_VIZWIZ_STRAIGHT = frozenset({"aint", "arent", "cant", "couldve", "couldnt", "weve", "wheres", "whove"})
_VIZWIZ_STRAIGHT_KEY = frozenset({"couldn'tve", "hadn'tve"})


def plain(text: str) -> str:
    """Line breaks and tabs become spaces; no space around."""
    return text.replace("\n", " ").replace("\t", " ").strip()


@lru_cache(maxsize=_REMEMBERED)
def official(text: str) -> str:
    """All steps, as the official scorer applies them to an answer."""
    return words(punctuation(plain(text)), contractions())


@lru_cache(maxsize=_REMEMBERED)
def vizwiz(text: str) -> str:
    """All steps with the table of the VizWiz scorer, whose curly apostrophes match no typed answer."""
    return words(punctuation(plain(text)), vizwiz_contractions())


@lru_cache(maxsize=_REMEMBERED)
def evalai(text: str) -> str:
    """All steps after EvalAI's own: lower case, no comma or question mark, `'s` is a word."""
    lowered = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return words(punctuation(plain(lowered)), contractions())


def punctuation(text: str) -> str:
    """Steps 1 and 2."""
    everywhere = _COMMA_IN_NUMBER.search(text) is not None
    out = text
    for mark in _MARKS:
        gone = everywhere or f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if gone else " ")
    return _PERIOD.sub("", out, count=_MOST_PERIODS)


def words(text: str, table: Mapping[str, str]) -> str:
    """Step 3."""
    found = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(table.get(word, word) for word in found if word not in _ARTICLES)


@cache
def contractions() -> Mapping[str, str]:
    """The official table: a word without its apostrophe to the word with it."""
    content = (Path(__file__).parent / "contractions.json").read_text(encoding="utf-8")
    return json.loads(content)["contractions"]


@cache
def vizwiz_contractions() -> Mapping[str, str]:
    """The table of the VizWiz scorer."""
    return {
        key if key in _VIZWIZ_STRAIGHT_KEY else _curly(key): value if key in _VIZWIZ_STRAIGHT else _curly(value)
        for key, value in contractions().items()
    }


def _curly(text: str) -> str:
    return text.replace("'", "\u2019")
