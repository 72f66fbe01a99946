"""Positions of Qwen: rotary angles with dynamic NTK, and logN, by which it reads past its pretraining's length.

    theta_i = (10000 a^(d / (d - 2)))^(-2i / d),  a = max(2^ceil(log2(L / S) + 1) - 1, 1)
    q_p <- q_p max(log_S(p + 1), 1)

L is the prompt's length, S the pretraining's. Both are for evaluation only: in training a = 1 and q stays.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

LEVELS = 20
"""Steps of `a` that are tabled: 1, 3, 7, ... up to a million times the pretraining's length."""


def ntk_level(length: Tensor, trained: int) -> Tensor:
    """Which step of `a` each length (R,) has: 0 up to `trained` tokens, then one more with each doubling."""
    bounds = trained * 2 ** torch.arange(LEVELS - 1, device=length.device)
    return (length[:, None] > bounds).sum(dim=1)


def rotary(positions: Tensor, level: Tensor, *, width: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines (R, 1, T, width) in float32.

    Args:
        positions: (R, T) or (1, T).
        level: (R,) or (1,), see `ntk_level`.
        width: of a head.
        base: the angles' base.
    """
    frequencies = _frequencies(width, base, positions.device)[level]  # (R, width / 2)
    angles = positions[:, :, None].float() * frequencies[:, None, :]
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    return angles.cos(), angles.sin()


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn queries or keys (R, heads, T, width) by their angles, in float32."""
    exact = states.float()
    first, second = exact.chunk(2, dim=-1)
    return (exact * cos + torch.cat([-second, first], dim=-1) * sin).to(states.dtype)


def logn(positions: Tensor, trained: int) -> Tensor:
    """What queries (R, heads, T, width) are multiplied by: (R, 1, T, 1)."""
    return (torch.log(positions + 1.0) / math.log(trained)).clamp(min=1.0)[:, None, :, None]


@lru_cache(maxsize=8)
def _frequencies(width: int, base: float, device: torch.device) -> Tensor:
    """Frequencies (LEVELS, width / 2), each row computed by scalars as the original does: the last bit counts."""
    with torch.inference_mode(False):
        bases = (base * max(2**level_plus - 1, 1) ** (width / (width - 2)) for level_plus in range(1, LEVELS + 1))
        return torch.stack([1.0 / (each ** (torch.arange(0, width, 2).float() / width)) for each in bases]).to(device)
