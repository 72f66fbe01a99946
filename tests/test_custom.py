from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from own_data import image, jsonl, llava
from peft_mllm.data.check import Length
from peft_mllm.errors import EXIT_BAD_DATA, DataError
from peft_mllm.record import Record
from peft_mllm.tasks import SPLITS, TASKS
from peft_mllm.tasks.custom import Custom, CustomOptions


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    image(tmp_path / "a.png")
    good = [llava("<image>one", image="a.png"), llava("two"), llava("three four five")]
    jsonl(tmp_path / "good.jsonl", good)
    jsonl(tmp_path / "bad.jsonl", [good[0], llava("x", ""), good[1]])
    return tmp_path


def task(**options: Any) -> Custom:
    return Custom(CustomOptions(**{key: str(value) for key, value in options.items()}))


def test_is_on_the_shelf() -> None:
    assert TASKS["custom"] is Custom
    assert Custom.Options is CustomOptions


def test_good_data(folder: Path) -> None:
    mine = task(train=folder / "good.jsonl")
    assert [mine.has(split) for split in SPLITS] == [True, False, False]
    records = mine.records("train")
    assert [record.answer for record in records] == ["A cat."] * 3
    assert records[0].images[0].load().mode == "RGB"
    assert mine.report("train").summary() == "read 3 = used 3 + quarantined 0"


def test_bad_data_stops(folder: Path) -> None:
    mine = task(test=folder / "bad.jsonl")
    assert mine.report("test").quarantined == 1
    with pytest.raises(DataError) as caught:
        mine.records("test")
    assert caught.value.exit_code == EXIT_BAD_DATA
    assert "bad.jsonl:2: error empty-answer: " in str(caught.value)
    assert "on_bad_data: quarantine" in str(caught.value)


def test_bad_data_is_left_out_and_counted(folder: Path) -> None:
    mine = task(train=folder / "bad.jsonl", on_bad_data="quarantine")
    records = mine.records("train")
    assert [record.id for record in records] == ["bad.jsonl:1", "bad.jsonl:3"]
    assert mine.report("train").summary() == "read 3 = used 2 + quarantined 1 (empty-answer 1)"


def test_nothing_left_or_broken_stops_even_then(folder: Path) -> None:
    jsonl(folder / "all.jsonl", ["x", "y"])
    (folder / "list.json").write_text("[{")
    with pytest.raises(DataError, match="No record is left"):
        task(train=folder / "all.jsonl", on_bad_data="quarantine").records("train")
    with pytest.raises(DataError, match="file-broken"):
        task(train=folder / "list.json", on_bad_data="quarantine").records("train")


def test_a_missing_split_or_file(folder: Path) -> None:
    with pytest.raises(DataError, match=r"no validation data\. Set its option `validation`"):
        task(train=folder / "good.jsonl").records("validation")
    with pytest.raises(DataError, match=r"Did you mean 'good.jsonl'"):
        task(train=folder / "god.jsonl").records("train")


def test_the_check_is_made_once_and_again_to_measure(folder: Path) -> None:
    def measure(record: Record) -> Length:
        return Length(total=len(record.turns[0].text.split()), answer=1, limit=2)

    mine = task(train=folder / "good.jsonl", on_bad_data="quarantine")
    first = mine.report("train")
    assert mine.report("train") is first
    assert mine.report("train", measure=measure).counts == {"too-long": 1}
    assert mine.report("train").counts == {"too-long": 1}
    assert len(mine.records("train")) == 2


def test_what_was_checked_is_what_is_trained_on(folder: Path) -> None:
    records = task(train=folder / "good.jsonl").records("train")
    image(folder / "a.png", (1, 2, 3))
    with pytest.raises(DataError, match="has changed since it was checked"):
        records[0].images[0].load()


def test_image_root(folder: Path) -> None:
    (folder / "elsewhere").mkdir()
    path = jsonl(folder / "elsewhere" / "train.jsonl", [llava(image="a.png")])
    assert task(train=path).report("train").counts == {"image-missing": 1}
    assert task(train=path, image_root=folder).report("train").ok


def test_metric_and_length_are_the_users(folder: Path) -> None:
    mine = task(train=folder / "good.jsonl", metric="vqa", max_new_tokens=5)
    assert (mine.metric, mine.max_new_tokens) == ("vqa", 5)
    assert (Custom.metric, Custom.max_new_tokens) == ("exact", 64)
    with pytest.raises(ValidationError):
        CustomOptions(on_bad_data="ignore")  # type: ignore[arg-type]
    with pytest.raises(ValidationError):
        CustomOptions(trian="x")  # type: ignore[call-arg]
