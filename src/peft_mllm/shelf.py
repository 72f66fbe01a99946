"""A shelf: the explicit table name -> class of everything of one kind, imported only when it is used.

    METHODS: Shelf[Method] = Shelf("method", package=__name__, items={
        "lora": Item("lora:LoRA", "low-rank updates of linear layers (Hu et al. 2021)"),
    })
    METHODS["lora"]          # imports peft_mllm.methods.lora and returns its class LoRA

The order of the table is the order of display. Other packages add items without touching ours, through the
entry point group `peft_mllm.methods` (`.models`, `.tasks`, `.metrics`): `name = "their_package.module:Class"`.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, NamedTuple, TypeVar

from peft_mllm.errors import UserError

T = TypeVar("T")


class Item(NamedTuple):
    """Where a class is, and what it is in one line."""

    target: str
    summary: str


class UnknownNameError(UserError):
    """A name that is on no shelf, with the nearest one that is."""


def did_you_mean(word: str, known: list[str]) -> str:
    """A sentence that names the nearest known word, or lists them all."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"Did you mean '{near[0]}'?" if near else f"Known: {', '.join(known)}."


class Shelf(Mapping[str, type[T]], Generic[T]):
    """A read-only mapping from names to classes, with one summary line each."""

    def __init__(self, kind: str, *, package: str, items: Mapping[str, Item]):
        self.kind = kind
        self._package = package
        self._items = dict(items)

    def __getitem__(self, name: str) -> type[T]:
        if name in self._items:
            module, attribute = self._items[name].target.split(":")
            return getattr(importlib.import_module(f"{self._package}.{module}"), attribute)
        for entry in self._foreign():
            if entry.name == name:
                return entry.load()
        raise UnknownNameError(f"There is no {self.kind} '{name}'. {did_you_mean(name, list(self))}")

    def __contains__(self, name: object) -> bool:
        return name in self._items or any(entry.name == name for entry in self._foreign())

    def __iter__(self) -> Iterator[str]:
        yield from self._items
        yield from (entry.name for entry in self._foreign() if entry.name not in self._items)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def summary(self, name: str) -> str:
        """The one line that says what it is; imports nothing for our own items."""
        if name in self._items:
            return self._items[name].summary
        return (self[name].__doc__ or "").strip().split("\n")[0]

    def _foreign(self) -> tuple[EntryPoint, ...]:
        return tuple(entry_points(group=self._package))
