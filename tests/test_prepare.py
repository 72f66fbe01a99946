"""`data prepare`: releases as their owners publish them become folders that tasks read; broken ones are refused."""

from __future__ import annotations

import io
import json
import os
import signal
import tarfile
import zipfile
from pathlib import Path

import pytest

from peft_mllm.data.formats import RecordFile
from peft_mllm.data.prepare import images as carrying
from peft_mllm.data.prepare.release import Download
from peft_mllm.data.prepare.source import Source
from peft_mllm.errors import DataError, Interrupted, SpecError, UserError
from peft_mllm.files import read_lines, read_sealed
from peft_mllm.preparing import catalogue, prepare_task, released
from peft_mllm.tasks import TASKS
from releases import RELEASES, SCORED, as_json, image, publish, vizwiz, write
from runs import command

SAMPLES = Path(__file__).resolve().parents[2] / "shared" / "cases" / "data" / "scienceqa"


def prepare(task, source, tmp_path, **options):
    return prepare_task(task, source, output=tmp_path / "datasets", quiet=True, **{"partial": True, **options})


def task_of(name, root, **options):
    cls = TASKS[name]
    return cls(cls.Options(root=root, **options))


def content(records):
    return [
        (record.id, record.turns, dict(record.meta), [each.load().tobytes() for each in record.images])
        for record in records
    ]


# --- every data set ---


def test_every_task_of_the_study_has_a_release():
    study = {"scienceqa", "iconqa_txt", "iconqa_blank", "vizwiz", "flickr30k", "okvqa", "ocrvqa", "vqav2"}
    assert study | {"textvqa", "gqa", "pope"} == set(released()) == set(RELEASES)


@pytest.mark.parametrize("name", RELEASES)
def test_archives_and_what_they_unpack_to_give_the_same(name, tmp_path):
    packed = prepare(name, publish(name, tmp_path / "packed"), tmp_path / "a")
    loose = prepare(name, publish(name, tmp_path / "loose", packed=False), tmp_path / "b")
    assert packed["splits"].keys() == loose["splits"].keys()
    for split in TASKS[name].release.splits:
        records = [task_of(name, each["folder"]).records(split) for each in (packed, loose)]
        assert content(records[0]) == content(records[1])
        assert len(records[0]) == len({record.id for record in records[0]})
    assert len(task_of(name, packed["folder"]).records("test")) == SCORED[name]


@pytest.mark.parametrize("name", RELEASES)
def test_what_is_written_for_other_programs_is_the_same_data(name, tmp_path):
    made = prepare(name, publish(name, tmp_path / "source"), tmp_path)
    folder = Path(made["folder"])
    for split, part in TASKS[name].release.splits.items():
        own = task_of(name, folder).records(split)
        for kind in ("llava", "qwen"):
            file = folder / f"{kind}_{part.official}.json"
            said = command("data", "check", file)
            assert said.code == 0, said.out + said.err
            read = RecordFile(file)
            assert [record.id for record in read] == [record.id for record in own]
            assert [record.answer for record in read] == [record.answer for record in own]
            assert [[each.key for each in record.images] for record in read] == [
                [each.key for each in record.images] for record in own
            ]
            if kind == "llava":
                assert [record.turns for record in read] == [record.turns for record in own]


@pytest.mark.parametrize("name", [name for name in RELEASES if len(TASKS[name].prompts) > 1])
def test_every_prompt_asks(name, tmp_path):
    made = prepare(name, publish(name, tmp_path / "source"), tmp_path)
    texts = set()
    for prompt, about in TASKS[name].prompts.items():
        task = task_of(name, made["folder"], prompt=prompt)
        record = next(record for record in task.records("test") if record.images)
        assert record.turns[0].text.count("<image>") == 1
        assert "{" not in record.turns[0].text
        texts.add(record.turns[0].text)
        if name != "scienceqa":
            assert task.max_new_tokens == about.max_new_tokens
    assert len(texts) == len(TASKS[name].prompts)


def test_the_agreed_prompts_to_the_letter(tmp_path):
    made = prepare("vizwiz", publish("vizwiz", tmp_path / "source"), tmp_path)
    texts = {
        prompt: task_of("vizwiz", made["folder"], prompt=prompt).records("test")[0].turns[0].text
        for prompt in ("paper", "llava", "qwen-vl")
    }
    question = "What is in VizWiz_val_00000000.jpg?"
    assert texts == {
        "paper": f'<image>\nQuestion: {question} When the information is insufficient, respond with "Unanswerable". '
        "Answer the question using a single word or phrase.",
        "llava": f"<image>\n{question}\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n"
        "Answer the question using a single word or phrase.",
        "qwen-vl": f"<image>{question} Answer:",
    }


