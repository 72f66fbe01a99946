"""Which records a run learns, validates on and is scored on: and that a test split stays closed when it should."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import peft_mllm
from own_data import chat, image, jsonl
from peft_mllm.errors import DataError, SpecError
from peft_mllm.record import Record, Turn
from peft_mllm.seeds import derive
from peft_mllm.splits import drawn, first, split_off
from peft_mllm.study.results import read_result
from peft_mllm.tasks.custom import Custom
from peft_mllm.tasks.scenes import SceneTask
from runs import lines, status, tiny

RECORDS = [Record(id=f"r{i}", turns=(Turn("user", "?"), Turn("assistant", "!"))) for i in range(400)]
NO_OWN = {"name": "scenes_at", "size": {"train": 24, "validation": 0, "test": 4}}
SHORT = {"max_steps": 2}


def ids(records: Any) -> list[str]:
    return [record.id for record in records]


# --- a part of the training data ---


def test_a_draw_is_a_function_of_seed_and_id():
    some = ids(drawn(RECORDS, 50, 42))
    assert len(some) == len(set(some)) == 50
    assert some == [name for name in ids(RECORDS) if name in set(some)], "the order of the split is kept"
    assert some != ids(first(RECORDS, 50))
    assert some == ids(drawn(RECORDS, 50, 42))
    assert set(some) == set(ids(drawn(RECORDS[::-1], 50, 42))), "where a record stands does not matter"
    assert some != ids(drawn(RECORDS, 50, 43))


def test_a_smaller_draw_lies_in_a_larger_one():
    small, large = (set(ids(drawn(RECORDS, size, 42))) for size in (50, 200))
    assert small < large


@pytest.mark.parametrize("limit", [None, 400, 1000])
def test_all_records_are_all(limit):
    assert drawn(RECORDS, limit, 42) is RECORDS


def test_every_record_is_drawn_as_often():
    counts = dict.fromkeys(ids(RECORDS), 0)
    for seed in range(200):
        for name in ids(drawn(RECORDS, 100, seed)):
            counts[name] += 1
    assert sum(counts.values()) == 200 * 100
    assert 20 < min(counts.values()) <= max(counts.values()) < 85  # 50 expected, standard deviation 6


def test_a_run_learns_what_was_drawn(tmp_path):
    task = {"name": "scenes_at", "size": {"train": 24, "validation": 2, "test": 2}}
    fingerprints = {}
    for name, method, seed in [("a", "lora", 42), ("b", "ia3", 42), ("c", "lora", 43)]:
        data = {"max_train_samples": 8, "subset": "random"}
        spec = tiny(tmp_path / name, method=method, task=task, data=data, seed=seed, train=SHORT)
        account = peft_mllm.train(spec, quiet=True)["data"]["train"]
        assert account["trained_on"] == 8
        fingerprints[name] = account["fingerprint"]
    assert fingerprints["a"] == fingerprints["b"], "all methods of one seed learn the same"
    assert fingerprints["a"] != fingerprints["c"]
    spec = tiny(tmp_path / "first", task=task, data={"max_train_samples": 8}, train=SHORT)
    assert peft_mllm.train(spec, quiet=True)["data"]["train"]["fingerprint"] not in fingerprints.values()


# --- validation data instead of test data ---


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whoever opens a test split fails."""
    for kind in (SceneTask, Custom):
        for name in ("records", "report"):
            real = getattr(kind, name)

            def opened(self: Any, split: str, *rest: Any, _real: Any = real, **more: Any) -> Any:
                assert split != "test", "the test split was opened"
                return _real(self, split, *rest, **more)

            monkeypatch.setattr(kind, name, opened)
    return


def test_the_guard_of_these_tests_sees_it(tmp_path, closed):
    with pytest.raises(AssertionError, match="was opened"):
        peft_mllm.train(tiny(tmp_path / "run"), quiet=True)


