"""The gradients of a step, added up over its micro-batches and over the processes.

A sum of floats depends on its order. `at_once` adds as is quickest: each process its own, then one all-reduce, whose
order is another one for each number of processes. `in_order` has one order, that of the step's micro-batches:

    sum = ((g_1 + g_2) + g_3) + ...        g_i: of micro-batch i, whichever process has computed it

Adapters are small, so every process can get all g_i and add them itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from peft_mllm.data.trees import Batch
from peft_mllm.memory.relief import Relief
from peft_mllm.world import World

Compute = Callable[[Sequence[Batch]], list[Tensor]]
"""Batches to their losses (A,) each; their gradients are added to the parameters'."""
Computed = tuple[Sequence[Batch], list[Tensor]]
"""This process's batches as they were computed, and their losses."""
MicroBatches = Sequence[Sequence[int]]
"""The sample indices of each micro-batch of a step, over all processes; process r computes the r-th of each `size`."""


def at_once(
    compute: Compute,
    batches: Sequence[Batch],
    step: MicroBatches,
    parameters: Sequence[nn.Parameter],
    world: World,
    relief: Relief,
) -> Computed:
    """Give the parameters the gradients of a step's batches in all processes.

    Args:
        compute: what adds the gradients of some batches.
        batches: of this process.
        step: its micro-batches.
        parameters: what trains.
        world: the processes.
        relief: computes in smaller parts where memory runs out.
    """
    done = relief.compute(compute, batches, lambda: step[world.rank :: world.size], lambda: _drop(parameters))
    world.sum_gradients(parameters)
    return done


def in_order(
    compute: Compute,
    batches: Sequence[Batch],
    step: MicroBatches,
    parameters: Sequence[nn.Parameter],
    world: World,
    relief: Relief,
) -> Computed:
    """Likewise, with the same bits on any number of processes; takes room for a gradient of each process.

    What trains is whole in each of them.
    """
    rest = iter(batches)

    def one(mine: MicroBatches) -> Computed:
        own = list(_taken(rest, sum(map(len, mine))))
        return relief.compute(compute, own, lambda: mine, lambda: _drop(parameters))

    computed: list[Batch] = []
    losses: list[Tensor] = []
    total: Tensor | None = None
    for start in range(0, len(step), world.size):
        some = step[start : start + world.size]
        done, found = one(some[world.rank :][:1])  # none, where fewer are left than there are processes
        computed += done
        losses += found
        for gradient in world.tensors(_flat(parameters))[: len(some)]:
            total = gradient if total is None else total.add_(gradient)
        _drop(parameters)
    assert total is not None, "a step has a micro-batch"
    for parameter, part in zip(parameters, total.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter)
    return computed, losses


def _taken(batches: Iterator[Batch], samples: int) -> Iterator[Batch]:
    """The next batches, until they have so many samples."""
    while samples > 0:
        batch = next(batches)
        samples -= len(batch.sample_ids)
        yield batch


def _flat(parameters: Sequence[nn.Parameter]) -> Tensor:
    """All gradients in one row; zeros for a parameter that was not used."""
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])


def _drop(parameters: Sequence[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None