def test_words_found_in_the_image_are_asked_with_only_where_they_are(tmp_path):
    source = publish("textvqa", tmp_path / "source")
    made = prepare("textvqa", source, tmp_path)
    record = task_of("textvqa", made["folder"], prompt="llava").records("test")[0]
    assert "\nReference OCR token: stop, here\n" in record.turns[0].text
    for file in source.glob("*Rosetta*"):
        file.unlink()
    made = prepare("textvqa", source, tmp_path / "without")
    with pytest.raises(DataError, match="no words found in the image"):
        task_of("textvqa", made["folder"], prompt="llava").records("test")[0]


def test_stemmed_and_raw_answers(tmp_path):
    made = prepare("okvqa", publish("okvqa", tmp_path / "source"), tmp_path)
    for answers, expected in (("stemmed", "race"), ("raw", "raceing")):
        record = task_of("okvqa", made["folder"], answers=answers).records("test")[0]
        assert record.answer == record.meta["answers"][0] == expected


def test_captions_in_cocos_format(tmp_path):
    files = {}
    for split in ("train", "val", "test"):
        rows = [{"id": n, "file_name": f"{split}{n}.jpg"} for n in range(3)]
        notes = [{"image_id": n, "id": 10 * n + k, "caption": f"Photo {n}, {k}."} for n in range(3) for k in range(5)]
        files[f"flickr30k_karpathy_{split}.json"] = as_json({"images": rows, "annotations": notes})
        files |= {f"flickr30k-images/{split}{n}.jpg": image(seed=f"{split}{n}") for n in range(3)}
    made = prepare("flickr30k", write(files, tmp_path / "source"), tmp_path)
    record = task_of("flickr30k", made["folder"]).records("test")[1]
    assert record.meta["references"] == tuple(f"Photo 1, {k}." for k in range(5))


@pytest.mark.skipif(not SAMPLES.is_dir(), reason=f"the real samples are not at {SAMPLES}")
def test_real_release(tmp_path):
    made = prepare("scienceqa", SAMPLES, tmp_path)
    assert {name: each["questions"] for name, each in made["splits"].items()} == {"train": 500, "val": 150, "test": 210}
    assert made["partial"]
    for split in ("train", "validation", "test"):
        direct, prepared = (task_of("scienceqa", root).records(split) for root in (SAMPLES, made["folder"]))
        assert [(r.id, r.turns, dict(r.meta)) for r in direct] == [(r.id, r.turns, dict(r.meta)) for r in prepared]
    images = [task_of("scienceqa", root, images_only=True).records("test") for root in (SAMPLES, made["folder"])]
    assert [r.images[0].key for r in images[0]] == [r.images[0].key for r in images[1]]


def test_the_sub_tasks_of_iconqa_are_found_below_their_common_folder(tmp_path):
    source = publish("iconqa_txt", tmp_path / "source")
    for name in ("iconqa_txt", "iconqa_blank"):
        prepare(name, source, tmp_path)
    for name in ("iconqa_txt", "iconqa_blank"):
        assert len(task_of(name, tmp_path / "datasets/iconqa").records("test")) == 4


# --- the manifest ---


def test_the_manifest_says_what_is_there_and_from_what(tmp_path):
    made = prepare("vizwiz", publish("vizwiz", tmp_path / "source"), tmp_path)
    folder = Path(made.pop("folder"))
    assert read_sealed(folder / "prepared.json") == made
    assert set(made["source"]) == {"Annotations.zip", "train.zip", "val.zip"}
    assert all(len(each["sha256"]) == 64 for each in made["source"].values())
    val = made["splits"]["val"]
    assert (val["split"], val["questions"], val["images"], val["left_out"]) == ("test", 4, 4, 0)
    assert (val["published"]["number"], val["short"], made["partial"]) == (4319, True, True)
    assert str(tmp_path) not in (folder / "prepared.json").read_text()
    origin = task_of("vizwiz", folder).origin("test")
    assert (origin["official_split"], origin["questions"], origin["partial"]) == ("val", 4, True)


