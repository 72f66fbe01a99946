"""Tiny runs for the tests of the loop and the whole: what they are, how to start, stop and kill them.

Importing torch, transformers and peft takes seconds, so what must end in a process of its own is forked from
this one, and the command line is called in place.
"""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import yaml
from accelerate.state import PartialState
from safetensors.torch import load_file

from peft_mllm.cli import main

torch.set_num_threads(1)

PATIENCE = 120
"""Seconds that a child may take on a busy machine; those of the tests take a few."""
CLOCKS = {"seconds", "tokens_per_second"}
"""What differs between two runs that are the same."""


def tiny(output_dir: Path, **changes: Any) -> dict[str, Any]:
    """A spec: 6 steps of 2 x 2 samples with dropout, evaluated and saved at every second one."""
    spec = {
        "model": "tiny:llava",
        "method": {"name": "lora", "rank": 4, "alpha": 8, "dropout": 0.1},
        "task": {"name": "scenes_at", "size": {"train": 12, "validation": 4, "test": 4}},
        "generation": {"max_new_tokens": 3},
        "train": {
            "learning_rate": 1e-2,
            "num_train_epochs": 2,
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "logging_steps": 1,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "save_strategy": "steps",
            "save_steps": 2,
        },
        "output_dir": str(output_dir),
    }
    for key, value in changes.items():
        spec[key] = {**spec[key], **value} if key == "train" else value
    return spec


def write_spec(path: Path, spec: Mapping[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(dict(spec), sort_keys=False))
    return path


# --- what a run left ---


def weights(run: Path) -> dict[str, torch.Tensor]:
    (file,) = (run / "adapter").glob("*.safetensors")
    return load_file(file)


def outcome(run: Path) -> dict[str, Any]:
    """Everything that two equal runs have in common, to the bit."""
    result = read(run / "result.json")
    (adapter,) = (run / "adapter").glob("*.safetensors")
    training = {k: v for k, v in result["training"].items() if k not in CLOCKS | {"resumed"}}
    predictions = run / "predictions"
    return {
        "adapter": adapter.read_bytes(),
        "metrics": metrics(run),
        "training": training,
        "scores": unclocked(result["scores"]),
        "curve": [{**point, "scores": unclocked(point["scores"])} for point in result["curve"]],
        "predictions": {str(each.relative_to(run)): each.read_bytes() for each in predictions.rglob("*.*")},
    }


def unclocked(scores: Mapping[str, Any]) -> dict[str, Any]:
    """Scores by task, without what differs between two runs that are the same."""
    return {name: {**score, "seconds": 0, "resumed": 0, "proofs": {}} for name, score in scores.items()}


def assert_same(run: Path, other: Path) -> None:
    """Compare key by key, so that a failure says what differs."""
    mine, others = outcome(run), outcome(other)
    for key in mine:
        assert mine[key] == others[key], f"{key} of {run.name} and {other.name} differ"


def metrics(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in CLOCKS} for line in lines(run / "metrics.jsonl")]


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in metrics(run) if "loss" in line]


def checkpoints(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").iterdir())


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def status(run: Path) -> dict[str, Any]:
    return read(run / "status.json")


def non_finite_files(run: Path) -> list[str]:
    """Files of tensors with a value that is no number."""
    files = list(run.rglob("*.safetensors"))
    return [str(file) for file in files if not all(t.isfinite().all() for t in load_file(file).values())]


# --- starting it ---


class Said(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


def command(*words: str | Path) -> Said:
    """`peft-mllm WORDS`, in this process."""
    out, err = io.StringIO(), io.StringIO()
    argv = ["peft-mllm", *map(str, words)]
    with patch.object(sys, "argv", argv), redirect_stdout(out), redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0
    return Said(code, out.getvalue(), err.getvalue())


def fork(work: Callable[[], object], log: Path) -> int:
    """Start `work` in a child with its output appended to `log`; gives the process id."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        logging.getLogger().handlers.clear()  # pytest's; a command of its own has none
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        work()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


def wait(child: int) -> int:
    """A child's exit code; minus the signal's number where one ended it. One that hangs is killed, and a failure."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError(f"the child was still at work after {PATIENCE} seconds, and was killed")


def train_forked(spec: Path, *words: str, log: Path, prepare: Callable[[], object] = lambda: None) -> int:
    """`peft-mllm train SPEC` in a child, after `prepare` has changed what it likes there; its exit code."""
    return wait(fork_training(spec, *words, log=log, prepare=prepare))


def fork_training(spec: Path, *words: str, log: Path, prepare: Callable[[], object] = lambda: None) -> int:
    def work() -> None:
        prepare()
        sys.argv = ["peft-mllm", "train", str(spec), *words]
        main()

    return fork(work, log)


def kill_after(child: int, seconds: float) -> bool:
    """SIGKILL a child at a moment; whether it was still at work."""
    end = time.monotonic() + seconds
    while (rest := end - time.monotonic()) > 0:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0, "the child failed by itself"
            return False
        time.sleep(min(rest, 0.01))
    os.kill(child, signal.SIGKILL)
    code = wait(child)
    assert code in (0, -signal.SIGKILL), "the child failed by itself"
    return code != 0


def kill_at(owner: Any, name: str, count: int) -> Callable[[], None]:
    """For `prepare`: the process kills itself when a function is called for the `count`-th time."""

    def prepare() -> None:
        real, left = getattr(owner, name), [count]

        def call(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        setattr(owner, name, call)

    return prepare


def signal_after_steps(number: int, *signals: int) -> Callable[[], None]:
    """For `prepare`: the process sends itself signals at the end of its `number`-th training step."""

    def prepare() -> None:
        from peft_mllm import training

        real, done = training.train_step, 0

        def step(*args: Any) -> Any:
            nonlocal done
            result = real(*args)
            done += 1
            if done == number:
                for each in signals:
                    os.kill(os.getpid(), each)
            return result

        training.train_step = step

    return prepare


def in_processes(
    count: int,
    work: Callable[[int], object],
    log: Path,
) -> list[int]:
    """Run `work(rank)` in `count` processes joined by gloo, as `accelerate launch --cpu` would; exit codes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def joined(rank: int) -> Callable[[], None]:
        def begin() -> None:
            os.environ |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(count),
                "LOCAL_WORLD_SIZE": str(count),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "ACCELERATE_USE_CPU": "true",
            }
            PartialState._reset_state()
            work(rank)

        return begin

    children = [fork(joined(rank), log.with_name(f"{log.name}-{rank}")) for rank in range(count)]
    return [wait(child) for child in children]
