"""Lean decoder layers: put on a model, and taken off again without a trace.

Each half of a layer that is understood runs as one function; one that is not, because of the method in it, runs as its
modules do. The last layer goes on with the answers' tokens alone after its attention: nothing reads the others.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from peft_mllm.anatomy import Anatomy
from peft_mllm.lean.form import Parts, read, with_functions
from peft_mllm.lean.kernels import Kernels

NOT_FOR_ATTENTION = ("position_embeddings", "places", "past_key_values")
"""Arguments of a layer that are used up before its attention."""
Answers = tuple[Tensor, Tensor]
"""(A,) rows and (A,) columns of a batch whose hidden states are read."""


@dataclass(frozen=True)
class Levers:
    """What is used.

    Attributes:
        functions: one autograd function for each half of a layer.
        trim: the last layer computes the answers' tokens alone after its attention.
        compiled: the elementwise work by torch.compile.
    """

    functions: bool = True
    trim: bool = True
    compiled: bool = False


@dataclass
class Lean:
    """What is put on a decoder.

    Attributes:
        layers: how many of its layers are computed by functions, wholly or in part.
        last: the layer that goes on with the answers alone; None where there is none.
        on: false while the layers are to be as they were.
        answers: of the forward that is about to begin; None where all hidden states are wanted.
        trimmed: whether the last forward gave those of the answers alone, as (1, A, D).
        hook: hands the answers to the layers.
    """

    layers: int = 0
    last: nn.Module | None = None
    on: bool = True
    answers: Answers | None = None
    trimmed: bool = False
    hook: RemovableHandle | None = None

    @property
    def used(self) -> bool:
        """Whether any layer is another than before."""
        return self.layers > 0 or self.last is not None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Until the context ends, the layers are as they were."""
        self.on = False
        try:
            yield
        finally:
            self.on = True


def install(
    base: PreTrainedModel,
    anatomy: Anatomy,
    levers: Levers | None = None,
    *,
    whole: Callable[[nn.Module], AbstractContextManager[None]] | None = None,
) -> Lean:
    """Compute a model's decoder leanly from now on, as far as its layers are understood.

    Args:
        base: the model, with a method's layers in it.
        anatomy: of its family.
        levers: what is used; all but compiling where left out.
        whole: a context in which a layer's weights are whole, where they lie in pieces.

    Raises:
        SpecError: `compiled` is asked for, and there is no compiler here.
    """
    remove(base, anatomy)
    levers = levers or Levers()
    kernels = Kernels.compiled() if levers.compiled else Kernels()
    known = []
    for layer in layers_of(base, anatomy):
        parts = read(layer, anatomy)
        with whole(layer) if whole else nullcontext():
            known.append(with_functions(parts, kernels) if parts and levers.functions else parts)
    return put_on(base, anatomy, known, trim=levers.trim)


def put_on(base: PreTrainedModel, anatomy: Anatomy, known: Sequence[Parts | None], *, trim: bool) -> Lean:
    """Let a decoder's layers compute by these parts; one without stays as it is."""
    lean, layers = Lean(), layers_of(base, anatomy)
    for layer, parts in zip(layers, known, strict=True):
        if parts is None:
            continue
        if trim and layer is layers[-1]:
            lean.last = layer
        lean.layers += parts.by_functions
        if parts.by_functions or layer is lean.last:
            layer.__dict__ |= {"lean": lean, "lean_parts": parts}
            kind: Any = type(layer)
            layer.__class__ = _lean_class(kind)
    decoder = base.get_submodule(anatomy.llm)
    decoder.__dict__["lean"] = lean
    if lean.last is not None:
        lean.hook = decoder.register_forward_pre_hook(_hand_over, with_kwargs=True)
    return lean


def read_all(base: PreTrainedModel, anatomy: Anatomy) -> list[Parts | None]:
    """The parts of each layer; None for one that has not the standard form."""
    return [read(layer, anatomy) for layer in layers_of(base, anatomy)]


