"""Where a decoder's tokens stand to each other, read from the rotary angles that its layers are given.

Models with multi-axis rotary positions (M-RoPE) count an image's rows and columns. A method that adds virtual tokens
in PeftModel's forward makes such a model count from zero instead: the loss still falls, and nothing says so. The
rotation of a token by that of the last one is what attention sees, whatever stands in front of both.

Models whose images look ahead are told so token by token; the same methods drop what tells them, and the mask is
another. That is read here, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peft_mllm.data.trees import collate, plant
from peft_mllm.evaluation import pad_token
from peft_mllm.matrix.bench import padded, samples
from peft_mllm.models import Family
from peft_mllm.tuned import Tuned, untouched

NEW_TOKENS = 3


@dataclass(frozen=True)
class Heard:
    """What the first decoder layer was given, call by call.

    Attributes:
        angles: (..., T, D) complex; none where the layer is given no rotary angles.
        masks: (T, T) true where a token sees another; None where that cannot be read.
    """

    angles: list[Tensor]
    masks: list[Tensor | None]


@torch.no_grad()
def rotations(tuned: Tuned) -> dict[str, Tensor]:
    """(..., T, D) complex: each token's rotation relative to the last, in training and when answering.

    Nothing where the first layer is given no rotary angles.
    """
    prompt = samples(tuned.family, answer=False)[0]
    with _listening(tuned) as in_training:
        tokens = _train_form(tuned)
    with _listening(tuned) as when_answering:
        asked = padded(tuned, [prompt], left=True)
        told = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
        tuned.generate(asked, **told, pad_token_id=pad_token(tuned))
    heard = {
        "in training": (in_training.angles, tokens),
        "when answering": (when_answering.angles, len(prompt.ids) + NEW_TOKENS - 1),
    }
    return {when: _relative(angles, tokens) for when, (angles, tokens) in heard.items() if angles}


@torch.no_grad()
def sights(tuned: Tuned) -> Tensor | None:
    """(T, T) whether a token of a sample sees another, in training; None where that cannot be read."""
    with _listening(tuned) as heard:
        tokens = _train_form(tuned)
    mask = heard.masks[0] if heard.masks else None
    return None if mask is None else mask[-tokens:, -tokens:]


def as_base(family: Family) -> Tuned:
    """A base that goes by its own rules: padded rows, with no positions given."""
    plain = untouched(family)
    return Tuned(family=plain.family, model=plain.model, base=plain.base, trees=False)


def _train_form(tuned: Tuned) -> int:
    """Compute a sample as training does; how many tokens it has."""
    sample = samples(tuned.family)[0]
    batch = padded(tuned, [sample])
    if tuned.trees:
        batch = collate(plant([sample], share=True), pixels=tuned.family.pixels, pad_id=pad_token(tuned))
    tuned.answer_logits(batch)
    return len(sample.ids)


def _relative(angles: list[Tensor], tokens: int) -> Tensor:
    """The calls one after the other, without what a method has put in front."""
    whole = torch.cat(angles, dim=-2)[..., -tokens:, :]
    return whole * whole[..., -1:, :].conj()


@contextmanager
def _listening(tuned: Tuned) -> Iterator[Heard]:
    """Collects what the first decoder layer is given for the first row of each call."""
    heard = Heard([], [])

    def listen(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = kwargs.get("position_embeddings")
        if given is not None:
            cos, sin = given
            heard.angles.append(torch.complex(cos.float(), sin.float())[..., 0, :, :])
        heard.masks.append(_visible(kwargs.get("attention_mask"), (*args, kwargs.get("hidden_states"))[0].shape[1]))

    first = tuned.base.get_submodule(f"{tuned.family.anatomy.layers}.0")
    hook = first.register_forward_pre_hook(listen, with_kwargs=True)
    try:
        yield heard
    finally:
        hook.remove()


def _visible(mask: Any, tokens: int) -> Tensor | None:
    """(T, T) of the first row; no mask means causal."""
    if mask is None:
        return torch.ones(tokens, tokens, dtype=torch.bool).tril()
    if not isinstance(mask, Tensor) or mask.ndim != 4:
        return None
    return mask[0, 0] if mask.dtype == torch.bool else mask[0, 0] == 0
