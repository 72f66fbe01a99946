"""What a result must say so that somebody else can get it again: versions, machine, memory, fingerprints."""

from __future__ import annotations

import hashlib
import json
import platform
import resource
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor, nn

from peft_mllm.pieces import whole
from peft_mllm.record import Record

PACKAGES = (
    "peft-mllm",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "bitsandbytes",
    "safetensors",
    "tokenizers",
    "pillow",
    "numpy",
)


@cache
def version_of(package: str) -> str:
    """Of an installed package; reading it takes milliseconds."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def environment(device: torch.device) -> dict[str, str | int]:
    """Versions and machine; nothing of the user's."""
    versions: dict[str, str | int] = {name: version_of(name) for name in PACKAGES}
    return versions | {
        "python": platform.python_version(),
        "system": platform.system(),
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
    }


def peak_memory(device: torch.device) -> int:
    """Bytes: of the device where there is one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts kilobytes, but bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def data_fingerprint(records: Iterable[Record]) -> str:
    """A hash over the records in order: texts, answers and image contents; not paths, not times."""
    total = hashlib.sha256()
    for record in records:
        said = [[turn.role, turn.text] for turn in record.turns]
        text = json.dumps([record.id, said, [image.key for image in record.images]], ensure_ascii=True)
        total.update(hashlib.sha256(text.encode()).digest())
    return total.hexdigest()


def weights_fingerprint(model: nn.Module) -> str:
    """A hash over names, types and shapes of all weights, and up to 1,024 evenly spaced values of each.

    Enough to tell two checkpoints apart, and fast for billions of parameters.
    """
    return tensors_fingerprint(model.state_dict())


def tensors_fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Likewise of tensors by name."""
    total = hashlib.sha256()
    for name, tensor in tensors.items():
        flat = whole(tensor.detach()).flatten()
        seen = flat[:: max(1, flat.numel() // 1024)].float().cpu().contiguous()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(seen.numpy().tobytes())
    return total.hexdigest()
