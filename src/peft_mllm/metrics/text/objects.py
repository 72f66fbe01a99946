"""The COCO objects that a caption names, by the rule of CHAIR.

Rohrbach et al. 2018 (arXiv 1809.02156); source: LisaAnne/Hallucination utils/chair.py. A caption in lower case is
split into words as NLTK does, each word becomes its singular, pairs of words that are one object are joined from
left to right, and what stands in the table of synonyms counts, each time it is said:

    "a baby elephant by two fire hydrants"  ->  elephant, fire hydrant

The table's slips are kept: " motor bike" and " cheesecake" have a space before them and so are never found.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from peft_mllm.metrics.text.singular import singular

_PAIRS = (
    "motor bike,motor cycle,air plane,traffic light,street light,traffic signal,stop light,fire hydrant,stop sign,"
    "parking meter,suit case,sports ball,baseball bat,baseball glove,tennis racket,wine glass,hot dog,cell phone,"
    "mobile phone,teddy bear,hair drier,potted plant,laptop computer,home plate,train track"
)
_ANIMALS = "bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,animal,cub"

JOINED = {
    **{pair: pair for pair in _PAIRS.split(",")},
    **{f"{age} {animal}": animal for age in ("baby", "adult") for animal in _ANIMALS.split(",")},
    "passenger jet": "jet", "passenger train": "train", "bow tie": "tie", "toilet seat": "toilet",
    "wine glas": "wine glass",
}  # fmt: skip
"""Pairs of words, and the word that they count as: a baby elephant is no baby."""

# what a word is parted from: quotes and brackets, marks, and the clitics of English
_TOKEN = re.compile(
    r"""
    \.{2,} | -- | [\u2012-\u2015] | [\[\](){}<>;@\#$%&?!*"\u00ab\u00bb\u201c\u201d\u201e\u2018\u2019] | `+ | ''
    | [,:](?!\d) | n't(?=\s|$|[.,:;?!)"]) | '(?:s|m|d|ll|re|ve)(?=\s|$|[.,:;?!)"])
    | '(?=\s|$|[,:](?!\d)|[;@\#$%&?!*()\[\]{}<>"]|\.(?:\s|$))
    | (?<![^\s(\[{<"])'(?=\w)
    | \.(?=[\])}>"'\u201d\u2019\u00bb]*(?:\s|$))
    """,
    re.VERBOSE,
)


def words_of(caption: str) -> list[str]:
    """The words of a text in lower case, split as NLTK's `word_tokenize` splits sentences, and in the singular."""
    return [singular(word) for word in _split(caption.lower())]


def objects_of(caption: str) -> list[tuple[str, str]]:
    """The objects a caption names, in order, with repeats: the word, and the name of the object."""
    words = list(_joined(words_of(caption)))
    if "toilet" in words and "seat" in words:
        words = [word for word in words if word != "seat"]  # a toilet's seat is no chair
    known = synonyms()
    return [(word, known[word]) for word in words if word in known]


@cache
def synonyms() -> dict[str, str]:
    """The name of the object that each word stands for."""
    table = (Path(__file__).parent / "coco_objects.txt").read_text(encoding="utf-8")
    # the blank that follows some commas belongs to the word, as in the official reading
    return {word: line.strip().split(", ")[0] for line in table.splitlines() for word in line.strip().split(", ")}


def _split(text: str) -> Iterator[str]:
    at = 0
    for found in _TOKEN.finditer(text):
        yield from text[at : found.start()].split()
        yield found[0]
        at = found.end()
    yield from text[at:].split()


def _joined(words: list[str]) -> Iterator[str]:
    at = 0
    while at < len(words):
        pair = JOINED.get(" ".join(words[at : at + 2]))
        yield pair or words[at]
        at += 2 if pair else 1
