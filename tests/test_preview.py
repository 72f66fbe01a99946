"""The preview: the pictures are the model's numbers, the colours its labels, and a browser shows the page."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import tiny
from browser import CHROMIUM, Browser
from own_data import chat, jsonl, llava
from peft_mllm.data.encode import IGNORED
from peft_mllm.data.opening import open_records
from peft_mllm.models import MODELS, Family
from peft_mllm.models.llava import pad_to_square
from peft_mllm.preview.content import BINS, Content, gather, histogram
from peft_mllm.preview.page import render
from peft_mllm.preview.seen import seen
from peft_mllm.preview.tokens import Reading, Span, Token
from runs import command

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")


def members() -> list[str]:
    return ["llava", "qwen_vl", *(f"generic/{name}" for name in MODELS["generic"].tiny_members())]


def family(name: str) -> Family:
    kind, _, member = name.partition("/")
    return MODELS[kind].tiny_member(member) if member else MODELS[kind].tiny()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Records with a wide image, two images, no image, letters of several bytes, and faults."""
    for n, size in enumerate([(120, 60), (50, 90), (64, 64)]):
        noise = np.random.default_rng(n).integers(0, 256, (size[1] // 10 + 1, size[0] // 10 + 1, 3), dtype=np.uint8)
        Image.fromarray(noise).resize(size).save(tmp_path / f"{n}.png")
    records = [
        llava("<image>\nWhat is <b>this</b> & that?", "A cat.", image="0.png"),
        chat("Compare <image> with <image>.", "Ünlike 图 🎈\nall.", images=["1.png", "2.png"]),
        chat("No image?", "No."),
        llava(image="9.png"),
        llava("<image>\nIs </s> it?", "<script>document.title = 'bad'</script>", image="2.png"),
    ]
    jsonl(tmp_path / "train.jsonl", records)
    return tmp_path


def content_of(folder: Path, model: Family, **options: Any) -> Content:
    how = {"model": "tiny", "limit": 20, "max_length": 2048} | options
    return gather(open_records(folder / "train.jsonl"), model, **how)


# The pictures.


def smooth(width: int, height: int) -> Image.Image:
    """A picture without fine detail: left is dark, right is red, below is blue."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, 0 * x + 90, y], axis=-1).astype(np.uint8))


def test_llavas_picture_is_padded_and_resized() -> None:
    model = MODELS["llava"].tiny(image_size=56)
    (shown,) = seen(model, model.encode(tiny.record("a", "<image>\nq", "a", images=(1,))), [smooth(96, 48)]).pictures
    expected = pad_to_square(smooth(96, 48), (122, 116, 104)).resize((56, 56), Image.Resampling.BICUBIC)
    assert shown.size == (56, 56)
    difference = np.abs(np.asarray(shown).astype(int) - np.asarray(expected).astype(int))
    assert difference.max() <= 1
    assert np.asarray(shown)[2, 20].tolist() == [122, 116, 104]


def test_qwens_picture_is_stretched() -> None:
    model = MODELS["qwen_vl"].tiny(image_size=56)
    (shown,) = seen(model, model.encode(tiny.record("a", "<image>\nq", "a", images=(1,))), [smooth(96, 48)]).pictures
    expected = smooth(96, 48).resize((56, 56), Image.Resampling.BICUBIC)
    assert np.abs(np.asarray(shown).astype(int) - np.asarray(expected).astype(int)).max() <= 1


@pytest.mark.parametrize("name", members())
def test_every_familys_pictures_are_pictures(name: str) -> None:
    """Each shows the image, whole or in part: red grows to the right and blue downwards, as in the image."""
    model = family(name)
    record = tiny.record("a", "<image>\nWhat?", "red", images=(1,))
    made = seen(model, model.encode(record), [smooth(120, 60)])
    assert made.pictures
    assert "as read" not in made.note
    for picture in made.pictures:
        values = np.asarray(picture).astype(float)
        inner = values[(np.abs(values[..., 1] - 90) < 12)]  # without what pads: there green is another
        assert len(inner) > 100, "the picture does not show the image"
        rows, columns = np.nonzero(np.abs(values[..., 1] - 90) < 12)
        assert np.corrcoef(columns, values[rows, columns, 0])[0, 1] > 0.98
        assert np.corrcoef(rows, values[rows, columns, 2])[0, 1] > 0.98


def test_numbers_that_are_no_picture_are_not_guessed_at() -> None:
    class Strange:
        processor = None

        def pixels(self, images: Any, ids: Any) -> dict[str, torch.Tensor]:
            return {"pixel_values": torch.zeros(7, 30)}

    model = MODELS["llava"].tiny()
    sample = model.encode(tiny.record("a", "<image>\nq", "a", images=(1,)))
    strange: Any = Strange()
    strange.image_processor = model.image_processor  # type: ignore[attr-defined]
    made = seen(strange, sample, [smooth(20, 10)])
    assert made.pictures[0].size == (20, 10)
    assert made.note == "as read: what the model gets is no picture (pixel_values (7, 30))"


# The tokens.


@pytest.mark.parametrize("name", members())
def test_every_token_is_shown_with_its_label(name: str) -> None:
    model = family(name)
    record = tiny.record("a", "<image>\nWhat is ünï 图 🎈?", "red\nyes 犬", images=(1,))
    sample = model.encode(record)
    reading = Reading(model)
    shown = reading.show(sample)
    spans = [each for each in shown if isinstance(each, Span)]
    tokens = [each for each in shown if isinstance(each, Token)]
    assert spans
    assert sum(span.count for span in spans) + len(tokens) == len(sample.ids)
    assert reading.image_count(sample) == sum(span.count for span in spans)
    assert sum(token.learned for token in tokens) == sample.answer_tokens
    learned = "".join(token.text for token in tokens if token.learned).replace("·", "")
    assert learned.strip().startswith("red↵yes 犬")
    whole = "".join(token.text for token in tokens).replace("·", "")
    assert "What is ünï 图 🎈?" in whole
    for token in tokens:
        index, id, position = re.match(r"token (\d+): id (\d+), .*, position (.+)$", token.about, re.DOTALL).groups()
        assert sample.ids[int(index)] == int(id)
        assert token.learned == (sample.labels[int(index)] != IGNORED)
        axes = sample.positions or [range(len(sample.ids))]
        assert position == " / ".join(str(axis[int(index)]) for axis in axes)


# The page.


def test_what_is_gathered(folder: Path) -> None:
    content = content_of(folder, MODELS["llava"].tiny())
    assert content.report.summary().startswith("read 5 = used 4 + quarantined 1 (image-missing 1)")
    assert [card.id for card in content.cards] == ["train.jsonl:1", "train.jsonl:2", "train.jsonl:3", "train.jsonl:5"]
    assert [len(card.seen) for card in content.cards] == [1, 2, 0, 1]
    assert content.cards[0].total == content.cards[0].of_images + sum(
        isinstance(each, Token) for each in content.cards[0].tokens
    )
    assert {bar.label: bar.count for bar in content.answers}["No."] == 1
    assert (content.kinds, content.others) == (4, 0)
    assert content.lengths is not None
    assert sum(bar.count for bar in content.lengths.bars) == 4
    assert len(content_of(folder, MODELS["llava"].tiny(), limit=1).cards) == 1
    short = content_of(folder, MODELS["llava"].tiny(), max_length=20)
    assert short.report.counts["too-long"] == 4
    assert short.cards == ()


def test_a_histogram_counts_everything_once() -> None:
    for numbers in ([5], [1, 1, 9], list(range(100)), [3, 1000, 7, 7]):
        made = histogram(numbers)
        assert made is not None
        assert sum(bar.count for bar in made.bars) == len(numbers)
        assert len(made.bars) <= BINS
        assert max(bar.per_cent for bar in made.bars) == 100
        assert (made.lowest, made.highest) == (min(numbers), max(numbers))
        assert made.bars[-1].label.split(" to ")[-1] == str(max(numbers))
    assert histogram([]) is None


def test_the_page_holds_everything_and_escapes_data(folder: Path) -> None:
    page = render(content_of(folder, MODELS["llava"].tiny()))
    assert "<script" not in page
    assert "&lt;script&gt;document.title" in page
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page)
    (first, *_) = re.findall(r'class="pictures seen[^>]*><img src="data:image/png;base64,([^"]+)"', page)
    assert Image.open(io.BytesIO(base64.b64decode(first))).size == (56, 56)


def test_nothing_good_is_still_a_page(folder: Path) -> None:
    jsonl(folder / "train.jsonl", [llava(image="9.png")])
    page = render(content_of(folder, MODELS["llava"].tiny()))
    assert "image-missing" in page
    assert "The first 0 records" in page


def test_the_command(folder: Path) -> None:
    said = command("data", "preview", str(folder / "train.jsonl"), "--model", "tiny:llava", "--limit", "2")
    assert said.code == 0, said.err
    assert f"The page: {folder}/train.preview.html" in said.out
    assert (folder / "train.preview.html").read_text().count("<article>") == 2
    other = folder / "page.html"
    words = ["data", "preview", str(folder / "train.jsonl"), "--model", "tiny:qwen_vl", "--output", str(other)]
    said = command(*words, "--against", str(folder / "train.jsonl"))
    assert said.code == 0, said.err
    assert "leaked-question" in other.read_text()


@needs_browser
@pytest.mark.parametrize(
    "name",
    [
        *("llava", "generic/qwen2_5_vl"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen_vl", "generic/idefics3")),
    ],
)
def test_a_browser_shows_it(folder: Path, name: str) -> None:
    page = folder / "page.html"
    page.write_text(render(content_of(folder, family(name))))
    browser = Browser(folder)
    try:
        browser.open(page.as_uri())
        browser.wait_for("document.querySelectorAll('article').length == 4")
        assert browser.wait_for("[...document.images].every(each => each.complete && each.naturalWidth > 0)")
        learned = browser.evaluate(
            "[...document.querySelectorAll('article')[0].querySelectorAll('.learned')].map(e => e.textContent).join('')"
        )
        assert "A cat." in learned
        plain, coloured = (
            browser.evaluate(f"getComputedStyle(document.querySelector('article .t{kind}')).backgroundColor")
            for kind in (":not(.learned)", ".learned")
        )
        assert plain != coloured
        assert browser.evaluate("document.querySelectorAll('article .span').length") >= 4
        assert browser.evaluate("document.title").endswith("as tiny reads it")
        assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth"), "it is wider than the window"
        assert [each for each in browser.requests if not each.startswith(("data:", "file:"))] == []
        assert browser.errors == []
        browser.screenshot(folder / "page.png")
        assert len(np.unique(np.asarray(Image.open(folder / "page.png").convert("RGB")).reshape(-1, 3), axis=0)) > 20
    finally:
        browser.close()


def test_a_table_is_previewed_too(folder: Path) -> None:
    pytest.importorskip("datasets")
    good = jsonl(folder / "good.jsonl", [llava(image="0.png"), chat("q")])
    assert command("data", "convert", str(good), str(folder / "t.parquet"), "--to", "hf").code == 0
    said = command("data", "preview", str(folder / "t.parquet"), "--model", "tiny:llava")
    assert said.code == 0, said.err
    assert "2 = used 2" in said.out
    assert json.loads(command("data", "check", str(folder / "t.parquet"), "--json").out)["used"] == 2
