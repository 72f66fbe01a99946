"""Attention of a packed row of trees without a mask: parts by flash kernels, merged by their log-sum-exp.

softmax over the keys of all parts = sum over parts of exp(lse_part - lse) * out_part, with
lse = log(sum over parts of exp(lse_part)). Exact: nothing is computed that is masked away, and nothing twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from peft_mllm.attention import kernels
from peft_mllm.attention.packing import Packing


def cascade(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing,
    *,
    scale: float,
    learned: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Attention of one packed row.

    Args:
        query: (1, H, T, d).
        key: (1, G, T, d); G divides H.
        value: (1, G, T, d).
        packing: of the row.
        scale: of the scores.
        learned: keys and values (1, G, n, d) that the whole row sees.

    Returns:
        (1, H, T, d).
    """
    tensors = [query[0], key[0], value[0], *(each[0] for each in learned or ())]
    if torch.is_autocast_enabled(query.device.type):  # which knows torch's functions, and not this one
        tensors = [tensor.to(torch.get_autocast_dtype(query.device.type)) for tensor in tensors]
    out: Tensor = _Cascade.apply(packing, scale, *tensors)
    return out[None]


class _Cascade(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, packing: Packing, scale: float, query: Tensor, key: Tensor, value: Tensor, *learned: Tensor
    ) -> Tensor:
        out = torch.empty_like(query)  # (H, T, d)
        exact = torch.promote_types(query.dtype, torch.float32)
        lse = query.new_empty(query.shape[:2], dtype=exact)  # (H, T)
        for number, part in enumerate(packing.parts):
            place = slice(part.query, part.query_end)
            result = kernels.forward(query, key, value, part, scale)
            if number < 2:  # the first two parts have each query once
                out[:, place], lse[:, place] = result
            else:
                _merge(out[:, place], lse[:, place], *result)
        if learned:
            own_key, own_value = learned
            _merge(out, lse, *kernels.forward(query, own_key, own_value, packing.seeing(own_key.shape[1]), scale))
        ctx.save_for_backward(query, key, value, out, lse, *learned)
        ctx.packing, ctx.scale = packing, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        query, key, value, out, lse, *learned = ctx.saved_tensors
        packing, scale = ctx.packing, ctx.scale
        of_query, of_key, of_value = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for part in packing.parts:
            found = kernels.backward(grad, query, key, value, out, lse, part, scale)
            of_query[:, part.query : part.query_end] += found.query
            of_key[:, part.key : part.key_end] += found.key
            of_value[:, part.key : part.key_end] += found.value
        if not learned:
            return None, None, of_query, of_key, of_value
        own_key, own_value = learned
        part = packing.seeing(own_key.shape[1])
        found = kernels.backward(grad, query, own_key, own_value, out, lse, part, scale)
        return None, None, of_query + found.query, of_key, of_value, found.key, found.value


def _merge(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> None:
    """Take another part's output (H, S, d) and log-sum-exp (H, S) into those so far, in place."""
    both = torch.logaddexp(lse, more_lse)
    out.copy_(out * (lse - both).exp()[..., None] + more * (more_lse - both).exp()[..., None])
    lse.copy_(both)
