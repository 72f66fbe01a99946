"""SHELF of model families: one file per family."""

from peft_mllm.models.base import Family
from peft_mllm.shelf import Item, Shelf

MODELS: Shelf[Family] = Shelf("model family", package=__name__, items={
    "llava": Item("llava:Llava", "LLaVA-1.5 in HF format (CLIP tower, MLP connector, Llama decoder), vicuna v1 chat"),
})  # fmt: skip

__all__ = ["MODELS", "Family", "Item"]
