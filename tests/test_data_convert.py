"""Formats of records: what is read as what, and that converting loses nothing."""

from __future__ import annotations

import hashlib
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from own_data import chat, image, jsonl, llava
from peft_mllm.data.check import check
from peft_mllm.data.convert import FORMATS, Format, convert
from peft_mllm.data.inline import pack, unpack
from peft_mllm.data.opening import open_records
from peft_mllm.data.problems import BadDataError
from peft_mllm.errors import DataError
from peft_mllm.record import Record
from peft_mllm.specfile import parse_value
from peft_mllm.tasks import TASKS
from runs import command

FILES = {"llava": "out.json", "qwen": "out.qwen.json", "messages": "out.jsonl", "hf": "out.parquet"}


def content(record: Record) -> tuple[Any, ...]:
    """A record without its place; images by what they show."""
    return record.id, record.turns, tuple(each.key for each in record.images), dict(record.meta)


def contents(path: Path, root: Path | None = None) -> list[tuple[Any, ...]]:
    return [content(record) for record in open_records(path, image_root=root)]


def qwen(*texts: str, **fields: Any) -> dict[str, Any]:
    turns = [{"from": ("user", "assistant")[i % 2], "value": text} for i, text in enumerate(texts)]
    return {"conversations": turns} | fields


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Records of many kinds, and their images."""
    for n in range(4):
        image(tmp_path / "images" / f"{n}.png", (n, 2 * n, 3 * n))
    image(tmp_path / "images" / "ünder scöre.jpg", (90, 80, 70))
    two = [{"role": "user", "content": "Compare <image> with <image>."}, {"role": "assistant", "content": "Equal."}]
    records = [
        llava(image="images/0.png", id="one"),
        llava("What is it?\n<image>", "<ref>It</ref><box>(1,2),(3,4)</box>", image="images/ünder scöre.jpg", split="a"),
        llava("No image here.", "图中", id=7, weight=1.5, nested={"a": [1, None, True], "b": {}}),
        {"messages": two, "images": ["images/1.png", "images/2.png"]},
        {"messages": [*two, *chat("And <image>?")["messages"]], "images": [f"images/{n}.png" for n in (3, 3, 0)]},
        llava("Look.\nPicture 1:<image>\nWhat?", image="images/1.png"),
    ]
    jsonl(tmp_path / "in.jsonl", records)
    return tmp_path


# Qwen-VL's images inside the text.


def test_qwen_records_are_read(folder: Path) -> None:
    records = [
        qwen("Picture 1: <img>images/0.png</img>\nWhat?", "A.", "And this?\nPicture 2: <img>images/1.png</img>", "B."),
        qwen("<img>images/0.png</img>What? Answer:", "A."),
        qwen("Picture 1:<img>images/0.png</img>\nWhat?", "A."),
        qwen("What?", "Nothing."),
    ]
    (folder / "q.json").write_text(json.dumps(records))
    first, bare, old, text = open_records(folder / "q.json")
    assert [turn.text for turn in first.turns] == ["<image>\nWhat?", "A.", "And this?\n<image>", "B."]
    assert [image.name for image in first.images] == ["images/0.png", "images/1.png"]
    assert dict(first.meta) == {}
    assert (bare.turns[0].text, dict(bare.meta)) == ("<image>What? Answer:", {"picture_captions": "as-written"})
    assert (old.turns[0].text, dict(old.meta)) == ("Picture 1:<image>\nWhat?", {})
    assert text.images == ()
    assert check(open_records(folder / "q.json")).ok


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.lists(
            st.sampled_from(["Picture 1: ", "Picture 2: ", "Picture 1:", "<img>a</img>", "<img>b c</img>", "\n", "x"]),
            max_size=6,
        ).map("".join),
        max_size=3,
    )
)
def test_unpacking_is_undone_by_packing(texts: list[str]) -> None:
    plain, paths, as_written = unpack(texts)
    assert pack(plain, paths, as_written=as_written) == texts
    assert not any("<img>" in text for text in plain)


def test_qwens_own_sample_survives(cases: Path, tmp_path: Path) -> None:
    sample = cases / "data_samples" / "qwen_vl_finetune_sample.json"
    convert(open_records(sample), tmp_path / "llava.json", "llava")
    convert(open_records(tmp_path / "llava.json", image_root=sample.parent), tmp_path / "back.json", "qwen")
    assert json.loads((tmp_path / "back.json").read_text()) == json.loads(sample.read_text())


def test_llavas_own_sample_survives(cases: Path, tmp_path: Path) -> None:
    sample = cases / "data_samples" / "llava_finetune_custom_sample.json"
    convert(open_records(sample), tmp_path / "q.json", "qwen")
    convert(open_records(tmp_path / "q.json", image_root=sample.parent), tmp_path / "back.json", "llava")
    assert json.loads((tmp_path / "back.json").read_text()) == json.loads(sample.read_text())


# Every format to every other.


@pytest.mark.parametrize("through", FORMATS)
def test_nothing_is_lost_on_the_way(folder: Path, through: Format) -> None:
    before = contents(folder / "in.jsonl")
    first = convert(open_records(folder / "in.jsonl"), folder / FILES[through], through)
    assert first.records == 6
    assert contents(folder / FILES[through]) == before
    for to in FORMATS:
        target = folder / f"again.{FILES[to]}"
        convert(open_records(folder / FILES[through]), target, to)
        assert contents(target) == before, f"{through} to {to}"
    assert check(open_records(folder / FILES[through])).used == 6


def test_a_directory_by_save_to_disk(folder: Path) -> None:
    datasets = pytest.importorskip("datasets")
    done = convert(open_records(folder / "in.jsonl"), folder / "saved", "hf")
    assert done.image_root is None
    loaded = datasets.load_from_disk(str(folder / "saved"))
    assert loaded[0]["images"][0].size == (24, 16)
    assert loaded[0]["id"] == "one"
    assert contents(folder / "saved") == contents(folder / "in.jsonl")
    back = convert(open_records(folder / "saved"), folder / "elsewhere" / "back.json", "llava")
    assert back.images == folder / "elsewhere" / "back_images"
    assert contents(back.path) == contents(folder / "in.jsonl")
    assert len(list(back.images.iterdir())) == 5, "equal images are one file"
    assert not list(folder.rglob(".tmp-*"))


def test_parquet_is_read_by_datasets(folder: Path) -> None:
    datasets = pytest.importorskip("datasets")
    convert(open_records(folder / "in.jsonl"), folder / "out.parquet", "hf")
    loaded = datasets.Dataset.from_parquet(str(folder / "out.parquet"), cache_dir=str(folder / "cache"))
    assert loaded[3]["images"][1].size == (24, 16)


def test_tables_of_others(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One image a row, parts of content, extra columns, bytes without a path, and a path without bytes."""
    datasets = pytest.importorskip("datasets")
    import pyarrow.parquet

    data = (folder / "images" / "1.png").read_bytes()
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]
    said = [{"type": "text", "text": "A cat."}]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": said}]
    rows = {
        "messages": [turns] * 3,
        "image": [
            {"bytes": data, "path": None}, {"bytes": None, "path": "images/2.png"}, {"bytes": b"x", "path": "a.png"},
        ],
        "topic": ["x", "y", None],
    }  # fmt: skip
    text = datasets.Value("string")
    features = datasets.Features(
        messages=[{"role": text, "content": [{"type": text, "text": text}]}], image=datasets.Image(), topic=text
    )
    table = datasets.Dataset.from_dict(rows, features=features)
    monkeypatch.chdir(folder)  # `datasets` looks at what paths name
    table.save_to_disk(str(folder / "theirs"))
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(str(folder / "both"))
    source = open_records(folder / "theirs", image_root=folder)
    report = check(source)
    assert [(each.line, each.code) for each in report.findings if each.severity == "error"] == [(3, "image-format")]
    first, second = source[0], source[1]
    assert first.turns[0].text == "<image>\nWhat?"
    assert first.meta == {"topic": "x"}
    assert first.images[0].key == hashlib.sha256(data).hexdigest()
    assert second.images[0].load().getpixel((0, 0)) == (2, 4, 6)
    copy = pickle.loads(pickle.dumps(first.images[0]))  # noqa: S301 - workers get them so
    assert copy.load().getpixel((0, 0)) == (1, 2, 3)
    pyarrow.parquet.write_table(table.data.table, folder / "paths.parquet")
    assert open_records(folder / "paths.parquet")[1].images[0].key == second.images[0].key
    assert check(source, workers=2).findings == report.findings
    with pytest.raises(BadDataError, match="more than one split: train, test"):
        open_records(folder / "both")
    assert len(open_records(folder / "both" / "test", image_root=folder)) == 3


