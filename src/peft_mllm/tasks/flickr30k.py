"""Flickr30k: describe a photo in a sentence. Five captions each; Karpathy's split.

Young et al. 2014 (TACL 2); the split of Karpathy and Fei-Fei 2015: 29,000 / 1,014 / 1,000 images. (The split of
Flickr30k Entities is another.) One record is one image: its first caption is learned, all five are the references.
The study asks in one of ten ways; which one an image is asked in follows from its id.

    dataset_flickr30k.json         {"images": [{"filename", "split", "sentences": [{"raw"}, ...], ...}]}
    flickr30k-images/{filename}

Files in COCO's caption format, `flickr30k_karpathy_{train,val,test}.json`, are read as well.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from peft_mllm.data.official import check_each
from peft_mllm.data.prepare.release import Document, Download, Files, Hub, Item, Part, Release
from peft_mllm.data.prepared import Line
from peft_mllm.errors import DataError
from peft_mllm.record import IMAGE_MARK, Record, Turn
from peft_mllm.seeds import derive
from peft_mllm.tasks.base import Prompt
from peft_mllm.tasks.reading import PreparedOptions, PreparedTask
from peft_mllm.tasks.vqa_files import PAPER, QWEN_VL, rows_of

_NAME = "flickr30k"

REQUESTS = (
    "Share a concise interpretation of the image provided.",
    "Render a clear and concise summary of the photo.",
    "Write a terse but informative summary of the picture.",
    "Offer a succinct explanation of the picture presented.",
    "Describe the image concisely.",
    "Provide a brief description of the given image.",
    "Create a compact narrative representing the image presented.",
    "Relay a brief, clear account of the picture shown.",
    "Summarize the visual content of the image.",
    "Give a short and clear explanation of the subsequent image.",
)
"""The study's ten ways to ask (Table 10)."""


class FlickrEntry(BaseModel):
    """One image with its captions."""

    model_config = ConfigDict(frozen=True)

    captions: tuple[str, ...] = Field(min_length=1)


def _read(files: Files, official: str) -> list[Item]:
    if files.has("dataset_flickr30k.json"):
        document = files.read("dataset_flickr30k.json")
        named = _of_karpathy(document, official)
    else:
        document = files.read(f"flickr30k_karpathy_{official}.json", f"flickr30k_{official}_karpathy.json")
        named = _of_coco(document)
    entries = check_each(
        ((name, {"captions": captions}) for name, captions in named), FlickrEntry, file=Path(document.place)
    )
    return [
        Item(Path(name).stem, entries[name], name, (f"flickr30k-images/{name}", f"flickr30k_images/{name}", name))
        for name, _ in named
    ]


def _of_karpathy(document: Document, official: str) -> list[tuple[str, list[Any]]]:
    rows = [row for row in rows_of(document, "images", needs=("filename",)) if row.get("split") == official]
    return [(str(row["filename"]), _sentences(document, row)) for row in rows]


def _sentences(document: Document, row: Mapping[str, Any]) -> list[Any]:
    sentences = row.get("sentences")
    if not isinstance(sentences, list):
        raise DataError(f"{document.place}, {row['filename']}: its sentences are no list. Download it again.")
    return [each.get("raw") if isinstance(each, dict) else each for each in sentences]


def _of_coco(document: Document) -> list[tuple[str, list[Any]]]:
    captions = defaultdict(list)
    for row in rows_of(document, "annotations", needs=("image_id",)):
        captions[row["image_id"]].append(row.get("caption"))
    images = rows_of(document, "images", needs=("id",))
    names = {row["id"]: row.get("file_name") or row.get("image") for row in images}
    return [(Path(str(name)).name, captions[key]) for key, name in names.items()]


def _read_table(rows: Sequence[Mapping[str, Any]], official: str) -> list[Item]:
    chosen = [(number, row) for number, row in enumerate(rows) if row.get("split", official) == official]
    entries = check_each(
        ((str(number), {"captions": row.get("caption")}) for number, row in chosen),
        FlickrEntry,
        file=Path(f"{_NAME}, {official}"),
    )
    return [
        Item(Path(name).stem, entries[str(number)], name, row=number)
        for number, row in chosen
        for name in [str(row["filename"])]
    ]


class Flickr30kOptions(PreparedOptions):
    """Where the data is, how much of it is used, and how a caption is asked for."""

    prompt: Literal["paper", "lmms", "qwen-vl"] = "paper"
    """Whose words ask for a caption; LLaVA-1.5 has none for it, and `lmms` are lmms-eval's."""


class Flickr30k(PreparedTask):
    """Flickr30k captions by Karpathy's split."""

    name = _NAME
    Options = Flickr30kOptions
    metric = "caption"
    max_new_tokens = 64
    prompts = {
        "paper": Prompt(f"{IMAGE_MARK}\n{{request}}", 64, PAPER),
        "lmms": Prompt(f"{IMAGE_MARK}\nProvide a one-sentence caption for the provided image.", 64, "lmms-eval"),
        "qwen-vl": Prompt(f"{IMAGE_MARK}Describe the image in English:", 30, QWEN_VL),
    }
    release = Release(
        title="Flickr30k",
        paper="Young et al. 2014, TACL 2; split: Karpathy and Fei-Fei 2015, arXiv 1412.2306",
        home="https://shannon.cs.illinois.edu/DenotationGraph/",
        licence="captions CC BY 3.0; images: Flickr's terms, for research",
        size="about 4.4 GB",
        folder="flickr30k",
        splits={
            "train": Part("train", 29_000, unit="images"),
            "validation": Part("val", 1_014, unit="images"),
            "test": Part("test", 1_000, unit="images"),
        },
        downloads=(
            Download("flickr30k-images.tar.gz", "https://shannon.cs.illinois.edu/DenotationGraph/ (by request)"),
            Download(
                "caption_datasets.zip", "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip"
            ),
        ),
        read=_read,
        seen={"llava-1.5": "unseen", "sharegpt4v": "unseen", "qwen-vl-chat": "unseen"},
        hub=Hub(
            "nlphuji/flickr30k",
            {"train": "test", "val": "test", "test": "test"},
            ("filename", "caption"),
            _read_table,
            config="TEST",
            revision="refs/convert/parquet",
        ),
    )

    def record_of(self, line: Line) -> Record:
        """The request as the prompt words it; the caption to learn is the first."""
        captions = tuple(caption.strip() for caption in FlickrEntry.model_validate(line.entry).captions)
        assert line.image is not None, "every caption has an image"
        request = REQUESTS[derive("flickr30k", line.id) % len(REQUESTS)]
        return Record(
            id=line.id,
            turns=(Turn("user", self._prompt.ask(request=request)), Turn("assistant", captions[0])),
            images=(line.image,),
            meta={"references": captions},
            source=line.source,
        )
