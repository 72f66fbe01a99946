"""Models in the Hugging Face format, for families whose architecture transformers has."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_mllm.errors import ModelError

if TYPE_CHECKING:
    from peft_mllm.models.base import Loading


def load_hf(source: str | Path, *, loading: Loading) -> Any:
    """The model of a directory or hub id, or its shape on the meta device where no weights are wanted.

    Raises:
        ModelError: a vision tower is given, which such a model has inside.
    """
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    if loading.vision_tower:
        raise ModelError(f"{source} has its vision tower inside: leave `vision_tower` out.")
    if loading.weights:
        return AutoModelForImageTextToText.from_pretrained(
            source,
            dtype=loading.dtype,
            attn_implementation=loading.attn_implementation,
            quantization_config=loading.quantization,
            use_safetensors=True,
        )
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(source)
        model = AutoModelForImageTextToText.from_config(config, attn_implementation=loading.attn_implementation)
    return model.eval()