def test_a_known_checksum_must_be_right(tmp_path, monkeypatch):
    source = publish("pope", tmp_path / "source")
    release = TASKS["pope"].release
    _without_counts(monkeypatch, "pope")
    with pytest.raises(DataError, match=r"val2014\.zip: its MD5 is \w{32}, and that of the published file is a3d79f"):
        prepare("pope", source, tmp_path, partial=False)
    assert any(each.md5 for each in release.downloads)
    made = prepare("pope", source, tmp_path, partial=True)
    assert len(made["source"]["val2014.zip"]["md5"]) == 32


def _without_counts(monkeypatch, name, **changes):
    from dataclasses import replace

    release = TASKS[name].release
    splits = {split: replace(part, questions=None) for split, part in release.splits.items()}
    monkeypatch.setattr(TASKS[name], "release", replace(release, splits=splits, **changes))


def test_a_whole_release_is_not_called_partial(tmp_path, monkeypatch):
    _without_counts(monkeypatch, "vizwiz")
    made = prepare("vizwiz", publish("vizwiz", tmp_path / "source"), tmp_path, partial=False)
    assert not made["partial"]
    limited = prepare("vizwiz", tmp_path / "source", tmp_path / "limited", partial=False, limit=2)
    assert limited["partial"]
    assert [each["questions"] for each in limited["splits"].values()] == [2, 2]
    assert [each["found"] for each in limited["splits"].values()] == [6, 4]


# --- samples ---


def test_samples_are_drawn_by_seed_and_recorded(tmp_path, monkeypatch):
    _without_counts(monkeypatch, "vqav2", samples={"train": (2, 4), "test": (3,)})
    made = prepare("vqav2", publish("vqav2", tmp_path / "source"), tmp_path)
    folder = Path(made["folder"])
    recorded = {size: json.loads((folder / f"samples/train_{size}_seed42.json").read_text()) for size in (2, 4)}
    assert set(recorded[2]["ids"]) < set(recorded[4]["ids"])
    for size in (2, 4):
        task = task_of("vqav2", folder, train_size=size)
        assert [record.id for record in task.records("train")] == recorded[size]["ids"]
        sample = task.origin("train")["sample"]
        assert (sample["of"], sample["size"], sample["seed"]) == (6, size, 42)
        by_file = task_of("vqav2", folder, train_ids=folder / f"samples/train_{size}_seed42.json")
        assert [record.id for record in by_file.records("train")] == recorded[size]["ids"]
        assert by_file.origin("train")["sample"]["ids_sha256"] == sample["ids_sha256"]
    other = task_of("vqav2", folder, train_size=4, sample_seed=1).records("train")
    assert {record.id for record in other} != set(recorded[4]["ids"])
    assert len(task_of("vqav2", folder).records("train")) == 6, "the study's 20,000 are all where there are fewer"
    assert "sample" not in task_of("vqav2", folder).origin("train")


def test_the_draw_never_changes():
    from peft_mllm.data.prepare.writing import sample

    assert sample([str(n) for n in range(20)], 5, seed=42, split="train") == [0, 1, 3, 12, 19]


@pytest.mark.parametrize(
    ("text", "reason"), [("[", "no readable JSON"), ("{}", "no list of ids"), ('["x"]', "1 of 1 ids are not there: x")]
)
def test_a_wrong_file_of_ids(text, reason, tmp_path):
    made = prepare("vqav2", publish("vqav2", tmp_path / "source"), tmp_path)
    (tmp_path / "ids.json").write_text(text)
    with pytest.raises(DataError, match=reason):
        task_of("vqav2", made["folder"], train_ids=tmp_path / "ids.json").records("train")


@pytest.mark.parametrize("name", ["scienceqa", "iconqa_txt"])
def test_an_official_layout_is_drawn_from_as_well(name, tmp_path):
    source = publish(name, tmp_path / "source", packed=False)
    root = source / "iconqa_data" if name == "iconqa_txt" else source
    if name == "scienceqa":
        (root / "images").mkdir()
        for split in ("train", "val", "test"):
            (root / split).rename(root / "images" / split)
    made = prepare(name, source, tmp_path)
    both = [task_of(name, each, train_size=3) for each in (root, made["folder"])]
    assert [r.id for r in both[0].records("train")] == [r.id for r in both[1].records("train")]
    assert both[0].origin("train")["sample"] == both[1].origin("train")["sample"]


# --- going on ---


class Stop:
    """Asks to stop after some calls."""

    def __init__(self, after):
        self.left = after

    def __call__(self):
        self.left -= 1
        return self.left < 0


