"""A model's own processor: loaded without torchvision, and asked what it makes of images of a size.

The processor decides everything about images: what stands in the text for each, and which arguments the model gets.
It hands its tokenizer the text with images expanded; a `Standin` in the tokenizer's place notes that text, or
answers with token ids that are known already. So nothing of any one processor is written here.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_mllm.errors import DataError, ModelError
from peft_mllm.models.llava import load_image_processor

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedTokenizerBase, ProcessorMixin

Size = tuple[int, int]
"""Width and height of an image."""

TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")
"""Arguments with one number a token."""
OF_THE_TEXT = {"input_ids", "attention_mask", "labels", *TOKEN_TYPES}
"""What a processor returns that does not come from images."""
BORDER = "\n§\n"
"""Between image placeholders where their expansions are wanted: no processor writes this."""


@dataclass(frozen=True)
class Expansion:
    """What a processor makes of images of some sizes.

    Attributes:
        texts: what stands in the text for each image.
        inputs: the model's arguments for them, pixels among them.
    """

    texts: tuple[str, ...]
    inputs: Mapping[str, Any]


class Standin:
    """Stands where a processor has its tokenizer: notes the text that it is given.

    Args:
        tokenizer: whose place it takes; it also answers everything that is not a call.
        ids: (R, T) tokens to answer with; None lets the tokenizer answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ids: Sequence[Sequence[int]] | None = None):
        self._tokenizer = tokenizer
        self._ids = ids
        self.heard: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, text: Sequence[str], **options: Any) -> Mapping[str, Any]:
        """Note the texts, and answer."""
        self.heard = list(text)
        if self._ids is None:
            return self._tokenizer(text, **options)
        return {"input_ids": self._ids, "attention_mask": [[1] * len(row) for row in self._ids]}


class Seer:
    """What a processor says about images, remembered by their sizes."""

    def __init__(self, processor: ProcessorMixin):
        self.processor = processor
        self.tokenizer: PreTrainedTokenizerBase = processor.tokenizer
        placeholder = getattr(processor, "image_token", None)
        if not isinstance(placeholder, str):
            raise ModelError(f"{type(processor).__name__} does not say what stands for an image in its text.")
        self.placeholder = placeholder
        self._known: dict[tuple[Size, ...], Expansion] = {}

    def expand(self, sizes: tuple[Size, ...]) -> Expansion:
        """What the images of one conversation become; they may depend on one another."""
        if sizes not in self._known:
            self._known[sizes] = self._expand(sizes)
        return self._known[sizes]

    def _expand(self, sizes: tuple[Size, ...]) -> Expansion:
        from PIL import Image

        blank = [Image.new("RGB", size) for size in sizes]
        text = BORDER + BORDER.join([self.placeholder] * len(sizes)) + BORDER
        heard, outputs = self._process(text, blank)
        parts = heard.split(BORDER)
        if len(parts) != len(sizes) + 2:
            raise ModelError(f"{type(self.processor).__name__} changes the text between images; it cannot be followed.")
        inputs = {name: value for name, value in outputs.items() if name not in OF_THE_TEXT and "pixel" not in name}
        return Expansion(texts=tuple(parts[1:-1]), inputs=inputs)

    def frame(self, question: str, sizes: tuple[Size, ...]) -> str:
        """The whole prompt as a processor without a chat template lays it out: images first, then the question."""
        from PIL import Image

        blank = [Image.new("RGB", size) for size in sizes]
        return self._process(self.placeholder * len(sizes) + question, blank)[0]

    def _process(self, text: str, images: Sequence[Image]) -> tuple[str, Mapping[str, Any]]:
        """The text that the tokenizer is given, and all outputs."""
        standin = Standin(self.tokenizer)
        outputs = self._with(standin)(text=[text], images=[list(images)], return_tensors="pt")
        return standin.heard[0], outputs

    def inputs(self, images: Sequence[Sequence[Image]], ids: Tensor, *, aligned: bool) -> dict[str, Tensor]:
        """The model's arguments for the images of a batch.

        Args:
            images: of each row.
            ids: (R, T) tokens of the rows.
            aligned: whether the arguments have one entry for each row, rows without images among them.
        """
        rows = [i for i, row in enumerate(images) if row or aligned]
        given = [list(images[i]) for i in rows]
        # only what has one entry for each row depends on the tokens beside the images
        standin = Standin(self.tokenizer, ids=[ids[i].tolist() for i in rows] if aligned else None)
        text = [self.placeholder * len(row) or "-" for row in given]
        try:
            outputs = self._with(standin)(text=text, images=given, return_tensors="pt", padding=True)
        except ValueError as error:
            if all(given):
                raise
            what = f"Records with and without images do not go together here ({error}): train and ask them apart."
            raise DataError(what) from error
        return {name: value for name, value in outputs.items() if name not in OF_THE_TEXT}

    def of_images(self, ids: Sequence[int]) -> tuple[int, ...]:
        """1 for each token that belongs to an image, else 0, as the processor tells them apart."""
        known = set(getattr(self.processor, "image_token_ids", None) or [self.processor.image_token_id])
        return tuple(int(token in known) for token in ids)

    def token_types(self) -> dict[str, Tensor]:
        """The token types that the processor returns for an image, by name."""
        from PIL import Image

        blank = Image.new("RGB", (60, 50))
        outputs = self._with(Standin(self.tokenizer))(text=[self.placeholder], images=[[blank]], return_tensors="pt")
        return {name: value for name, value in outputs.items() if name in TOKEN_TYPES}

    def own(self, text: str, images: Sequence[Image], *, special: bool) -> dict[str, list[int]]:
        """The processor's own token ids and types of a text with placeholders."""
        more = {} if special else {"add_special_tokens": False}
        outputs = self.processor(text=[text], images=[list(images)] if images else None, **more)
        return {name: list(outputs[name][0]) for name in ("input_ids", *TOKEN_TYPES) if name in outputs}

    def _with(self, standin: Standin) -> ProcessorMixin:
        processor = copy.copy(self.processor)
        processor.tokenizer = standin
        return processor