@pytest.mark.parametrize("method", ["lora", "none"])
def test_the_validation_split_is_scored(tmp_path, closed, method):
    other = {"name": "scenes_colour", "size": {"validation": 3, "test": 5}}
    spec = tiny(tmp_path / "run", method=method, scored="validation", evaluate=[other], train=SHORT)
    result = peft_mllm.train(spec, quiet=True)
    assert {task: (score["split"], score["n"]) for task, score in result["scores"].items()} == {
        "scenes_at": ("validation", 4),
        "scenes_colour": ("validation", 3),
    }
    asked = lines(tmp_path / "run" / "predictions" / "scenes_at.jsonl")
    assert all(line["id"].startswith("validation-") for line in asked)
    assert set(result["retention"]) == {"plain text", "scenes_colour"}
    assert read_result(tmp_path / "run").scores["scenes_at"].split == "validation"


@pytest.mark.parametrize("method", ["lora", "none"])
def test_without_one_what_is_held_out_is_scored(tmp_path, closed, method):
    data = {"validation_fraction": 0.3, "max_eval_samples": 3}
    spec = tiny(tmp_path / "run", method=method, scored="validation", task=NO_OWN, data=data, train=SHORT)
    result = peft_mllm.train(spec, quiet=True)
    held = [f"train-0-{i}" for i in range(24) if derive(42, "validation", f"train-0-{i}") < 0.3 * 2**63]
    assert len(held) > 3, "this test needs more than it asks"
    asked = [line["id"] for line in lines(tmp_path / "run" / "predictions" / "scenes_at.jsonl")]
    assert asked == held[:3]
    score = result["scores"]["scenes_at"]
    assert (score["split"], score["held_out_of"], score["n"]) == ("validation", "train", 3)
    if method == "lora":
        account = result["data"]["train"]
        assert (account["trained_on"], account["validation"]) == (24 - len(held), len(held))
    assert read_result(tmp_path / "run").scores["scenes_at"].held_out_of == "train"


def test_of_other_tasks_what_would_be_held_out_is_scored(tmp_path, closed):
    """Own data: the other task has training data and no validation data."""
    records = [chat(answer=f"It is {i}.", id=f"other-{i}", images=[f"{i}.png"]) for i in range(20)]
    for i in range(20):
        image(tmp_path / f"{i}.png", (10 * i, 50, 100))
    file = str(jsonl(tmp_path / "other.jsonl", records))
    other = {"name": "custom", "train": file, "test": file}
    data = {"validation_fraction": 0.3}
    spec = tiny(tmp_path / "run", scored="validation", task=NO_OWN, evaluate=[other], data=data, train=SHORT)
    result = peft_mllm.train(spec, quiet=True)
    held = [f"other-{i}" for i in range(20) if derive(42, "validation", f"other-{i}") < 0.3 * 2**63]
    assert held
    assert [line["id"] for line in lines(tmp_path / "run" / "predictions" / "custom.jsonl")] == held
    assert result["scores"]["custom"]["held_out_of"] == "train"


@pytest.mark.parametrize("place", ["task", "evaluate"])
def test_with_neither_it_is_said(tmp_path, closed, place):
    empty = {**NO_OWN, "name": "scenes_count"}
    changes = {"task": NO_OWN} if place == "task" else {"evaluate": [empty]}
    name = "scenes_at" if place == "task" else "scenes_count"
    with pytest.raises(SpecError, match=rf"{name} has no validation data.*data\.validation_fraction"):
        peft_mllm.train(tiny(tmp_path / "run", scored="validation", **changes), quiet=True)
    assert status(tmp_path / "run")["exit_code"] == 2


def test_nothing_left_to_learn(tmp_path):
    one = {"name": "scenes_at", "size": {"train": 1, "validation": 0, "test": 1}}
    seed = next(s for s in range(100) if not split_off(RECORDS_OF_ONE, 0.5, s)[0])
    with pytest.raises(DataError, match="nothing to train on"):
        peft_mllm.train(tiny(tmp_path / "run", task=one, data={"validation_fraction": 0.5}, seed=seed), quiet=True)


RECORDS_OF_ONE = [Record(id="train-0-0", turns=(Turn("user", "?"), Turn("assistant", "!")))]


def test_which_split_is_scored_decides_the_outcome(tmp_path: Path):
    from peft_mllm.specfile import parse_spec

    one, other = (parse_spec(tiny(tmp_path, scored=split)) for split in ("test", "validation"))
    assert one.id != other.id
    with pytest.raises(SpecError, match="scored"):
        parse_spec(tiny(tmp_path, scored="train"))