@pytest.mark.parametrize("after", [0, 1, 4, 7, 9, 12, 13])
def test_what_was_stopped_goes_on(after, tmp_path, monkeypatch):
    source = publish("vizwiz", tmp_path / "source")
    whole = prepare("vizwiz", source, tmp_path / "whole")
    monkeypatch.setattr("peft_mllm.preparing.stop_requests", lambda: _gives(Stop(after)))
    with pytest.raises(Interrupted, match="the same command goes on"):
        prepare("vizwiz", source, tmp_path)
    folder = tmp_path / "datasets/vizwiz"
    before = {line["name"] for each in folder.glob("images_*.jsonl") for line in read_lines(each)}
    with pytest.raises(DataError, match=r"is not finished; the same command goes on"):
        task_of("vizwiz", folder).records("test")
    monkeypatch.undo()
    placed = []
    monkeypatch.setattr(carrying.Carrier, "_place", _counting(placed, carrying.Carrier._place))
    made = prepare("vizwiz", source, tmp_path)
    assert len(placed) == 10 - len(before), "nothing is done twice"
    assert _sums(made) == _sums(whole)


def _gives(value):
    from contextlib import nullcontext

    return nullcontext(value)


def _counting(names, place):
    def counted(self, name, content):
        names.append(name)
        return place(self, name, content)

    return counted


def _sums(manifest):
    """All digests but those of the journals, whose order is that of completion."""
    return {
        name: each["sha256"]
        for split in manifest["splits"].values()
        for name, each in split["files"].items()
        if not name.startswith("images_")
    }


def test_what_was_killed_goes_on(tmp_path):
    source = publish("vizwiz", tmp_path / "source")
    child = os.fork()
    if child == 0:
        placed = []

        def dying(self, name, content):
            placed.append(name)
            if len(placed) == 5:
                (self.folder / ".tmp-0000-half.jpg").write_bytes(b"half")
                os.kill(os.getpid(), signal.SIGKILL)
            return original(self, name, content)

        original = carrying.Carrier._place
        carrying.Carrier._place = dying
        prepare("vizwiz", source, tmp_path)
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    made = prepare("vizwiz", source, tmp_path)
    assert _sums(made) == _sums(prepare("vizwiz", source, tmp_path / "whole"))
    assert not list(Path(made["folder"]).rglob(".tmp-*"))
    assert [len(task_of("vizwiz", made["folder"]).records(split)) for split in ("train", "test")] == [6, 4]


def test_doing_it_twice_does_it_once(tmp_path, monkeypatch):
    source = publish("vizwiz", tmp_path / "source")
    first = prepare("vizwiz", source, tmp_path)
    placed = []
    monkeypatch.setattr(carrying.Carrier, "_place", _counting(placed, carrying.Carrier._place))
    assert prepare("vizwiz", source, tmp_path) == first
    assert placed == []
    with pytest.raises(DataError, match="was prepared with limit None, and limit 2 is asked for"):
        prepare("vizwiz", source, tmp_path, limit=2)


@pytest.mark.parametrize("gone", ["val/VizWiz_val_00000001.jpg", "val.jsonl", "images_val.jsonl", "llava_train.json"])
def test_what_is_gone_is_brought_back(gone, tmp_path):
    source = publish("vizwiz", tmp_path / "source")
    first = prepare("vizwiz", source, tmp_path)
    folder = Path(first["folder"])
    (folder / gone).unlink()
    if "llava" not in gone:
        with pytest.raises(DataError, match="The command that prepared"):
            task_of("vizwiz", folder).records("test")
    again = prepare("vizwiz", source, tmp_path)
    assert _sums(again) == _sums(first)
    assert len(task_of("vizwiz", folder).records("test")) == 4


def test_an_image_that_was_changed_is_found_when_it_is_loaded(tmp_path):
    made = prepare("vizwiz", publish("vizwiz", tmp_path / "source"), tmp_path)
    (Path(made["folder"]) / "val/VizWiz_val_00000000.jpg").write_bytes(image(seed="another"))
    with pytest.raises(DataError, match="has changed since it was checked"):
        task_of("vizwiz", made["folder"]).records("test")[0].images[0].load()


def test_another_source_or_folder_is_not_mixed_in(tmp_path):
    source = publish("vizwiz", tmp_path / "source")
    (source / "val.zip").unlink()
    with pytest.raises(DataError):
        prepare("vizwiz", source, tmp_path, partial=False, limit=3)
    with pytest.raises(DataError, match="was begun with source"):
        prepare("vizwiz", publish("vizwiz", tmp_path / "other"), tmp_path)
    (tmp_path / "datasets/gqa").mkdir()
    (tmp_path / "datasets/gqa/mine.txt").touch()
    with pytest.raises(DataError, match=r"holds mine\.txt, and was not begun by this command"):
        prepare("gqa", publish("gqa", tmp_path / "gqa"), tmp_path)
    with pytest.raises(DataError, match="holds the task 'pope', not 'vizwiz'"):
        task_of("vizwiz", prepare("pope", publish("pope", tmp_path / "p"), tmp_path)["folder"]).records("test")


