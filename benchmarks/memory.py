"""Peak memory of two training steps, in a process of its own.

On a CPU: the greatest resident size, less what it was before the model was made. On a GPU: what torch allocated.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

STEPS = 2


def peak_of(side: str, shape: str, workload: str, *, factor: int, device: str, bf16: bool) -> int:
    """Bytes, measured in a fresh process that takes a step's samples at once.

    Raises:
        RuntimeError: it failed; with the end of its messages.
    """
    asked = json.dumps([side, shape, workload, factor, device, bf16])
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.memory", asked]
    root = str(Path(__file__).resolve().parent.parent)
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {side} failed: {done.stderr[-2000:]}")
    return int(done.stdout.split()[-1])


def measure(side: str, shape: str, workload: str, factor: int, device_name: str, bf16: bool) -> int:
    """Bytes at the peak of this process, which must be fresh."""
    import torch

    from benchmarks import ours, peers
    from benchmarks.case import Case
    from benchmarks.comparisons import data_of
    from benchmarks.shapes import make_base
    from benchmarks.turns import OverError
    from benchmarks.workloads import WORKLOADS

    device = torch.device(device_name)
    trainers: dict[str, Any] = {"ours": ours.ours, **peers.PEERS}
    before = _status("VmRSS")
    base = make_base(shape, device, bf16=bf16)
    done = 0

    def stepped() -> None:
        nonlocal done
        done += 1
        if done == STEPS:
            raise OverError

    with tempfile.TemporaryDirectory() as folder, suppress(OverError):
        chosen = WORKLOADS[workload].times(factor)
        case = Case(base, data_of(base, chosen, Path(folder)), chosen.step, "lora", Path(folder))
        trainers[side](case).train(stepped)
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM") - before


def _status(field: str) -> int:
    """Bytes of a field of the process's status; Linux only."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    sys.stdout.write(f"{measure(*json.loads(sys.argv[1]))}\n")