def test_a_table_feeds_a_task(folder: Path) -> None:
    convert(open_records(folder / "in.jsonl"), folder / "out.parquet", "hf")
    task = TASKS["custom"](TASKS["custom"].Options(train=str(folder / "out.parquet"), test=str(folder / "in.jsonl")))
    assert [content(each) for each in task.records("train")] == [content(each) for each in task.records("test")]
    first = task.records("train")[0].images[0]
    assert first.seal == first.key


# What cannot be.


@pytest.mark.parametrize(
    ("record", "to", "why"),
    [
        ({"messages": [{"role": "system", "content": "Be brief."}, *chat("q")["messages"]]}, "llava", "system"),
        ({"messages": [{"role": "system", "content": "Be brief."}, *chat("q")["messages"]]}, "qwen", "system"),
        (llava(image="images/" + "x" * 250 + ".png"), "qwen", "254 bytes"),
        (llava(image="images/</img>.png"), "qwen", "differently"),
        (llava(image="images/9.png"), "hf", "not there"),
        (llava(image="https://example.org/a.png"), "hf", "only an address"),
        (llava("<image>", ""), "messages", "empty-answer"),
        (llava("q", picture_captions="as-written"), "qwen", "other keys"),
    ],
)  # fmt: skip
def test_what_a_format_cannot_hold_is_said(folder: Path, record: Any, to: Format, why: str) -> None:
    source = jsonl(folder / "one.jsonl", [llava("fine"), record])
    with pytest.raises(DataError, match=r"one\.jsonl:2: ") as caught:
        convert(open_records(source), folder / FILES[to], to)
    assert why in str(caught.value)
    assert not (folder / FILES[to]).exists()


