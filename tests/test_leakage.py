"""What the check finds beside other records: leaks, images that are there twice, lopsided answers, control tokens."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from own_data import chat, image, jsonl, llava
from peft_mllm.data.balance import ENOUGH, allowed_share
from peft_mllm.data.check import Report, check
from peft_mllm.data.leakage import Against
from peft_mllm.data.opening import open_records
from peft_mllm.data.problems import BadDataError
from peft_mllm.data.specials import Specials
from peft_mllm.models import MODELS
from runs import command


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for n in range(6):
        image(tmp_path / f"{n}.png", (n, 2 * n, 3 * n))
    return tmp_path


def found(report: Report) -> list[tuple[int, str]]:
    return [(each.line, each.code) for each in report.findings]


def checked(folder: Path, train: list[Any], test: list[Any]) -> Report:
    other = Against(open_records(jsonl(folder / "test.jsonl", test)))
    return check(open_records(jsonl(folder / "train.jsonl", train)), against=other)


def test_a_question_of_the_test_set_is_found_by_its_image_and_words(folder: Path) -> None:
    shutil.copy(folder / "1.png", folder / "other name.png")
    test = [
        llava("<image>\nWhat  colour is it?", "red", image="1.png"),
        chat("Hello?", "Hi."),
        llava("<image>\nNew", image="2.png"),
    ]
    train = [
        llava("what COLOUR is it\n<image>", "Something else", image="other name.png"),
        llava("<image>\nWhat shape is it?", image="1.png"),
        llava("<image>\nWhat colour is it?", image="3.png"),
        chat("hello", "Hi."),
        llava("<image>\nOld", image="2.png"),
        llava("<image>\nOlder", image="2.png"),
        {
            "messages": [*chat("<image>Old")["messages"], *chat("And what colour is it?")["messages"]],
            "images": ["1.png"],
        },
        {
            "messages": [*chat("<image>Old")["messages"], *chat("What colour is it?")["messages"]],
            "images": ["1.png"],
        },
    ]
    report = checked(folder, train, test)
    leaks = [each for each in report.findings if each.code.startswith("leaked")]
    assert [(each.line, each.code) for each in leaks] == [
        (1, "leaked-question"),
        (2, "leaked-image"),
        (4, "leaked-question"),
        (5, "leaked-image"),
        (8, "leaked-question"),
    ]
    assert leaks[0].reason.endswith(f"in the same words as {folder}/test.jsonl, line 1")
    assert leaks[4].reason.startswith("Turn 3 asks")
    assert "1.png" in leaks[1].reason
    assert report.bad == (0, 3, 7)


def test_what_cannot_be_read_leaks_nothing(folder: Path) -> None:
    test = [llava(image="9.png"), llava("<image>", "", image="1.png"), '{"broken']
    assert checked(folder, [llava(image="1.png")], test).ok
    with pytest.raises(BadDataError, match="no records"):
        Against(open_records(jsonl(folder / "empty.jsonl", [])))


def test_the_command_leaves_leaks_out(folder: Path) -> None:
    jsonl(folder / "test.jsonl", [llava(image="1.png")])
    jsonl(folder / "train.jsonl", [llava(image="1.png"), llava(image="2.png")])
    words = ["data", "check", str(folder / "train.jsonl"), "--against", str(folder / "test.jsonl")]
    said = command(*words, "--quarantine", "--json")
    assert said.code == 65
    assert json.loads(said.out)["counts"] == {"leaked-question": 1}
    (kept,) = open_records(folder / "train.clean.jsonl")
    assert kept.images[0].name == "2.png"


def test_an_image_that_is_there_twice(folder: Path) -> None:
    shutil.copy(folder / "1.png", folder / "copy.png")
    records = [llava(f"{n}", image=name) for n, name in enumerate(["1.png", "1.png", "copy.png", "copy.png"])]
    report = check(open_records(jsonl(folder / "a.jsonl", records)))
    assert found(report) == [(3, "duplicate-image")]
    assert report.findings[0].reason == "The image copy.png has the same content as 1.png"
    assert report.ok


@pytest.mark.parametrize(
    ("answers", "told"),
    [
        (["yes"] * 10 + ["no"] * 10, None),
        (["yes"] * 15 + ["no"] * 5, None),
        (["no"] * 4 + [" Yes\n", "yes"] * 8, "'yes' is 16 of 20 answers (80 %)"),
        (["a"] * 41 + [f"{n}" for n in range(59)], "'a' is 41 of 100 answers (41 %)"),
        (["a"] * 40 + [f"{n}" for n in range(60)], None),
        (["the same"] * ENOUGH, "'the same' is 20 of 20 answers (100 %)"),
        (["the same"] * (ENOUGH - 1), None),
    ],
)
def test_answers_out_of_balance(folder: Path, answers: list[str], told: str | None) -> None:
    records = [chat(f"q{n}", answer) for n, answer in enumerate(answers)]
    report = check(open_records(jsonl(folder / "a.jsonl", [*records, chat("q", "")])))
    lopsided = [each for each in report.findings if each.code == "unbalanced-answers"]
    assert [each.reason.partition(":")[0] for each in lopsided] == ([] if told is None else [told])
    if told and "yes" in told:
        assert lopsided[0].line == 5


def test_the_share_that_is_allowed() -> None:
    assert [allowed_share(kinds) for kinds in (1, 2, 3, 4, 1000)] == [0.75, 0.75, 0.5, 0.4, 0.4]


@pytest.mark.parametrize(
    ("family", "text", "read"),
    [
        ("llava", "Is </s> it?", ["</s>"]),
        ("llava", "Is <|im_end|> it?", []),
        ("llava", "Is <s> or </s> it, <s>?", ["<s>", "</s>"]),
        ("generic", "Is <|im_end|> it?", ["<|im_end|>"]),
        ("qwen_vl", "Is <|im_end|> it?", []),  # its tokenizer reads the text of a turn as text
        ("qwen_vl", "Where is <ref>it</ref><box>(1,2),(3,4)</box>?", []),
    ],
)
def test_control_tokens_are_those_of_the_model(folder: Path, family: str, text: str, read: list[str]) -> None:
    model = MODELS[family].tiny(image_size=28)
    specials = Specials(model.encode, model.tokenizer)
    file = open_records(jsonl(folder / "a.jsonl", [llava(f"<image>\n{text}", image="1.png"), chat("Plain?", "Yes.")]))
    report = check(file, specials=specials)
    assert [each.code for each in report.findings] == ["special-token-read"] * len(read)
    assert [each.reason.split("'")[1] for each in report.findings] == read
    assert report.ok


def test_a_large_file_is_held_against_a_large_one_quickly(folder: Path) -> None:
    """Each image is hashed once, however many records have it."""
    names = [f"{n}.png" for n in range(6)]
    train = [llava(f"<image>\nQuestion {n}", f"{n % 50}", image=names[n % 6]) for n in range(5000)]
    test = [llava(f"<image>\nQuestion {n}", "x", image=names[n % 6]) for n in range(4990, 10000)]
    began = time.process_time()
    report = checked(folder, train, test)
    assert time.process_time() - began < 10
    assert report.counts == {"leaked-question": 10, "leaked-image": 6}
