"""SHELF of model families: one file per family."""

from peft_mllm.models.base import Family
from peft_mllm.shelf import Item, Shelf

MODELS: Shelf[Family] = Shelf("model family", package=__name__, items={
    "llava": Item("llava:Llava", "LLaVA-1.5 in HF format (CLIP tower, MLP connector, Llama decoder), vicuna v1 chat"),
    "qwen_vl": Item("qwen_vl.family:QwenVL", "Qwen-VL and Qwen-VL-Chat (ViT, resampler, Qwen-7B decoder), ChatML chat"),
    # the last that is tried: it takes what no other knows
    "generic": Item("generic.family:Generic", "any other image-text model of transformers, with its own chat template"),
})  # fmt: skip

__all__ = ["MODELS", "Family", "Item"]
