"""Tasks that read a prepared folder: what they ask is what their metric scores, and workers can have their records."""

from __future__ import annotations

import multiprocessing
import pickle

import pytest

from peft_mllm.errors import DataError
from peft_mllm.metrics import metric_named
from peft_mllm.preparing import catalogue, prepare_task
from peft_mllm.tasks import TASKS
from releases import RELEASES, publish


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("prepared")
    return {
        name: prepare_task(name, publish(name, root / name), output=root / "datasets", partial=True, quiet=True)[
            "folder"
        ]
        for name in RELEASES
    }


def task_of(name, root, **options):
    cls = TASKS[name]
    return cls(cls.Options(root=root, **options))


@pytest.mark.parametrize("name", RELEASES)
def test_the_reference_is_right_and_another_answer_is_not(name, folders):
    task = task_of(name, folders[name])
    records, metric = task.records("test"), metric_named(task.metric)
    right = metric.score([record.answer for record in records], records)
    wrong = metric.score(["something else entirely"] * len(records), records)
    if name == "flickr30k":
        assert right.headline > 1
        assert right.values["Bleu_1"] > 0.99
    else:
        assert right.headline == (1 if metric.unit == "0-1" else 100)
    assert wrong.headline < right.headline
    assert right.unparsed == 0


def test_figures_come_by_kind_where_the_release_says_it(folders):
    scored = {}
    for name in ("vqav2", "vizwiz", "gqa", "pope", "scienceqa", "iconqa_txt"):
        task = task_of(name, folders[name])
        records = task.records("test")
        scored[name] = set(metric_named(task.metric).score([r.answer for r in records], records).values)
    assert {"accuracy/other", "accuracy/what is"} <= scored["vqav2"]
    assert "accuracy/unanswerable" in scored["vizwiz"]
    assert {"accuracy/binary", "accuracy/verify", "accuracy/attr"} <= scored["gqa"]
    assert {"f1/random", "f1/popular", "f1/adversarial"} <= scored["pope"]
    assert {"accuracy/choose_txt", "accuracy/counting"} <= scored["iconqa_txt"]
    assert len(scored["scienceqa"]) > 3


@pytest.mark.parametrize("name", RELEASES)
def test_records_survive_a_worker(name, folders):
    records = task_of(name, folders[name]).records("test")
    records[0]  # opens the file
    again = pickle.loads(pickle.dumps(records))  # noqa: S301 - as a data loader's worker does
    assert [record.id for record in again] == [record.id for record in records]
    assert [record.id for record in again[1:3]] == [record.id for record in records][1:3]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        ids = pool.map(_Id(records), range(len(records)))
    assert ids == [record.id for record in records]


class _Id:
    def __init__(self, records):
        self.records = records

    def __call__(self, place):
        return self.records[place].id


def test_questions_without_an_image_can_be_left_out(folders):
    task = task_of("scienceqa", folders["scienceqa"], images_only=True, test_size=1)
    (record,) = task.records("test")
    assert record.images
    assert task.origin("test")["sample"]["of"] == 2
    everything = task_of("scienceqa", folders["scienceqa"]).records("test")
    assert [bool(record.images) for record in everything] == [False, True, False, True]


def test_the_way_of_asking_for_a_caption_follows_from_the_image(folders):
    records = task_of("flickr30k", folders["flickr30k"]).records("train")
    assert len({record.turns[0].text for record in records}) > 1
    again = task_of("flickr30k", folders["flickr30k"]).records("train")
    assert [record.turns for record in records] == [record.turns for record in again]


def test_a_split_that_there_is_not(folders):
    task = task_of("pope", folders["pope"])
    assert [task.has(split) for split in ("train", "validation", "test")] == [False, False, True]
    with pytest.raises(DataError, match="there is no train split, only test"):
        task.records("train")


def test_an_unprepared_folder(tmp_path):
    with pytest.raises(DataError, match=r"is no prepared folder\. `peft-mllm data prepare vizwiz"):
        task_of("vizwiz", tmp_path).records("test")


def test_the_studys_groups():
    """Seen is what all models have seen, unseen what none has; facts of the study's section 3."""
    of = {each["task"]: set(each["seen"].values()) for each in catalogue()}
    assert {"okvqa", "ocrvqa", "vqav2"} <= {name for name, seen in of.items() if seen == {"seen"}}
    unseen = {"scienceqa", "iconqa_txt", "iconqa_blank", "vizwiz", "flickr30k"}
    assert unseen <= {name for name, seen in of.items() if seen == {"unseen"}}
    assert {name for name, seen in of.items() if len(seen) > 1} == {"textvqa"}


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("scienceqa", (12_726, 4_241, 4_241)),
        ("iconqa_txt", (18_946, 6_316, 6_316)),
        ("iconqa_blank", (10_913, 3_638, 3_638)),
        ("vizwiz", (20_523, 4_319)),
        ("flickr30k", (29_000, 1_014, 1_000)),
        ("okvqa", (9_009, 5_046)),
        ("vqav2", (443_757, 214_354)),
        ("textvqa", (34_602, 5_000)),
        ("pope", (9_000,)),
    ],
)
def test_published_sizes(name, sizes):
    (found,) = [each for each in catalogue() if each["task"] == name]
    assert tuple(part["number"] for part in found["splits"].values()) == sizes
