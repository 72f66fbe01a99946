"""Learned keys and values in front of every layer's own: peft's PREFIX_TUNING through the attention port."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel, PeftType
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from peft_mllm.anatomy import Anatomy
from peft_mllm.attention.kernels import Seen
from peft_mllm.attention.packing import Joined, seeing
from peft_mllm.attention.port import Port, open_port, port_of


class LearnedPrefix:
    """The keys and values of a PEFT prefix encoder, for the layers of one decoder.

    The table is computed once per forward of the decoder and read by its layers, also when a checkpointed layer
    is computed again.
    """

    def __init__(self, model: PeftModel):
        config = model.active_peft_config
        self.length: int = config.num_virtual_tokens
        self._encoder = model.prompt_encoder[model.active_adapter]
        self._shape = (self.length, 2 * config.num_layers, config.num_attention_heads)
        self._table: Tensor | None = None
        self.hook: RemovableHandle | None = None

    def refresh(self, device: torch.device) -> None:
        """Compute the table (2 L, heads, n, head width) from the encoder's present weights."""
        tokens = torch.arange(self.length, device=device)
        flat = self._encoder(tokens)  # (n, 2 L * heads * head width)
        self._table = flat.view(*self._shape, -1).permute(1, 2, 0, 3)

    def keys_values(self, layer: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's keys and values, each (B, heads, n, head width), in the type and batch of `like`."""
        assert self._table is not None, "the decoder's hook refreshes the table before its layers run"
        key, value = self._table[2 * layer], self._table[2 * layer + 1]
        shape = (like.shape[0], -1, -1, -1)
        return key.to(like.dtype).expand(shape), value.to(like.dtype).expand(shape)

    def seen(self, layer: int, like: Tensor, *, begin: int = 0) -> list[Seen]:
        """The layer's keys and values for a packed row `like` (1, G, T, d), which begins somewhere in a joined one."""
        key, value = self.keys_values(layer, like)
        return [Seen(seeing(self.length, begin=begin, length=like.shape[2]), key[0], value[0])]


class LearnedOfSeveral:
    """The learned prefixes of several runs, each seen by the run's own row of a joined row.

    Args:
        prefixes: of each run; None where it has none.
        packing: of their rows.
    """

    def __init__(self, prefixes: Sequence[LearnedPrefix | None], packing: Joined):
        self._prefixes, self._packing = prefixes, packing

    def seen(self, layer: int, like: Tensor) -> list[Seen]:
        """The layer's keys and values for a joined row `like` (1, G, T, d)."""
        rows = zip(self._prefixes, self._packing.begins, self._packing.rows, strict=True)
        return [
            learned
            for prefix, begin, row in rows
            if prefix is not None
            for learned in prefix.seen(layer, like[:, :, begin : begin + row.length], begin=begin)
        ]


def connect_prefix(model: PeftModel, anatomy: Anatomy) -> PreTrainedModel:
    """Join a PREFIX_TUNING model's learned keys and values in the attention port of its base model.

    Returns the base model, whose own forward and generate now use the prefix; PeftModel's forward, which would
    add it once more, must not be called.
    """
    base: PreTrainedModel = model.get_base_model()
    port = open_port(base, anatomy)
    port.learned = prefix = LearnedPrefix(model)
    prefix.hook = base.get_submodule(anatomy.llm).register_forward_pre_hook(_before_decoder(port), with_kwargs=True)
    return base


def disconnect_prefix(decoder: PreTrainedModel) -> None:
    """Undo `connect_prefix`: no learned keys, no hook."""
    port = port_of(decoder)
    if port is None or port.learned is None:
        return
    if port.learned.hook is not None:
        port.learned.hook.remove()
    port.learned = None


@contextmanager
def prefix_off(decoder: PreTrainedModel) -> Iterator[None]:
    """Until the context ends, let a decoder's attention pass by its learned keys and values, if there are any."""
    port = port_of(decoder) or Port()
    learned, port.learned = port.learned, None
    try:
        yield
    finally:
        port.learned = learned


def uses_prefix_port(model: nn.Module) -> bool:
    """Whether a model is a PEFT model whose active adapter is a learned prefix."""
    return isinstance(model, PeftModel) and model.active_peft_config.peft_type == PeftType.PREFIX_TUNING


def _before_decoder(port: Port) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """A hook that refreshes the table and, as peft does, counts the text's positions from n on."""

    def hook(decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if port.learned is None:  # switched off: the base counts for itself
            return args, kwargs
        embeds = kwargs.get("inputs_embeds")
        tokens = embeds if embeds is not None else kwargs["input_ids"]
        port.learned.refresh(tokens.device)
        positions = kwargs.get("position_ids")
        if positions is None:
            cache = kwargs.get("past_key_values")
            past = cache.get_seq_length() if cache is not None else 0
            positions = torch.arange(past, past + tokens.shape[1], device=tokens.device)[None]
        return args, {**kwargs, "position_ids": positions + port.learned.length}

    return hook
