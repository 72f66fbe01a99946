"""The benchmark's command line: `python -m benchmarks`, or `make bench` and `make bench-gpu`."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TextIO

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, which reads it once
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

RESULTS = Path(__file__).resolve().parent / "results"
HALVES = (
    ("shared", "captions-lora", "captions-ia3", "captions-adapter", "captions-prefix", "memory", "levers"),
    ("single", "mixed", "asking", "together"),
)
"""Comparisons that take about as long as the others: each half has a core to itself."""


def main() -> None:
    """Measure what is asked, write the JSON, and show the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--shape", default="cpu", help="of the model: tiny, gate, cpu, llava-1.5-7b, qwen2.5-vl-7b")
    parser.add_argument("--gate-shape", default="gate", help="of the model on which equality is proven")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--bf16", action="store_true", help="hold and compute the model in bfloat16")
    parser.add_argument("--only", nargs="*", default=[], help="comparisons by name; all when left out")
    parser.add_argument("--peers", nargs="*", default=["hf", "trl"], choices=["hf", "trl"])
    parser.add_argument("--rounds", type=int, default=5, help="pairs of each comparison")
    parser.add_argument("--minutes", type=float, default=10.0, help="past this, three pairs of each must do")
    parser.add_argument("--factor", type=int, default=1, help="how many times larger a step is")
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu.json")
    parser.add_argument("--halves", action="store_true", help="on a CPU: two processes, with half of it each")
    parser.add_argument("--profile", metavar="WORKLOAD", help="say where our step's time goes, and measure nothing")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    if asked.halves:
        in_halves(asked.out)
        return

    import torch
    from transformers.utils import logging

    from benchmarks.comparisons import Bench, chosen, gathered
    from benchmarks.profiling import profile
    from benchmarks.table import as_text
    from peft_mllm.files import write_json
    from peft_mllm.provenance import environment

    logging.set_verbosity_error()
    device = torch.device(asked.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    began = time.monotonic()
    bench = Bench(
        shape=asked.shape,
        gate_shape=asked.gate_shape,
        device=device,
        bf16=asked.bf16,
        rounds=asked.rounds,
        until=began + 60 * asked.minutes,
        peers=installed(asked.peers),
        tell=lambda line: say(line, sys.stderr),
        factor=asked.factor,
    )
    if asked.profile:
        say(profile(bench, asked.profile))
        return
    known = dict(chosen(bench))
    if unknown := [name for name in asked.only if name not in known]:
        parser.error(f"there is no comparison '{unknown[0]}'; there are {', '.join(known)}")
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    for name in asked.only or known:
        known[name]()
        found = gathered(bench, environment(device), time.monotonic() - began)
        write_json(asked.out, found)  # after each, so that a run that is cut off leaves what it has
    say(as_text(found))


def in_halves(out: Path) -> None:
    """Measure all in two processes with a core each, and put their rows together."""
    from benchmarks.table import as_text
    from peft_mllm.files import read_json, write_json

    began, told = time.monotonic(), [each for each in sys.argv[1:] if each != "--halves"]
    with tempfile.TemporaryDirectory() as folder:
        parts = [Path(folder) / f"{number}.json" for number in range(len(HALVES))]
        running = [
            subprocess.Popen([sys.executable, "-m", "benchmarks", *told, "--only", *names, "--out", str(part)])
            for names, part in zip(HALVES, parts, strict=True)
        ]
        if failed := [process.returncode for process in running if process.wait()]:
            raise SystemExit(failed[0])
        halves = [read_json(part) for part in parts]
    found = halves[0] | {"rows": [row for half in halves for row in half["rows"]]}
    found |= {"seconds": round(time.monotonic() - began)}
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, found)
    say(as_text(found))


def installed(peers: Sequence[str]) -> list[str]:
    """Those that can be imported here; says which cannot."""
    here = [name for name in peers if name == "hf" or find_spec(name)]
    for name in set(peers) - set(here):
        say(f"{name} is not installed here (benchmarks/requirements.txt): its rows are left out.", sys.stderr)
    return here


def say(text: str, to: TextIO = sys.stdout) -> None:
    """Write a line at once."""
    to.write(f"{text}\n")
    to.flush()


if __name__ == "__main__":
    main()