def test_a_source_that_changed_meanwhile(tmp_path, monkeypatch):
    source = publish("vizwiz", tmp_path / "source")
    monkeypatch.setattr("peft_mllm.preparing.stop_requests", lambda: _gives(Stop(13)))
    with pytest.raises(Interrupted):
        prepare("vizwiz", source, tmp_path)
    monkeypatch.undo()
    files = vizwiz()
    files["train.zip/train/more.jpg"] = image(seed="more")
    write(files, source)
    with pytest.raises(DataError, match=r"train\.zip: has changed since"):
        prepare("vizwiz", source, tmp_path)


# --- broken releases: one clear message each ---


def broken(tmp_path, change, name="vizwiz", **options):
    """What is said of a release after a change."""
    source = publish(name, tmp_path / "source")
    change(source)
    with pytest.raises(DataError) as caught:
        prepare(name, source, tmp_path, **options)
    message = str(caught.value)
    assert "Traceback" not in message
    return message


def test_a_missing_file(tmp_path):
    message = broken(tmp_path, lambda source: (source / "Annotations.zip").unlink())
    assert (
        "train.json is not in the release. Get Annotations.zip, train.zip, val.zip from https://vizwiz.org" in message
    )


def test_a_missing_folder(tmp_path):
    with pytest.raises(DataError, match="There is no folder"):
        prepare("vizwiz", tmp_path / "absent", tmp_path)


