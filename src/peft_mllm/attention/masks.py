"""Masks of four dimensions: trees as rows, and any mask widened by keys that everything sees."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

PREFIX = -2
"""Segment of a token that all branches of its row share."""
PADDING = -1
"""Segment of a token that is not there."""
TREE_BACKENDS = ("sdpa", "eager")
"""Backends that take any four-dimensional mask."""


def tree_mask(segments: Tensor, *, last: int | None = None) -> Tensor:
    """Attention mask of rows that hold a prefix and its branches.

    A token sees itself and the earlier tokens of its own branch and of the prefix:

        row  = [ p p p | a a | b b b ]      a sees p p p and its own past; b sees p p p and its own past

    Args:
        segments: (R, T) `PREFIX`, or the number of the token's branch, or `PADDING`.
        last: what so many tokens at the end see; all where left out.

    Returns:
        (R, 1, Q, T) bool, true where attention is allowed; Q is `last`, or T. Nothing sees a padding token but itself:
        a row of a softmax with nothing to see is not a number.
    """
    queries = segments.shape[1] if last is None else last
    query, key = segments[:, -queries:, None], segments[:, None, :]
    place = torch.arange(segments.shape[1], device=segments.device)
    ahead = place - place[-queries:, None]  # (Q, T)
    return ((ahead <= 0) & ((key == query) | (key == PREFIX)) & (key != PADDING) | (ahead == 0))[:, None]


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask as numbers to add to scores, for the eager backend: 0 where allowed, else the type's least."""
    scores = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return scores.masked_fill(~mask, torch.finfo(dtype).min)


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
