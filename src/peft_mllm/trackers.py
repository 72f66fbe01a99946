"""Metrics to TensorBoard, W&B or trackio when asked, through accelerate; metrics.jsonl needs none of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from peft_mllm.errors import SpecError


class Trackers:
    """The trackers of a run, in its main process."""

    def __init__(self, names: Sequence[str], *, directory: Path, title: str, main: bool):
        self._accelerator = _start(names, directory, title) if names and main else None

    def log(self, line: Mapping[str, Any]) -> None:
        """Send a line of metrics.jsonl."""
        if self._accelerator is not None:
            values = {key: value for key, value in line.items() if key != "step"}
            self._accelerator.log(values, step=line["step"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._accelerator is not None:
            self._accelerator.end_training()


def _start(names: Sequence[str], directory: Path, title: str) -> Any:
    from accelerate import Accelerator
    from accelerate.tracking import filter_trackers

    available = [str(tracker) for tracker in filter_trackers(list(names), directory)]
    missing = [name for name in names if not any(name in tracker.lower() for tracker in available)]
    if missing:
        raise SpecError(
            f"train.report_to: {', '.join(missing)} is not installed. pip install 'peft-mllm[{missing[0]}]'"
        )
    accelerator = Accelerator(log_with=list(names), project_dir=str(directory))
    accelerator.init_trackers("peft-mllm", init_kwargs={"wandb": {"name": title}})
    return accelerator