def test_a_cut_off_zip(tmp_path):
    def cut(source):
        data = (source / "val.zip").read_bytes()
        (source / "val.zip").write_bytes(data[: len(data) // 2])

    message = broken(tmp_path, cut, partial=False, limit=3)
    assert "val.zip: the archive is damaged or cut off" in message
    assert "Download it again" in message


def test_a_cut_off_zip_of_questions(tmp_path):
    def cut(source):
        (source / "Annotations.zip").write_bytes((source / "Annotations.zip").read_bytes()[:-40])

    assert "Annotations.zip: the archive is damaged or cut off (its directory" in broken(tmp_path, cut)


def test_a_damaged_member(tmp_path):
    def spoil(source):
        with zipfile.ZipFile(source / "val.zip", "w", zipfile.ZIP_STORED) as archive:
            for n in range(4):
                archive.writestr(f"val/VizWiz_val_{n:08d}.jpg", image(seed=str(n)))
        data = bytearray((source / "val.zip").read_bytes())
        data[200] ^= 255
        (source / "val.zip").write_bytes(data)

    message = broken(tmp_path, spoil)
    assert "val.zip: the archive is damaged or cut off" in message
    assert "VizWiz_val_00000000.jpg" in message


def test_a_cut_off_tar(tmp_path):
    def cut(source):
        data = (source / "flickr30k-images.tar.gz").read_bytes()
        (source / "flickr30k-images.tar.gz").write_bytes(data[: len(data) // 2])

    assert "flickr30k-images.tar.gz: the archive is damaged" in broken(
        tmp_path, cut, "flickr30k", partial=False, limit=4
    )


def test_a_wrong_number(tmp_path):
    message = broken(tmp_path, lambda source: None, partial=False)
    assert "split 'train': has 6 questions, and the release has 20,523" in message
    assert "--partial" in message
    assert prepare("vizwiz", tmp_path / "source", tmp_path)["partial"], "the same folder goes on as a part"


def test_missing_images(tmp_path):
    def drop(source):
        (source / "val.zip").unlink()
        files = {name: each for name, each in vizwiz().items() if not name.endswith(("01.jpg", "02.jpg"))}
        write({name: each for name, each in files.items() if name.startswith("val.zip")}, source)

    message = broken(tmp_path, drop, partial=False, limit=4)
    assert "2 of 4 images cannot be used" in message
    assert "VizWiz_val_00000001.jpg: is not in the release" in message
    made = prepare("vizwiz", tmp_path / "source", tmp_path)
    assert (made["splits"]["val"]["questions"], made["splits"]["val"]["left_out"]) == (2, 2)
    left = read_lines(Path(made["folder"]) / "left_out.jsonl")
    assert [each["id"] for each in left] == ["VizWiz_val_00000001", "VizWiz_val_00000002"]
    assert task_of("vizwiz", made["folder"]).origin("test")["left_out"] == 2


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (image()[:300], "is cut off"),
        (b"<html>404</html>", "is an HTML page"),
        (b"", "is an empty file"),
    ],
)
def test_a_broken_image(data, reason, tmp_path):
    def spoil(source):
        files = vizwiz()
        files["val.zip/val/VizWiz_val_00000003.jpg"] = data
        write(files, source)

    message = broken(tmp_path, spoil, partial=False, limit=9)
    assert "1 of 4 images cannot be used" in message
    assert reason in message


def test_the_questions_of_another_split(tmp_path):
    def swap(source):
        (source / "v2_Questions_Val_mscoco.zip").unlink()
        name = "v2_OpenEnded_mscoco_val2014_questions.json"
        rows = [{"question_id": n, "image_id": 1, "question": "?"} for n in (1, 2)]
        write({f"v2_Questions_Val_mscoco.zip/{name}": as_json({"questions": rows})}, source)

    message = broken(tmp_path, swap, "vqav2")
    assert "2 questions have no annotation" in message
    assert "same split and version" in message


def test_an_empty_split(tmp_path):
    def empty(source):
        splits = json.loads((source / "pid_splits.json").read_text()) | {"val": []}
        (source / "pid_splits.json").write_text(json.dumps(splits))

    assert "split 'val': the release has no questions of it" in broken(tmp_path, empty, "scienceqa")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"data": [', "line 1, column 11: not valid JSON"),
        ('{"info": 1}', "has no 'data' among info"),
        ('{"data": 5}', "is not a list of objects under 'data'"),
        ('{"data": [{"question": "a"}]}', "entries lack question_id or image_id"),
        ('{"data": [{"question_id": 1, "image_id": "a", "question": "b", "answers": []}]}', "'1': answers"),
        ('{"data": [{"question_id": 1, "image_id": "../a", "question": "b", "answers": ["c"]}]}', "lead elsewhere"),
        (
            '{"data": [{"question_id": 1, "image_id": "a", "question": "<image>", "answers": ["c"]}]}',
            "questions hold the text <image>",
        ),
        ("\ufeff\x00", "not valid JSON"),
    ],
)
def test_a_wrong_table(text, reason, tmp_path):
    message = broken(
        tmp_path, lambda source: (source / "TextVQA_0.5.1_train.json").write_text(text), "textvqa", splits=["train"]
    )
    assert reason in message


def test_ids_twice(tmp_path):
    def double(source):
        line = (source / "coco_pope_random.json").read_bytes()
        (source / "coco_pope_random.json").write_bytes(line + line)

    assert "2 ids stand more than once" in broken(tmp_path, double, "pope")


def test_two_data_sets_in_one_folder(tmp_path):
    source = tmp_path / "all"
    publish("scienceqa", source / "scienceqa", packed=False)
    publish("iconqa_txt", source / "iconqa", packed=False)
    (source / "iconqa/iconqa_data/problems.json").rename(source / "iconqa/problems.json")
    with pytest.raises(DataError, match=r"2 different files problems\.json"):
        prepare("scienceqa", source, tmp_path)


# --- archives that mean harm ---


def hostile_zip(path, name, text=b"x", mode=0):
    with zipfile.ZipFile(path, "a") as archive:
        info = zipfile.ZipInfo(name)
        info.external_attr = mode << 16
        archive.writestr(info, text)


@pytest.mark.parametrize("name", ["../../outside.jpg", "/etc/outside.jpg", "a/../../b.jpg", "C:/b.jpg", "..\\b.jpg"])
def test_a_path_out_of_a_zip(name, tmp_path):
    message = broken(tmp_path, lambda source: hostile_zip(source / "val.zip", name))
    assert "which leads out of it; nothing of it is used" in message


@pytest.mark.parametrize(("target", "refused"), [("../../secret", True), ("/etc/passwd", True), ("other.jpg", False)])
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_a_link_out_of_an_archive(kind, target, refused, tmp_path):
    source = publish("flickr30k", tmp_path / "source")
    if kind == "zip":
        hostile_zip(source / "caption_datasets.zip", "link.jpg", target.encode(), 0o120777)
    else:
        packed = source / "flickr30k-images.tar.gz"
        with tarfile.open(packed) as archive:
            members = [(info, archive.extractfile(info).read()) for info in archive]
        with tarfile.open(packed, "w:gz") as archive:
            link = tarfile.TarInfo("flickr30k-images/link.jpg")
            link.type, link.linkname = tarfile.SYMTYPE, target
            archive.addfile(link)
            for info, data in members:
                archive.addfile(info, io.BytesIO(data))
    if refused:
        with pytest.raises(DataError, match="leads out of it; nothing of it is used"):
            prepare("flickr30k", source, tmp_path)
    else:
        prepare("flickr30k", source, tmp_path)
    written = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*") if path.is_file()}
    assert written <= {"source", "datasets"}


def test_an_encrypted_zip(tmp_path):
    def lock(source):
        path = source / "Annotations.zip"
        data = bytearray(path.read_bytes())
        for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
            start = data.find(mark)
            while start >= 0:
                data[start + offset] |= 1
                start = data.find(mark, start + 4)
        path.write_bytes(data)

    assert "Unpack it by hand" in broken(tmp_path, lock)


def test_noise_of_other_systems_is_passed_over(tmp_path):
    source = publish("vizwiz", tmp_path / "source")
    hostile_zip(source / "val.zip", "__MACOSX/val/._VizWiz_val_00000000.jpg")
    hostile_zip(source / "val.zip", "val/._VizWiz_val_00000001.jpg")
    assert prepare("vizwiz", source, tmp_path)["splits"]["val"]["images"] == 4


def test_a_second_name_costs_no_space_and_links_in_the_source_are_followed(tmp_path):
    source = publish("pope", tmp_path / "elsewhere", packed=False)
    linked = tmp_path / "source"
    linked.mkdir()
    for each in source.iterdir():
        (linked / each.name).symlink_to(each)
    (linked / "loop").symlink_to(linked)
    made = prepare("pope", linked, tmp_path)
    name = "COCO_val2014_000000000001.jpg"
    copy, original = Path(made["folder"]) / "test" / name, source / "val2014" / name
    assert not copy.is_symlink()
    assert copy.stat().st_ino == original.stat().st_ino


# --- tables ---


def tables(task, folder):
    """The data set as the hub's copy has it, saved by the library."""
    datasets = pytest.importorskip("datasets")
    feature = datasets.Image()

    def picture(seed):
        return {"bytes": image("PNG", seed=seed), "path": None}

    if task == "scienceqa":
        rows = [
            {"question": f"Q{n}?", "choices": ["a", "b"], "answer": n % 2, "hint": "", "subject": "s",
             "grade": "grade1", "image": picture(f"s{n}") if n else None}
            for n in range(3)
        ]  # fmt: skip
    elif task == "ocrvqa":
        rows = [
            {"image_id": f"1{n}", "questions": ["Who?", "What?"], "answers": [f"A{n}", f"B{n}"], "title": "T",
             "genre": "G", "image": picture(f"o{n}")}
            for n in range(2)
        ]  # fmt: skip
    else:
        rows = [
            {"question_id": f"VizWiz_val_{n:08d}.jpg", "question": f"Q{n}?", "answers": ["yes"] * 6 + ["no"] * 4,
             "category": "yes/no", "image": picture(f"v{n}")}
            for n in range(3)
        ]  # fmt: skip
    made = datasets.Dataset.from_list(rows).cast_column("image", feature)
    return datasets, made, folder


@pytest.mark.parametrize(
    ("task", "split", "images"), [("vizwiz", "val", 3), ("ocrvqa", "test", 2), ("scienceqa", "test", 2)]
)
@pytest.mark.parametrize("saved", ["to_disk", "parquet"])
def test_tables_of_the_datasets_library(task, split, images, saved, tmp_path, monkeypatch):
    datasets, table, folder = tables(task, tmp_path / "saved")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    if saved == "to_disk":
        datasets.DatasetDict({split: table}).save_to_disk(str(folder))
    else:
        folder.mkdir()
        table.to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))
    made = prepare(task, folder, tmp_path, splits=["test"], hub=True)
    records = task_of(task, made["folder"]).records("test")
    account = made["splits"][TASKS[task].release.splits["test"].official]
    assert (account["questions"], account["images"]) == (len(records), images)
    assert made["asked"]["kind"] == "tables"
    with_image = [record for record in records if record.images]
    assert with_image[0].images[0].load().size == (24, 16)
    first = (Path(made["folder"]) / with_image[0].images[0].path).read_bytes()
    assert first == image("PNG", seed={"vizwiz": "v0", "ocrvqa": "o0", "scienceqa": "s1"}[task]), "not encoded again"


