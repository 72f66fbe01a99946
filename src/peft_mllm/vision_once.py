"""Several questions about one image in a padded batch: the vision tower sees it once.

For models and options that do not go by trees (decoding.py). Exact: every row gets the features that its own pass
through the tower would have given. A tower that takes its images in another shape than (N, C, H, W) is left as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from peft_mllm.data.seeing import Seeing
from peft_mllm.tuned import Tuned

Keys = Sequence[Sequence[str]]
"""The key of each image of each row of a batch."""


@contextmanager
def vision_once(tuned: Tuned, keys: Keys) -> Iterator[None]:
    """Until the context ends, let the vision tower see each of a batch's distinct images once."""
    flat = [name for names in keys for name in names]
    distinct = list(dict.fromkeys(flat))
    tower = None if isinstance(tuned.family.pixels, Seeing) else _tower(tuned)  # which shows it each image once itself
    if tower is None or len(distinct) == len(flat):
        yield
        return
    first = torch.tensor([flat.index(name) for name in distinct], device=tuned.device)
    back = torch.tensor([distinct.index(name) for name in flat], device=tuned.device)
    narrowed = False

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal narrowed
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        narrowed = bool(tensors) and all(value.ndim == 4 and len(value) == len(flat) for value in tensors)
        if not narrowed:
            return None
        fewer = [value[first] if isinstance(value, Tensor) else value for value in args]
        named = {name: value[first] if isinstance(value, Tensor) else value for name, value in kwargs.items()}
        return tuple(fewer), named

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        return _spread(output, back, len(first)) if narrowed else output

    hooks = (
        tower.register_forward_pre_hook(before, with_kwargs=True),
        tower.register_forward_hook(after, with_kwargs=True),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _tower(tuned: Tuned) -> nn.Module | None:
    """The vision tower, where it is one module."""
    names = tuned.family.anatomy.vision
    return tuned.base.get_submodule(names[0]) if len(names) == 1 else None


def _spread(value: Any, back: Tensor, count: int) -> Any:
    """A tower's output for `count` images as that for all of them."""
    if isinstance(value, Tensor):
        return value[back] if value.ndim and len(value) == count else value
    if isinstance(value, Mapping):  # transformers' outputs are mappings of their fields
        spread = {name: _spread(item, back, count) for name, item in value.items()}
        return type(value)(**spread)
    return type(value)(_spread(item, back, count) for item in value) if isinstance(value, (tuple, list)) else value
