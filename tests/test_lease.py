"""The lease of a run directory: between machines that do not see each other's kernel lock.

The other machine is this one under another name, for which `flock` does nothing: as on a network file system that
does not carry it.
"""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from peft_mllm.errors import UserError
from peft_mllm.files import TEMPORARY
from peft_mllm.rundir import InUse, RunDir, checkpoint_name, lock
from peft_mllm.rundir.lock import LOCK, Lock, recorded_holder
from rundirs import SPEC, commit, names, strange_names, writer

LEASE = 0.4
TRIALS = 5


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "LEASE", LEASE)
    monkeypatch.setattr(lock, "RENEW", LEASE / 8)
    monkeypatch.setattr(lock, "SETTLE", 0.05)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    with RunDir.open(tmp_path / "run", SPEC) as run:
        commit(run, 100)
    return tmp_path / "run"


@contextmanager
def another_machine() -> Iterator[None]:
    """As seen from a second host."""
    me = lock._myself
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lock, "_myself", lambda: {**me(), "host": "elsewhere", "boot_id": "b007", "pid": 7})
        patch.setattr(lock.fcntl, "flock", lambda descriptor, how: None)
        yield


def abandoned_by_another_machine(path: Path, age: float) -> None:
    """A second host wrote the directory, and was last heard of `age` seconds ago."""
    with another_machine():
        text = lock._text_of(lock._myself())
    with (path / LOCK).open("r+b") as file:
        file.write(text)
    then = time.time() - age
    os.utime(path / LOCK, (then, then))


def held(path: Path) -> dict[str, Any]:
    """What the lock file says."""
    holder = recorded_holder(path / LOCK)
    assert holder is not None
    return holder


def child_of(work: Callable[[], None]) -> int:
    """Do `work` in a child; gives its process id. Its exit code is 3 where a `UserError` ended it."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        work()
        code = 0
    except UserError:
        code = 3
    finally:
        os._exit(code)


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def when(holds: Callable[[], Any], seconds: float = 10.0) -> None:
    """Wait until it holds."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.005)


# --- who is refused ---


def test_a_fresh_lease_of_another_machine_is_refused_with_its_end(path: Path) -> None:
    abandoned_by_another_machine(path, age=0.1)
    with pytest.raises(
        InUse, match=r"process 7 on host elsewhere .*runs out in 0 s \(at 20\d\d-.*disk's clock"
    ) as said:
        RunDir.open(path, SPEC)
    assert said.value.seconds is not None
    assert 0 < said.value.seconds <= LEASE - 0.1
    assert held(path)["host"] == "elsewhere"  # and nothing was touched
    assert not [name for name in names(path) if name.startswith(TEMPORARY)]


def test_an_expired_lease_of_another_machine_is_taken_over(path: Path) -> None:
    abandoned_by_another_machine(path, age=LEASE + 0.1)
    with RunDir.open(path, SPEC) as run:
        commit(run, 200)
    assert held(path)["pid"] == os.getpid()


def test_a_live_writer_keeps_its_lease_for_as_long_as_it_lives(path: Path) -> None:
    with RunDir.open(path, SPEC) as run:
        for _ in range(6):
            time.sleep(LEASE / 3)
            with another_machine(), pytest.raises(InUse, match=f"process {os.getpid()} on host"):
                Lock.acquire(path / LOCK)
        commit(run, 200)


