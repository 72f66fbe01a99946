"""Running a model without its numbers: what comes of weights has shape and device alone, indices and masks are real.

What a model does depends on its whole numbers (where the images are, how long the segments are), its memory on the
shapes of its floats. So torch's fake tensors stand for weights and all that comes of them; the rest is computed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_ROOM = (torch.ops.aten.empty.memory_format, torch.ops.aten.zeros.default)
_DEVICE = torch.ops.prim.device.default
"""Asked more often than all else; of fake tensors alone."""
_INDEXING = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default)


class Ghosts(TorchDispatchMode):
    """While it is on, what is computed from fake tensors is fake, all else real; each tensor is told to `born`."""

    def __init__(self, fake: FakeTensorMode, born: Callable[[Tensor], None]):
        super().__init__()
        self._fake, self._born = fake, born

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE:
            return args[0].fake_device
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(isinstance(tensor, FakeTensor) for tensor in tensors) or _to_be_filled(func, args, kwargs):
            result = self._as_ghost(func, args, kwargs)
        else:
            # for real, constants too: a model may cache them beyond this trace
            with unset_fake_temporarily():
                result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._born(leaf)
        return result

    def _as_ghost(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func in _INDEXING:
            args = (args[0], [self._counted(index) for index in _spread(args[1])], *args[2:])
        with self._fake:
            return func(*args, **kwargs)

    def _counted(self, index: Any) -> Any:
        """A real mask as an index of as many places as it is true at: where they are does not matter."""
        if not (isinstance(index, Tensor) and index.dtype == torch.bool and not isinstance(index, FakeTensor)):
            return index
        with unset_fake_temporarily():
            count = int(index.sum())
        with self._fake:
            return torch.empty(count, dtype=torch.long, device=index.device)


def _spread(indices: Any) -> Iterator[Any]:
    """A mask over several axes takes as many indices."""
    for index in indices:
        yield index
        if isinstance(index, Tensor) and index.dtype == torch.bool and not isinstance(index, FakeTensor):
            yield from [index] * (index.ndim - 1)


def _to_be_filled(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether an operation makes room for floats of several axes, as for results that are put in place by place."""
    dtype = kwargs.get("dtype") or torch.get_default_dtype()
    return func in _ROOM and dtype.is_floating_point and len(args[0]) > 1


@contextmanager
def without_numbers(model: nn.Module, device: torch.device, dtype: torch.dtype | None) -> Iterator[FakeTensorMode]:
    """Until the context ends, a model's parameters and buffers are fake ones on a device; the model may be on meta.

    Args:
        model: any module; what trains becomes float32 as in training.
        device: where it would be.
        dtype: of what is frozen, where that is a float.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    made: dict[int, Any] = {}
    before = [(module, dict(module._parameters), dict(module._buffers)) for module in model.modules()]
    try:
        with fake:
            for module, parameters, buffers in before:
                for name, value in parameters.items():
                    if value is not None:
                        module._parameters[name] = made.setdefault(id(value), _fake_parameter(value, device, dtype))
                for name, buffer in buffers.items():
                    if buffer is not None and buffer.is_floating_point():
                        module._buffers[name] = made.setdefault(id(buffer), torch.empty_like(buffer, device=device))
        yield fake
    finally:
        for module, parameters, buffers in before:
            module._parameters.update(parameters)
            module._buffers.update(buffers)


def _fake_parameter(value: nn.Parameter, device: torch.device, dtype: torch.dtype | None) -> nn.Parameter:
    wanted = torch.float32 if value.requires_grad else dtype or value.dtype
    kind = wanted if value.is_floating_point() else value.dtype
    made = torch.empty(value.shape, dtype=kind, device=device)
    return nn.Parameter(made, requires_grad=value.requires_grad)


class Ledger:
    """Bytes that live on a device, by what they are for, and their highest sum.

    Attributes:
        label: what a tensor that is made now is for.
        live: bytes by label.
        peak: `live` when its sum was highest.
    """

    def __init__(self, device: torch.device):
        self.label = "working"
        self.live: dict[str, int] = {}
        self.peak: dict[str, int] = {}
        self._device, self._total, self._highest = device.type, 0, 0
        self._labels: dict[int, str] = {}
        self._refs: dict[int, Any] = {}

    def born(self, tensor: Tensor) -> None:
        """Count a tensor's storage until it is gone; each once."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        device = tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device  # quicker than .device
        if device.type != self._device or key in self._refs:
            return
        size = storage.nbytes()
        self._labels[key] = self.label
        self._refs[key] = weakref.ref(storage, lambda _: self._gone(key, size))
        self._add(self.label, size)
        if self._total > self._highest:
            self._highest, self.peak = self._total, dict(self.live)

    def leave_out(self, tensor: Tensor) -> None:
        """Never count a tensor, nor its views: it is counted elsewhere."""
        self._refs[tensor.untyped_storage()._cdata] = None

    def is_for(self, tensor: Tensor, label: str) -> None:
        """Say of a counted tensor what it is for."""
        storage = tensor.untyped_storage()
        old = self._labels.get(storage._cdata)
        if old is not None:
            self._labels[storage._cdata] = label
            self._add(old, -storage.nbytes())
            self._add(label, storage.nbytes())

    def _gone(self, key: int, size: int) -> None:
        del self._refs[key]
        self._add(self._labels.pop(key), -size)

    def _add(self, label: str, size: int) -> None:
        self.live[label] = self.live.get(label, 0) + size
        self._total += size
