"""Runs to export, and a seal that is quick: forked from this process instead of started anew."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import peft_mllm
from peft_mllm.exporting import reload, seal
from peft_mllm.exporting.probe import Heard, hear, probe_records
from peft_mllm.loading import load_family
from peft_mllm.spec import ModelSpec
from peft_mllm.tuned import load_adapter, untouched
from runs import fork, tiny, wait

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"name": "lora", "rank": 4, "alpha": 8},
    "dora": {"name": "lora", "rank": 4, "alpha": 8, "dora": True},
    "ia3": {"name": "ia3"},
    "adapter": {"name": "adapter", "bottleneck": 8},
    "prefix": {"name": "prefix", "virtual_tokens": 4},
    "layernorm": {"name": "layernorm"},
    "full": {"name": "full"},
    "none": {"name": "none"},
    "oft": {"name": "peft", "type": "OFT", "config": {"oft_block_size": 8}},
    "loha": {"name": "peft", "type": "LOHA", "config": {"r": 4}},
    "prompt": {"name": "peft", "type": "PROMPT_TUNING", "config": {"num_virtual_tokens": 4}},
}
FEW = {
    "max_steps": 2,
    "gradient_accumulation_steps": 1,
    "per_device_train_batch_size": 2,
    "eval_strategy": "no",
    "save_strategy": "no",
    "learning_rate": 3e-2,
    "connector_learning_rate": 1e-3,
}


def trained(directory: Path, method: str, *, connector: str = "frozen", model: Any = "embedded") -> Path:
    """A run of two steps at a rate that is felt."""
    task = {"name": "scenes_next", "size": {"train": 4, "validation": 0, "test": 4}}
    spec = tiny(directory, model=model, method=METHODS[method], task=task, train=FEW, connector=connector)
    peft_mllm.train(spec, quiet=True)
    return directory


@contextmanager
def quick_seals() -> Iterator[None]:
    """For tests of what is sealed and not of how: the process is new, but what it has imported is not."""

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        request = Path(command[-1])
        log = request.with_suffix(".log")

        def work() -> None:
            sys.argv = command[2:]
            reload.main()

        code = wait(fork(work, log))
        return subprocess.CompletedProcess(command, code, "", log.read_text())

    with patch.object(seal.subprocess, "run", run):
        yield


def heard(model: str | Path, adapter: Path | None = None, *, base: Any = None) -> Heard:
    """What a model, or an adapter on it, makes of the probe, loaded by ourselves."""
    family = base or load_family(ModelSpec(path=str(model)), dtype="float32")
    return hear(load_adapter(family, adapter) if adapter else untouched(family), probe_records())


def apart(mine: Heard, others: Heard) -> float:
    """The largest difference, relative to the largest logit."""
    differences = [(a - b).abs().max() for a, b in zip(mine.logits, others.logits, strict=True)]
    return (torch.stack(differences).max() / max(each.abs().max() for each in others.logits)).item()


def left_in(directory: Path) -> list[str]:
    """Everything below a directory, what is hidden too."""
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*"))