# --- loading ---


def load_processor(source: str | Path, config: PretrainedConfig) -> ProcessorMixin:
    """The processor of a directory or hub id, its images always by PIL.

    Raises:
        ModelError: it has none, or one that cannot be loaded here.
    """
    from transformers import AutoTokenizer

    kind = _processor_class(source, config)
    try:
        settings, _ = kind.get_processor_dict(source)
        parts = {"tokenizer": AutoTokenizer.from_pretrained(source), "image_processor": load_image_processor(source)}
        unknown = [name for name in kind.get_attributes() if name not in parts and name != "video_processor"]
        if unknown:
            raise ModelError(f"{source}: its {kind.__name__} also wants {', '.join(unknown)}, which is not read here.")
        if "video_processor" in kind.get_attributes():
            kind, parts["video_processor"] = without_video(kind), UnreadVideo(_video_settings(source, settings))
        return kind.from_args_and_dict([parts[name] for name in kind.get_attributes()], settings)
    except (OSError, ValueError, TypeError, AttributeError, ImportError) as error:
        raise ModelError(f"The processor of {source} cannot be loaded: {error}") from error


def _processor_class(source: str | Path, config: PretrainedConfig) -> type[ProcessorMixin]:
    """The class that the checkpoint names, or transformers' for the architecture."""
    import transformers
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    settings, _ = transformers.ProcessorMixin.get_processor_dict(source)
    name = settings.get("processor_class") or PROCESSOR_MAPPING_NAMES.get(config.model_type)
    try:
        kind = getattr(transformers, str(name), None)
        if kind is not None:
            kind.get_attributes()  # a class whose libraries are missing raises here
    except ImportError as error:
        raise ModelError(f"{source}: {' '.join(str(error).split())}") from error
    if kind is None:
        raise ModelError(f"{source}: transformers has no processor for a {config.model_type} ({name}).")
    return kind


class UnreadVideo:
    """In the place of a video processor, which needs torchvision and is not used: its settings, to be written again."""

    _auto_class = None

    def __init__(self, settings: Mapping[str, Any]):
        self.settings = dict(settings)

    def to_dict(self) -> dict[str, Any]:
        """The settings as they were read."""
        return self.settings


def without_video(kind: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """A processor class that takes `UnreadVideo`: videos are not read here, and saving still works.

    It has the same name, since that is what a saved directory says its processor is.
    """

    class WithoutVideo(kind):
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            """Let `UnreadVideo` pass."""
            return (
                None
                if isinstance(argument, UnreadVideo)
                else super().check_argument_for_proper_class(argument_name, argument)
            )

        def to_dict(self) -> dict[str, Any]:
            """The settings of all parts, the video's as they were read."""
            written: dict[str, Any] = super().to_dict()
            video = written.pop("video_processor", None)
            if isinstance(video, UnreadVideo) and video.settings:
                written["video_processor"] = video.settings
            return written

    WithoutVideo.__name__ = kind.__name__
    WithoutVideo.__qualname__ = kind.__qualname__
    return WithoutVideo


def _video_settings(source: str | Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint's settings for videos, which stand in one of two files."""
    import json

    from transformers.utils import cached_file

    inside = settings.get("video_processor")
    if isinstance(inside, dict):
        return inside
    file = cached_file(source, "video_preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
    return json.loads(Path(file).read_text(encoding="utf-8")) if file else {}
