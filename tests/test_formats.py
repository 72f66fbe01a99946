from __future__ import annotations

import gzip
import io
import json
import pickle
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from own_data import chat, image, jsonl, llava
from peft_mllm.data import formats, scan
from peft_mllm.data.formats import RecordFile
from peft_mllm.data.problems import BadDataError
from peft_mllm.errors import EXIT_BAD_DATA, UserError


def codes(file: RecordFile, number: int = 0) -> list[str]:
    return [each.code for each in file.parse(number).problems]


def one(tmp_path: Path, record: object) -> RecordFile:
    return RecordFile(jsonl(tmp_path / "one.jsonl", [record]))


# The formats.


def test_llava_list(tmp_path: Path) -> None:
    image(tmp_path / "a.png")
    path = tmp_path / "train.json"
    path.write_text(json.dumps([llava(id="x", image="a.png"), llava("Hi?", "Yes.")], indent=2))
    file = RecordFile(path)
    assert file.is_list
    assert len(file) == 2
    first, second = file
    assert (first.id, first.source) == ("x", "train.json:2")
    assert [turn.role for turn in first.turns] == ["user", "assistant"]
    assert first.question[0].text == "<image>\nWhat?"
    assert first.answer == "A cat."
    assert first.images[0].load().size == (24, 16)
    assert second.id == "train.json#2"
    assert second.images == ()


def test_messages_lines(tmp_path: Path) -> None:
    system = {"role": "system", "content": "Be brief."}
    record = chat(images=["a.png"], choices=["x", "y"])
    record["messages"].insert(0, system)
    file = one(tmp_path, record)
    assert not file.is_list
    assert file[0].id == "one.jsonl:1"
    assert [turn.role for turn in file[0].turns] == ["system", "user", "assistant"]
    assert file[0].meta == {"choices": ["x", "y"]}


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"type": "image"}, {"type": "text", "text": "What?"}], "<image>\nWhat?"),
        ([{"type": "text", "text": "What?"}, {"type": "image", "image": "a.png"}], "What?\n<image>"),
        ([{"type": "image", "path": "a.png"}, {"type": "text", "text": "\nWhat?"}], "<image>\nWhat?"),
        ([{"type": "text", "text": "Wh"}, {"type": "text", "text": "at <image>"}], "What <image>"),
    ],
)
def test_parts(tmp_path: Path, content: list[dict[str, str]], text: str) -> None:
    named = any("image" in part or "path" in part for part in content)
    file = one(tmp_path, chat(content, **({} if named else {"images": ["a.png"]})))
    assert file[0].turns[0].text == text
    assert file[0].images[0].path == tmp_path.resolve() / "a.png"


def test_parts_and_images_in_order(tmp_path: Path) -> None:
    content = [{"type": "image"}, {"type": "image", "image": "b.png"}, {"type": "image"}]
    file = one(tmp_path, chat(content, images=["a.png", "c.png"]))
    assert [each.path.name for each in file[0].images] == ["a.png", "b.png", "c.png"]


def test_one_image_without_a_mark_goes_in_front(tmp_path: Path) -> None:
    file = one(tmp_path, llava("What?", image="a.png"))
    assert file.parse(0).problems == ()
    assert file[0].turns[0].text == "<image>\nWhat?"


def test_other_spellings(tmp_path: Path) -> None:
    turns = [{"from": "User", "value": "q"}, {"from": "ASSISTANT", "value": "a"}]
    file = one(tmp_path, {"id": 7, "image": None, "conversations": turns})
    assert file[0].id == "7"
    assert [turn.role for turn in file[0].turns] == ["user", "assistant"]


def test_bom_crlf_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    line = json.dumps(llava("Hé?", "a"), ensure_ascii=False)
    path.write_bytes(b"\xef\xbb\xbf" + f"{line}\r\n\r\n  \n{line}".encode())
    file = RecordFile(path)
    assert [file.line(n) for n in range(len(file))] == [1, 4]
    assert [record.turns[0].text for record in file] == ["Hé?", "Hé?"]
    assert file[1].source == "a.jsonl:4"


def test_is_a_sequence(tmp_path: Path) -> None:
    file = RecordFile(jsonl(tmp_path / "a.jsonl", [llava(str(n)) for n in range(5)]))
    assert file[-1].turns[0].text == "4"
    assert [record.turns[0].text for record in file[1:4][::2]] == ["1", "3"]
    with pytest.raises(IndexError):
        file[5]
    assert [record.id for record in pickle.loads(pickle.dumps(file))] == [record.id for record in file]  # noqa: S301


def test_reads_from_threads(tmp_path: Path) -> None:
    file = RecordFile(jsonl(tmp_path / "a.jsonl", [llava(str(n)) for n in range(200)]))
    with ThreadPoolExecutor(4) as pool:
        texts = list(pool.map(lambda n: file[n].turns[0].text, range(200)))
    assert texts == [str(n) for n in range(200)]


def test_follows_no_change_of_the_file(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [llava("q"), llava("r")])
    file = RecordFile(path)
    with path.open("a") as more:
        more.write("{}\n")
    with pytest.raises(BadDataError, match="has changed"):
        file[0]