def test_tables_without_the_split(tmp_path):
    datasets, table, folder = tables("vizwiz", tmp_path / "saved")
    datasets.DatasetDict({"val": table}).save_to_disk(str(folder))
    with pytest.raises(DataError, match=r"has no split 'train' of VizWiz-VQA\. Get Annotations\.zip"):
        prepare("vizwiz", folder, tmp_path)
    with pytest.raises(DataError, match="GQA is on no hub"):
        prepare("gqa", folder, tmp_path, hub=True)


def test_without_the_library(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    (tmp_path / "saved").mkdir()
    with pytest.raises(UserError, match=r"pip install 'peft-mllm\[hub\]'"):
        prepare("vizwiz", tmp_path / "saved", tmp_path, hub=True, splits=["test"])


# --- the command ---


def test_the_command(tmp_path):
    source = publish("vizwiz", tmp_path / "source")
    said = command("data", "prepare", "vizwiz", "--source", source, "--output", tmp_path / "datasets", "--limit", 3)
    assert said.code == 0, said.err
    assert "root: " + str(tmp_path / "datasets/vizwiz") in said.out
    assert "a part of the release" in said.out
    again = command(
        "data", "prepare", "vizwiz", "--source", source, "--output", tmp_path / "datasets", "--limit", 3, "--json"
    )
    assert json.loads(again.out)["splits"]["val"]["questions"] == 3


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["vizwitz", "--source", "."], "Did you mean 'vizwiz'?"),
        (["scenes_at", "--source", "."], "has no release to prepare"),
        (["vizwiz"], "--source FOLDER"),
        ([], "--list shows the tasks"),
        (["vizwiz", "--source", ".", "--split", "validation"], "has no split 'validation'"),
        (["vizwiz", "--source", ".", "--prompt", "papers"], "Did you mean 'paper'?"),
    ],
)
def test_wrong_usage(words, reason, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = command("data", "prepare", *words)
    assert said.code == 2
    assert reason in said.err


def test_the_list(tmp_path):
    said = command("data", "prepare", "--list")
    assert said.code == 0
    listed = json.loads(command("data", "prepare", "--list", "--json").out)
    assert listed == json.loads(json.dumps(catalogue()))
    for each in listed:
        assert each["licence"] in said.out
        assert each["home"] in said.out
        assert each["task"] in said.out
        assert each["size"]
        assert all(isinstance(file["url"], str) and file["url"].startswith("http") for file in each["downloads"])


def test_a_download_may_have_a_checksum():
    assert Download("a.zip", "https://a").md5 is None
    with pytest.raises(SpecError):
        prepare_task("custom", None)


# --- tables of questions with anything in them ---

JUNK = (None, 5, -1.5, True, "text", "", [], {}, [5], [[]], {"a": 5}, ["a", None])


def places(value, path=()):
    """Paths to some values of a JSON document, of each shape a few."""
    yield path
    if isinstance(value, dict):
        for key in list(value)[: 6 if path else 2]:
            yield from places(value[key], (*path, key))
    elif isinstance(value, list):
        for number in range(min(len(value), 1)):
            yield from places(value[number], (*path, number))


def spoilt(value, path, junk):
    """A copy with one value replaced; None drops the key."""
    if not path:
        return junk
    copy = dict(value) if isinstance(value, dict) else list(value)
    if len(path) == 1 and junk is None and isinstance(copy, dict):
        del copy[path[0]]
    else:
        copy[path[0]] = spoilt(copy[path[0]], path[1:], junk)
    return copy


@pytest.mark.parametrize("junks", [JUNK[::3], pytest.param(JUNK, marks=pytest.mark.slow)], ids=["some", "every"])
@pytest.mark.parametrize("name", RELEASES)
def test_whatever_stands_in_a_table_is_read_or_refused(name, junks, tmp_path):
    """Never a traceback: a `DataError` that names the file, or a reading."""
    release = TASKS[name].release
    source = publish(name, tmp_path / "source", packed=False)
    tables = [path for path in source.rglob("*.json") if "skills" not in path.name]
    tried = refused = 0
    for file in tables:
        text = file.read_text()
        value = json.loads(text) if name != "pope" else [json.loads(line) for line in text.splitlines()]
        for path in places(value):
            for junk in junks:
                file.write_text(json.dumps(spoilt(value, path, junk)))
                tried += 1
                for part in release.splits.values():
                    try:
                        Source(source, release).items(part.official)
                    except DataError:
                        refused += 1
        file.write_text(text)
    assert tried > 4 * len(junks)
    assert refused > tried // 6
