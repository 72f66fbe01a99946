"""ScienceQA: the official release is read as it is, and what is wrong with a copy is said all at once."""

import json
from pathlib import Path

import pytest
from PIL import Image

from peft_mllm.errors import DataError
from peft_mllm.tasks import TASKS

SAMPLES = Path(__file__).parents[2] / "shared" / "cases" / "data" / "scienceqa"
needs_samples = pytest.mark.skipif(not SAMPLES.is_dir(), reason=f"the real samples are not at {SAMPLES}")


def problem(**changes):
    return {
        "question": "Which is a fish?",
        "choices": ["cod", "cow"],
        "answer": 0,
        "hint": "",
        "image": None,
        "subject": "natural science",
        "grade": "grade2",
    } | changes


@pytest.fixture
def root(tmp_path):
    write(tmp_path, {"1": problem(), "2": problem(hint="Look.", image="image.png", answer=1)})
    return tmp_path


def write(root, problems, splits=None):
    (root / "problems.json").write_text(json.dumps(problems))
    splits = splits or {"train": [], "val": [], "test": list(problems)}
    (root / "pid_splits.json").write_text(json.dumps(splits))
    for pid, entry in problems.items():
        if entry.get("image") == "image.png":
            folder = root / "images" / "test" / pid
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (4, 4)).save(folder / "image.png")


def task(root, **options):
    cls = TASKS["scienceqa"]
    return cls(cls.Options(root=root, **options))


def test_paper_prompt(root):
    text, with_image = task(root).records("test")
    assert text.turns[0].text == "Which is a fish? A.cod, B.cow"
    assert text.answer == "A"
    assert text.images == ()
    assert with_image.turns[0].text == "<image>\nWhich is a fish? A.cod, B.cow"
    assert with_image.answer == "B"
    assert with_image.images[0].load().size == (4, 4)


def test_llava_prompt(root):
    text, with_image = task(root, prompt="llava").records("test")
    request = "Answer with the option's letter from the given choices directly."
    assert text.turns[0].text == f"Which is a fish?\nA. cod\nB. cow\n{request}"
    assert with_image.turns[0].text == f"<image>\nContext: Look.\nWhich is a fish?\nA. cod\nB. cow\n{request}"


def test_meta_is_what_the_metric_needs(root):
    meta = task(root).records("test")[1].meta
    assert meta == {
        "choices": ("cod", "cow"),
        "answer_index": 1,
        "subject": "natural science",
        "grade": "grade2",
        "has_image": True,
        "hint": "Look.",
    }


def test_images_only(root):
    assert [record.id for record in task(root, images_only=True).records("test")] == ["2"]


def test_empty_split_is_empty(root):
    assert len(task(root).records("train")) == 0


def test_missing_root_names_the_file_and_where_to_get_it(tmp_path):
    with pytest.raises(DataError, match=r"problems\.json: cannot be read.*scienceqa\.github\.io"):
        task(tmp_path / "absent").records("test")


def test_broken_json_has_its_line(root):
    (root / "problems.json").write_text('{\n"1": {]\n}')
    with pytest.raises(DataError, match=r"problems\.json, line 2, column 7"):
        task(root).records("test")


def test_missing_images_are_named_at_once(root):
    problems = {str(n): problem(image="image.png") for n in range(10, 20)}
    write(root, problems)
    for n in range(10, 18):
        (root / f"images/test/{n}/image.png").unlink()
    with pytest.raises(DataError, match=r"8 of 10 images are missing") as caught:
        task(root).records("test")
    assert "images/test/10/image.png" in str(caught.value)
    assert "and 3 more" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"answer": 2}, "answer 2 is not the index of one of its 2 choices"),
        ({"answer": -1}, "answer -1 is not the index"),
        ({"choices": ["cod"]}, "choices"),
        ({"question": None}, "question"),
        ({"image": "../../secret.png"}, "not a plain file name"),
    ],
)
def test_wrong_problem_is_named_with_its_reason(root, changes, reason):
    write(root, {"7": problem(**changes)})
    with pytest.raises(DataError) as caught:
        task(root).records("test")
    assert "'7'" in str(caught.value)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("test_ids", "reason"),
    [(["1", "1"], "more than once"), (["1", "nine"], "have no problem"), (["../x"], "cannot name a folder")],
)
def test_wrong_split_is_refused(root, test_ids, reason):
    write(root, {"1": problem(), "../x": problem()}, {"test": test_ids})
    with pytest.raises(DataError, match=reason):
        task(root).records("test")


def test_absent_split_names_those_there_are(root):
    write(root, {"1": problem()}, {"test": ["1"]})
    with pytest.raises(DataError, match="no list 'val' among test"):
        task(root).records("validation")


@needs_samples
@pytest.mark.parametrize(("split", "size"), [("train", 500), ("validation", 150), ("test", 210)])
def test_real_release(split, size):
    records = task(SAMPLES).records(split)
    assert len(records) == size
    assert len({record.id for record in records}) == size
    for record in records:
        assert record.meta["choices"]["ABCDE".index(record.answer)]
        assert record.turns[0].text.count("<image>") == len(record.images)


@needs_samples
def test_real_images_open():
    records = task(SAMPLES, images_only=True).records("test")
    assert len(records) == 60
    assert all(record.images[0].load().mode == "RGB" for record in records[:5])