def test_this_machine_s_clock_does_not_count(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    abandoned_by_another_machine(path, age=0)
    monkeypatch.setattr(time, "time", lambda: 4e9)
    with pytest.raises(InUse):
        RunDir.open(path, SPEC)


def test_a_released_lease_is_free_at_once_for_all(path: Path) -> None:
    assert held(path)["released"] is True
    with another_machine(), RunDir.open(path, SPEC):
        assert held(path)["released"] is False
    RunDir.open(path, SPEC).close()


def test_a_crash_on_this_machine_is_no_obstacle(path: Path) -> None:
    child = child_of(lambda: (RunDir.open(path, SPEC), os.kill(os.getpid(), signal.SIGKILL)))
    assert ended(child) == -signal.SIGKILL
    assert held(path)["released"] is False
    began = time.monotonic()
    RunDir.open(path, SPEC).close()
    assert time.monotonic() - began < LEASE / 2


def test_another_boot_of_this_host_is_another_machine(path: Path) -> None:
    me = held(path)
    (path / LOCK).write_text(json.dumps({**me, "boot_id": "before", "released": False}))
    with pytest.raises(InUse, match="runs out"):
        RunDir.open(path, SPEC)


def test_a_file_system_without_kernel_locks_has_the_lease(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_here(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(lock.fcntl, "flock", none_here)
    with RunDir.open(path, SPEC), pytest.raises(InUse, match=f"process {os.getpid()}.*runs out"):
        RunDir.open(path, SPEC)
    RunDir.open(path, SPEC).close()


def test_of_two_machines_that_see_the_same_expired_lease_one_goes_on(path: Path) -> None:
    abandoned_by_another_machine(path, age=9)
    real = time.sleep

    def rival_writes(seconds: float) -> None:
        time.sleep = real
        abandoned_by_another_machine(path, age=0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lock.time, "sleep", rival_writes)
        with pytest.raises(InUse, match="elsewhere"):
            RunDir.open(path, SPEC)


# --- the old holder ---


def test_a_stopped_writer_whose_run_was_taken_over_commits_nothing(path: Path) -> None:
    """In each trial it is stopped at a random moment of its commits, and goes on after the takeover."""
    draw = random.Random(5)

    def commit_for_ever() -> None:
        run = RunDir.open(path, SPEC)
        for step in range(1, 1000):
            run.commit(checkpoint_name(step), writer(step))
            run.rotate(keep=2)

    for _ in range(TRIALS):
        child = child_of(commit_for_ever)
        when(lambda: held(path)["pid"] == child)  # noqa: B023 - called before the next
        time.sleep(draw.uniform(0.02, 0.1))
        os.kill(child, signal.SIGSTOP)
        time.sleep(LEASE + 0.1)
        with another_machine():
            run = RunDir.open(path, SPEC)
            before = {entry.stat().st_ino for entry in (path / "checkpoints").iterdir()}
            os.kill(child, signal.SIGCONT)
            assert ended(child) == 3
            assert {entry.stat().st_ino for entry in (path / "checkpoints").iterdir()} <= before
            assert strange_names(path) == []
            run.set_status("running")  # the new writer goes on
            run.close()


def test_a_writer_that_wakes_after_its_lease_ran_out_goes_on_if_nobody_came(path: Path) -> None:
    def work() -> None:
        with RunDir.open(path, SPEC) as run:
            (path / "open").touch()
            when(lambda: (path / "go").exists())
            commit(run, 200)

    child = child_of(work)
    when(lambda: (path / "open").exists())
    os.kill(child, signal.SIGSTOP)
    time.sleep(2 * LEASE)
    (path / "go").touch()
    os.kill(child, signal.SIGCONT)
    assert ended(child) == 0
    assert names(path / "checkpoints") == ["step-00000100", "step-00000200"]


def test_after_a_lapse_the_writer_waits_for_a_rival_who_saw_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rival has seen the lease expired, and writes a moment after the holder has renewed it."""
    monkeypatch.setattr(lock, "RENEW", 60.0)  # the thread sleeps, as it does in a stopped process
    monkeypatch.setattr(lock, "SETTLE", 0.5)
    run = RunDir.open(path, SPEC)
    time.sleep(LEASE + 0.1)
    real = os.utime

    def renewed_too_late(*arguments: Any) -> None:
        real(*arguments)
        monkeypatch.setattr(os, "utime", real)
        threading.Timer(0.05, abandoned_by_another_machine, (path,), {"age": 0}).start()

    monkeypatch.setattr(os, "utime", renewed_too_late)
    with pytest.raises(UserError, match="taken over by process 7 on host elsewhere"):
        run.log({"step": 1})
    run.close()
    assert (held(path)["host"], held(path)["released"]) == ("elsewhere", False)  # the rival's, untouched


def test_a_moment_without_the_disk_ends_no_lease(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*arguments: Any) -> None:
        raise OSError(errno.EIO, "away")

    with RunDir.open(path, SPEC) as run:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "utime", away)
            time.sleep(LEASE / 2)
        when(lambda: time.time() - (path / LOCK).stat().st_mtime < LEASE / 4)
        commit(run, 200)


# --- its thread ---


def leases() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("lease of")]


def test_the_thread_ends_with_the_release(path: Path) -> None:
    with RunDir.open(path, SPEC):
        assert leases() == [f"lease of {path / LOCK}"]
        assert threading.enumerate()[-1].daemon, "a program may end without releasing"
    assert leases() == []


def test_the_thread_of_a_lost_lease_renews_nothing(path: Path) -> None:
    run = RunDir.open(path, SPEC)
    abandoned_by_another_machine(path, age=5)
    when(lambda: leases() == [])
    assert time.time() - (path / LOCK).stat().st_mtime > 4
    run.close()
    assert held(path)["host"] == "elsewhere"


def test_a_forked_child_neither_holds_nor_renews_nor_releases(path: Path) -> None:
    with RunDir.open(path, SPEC) as run:

        def work() -> None:
            assert leases() == []
            with pytest.raises(UserError, match="not open for writing in this process"):
                run.log({"step": 1})
            run.close()

        assert ended(child_of(work)) == 0
        assert held(path)["released"] is False
        commit(run, 200)
