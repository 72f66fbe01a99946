"""Features in memory, in front of those on the disk."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from peft_mllm.features.entry import Entry

MEMORY = 256 << 20
"""Bytes of features that are held beside those on the disk."""


class Held:
    """The features that were used last, in memory; several models of one base may hold theirs together."""

    def __init__(self) -> None:
        self._entries: OrderedDict[str, Entry] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def __contains__(self, digest: str) -> bool:
        return digest in self._entries

    def get(self, digest: str) -> Entry | None:
        """An image's features, if they are held."""
        entry = self._entries.get(digest)
        if entry is not None:
            self._entries.move_to_end(digest)
        return entry

    def put(self, digest: str, entry: Entry) -> None:
        """Hold an image's features, and let go of others where they are too much."""
        self.drop(digest)
        self._entries[digest] = entry
        self._bytes += entry.nbytes
        while len(self._entries) > 1 and self._bytes > MEMORY:
            self._bytes -= self._entries.popitem(last=False)[1].nbytes

    def drop(self, digest: str) -> None:
        """Let go of an image's features."""
        if digest in self._entries:
            self._bytes -= self._entries.pop(digest).nbytes
