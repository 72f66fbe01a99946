"""Checkpoints in the original layout of LLaVA-1.5 (7B, 13B) and ShareGPT4V, as transformers' own LLaVA model.

Such a directory has Llama's flat config with `mm_*` keys, Llama's weights beside `model.mm_projector.{0,2}`, and the
vision tower elsewhere. The model is made without memory (on the meta device) and each tensor is put in its place as it
is read, so that loading takes the weights once, and not twice. Every tensor lands, or nothing is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_mllm.errors import ModelError
from peft_mllm.files import read_json
from peft_mllm.models.llava_tokenizer import load_tokenizer
from peft_mllm.models.llava_tower import REMEDY, Tower, find_tower, is_unused, tower_weight
from peft_mllm.record import IMAGE_MARK
from peft_mllm.weights import land, local_directory, read_weights, weight_names

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import LlavaConfig, LlavaForConditionalGeneration, PreTrainedTokenizerBase

    from peft_mllm.models.base import Loading

MODEL_TYPES = ("llava", "llava_llama", "share4v")

_LANGUAGE_MODEL = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps",
    "use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "attention_bias",
    "attention_dropout", "mlp_bias",
)  # fmt: skip
_PREPROCESSING = (
    "do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor", "do_normalize",
    "image_mean", "image_std", "do_convert_rgb",
)  # fmt: skip
_ENDS = ("bos_token_id", "eos_token_id", "pad_token_id", "max_length")
_SAMPLING = ("do_sample", "temperature", "top_p", "top_k")

_RENAMED = (
    (re.compile(r"model\.mm_projector\.0\."), "model.multi_modal_projector.linear_1."),
    (re.compile(r"model\.mm_projector\.2\."), "model.multi_modal_projector.linear_2."),
    (re.compile(r"model\.(?=(?:embed_tokens|layers|norm)\.)"), "model.language_model."),
)
_HEAD, _EMBEDDING = "lm_head.weight", "model.language_model.embed_tokens.weight"
_TOWER = "model.vision_tower"


def is_original(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of the original layout; HF's shares the model_type, but has one config in another."""
    return config.get("model_type") in MODEL_TYPES and "mm_vision_tower" in config and "vision_config" not in config


def load_original(
    source: str | Path, *, loading: Loading
) -> tuple[LlavaForConditionalGeneration, PreTrainedTokenizerBase, Any, tuple[str, ...]]:
    """Model, tokenizer and image processor of a directory or hub id, and notes on them.

    Args:
        source: has config.json, tokenizer.model, and weights as `.bin` or safetensors, in one file or several.
        loading: with dtype `stored`, every tensor keeps its own type: for writing, since types may differ.

    Raises:
        ModelError: something is missing, left over or of another shape, or is not supported; says what.
    """
    directory = local_directory(source)
    config = dict(read_json(directory / "config.json"))
    _check(config, source)
    if loading.quantization is not None:
        raise ModelError(
            f"{source} cannot be quantised while it is loaded, since it is in the original layout. Write it in the "
            "Hugging Face format first: peft-mllm convert SRC DST"
        )
    inside = any(tower_weight(name) for name in weight_names(directory))
    tower = find_tower(str(source), config, given=loading.vision_tower, inside=inside)
    if config.get("mm_hidden_size", tower.config.hidden_size) != tower.config.hidden_size:
        raise ModelError(
            f"{source}: its projector takes features of width {config['mm_hidden_size']} (mm_hidden_size), but the "
            f"vision tower {tower.name} gives {tower.config.hidden_size}: it is another tower. {REMEDY}"
        )
    tokenizer = load_tokenizer(directory, rows=config.get("vocab_size", 32000))
    placeholder = tokenizer.convert_tokens_to_ids(IMAGE_MARK)
    made = _llava_config(config, tower, placeholder)
    model = _load_model(made, directory, tower, dtype=_dtype(loading.dtype, config), loading=loading)
    model.generation_config = _generation_config(directory, config)
    notes = tuple(filter(None, (tower.note, tower.doubt)))
    return model, tokenizer, _image_processor(tower, pad=config.get("image_aspect_ratio") == "pad"), notes


def _check(config: Mapping[str, Any], source: str | Path) -> None:
    """Raise `ModelError` when a config asks for what transformers' LLaVA cannot do, or LLaVA-1.5 never had."""
    projector, ratio = config.get("mm_projector_type", "linear"), config.get("image_aspect_ratio")
    layer, feature = config.get("mm_vision_select_layer"), config.get("mm_vision_select_feature", "patch")
    resampler, around = config.get("mm_resampler_type"), config.get("mm_use_im_start_end")
    refused = {
        f"mm_projector_type: {projector} (transformers' LLaVA has mlp2x_gelu)": projector != "mlp2x_gelu",
        f"image_aspect_ratio: {ratio} (LLaVA-1.5 has pad or square)": ratio not in (None, "pad", "square"),
        f"mm_vision_select_layer: {layer} (one layer's number is wanted)": not isinstance(layer, int),
        f"mm_vision_select_feature: {feature} (patch or cls_patch)": feature not in ("patch", "cls_patch"),
        f"mm_resampler_type: {resampler} (LLaVA-1.5 has none)": bool(resampler),
        "mm_use_im_start_end: true (LLaVA-1.5 puts no tokens around an image)": bool(around),
        "quantization_config (only weights that are not quantised are read)": bool(config.get("quantization_config")),
    }
    found = [what for what, is_so in refused.items() if is_so]
    if found:
        raise ModelError(f"{source}: its config.json has what is not supported: {'; '.join(found)}.")


