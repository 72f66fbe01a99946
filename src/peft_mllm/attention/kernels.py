"""Attention over the stretches of one part, and its backward for a softmax that spans several parts.

A kernel gives the part's output and log-sum-exp. Its backward takes the output and the log-sum-exp of the WHOLE
softmax, merged over parts: with P = exp(S - lse) and D = rowsum(dO * O) the gradient dS = P * (dO V^T - D) is right for
each part by itself (the identity of ring attention, Liu et al. 2023, arXiv 2310.01889). So torch's stock flash
kernels serve, forward and backward, on the CPU (float32, bfloat16) and on CUDA (bfloat16, float16); elsewhere plain
products do.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peft_mllm.attention.packing import Part, Run

aten = torch.ops.aten


class Grads(NamedTuple):
    """Gradients of a part's queries (H, Tq, d), keys and values (G, Tk, d)."""

    query: Tensor
    key: Tensor
    value: Tensor


def forward(query: Tensor, key: Tensor, value: Tensor, part: Part, scale: float) -> tuple[Tensor, Tensor]:
    """The output (H, Tq, d) and log-sum-exp (H, Tq) of a part's queries.

    Args:
        query: (H, T, d) of the whole row.
        key: (G, T, d) likewise; G divides H.
        value: (G, T, d).
        part: which see which.
        scale: of the scores.
    """
    if _on_cuda(query):
        return _cuda_forward(query, key, value, part, scale)
    dense = _cpu_forward if query.device.type == "cpu" else _plain_forward
    outputs = [
        dense(_stretches(query, run.query, run.queries, run.count), *_keys(key, value, run), part.causal, scale)
        for run in part.runs
    ]
    return torch.cat([_row(out) for out, _ in outputs], 1), torch.cat([_row(lse) for _, lse in outputs], 1)


def backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, part: Part, scale: float
) -> Grads:
    """Gradients of a part's queries, keys and values.

    Args:
        grad: (H, T, d) of the output, for the whole row.
        query: as for `forward`.
        key: likewise.
        value: likewise.
        out: (H, T, d), merged over all parts.
        lse: (H, T), likewise.
        part: which see which.
        scale: of the scores.
    """
    if _on_cuda(query):
        return _cuda_backward(grad, query, key, value, out, lse, part, scale)
    dense = _cpu_backward if query.device.type == "cpu" else _plain_backward
    grads = [
        dense(
            _stretches(grad, run.query, run.queries, run.count),
            _stretches(query, run.query, run.queries, run.count),
            *_keys(key, value, run),
            _stretches(out, run.query, run.queries, run.count),
            _stretches(lse, run.query, run.queries, run.count),
            part.causal,
            scale,
        )
        for run in part.runs
    ]
    return Grads(*(torch.cat([_row(each[i]) for each in grads], 1) for i in range(3)))


def _stretches(row: Tensor, start: int, length: int, count: int) -> Tensor:
    """(count, H, length, ...) a view of neighbouring stretches of a row (H, T, ...)."""
    return row[:, start : start + count * length].unflatten(1, (count, length)).transpose(0, 1)


def _row(stretches: Tensor) -> Tensor:
    """(H, count * length, ...) stretches (count, H, length, ...) as a row again."""
    return stretches.transpose(0, 1).flatten(1, 2)


def _keys(key: Tensor, value: Tensor, run: Run) -> tuple[Tensor, Tensor]:
    return (
        _stretches(key, run.key, run.keys, run.count),
        _stretches(value, run.key, run.keys, run.count),
    )


# --- CPU: torch's flash kernel, batch (B, H, S, d) with fewer heads of keys where they are shared ---


def _cpu_forward(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal, scale=scale)
    return out, lse


def _cpu_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> Any:
    kernel = aten._scaled_dot_product_flash_attention_for_cpu_backward
    return kernel(grad, query, key, value, out, lse, 0.0, causal, scale=scale)


# --- anything: products that hold the scores of one part ---


