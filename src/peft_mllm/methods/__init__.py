"""SHELF of methods: one file per method. To add one, see docs/add-a-method.md."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peft_mllm.shelf import Item, Shelf

if TYPE_CHECKING:
    from peft_mllm.methods.base import Method

METHODS: Shelf[Method[Any]] = Shelf("method", package=__name__, items={
    "none": Item("none:NoMethod", "the base as it is: zero-shot, or with connector or tower tuned alone"),
    "full": Item("full:Full", "every parameter of the language model"),
    "lora": Item("lora:LoRA", "low-rank updates of linears (Hu et al. 2021); rsLoRA, DoRA, PiSSA as options"),
    "ia3": Item("ia3:IA3", "vectors that scale keys, values and inner activations (Liu et al. 2022)"),
    "adapter": Item("adapter:Adapter", "bottlenecks before, after or beside linears (Houlsby et al. 2019)"),
    "prefix": Item("prefix:Prefix", "learned keys and values in every layer (Li and Liang 2021)"),
    "layernorm": Item("layernorm:LayerNorm", "the decoder's normalisations alone (Zhao et al. 2024)"),
    "peft": Item("any_peft:AnyPeft", "any other method of peft, by its type name and config fields"),
})  # fmt: skip

__all__ = ["METHODS", "Item"]
