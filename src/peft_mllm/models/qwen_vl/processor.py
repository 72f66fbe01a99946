"""Tokenizer and image processor of Qwen-VL in one, with the ChatML template, as transformers' processors are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import BatchFeature, ProcessorMixin

from peft_mllm.models.qwen_vl.configuration import QwenVLConfig
from peft_mllm.models.qwen_vl.images import QwenVLImageProcessor
from peft_mllm.models.qwen_vl.tokenizer import QWenTokenizer


class QwenVLProcessor(ProcessorMixin):
    """Texts with `<img></img>` where an image is, and the images in that order."""

    def __init__(
        self, image_processor: QwenVLImageProcessor, tokenizer: QWenTokenizer, chat_template: str | None = None
    ):
        super().__init__(image_processor, tokenizer, chat_template=chat_template or tokenizer.chat_template)

    def __call__(
        self, images: Any = None, text: str | list[str] | None = None, *, return_tensors: Any = None, **kwargs: Any
    ) -> BatchFeature:
        """`input_ids`, `attention_mask`, and `pixel_values` (N, 3, S, S) where there are images.

        Raises:
            ValueError: there are more or fewer images than `<img></img>`.
        """
        data: dict[str, Any] = {}
        if text is not None:
            data |= self.tokenizer(text, return_tensors=return_tensors, **kwargs)
        if images is not None:
            flat = _flat(images)
            texts = [text] if isinstance(text, str) else text
            places = len(flat) if texts is None else sum(each.count("<img>") for each in texts)
            if places != len(flat):
                raise ValueError(f"There are {len(flat)} images, and {places} times <img></img> in the text.")
            data |= self.image_processor(images=flat, return_tensors=return_tensors)
        return BatchFeature(data, tensor_type=return_tensors)

    @classmethod
    def _get_arguments_from_pretrained(cls, source: Any, processor_dict: Any = None, **kwargs: Any) -> list[Any]:
        tokenizer = QWenTokenizer.from_pretrained(source, **kwargs)
        return [image_processor_of(source, processor_dict, **kwargs), tokenizer]


def image_processor_of(source: str | Path, saved: dict[str, Any] | None = None, **kwargs: Any) -> QwenVLImageProcessor:
    """The image processor that a directory has saved; the published one has none, and its config says the size."""
    settings = dict((saved or {}).get("image_processor") or {})
    if not settings:
        side = QwenVLConfig.from_pretrained(source, **kwargs).visual["image_size"]
        settings = {"size": {"height": side, "width": side}}
    return QwenVLImageProcessor.from_dict(settings)


def _flat(images: Any) -> list[Any]:
    """Images as one list, from one image, a list, or a list for each text."""
    if not isinstance(images, list | tuple):
        return [images]
    return [image for each in images for image in (each if isinstance(each, list | tuple) else [each])]
