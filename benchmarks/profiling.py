"""Where the time of our step goes: torch's operators, and Python's functions."""

from __future__ import annotations

import cProfile
import io
import pstats
from contextlib import suppress
from typing import TYPE_CHECKING

import torch

from benchmarks.ours import ours
from benchmarks.turns import OverError
from benchmarks.workloads import WORKLOADS

if TYPE_CHECKING:
    from benchmarks.comparisons import Bench

STEPS = 3
SHOWN = 25


def profile(bench: Bench, workload: str, method: str = "lora") -> str:
    """Two tables of the second and third step: operators by their own time, functions by their cumulative time."""
    operators, functions, done = torch.profiler.profile(), cProfile.Profile(), 0

    def stepped() -> None:
        nonlocal done
        done += 1
        if done == 1:
            operators.__enter__()
            functions.enable()
        if done == STEPS:
            functions.disable()
            operators.__exit__(None, None, None)
            raise OverError

    with bench.case(WORKLOADS[workload], method) as case, suppress(OverError):
        ours(case).train(stepped)
    sort = "self_cuda_time_total" if bench.device.type == "cuda" else "self_cpu_time_total"
    table = operators.key_averages().table(sort_by=sort, row_limit=SHOWN)
    text = io.StringIO()
    pstats.Stats(functions, stream=text).sort_stats("cumulative").print_stats(2 * SHOWN)
    return f"{table}\n{text.getvalue()}"
