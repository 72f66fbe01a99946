"""Releases of the tasks' data sets in their owners' layouts, with a few made-up questions each.

`publish(task, folder)` writes the files as they are downloaded (archives); `publish(..., packed=False)` what they
unpack to. Every image differs, and so does every question.
"""

from __future__ import annotations

import io
import json
import random
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

Files = dict[str, bytes]
"""Path in the release -> content; the first part of the path is the archive that it is downloaded in."""

SIZES = {"train": 6, "val": 4, "test": 4}


def image(kind: str = "JPEG", *, seed: str = "") -> bytes:
    """A small picture like no other."""
    rng = random.Random(seed)
    made = Image.new("RGB", (24, 16))
    made.putdata([(rng.randrange(256), rng.randrange(256), rng.randrange(256)) for _ in range(24 * 16)])
    file = io.BytesIO()
    made.save(file, kind)
    return file.getvalue()


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


def ten(answer: str, other: str = "no idea") -> list[dict[str, Any]]:
    said = [answer] * 7 + [other] * 3
    return [{"answer": each, "answer_confidence": "yes", "answer_id": n} for n, each in enumerate(said, 1)]


def coco(split: str, ids: range) -> Files:
    year = f"{split}2014"
    return {f"{year}.zip/{year}/COCO_{year}_{n:012d}.jpg": image(seed=f"{year}{n}") for n in ids}


