"""Eight small runs on one base: together, against one after the other.

Runs of the embedded base (a million parameters) that learn generated scenes, four questions in a step: two each of four
methods, with seeds and learning rates of their own. A pair is the whole of them both ways, start to result: as commands
(`peft-mllm train A.yaml ... H.yaml` against eight times `peft-mllm train X.yaml`), or in one process that has imported
everything before. The gate is the adapters' bytes.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 16, "alpha": 32, "dropout": 0},
    "ia3": {},
    "adapter": {"bottleneck": 32, "dropout": 0},
    "prefix": {"virtual_tokens": 20, "init_std": 0.5},
}
RATES = {"lora": 1e-3, "ia3": 3e-2, "adapter": 1e-2, "prefix": 1e-1}
PAIRS = 3
STEPS = 60
QUESTIONS = 4
"""In a step of each run."""


@dataclass(frozen=True)
class Both:
    """CPU seconds of each pass, in pairs.

    Attributes:
        together, apart: of all runs.
        equal: whether every adapter came out the same, byte by byte.
    """

    together: list[float]
    apart: list[float]
    equal: bool


def as_commands() -> Both:
    """Each a fresh process, as a user gives them."""

    def apart(files: Sequence[Path]) -> None:
        for file in files:
            _command([file])

    return _measured(_command, apart, _of_children)


def in_one_process() -> Both:
    """In this process."""
    from peft_mllm.run import run
    from peft_mllm.specfile import load_spec
    from peft_mllm.together import run_together

    def apart(files: Sequence[Path]) -> None:
        for file in files:
            run(load_spec(file), quiet=True)

    def together(files: Sequence[Path]) -> None:
        run_together([load_spec(file) for file in files], quiet=True)

    with tempfile.TemporaryDirectory() as folder:  # what a process does once
        together(_written(Path(folder)))
    return _measured(together, apart, time.process_time)


def _measured(
    together: Callable[[Sequence[Path]], None],
    apart: Callable[[Sequence[Path]], None],
    clock: Callable[[], float],
) -> Both:
    """Both ways in turn."""
    took: dict[str, list[float]] = {"together": [], "apart": []}
    adapters: set[tuple[str, ...]] = set()
    for _ in range(PAIRS):
        for name, way in (("together", together), ("apart", apart)):
            with tempfile.TemporaryDirectory() as folder:
                files = _written(Path(folder))
                before = clock()
                way(files)
                took[name].append(clock() - before)
                adapters.add(tuple(_digest(file) for file in files))
    return Both(took["together"], took["apart"], equal=len(adapters) == 1)


def _written(folder: Path) -> list[Path]:
    """A file of each run."""
    files = []
    for number in range(8):
        method = [*METHODS][number // 2]
        files.append(folder / f"{number}.yaml")
        files[-1].write_text(yaml.safe_dump(_spec(method, number, folder)), encoding="utf-8")
    return files


def _spec(method: str, number: int, folder: Path) -> dict[str, Any]:
    return {
        "model": "embedded",
        "method": {"name": method, **METHODS[method]},
        "task": {"name": "scenes_next", "size": {"train": 256, "validation": 32, "test": 64}, "seed": 1},
        "retention": {"text": False, "samples": 0},
        "train": {
            "max_steps": STEPS,
            "per_device_train_batch_size": QUESTIONS,
            "per_device_eval_batch_size": 64,
            "learning_rate": RATES[method] * (1 + number % 2),
            "save_strategy": "no",
        },
        "seed": number,
        "output_dir": str(folder / str(number)),
    }


def _command(files: Sequence[Path]) -> None:
    command = [sys.executable, "-m", "peft_mllm", "train", *map(str, files)]
    subprocess.run(command, check=True, capture_output=True)


def _of_children() -> float:
    """CPU seconds of the processes that this one has started and waited for."""
    times = os.times()
    return times.children_user + times.children_system


def _digest(file: Path) -> str:
    adapter = file.with_suffix("") / "adapter" / "adapter_model.safetensors"
    return hashlib.sha256(adapter.read_bytes()).hexdigest()
