from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from own_data import chat, image, jsonl, llava
from peft_mllm.data import check as checking
from peft_mllm.data import looking
from peft_mllm.data.check import Length, Report, check
from peft_mllm.data.formats import RecordFile
from peft_mllm.data.problems import KINDS, BadDataError, problem
from peft_mllm.data.quarantine import quarantine
from peft_mllm.errors import EXIT_BAD_DATA, DataError, DiskError
from peft_mllm.record import Record

DOCS = Path(__file__).parent.parent / "docs" / "own-data.md"


def report_of(path: Path, **options: Any) -> Report:
    return check(RecordFile(path), **options)


def codes(report: Report) -> list[tuple[int, str]]:
    return [(finding.line, finding.code) for finding in report.findings]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten records, eight of them good."""
    records: list[Any] = [llava(f"<image>\nWhat is {n}?", image=f"images/{n}.png") for n in range(8)]
    records.insert(3, llava(image="images/7.jpg"))
    records.append(chat("<image>\nWhy?", "  ", images=["images/0.png"]))
    for n in range(8):
        image(tmp_path / "images" / f"{n}.png", (n, 2 * n, 3 * n))
    jsonl(tmp_path / "train.jsonl", records)
    return tmp_path


def test_all_findings_at_once_and_the_numbers_add_up(folder: Path) -> None:
    report = report_of(folder / "train.jsonl")
    assert report.summary() == "read 10 = used 8 + quarantined 2 (empty-answer 1, image-missing 1)"
    assert str(report) == report.summary()
    assert codes(report) == [(4, "image-missing"), (10, "empty-answer")]
    assert (report.read, report.used, report.quarantined, report.bad) == (10, 8, 2, (3, 9))
    assert list(report.good()) == [0, 1, 2, 4, 5, 6, 7, 8]
    assert not report.ok
    assert not report.broken
    assert str(report.findings[0]) == (
        f"{folder}/train.jsonl:4: error image-missing: The image images/7.jpg is not there. "
        "Add the file or correct the path. Did you mean '7.png'?"
    )
    assert report.findings[0].id == "train.jsonl:4"


def test_good_data_has_nothing_to_tell(folder: Path) -> None:
    report = report_of(jsonl(folder / "good.jsonl", [llava(image="images/1.png"), llava("Hi?")]))
    assert report.ok
    assert report.summary() == "read 2 = used 2 + quarantined 0"
    assert list(report.images) == [str(folder.resolve() / "images" / "1.png")]


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (lambda folder: (folder / "images" / "5.png").unlink(), "image-missing"),
        (lambda folder: os.truncate(folder / "images" / "5.png", 40), "image-truncated"),
        (lambda folder: (folder / "images" / "5.png").write_bytes(b""), "image-empty"),
        (lambda folder: _edit(folder, '"conversations"', '"conversations'), "json-broken"),
        (lambda folder: _edit(folder, '"image"', '"imaeg"'), "misspelt-key"),
        (lambda folder: _edit(folder, '"human"', '"user "'), "role-unknown"),
        (lambda folder: _edit(folder, "<image>", ""), None),
        (lambda folder: _edit(folder, '"A cat."', '""'), "empty-answer"),
    ],
)
def test_each_damage_gives_one_message_with_its_place(folder: Path, damage: Any, code: str | None) -> None:
    damage(folder)
    found = [finding for finding in report_of(folder / "train.jsonl").findings if finding.line == 7]
    assert [finding.code for finding in found] == ([] if code is None else [code])
    for finding in found:
        assert re.fullmatch(r".*/train\.jsonl:7: error [a-z-]+: [^\n]+\. [^\n]+", str(finding))


def _edit(folder: Path, old: str, new: str) -> None:
    """Change line 7, whose image is 5.png."""
    path = folder / "train.jsonl"
    lines = path.read_text().split("\n")
    assert old in lines[6]
    lines[6] = lines[6].replace(old, new, 1)
    path.write_text("\n".join(lines))


def test_a_record_is_told_all_its_faults_together(folder: Path) -> None:
    record = llava("<image>", " ", image="images/none.png", id=[])
    report = report_of(jsonl(folder / "a.jsonl", [record]))
    assert {code for _, code in codes(report)} == {"empty-answer", "id-invalid", "image-missing"}
    assert report.quarantined == 1


def test_duplicates(folder: Path) -> None:
    image(folder / "copy.png", (1, 2, 3))  # the pixels of images/1.png
    records = [
        llava("<image>a", image="images/1.png", id="x"),
        llava("<image>b", image="images/1.png", id="x"),
        llava("<image>a", image="copy.png", id="y"),
        llava("<image>a", image="images/2.png", id="a.jsonl:5"),
        llava("<image>c", image="images/2.png"),
    ]
    report = report_of(jsonl(folder / "a.jsonl", records))
    assert codes(report) == [
        (2, "duplicate-id"), (3, "duplicate-image"), (3, "duplicate-record"), (5, "duplicate-id"),
    ]  # fmt: skip
    assert "in line 1;" in report.findings[0].reason
    assert report.bad == (1, 4)
    as_list = folder / "a.json"
    as_list.write_text(json.dumps(records))
    found = report_of(as_list).findings
    assert found[0].reason.startswith("Record 2: The id 'x' was used before, in record 1, line 1;")


def test_an_image_is_looked_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []
    inspect = looking.inspect
    monkeypatch.setattr(looking, "inspect", lambda path, name: looked.append(name) or inspect(path, name=name))
    monkeypatch.setattr(checking, "BATCH", 4)
    (folder / "images" / "2.png").rename(folder / "turned.jpg")  # a PNG by its content: a warning
    (folder / "bad.png").write_bytes(b"x")
    names = ["turned.jpg", "bad.png"] * 5
    report = report_of(jsonl(folder / "a.jsonl", [llava(f"{n}", image=name) for n, name in enumerate(names)]))
    assert looked == ["turned.jpg", "bad.png"]
    assert report.counts == {"image-format": 5, "image-mislabelled": 1}
    assert report.quarantined == 5


def test_unknown_keys_are_told_once(folder: Path) -> None:
    records = [llava("a"), llava("b", loss=1), llava("c", loss=2, picture_name="x")]
    report = report_of(jsonl(folder / "a.jsonl", records))
    assert codes(report) == [(2, "unknown-key"), (3, "unknown-key")]
    assert "'loss'" in report.findings[0].reason
    assert "records with it: 2" in report.findings[0].reason
    assert report.ok


def test_conversions_are_counted(folder: Path) -> None:
    from PIL import Image

    Image.new("L", (8, 8)).save(folder / "grey.png")
    Image.new("CMYK", (8, 8)).save(folder / "print.jpg")
    report = report_of(jsonl(folder / "a.jsonl", [llava(image=["grey.png", "print.jpg"], question="<image><image>")]))
    assert report.ok
    assert report.conversions == {"cmyk": 1, "grey": 1}


def test_lengths(folder: Path) -> None:
    def measure(record: Record) -> Length:
        words = record.turns[0].text.split()
        if "odd" in words:
            raise DataError("no template for this")
        return Length(total=len(words), answer=len(record.answer) - 1, limit=5)

    records = [llava("1 2 3 4 5"), llava("1 2 3 4 5 6"), llava("a", "x"), llava("odd"), llava("a b", "")]
    report = report_of(jsonl(folder / "a.jsonl", records), measure=measure)
    assert codes(report) == [
        (2, "too-long"),
        (3, "no-answer-tokens"),
        (4, "not-encodable"),
        (5, "empty-answer"),
    ]
    assert report.findings[0].reason == "The sample is 6 tokens long; 5 fit"
    assert report.findings[2].reason.endswith("no template for this")


def test_progress_reaches_the_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, "BATCH", 4)
    seen: list[tuple[int, int]] = []
    report_of(folder / "train.jsonl", progress=lambda done, total: seen.append((done, total)))
    assert seen == [(4, 10), (8, 10), (10, 10)]


def test_workers_find_the_same(folder: Path) -> None:
    (folder / "images" / "4.png").write_bytes(b"x")
    assert report_of(folder / "train.jsonl", workers=2) == report_of(folder / "train.jsonl")


def test_a_broken_list_is_not_used_at_all(folder: Path) -> None:
    path = folder / "a.json"
    path.write_text('[\n{"conversations": []},\n{"id": 1,\n"conversations": [\n]')
    report = report_of(path)
    assert report.summary() == "read 1 = used 0 + quarantined 1 (file-broken 1, conversation-missing 1)"
    assert report.broken
    assert codes(report) == [(2, "conversation-missing"), (5, "file-broken")]
    with pytest.raises(DataError, match="file-broken"):
        quarantine(report, RecordFile(path), folder)
    (folder / "b.json").write_text("")
    assert report_of(folder / "b.json").summary() == "read 0 = used 0 + quarantined 0 (file-empty 1)"


def test_the_error_lists_the_first(folder: Path) -> None:
    path = jsonl(folder / "a.jsonl", ["x"] * 30)
    error = report_of(path).error(advice="Do something.")
    lines = str(error).split("\n")
    assert error.exit_code == EXIT_BAD_DATA
    assert len(lines) == 23
    assert "read 30 = used 0 + quarantined 30 (json-broken 30)" in lines[0]
    assert lines[1].startswith(f"{path}:1: error json-broken: ")
    assert lines[-2] == f"and 10 more; `peft-mllm data check {path}` lists all."
    assert lines[-1] == "Do something."


def test_as_json(folder: Path) -> None:
    report = report_of(folder / "train.jsonl")
    value = json.loads(json.dumps(report.to_json()))
    assert value["read"] == value["used"] + value["quarantined"] == 10
    assert value["counts"] == {"empty-answer": 1, "image-missing": 1}
    assert value["findings"][0]["line"] == 4
    assert "findings" not in report.to_json(findings=False)


# Quarantine.


def test_quarantine_parts_the_file(folder: Path) -> None:
    file = RecordFile(folder / "train.jsonl")
    report = check(file)
    done = quarantine(report, file, folder)
    assert done == (folder / "train.clean.jsonl", folder / "train.quarantine.jsonl")
    lines = (folder / "train.jsonl").read_bytes().splitlines(keepends=True)
    assert done.clean.read_bytes() == b"".join(lines[n] for n in report.good())
    aside = [json.loads(line) for line in done.quarantine.read_text().splitlines()]
    assert [each["line"] for each in aside] == [4, 10]
    assert [each["raw"].encode() + b"\n" for each in aside] == [lines[3], lines[9]]
    assert [found["code"] for found in aside[0]["findings"]] == ["image-missing"]
    assert report_of(done.clean).ok
    assert not list(folder.glob(".tmp*"))


def test_quarantine_of_a_list_keeps_its_format(folder: Path) -> None:
    records = [llava("a"), llava("b", ""), llava("c")]
    path = folder / "a.json"
    path.write_text(json.dumps(records, indent=1))
    file = RecordFile(path)
    done = quarantine(check(file), file, folder / "new" / "place")
    assert done.clean.name == "a.clean.json"
    assert json.loads(done.clean.read_text()) == [records[0], records[2]]
    path.write_text(json.dumps(records[1:2]))
    file = RecordFile(path)
    assert json.loads(quarantine(check(file), file, folder).clean.read_text()) == []


def test_quarantine_keeps_bytes_that_are_no_text(folder: Path) -> None:
    path = folder / "a.jsonl"
    path.write_bytes(b'{"id": "\xe9"}\r\n')
    file = RecordFile(path)
    aside = json.loads(quarantine(check(file), file, folder).quarantine.read_text())
    assert aside["raw_base64"] == "eyJpZCI6ICLpIn0="


def test_quarantine_that_cannot_write(folder: Path) -> None:
    file = RecordFile(folder / "train.jsonl")
    (folder / "file").write_text("")
    with pytest.raises(DiskError, match="file"):
        quarantine(check(file), file, folder / "file" / "below")


# Seals.


def test_sealed_images_must_stay_as_checked(folder: Path) -> None:
    file = RecordFile(folder / "train.jsonl")
    file.seal(check(file).images)
    file[0].images[0].load()
    image(folder / "images" / "0.png", (9, 9, 9))
    with pytest.raises(BadDataError, match="has changed since it was checked"):
        file[0].images[0].load()


# Anything at all.


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_whatever_the_bytes_the_numbers_add_up(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.getbasetemp() / "anything"
    image(folder / "a.png")
    text = "\n".join(json.dumps(record) for record in [llava(image="a.png"), chat("q"), llava("r")])
    mutated = bytearray(text.encode())
    for _ in range(data.draw(st.integers(0, 5))):
        at = data.draw(st.integers(0, len(mutated) - 1))
        mutated[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    (folder / "a.jsonl").write_bytes(bytes(mutated))
    try:
        file = RecordFile(folder / "a.jsonl")
    except BadDataError:
        return
    report = check(file)
    assert report.read == len(file) == report.used + report.quarantined
    assert report.quarantined == len({f.record for f in report.findings if f.severity == "error"} - {None}) or (
        report.broken
    )
    assert all(str(finding).isprintable() for finding in report.findings)
    if not report.broken:
        for number in report.good():
            for each in file[number].images:
                each.load()


# The table of codes.


def test_the_codes_are_stable_names() -> None:
    for code, kind in KINDS.items():
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", code)
        assert not kind.reason.endswith(".")
        assert kind.remedy.endswith((".", "?", "{hint}"))


def test_every_code_has_a_sentence_without_gaps() -> None:
    for code, kind in KINDS.items():
        names = set(re.findall(r"(?<!\{)\{(\w+)\}(?!\})", kind.reason + kind.remedy))
        filled = problem(code, **dict.fromkeys(names, "x"))
        assert "{x" not in str(filled)


def test_the_documented_table_is_the_table() -> None:
    rows = re.findall(r"^\| `([a-z0-9-]+)` \| (\w+) \| (.+) \| (.+) \|$", DOCS.read_text(), re.MULTILINE)
    expected = [(code, kind.severity, _shown(kind.reason), _shown(kind.remedy)) for code, kind in KINDS.items()]
    assert rows == expected


def test_the_documented_output_is_what_is_printed() -> None:
    shown = re.findall(r"^data/train\.jsonl:\d+: (\w+) ([a-z0-9-]+): (.+)$", DOCS.read_text(), re.MULTILINE)
    assert len(shown) == 7
    for severity, code, text in shown:
        kind = KINDS[code]
        assert severity == kind.severity
        assert re.fullmatch(re.sub(r"\\\{\w+\\\}", ".*", re.escape(f"{kind.reason}. {kind.remedy}")), text)


def _shown(template: str) -> str:
    """A template as the page shows it: the page names what is filled in, in italics."""
    text = template.replace("{hint}", "").replace("{{", "\0").replace("}}", "\1")
    return re.sub(r"\{(\w+)\}", r"*\1*", text).replace("\0", "{").replace("\1", "}").strip()
