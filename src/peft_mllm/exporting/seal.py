"""The seal: a directory, loaded in a fresh process, gives the logits of the process that wrote it.

It is loaded with transformers and peft alone where that gives these logits, else after `import peft_mllm`, else by
our own loader; the card shows the lines that were found to work. `seal.json` then has the sha256 of every file.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from peft_mllm.card import Level
from peft_mllm.errors import ModelError
from peft_mllm.exporting.probe import Heard, largest_difference
from peft_mllm.files import file_digest, read_sealed, sealed_json
from peft_mllm.loading import source_of
from peft_mllm.spec import ModelSpec

SEAL = "seal.json"
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}
"""Of the largest logit, by the weights' type; in bfloat16 another attention kernel is another rounding."""


@dataclass(frozen=True)
class Sealed:
    """A directory that passed.

    Attributes:
        by: who loaded it.
        difference: of the logits, relative to the largest.
        tolerance: what it may be.
    """

    by: Level
    difference: float
    tolerance: float


@dataclass(frozen=True)
class Reload:
    """How a directory is loaded in a fresh process.

    Attributes:
        model: of an adapter its base; of a whole model the directory itself.
        adapter: the directory, where it is an adapter.
        dtype: torch's name of the weights' type.
        device: torch's name of the device.
        in_peft_model: whether the method acts in PeftModel's forward, and not in the base's own.
    """

    model: ModelSpec
    adapter: Path | None
    dtype: str
    device: str
    in_peft_model: bool = False

    def levels(self) -> tuple[Level, ...]:
        """Who might load it, the plainest first."""
        model = self.model
        if model.path.startswith("tiny:") or model.vision_tower or model.quantization != "none":
            return ("ours",)
        return ("plain", "taught", "ours")

    def request(self, by: Level, asked: dict[str, str], answers: Path) -> dict[str, Any]:
        """What the fresh process reads."""
        return {
            "by": by,
            "model": self.model.model_dump(mode="json"),
            "source": source_of(self.model.path),
            "attn_implementation": self.model.attn_implementation,
            "adapter": str(self.adapter) if self.adapter else None,
            "dtype": self.dtype,
            "device": self.device,
            "bf16": self.dtype == "bfloat16",
            "in_peft_model": self.in_peft_model,
            "threads": torch.get_num_threads(),
            "asked": asked,
            "answers": str(answers),
        }


def prove(reload: Reload, heard: Heard) -> Sealed:
    """Load a directory in a fresh process and compare what it answers.

    Raises:
        ModelError: no way of loading it gives these logits.
    """
    tolerance = TOLERANCE[reload.dtype]
    failures = []
    with tempfile.TemporaryDirectory(prefix="peft-mllm-seal-") as scratch:
        asked = _write(heard, Path(scratch))
        for by in reload.levels():
            answers = _answers(reload.request(by, asked, Path(scratch) / f"{by}.safetensors"), Path(scratch))
            if isinstance(answers, str):
                failures.append(f"{by}: {answers}")
                continue
            difference = largest_difference(answers, heard.logits)
            if difference <= tolerance:
                return Sealed(by, difference, tolerance)
            failures.append(f"{by}: logits differ by {difference:.1e} of the largest, and {tolerance:.0e} is rounding")
    raise ModelError(
        "What was written does not give the same logits in a fresh process, so it is not exported "
        f"({'; '.join(failures)})."
    )


def write_seal(directory: Path, facts: dict[str, Any]) -> None:
    """Write seal.json: facts, and the sha256 of every other file."""
    files = {name: file_digest(directory / name) for name in _files(directory)}
    (directory / SEAL).write_bytes(sealed_json({**facts, "files": files}))


def broken(directory: Path) -> list[str]:
    """Why a sealed directory is not what was sealed; empty if it is."""
    try:
        listed = read_sealed(directory / SEAL)["files"]
    except (OSError, ValueError) as error:
        return [f"{SEAL} {error}"]
    missing = [f"{name} is missing" for name in listed if not (directory / name).is_file()]
    changed = [
        f"{name} has another sha256 than was sealed"
        for name, digest in listed.items()
        if (directory / name).is_file() and file_digest(directory / name) != digest
    ]
    return missing + changed


def _files(directory: Path) -> list[str]:
    paths = (path for path in directory.rglob("*") if path.is_file() and path.name != SEAL)
    return sorted(path.relative_to(directory).as_posix() for path in paths)


def _write(heard: Heard, scratch: Path) -> dict[str, str]:
    """Each conversation as a file of tensors; their paths by number."""
    asked = {}
    for number, (inputs, columns) in enumerate(zip(heard.inputs, heard.columns, strict=True)):
        file = scratch / f"asked-{number}.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in {**inputs, "columns": columns}.items()}, file)
        asked[str(number)] = str(file)
    return asked


def _answers(request: dict[str, Any], scratch: Path) -> Sequence[Tensor] | str:
    """The logits of the fresh process; or, where it failed, its last word."""
    file = scratch / f"{request['by']}.json"
    file.write_text(json.dumps(request), encoding="utf-8")
    # -P: the folder of the script is not on the path, where our modules would stand for others of their names
    command = [sys.executable, "-P", str(Path(__file__).with_name("reload.py")), str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        return said[-1] if said else f"exit code {done.returncode}"
    answers = load_file(request["answers"])
    return [answers[number] for number in request["asked"]]
