"""The state of torch's generator on a device: what dropout goes on from."""

from __future__ import annotations

import torch
from torch import Tensor


def generator_state(device: torch.device) -> Tensor:
    """The present state, as bytes on the CPU."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def set_generator_state(state: Tensor, device: torch.device) -> None:
    """Go on from a state."""
    torch.cuda.set_rng_state(state, device) if device.type == "cuda" else torch.set_rng_state(state)
