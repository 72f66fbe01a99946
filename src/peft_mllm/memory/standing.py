"""What is in memory whatever the batch: weights, gradients, and the optimizer's state."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peft_mllm.anatomy import PARTS
from peft_mllm.errors import SpecError
from peft_mllm.optimizer import make_optimizer
from peft_mllm.pieces import held
from peft_mllm.spec import TrainSpec
from peft_mllm.tuned import Tuned

TABLE = (5, 7)
"""A matrix of a shape that nothing else has, to see which of its axes an optimizer's state has."""
QUANTISED = {"8bit": 1.0, "4bit": 0.53}
"""Bytes of a quantised number with its scales."""
OTHERWISE = 2.0
"""Numbers of state to each that trains, for an optimizer that cannot be tried; Adam's."""


@dataclass(frozen=True)
class Standing:
    """Bytes that stay.

    Attributes:
        weights: all parameters and buffers; of those in pieces what a process has at once.
        gradients: of what trains.
        optimizer: its state.
        update: what an update takes for a moment.
    """

    weights: int
    gradients: int
    optimizer: int
    update: int


def standing(tuned: Tuned, spec: TrainSpec, *, dtype: torch.dtype | None, quantization: str = "none") -> Standing:
    """Of a model that may be on meta.

    Args:
        tuned: with its method.
        spec: says which optimizer.
        dtype: of the frozen weights.
        quantization: in which the decoder's linears will be held, where the model does not hold them so.
    """
    trainable = list(tuned.trainable().values())
    sizes = [4 * held(parameter).numel() for parameter in trainable]
    kept = _state_of(tuned, spec)
    return Standing(
        weights=_weights(tuned, dtype, quantization),
        gradients=sum(sizes),
        optimizer=round(sum(kept(held(parameter)) for parameter in trainable)),
        update=2 * max(sizes, default=0),  # parameter by parameter: a denominator and a quotient
    )


def _weights(tuned: Tuned, dtype: torch.dtype | None, quantization: str) -> int:
    """Bytes of all parameters and buffers, each storage once."""
    quantised = _to_quantise(tuned) if quantization != "none" else set()
    sizes: dict[int, float] = {}
    for tensor in (*tuned.model.parameters(), *tuned.model.buffers()):
        width: float = tensor.element_size()
        if id(tensor) in quantised:
            width = QUANTISED[quantization]
        elif isinstance(tensor, nn.Parameter) and tensor.is_floating_point():
            width = 4 if tensor.requires_grad else (dtype or tensor.dtype).itemsize
        storage = held(tensor).untyped_storage()
        sizes[storage._cdata] = storage.nbytes() / tensor.element_size() * width
    return round(sum(sizes.values())) + (tuned.shards.unsaid if tuned.shards else 0)


def _to_quantise(tuned: Tuned) -> set[int]:
    """The frozen weights of the linears in the decoder's layers."""
    layers = tuned.base.get_submodule(tuned.family.anatomy.layers)
    linears = [module for module in layers.modules() if isinstance(module, nn.Linear)]
    return {id(linear.weight) for linear in linears if not linear.weight.requires_grad}


def _state_of(tuned: Tuned, spec: TrainSpec) -> Callable[[Tensor], float]:
    """Bytes of an optimizer's state for a parameter, from what the optimizer keeps of a small one."""
    tried = {"table": nn.Parameter(torch.ones(TABLE)), "vector": nn.Parameter(torch.ones(TABLE[0]))}
    try:
        optimizer = make_optimizer(tried, tuned.family.anatomy, dict.fromkeys(PARTS, 1e-3), spec)
        for parameter in tried.values():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    except (RuntimeError, TypeError, ValueError, SpecError):  # one that must be given a closure, for one
        return lambda parameter: 4 * OTHERWISE * parameter.numel()

    def size(parameter: Tensor) -> float:
        if not parameter.numel():  # a small weight may have no piece for every process
            return 0.0
        small = tried["table" if parameter.ndim > 1 else "vector"]
        axes = dict(zip(TABLE, (parameter.shape[0], parameter[0].numel()), strict=True))
        states = [state for state in optimizer.state[small].values() if isinstance(state, Tensor)]
        return sum(math.prod(axes.get(n, n) for n in state.shape) * state.element_size() for state in states)

    return size
