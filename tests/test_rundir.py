"""A run directory: what it keeps, whose it is, what damage it finds, and who may write."""

from __future__ import annotations

import logging
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from peft_mllm.errors import (
    EXIT_BAD_DATA,
    EXIT_INTERNAL,
    EXIT_INTERRUPTED,
    DataError,
    DiskError,
    Interrupted,
    SpecError,
    UserError,
)
from peft_mllm.rundir import ADAPTER, RunDir, checkpoint_name, verify
from rundirs import FILES, SPEC, commit, holds, names, strange_names, writer


@pytest.fixture(autouse=True)
def _no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test here cuts the power, so none need wait for the disk."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A run with checkpoints of the steps 100 and 200."""
    with RunDir.open(tmp_path / "run", SPEC) as run:
        commit(run, 100, 200)
    return tmp_path / "run"


# --- the good case ---


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "first"
    with RunDir.open(path, SPEC) as run:
        assert run.latest_checkpoint() is None
        assert (run.status(), run.result(), run.metrics()) == (None, None, [])
        commit(run, 100, 1000)
        run.log({"step": 1, "loss": 2.0})
        run.set_status("running", step=1000)
        run.set_status("done", exit_code=0)
        run.commit(ADAPTER, writer(7))
        run.write_result({"scores": {"vqa": 61.5}, "notes": ("ü", "\ud800")})

    reader = RunDir(path)
    checkpoint = reader.latest_checkpoint()
    assert checkpoint is not None
    assert (checkpoint.step, checkpoint.facts) == (1000, {"loss": 10.0})
    assert checkpoint.path == path / "checkpoints" / "step-00001000"
    assert holds(checkpoint.path, 1000)
    assert holds(path / ADAPTER, 7)
    assert verify(path / ADAPTER) == []
    status = reader.status()
    assert status is not None
    assert (status["state"], status["exit_code"], status["step"], status["pid"]) == (
        "done",
        0,
        1000,
        os.getpid(),
    )
    assert reader.result() == {"scores": {"vqa": 61.5}, "notes": ["ü", "\ud800"]}
    assert strange_names(path) == []


def test_the_log_keeps_true_values_and_drops_what_a_resumed_run_writes_again(path: Path) -> None:
    with RunDir.open(path, SPEC) as run:
        run.log({"event": "start"})
        for step in (1, 2, 3):
            run.log({"step": step, "loss": math.nan if step == 1 else step / 10, "text": "a\u2028b\nc"})
        run.rewind_log(2)
        assert [line.get("step") for line in run.metrics()] == [None, 1, 2]
        assert run.metrics()[1]["loss"] == "NaN"
        assert run.metrics()[2] == {"step": 2, "loss": 0.2, "text": "a\u2028b\nc"}


def test_a_torn_last_line_of_the_log_is_no_line(path: Path) -> None:
    with RunDir.open(path, SPEC) as run:
        run.log({"step": 1})
        with (path / "metrics.jsonl").open("ab") as log:
            log.write(b'{"step": 2, "lo')
        assert run.metrics() == [{"step": 1}]
        run.log({"step": 3})
        assert run.metrics() == [{"step": 1}, {"step": 3}]


def test_a_broken_line_within_the_log_is_named(path: Path) -> None:
    (path / "metrics.jsonl").write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(DiskError, match=r"metrics\.jsonl:2"):
        RunDir(path).metrics()


def test_rotation_goes_by_step_and_spares_the_protected(path: Path) -> None:
    with RunDir.open(path, SPEC) as run:
        commit(run, 400, 300, 1000)  # the order of writing does not matter
        run.rotate(keep=2, protect={checkpoint_name(100)})
        assert names(path / "checkpoints") == ["step-00000100", "step-00000400", "step-00001000"]
        run.rotate(keep=2, protect={path / checkpoint_name(100), path / "checkpoints" / "absent"})
        assert names(path / "checkpoints") == ["step-00000100", "step-00000400", "step-00001000"]


def test_rotation_never_counts_a_broken_checkpoint(path: Path) -> None:
    (path / checkpoint_name(200) / "adapter.safetensors").write_bytes(b"")
    with RunDir.open(path, SPEC) as run:
        run.rotate(keep=1)
    assert names(path / "checkpoints") == ["step-00000100"]


def test_committing_a_name_again_replaces_the_directory(path: Path) -> None:
    with RunDir.open(path, SPEC) as run:
        run.commit(checkpoint_name(200), writer(201))
        checkpoint = run.latest_checkpoint()
    assert checkpoint is not None
    assert holds(checkpoint.path, 201)


# --- damage ---


