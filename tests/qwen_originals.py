"""A tiny Qwen-VL in the published layout: shards of `.bin`, qwen.tiktoken, and configs that name code files."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

import tiny

BARE = ("transformer.visual.proj", "transformer.visual.positional_embedding")


def published_names(model):
    """The model's tensors under the names of the published checkpoint."""
    return {
        next((bare for bare in BARE if name == f"{bare}.weight"), name): tensor.detach().clone().contiguous()
        for name, tensor in model.state_dict().items()
    }


def write_original(
    directory: Path, *, parts: int = 2, safetensors: bool = False, dtype: torch.dtype = torch.bfloat16, seed: int = 0
):
    """Write it, and return the family that it was made of, with the stored values in float32."""
    family = tiny.family("qwen_vl", seed=seed)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.to(dtype) for name, tensor in published_names(family.model).items()}
    family.model.load_state_dict({
        name: tensors[name.removesuffix(".weight") if name.removesuffix(".weight") in BARE else name].float()
        for name in family.model.state_dict()
    })  # fmt: skip
    _write_weights(directory, tensors, parts, safetensors)
    config = family.model.config
    told = {
        key: getattr(config, key)
        for key in (
            "attn_dropout_prob", "emb_dropout_prob", "hidden_size", "initializer_range", "intermediate_size",
            "kv_channels", "layer_norm_epsilon", "max_position_embeddings", "no_bias", "num_attention_heads",
            "num_hidden_layers", "rotary_emb_base", "rotary_pct", "scale_attn_weights", "seq_length", "use_cache",
            "use_dynamic_ntk", "use_logn_attn", "visual", "vocab_size", "tie_word_embeddings",
        )
    }  # fmt: skip
    told |= {
        "architectures": ["QWenLMHeadModel"],
        "auto_map": {
            "AutoConfig": "configuration_qwen.QWenConfig",
            "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
        },
        "model_type": "qwen", "tokenizer_type": "QWenTokenizer", "transformers_version": "4.31.0",
        "torch_dtype": str(dtype).removeprefix("torch."), "bf16": False, "fp16": False, "fp32": False,
        "use_flash_attn": False, "onnx_safe": None,
    }  # fmt: skip
    tokenizer = {
        "model_max_length": 8192,
        "tokenizer_class": "QWenTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]},
    }
    generation = {
        "chat_format": "chatml", "do_sample": True, "eos_token_id": 256, "max_new_tokens": 512,
        "max_window_size": 6144, "pad_token_id": 256, "top_k": 0, "top_p": 0.3, "transformers_version": "4.31.0",
    }  # fmt: skip
    for name, content in (("config", told), ("tokenizer_config", tokenizer), ("generation_config", generation)):
        (directory / f"{name}.json").write_text(json.dumps(content))
    lines = (f"{base64.b64encode(bytes([byte])).decode()} {byte}\n" for byte in range(256))
    (directory / "qwen.tiktoken").write_text("".join(lines))
    return family


def _write_weights(directory, tensors, parts, safetensors):
    names = sorted(tensors)
    shards = [names[i::parts] for i in range(parts)]
    stem, end, write = ("model", "safetensors", save_file) if safetensors else ("pytorch_model", "bin", torch.save)
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"{stem}.{end}" if parts == 1 else f"{stem}-{number:05d}-of-{parts:05d}.{end}"
        write({name: tensors[name] for name in shard}, directory / file)
        weight_map |= dict.fromkeys(shard, file)
    if parts > 1:
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (directory / f"{stem}.{end}.index.json").write_text(json.dumps(index))
