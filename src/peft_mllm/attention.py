"""The attention port: shared-prefix trees, and learned keys and values joined to every layer's own.

Trees are a mask (`tree_mask`). Learned prefixes are joined inside the attention function that transformers calls
after rotary positions and cache, so neither the cache, nor gradient checkpointing, nor the way a model makes its
positions has to know of them. The port wraps whatever backend the model had.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel, PeftType
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from peft_mllm.anatomy import Anatomy

PREFIX = -2
"""Segment of a token that all branches of its row share."""
PADDING = -1
"""Segment of a token that is not there."""
PORT = "peft_mllm_"
"""In front of a backend's name: that backend, through the port."""
TREE_BACKENDS = ("sdpa", "eager")
"""Backends that take any four-dimensional mask; with others each sample is a padded row of its own."""


def tree_mask(segments: Tensor) -> Tensor:
    """Attention mask of rows that hold a prefix and its branches.

    A token sees itself and the earlier tokens of its own branch and of the prefix:

        row  = [ p p p | a a | b b b ]      a sees p p p and its own past; b sees p p p and its own past

    Args:
        segments: (R, T) `PREFIX`, or the number of the token's branch, or `PADDING`.

    Returns:
        (R, 1, T, T) bool, true where attention is allowed. Nothing sees a padding token but itself: a row of a
        softmax with nothing to see is not a number.
    """
    length = segments.shape[1]
    query, key = segments[:, :, None], segments[:, None, :]
    past = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    itself = torch.eye(length, dtype=torch.bool, device=segments.device)
    return (past & ((key == query) | (key == PREFIX)) & (key != PADDING) | itself)[:, None]


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask as numbers to add to scores, for the eager backend: 0 where allowed, else the type's least."""
    scores = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return scores.masked_fill(~mask, torch.finfo(dtype).min)


def backend_of(decoder: PreTrainedModel) -> str:
    """Transformers' name of the attention backend, below the port where there is one."""
    return decoder.config._attn_implementation.removeprefix(PORT)


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


def connect_prefix(model: PeftModel, anatomy: Anatomy) -> PreTrainedModel:
    """Join a PREFIX_TUNING model's learned keys and values in the attention port of its base model.

    Returns the base model, whose own forward and generate now use the prefix; PeftModel's forward, which would
    add it once more, must not be called.
    """
    base: PreTrainedModel = model.get_base_model()
    decoder = base.get_submodule(anatomy.llm)
    prefix = LearnedPrefix(model)
    for layer in base.get_submodule(anatomy.layers):
        attention: Any = dict(layer.named_modules()).get(anatomy.self_attention)
        if attention is not None:  # a layer that only looks across to the images has none
            attention.learned_prefix = prefix
    _open_port(decoder)
    prefix.hook = decoder.register_forward_pre_hook(_before_decoder(prefix), with_kwargs=True)
    return base


def disconnect_prefix(base: PreTrainedModel, anatomy: Anatomy) -> None:
    """Undo `connect_prefix`: no learned keys, no hook, and the backend that was there."""
    decoder = base.get_submodule(anatomy.llm)
    for module in base.get_submodule(anatomy.layers).modules():
        prefix: LearnedPrefix | None = module.__dict__.pop("learned_prefix", None)
        if prefix is not None and prefix.hook is not None:
            prefix.hook.remove()
            prefix.hook = None
    decoder.set_attn_implementation(backend_of(decoder))


def uses_prefix_port(model: nn.Module) -> bool:
    """Whether a model is a PEFT model whose active adapter is a learned prefix."""
    return isinstance(model, PeftModel) and model.active_peft_config.peft_type == PeftType.PREFIX_TUNING


def _before_decoder(prefix: LearnedPrefix) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """A hook that refreshes the table and, as peft does, counts the text's positions from n on."""

    def hook(decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if not decoder.config._attn_implementation.startswith(PORT):  # switched off: the base counts for itself
            return args, kwargs
        embeds = kwargs.get("inputs_embeds")
        tokens = embeds if embeds is not None else kwargs["input_ids"]
        prefix.refresh(tokens.device)
        positions = kwargs.get("position_ids")
        if positions is None:
            cache = kwargs.get("past_key_values")
            past = cache.get_seq_length() if cache is not None else 0
            positions = torch.arange(past, past + tokens.shape[1], device=tokens.device)[None]
        return args, {**kwargs, "position_ids": positions + prefix.length}

    return hook


def _open_port(decoder: PreTrainedModel) -> None:
    """Route a decoder's attention through the port, over the backend that it has."""
    backend = backend_of(decoder)
    name = PORT + backend
    AttentionInterface.register(name, _port(backend))
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[backend])
    decoder.set_attn_implementation(name)


def _port(backend: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """An attention function that joins the module's learned prefix and calls the backend."""

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        call = _backend_function(backend, module)
        prefix: LearnedPrefix | None = getattr(module, "learned_prefix", None)
        if prefix is None:
            return call(module, query, key, value, attention_mask, **kwargs)
        prefix_key, prefix_value = prefix.keys_values(module.layer_idx, key)
        mask = widen_mask(attention_mask, prefix.length, query.shape[2], key.shape[2], backend, query.device)
        key, value = torch.cat([prefix_key, key], dim=2), torch.cat([prefix_value, value], dim=2)
        return call(module, query, key, value, mask, **kwargs)

    return attention


def _backend_function(backend: str, module: nn.Module) -> Callable[..., Any]:
    """Transformers' function of a backend; each model's module has its own eager one."""
    if backend == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[backend]


def widen_mask(
    mask: Any, extra: int, queries: int, keys: int, backend: str, device: torch.device
) -> Tensor | BlockMask | None:
    """A mask over `keys` columns, widened in front by `extra` columns that every query sees.

    Args:
        mask: (B, 1, queries, keys) bool or additive; (B, keys) with 1 for tokens that are there (flash);
            a BlockMask (flex); or None, which means causal.
        extra: columns to add.
        queries: rows of the attention.
        keys: columns before widening.
        backend: transformers' name of the attention backend.
        device: of the attention.
    """
    if isinstance(mask, BlockMask):
        return _widen_block_mask(mask, extra, queries, keys, device)
    if mask is not None:
        allowed = 0 if mask.is_floating_point() else 1
        front = torch.full((*mask.shape[:-1], extra), allowed, dtype=mask.dtype, device=mask.device)
        return torch.cat([front, mask], dim=-1)
    if "flash" in backend or queries == 1:
        # flash aligns a causal mask to the last key, and one query sees everything: both are right as they are
        return None
    causal = torch.ones(queries, extra + keys, dtype=torch.bool, device=device).tril(extra + keys - queries)
    return causal[None, None]


def _widen_block_mask(mask: BlockMask, extra: int, queries: int, keys: int, device: torch.device) -> BlockMask:
    inner = mask.mask_mod

    def widened(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key < extra) | inner(batch, head, query, (key - extra).clamp(min=0))

    batch, heads = mask.shape[:2]
    return create_block_mask(widened, batch, heads, queries, extra + keys, device=str(device))
