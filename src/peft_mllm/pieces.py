"""Tensors of which each process holds a piece, as torch's DTensor has them; of all others these say what they are.

Known by what they can do, since importing DTensor takes time that most commands have no use for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def in_pieces(tensor: Tensor) -> bool:
    """Whether each process holds but a piece."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, here; one in pieces is put together, and all processes must ask."""
    pieces: Any = tensor
    return pieces.full_tensor() if in_pieces(tensor) else tensor


def held(tensor: Tensor) -> Tensor:
    """What of a tensor this process holds."""
    pieces: Any = tensor
    return pieces.to_local() if in_pieces(tensor) else tensor


def cut_like(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor (the same in all processes) in pieces where `like` is, and on its device."""
    value, pieces = value.to(like.device), like
    if not in_pieces(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    assert hasattr(pieces, "device_mesh")
    assert hasattr(pieces, "placements")
    return distribute_tensor(value, pieces.device_mesh, pieces.placements, src_data_rank=None)


def clip_to_norm(parameters: Sequence[nn.Parameter], most: float) -> Tensor:
    """Scale all gradients down to a norm of all of them together, and give the norm they had; all processes must ask.

    torch's own function takes whole tensors or pieces, but not both at once.
    """
    if not any(map(in_pieces, parameters)):
        return nn.utils.clip_grad_norm_(parameters, most)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    lengths = [whole(torch.linalg.vector_norm(gradient)) for gradient in gradients]
    total = torch.linalg.vector_norm(torch.stack(lengths))
    factor = (most / (total + 1e-6)).clamp(max=1.0)  # as torch has it
    for gradient in gradients:
        held(gradient).mul_(factor)
    return total
