"""What lies in a directory that the study's released code, or the Trainer under it, has left."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from peft_mllm.bins import read_bin
from peft_mllm.errors import ModelError
from peft_mllm.files import read_json
from peft_mllm.released.names import plain

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", "pytorch_model.bin")
"""The adapter; the last is what the Trainer wrote where it did not know the adapter's class."""
CONNECTORS = ("non_adapter_trainables.bin", "non_lora_trainables.bin", "connector.bin", "mm_projector.bin")
"""What was trained beside the adapter."""

_LEFT = {
    "config.json": "the base's configuration",
    "training_args.bin": "the Trainer's arguments, a pickle: reading it would run code",
    "trainer_state.json": "the Trainer's log",
    "optimizer.pt": "state of an unfinished training",
    "scheduler.pt": "state of an unfinished training",
    "scaler.pt": "state of an unfinished training",
    "rng_state*.pth": "state of an unfinished training",
    "checkpoint-*": "an unfinished state, in a directory of its own",
    "global_step*": "DeepSpeed's own state",
    "latest": "DeepSpeed's own state",
    "zero_to_fp32.py": "DeepSpeed's own program: it is not run",
    "README.md": "peft's card",
    "generation_config.json": "the base's configuration",
    "preprocessor_config.json": "the base's image processor",
    "tokenizer*": "the base's tokenizer",
    "*_tokens*.json": "the base's tokenizer",
    "tokenization_*.py": "the base's tokenizer",
    "qwen.tiktoken": "the base's tokenizer",
}
"""Names that may lie beside an adapter, and what they are."""
_MAY_BE_WEIGHTS = (".bin", ".safetensors", ".pt", ".pth", ".ckpt", ".index.json")


@dataclass(frozen=True)
class Stored:
    """One tensor of the directory.

    Attributes:
        file: where it is.
        name: as written there.
        plain: that name without the wrappers around the base.
        tensor: its value.
    """

    file: str
    name: str
    plain: str
    tensor: Tensor


@dataclass(frozen=True)
class Released:
    """A directory as it was read.

    Attributes:
        directory: where it is.
        config: the adapter_config.json; None where there is none.
        stored: its tensors, each once.
        repeated: file -> how many of its tensors another file has as well, with the same values.
        files: the weight files that were read.
        left: file -> why it was not read.
    """

    directory: Path
    config: Mapping[str, Any] | None
    stored: tuple[Stored, ...]
    repeated: Mapping[str, int]
    files: tuple[str, ...]
    left: Mapping[str, str]


def read_released(directory: Path) -> Released:
    """Read every weight file of a directory.

    Raises:
        ModelError: it holds no adapter, weights under a name that is not known, or two values for one tensor.
    """
    if not directory.is_dir():
        raise ModelError(f"There is no directory {directory}.")
    names = sorted(path.name for path in directory.iterdir())
    if not any(name in names for name in (*WEIGHTS, *CONNECTORS)):
        raise ModelError(f"{directory} holds none of the files that the released code writes: {', '.join(WEIGHTS)}.")
    stored: dict[str, Stored] = {}
    repeated: dict[str, int] = {}
    files = tuple(name for name in (*WEIGHTS, *CONNECTORS) if name in names)
    for file in files:
        for name, tensor in _read(directory / file).items():
            new = Stored(file, name, plain(name), tensor)
            other = stored.setdefault(new.plain, new)
            if other is not new:
                _check_same(other, new)
                repeated[file] = repeated.get(file, 0) + 1
    return Released(
        directory=directory,
        config=_config(directory / CONFIG) if CONFIG in names else None,
        stored=tuple(stored.values()),
        repeated=repeated,
        files=files,
        left={name: _why_left(directory / name) for name in names if name not in (CONFIG, *files)},
    )


def _read(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".bin":
        return read_bin(file)
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{file} cannot be read: {error}") from error


def _config(file: Path) -> dict[str, Any]:
    try:
        config = read_json(file)
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read: {error}") from error
    if not isinstance(config, dict) or "peft_type" not in config:
        raise ModelError(f"{file} is no adapter's configuration: it has no peft_type.")
    return config


def _check_same(first: Stored, second: Stored) -> None:
    if first.tensor.shape != second.tensor.shape or not torch.equal(first.tensor, second.tensor):
        raise ModelError(
            f"{first.file} and {second.file} hold different values of {second.name}. "
            "Move the file that is not meant out of the directory."
        )


def _why_left(path: Path) -> str:
    for pattern, why in _LEFT.items():
        if fnmatch(path.name, pattern):
            return why
    if path.is_file() and path.name.endswith(_MAY_BE_WEIGHTS):
        raise ModelError(
            f"{path} may hold weights, but under that name the released code wrote none. "
            "Move it out of the directory, or rename it to what it is."
        )
    return "nothing that the released code wrote"
