"""A directory of Qwen-VL's weights, `.bin` or safetensors, in one file or many, as a model.

The model is made without memory (on the meta device) and each tensor put in its place as it is read, so that loading
takes the weights once. Every tensor lands, or nothing is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig

from peft_mllm.errors import ModelError
from peft_mllm.models.base import Loading
from peft_mllm.models.qwen_vl.configuration import QwenVLConfig
from peft_mllm.models.qwen_vl.modelling import BARE_PARAMETERS, QwenVLForConditionalGeneration
from peft_mllm.weights import read_weights


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
    model.load_state_dict(_landed(directory, shapes, dtype), assign=True)
    model.tie_weights()
    config.dtype = dtype or own
    if (directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory)
    return model.eval()


def _landed(directory: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Our name -> copy of the tensor, in one type or, without one, in its own; all of them, and nothing else."""
    landed: dict[str, Tensor] = {}
    left_over, misshapen, missing = [], [], set(shapes)
    for stored, tensor in read_weights(directory):
        name = BARE_PARAMETERS.get(stored, stored)
        missing.discard(name)
        if name not in shapes:
            left_over.append(stored)
        elif tuple(tensor.shape) != shapes[name]:
            misshapen.append(f"{stored} {tuple(tensor.shape)} instead of {shapes[name]}")
        else:  # a copy: the file is mapped into memory and shall be free to go
            landed[name] = torch.empty(tensor.shape, dtype=dtype or tensor.dtype).copy_(tensor)
    _refuse(directory, {"missing": sorted(missing), "left over": left_over, "of another shape": misshapen})
    return landed


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
    _refuse(
        directory,
        {
            "missing": sorted(found["missing_keys"]),
            "left over": sorted(found["unexpected_keys"]),
            "of another shape": [str(each) for each in found["mismatched_keys"]],
        },
    )
    return model


def _refuse(directory: Path, wrong: Mapping[str, list[str]]) -> None:
    said = "; ".join(f"{len(names)} {what} ({_some(names)})" for what, names in wrong.items() if names)
    if said:
        raise ModelError(f"The weights of {directory} do not fit its config.json. Tensors: {said}.")


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
