"""Weights in pieces by torch's FSDP2 (`fully_shard`), for training and for answering.

Each decoder layer is a group of its own; embeddings and what is left of the decoder are one, the head is one. Frozen
and trained weights are cut alike: a trained one's gradient comes summed over all processes, in pieces as the weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from peft_mllm.anatomy import Anatomy
from peft_mllm.pieces import in_pieces
from peft_mllm.sharding.lockstep import Lockstep
from peft_mllm.sharding.shards import Shards, alike, stays_whole
from peft_mllm.world import World

AT_ONCE = 3
"""Layers whose weights are together at once: one is computed, the next is on its way, and its way takes room."""

OF_GRADIENTS = 2
"""Likewise of layers that train: a whole gradient, and what is sent of it."""


class FullyShards(Shards):
    """A model cut by FSDP2, in place.

    Args:
        base: the model with a method's layers in it, on any device.
        anatomy: of its family.
        world: the processes.
        own: whether the trained weights are the base's own, and cut too; else they are a method's, and stay whole.
    """

    def __init__(self, base: Any, anatomy: Anatomy, world: World, *, own: bool):
        decoder, layers = base.get_submodule(anatomy.llm), alike(base.get_submodule(anatomy.layers))
        table, head = base.get_input_embeddings(), base.get_output_embeddings()
        kept = stays_whole(base, anatomy)
        kept |= {parameter for parameter in base.parameters() if parameter.requires_grad and not own}
        heads = [head] if head is not None and not kept.issuperset(head.parameters()) else []
        self._groups = [decoder, *layers, *heads]
        before = [(hooks, set(hooks)) for hooks in _hooks({*self._groups, table, base.base_model})]
        options: Any = {"mesh": init_device_mesh(world.device.type, (world.size,)), "ignored_params": kept}
        largest = max(_bytes(layer, kept) for layer in layers)
        inside = {id(p) for layer in layers for p in layer.parameters()}
        rest = sum(p.nbytes for p in decoder.parameters() if id(p) not in inside and p not in kept)
        self.unsaid = (AT_ONCE + own * OF_GRADIENTS) * largest + rest + sum(_bytes(head, kept) for head in heads)
        for module in (*layers, decoder, *heads):
            group: Any = fully_shard(module, reshard_after_forward=True, **options)
            # the loop divides by the tokens of a step itself
            group.set_gradient_divide_factor(1.0)
            group.set_force_sum_reduction_for_comms(True)
        if any(map(in_pieces, table.parameters())):  # they are called before the decoder that they belong to
            table.register_forward_pre_hook(lambda module, args: decoder.unshard())
        self._lockstep = Lockstep(
            [table, decoder],
            self._groups,
            1 + len(layers),
            base.base_model,
            gather=_gather,
            release=_release,
            recover=self._recover,
            device=world.device,
        )
        self._ours = [(hooks, set(hooks) - there) for hooks, there in before]

    def together(self) -> AbstractContextManager[None]:
        """See `Shards`."""
        return self._lockstep.together()

    @contextmanager
    def put_together(self, layer: nn.Module) -> Iterator[None]:
        """See `Shards`."""
        if isinstance(layer, FSDPModule):
            layer.unshard()
        try:
            yield
        finally:
            if isinstance(layer, FSDPModule):
                layer.reshard()

    @contextmanager
    def apart(self) -> Iterator[None]:
        """See `Shards`."""
        now = [dict(hooks) for hooks, _ in self._ours]
        for hooks, ours in self._ours:
            for key in ours:
                hooks.pop(key, None)
        try:
            yield
        finally:
            for (hooks, _), were in zip(self._ours, now, strict=True):
                hooks.clear()
                hooks.update(were)

    def _recover(self) -> None:
        """Put FSDP2's own account in order after a forward that failed."""
        decoder: Any = self._groups[0]
        if hasattr(decoder, "reset_iter_state"):  # not in every version of torch
            decoder.reset_iter_state()


def _gather(group: Any) -> None:
    group.unshard()


def _release(group: Any) -> None:
    group.reshard()


def _bytes(module: nn.Module, kept: set[nn.Parameter]) -> int:
    return sum(parameter.nbytes for parameter in module.parameters() if parameter not in kept)


def _hooks(modules: Iterable[nn.Module]) -> list[dict[int, Any]]:
    return [hooks for module in modules for hooks in (module._forward_pre_hooks, module._forward_hooks)]