# The index.


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_index_does_not_depend_on_chunks(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(scan, "CHUNK_BYTES", chunk)
    draw = random.Random(chunk)
    for _ in range(40):
        words = ["".join(draw.choices('a"\\[]{},\n é', k=draw.randrange(9))) for _ in range(draw.randrange(5))]
        records = [{word: [word, {"k": word}]} for word in words]
        data = json.dumps(records, indent=draw.choice([None, 1]), ensure_ascii=draw.random() < 0.5).encode()
        index = scan.scan(io.BytesIO(data))
        assert index.broken is None
        spans = list(zip(index.starts, index.ends, strict=True))
        assert [json.loads(data[start:end]) for start, end in spans] == records
        assert list(index.lines) == [data[:start].count(b"\n") + 1 for start, _ in spans]


@pytest.mark.parametrize(
    ("text", "records", "line", "column", "why"),
    [
        ('[{"a": 1} {"b": 2}]', 1, 1, 11, "comma is missing"),
        ('[{"a": 1},\n\n,{"b": 2}]', 1, 1, 10, "comma too many"),
        ('[{"a": 1},\n]', 1, 1, 10, "comma too many"),
        ('[{"a": 1},\n "x"]', 1, 2, 2, "must be an object"),
        ("[1, 2]", 0, 1, 2, "must be an object"),
        ('[{"a": "x},\n{"b": 2}]', 0, 1, 8, "quote is not closed"),
        ('[{"a": 1},\n{"b": 2,\n{"c": 3}]', 1, 3, 1, "property name"),
        ('[{"a": 1},\n{"b": [2}]', 1, 2, 9, "delimiter"),
        ('[{"a": 1},\n{"b', 1, 2, 2, "Unterminated"),
        ('[{"a": 1}', 1, 1, 10, "file ends"),
        ("[{}] x", 1, 1, 6, "after the list"),
        ("[{}}]", 1, 1, 4, "not opened"),
    ],
)
def test_broken_list(tmp_path: Path, text: str, records: int, line: int, column: int, why: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    file = RecordFile(path)
    assert len(file) == records
    assert file.broken is not None
    assert file.broken[0] == line
    assert f"column {column}: " in file.broken[1].reason
    assert why in file.broken[1].reason
    if records:
        with pytest.raises(BadDataError, match=rf"a.json:{line}: "):
            file[0]


def test_a_fault_inside_a_record_leaves_its_neighbours(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[\n{"id": "a"},\n{\n "id": "b",\n "x" 1\n},\n{"id": "c"}\n]')
    file = RecordFile(path)
    assert file.broken is None
    assert codes(file, 1) == ["json-broken"]
    assert file.line(1) + file.parse(1).problems[0].line == 5
    assert file.parse(2).id == "c"


def test_memory_stays_small(tmp_path: Path) -> None:
    path = tmp_path / "big.json"
    record = json.dumps(llava("w " * 500)).encode()
    path.write_bytes(b"[" + b", ".join([record] * 5000) + b"]")
    file = RecordFile(path)
    index = file._index
    assert len(file) == 5000
    assert sum(each.itemsize * len(each) for each in (index.starts, index.ends, index.lines)) == 24 * 5000
    assert file[4999].id == "big.json#5000"


def test_too_large_a_record_is_not_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "MAX_RECORD_BYTES", 100)
    file = RecordFile(jsonl(tmp_path / "a.jsonl", [llava("q", "a"), llava("q" * 200)]))
    assert [codes(file, n) for n in range(2)] == [[], ["record-too-large"]]


# What is wrong with a file.


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (gzip.compress(b"{}", mtime=0), "gzip"),
        ("[]".encode("utf-16"), "UTF-16"),
        (b"PK\x03\x04", "zip"),
        (b"PAR1", "Parquet"),
        (b"<html>", "HTML"),
        (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        (b'{\n "id": 1\n}', "one JSON object over several lines"),
    ],
)
def test_other_formats_are_named(tmp_path: Path, data: bytes, what: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(data)
    with pytest.raises(BadDataError) as caught:
        RecordFile(path)
    assert caught.value.code == "file-format"
    assert what in caught.value.reason
    assert caught.value.exit_code == EXIT_BAD_DATA


@pytest.mark.parametrize("data", [b"", b"\n\n", b"[]", b" [ ] ", b"\xef\xbb\xbf"])
def test_no_records(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(data)
    file = RecordFile(path)
    assert len(file) == 0
    assert file.broken is not None
    assert file.broken[1].code == "file-empty"


def test_missing_file_and_root(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "train.jsonl", [llava("q")])
    with pytest.raises(BadDataError, match=r"Did you mean 'train.jsonl'\?"):
        RecordFile(tmp_path / "trian.jsonl")
    with pytest.raises(BadDataError, match="not a regular file"):
        RecordFile(tmp_path)
    with pytest.raises(BadDataError, match="image folder"):
        RecordFile(path, image_root=tmp_path / "images")
    with pytest.raises(BadDataError):
        RecordFile("a\0b")


# Anything at all.


@settings(max_examples=150, deadline=None)
@given(data=st.data(), as_list=st.booleans())
def test_mutated_files_only_raise_our_errors(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, as_list: bool
) -> None:
    records = [llava(id="a", image="a.png"), chat([{"type": "image"}], images=["b.png"]), llava("q é")]
    text = json.dumps(records, indent=1) if as_list else "\n".join(map(json.dumps, records))
    mutated = bytearray(text.encode())
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(mutated)))
        mutated[at : at + data.draw(st.integers(0, 3))] = data.draw(
            st.one_of(st.binary(max_size=3), st.sampled_from([b'"', b"{", b"}", b"[", b"]", b",", b"\n", b"\\"]))
        )
    path = tmp_path_factory.getbasetemp() / "mutated.json"
    path.write_bytes(bytes(mutated))
    try:
        file = RecordFile(path)
    except UserError:
        return
    for number in range(len(file)):
        parsed = file.parse(number)
        assert (parsed.record is None) == any(each.severity == "error" for each in parsed.problems)
    if file.broken is None:
        assert b"".join(file.raw(number) for number in range(len(file)))


def test_files_are_closed(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [llava("q")])
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(50):
        RecordFile(path)
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 1
