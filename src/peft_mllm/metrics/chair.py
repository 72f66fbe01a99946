"""CHAIR: objects that a caption names and the image does not show.

Rohrbach et al. 2018 (arXiv 1809.02156); source: LisaAnne/Hallucination utils/chair.py. With the objects a caption
names (`text/objects.py`; each time it says them) and the objects of its image:

    CHAIRi = hallucinated mentions / mentions            CHAIRs = captions with a hallucination / captions
    Recall = objects named that are there / objects that are there, over all images     (an addition to the source)

The objects of an image are its instance annotations' categories and what its reference captions name; `Recall`
counts each once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from peft_mllm.errors import DataError
from peft_mllm.metrics.base import Case, Given, Metric, Prediction, Scores, Variant, reference
from peft_mllm.metrics.reading import Document, Row, answer_of, image_key, in_words, one_file, read
from peft_mllm.record import Record

_IDS = ("image_id", "image", "id", "question_id")


class CHAIR(Metric):
    """Share of captions and of mentions that are hallucinated; lower is better."""

    source = "LisaAnne/Hallucination utils/chair.py"
    unit = "0-1"
    variants = {
        "official": Variant(
            "chair/official: COCO objects by the table of synonyms, against instances and reference captions",
            "CHAIRs = captions with a hallucinated object / captions; CHAIRi = hallucinated mentions / mentions",
        ),
    }
    files = (
        "captions [{image_id, caption}] (JSON or JSON lines, or the official {imgToEval}); COCO instance and caption "
        "annotations, or a JSON of {image id: [objects]}"
    )

    def score(self, predictions: Sequence[str], records: Sequence[Record]) -> Scores:
        """Score each caption against its record's `meta["objects"]`, or those its references name."""
        from peft_mllm.metrics.text.objects import objects_of

        if not records:
            raise DataError("There are no records to score. Give a split that has some.")
        mentions = wrong_mentions = 0
        found = wanted = 0
        parsed, details = [], []
        for prediction, record in zip(predictions, records, strict=True):
            there = _objects(record)
            said = objects_of(prediction)
            wrong = [pair for pair in said if pair[1] not in there]
            mentions, wrong_mentions = mentions + len(said), wrong_mentions + len(wrong)
            found, wanted = found + len(there & {name for _, name in said}), wanted + len(there)
            parsed.append(", ".join(name for _, name in said))
            details.append({"objects": [name for _, name in said], "hallucinated": [list(pair) for pair in wrong]})
        hallucinated = [float(bool(each["hallucinated"])) for each in details]
        values = {
            "CHAIRs": sum(hallucinated) / len(hallucinated),
            "CHAIRi": wrong_mentions / mentions if mentions else 0.0,
            "Recall": found / wanted if wanted else 0.0,
        }
        return Scores(values, hallucinated, parsed, details)

    def read(self, given: Given) -> Case:
        """Read captions and the objects of their images; an image without a caption does not count."""
        predictions = _captions(read(one_file(given.predictions, "--predictions")))
        keys = {prediction.key for prediction in predictions}
        objects = _references(given.references, keys)
        # annotations are of all images of a set; the rule is over the images that have a caption
        records = [_record(key, objects[key]) for key in objects if key in keys]
        return Case(predictions, records, unused=len(objects) - len(records))


def _record(key: str, objects: Iterable[str]) -> Record:
    return reference(key, ", ".join(sorted(objects)), objects=frozenset(objects))


def _objects(record: Record) -> frozenset[str]:
    from peft_mllm.metrics.text.objects import objects_of, synonyms

    known = synonyms()
    if "objects" in record.meta:
        return frozenset(known.get(name.strip().lower(), name) for name in record.meta["objects"])
    captions = record.meta.get("references") or (record.answer,)
    return frozenset(name for caption in captions for _, name in objects_of(caption))


def _captions(document: Document) -> list[Prediction]:
    if document.has("imgToEval", dict):
        rows = [Row(value, f"{document.path}, imgToEval[{key}]") for key, value in document.value["imgToEval"].items()]
        for row in rows:
            if not isinstance(row.value, dict):
                row.fail(f"expected an object, found {in_words(row.value)}.")
    else:
        rows = document.rows("annotations", "predictions", "results", "sentences")
    return [Prediction(image_key(row.key(_IDS)), answer_of(row), row.place) for row in rows]


def _references(paths: Sequence[Path], wanted: set[str]) -> dict[str, set[str]]:
    """The objects of each image of all files together."""
    objects: dict[str, set[str]] = {}
    kinds: set[str] = set()
    for path in paths:
        document = read(path)
        kind, found = _of_file(document, wanted)
        kinds.add(kind)
        for key, names in found.items():
            objects.setdefault(key, set()).update(names)
    coco = {"instances", "captions"}
    if kinds & coco and not coco <= kinds:
        absent = (coco - kinds).pop()
        raise DataError(
            f"CHAIR's rule takes an image's objects from COCO's instances and its captions, and there are no {absent}. "
            "Give both annotation files as --references, or a JSON of {image id: [objects]}."
        )
    return objects


def _of_file(document: Document, wanted: set[str]) -> tuple[str, dict[str, set[str]]]:
    """What kind of file it is, and the objects it names of each image."""
    from peft_mllm.metrics.text.objects import objects_of

    found: dict[str, set[str]] = {}
    if document.has("annotations", list):
        categories = _categories(document)
        images = document.value["images"] if document.has("images", list) else []
        found = {str(image["id"]): set() for image in images if isinstance(image, dict) and "id" in image}
        rows = document.rows("annotations")
        kind = "instances" if "category_id" in rows[0].value else "captions"
        for row in rows:
            key = row.key(("image_id",))
            names = found.setdefault(key, set())
            if key in wanted and kind == "instances":
                names.add(_category(row, categories))
            elif key in wanted:
                names.update(name for _, name in objects_of(row.text(["caption"], "caption")))
        return kind, found
    if isinstance(document.value, dict) and all(isinstance(value, list) for value in document.value.values()):
        for key, names in document.mapping("image id: [objects]").items():
            found[image_key(key)] = set(_names(document.path, key, names))
        return "objects", found
    for row in document.rows("images"):
        found[image_key(row.key(_IDS))] = set(_names(document.path, row.place, row.find(["objects"], "objects")))
    return "objects", found


def _categories(document: Document) -> dict[Any, str]:
    listed = document.value["categories"] if document.has("categories", list) else []
    return {
        str(each["id"]): str(each["name"])
        for each in listed
        if isinstance(each, dict) and {"id", "name"} <= each.keys()
    }


def _category(row: Row, categories: dict[Any, str]) -> str:
    from peft_mllm.metrics.text.objects import synonyms

    name = categories.get(str(row.value.get("category_id")))
    if name not in synonyms():
        row.fail(f"category {row.value.get('category_id')!r} is none of COCO's 80 objects.")
    return synonyms()[name]


def _names(path: Path, place: str, names: Any) -> list[str]:
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{path}, image {place}: the objects are {in_words(names)}, and must be a list of text.")
    return names
