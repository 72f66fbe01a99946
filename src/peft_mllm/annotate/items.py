"""What is to be judged: captions with their images and references, from a run or a file of predictions."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_mllm.data.images import FileImage
from peft_mllm.errors import DataError, SpecError
from peft_mllm.files import json_digest, read_json, read_lines
from peft_mllm.record import IMAGE_MARK, ImageSource, Record
from peft_mllm.rundir import PREDICTIONS
from peft_mllm.seeds import derive
from peft_mllm.specfile import build, parse_spec
from peft_mllm.tasks import TASKS

SIDE = 720
"""Pixels of an image's longer side on the page: details can be seen, and a hundred images are some megabytes."""


@dataclass(frozen=True)
class Item:
    """One caption.

    Attributes:
        id: the question's.
        question: what the model was asked.
        caption: what it said.
        references: what people said.
        images: data URIs.
    """

    id: str
    question: str
    caption: str
    references: tuple[str, ...]
    images: tuple[str, ...]


def digest(items: Sequence[Item]) -> str:
    """Equal for pages with the same captions of the same questions: only their answers can be compared."""
    return json_digest([[item.id, item.caption] for item in items])


def items_of(
    target: Path,
    *,
    task: Any = None,
    image_root: Path | None = None,
    sample: int | None = None,
    seed: int = 42,
) -> list[Item]:
    """The captions of a run or a file.

    Args:
        target: a run directory, a directory by `evaluate --output`, or a file of predictions as those have it: JSON
            lines, or a JSON list as COCO's results, with `id` (or `image_id`) and `prediction` (or `caption`).
        task: the task's name, or its name and options; a run knows its tasks' options. Without a task, a line names
            its `image` below the image root.
        image_root: where those images are.
        sample: so many captions, drawn by seed and id: the same of every run.
        seed: of the draw.

    Raises:
        DataError: captions, images or ids cannot be had.
    """
    path, named = _find(target, task)
    said = _drawn(_predictions(path), sample, seed)
    if named is None:
        return [_from_line(path, line, image_root or path.parent) for line in said]
    task_of = build(TASKS, named)
    records = {record.id: record for record in task_of.records("test")}
    if missing := [line["id"] for line in said if line["id"] not in records]:
        raise DataError(f"{path}: {len(missing)} ids are not in the task {named.name}, such as '{missing[0]}'.")
    return [_from_record(line, records[line["id"]]) for line in said]


def _find(target: Path, task: Any) -> tuple[Path, Any]:
    """The file of predictions, and the task with its options where there is one."""
    wanted = task.get("name") if isinstance(task, Mapping) else task
    if not target.is_dir():
        return target, _spec([task])[0] if task is not None else None
    folder = target / PREDICTIONS
    names = sorted(each.stem for each in folder.glob("*.jsonl"))
    if not names:
        raise DataError(f"{folder} has no predictions. Give a run that has been evaluated, or a file of predictions.")
    if wanted is None and len(names) > 1:
        raise SpecError(f"{target} has predictions of several tasks: name one with --task ({', '.join(names)}).")
    name = wanted or names[0]
    if name not in names:
        raise SpecError(f"{target} has no predictions of '{name}'; it has {', '.join(names)}.")
    file = folder / f"{name}.jsonl"
    if isinstance(task, Mapping) or not (target / "spec.json").is_file():
        return file, _spec([task or name])[0]
    spec = read_json(target / "spec.json")
    own = [each for each in _spec([spec["task"], *spec.get("evaluate", ())]) if each.name == name]
    return file, own[0] if own else _spec([name])[0]


def _spec(tasks: Sequence[Any]) -> list[Any]:
    """Tasks with their options, as a spec has them."""
    spec = parse_spec({"method": "none", "output_dir": "unused", "task": tasks[0], "evaluate": list(tasks[1:])})
    return [spec.task, *spec.evaluate]


def _predictions(path: Path) -> list[dict[str, Any]]:
    """Lines with `id` and `prediction`, whatever the file calls them.

    Raises:
        DataError: it is no such file, or an id stands twice.
    """
    try:
        head = path.read_bytes()[:64].lstrip()
        lines = read_json(path) if head.startswith(b"[") else read_lines(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise DataError(f"{path}: {str(error).removeprefix(f'{path}:')}") from None
    read, seen = [], set()
    for number, line in enumerate(lines, start=1):
        name = next((line[key] for key in ("id", "question_id", "image_id") if key in line), None)
        said = next((line[key] for key in ("prediction", "caption", "text") if key in line), None)
        if name is None or not isinstance(said, str):
            if number == 1 and "prediction" not in line:
                continue  # a line that says how the others were made
            raise DataError(f"{path}:{number}: it needs `id` and `prediction` (or `image_id` and `caption`).")
        if name in seen:
            raise DataError(f"{path}:{number}: the id '{name}' stands twice.")
        seen.add(name)
        read.append({**line, "id": str(name), "prediction": said})
    if not read:
        raise DataError(f"{path} has no predictions.")
    return read


def _drawn(said: list[dict[str, Any]], sample: int | None, seed: int) -> list[dict[str, Any]]:
    """Some of the predictions, in the order of the file; who is drawn is a function of seed and id."""
    if sample is None or sample >= len(said):
        return said
    drawn = sorted(said, key=lambda line: derive(seed, "annotate", line["id"]))[:sample]
    kept = {line["id"] for line in drawn}
    return [line for line in said if line["id"] in kept]


def _from_record(line: Mapping[str, Any], record: Record) -> Item:
    if not record.images:
        raise DataError(
            f"The question '{record.id}' has no image to judge its answer by. Choose a task whose questions all "
            "have one."
        )
    question = " ".join(turn.text for turn in record.question if turn.role == "user").replace(IMAGE_MARK, " ").strip()
    references = tuple(map(str, record.meta.get("references") or (record.answer,)))
    return Item(record.id, question, line["prediction"], references, tuple(map(picture, record.images)))


def _from_line(path: Path, line: Mapping[str, Any], root: Path) -> Item:
    if not isinstance(line.get("image"), str):
        raise DataError(f"{path}: '{line['id']}' names no `image`. Give the task (--task), which knows its images.")
    references = tuple(map(str, _references(line)))
    image = FileImage(root / line["image"], name=line["image"])
    return Item(line["id"], str(line.get("question", "")), line["prediction"], references, (picture(image),))


def _references(line: Mapping[str, Any]) -> Iterator[Any]:
    given = line.get("references", line.get("answer", ()))
    yield from given if isinstance(given, list) else [given] if given else []


def picture(source: ImageSource) -> str:
    """An image as a data URI, made smaller where it is large."""
    image = source.load()
    image.thumbnail((SIDE, SIDE))
    held = io.BytesIO()
    image.save(held, format="JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(held.getvalue()).decode()}"
