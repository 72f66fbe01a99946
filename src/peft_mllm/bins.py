"""Old `.bin` weights: the one module that reads them, with `weights_only`, so that no code in a file is ever run.

A `.bin` file is a pickle inside a zip archive. torch's `weights_only` reader builds tensors and plain containers and
refuses everything else.
"""

from __future__ import annotations

import errno
import json
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_mllm.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

BIN = "pytorch_model.bin"
BIN_INDEX = "pytorch_model.bin.index.json"

_LFS_POINTER = b"version https://git-lfs"
# How torch's reader names what it will not build.
_FOREIGN = re.compile(r"[Uu]nsupported (?:global: )?GLOBAL (\S+)")


def read_bins(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of all weights of a directory, file by file; its index goes before a single file.

    The files are mapped, not read: a tensor takes memory when it is copied, and no earlier. Copy what is to be kept.

    Args:
        directory: has `pytorch_model.bin.index.json` with its shards, or `pytorch_model.bin`.

    Raises:
        ModelError: there is neither; a shard is missing, damaged or holds more than tensors; or a tensor of the
            index is in no shard.
    """
    if not (directory / BIN_INDEX).is_file():
        yield from _read(directory / BIN, mapped=True).items()
        return
    for shard, listed in shards_of(directory / BIN_INDEX).items():
        tensors = _read(directory / shard, mapped=True)
        check_listed(listed, tensors, directory / shard)
        yield from tensors.items()


def read_bin(file: Path) -> dict[str, Tensor]:
    """The tensors of one `.bin` file, by name, in memory.

    Raises:
        ModelError: it is missing, damaged, or holds anything but tensors.
    """
    return _read(file, mapped=False)


def bin_names(directory: Path) -> set[str]:
    """The names that `read_bins` would give; of what has an index, as it says."""
    if (directory / BIN_INDEX).is_file():
        return {name for names in shards_of(directory / BIN_INDEX).values() for name in names}
    return set(_read(directory / BIN, mapped=True))


def _read(file: Path, *, mapped: bool) -> dict[str, Tensor]:
    import torch

    if not file.is_file():
        raise ModelError(f"{file} is missing: download it again.")
    with file.open("rb") as opened:
        if opened.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise ModelError(f"{file} is a git-lfs pointer, not the weights themselves: `git lfs pull` fetches them.")
    # Only the zip layout (torch >= 1.6) can be mapped. A truncated file is none: a zip's directory is at its end.
    mapped = mapped and zipfile.is_zipfile(file)
    try:
        read = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch raises many kinds, pickle's own among them, for what is no file of tensors
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # the disk's fault, but for a file too short
            raise
        raise ModelError(_refusal(file, error)) from error
    return _only_tensors(read, file)


def shards_of(index: Path) -> dict[str, list[str]]:
    """Shard file -> names of its tensors, as an index says, in the order of the file names.

    Raises:
        ModelError: the index is no such file, or names a shard outside its directory.
    """
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        shards: dict[str, list[str]] = {name: [] for name in sorted(set(weight_map.values()))}
        for tensor, shard in weight_map.items():
            shards[shard].append(tensor)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} is no index of weights ({error!r}): download it again.") from error
    strange = [name for name in shards if Path(name).name != name]
    if strange:
        raise ModelError(f"{index} names files outside its directory: {', '.join(strange)}.")
    return shards


def check_listed(listed: Iterable[str], there: Iterable[str], shard: Path) -> None:
    """Raise `ModelError` when a shard lacks tensors that its index lists."""
    absent = sorted(set(listed) - set(there))
    if absent:
        shown = ", ".join(absent[:5]) + (f" and {len(absent) - 5} more" if len(absent) > 5 else "")
        raise ModelError(f"{shard} lacks {shown}, which its index lists: download both again.")


def _refusal(file: Path, error: Exception) -> str:
    """What to say; never torch's own words on `weights_only`, which advise to switch it off."""
    found = _FOREIGN.search(str(error))
    if found:
        return (
            f"{file} holds Python objects ({found[1]}), not only tensors, and is refused: reading it could run code. "
            "Ask for a safetensors file or a plain state dict; or, if it should be one, download it again."
        )
    said = str(error).splitlines()
    reason = f" ({said[0]})" if said and "Weights only" not in said[0] else ""
    return f"{file} is damaged or incomplete, or no file of weights: download it again.{reason}"


def _only_tensors(read: Any, file: Path) -> dict[str, Tensor]:
    import torch

    if not isinstance(read, Mapping):
        raise ModelError(f"{file} holds a {type(read).__name__}, not tensors by name: it is no file of weights.")
    others = [str(name) for name, value in read.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise ModelError(f"{file}: {', '.join(others[:5])} are no tensors: it is no plain file of weights.")
    return {str(name): value.detach() for name, value in read.items()}
