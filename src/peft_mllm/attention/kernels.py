"""Attention over the stretches of one part, and its backward for a softmax that spans several parts.

A kernel gives the part's output and log-sum-exp. Its backward takes the output and the log-sum-exp of the WHOLE
softmax, merged over parts: with P = exp(S - lse) and D = rowsum(dO * O) the gradient dS = P * (dO V^T - D) is right for
each part by itself (the identity of ring attention, Liu et al. 2023, arXiv 2310.01889). So torch's stock flash
kernels serve, forward and backward, on the CPU (float32, bfloat16) and on CUDA (bfloat16, float16); elsewhere plain
products do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peft_mllm.attention.packing import Part, Run

aten = torch.ops.aten
BLOCK = 150
"""Queries at a time in a CPU's causal backward pass: its kernel computes much of what lies behind a query, too."""


class Grads(NamedTuple):
    """Gradients of a part's queries (H, Tq, d), keys and values (G, Tk, d)."""

    query: Tensor
    key: Tensor
    value: Tensor


class Seen(NamedTuple):
    """A part of the attention with the keys and values (G, Tk, d) that its stretches are of."""

    part: Part
    key: Tensor
    value: Tensor


def forward(query: Tensor, seen: Sequence[Seen], scale: float) -> list[tuple[Tensor, Tensor]]:
    """The output (H, Tq, d) and log-sum-exp (H, Tq) of each part's queries.

    Args:
        query: (H, T, d) of the whole row.
        seen: the parts; G divides H.
        scale: of the scores.
    """
    if _on_cuda(query):
        return [_cuda_forward(query, *each, scale) for each in seen]
    dense = _cpu_forward if query.device.type == "cpu" else _plain_forward

    def compute(alike: Sequence[Stretches]) -> tuple[Tensor, ...]:
        of_query = _together([_stretches(query, each.run.query, each.run.queries, each.run.count) for each in alike])
        return dense(of_query, *_keys(alike), alike[0].causal, scale)

    return [(out, lse) for out, lse in _by_shape(seen, compute)]


def backward(grad: Tensor, query: Tensor, seen: Sequence[Seen], out: Tensor, lse: Tensor, scale: float) -> list[Grads]:
    """Gradients of each part's queries, keys and values.

    Args:
        grad: (H, T, d) of the output, for the whole row.
        query: as for `forward`.
        seen: likewise.
        out: (H, T, d), merged over all parts.
        lse: (H, T), likewise.
        scale: of the scores.
    """
    if _on_cuda(query):
        return [_cuda_backward(grad, query, *each, out, lse, scale) for each in seen]
    dense = _cpu_backward if query.device.type == "cpu" else _plain_backward

    def compute(alike: Sequence[Stretches]) -> tuple[Tensor, ...]:
        grads, queries, outs, lses = (
            _together([_stretches(row, each.run.query, each.run.queries, each.run.count) for each in alike])
            for row in (grad, query, out, lse)
        )
        found: tuple[Tensor, ...] = dense(grads, queries, *_keys(alike), outs, lses, alike[0].causal, scale)
        return found

    return [Grads(*each) for each in _by_shape(seen, compute)]


class Stretches(NamedTuple):
    """Neighbouring stretches of one part."""

    run: Run
    key: Tensor
    value: Tensor
    causal: bool


def _by_shape(
    seen: Sequence[Seen], compute: Callable[[Sequence[Stretches]], tuple[Tensor, ...]]
) -> list[tuple[Tensor, ...]]:
    """What comes out for each part, as rows (H, ...); stretches of one shape are computed at once, wherever they are.

    A call of a kernel takes as long as some hundred tokens do, and many rows of small batches have many stretches.
    """
    shapes: dict[tuple[int, int, bool], list[tuple[int, int]]] = {}
    for number, (part, _, _) in enumerate(seen):
        for place, run in enumerate(part.runs):
            shapes.setdefault((run.queries, run.keys, part.causal), []).append((number, place))
    found: list[list[tuple[Tensor, ...]]] = [[()] * len(part.runs) for part, _, _ in seen]
    for places in shapes.values():
        alike = [
            Stretches(part.runs[place], key, value, part.causal)
            for number, place in places
            for part, key, value in (seen[number],)
        ]
        counts = [each.run.count for each in alike]
        apart = zip(*(made.split(counts) for made in compute(alike)), strict=True)
        for (number, place), made in zip(places, apart, strict=True):
            found[number][place] = made
    return [tuple(_rows(made) for made in zip(*each, strict=True)) for each in found]


def _stretches(row: Tensor, start: int, length: int, count: int) -> Tensor:
    """(count, H, length, ...) a view of neighbouring stretches of a row (H, T, ...)."""
    return row[:, start : start + count * length].unflatten(1, (count, length)).transpose(0, 1)


def _rows(parts: Sequence[Tensor]) -> Tensor:
    """(H, T, ...) a row of stretches (count, H, length, ...), one after the other."""
    rows = [each.transpose(0, 1).flatten(1, 2) for each in parts]
    return rows[0] if len(rows) == 1 else torch.cat(rows, 1)


def _together(stretches: Sequence[Tensor]) -> Tensor:
    """(counts of all, H, length, ...)."""
    return stretches[0] if len(stretches) == 1 else torch.cat([*stretches])


def _keys(alike: Sequence[Stretches]) -> tuple[Tensor, Tensor]:
    return (
        _together([_stretches(each.key, each.run.key, each.run.keys, each.run.count) for each in alike]),
        _together([_stretches(each.value, each.run.key, each.run.keys, each.run.count) for each in alike]),
    )


# --- CPU: torch's flash kernel, batch (B, H, S, d) with fewer heads of keys where they are shared ---


def _cpu_forward(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal, scale=scale)
    return out, lse


def _cpu_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> Any:
    kernel = aten._scaled_dot_product_flash_attention_for_cpu_backward
    length = query.shape[2]
    exact = query.dtype in (torch.float32, torch.float64)  # what is added up in lesser types loses digits
    blocks = max(1, round(length / BLOCK)) if causal and exact else 1
    if blocks == 1:
        return kernel(grad, query, key, value, out, lse, 0.0, causal, scale=scale)
    of_query, of_key, of_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
    for number in range(blocks):
        begin, end = (length * i // blocks for i in (number, number + 1))
        block = [each[:, :, begin:end] for each in (grad, query, out, lse)]
        for start, stop, own in ((begin, end, True), (0, begin, False)):  # itself, and all that lies before it
            if start == stop:
                continue
            some, asking, made, sums = block
            keys, values = key[:, :, start:stop], value[:, :, start:stop]
            found = kernel(some, asking, keys, values, made, sums, 0.0, own, scale=scale)
            of_query[:, :, begin:end] = found[0] if own else of_query[:, :, begin:end].add_(found[0])
            of_key[:, :, start:stop].add_(found[1])
            of_value[:, :, start:stop].add_(found[2])
    return of_query, of_key, of_value


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


def _cuda_forward(query: Tensor, part: Part, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    ends = _cuda_arguments(part, query.device)
    kernel: Callable[..., Any] = aten._flash_attention_forward
    out, lse, *_ = kernel(
        _packed(query, part.query, part.query_end), _packed(key, part.key, part.key_end),
        _packed(value, part.key, part.key_end), *ends, 0.0, part.causal, False, scale=scale,
    )  # fmt: skip
    return out.transpose(0, 1), lse


def _cuda_backward(
    grad: Tensor, query: Tensor, part: Part, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, scale: float
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
