"""What the preview shows: gathered from a file and a model, in one pass over the file."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from PIL import Image

from peft_mllm.data.check import Finding, Length, Report, check
from peft_mllm.data.formats import Source
from peft_mllm.data.leakage import Against
from peft_mllm.data.specials import Specials
from peft_mllm.models.base import Family
from peft_mllm.preview.seen import seen
from peft_mllm.preview.tokens import Reading, Span, Token
from peft_mllm.record import Record

BINS = 24
ANSWERS = 15
"""The most frequent ones, which are listed."""
FINDINGS = 200
"""More are counted, not listed."""
THUMBNAIL = 320


@dataclass(frozen=True)
class Bar:
    """One bar of a histogram: its label, its count, and its length in per cent of the longest."""

    label: str
    count: int
    per_cent: float


@dataclass(frozen=True)
class Histogram:
    """Numbers in bins of equal width.

    Attributes:
        bars: from the smallest numbers to the largest.
        lowest, middle, highest: minimum, median and maximum.
    """

    bars: tuple[Bar, ...]
    lowest: int
    middle: float
    highest: int


@dataclass(frozen=True)
class Picture:
    """An image inside the page."""

    data: str
    width: int
    height: int


@dataclass(frozen=True)
class Card:
    """One record.

    Attributes:
        id, place: what it is called, and where it stands.
        turns: role and text.
        loaded: the images as they are read, small.
        seen: what the model gets, pixel by pixel.
        note: what that is.
        tokens: the sample.
        total, learned, of_images: numbers of tokens.
    """

    id: str
    place: str
    turns: tuple[tuple[str, str], ...]
    loaded: tuple[Picture, ...]
    seen: tuple[Picture, ...]
    note: str
    tokens: tuple[Token | Span, ...]
    total: int
    learned: int
    of_images: int


@dataclass(frozen=True)
class Content:
    """The whole page.

    Attributes:
        file, model, family: what is shown, and for whom.
        report: the check's.
        findings: the first of them.
        limit: tokens that fit.
        lengths, answer_lengths: in tokens, over all records without errors; None if there are none.
        answers: the most frequent last answers.
        kinds: how many different ones there are.
        others: how often the rest was given.
        cards: the first records.
    """

    file: str
    model: str
    family: str
    report: Report
    findings: tuple[Finding, ...]
    limit: int
    lengths: Histogram | None
    answer_lengths: Histogram | None
    answers: tuple[Bar, ...]
    kinds: int
    others: int
    cards: tuple[Card, ...]


def gather(
    source: Source,
    family: Family,
    *,
    model: str,
    limit: int,
    max_length: int,
    against: Against | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Content:
    """Check a file for a model, and prepare its first records for the page.

    Args:
        source: the records.
        family: the model; its weights are not used.
        model: what the user calls it.
        limit: records that are shown token by token.
        max_length: tokens that fit.
        against: another file, with which this one is to have nothing in common.
        progress: called with the number of records checked and of all.
    """
    measured: list[Length] = []
    said: Counter[str] = Counter()

    def measure(record: Record) -> Length:
        sample = family.encode(record)
        measured.append(Length(len(sample.ids), sample.answer_tokens, max_length))
        said[record.answer.strip()] += 1
        return measured[-1]

    specials = Specials(family.encode, family.tokenizer)
    report = check(source, measure=measure, specials=specials, against=against, progress=progress)
    reading = Reading(family)
    chosen = [number for number, _ in zip(report.good(), range(limit), strict=False)] if not report.broken else []
    most = said.most_common(ANSWERS)
    return Content(
        file=str(source.path),
        model=model,
        family=type(family).__name__,
        report=report,
        findings=report.findings[:FINDINGS],
        limit=max_length,
        lengths=histogram([each.total for each in measured]),
        answer_lengths=histogram([each.answer for each in measured]),
        answers=tuple(Bar(answer, count, 100 * count / most[0][1]) for answer, count in most),
        kinds=len(said),
        others=said.total() - sum(count for _, count in most),
        cards=tuple(_card(source, number, family, reading) for number in chosen),
    )


def histogram(numbers: Sequence[int]) -> Histogram | None:
    """Whole numbers in at most `BINS` bins, each a whole number wide."""
    if not numbers:
        return None
    low, high = min(numbers), max(numbers)
    width = -(-(high - low + 1) // BINS)
    counts = Counter((number - low) // width for number in numbers)
    longest = max(counts.values())
    bars = []
    for i in range((high - low) // width + 1):
        first, last = low + i * width, min(low + (i + 1) * width - 1, high)
        label = str(first) if first == last else f"{first} to {last}"
        bars.append(Bar(label, counts[i], 100 * counts[i] / longest))
    return Histogram(tuple(bars), low, median(numbers), high)


def _card(source: Source, number: int, family: Family, reading: Reading) -> Card:
    record = source[number]
    sample = family.encode(record)
    images = [image.load() for image in record.images]
    view = seen(family, sample, images)
    return Card(
        id=record.id,
        place=record.source,
        turns=tuple((turn.role, turn.text) for turn in record.turns),
        loaded=tuple(_thumbnail(image) for image in images),
        seen=tuple(_exact(picture) for picture in view.pictures),
        note=view.note,
        tokens=tuple(reading.show(sample)),
        total=len(sample.ids),
        learned=sample.answer_tokens,
        of_images=reading.image_count(sample),
    )


def _exact(image: Image.Image) -> Picture:
    return _picture(image, image.size, format="PNG", optimize=True)


def _thumbnail(image: Image.Image) -> Picture:
    small = image.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    return _picture(small, image.size, format="JPEG", quality=85)


def _picture(image: Image.Image, size: tuple[int, int], **how: Any) -> Picture:
    held = io.BytesIO()
    image.save(held, **how)
    data = base64.b64encode(held.getvalue()).decode()
    return Picture(f"data:image/{how['format'].lower()};base64,{data}", *size)
