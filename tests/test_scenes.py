import random
import subprocess
import sys

import numpy as np
import pytest

from peft_mllm.scenes import SIDE, Scene, SceneImage, Shape, make_scene
from peft_mllm.tasks import SPLITS, TASKS
from peft_mllm.tasks.scenes import MEASURES, SEEN, UNSEEN, ScenesOptions


def test_a_scene_is_a_function_of_its_seed_in_every_process():
    script = "from peft_mllm.scenes import make_scene; print(make_scene('x 1').key, make_scene(7).key)"
    said = {subprocess.check_output([sys.executable, "-c", script], text=True) for _ in range(2)}
    assert said == {f"{make_scene('x 1').key} {make_scene(7).key}\n"}
    assert make_scene(7) != make_scene(8)


def test_equal_keys_mean_equal_pixels():
    scene = make_scene(3)
    again = Scene(tuple(scene.shapes))
    assert SceneImage(scene).key == SceneImage(again).key
    image = SceneImage(scene).load()
    assert (image.mode, image.size) == ("RGB", (SIDE, SIDE))
    assert np.array_equal(np.asarray(image), np.asarray(SceneImage(again).load()))


def test_every_content_belongs_to_one_split():
    scenes = {split: {make_scene(i, split).key for i in range(300)} for split in SPLITS}
    assert not scenes["train"] & scenes["test"]
    assert not scenes["train"] & scenes["validation"]
    assert not scenes["validation"] & scenes["test"]
    assert make_scene(5, "test").split == "test"


def test_shapes_are_drawn_in_their_cells():
    pixels = np.asarray(Scene((Shape(0, 2, "white", "square"),)).draw()).mean(-1)
    bright = np.argwhere(pixels > 150) // (SIDE // 3)
    assert {tuple(cell) for cell in bright.tolist()} == {(0, 2)}


@pytest.mark.parametrize("name", SEEN + UNSEEN + MEASURES)
def test_records_are_a_function_of_task_split_seed_and_place(name):
    options = ScenesOptions(size={"train": 40, "validation": 8, "test": 8}, questions_per_image=4)
    first, again = (TASKS[name](options).records("train") for _ in range(2))
    assert len(first) == 40
    assert first[17] == again[17] == first[10:20][7]
    assert first[-1] == first[39]
    with pytest.raises(IndexError):
        first[40]
    assert TASKS[name](options.model_copy(update={"seed": 1})).records("train")[0] != first[0]
    assert len({record.id for record in first}) == 40
    for record in first:
        assert record.turns[0].text.startswith("<image>\n")
        assert record.images[0].scene.split == "train"
        assert record.answer


@pytest.mark.parametrize("name", SEEN + UNSEEN + MEASURES)
def test_neighbouring_questions_share_their_image(name):
    task = TASKS[name]
    records = task(ScenesOptions(questions_per_image=4)).records("train")[:40]
    keys = [record.images[0].key for record in records]
    group = min(4, task.most_per_image)
    assert all(len(set(keys[i : i + group])) == 1 for i in range(0, 40 - group + 1, group))
    assert len(set(keys)) > 40 // group // 2


@pytest.mark.parametrize("name", SEEN + UNSEEN + MEASURES)
def test_no_answer_is_right_for_most_questions(name):
    answers = [record.answer for record in TASKS[name]().records("test")]
    assert max(map(answers.count, set(answers))) / len(answers) <= 0.6


def test_answers_are_true():
    scene = Scene((Shape(0, 0, "red", "circle"), Shape(0, 2, "blue", "cross"), Shape(2, 1, "red", "cross")))
    truths = {
        "caption": {"List the shapes.": "red circle, blue cross, red cross"},
        "at": {"What is at the top right?": "blue cross", "What is at the middle centre?": "nothing"},
        "colour": {"What colour is at the bottom centre?": "red"},
        "exists": {
            "Is there a shape at the top left?": "yes",
            "Is there a shape at the middle left?": "no",
        },
        "count": {"How many shapes are there?": "3", "How many shapes are in the top row?": "2"},
        "shape": {"What shape is at the bottom centre?": "cross"},
        "nothing": {"Is there nothing at the top left?": "no", "Is there nothing at the middle left?": "yes"},
        "blank": {"Fill in the blank: at the top left is a red ___.": "circle"},
        "empty": {"Is the top left empty?": "no", "Is the top centre empty?": "yes"},
        "row": {
            "List the shapes of the top row.": "red circle, blue cross",
            "List the shapes of the middle row.": "nothing",
        },
        "column": {"How many shapes are in the centre column?": "1"},
        "next": {"What is right of the top centre?": "blue cross", "What is right of the top left?": "nothing"},
        "compare": {
            "Are there more shapes in the top row than in the bottom row?": "yes",
            "Are there more shapes in the middle row than in the bottom row?": "no",
        },
    }
    rng = random.Random(0)
    for name, pairs in truths.items():
        asked = dict(filter(None, (TASKS[f"scenes_{name}"]().ask(scene, rng) for _ in range(300))))
        assert pairs.items() <= asked.items()


def test_the_right_choice_is_the_one_that_is_there():
    task = TASKS["scenes_choose"]()
    for record in task.records("test")[:40]:
        question, _, choices = record.turns[0].text.removeprefix("<image>\n").partition("? A. ")
        place = question.removeprefix("What is at the ")
        there = next(s.name for s in record.images[0].scene.shapes if s.place == place)
        assert choices.split(" B. ")["AB".index(record.answer)] == there
