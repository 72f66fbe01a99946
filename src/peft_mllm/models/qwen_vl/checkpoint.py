"""A directory of Qwen-VL's weights, `.bin` or safetensors, in one file or many, as a model.

The model is made without memory (on the meta device) and each tensor put in its place as it is read, so that loading
takes the weights once. Every tensor lands, or nothing is loaded.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import GenerationConfig

from peft_mllm.models.base import Loading
from peft_mllm.models.qwen_vl.configuration import QwenVLConfig
from peft_mllm.models.qwen_vl.modelling import BARE_PARAMETERS, QwenVLForConditionalGeneration
from peft_mllm.weights import check_fit, land, read_weights


def load_model(directory: Path, loading: Loading) -> QwenVLForConditionalGeneration:
    """The model of a directory; with dtype `stored`, every tensor keeps its own type.

    Raises:
        ModelError: a file is damaged, or tensors are missing, left over, or of another shape.
    """
    config = QwenVLConfig.from_pretrained(directory)
    if loading.quantization is not None or hasattr(config, "quantization_config"):
        return _load_quantised(directory, config, loading)
    with torch.device("meta"):
        model = QwenVLForConditionalGeneration(config)
    model.set_attn_implementation(loading.attn_implementation)
    if not loading.weights:
        return model.eval()
    own = config.dtype if isinstance(config.dtype, torch.dtype) else torch.bfloat16  # as all published ones are
    dtypes = {"stored": None, "auto": own}
    dtype = dtypes[loading.dtype] if loading.dtype in dtypes else getattr(torch, loading.dtype)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    weights = ((BARE_PARAMETERS.get(name, name), tensor) for name, tensor in read_weights(directory))
    model.load_state_dict(land(weights, shapes, dtype, what=f"The weights of {directory}"), assign=True)
    model.tie_weights()
    config.dtype = dtype or own
    if (directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory)
    return model.eval()


def _load_quantised(directory: Path, config: QwenVLConfig, loading: Loading) -> QwenVLForConditionalGeneration:
    """Likewise by transformers, which quantises on the way; with a published Int4, by its own quantisation."""
    model, found = QwenVLForConditionalGeneration.from_pretrained(
        directory,
        config=config,
        dtype=loading.dtype,
        attn_implementation=loading.attn_implementation,
        quantization_config=loading.quantization,
        output_loading_info=True,
    )
    wrong = {
        "missing": sorted(found["missing_keys"]),
        "left over": sorted(found["unexpected_keys"]),
        "of another shape": [str(each) for each in found["mismatched_keys"]],
    }
    check_fit(wrong, what=f"The weights of {directory}")
    return model