def vqa(split: str, questions: str, annotations: str, answers: Callable[[int], list[dict[str, Any]]]) -> Files:
    """Two questions about each image."""
    ids = range(100, 100 + SIZES[split] // 2)
    asked = [
        {"question_id": 10 * n + k, "image_id": n, "question": f"What is {n}, {k} times?"} for n in ids for k in (1, 2)
    ]
    notes = [
        {
            "question_id": each["question_id"],
            "image_id": each["image_id"],
            "question_type": "what is",
            "answer_type": "other",
            "answers": answers(each["question_id"]),
        }
        for each in asked
    ]
    return {questions: as_json({"questions": asked}), annotations: as_json({"annotations": notes}), **coco(split, ids)}


def vqav2() -> Files:
    files: Files = {}
    for split, word in (("train", "Train"), ("val", "Val")):
        questions = f"v2_Questions_{word}_mscoco.zip/v2_OpenEnded_mscoco_{split}2014_questions.json"
        annotations = f"v2_Annotations_{word}_mscoco.zip/v2_mscoco_{split}2014_annotations.json"
        files |= vqa(split, questions, annotations, lambda n: ten(f"thing {n}"))
    return files


def okvqa() -> Files:
    files: Files = {}
    for split in ("train", "val"):
        questions = f"OpenEnded_mscoco_{split}2014_questions.json"
        annotations = f"mscoco_{split}2014_annotations.json"
        files |= vqa(
            split,
            f"{questions}.zip/{questions}",
            f"{annotations}.zip/{annotations}",
            lambda n: [{**each, "raw_answer": f"{each['answer']}ing"} for each in ten("race")],
        )
    return files


def vizwiz() -> Files:
    files: Files = {}
    for split in ("train", "val"):
        names = [f"VizWiz_{split}_{n:08d}.jpg" for n in range(SIZES[split])]
        rows = [
            {
                "image": name,
                "question": f"What is in {name}?",
                "answers": [{"answer": each["answer"], "answer_confidence": "yes"} for each in ten("unanswerable")],
                "answer_type": "unanswerable",
                "answerable": 0,
            }
            for name in names
        ]
        files[f"Annotations.zip/Annotations/{split}.json"] = as_json(rows)
        files |= {f"{split}.zip/{split}/{name}": image(seed=name) for name in names}
    return files


def textvqa() -> Files:
    files: Files = {}
    for split in ("train", "val"):
        rows = [
            {
                "question_id": n,
                "image_id": f"{split}{n:04x}",
                "question": f"What does sign {n} say?",
                "answers": [each["answer"] for each in ten("stop")],
            }
            for n in range(SIZES[split])
        ]
        words = [{"image_id": row["image_id"], "ocr_tokens": ["stop", "here"]} for row in rows]
        files[f"TextVQA_0.5.1_{split}.json"] = as_json({"data": rows})
        files[f"TextVQA_Rosetta_OCR_v0.2_{split}.json"] = as_json({"data": words})
        files |= {
            f"train_val_images.zip/train_images/{row['image_id']}.jpg": image(seed=str(row["image_id"])) for row in rows
        }
    return files


def gqa() -> Files:
    files: Files = {}
    for split, size in (("train", 6), ("val", 4), ("testdev", 4)):
        questions = {
            f"{split}{n}": {
                "question": f"Is the dog of {split} {n} brown?",
                "imageId": f"{split}{n // 2}",
                "answer": "yes",
                "types": {"structural": "verify", "semantic": "attr", "detailed": None},
                "isBalanced": True,
            }
            for n in range(size)
        }
        files[f"questions1.2.zip/{split}_balanced_questions.json"] = as_json(questions)
        files |= {f"images.zip/images/{split}{n}.jpg": image(seed=f"{split}{n}") for n in range(size // 2)}
    return files


def pope() -> Files:
    files: Files = {}
    for category in ("random", "popular", "adversarial"):
        lines = [
            {
                "question_id": n,
                "image": f"COCO_val2014_{n:012d}.jpg",
                "text": f"Is there a {category} dog in the image?",
                "label": ("yes", "no")[n % 2],
            }
            for n in (1, 2)
        ]
        files[f"coco_pope_{category}.json"] = b"".join(as_json(line) + b"\n" for line in lines)
    return files | coco("val", range(1, 3))


def ocrvqa() -> Files:
    books = {}
    files: Files = {}
    for number, (split, size) in enumerate(SIZES.items(), 1):
        for n in range(size // 2):
            asin = f"{number}{n:09d}"
            books[asin] = {
                "imageURL": f"http://images.example/{asin}.jpg",
                "questions": [f"Who wrote book {asin}?", "What is its title?"],
                "answers": [f"Author {n}", f"A long title of book {n}"],
                "title": f"A long title of book {n}",
                "genre": "History",
                "split": number,
            }
            files[f"images/{asin}.jpg"] = image(seed=f"book{split}{n}")
    return {"dataset.json": as_json(books), **files}


def flickr30k() -> Files:
    rows = [
        {
            "filename": f"{n}{split}.jpg",
            "split": split,
            "sentences": [{"raw": f"Caption {k} of the {split} photo {n} ."} for k in range(5)],
        }
        for split, size in SIZES.items()
        for n in range(size)
    ]
    images = {f"flickr30k-images.tar.gz/flickr30k-images/{row['filename']}": row["filename"] for row in rows}
    return {
        "caption_datasets.zip/dataset_flickr30k.json": as_json({"images": rows, "dataset": "flickr30k"}),
        **{path: image(seed=str(name)) for path, name in images.items()},
    }


def scienceqa() -> Files:
    problems: dict[str, Any] = {}
    splits: dict[str, list[str]] = {}
    files: Files = {}
    for number, (split, size) in enumerate(SIZES.items()):
        for n in range(size):
            pid = str(100 * number + n + 1)
            problems[pid] = {
                "question": f"Which is a fish, of {pid}?",
                "choices": ["cod", "cow", "cat"],
                "answer": n % 3,
                "hint": "Look." if n % 2 else "",
                "image": "image.png" if n % 2 else None,
                "subject": "natural science",
                "grade": "grade2",
                "split": split,
            }
            splits.setdefault(split, []).append(pid)
            if n % 2:
                files[f"{split}.zip/{split}/{pid}/image.png"] = image("PNG", seed=pid)
    return {"problems.json": as_json(problems), "pid_splits.json": as_json(splits), **files}


def iconqa() -> Files:
    problems: dict[str, Any] = {}
    splits: dict[str, list[str]] = {}
    files: Files = {}
    root = "iconqa_data.zip/iconqa_data"
    for a, kind in enumerate(("choose_txt", "fill_in_blank")):
        for b, (split, size) in enumerate(SIZES.items()):
            for n in range(size):
                pid = str(1000 * a + 100 * b + n)
                own = {"choices": ["one", "two"], "answer": n % 2} if a == 0 else {"answer": str(n)}
                problems[pid] = {"question": f"How many in {pid}?", "grade": "prek", "label": "D5", **own}
                splits.setdefault(f"{kind}_{split}", []).append(pid)
                files[f"{root}/iconqa/{split}/{kind}/{pid}/image.png"] = image("PNG", seed=f"icon{pid}")
    return {
        f"{root}/problems.json": as_json(problems),
        f"{root}/pid_splits.json": as_json(splits),
        "pid2skills.json": as_json({pid: ["counting"] for pid in problems}),
        **files,
    }


RELEASES: dict[str, Callable[[], Files]] = {
    "scienceqa": scienceqa,
    "iconqa_txt": iconqa,
    "iconqa_blank": iconqa,
    "vizwiz": vizwiz,
    "flickr30k": flickr30k,
    "okvqa": okvqa,
    "ocrvqa": ocrvqa,
    "vqav2": vqav2,
    "textvqa": textvqa,
    "gqa": gqa,
    "pope": pope,
}
SCORED = {"pope": 6} | {name: 4 for name in RELEASES if name not in ("pope", "ocrvqa")} | {"ocrvqa": 4}
"""Questions of the split that is scored."""


def publish(task: str, folder: Path, *, packed: bool = True) -> Path:
    """Write a release; returns its folder."""
    return write(RELEASES[task](), folder, packed=packed)


def write(files: Files, folder: Path, *, packed: bool = True) -> Path:
    """Write files, into archives where their paths begin with one."""
    folder.mkdir(parents=True, exist_ok=True)
    archives: dict[str, Files] = {}
    for path, content in files.items():
        first, _, rest = path.partition("/")
        if rest and first.endswith((".zip", ".tar.gz")):
            archives.setdefault(first, {})[rest] = content
        else:
            archives.setdefault("", {})[path] = content
    for name, members in archives.items():
        if name and packed:
            (_pack_zip if name.endswith(".zip") else _pack_tar)(folder / name, members)
            continue
        for path, content in members.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
    return folder


def _pack_zip(path: Path, members: Files) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def _pack_tar(path: Path, members: Files) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