def _llava_config(config: Mapping[str, Any], tower: Tower, placeholder: int) -> LlavaConfig:
    from transformers import LlamaConfig, LlavaConfig

    scaling = dict(config.get("rope_scaling") or {})
    kind = scaling.pop("type", scaling.pop("rope_type", "default"))
    text = LlamaConfig(
        **{key: config[key] for key in _LANGUAGE_MODEL if key in config},
        rope_parameters={"rope_type": kind, "rope_theta": float(config.get("rope_theta", 10000.0)), **scaling},
    )
    whole = config.get("mm_vision_select_feature", "patch") == "cls_patch"
    side = tower.config.image_size // tower.config.patch_size
    return LlavaConfig(
        vision_config=tower.config,
        text_config=text,
        image_token_index=placeholder,
        image_seq_length=side * side + whole,
        projector_hidden_act="gelu",
        vision_feature_layer=config["mm_vision_select_layer"],
        vision_feature_select_strategy="full" if whole else "default",
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        pad_token_id=config.get("pad_token_id"),
    )


def _load_model(
    made: LlavaConfig, directory: Path, tower: Tower, *, dtype: torch.dtype | None, loading: Loading
) -> LlavaForConditionalGeneration:
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoModelForImageTextToText

    # Buffers (rotary frequencies) are in no file and must be real, in float32 whatever the weights are.
    with init_empty_weights(include_buffers=False):
        model: LlavaForConditionalGeneration = AutoModelForImageTextToText.from_config(
            made, attn_implementation=loading.attn_implementation, dtype=torch.float32
        )
    if not loading.weights:
        return model.eval()
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    weights = _all_weights(directory, tower, shapes)
    if made.tie_word_embeddings:
        del shapes[_HEAD]
        weights = ((name, tensor) for name, tensor in weights if name != _HEAD)
    landed = land(weights, shapes, dtype, what=f"The weights of {directory} and of its vision tower")
    if made.tie_word_embeddings:
        landed[_HEAD] = landed[_EMBEDDING]
    model.load_state_dict(landed, assign=True)
    model.tie_weights()
    return model.eval()


def _all_weights(directory: Path, tower: Tower, shapes: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Name in our model and tensor, of the checkpoint and of its tower; a name that has no place stays as it is."""
    level = "vision_model." if any(name.startswith(f"{_TOWER}.vision_model.") for name in shapes) else ""
    for name, tensor in read_weights(directory):
        inside = tower_weight(name)
        if name.endswith("rotary_emb.inv_freq") or (inside and (is_unused(name) or tower.directory)):
            continue
        yield f"{_TOWER}.{level}{inside}" if inside else _renamed(name), tensor
    for name, tensor in read_weights(tower.directory) if tower.directory else ():
        if not is_unused(name):
            yield f"{_TOWER}.{level}{tower_weight(name) or name}", tensor


def _renamed(name: str) -> str:
    for pattern, ours in _RENAMED:
        if pattern.match(name):
            return pattern.sub(ours, name, count=1)
    return name


def _dtype(wanted: str, config: Mapping[str, Any]) -> torch.dtype | None:
    import torch

    if wanted == "stored":
        return None
    # the published checkpoints are float16; one that does not say so is, too
    name = (config.get("torch_dtype") or config.get("dtype") or "float16") if wanted == "auto" else wanted
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _generation_config(directory: Path, config: Mapping[str, Any]) -> Any:
    """What ends an answer, and how it is drawn. Sampling's numbers are kept only where the original samples."""
    from transformers import GenerationConfig

    file = directory / "generation_config.json"
    read = dict(config) | (dict(read_json(file)) if file.is_file() else {})
    kept = ["bos_token_id", "eos_token_id", "pad_token_id", "max_length"] + (
        list(_SAMPLING) * bool(read.get("do_sample"))
    )
    return GenerationConfig(**{key: read[key] for key in kept if read.get(key) is not None})


def _image_processor(tower: Tower, *, pad: bool) -> Any:
    """CLIP's preprocessing as the tower's own file says; `pad` makes a square of the image first. Always by PIL."""
    from transformers import LlavaImageProcessorPil

    side = tower.config.image_size
    usual = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    said = {key: tower.preprocessor[key] for key in _PREPROCESSING if tower.preprocessor.get(key) is not None}
    return LlavaImageProcessorPil(**(usual | said), do_pad=pad)