def older_copy(file: Path) -> None:
    """The same file of the checkpoint before."""
    shutil.copy(str(file).replace("step-00000200", "step-00000100"), file)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x10
    file.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "deleted": Path.unlink,
    "zero": lambda file: file.write_bytes(b""),
    "half": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "flipped": flip,
    "grown": lambda file: file.write_bytes(file.read_bytes() + b"x"),
    "a directory": lambda file: (file.unlink(), file.mkdir()),
}
CASES = [
    (name, damage)
    for name in FILES
    for damage in [*DAMAGES, "older copy"]
    if name != "empty.txt" or damage in ("deleted", "grown", "a directory")  # the others leave it as it is
]


@pytest.mark.parametrize(("name", "damage"), CASES)
def test_every_damage_is_found_and_the_previous_checkpoint_is_used(path: Path, name: str, damage: str) -> None:
    file = path / checkpoint_name(200) / name
    (DAMAGES.get(damage) or older_copy)(file)
    rejected: dict[Path, list[str]] = {}
    checkpoint = RunDir(path).latest_checkpoint(rejected.__setitem__)
    assert list(rejected) == [path / checkpoint_name(200)]
    reasons = " ".join(rejected[path / checkpoint_name(200)])
    # Under a manifest that is an older copy, sound of itself, every other file is the wrong one.
    assert ("adapter.safetensors" if (name, damage) == ("MANIFEST.json", "older copy") else name) in reasons
    assert checkpoint is not None
    assert checkpoint.step == 100
    assert holds(checkpoint.path, 100)


