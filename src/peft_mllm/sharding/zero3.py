"""Frozen weights in pieces by DeepSpeed's ZeRO-3 (Rajbhandari et al. 2020, arXiv 1910.02054).

DeepSpeed cuts the parameters and puts them together; when it does so is decided here, and there is no DeepSpeed engine:
loop, optimizer and checkpoints stay ours. Like this a layer's weights are together in its forward, and in its backward:

    forward    before a layer: gather      after it: release
    backward   at the gradient of its output: gather, and release the layer behind, which is done

What autograd saves of a weight in between is not the weight, but where to find it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from peft_mllm.anatomy import Anatomy
from peft_mllm.errors import SpecError
from peft_mllm.sharding.lockstep import Lockstep
from peft_mllm.sharding.shards import Shards, alike, stays_whole
from peft_mllm.world import World

MISSING = (
    "speed.shard: zero3 needs DeepSpeed, and it cannot be imported: {why}. Install it with pip install "
    "'peft-mllm[deepspeed]', or use speed.shard: fsdp, which needs nothing."
)
OWN = (
    "speed.shard: zero3 cuts the frozen weights under an adapter; this run has no adapter. Use speed.shard: fsdp, "
    "which cuts weights that train as well."
)


class Zero3(Shards):
    """A model cut by DeepSpeed, in place; the arguments are those of `FullyShards`.

    Raises:
        SpecError: DeepSpeed is not there, or the run has no adapter.
    """

    def __init__(self, base: Any, anatomy: Anatomy, world: World, *, own: bool):
        if own:
            raise SpecError(OWN)
        decoder, layers = base.get_submodule(anatomy.llm), alike(base.get_submodule(anatomy.layers))
        table, head = base.get_input_embeddings(), base.get_output_embeddings()
        kept = stays_whole(base, anatomy) | {p for p in base.parameters() if p.requires_grad}
        heads = [head] if head is not None and not kept.issuperset(head.parameters()) else []
        # embeddings are called before the decoder, and perhaps twice: they are together until it ends
        self._pieces = {decoder: _frozen(table, kept)}
        self._pieces |= {module: _frozen(module, kept) for module in (*layers, *heads)}
        sizes = [sum(p.nbytes for p in pieces) for pieces in self._pieces.values()]
        before = sum(sizes)
        cut = _cutter(world)
        for pieces in self._pieces.values():
            cut(pieces)
        self.hidden = sum(p.ds_tensor.nbytes for pieces in self._pieces.values() for p in pieces)
        self.unsaid = 2 * max(sizes) + sizes[0] + self.hidden - before
        self._there: set[nn.Module] = set()
        self._backward: nn.Module | None = None
        self._off = False
        table.register_forward_pre_hook(lambda module, args: self._gather(decoder))
        decoder.register_forward_hook(lambda module, args, output: self._release(decoder), always_call=True)
        for module in (*layers, *heads):
            _Around(self, module)
        groups = [*self._pieces]
        self._lockstep = Lockstep(
            [table, decoder],
            groups,
            1 + len(layers),
            base.base_model,
            gather=self._gather,
            release=self._release,
            recover=lambda: None,
            device=world.device,
        )

    def together(self) -> AbstractContextManager[None]:
        """See `Shards`."""
        return self._lockstep.together()

    @contextmanager
    def put_together(self, layer: nn.Module) -> Iterator[None]:
        """See `Shards`."""
        if layer in self._pieces:
            self._gather(layer)
        try:
            yield
        finally:
            if layer in self._pieces:
                self._release(layer)

    @contextmanager
    def apart(self) -> Iterator[None]:
        """See `Shards`; pieces have the shapes of their weights meanwhile."""
        made: dict[int, nn.Parameter] = {}
        before = []
        for module in {inner for group in self._pieces for inner in group.modules()}:
            for name, p in module._parameters.items():
                if p is not None and hasattr(p, "ds_shape"):
                    empty = torch.empty(p.ds_shape, dtype=p.dtype, device="meta")
                    made.setdefault(id(p), nn.Parameter(empty, requires_grad=False))
                    before.append((module, name, p))
        for module, name, p in before:
            module._parameters[name] = made[id(p)]
        self._off = True
        try:
            yield
        finally:
            self._off = False
            for module, name, p in before:
                module._parameters[name] = p

    @torch.no_grad()
    def _gather(self, group: nn.Module) -> None:
        pieces = self._pieces[group]
        if self._off or group in self._there or not pieces:
            return
        self._there.add(group)
        some: Any = pieces[0]
        some.all_gather_coalesced(pieces).wait()

    @torch.no_grad()
    def _release(self, group: nn.Module) -> None:
        pieces = self._pieces[group]
        if group not in self._there:
            return
        self._there.remove(group)
        some: Any = pieces[0]
        some.partition(pieces)

    def _backward_of(self, group: nn.Module) -> None:
        """A backward pass has come to a group: the one behind it is done."""
        if self._backward is group:
            return
        if self._backward is None:
            torch.autograd.Variable._execution_engine.queue_callback(self._backward_ended)
        else:
            self._release(self._backward)
        self._backward = group
        self._gather(group)

    def _backward_ended(self) -> None:
        if self._backward is not None:
            self._release(self._backward)
        self._backward = None


class _Around:
    """What happens around a module's forward; the same module is never called within itself."""

    def __init__(self, shards: Zero3, module: nn.Module):
        self._shards, self._module = shards, module
        self._saving: saved_tensors_hooks | None = None
        module.register_forward_pre_hook(self._before)
        module.register_forward_hook(self._after, always_call=True)

    def _before(self, module: nn.Module, args: Any) -> None:
        if self._shards._off:
            return
        self._shards._gather(module)
        if torch.is_grad_enabled():
            self._saving = saved_tensors_hooks(self._pack, _unpack)
            self._saving.__enter__()

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._shards._off:
            return
        if self._saving is not None:
            self._saving.__exit__()
            self._saving = None
        self._shards._release(module)
        for tensor in output if isinstance(output, (tuple, list)) else [output]:
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(lambda grad: self._shards._backward_of(module))

    def _pack(self, tensor: Tensor) -> Any:
        """A tensor to keep; or, of a weight that will be released, which part of it."""
        address = tensor.data_ptr()
        for piece in self._shards._pieces[self._module]:
            begin = piece.data_ptr()
            if begin <= address < begin + piece.nbytes and tensor.dtype == piece.dtype:
                return piece, tensor.shape, tensor.stride(), (address - begin) // piece.element_size()
        return tensor


def _unpack(packed: Any) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    piece, shape, stride, begin = packed
    held = piece.detach()
    return held.as_strided(shape, stride, held.storage_offset() + begin)


def _frozen(module: nn.Module, kept: set[nn.Parameter]) -> list[Any]:
    return [parameter for parameter in module.parameters() if parameter not in kept]


def _cutter(world: World) -> Any:
    """A function that cuts parameters in place, on the processes' devices.

    Raises:
        SpecError: DeepSpeed is not there.
    """
    os.environ.setdefault("DS_ACCELERATOR", world.device.type)
    try:
        import deepspeed
        from deepspeed import comm
    except (ImportError, RuntimeError, OSError) as error:  # it looks for compilers when it is imported
        raise SpecError(MISSING.format(why=str(error).splitlines()[0])) from error
    # on a CPU it would compile, for minutes, a library for sums; it sums nothing here
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    comm.init_distributed(dist_backend=torch.distributed.get_backend(), auto_mpi_discovery=False, verbose=False)
    first = nn.Linear(1, 1, bias=False)
    deepspeed.zero.Init(module=first, mem_efficient_linear=False, dtype=first.weight.dtype)
    of: Any = first.weight
    return lambda parameters: of.convert_to_zero_parameters(param_list=parameters)
