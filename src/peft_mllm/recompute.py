"""Trading time for memory: what of a decoder's forward is computed again in the backward pass, or waits elsewhere.

    none       everything is kept: the fastest
    selective  each layer's MLP is computed again; its inner products are most of what a layer keeps
    k          every k-th layer is computed again
    full       every layer is computed again; only the layers' inputs are kept
    offload    what a GPU would keep waits in main memory, and comes back layer by layer

All give the same gradients: dropout is drawn again from the same state. The vision tower is never computed again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peft_mllm.anatomy import Anatomy
from peft_mllm.errors import MethodError

Recompute = str | int
"""none, selective, full, offload, or k for every k-th layer."""
MOVED = 1 << 16
"""Bytes from which a tensor is moved away: below, the way costs more than it frees."""


def set_recompute(base: nn.Module, anatomy: Anatomy, policy: Recompute) -> None:
    """Let a model's decoder compute by a policy from now on, whatever it did before.

    Raises:
        MethodError: the model has no MLP that could be computed again alone.
    """
    decoder, layers = base.get_submodule(anatomy.llm), list(base.get_submodule(anatomy.layers).children())
    decoder.__dict__["recompute"] = policy
    mlps = mlps_of(base, anatomy)
    for module in (decoder, *layers, *mlps):
        module.__dict__.pop("forward", None)
    if policy == "selective" and not mlps:
        raise MethodError("speed.recompute: selective needs an MLP of its own in each layer. Use full, or a number.")
    if policy == "offload":
        _wrap(decoder, _moved_away)
        return
    every = policy if isinstance(policy, int) else 1
    again = {"none": [], "selective": mlps}.get(str(policy), layers[::every])
    for module in again:
        _wrap(module, _computed_again)


def recompute_of(decoder: nn.Module) -> Recompute:
    """The policy that a decoder computes by."""
    policy: Recompute = decoder.__dict__.get("recompute", "none")
    return policy


def mlps_of(base: nn.Module, anatomy: Anatomy) -> list[nn.Module]:
    """The MLPs of a decoder's layers, where each is a module of its own: what its linears have around them."""
    around = {path.rpartition(".")[0] for path in anatomy.mlp.values()}
    if len(around) != 1 or around == {""}:
        return []
    path = around.pop()
    found = [dict(layer.named_modules()).get(path) for layer in base.get_submodule(anatomy.layers).children()]
    return [module for module in found if module is not None]


Forward = Callable[..., Any]


def _wrap(module: nn.Module, how: Callable[[nn.Module, Forward], Forward]) -> None:
    """Put a way of computing around a module's forward, in the module itself, where `set_recompute` takes it off."""

    def inner(*args: Any, **kwargs: Any) -> Any:  # the class may be given another forward later
        return type(module).forward(module, *args, **kwargs)

    module.forward = functools.wraps(type(module).forward)(how(module, inner))


def _computed_again(module: nn.Module, inner: Forward) -> Forward:
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return inner(*args, **kwargs)
        if kwargs.get("past_key_values") is not None:
            kwargs["past_key_values"] = None  # a cache that grows would grow again
        return checkpoint(inner, *args, use_reentrant=False, **kwargs)

    return forward


def _moved_away(module: nn.Module, inner: Forward) -> Forward:
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return inner(*args, **kwargs)
        away = _Away(module)
        with torch.autograd.graph.saved_tensors_hooks(away.pack, away.unpack):
            return inner(*args, **kwargs)

    return forward


class _Away:
    """Main memory for what autograd saves in one forward; weights stay, and each tensor is moved once."""

    def __init__(self, module: nn.Module):
        self._stay = {p.untyped_storage()._cdata for p in module.parameters()}
        self._moved: WeakKeyDictionary[Any, dict[Any, Tensor]] = WeakKeyDictionary()

    def pack(self, tensor: Tensor) -> Any:
        """A tensor to keep, or where it went."""
        storage = tensor.untyped_storage()
        if storage._cdata in self._stay or tensor.numel() * tensor.element_size() < MOVED:
            return tensor
        views = self._moved.setdefault(storage, {})
        view = (tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, tensor._version)
        if view not in views:
            pinned = tensor.device.type == "cuda"
            views[view] = torch.empty_like(tensor, device="cpu", pin_memory=pinned).copy_(tensor, non_blocking=pinned)
        return tensor.device, views[view]

    def unpack(self, packed: Any) -> Tensor:
        """The tensor where it was."""
        if isinstance(packed, Tensor):
            return packed
        device, tensor = packed
        # a copy also where both are main memory: what is unpacked may not be what waits
        return tensor.to(device, non_blocking=True, copy=True)