def test_a_flipped_bit_anywhere_in_a_manifest_is_found(path: Path) -> None:
    directory = path / checkpoint_name(200)
    manifest = directory / "MANIFEST.json"
    good = manifest.read_bytes()
    for position in range(0, len(good) * 8, 13):
        data = bytearray(good)
        data[position // 8] ^= 1 << position % 8
        manifest.write_bytes(data)
        assert verify(directory), f"bit {position} of the manifest was flipped unseen"


def test_a_file_that_nobody_committed_is_found(path: Path) -> None:
    (path / checkpoint_name(200) / "more.bin").write_bytes(b"x")
    assert verify(path / checkpoint_name(200)) == ["more.bin is not in the manifest"]


def test_a_copy_of_another_checkpoint_or_run_is_found(
    path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with RunDir.open(tmp_path / "other", {**SPEC, "model": "other"}) as other:
        commit(other, 400)
    shutil.copytree(path / checkpoint_name(100), path / checkpoint_name(300))
    shutil.copytree(tmp_path / "other" / checkpoint_name(400), path / checkpoint_name(400))
    with caplog.at_level(logging.WARNING):
        checkpoint = RunDir(path).latest_checkpoint()
    assert checkpoint is not None
    assert checkpoint.step == 200
    assert "step-00000300 is not used: it is a copy of step-00000100" in caplog.text
    assert "step-00000400 is not used: it belongs to another run" in caplog.text


def test_a_changed_or_foreign_result_is_no_result(path: Path, tmp_path: Path) -> None:
    for directory, spec in ((path, SPEC), (tmp_path / "other", {"seed": 2})):
        with RunDir.open(directory, spec) as run:
            run.write_result({"score": 61.5})
    result = path / "result.json"
    result.write_text(result.read_text().replace("61.5", "71.5"))
    with pytest.raises(DiskError, match="does not match its sha256"):
        RunDir(path).result()
    shutil.copy(tmp_path / "other" / "result.json", result)
    with pytest.raises(DiskError, match="belongs to another run"):
        RunDir(path).result()


# --- whose directory it is ---


def test_another_spec_is_refused_with_the_keys_that_differ(path: Path) -> None:
    other = {"model": "tiny", "train": {"learning_rate": 2e-4, "workers": 8}, "tasks": ["a", "b"], "new": 1}
    with pytest.raises(SpecError) as caught:
        RunDir.open(path, other, ignore={"train.workers"})
    assert str(caught.value).splitlines()[1:] == [
        "  new: absent there, 1 here",
        "  train.learning_rate: 0.0001 there, 0.0002 here",
        "  train.seed: 1 there, absent here",
        f"Choose another output_dir, or delete {path}.",
    ]


def test_keys_that_do_not_change_the_outcome_may_differ(path: Path) -> None:
    other = {**SPEC, "train": {**SPEC["train"], "workers": 8}, "tasks": ("a", "b"), "view": {"rich": True}}
    with RunDir.open(path, other, ignore={"train.workers", "view"}) as run:
        checkpoint = run.latest_checkpoint()
    assert checkpoint is not None
    assert checkpoint.step == 200


@pytest.mark.parametrize("name", ["thesis.tex", "checkpoints", "lock", ".git"])
def test_a_directory_of_somebody_else_is_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("years of work")
    with pytest.raises(SpecError, match=f"is not a run: it has no spec.json, but {name}"):
        RunDir.open(tmp_path, SPEC)
    assert names(tmp_path) == [name]
    assert (tmp_path / name).read_text() == "years of work"


def test_leftovers_of_a_killed_writer_are_removed(path: Path) -> None:
    (path / ".tmp-status.json-1-aa").write_text("{")
    (path / "checkpoints" / ".tmp-step-00000300-1-aa").mkdir()
    shutil.copytree(path / checkpoint_name(100), path / "checkpoints" / ".trash-step-00000100-1-aa")
    with RunDir.open(path, SPEC):
        assert strange_names(path) == []


# --- how a run ended ---


@pytest.mark.parametrize(
    ("error", "state", "code"),
    [
        (Interrupted("saved"), "interrupted", EXIT_INTERRUPTED),
        (KeyboardInterrupt(), "interrupted", EXIT_INTERRUPTED),
        (DataError("line 3"), "failed", EXIT_BAD_DATA),
        (ZeroDivisionError("x"), "failed", EXIT_INTERNAL),
    ],
)
def test_an_error_that_ends_the_run_is_its_status(path: Path, error: BaseException, state: str, code: int) -> None:
    with pytest.raises(type(error)), RunDir.open(path, SPEC) as run:  # noqa: PT012
        run.set_status("running", step=5)
        raise error
    status = RunDir(path).status()
    assert status is not None
    assert (status["state"], status["exit_code"], status["step"]) == (state, code, 5)
    assert str(error) in status["message"]


# --- second writers ---

HOLD = """
import os, sys, time
from pathlib import Path
from peft_mllm.rundir import RunDir
run = RunDir.open(Path(sys.argv[1]), {spec!r})
child = os.fork() if {fork} else -1  # like a data loader's worker
if child:
    print(child, flush=True)
time.sleep(60)
"""


@contextmanager
def holder(path: Path, *, fork: bool = False) -> Iterator[tuple[int, int]]:
    """Another process that writes the run: its process id, and that of its child."""
    program = HOLD.format(spec=SPEC, fork=fork)
    with subprocess.Popen([sys.executable, "-c", program, path], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        try:
            yield process.pid, child
        finally:
            process.kill()
            if fork:
                os.kill(child, signal.SIGKILL)


def test_a_second_writer_is_refused_until_the_first_is_dead(path: Path) -> None:
    with holder(path) as (pid, _):
        with pytest.raises(UserError, match=f"in use by process {pid} on host .*one writer"):
            RunDir.open(path, SPEC)
        assert RunDir(path).latest_checkpoint() is not None  # reading needs no lock
        os.kill(pid, signal.SIGKILL)
        _wait_until_opened(path)


def test_a_worker_that_outlives_its_writer_does_not_hold_the_run(path: Path) -> None:
    with holder(path, fork=True) as (pid, child):
        os.kill(pid, signal.SIGKILL)
        _wait_until_opened(path)
        os.kill(child, 0)  # it is alive


def _wait_until_opened(path: Path) -> None:
    deadline = time.monotonic() + 5
    while True:
        try:
            RunDir.open(path, SPEC).close()
            return
        except UserError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def test_the_same_process_cannot_open_a_run_twice(path: Path) -> None:
    with RunDir.open(path, SPEC), pytest.raises(UserError, match=f"in use by process {os.getpid()}"):
        RunDir.open(path, SPEC)


def test_a_writer_whose_lock_was_taken_writes_nothing_more(path: Path) -> None:
    first = RunDir.open(path, SPEC)
    (path / "lock").unlink()  # what people do when a lock is in their way
    with holder(path) as (pid, _):
        for write in (
            lambda: commit(first, 300),
            lambda: first.rotate(keep=1),
            lambda: first.log({"step": 1}),
            lambda: first.set_status("done"),
            lambda: first.write_result({}),
        ):
            with pytest.raises(UserError, match=f"taken over by process {pid}"):
                write()
    first.close()
    assert names(path / "checkpoints") == ["step-00000100", "step-00000200"]
    assert first.result() is None


def test_a_writer_that_loses_its_lock_while_it_writes_does_not_commit(path: Path) -> None:
    run = RunDir.open(path, SPEC)

    def write(directory: Path) -> None:
        (path / "lock").unlink()

    with pytest.raises(UserError, match="taken over"):
        run.commit(checkpoint_name(300), write)
    run.close()
    assert names(path / "checkpoints") == ["step-00000100", "step-00000200"]


def test_a_reader_or_a_closed_writer_cannot_write(path: Path) -> None:
    closed = RunDir.open(path, SPEC)
    closed.close()
    for run in (RunDir(path), closed):
        with pytest.raises(UserError, match="open for reading only"):
            run.log({"step": 1})
