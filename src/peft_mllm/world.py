"""The processes of a run: one, or several started by `accelerate launch`.

Adapters are small, so their gradients are summed in one all-reduce of one flat buffer after the backward pass:
the sum is right for any split of micro-batches, and no wrapper stands around the model.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn

from peft_mllm.pieces import in_pieces

T = TypeVar("T")


class World:
    """This process among the others."""

    def __init__(self) -> None:
        # without being told, accelerate takes several processes without a GPU for as many lone ones
        several = int(os.environ.get("WORLD_SIZE", "1")) > 1
        on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or (several and not torch.accelerator.is_available())
        self._state = PartialState(cpu=on_cpu)

    @property
    def rank(self) -> int:
        """Number of this process, from 0."""
        return self._state.process_index

    @property
    def size(self) -> int:
        """How many processes."""
        return self._state.num_processes

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self._state.device

    def sum(self, *values: float) -> list[float]:
        """Each value summed over the processes."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self._number_device)
        dist.all_reduce(total)
        return total.tolist()

    def exact_sum(self, values: Sequence[float]) -> float:
        """The sum of all processes' values, rounded once: the same bits whoever has which of them."""
        return math.fsum(self.gather(list(values)))

    def any(self, value: bool) -> bool:
        """Whether it is true in any process."""
        return self.sum(float(value))[0] > 0

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add up the gradients of all processes; a parameter that was not used counts as zero."""
        used = list(parameters)
        for parameter in used:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.size == 1:
            return
        # a weight in pieces gets the sum of all processes' gradients where it is cut
        gradients = [p.grad for p in used if p.grad is not None and not in_pieces(p)]
        if not gradients:
            return
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(summed.view_as(gradient))

    def tensors(self, mine: Tensor) -> list[Tensor]:
        """A tensor of each process, in the order of the processes; all of one shape."""
        if self.size == 1:
            return [mine]
        everyone = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(everyone, mine)
        return everyone

    def share(self, value: T) -> T:
        """The main process's value, in every process."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

    def gather(self, items: list[T]) -> list[T]:
        """The items of all processes, in the order of the processes."""
        if self.size == 1:
            return items
        parts: list[list[T]] = [[] for _ in range(self.size)]
        dist.all_gather_object(parts, items)
        return [item for part in parts for item in part]

    def barrier(self) -> None:
        """Wait for the other processes."""
        self._state.wait_for_everyone()

    def close(self) -> None:
        """Leave the group of processes."""
        self._state.destroy_process_group()

    @property
    def _number_device(self) -> torch.device:
        # not every accelerator has float64 sums; gloo works on the CPU, nccl only on its device
        return self.device if self.device.type == "cuda" else torch.device("cpu")
