"""A directory of weights, whichever format: safetensors first, else `.bin`; local, or fetched from the hub."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_mllm.bins import BIN, BIN_INDEX, bin_names, check_listed, read_bins, shards_of
from peft_mllm.errors import ModelError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SAFE = "model.safetensors"
SAFE_INDEX = "model.safetensors.index.json"

# What belongs to a model beside its weights; other files of a repository are not fetched.
SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "chat_template.jinja",
    "tokenizer.model",
    "qwen.tiktoken",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    SAFE_INDEX,
    BIN_INDEX,
)


def read_weights(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of all weights, file by file; a tensor takes memory when it is copied, and no earlier.

    Raises:
        ModelError: there are none; a file is missing or damaged; or a tensor of an index is in no file.
    """
    index = directory / SAFE_INDEX
    if index.is_file():
        for shard, listed in shards_of(index).items():
            yield from _read_safetensors(directory / shard, listed)
    elif (directory / SAFE).is_file():
        yield from _read_safetensors(directory / SAFE)
    elif (directory / BIN_INDEX).is_file() or (directory / BIN).is_file():
        yield from read_bins(directory)
    else:
        raise ModelError(f"{directory} has no weights: neither {SAFE} nor {BIN}, nor the index of either.")


def land(
    weights: Iterable[tuple[str, Tensor]],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype | None,
    *,
    what: str,
) -> dict[str, Tensor]:
    """Copies of weights for a model that was made without memory: all of them, and nothing else.

    Args:
        weights: the model's name of each, and the tensor.
        shapes: name -> shape of all that the model has.
        dtype: one type for all, or, without one, each in its own.
        what: whose they are, for messages: "The weights of models/llava".

    Raises:
        ModelError: tensors are missing, left over or of another shape; names them.
    """
    import torch

    landed: dict[str, Tensor] = {}
    left_over, misshapen, missing = [], [], set(shapes)
    for name, tensor in weights:
        missing.discard(name)
        if name not in shapes:
            left_over.append(name)
        elif tuple(tensor.shape) != shapes[name]:
            misshapen.append(f"{name} {tuple(tensor.shape)} instead of {shapes[name]}")
        else:  # a copy: the file is mapped into memory and shall be free to go
            landed[name] = torch.empty(tensor.shape, dtype=dtype or tensor.dtype).copy_(tensor)
    check_fit({"missing": sorted(missing), "left over": left_over, "of another shape": misshapen}, what=what)
    return landed


def check_fit(wrong: Mapping[str, Sequence[str]], *, what: str) -> None:
    """Raise `ModelError` when there are tensors that are wrong: what is wrong with them -> their names."""
    said = "; ".join(f"{len(names)} {how}: {_some(names)}" for how, names in wrong.items() if names)
    if said:
        raise ModelError(f"{what} do not fit its config.json. {said}.")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def weight_names(directory: Path) -> set[str]:
    """The names of all weights that `read_weights` would give, found without reading them; none where none are."""
    if (directory / SAFE_INDEX).is_file():
        return {name for names in shards_of(directory / SAFE_INDEX).values() for name in names}
    if (directory / SAFE).is_file():
        with _opened(directory / SAFE) as opened:
            return set(opened.keys())
    return bin_names(directory) if any((directory / name).is_file() for name in (BIN_INDEX, BIN)) else set()


def weight_files(directory: Path) -> list[Path]:
    """The files that `read_weights` reads."""
    if (directory / SAFE_INDEX).is_file():
        return [directory / shard for shard in shards_of(directory / SAFE_INDEX)]
    if (directory / SAFE).is_file():
        return [directory / SAFE]
    if (directory / BIN_INDEX).is_file():
        return [directory / shard for shard in shards_of(directory / BIN_INDEX)]
    return [directory / BIN] if (directory / BIN).is_file() else []


def local_directory(source: str | Path, *, weights: bool = True) -> Path:
    """Where a model lies: a directory itself, or the files of a hub id once they are fetched.

    Args:
        source: directory or hub id.
        weights: False fetches only the small files beside them.

    Raises:
        ModelError: it is neither a directory nor to be had from the hub.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    beside = len(path.parts) > 1 and path.parent.is_dir()
    if path.is_absolute() or str(source).startswith((".", "~")) or path.exists() or beside:
        raise ModelError(f"{source} is no directory.")
    try:
        return _fetch(str(source), weights=weights)
    except (OSError, ValueError) as error:  # all of the hub's errors are of these two kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"{source} is no directory here, and cannot be had from the hub ({reason}).") from error


def _fetch(repository: str, *, weights: bool) -> Path:
    """Only what is needed: a repository may hold the same weights in several formats."""
    from huggingface_hub import snapshot_download

    directory = Path(snapshot_download(repository, allow_patterns=list(SMALL_FILES)))
    for index, single in ((SAFE_INDEX, SAFE), (BIN_INDEX, BIN)) if weights else ():
        files = list(shards_of(directory / index)) if (directory / index).is_file() else [single]
        snapshot_download(repository, allow_patterns=files)
        if any((directory / file).is_file() for file in files):
            break
    return directory


def _read_safetensors(file: Path, listed: Sequence[str] = ()) -> Iterator[tuple[str, Tensor]]:
    with _opened(file) as opened:
        names = list(opened.keys())
        check_listed(listed, names, file)
        for name in names:
            yield name, opened.get_tensor(name)


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise ModelError(f"{file} is missing: download it again.")
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except SafetensorError as error:
        raise ModelError(f"{file} is damaged or incomplete: download it again. ({error})") from error
