"""Attention of a packed row of trees without a mask: parts by flash kernels, merged by their log-sum-exp.

softmax over the keys of all parts = sum over parts of exp(lse_part - lse) * out_part, with
lse = log(sum over parts of exp(lse_part)). Exact: nothing is computed that is masked away, and nothing twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from peft_mllm.attention import kernels
from peft_mllm.attention.kernels import Seen
from peft_mllm.attention.packing import Joined, Packing, Part


def cascade(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing | Joined,
    *,
    scale: float,
    learned: Sequence[Seen] = (),
) -> Tensor:
    """Attention of one packed row.

    Args:
        query: (1, H, T, d).
        key: (1, G, T, d); G divides H.
        value: (1, G, T, d).
        packing: of the row.
        scale: of the scores.
        learned: further keys and values.

    Returns:
        (1, H, T, d).
    """
    tensors = [query[0], key[0], value[0], *(tensor for each in learned for tensor in (each.key, each.value))]
    if torch.is_autocast_enabled(query.device.type):  # which knows torch's functions, and not this one
        tensors = [tensor.to(torch.get_autocast_dtype(query.device.type)) for tensor in tensors]
    out: Tensor = _Cascade.apply(packing.parts, tuple(each.part for each in learned), scale, *tensors)
    return out[None]


class _Cascade(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        parts: Sequence[Part],
        of_learned: Sequence[Part],
        scale: float,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *learned: Tensor,
    ) -> Tensor:
        out = torch.empty_like(query)  # (H, T, d)
        exact = torch.promote_types(query.dtype, torch.float32)
        lse = query.new_empty(query.shape[:2], dtype=exact)  # (H, T)
        ctx.parts, ctx.of_learned, ctx.scale = parts, of_learned, scale
        seen = _seen(ctx, key, value, learned)
        for (part, _, _), result in zip(seen, kernels.forward(query, seen, scale), strict=True):
            place = slice(part.query, part.query_end)
            if part.again:
                _merge(out[:, place], lse[:, place], *result)
            else:
                out[:, place], lse[:, place] = result
        ctx.save_for_backward(query, key, value, out, lse, *learned)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        query, key, value, out, lse, *learned = ctx.saved_tensors
        of_query, of_key, of_value = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        of_learned: list[Tensor] = []
        seen = _seen(ctx, key, value, learned)
        for (part, own_key, _), found in zip(
            seen, kernels.backward(grad, query, seen, out, lse, ctx.scale), strict=True
        ):
            _collect(of_query[:, part.query : part.query_end], found.query, more=part.again)
            if own_key is key:  # each is first met in the causal part of its own stretch
                _collect(of_key[:, part.key : part.key_end], found.key, more=not part.causal)
                _collect(of_value[:, part.key : part.key_end], found.value, more=not part.causal)
            else:
                of_learned += [found.key, found.value]
        return None, None, None, of_query, of_key, of_value, *of_learned


def _seen(ctx: Any, key: Tensor, value: Tensor, learned: Sequence[Tensor]) -> list[Seen]:
    """Each part with its keys and values, the row's own first."""
    own = [Seen(part, key, value) for part in ctx.parts]
    return own + [Seen(*each) for each in zip(ctx.of_learned, learned[::2], learned[1::2], strict=True)]


def _collect(into: Tensor, found: Tensor, *, more: bool) -> None:
    """Write a part's gradient, or add it where an earlier part wrote."""
    into.add_(found) if more else into.copy_(found)


def _merge(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> None:
    """Take another part's output (H, S, d) and log-sum-exp (H, S) into those so far, in place."""
    so_far = lse.contiguous()  # a stretch of a longer row is then rounded as the same stretch by itself
    both = torch.logaddexp(so_far, more_lse)
    out.copy_(out * (so_far - both).exp()[..., None] + more * (more_lse - both).exp()[..., None])
    lse.copy_(both)