def _plain_forward(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    queries, keys, values = _grouped(query, key), _exact(key)[:, :, None], _exact(value)[:, :, None]
    scores = _scores(queries, keys, causal, scale)
    lse = scores.logsumexp(-1)  # (B, G, H/G, S)
    out = (scores - lse[..., None]).exp() @ values
    return out.flatten(1, 2).to(query.dtype), lse.flatten(1, 2)


def _plain_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    queries, keys, values = _grouped(query, key), _exact(key)[:, :, None], _exact(value)[:, :, None]
    grads, outs = _grouped(grad, key), _grouped(out, key)
    weights = (_scores(queries, keys, causal, scale) - lse.unflatten(1, (key.shape[1], -1))[..., None]).exp()
    delta = (grads * outs).sum(-1, keepdim=True)
    of_scores = weights * (grads @ values.transpose(-1, -2) - delta) * scale  # (B, G, H/G, S, K)
    of_query = (of_scores @ keys).flatten(1, 2)
    of_key = (of_scores.transpose(-1, -2) @ queries).sum(2)
    of_value = (weights.transpose(-1, -2) @ grads).sum(2)
    return of_query.to(query.dtype), of_key.to(key.dtype), of_value.to(value.dtype)


def _exact(tensor: Tensor) -> Tensor:
    """In float32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _grouped(query: Tensor, key: Tensor) -> Tensor:
    """(B, G, H/G, S, d): H/G heads of queries share one of keys."""
    return _exact(query).unflatten(1, (key.shape[1], -1))


def _scores(query: Tensor, key: Tensor, causal: bool, scale: float) -> Tensor:
    """(B, G, H/G, S, K)."""
    scores = query @ key.transpose(-1, -2) * scale
    if not causal:
        return scores
    past = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    return scores.masked_fill(~past, float("-inf"))


# --- CUDA: torch's flash kernel over stretches of any length at once, rows (T, H, d) ---


def _on_cuda(query: Tensor) -> bool:
    return query.device.type == "cuda" and query.dtype in (torch.bfloat16, torch.float16)


@lru_cache(maxsize=32)  # of a step's parts, not of each layer's
def _cuda_arguments(part: Part, device: torch.device) -> tuple[Tensor, Tensor, int, int]:
    """Where stretches begin and end, and the longest, for queries and keys."""
    ends = [torch.tensor([0, *lengths], device=device).cumsum(0).int() for lengths in (part.queries, part.keys)]
    return ends[0], ends[1], max(part.queries), max(part.keys)


def _packed(row: Tensor, start: int, end: int) -> Tensor:
    """(end - start, H, d) of a row (H, T, d)."""
    return row[:, start:end].transpose(0, 1)


def _cuda_forward(query: Tensor, key: Tensor, value: Tensor, part: Part, scale: float) -> tuple[Tensor, Tensor]:
    ends = _cuda_arguments(part, query.device)
    kernel: Callable[..., Any] = aten._flash_attention_forward
    out, lse, *_ = kernel(
        _packed(query, part.query, part.query_end), _packed(key, part.key, part.key_end),
        _packed(value, part.key, part.key_end), *ends, 0.0, part.causal, False, scale=scale,
    )  # fmt: skip
    return out.transpose(0, 1), lse


def _cuda_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, part: Part, scale: float
) -> Grads:
    ends = _cuda_arguments(part, query.device)
    no_dropout = [torch.zeros(shape, dtype=torch.uint64, device=query.device) for shape in ((2,), ())]
    kernel: Callable[..., Any] = aten._flash_attention_backward
    stretch = part.query, part.query_end
    grads = kernel(
        _packed(grad, *stretch), _packed(query, *stretch), _packed(key, part.key, part.key_end),
        _packed(value, part.key, part.key_end), _packed(out, *stretch), lse[:, slice(*stretch)].contiguous(),
        *ends, 0.0, part.causal, *no_dropout, scale=scale,
    )  # fmt: skip
    return Grads(*(each.transpose(0, 1) for each in grads))