def test_tables_that_cannot_be_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    (folder / "bad.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(BadDataError, match=r"bad\.parquet cannot be read as a table"):
        open_records(folder / "bad.parquet")
    with pytest.raises(BadDataError, match="neither Parquet files nor"):
        open_records(folder / "images")
    with pytest.raises(BadDataError, match="There is no file"):
        open_records(folder / "none.parquet")
    datasets.Dataset.from_dict({"question": ["a"]}).to_parquet(str(folder / "vqa.parquet"))
    with pytest.raises(BadDataError, match="has columns question, and a record needs `messages`"):
        open_records(folder / "vqa.parquet")
    for name in ("train-00000-of-00002", "test-00000-of-00001"):
        datasets.Dataset.from_dict({"messages": [[]]}).to_parquet(str(folder / "splits" / f"{name}.parquet"))
    with pytest.raises(BadDataError, match="more than one split: test, train"):
        open_records(folder / "splits")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(BadDataError, match=r"peft-mllm\[hub\]"):
        open_records(folder / "vqa.parquet")


def test_nothing_is_overwritten_that_was_read(folder: Path) -> None:
    with pytest.raises(DataError, match="there already"):
        convert(open_records(folder / "in.jsonl"), folder / "in.jsonl", "llava")
    with pytest.raises(DataError, match="there already"):
        convert(open_records(folder / "in.jsonl"), folder / "images", "hf")


# Any record at all.

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    ["Picture 1: ", "Picture 1:", "<img>", "</img>", "<ref>it</ref>", "\n", " ", "<box>(1,2),(3,4)</box>"]
)
MARK = "<image>"
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)


@st.composite
def any_records(draw: st.DrawFn) -> dict[str, Any]:
    messages, images = [], []
    for _ in range(draw(st.integers(1, 3))):
        question = draw(st.lists(TEXT | st.just(MARK), min_size=1, max_size=5))
        images += [f"{draw(st.integers(0, 2))}.png" for each in question if each == MARK]
        messages += [{"role": "user", "content": "".join(question)}, {"role": "assistant", "content": draw(TEXT)}]
    if draw(st.booleans()) and draw(st.booleans()):
        messages.insert(0, {"role": "system", "content": draw(TEXT)})
    meta = draw(st.dictionaries(st.text(max_size=6), JSON, max_size=2))
    return {**meta, "messages": messages, **({"images": images} if images else {})}


@settings(max_examples=60, deadline=None)
@given(records=st.lists(any_records(), min_size=1, max_size=4), path=st.lists(st.sampled_from(FORMATS), max_size=3))
def test_a_record_arrives_or_is_refused(
    tmp_path_factory: pytest.TempPathFactory, records: list[dict[str, Any]], path: list[Format]
) -> None:
    folder = tmp_path_factory.mktemp("any")
    for n in range(3):
        image(folder / f"{n}.png", (n, n, n), size=(4, 4))
    jsonl(folder / "in.jsonl", [{"id": "first", **chat("q")}, *records])
    source = open_records(folder / "in.jsonl")
    good = [n for n in range(len(source)) if source.parse(n).record is not None]
    (folder / "good.jsonl").write_bytes(b"".join(source.raw(n) + b"\n" for n in good))  # type: ignore[attr-defined]
    place = folder / "good.jsonl"
    before = contents(place)
    for step, to in enumerate(path):
        target = folder / f"{step}.{FILES[to]}"
        if (refused := refusal(place, target, to)) is not None:
            assert "cannot hold" in refused
            assert not target.exists()
            return
        assert contents(target) == before
        place = target


def refusal(place: Path, target: Path, to: Format) -> str | None:
    try:
        convert(open_records(place), target, to)
    except DataError as error:
        return str(error)
    return None


# The command.


def test_the_command(folder: Path) -> None:
    said = command("data", "convert", str(folder / "in.jsonl"), str(folder / "q.json"), "--to", "qwen")
    assert (said.code, said.err) == (0, "")
    assert said.out == f"{folder}/q.json: 6 records\n"
    other = folder / "other" / "l.json"
    said = command("data", "convert", str(folder / "q.json"), str(other), "--to", "llava")
    assert "use it with --image-root" in said.out
    assert contents(other, folder) == contents(folder / "in.jsonl")
    said = command("data", "convert", str(folder / "q.json"), str(folder / "t"), "--to", "hf", "--json")
    assert json.loads(said.out) == {"path": f"{folder}/t", "records": 6, "image_root": None, "images": None}
    said = command("data", "check", str(folder / "t"), "--json")
    assert json.loads(said.out)["used"] == 6
    said = command("data", "check", str(folder / "t"), "--quarantine")
    assert (said.code, "is a table" in said.err) == (65, True)


def test_the_tasks_options_take_a_table() -> None:
    assert parse_value("{name: custom, train: a.parquet}", "--task")["train"] == "a.parquet"
