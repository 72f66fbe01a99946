"""The attention port of a decoder: what stands between its layers and the backend that they ask.

It serves three things inside the function that transformers calls after rotary positions and cache: packed rows of
trees (cascade.py), learned keys and values (learned.py), and, for everything else, the backend that the model had. So
neither the cache, nor gradient checkpointing, nor the way a model makes its positions has to know of any of them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from peft_mllm.anatomy import Anatomy
from peft_mllm.attention.cascade import cascade
from peft_mllm.attention.kernels import Seen
from peft_mllm.attention.masks import widen_mask
from peft_mllm.attention.packing import Joined, Packing
from peft_mllm.errors import MethodError

if TYPE_CHECKING:
    from peft_mllm.attention.learned import LearnedOfSeveral, LearnedPrefix

PORT = "peft_mllm_"
"""In front of a backend's name: that backend, through the port."""
NOT_IN_CASCADE = ("softcap", "s_aux", "position_bias")
"""What some models ask of their attention beside products and a softmax, by transformers' names."""


@dataclass
class Port:
    """What the layers of one decoder find when they attend.

    Attributes:
        packing: of the row that is being computed; None where a mask says what sees what. It stays until the next
            forward, since a checkpointed layer is computed again in the backward pass.
        learned: keys and values in front of every layer's own.
        of_several: those of several runs in one row.
    """

    packing: Packing | Joined | None = None
    learned: LearnedPrefix | None = None
    of_several: LearnedOfSeveral | None = None


NOTHING = Port()
"""What an attention finds that has no port: one that looks across to the images."""


def backend_of(decoder: PreTrainedModel) -> str:
    """Transformers' name of the attention backend, below the port where there is one."""
    return decoder.config._attn_implementation.removeprefix(PORT)


def port_of(decoder: nn.Module) -> Port | None:
    """The port that is open on a decoder."""
    return decoder.__dict__.get("port")


def open_port(base: PreTrainedModel, anatomy: Anatomy) -> Port:
    """The port of a model's decoder, over the backend that it has; opened where it is not yet."""
    decoder = base.get_submodule(anatomy.llm)
    port: Port | None = port_of(decoder)
    if port is None:
        port = Port()
        for module in (decoder, *_attentions(base, anatomy)):
            module.port = port
    backend = backend_of(decoder)
    name = PORT + backend
    AttentionInterface.register(name, _attention(backend))
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[backend])
    decoder.set_attn_implementation(name)
    return port


def close_port(base: PreTrainedModel, anatomy: Anatomy) -> None:
    """Take the port away: the decoder asks its backend itself."""
    decoder = base.get_submodule(anatomy.llm)
    for module in (decoder, *_attentions(base, anatomy)):
        module.__dict__.pop("port", None)
    decoder.set_attn_implementation(backend_of(decoder))


def longest_path(decoder: PreTrainedModel) -> float:
    """Tokens that a sample may have where packed rows are to be computed without a mask: a sliding window ends them."""
    config = decoder.config
    window = getattr(config, "sliding_window", None)
    slides = getattr(config, "use_sliding_window", True) and "sliding_attention" in (
        getattr(config, "layer_types", None) or ["sliding_attention"]
    )
    return window if window is not None and slides else float("inf")


def _attentions(base: PreTrainedModel, anatomy: Anatomy) -> list[Any]:
    """The self-attention of each layer; a layer that only looks across to the images has none."""
    layers = [dict(layer.named_modules()) for layer in base.get_submodule(anatomy.layers)]
    return [modules[anatomy.self_attention] for modules in layers if anatomy.self_attention in modules]


def _attention(backend: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The function that transformers calls in the place of a backend's."""

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        port: Port = module.__dict__.get("port") or NOTHING
        if port.packing is not None and _is_packed(attention_mask, query, port.packing):
            more = port.of_several or port.learned
            seen = [] if more is None else more.seen(module.layer_idx, key)
            return _cascade(query, key, value, port.packing, seen, **kwargs), None
        call = _backend_function(backend, module)
        if port.learned is None:
            return call(module, query, key, value, attention_mask, **kwargs)
        learned = port.learned.keys_values(module.layer_idx, key)
        width = learned[0].shape[2]
        mask = widen_mask(attention_mask, width, query.shape[2], key.shape[2], backend, query.device)
        key, value = torch.cat([learned[0], key], dim=2), torch.cat([learned[1], value], dim=2)
        return call(module, query, key, value, mask, **kwargs)

    return attention


def _is_packed(mask: Any, query: Tensor, packing: Packing | Joined) -> bool:
    """Whether it is the packed row that is computed, and not something that was asked of the model by itself since."""
    alone = isinstance(mask, Tensor) and mask.shape == (1, 1, 1, 1)
    return alone and query.shape[0] == 1 and query.shape[2] == packing.length


def _cascade(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing | Joined,
    learned: Sequence[Seen],
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> Tensor:
    """Attention (1, T, H, d) of a packed row.

    Raises:
        MethodError: the model asks for what the parts of a cascade cannot give.
    """
    asked = [name for name in NOT_IN_CASCADE if kwargs.get(name) is not None]
    asked += ["dropout"] if dropout else []
    asked += ["sliding_window"] if sliding_window is not None and sliding_window < packing.longest else []
    if asked:
        raise MethodError(f"this model's attention has {', '.join(asked)}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return cascade(query, key, value, packing, scale=scale, learned=learned).transpose(1, 2)


def _backend_function(backend: str, module: nn.Module) -> Callable[..., Any]:
    """Transformers' function of a backend; each model's module has its own eager one."""
    if backend == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[backend]
