"""IconQA: each official layout gives the same records; what is wrong is said with file and place."""

import json
import logging
from pathlib import Path

import pytest
from PIL import Image

from peft_mllm.errors import DataError
from peft_mllm.tasks import TASKS
from peft_mllm.tasks.iconqa import hashed_split

SAMPLES = Path(__file__).parents[2] / "shared" / "cases" / "data" / "iconqa_examples"
needs_samples = pytest.mark.skipif(not SAMPLES.is_dir(), reason=f"the real samples are not at {SAMPLES}")

CHOOSE = {
    "question": "Which is third?",
    "choices": ["turtle", "fish"],
    "answer": 1,
    "grade": "grade1",
    "label": "A25",
}
BLANK = {"question": "How many? (_)", "answer": "8,488", "grade": "prek", "label": "D5"}


def task(name, root):
    cls = TASKS[name]
    return cls(cls.Options(root=root))


def image(folder):
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(folder / "image.png")


def folder(root, entry):
    image(root)
    (root / "data.json").write_text(json.dumps(entry))


def full_release(root):
    (root / "problems.json").write_text(json.dumps({"5": CHOOSE, "6": BLANK}))
    splits = {"choose_txt_test": ["5"], "fill_in_blank_test": ["6"]}
    (root / "pid_splits.json").write_text(json.dumps(splits))
    image(root / "iconqa/test/choose_txt/5")
    image(root / "iconqa/test/fill_in_blank/6")


def split_folders(root):
    folder(root / "test/choose_txt/5", CHOOSE)
    folder(root / "test/fill_in_blank/6", BLANK)


def examples(root):
    for pid in range(40):
        folder(root / f"choose_txt/{pid}", CHOOSE)
        folder(root / f"fill_in_blank/{pid}", BLANK)


@pytest.fixture(params=[full_release, split_folders, examples], ids=lambda make: make.__name__)
def root(request, tmp_path):
    request.param(tmp_path)
    return tmp_path


def test_choose_txt_asks_as_the_paper_does(root):
    record = task("iconqa_txt", root).records("test")[0]
    request = "Choose an option from the choices to answer the question."
    assert record.turns[0].text == f"<image>\nWhich is third? Choices: turtle, fish {request}"
    assert record.answer == "fish"
    assert record.images[0].load().size == (4, 4)
    choice = {"task": "choose_txt", "choices": ("turtle", "fish"), "answer_index": 1}
    assert record.meta == choice | {"grade": "grade1", "label": "A25", "skills": ()}


def test_fill_in_blank_asks_as_the_paper_does(root):
    record = task("iconqa_blank", root).records("test")[0]
    request = "Fill in the blanks in () or answer this question."
    assert record.turns[0].text == f"<image>\nHow many? (_) {request}"
    assert record.answer == "8,488"


def test_examples_are_split_by_a_hash_and_it_is_said(tmp_path, caplog):
    examples(tmp_path)
    with caplog.at_level(logging.WARNING):
        splits = [task("iconqa_txt", tmp_path).records(s) for s in ("train", "validation", "test")]
    ids = [record.id for records in splits for record in records]
    assert sorted(ids, key=int) == [str(n) for n in range(40)]
    assert len(splits[0]) > len(splits[1]) > 0
    assert "split by a hash of the id" in caplog.text
    assert "split by a hash of the id" in splits[0][0].source


def test_hash_never_changes():
    assert [hashed_split(pid) for pid in ("4", "15", "100")] == ["train", "validation", "test"]


def test_skills_come_along(tmp_path):
    full_release(tmp_path)
    (tmp_path / "pid2skills.json").write_text('{"5": ["counting", "pattern"]}')
    assert task("iconqa_txt", tmp_path).records("test")[0].meta["skills"] == ("counting", "pattern")


def test_number_as_an_answer_is_its_string(tmp_path):
    folder(tmp_path / "test/fill_in_blank/1", BLANK | {"answer": 7})
    assert task("iconqa_blank", tmp_path).records("test")[0].answer == "7"


def test_no_layout_is_an_error_that_names_what_was_sought(tmp_path):
    with pytest.raises(DataError, match=r"neither problems\.json nor test/choose_txt/ nor choose_txt/"):
        task("iconqa_txt", tmp_path).records("test")


def test_broken_json_has_its_line(tmp_path):
    split_folders(tmp_path)
    (tmp_path / "test/choose_txt/5/data.json").write_text('{"question": "a",\n')
    with pytest.raises(DataError, match=r"data\.json, line 2, column 1"):
        task("iconqa_txt", tmp_path).records("test")


def test_answer_out_of_range(tmp_path):
    folder(tmp_path / "test/choose_txt/5", CHOOSE | {"answer": 2})
    with pytest.raises(DataError, match=r"'5': answer 2 is not the index of one of its 2 choices"):
        task("iconqa_txt", tmp_path).records("test")


def test_missing_image(tmp_path):
    split_folders(tmp_path)
    (tmp_path / "test/choose_txt/5/image.png").unlink()
    with pytest.raises(DataError, match=r"1 of 1 images are missing(.|\n)*test/choose_txt/5/image\.png"):
        task("iconqa_txt", tmp_path).records("test")


@needs_samples
@pytest.mark.parametrize("name", ["iconqa_txt", "iconqa_blank"])
def test_real_examples(name):
    splits = {split: task(name, SAMPLES).records(split) for split in ("train", "validation", "test")}
    assert sum(map(len, splits.values())) == 50
    assert all(splits.values())
    assert all(record.images[0].load().mode == "RGB" for record in splits["test"])
    assert all(record.answer for record in splits["train"])
