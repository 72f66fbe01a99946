"""A run directory for tests: what it holds, and how to look at it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from peft_mllm.rundir import RunDir, checkpoint_name

SPEC = {"model": "tiny", "train": {"learning_rate": 1e-4, "seed": 1, "workers": 2}, "tasks": ["a", "b"]}
FILES = ("adapter.safetensors", "optimizer/state.json", "empty.txt", "MANIFEST.json")


def content(step: int) -> dict[str, bytes]:
    return {
        "adapter.safetensors": bytes((step + i) % 251 for i in range(999)),
        "optimizer/state.json": b'{"step": %d}' % step,
        "empty.txt": b"",
    }


def writer(step: int, point: Callable[[], None] = lambda: None) -> Callable[[Path], None]:
    """Writes the content of a step; calls `point` in the middle of each file."""

    def write(directory: Path) -> None:
        for name, data in content(step).items():
            (directory / name).parent.mkdir(exist_ok=True)
            with (directory / name).open("wb") as file:
                file.write(data[: len(data) // 2])
                file.flush()
                point()
                file.write(data[len(data) // 2 :])

    return write


def holds(path: Path, step: int) -> bool:
    return all((path / name).read_bytes() == data for name, data in content(step).items())


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def strange_names(path: Path) -> list[str]:
    return [entry.name for entry in path.rglob("*") if entry.name.startswith((".tmp-", ".trash-"))]


def commit(run: RunDir, *steps: int) -> None:
    for step in steps:
        run.commit(checkpoint_name(step), writer(step), facts={"loss": step / 100})
