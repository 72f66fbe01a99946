"""Tiny checkpoints in the original layout of LLaVA-1.5 and ShareGPT4V, in all the shapes that they come in."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

TEXT = [
    "A chat between a curious user and an artificial intelligence assistant.",
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    "USER: What is it? ASSISTANT: A cat. USER: Where is it? ASSISTANT: top left",
    "USER: How many are two and two? ASSISTANT: four, I think",
    "the picture shows a red circle and a blue or green square, and now it is gone",
]

CLIP_PREPROCESSING = {
    "do_center_crop": True, "do_normalize": True, "do_resize": True, "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
}  # fmt: skip


@dataclass(frozen=True)
class Original:
    """A checkpoint with its tower.

    Attributes:
        checkpoint, tower: directories.
        model: what they hold, in float32 with the stored values.
    """

    checkpoint: Path
    tower: Path
    model: LlavaForConditionalGeneration


def write_original(
    directory: Path,
    *,
    kind: str = "llava",
    parts: int = 1,
    safetensors: bool = False,
    inside: bool = False,
    tower: str = "legacy",
    tower_name: str = "clip-vit-tiny",
    dtype: torch.dtype = torch.float16,
    tower_dtype: torch.dtype = torch.float32,
    vocabulary: int = 420,
    changes: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Original:
    """Write `directory/checkpoint` and `directory/TOWER_NAME` with random weights.

    Args:
        directory: where.
        kind: model_type, `llava` or `share4v`.
        parts: files of the checkpoint; several have an index.
        safetensors: instead of `.bin`.
        inside: the tower's weights are in the checkpoint, and only its config outside.
        tower: how its file names things: `legacy`, `v5` (no inner level) or `full` (with CLIP's text half).
        tower_name: of its directory.
        dtype: of the checkpoint.
        tower_dtype: of the tower.
        vocabulary: rows of the embedding; the tokenizer has 420.
        changes: to config.json.
        seed: of the weights.
    """
    checkpoint, outside = directory / "checkpoint", directory / tower_name
    checkpoint.mkdir(parents=True), outside.mkdir()
    config = _config(kind, str(outside), vocabulary) | dict(changes or {})
    vision = {
        "model_type": "clip_vision_model", "architectures": ["CLIPVisionModel"], "hidden_size": 32, "image_size": 28,
        "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 3, "patch_size": 14,
    }  # fmt: skip
    model = _model(config, vision, seed, dtype, tower_dtype)
    state = {_original_name(name): tensor for name, tensor in model.state_dict().items()}
    towers = {name: state.pop(name) for name in list(state) if name.startswith("vision_model.")}
    towers = {name: tensor.to(tower_dtype) for name, tensor in towers.items()}
    if inside:
        state |= {f"model.vision_tower.vision_tower.{name}": tensor for name, tensor in towers.items()}
    for layer in range(config["num_hidden_layers"]):
        state[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    state = {
        name: tensor if name.endswith("inv_freq") or "vision_tower" in name else tensor.to(dtype)
        for name, tensor in state.items()
    }
    _write_weights(checkpoint, state, parts=parts, safetensors=safetensors)
    _write_json(checkpoint / "config.json", config)
    _write_json(checkpoint / "generation_config.json", {"eos_token_id": 2, "pad_token_id": 0, "temperature": 0.9})
    (checkpoint / "tokenizer.model").write_bytes(_sentencepiece())
    _write_json(
        checkpoint / "tokenizer_config.json",
        {"legacy": False, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": None},
    )
    _write_json(outside / "preprocessor_config.json", {**CLIP_PREPROCESSING, "size": 28, "crop_size": 28})
    if tower == "full":
        towers |= {"logit_scale": torch.ones(()), "text_model.final_layer_norm.weight": torch.ones(8)}
        towers["vision_model.embeddings.position_ids"] = torch.arange(5)[None]
        vision = {"model_type": "clip", "vision_config": vision, "text_config": {"model_type": "clip_text_model"}}
    if tower == "v5":
        towers = {name.removeprefix("vision_model."): tensor for name, tensor in towers.items()}
    if not inside:
        _write_weights(outside, towers, parts=1, safetensors=tower == "v5")
    _write_json(outside / "config.json", vision)
    return Original(checkpoint, outside, model)


def _config(kind: str, tower: str, vocabulary: int) -> dict[str, Any]:
    names = {"llava": "LlavaLlamaForCausalLM", "share4v": "Share4VLlamaForCausalLM"}
    return {
        "model_type": kind, "architectures": [names[kind]], "vocab_size": vocabulary, "hidden_size": 32,
        "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "hidden_act": "silu", "rope_scaling": None,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "torch_dtype": "float16",
        "tie_word_embeddings": False, "use_cache": True, "image_aspect_ratio": "pad", "mm_hidden_size": 32,
        "mm_projector_type": "mlp2x_gelu", "mm_use_im_patch_token": False, "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch", "mm_vision_select_layer": -2, "mm_vision_tower": tower,
        "use_mm_proj": True,
    }  # fmt: skip


def _model(
    config: dict[str, Any], vision: dict[str, Any], seed: int, dtype: torch.dtype, tower_dtype: torch.dtype
) -> LlavaForConditionalGeneration:
    text = {key: config[key] for key in LlamaConfig().to_dict() if key in config and key not in ("model_type", "dtype")}
    text.pop("architectures", None)
    geometry = {key: value for key, value in vision.items() if key not in ("model_type", "architectures")}
    made = LlavaConfig(
        vision_config=CLIPVisionConfig(**geometry),
        text_config=LlamaConfig(**text),
        image_token_index=min(258, config["vocab_size"] - 1),
        vision_feature_layer=config["mm_vision_select_layer"],
        vision_feature_select_strategy="default" if config["mm_vision_select_feature"] == "patch" else "full",
    )
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(made).eval()
        for name, parameter in model.named_parameters():
            stored = tower_dtype if "vision_tower" in name else dtype
            spread = parameter * 5 if parameter.ndim > 1 else parameter + torch.randn_like(parameter) * 0.1
            parameter.copy_(spread.to(stored))
    return model


def _original_name(name: str) -> str:
    for ours, theirs in (
        ("model.language_model.", "model."),
        ("model.multi_modal_projector.linear_1.", "model.mm_projector.0."),
        ("model.multi_modal_projector.linear_2.", "model.mm_projector.2."),
        ("model.vision_tower.vision_model.", "vision_model."),
        ("model.vision_tower.", "vision_model."),
    ):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def _write_weights(directory: Path, state: dict[str, Tensor], *, parts: int, safetensors: bool) -> None:
    stem, end = ("model", "safetensors") if safetensors else ("pytorch_model", "bin")
    names = list(state)
    shares = [names[i::parts] for i in range(parts)]
    files = [f"{stem}-{i + 1:05}-of-{parts:05}.{end}" if parts > 1 else f"{stem}.{end}" for i in range(parts)]
    for file, share in zip(files, shares, strict=True):
        tensors = {name: state[name].contiguous().clone() for name in share}
        if safetensors:
            save_file(tensors, directory / file, metadata={"format": "pt"})
        else:
            torch.save(tensors, directory / file)
    if parts > 1:
        where = {name: file for file, share in zip(files, shares, strict=True) for name in share}
        _write_json(directory / f"{stem}.{end}.index.json", {"metadata": {}, "weight_map": where})


def _sentencepiece() -> bytes:
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT), model_writer=made, vocab_size=420, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, character_coverage=1.0,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2,
    )  # fmt: skip
    return made.getvalue()


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value))
