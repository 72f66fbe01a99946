"""What is kept of an image: nested values as a form and a list of tensors, which become bytes and back."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

FORM = "form"


class UnfitError(Exception):
    """A model's features cannot be kept; the message says why, as the end of a sentence."""


@dataclass(frozen=True)
class Entry:
    """Nested lists and dicts whose tensors are numbered.

    Attributes:
        form: JSON data: `{"tensor": i}`, `{"blank": shape, "dtype": name}`, `{"items": [...]}`, `{"fields": {...}}`,
            `{"value": plain}`.
        tensors: on the CPU.
    """

    form: Any
    tensors: tuple[Tensor, ...]

    @classmethod
    def of(cls, value: Any, *, keep: Callable[[Tensor], bool] = lambda tensor: True) -> Entry:
        """Take a value apart.

        Args:
            value: tensors in lists, tuples and mappings.
            keep: False for a tensor of which only shape and type matter.

        Raises:
            UnfitError: there is something else in it.
        """
        tensors: list[Tensor] = []
        form = _form(value, tensors, keep)
        return cls(form, tuple(tensors))

    def value(self) -> Any:
        """The value anew; a blank tensor is all ones, of one number in memory."""
        return _value(self.form, self.tensors)

    @property
    def nbytes(self) -> int:
        """Of its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def to_bytes(self) -> bytes:
        """As safetensors, the form among them as text."""
        form = torch.frombuffer(bytearray(json.dumps(self.form).encode()), dtype=torch.uint8)
        return save({FORM: form} | {str(i): tensor for i, tensor in enumerate(self.tensors)})

    @classmethod
    def from_bytes(cls, content: bytes) -> Entry:
        """What `to_bytes` wrote."""
        tensors = load(content)
        form = json.loads(tensors.pop(FORM).numpy().tobytes())
        return cls(form, tuple(tensors[str(i)] for i in range(len(tensors))))


def _form(value: Any, tensors: list[Tensor], keep: Callable[[Tensor], bool]) -> Any:
    if isinstance(value, Tensor):
        if not keep(value):
            return {"blank": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
        # a copy: several may lie in one storage, which would be kept as a whole
        tensors.append(value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format))
        return {"tensor": len(tensors) - 1}
    if isinstance(value, Mapping):
        return {"fields": {str(name): _form(item, tensors, keep) for name, item in value.items()}}
    if isinstance(value, list | tuple):
        return {"items": [_form(item, tensors, keep) for item in value], "tuple": isinstance(value, tuple)}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    raise UnfitError(f"there is a {type(value).__name__} among what it computes of an image")


def _value(form: Any, tensors: Sequence[Tensor]) -> Any:
    if "tensor" in form:
        return tensors[form["tensor"]]
    if "blank" in form:
        return torch.ones(1, dtype=getattr(torch, form["dtype"])).expand(form["blank"])
    if "fields" in form:
        return {name: _value(item, tensors) for name, item in form["fields"].items()}
    if "items" in form:
        items = [_value(item, tensors) for item in form["items"]]
        return tuple(items) if form["tuple"] else items
    return form["value"]


def joined(values: Sequence[Any], *, in_a_row: Collection[str] = (), path: str = "") -> Any:
    """Values of several images as that of all of them: tensors one after the other along their first axis.

    Args:
        values: of one form.
        in_a_row: where lists are put one after the other, too; elsewhere they are joined item by item.
        path: where in the whole these values are: `fields.` and `[]` for each list on the way.

    Raises:
        ValueError, RuntimeError: they are not of one form.
    """
    first = values[0]
    if len(values) == 1:
        return first
    if isinstance(first, Tensor):
        return torch.cat(list(values))
    if isinstance(first, Mapping):
        of = {name: [value[name] for value in values] for name in first}
        return {name: joined(items, in_a_row=in_a_row, path=f"{path}.{name}") for name, items in of.items()}
    if isinstance(first, list | tuple) and path in in_a_row:
        return type(first)(item for value in values for item in value)
    if isinstance(first, list | tuple):
        pairs = zip(*values, strict=True)
        return type(first)(joined(items, in_a_row=in_a_row, path=f"{path}[]") for items in pairs)
    return first


def rows_in(parts: Sequence[Any], whole: Any, path: str = "") -> Iterator[str]:
    """The paths of the lists that have one item an image, and not one a layer, as `joined` takes them."""
    if isinstance(whole, Mapping):
        for name, value in whole.items():
            yield from rows_in([part[name] for part in parts], value, f"{path}.{name}")
    elif isinstance(whole, list | tuple):
        if len(whole) == sum(map(len, parts)):
            yield path
        elif whole and all(parts):
            yield from rows_in([part[0] for part in parts], whole[0], f"{path}[]")


def tensors_of(value: Any) -> list[Tensor]:
    """All tensors in a value, in order."""
    if isinstance(value, Tensor):
        return [value]
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return [tensor for item in inner for tensor in tensors_of(item)]


def moved(value: Any, device: torch.device) -> Any:
    """A value with its tensors on a device."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {name: moved(item, device) for name, item in value.items()}
    return type(value)(moved(item, device) for item in value) if isinstance(value, list | tuple) else value