def layers_of(base: PreTrainedModel, anatomy: Anatomy) -> list[nn.Module]:
    """The decoder's layers."""
    return list(base.get_submodule(anatomy.layers).children())


def parts_of(base: PreTrainedModel, anatomy: Anatomy) -> list[Parts | None]:
    """By what each layer of a model computes; None for one that is as it was."""
    return [layer.__dict__.get("lean_parts") for layer in layers_of(base, anatomy)]


def remove(base: PreTrainedModel, anatomy: Anatomy) -> None:
    """Take off what `install` put on."""
    lean: Lean | None = base.get_submodule(anatomy.llm).__dict__.pop("lean", None)
    if lean is not None and lean.hook is not None:
        lean.hook.remove()
    for layer in layers_of(base, anatomy):
        if layer.__dict__.pop("lean_parts", None) is not None:
            del layer.__dict__["lean"]
            layer.__class__ = type(layer).__mro__[1]


def lean_of(decoder: nn.Module) -> Lean | None:
    """What is put on a decoder."""
    return decoder.__dict__.get("lean")


def _hand_over(decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Give the layers the answers as an argument, so that a checkpointed one has them when it is computed again."""
    lean: Lean = decoder.lean
    answers, lean.answers, lean.trimmed = lean.answers, None, False
    return args, kwargs if answers is None else {**kwargs, "answers": answers}


@cache
def _lean_class(kind: Any) -> type[nn.Module]:
    """A layer's class with our forward; a class and not an attribute, since transformers checkpoints by class."""

    def forward(self: Any, hidden_states: Tensor, **kwargs: Any) -> Any:
        lean: Lean = self.lean
        parts: Parts = self.lean_parts
        answers: Answers | None = kwargs.pop("answers", None)
        angles = _angles(kwargs, parts.attention.head_dim)
        if angles is None or kwargs.get("past_key_values") is not None or not (lean.on and parts.adapted):
            return kind.forward(self, hidden_states, **kwargs)
        cos, sin, factor = angles
        query, key, value = parts.project(hidden_states, cos, sin)
        query = query if factor is None else query * factor.to(query.dtype)
        mixed = _attend(parts.attention, query, key, value, **kwargs).flatten(2)  # (R, T, H d)
        if answers is not None and self is lean.last:
            mixed, hidden_states = mixed[answers][None], hidden_states[answers][None]  # (1, A, ...)
            lean.trimmed = True
        return parts.after(mixed, hidden_states)

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


def _angles(kwargs: dict[str, Any], width: int) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Cosines and sines (R, T, 1, d), and a factor on the queries; None where a model has them in another form."""
    if (places := kwargs.get("places")) is not None:
        return places.cos.transpose(1, 2), places.sin.transpose(1, 2), places.query_scale
    cos, sin = kwargs.get("position_embeddings") or (None, None)
    if cos is None or sin is None or cos.ndim != 3 or cos.shape[-1] != width:
        return None
    return cos[:, :, None], sin[:, :, None], None


def _attend(attention: Any, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
    """(R, T, H, d) by transformers' attention interface, asked as the model's own attention asks it."""
    name = attention.config._attn_implementation
    eager = name == "eager"
    call = sys.modules[type(attention).__module__].eager_attention_forward if eager else ALL_ATTENTION_FUNCTIONS[name]
    if hasattr(attention, "sliding_window"):
        kwargs["sliding_window"] = attention.sliding_window
    told = {name: value for name, value in kwargs.items() if name not in NOT_FOR_ATTENTION}
    mask = told.pop("attention_mask", None)
    dropout = getattr(attention, "attention_dropout", None) or getattr(attention.config, "attn_dropout_prob", 0.0)
    told |= {"dropout": dropout if attention.training else 0.0, "scaling": attention.scaling}
    mixed: Tensor = call(attention, query, key, value, mask, **told)[0]
    return mixed
