"""A run directory under kills at every point and disks that fail."""

from __future__ import annotations

import errno
import io
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from peft_mllm import files
from peft_mllm.errors import (
    DiskError,
)
from peft_mllm.rundir import RunDir, checkpoint_name
from rundirs import FILES, SPEC, commit, holds, names, strange_names, writer
from runs import wait


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A run with checkpoints of the steps 100 and 200."""
    with RunDir.open(tmp_path / "run", SPEC) as run:
        commit(run, 100, 200)
    return tmp_path / "run"


# --- kills ---


@contextmanager
def instrumented(point: Callable[[], None]) -> Iterator[None]:
    """Call `point` before every change of the file system; fsync itself does nothing."""
    changes = {
        os: ("replace", "rename", "fsync", "open", "mkdir", "unlink", "rmdir", "pwrite"),
        io: ("open",),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        for module, functions in changes.items():
            for name in functions:
                patch.setattr(module, name, _before(point, getattr(module, name)))
        yield


def _before(point: Callable[[], None], function: Callable[..., object]) -> Callable[..., object]:
    def call(*args: object, **kwargs: object) -> object:
        point()
        return function(*args, **kwargs)

    return call


def killed_at(count: int, work: Callable[[Callable[[], None]], None]) -> bool:
    """Do `work` in a child that kills itself at its `count`-th point; False if there are fewer."""
    child = os.fork()
    if child == 0:
        passed = 0

        def point() -> None:
            nonlocal passed
            passed += 1
            if passed == count:
                os.kill(os.getpid(), signal.SIGKILL)

        status = 1
        try:
            with instrumented(point):
                work(point)
            status = 0
        finally:
            os._exit(status)
    code = wait(child)
    assert code in (0, -signal.SIGKILL), "the child failed by itself"
    return code != 0


def copies_after_kills(
    start: Path, work: Callable[[Path, Callable[[], None]], None], *, every: int = 1
) -> Iterator[tuple[int, Path]]:
    """For each point of `work`, or every so many: a copy of `start` in which it was killed there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)  # a kill loses nothing that was written
        for count in range(1, 1000, every):
            copy = start.with_name(f"killed-{count}")
            shutil.copytree(start, copy)
            if not killed_at(count, lambda point, copy=copy: work(copy, point)):  # type: ignore[misc]
                return
            yield count, copy
            shutil.rmtree(copy)
    raise AssertionError("the work has no end")


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_a_kill_at_any_point_leaves_the_older_or_the_newer_checkpoint(path: Path, every: int) -> None:
    def work(copy: Path, point: Callable[[], None]) -> None:
        with RunDir.open(copy, SPEC) as run:
            run.log({"step": 300})
            run.commit(checkpoint_name(300), writer(300, point), facts={"loss": 3.0})
            run.rotate(keep=2)
            run.set_status("done")

    seen, points = set(), 0
    for _, copy in copies_after_kills(path, work, every=every):
        points += 1
        rejected: list[Path] = []
        with RunDir.open(copy, SPEC) as run:
            checkpoint = run.latest_checkpoint(lambda path, _: rejected.append(path))  # noqa: B023
            assert checkpoint is not None
            assert rejected == []
            assert holds(checkpoint.path, checkpoint.step)
            assert strange_names(copy) == []
            seen.add(checkpoint.step)
            run.rewind_log(checkpoint.step)
            commit(run, 300)
            run.rotate(keep=2)
        assert names(copy / "checkpoints") == ["step-00000200", "step-00000300"]
        assert run.status() is None or run.status()["state"] == "done"  # type: ignore[index]
    assert seen == {200, 300}
    assert points > 40 // every


@pytest.mark.slow
def test_a_kill_while_a_directory_is_replaced_leaves_an_older_the_old_or_the_new(path: Path) -> None:
    def work(copy: Path, point: Callable[[], None]) -> None:
        with RunDir.open(copy, SPEC) as run:
            run.commit(checkpoint_name(200), writer(201, point))

    for _, copy in copies_after_kills(path, work):
        with RunDir.open(copy, SPEC) as run:
            checkpoint = run.latest_checkpoint(lambda path, doubts: pytest.fail(f"{path}: {doubts}"))
        assert checkpoint is not None
        assert any(holds(checkpoint.path, step) for step in (100, 200, 201))


def test_a_kill_while_a_run_begins_or_ends_leaves_a_directory_that_opens(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()

    def work(copy: Path, _: Callable[[], None]) -> None:
        with RunDir.open(copy, SPEC) as run:
            run.write_result({"score": 1.0})

    results = []
    for _, copy in copies_after_kills(tmp_path / "empty", work):
        with RunDir.open(copy, SPEC) as run:
            results.append(run.result())
            assert strange_names(copy) == []
    assert None in results
    assert {"score": 1.0} in results


# --- a power loss ---


def test_all_is_on_the_disk_before_a_checkpoint_appears(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, os.rename

    def traced_fsync(descriptor: int) -> None:
        events.append(f"sync {Path(f'/proc/self/fd/{descriptor}').readlink()}")
        fsync(descriptor)

    def traced_rename(source: Path, target: Path) -> None:
        events.append(f"rename {source}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", traced_fsync)
    monkeypatch.setattr(os, "rename", traced_rename)
    with RunDir.open(path, SPEC) as run:
        run.log({"step": 300})
        events.clear()
        commit(run, 300)
        monkeypatch.undo()
    temporary = next(event for event in events if event.startswith("rename")).removeprefix("rename ")
    before = events[: events.index(f"rename {temporary}")]
    after = events[events.index(f"rename {temporary}") + 1 :]
    assert set(before) == {
        f"sync {path}/metrics.jsonl",
        *(f"sync {temporary}/{name}" for name in FILES),
        f"sync {temporary}/optimizer",
        f"sync {temporary}",
    }
    assert after == [f"sync {path}/checkpoints"]


# --- disks ---


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS])
def test_a_disk_that_fails_at_any_sync_is_one_message_and_costs_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    messages = []
    with RunDir.open(path, SPEC) as run:
        run.log({"step": 300})
        for count in range(1, 100):
            failing_sync(monkeypatch, count, number)
            try:
                commit(run, 300)
                break
            except DiskError as error:
                messages.append(str(error))
            finally:
                monkeypatch.undo()
            checkpoint = run.latest_checkpoint()
            assert checkpoint is not None
            assert holds(checkpoint.path, checkpoint.step)
            assert strange_names(path) == []
    assert holds(path / checkpoint_name(300), 300)
    assert len(messages) > 5
    assert all(os.strerror(number) in message and str(path) in message for message in messages)
    assert all("Free: " in message for message in messages) == (number == errno.ENOSPC)


def failing_sync(monkeypatch: pytest.MonkeyPatch, count: int, number: int) -> None:
    """Let the `count`-th fsync fail with an error number of the system."""
    calls = iter(range(1, 1000))

    def fsync(descriptor: int) -> None:
        if next(calls) == count:
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_names_path_needed_and_free(path: Path, error: Exception) -> None:
    def write(directory: Path) -> None:
        (directory / "half.bin").write_bytes(b"x")
        raise error

    with RunDir.open(path, SPEC) as run, pytest.raises(DiskError) as caught:
        run.commit(checkpoint_name(300), write)
    assert str(caught.value).startswith(
        f"Cannot write the directory {path / checkpoint_name(300)}: No space left on device. "
        "Needed: about 1.7 kB. Free: "
    )
    assert names(path / "checkpoints") == ["step-00000100", "step-00000200"]


def test_an_error_of_the_caller_stays_what_it_is(path: Path) -> None:
    def write(directory: Path) -> None:
        raise KeyError("a defect")

    with RunDir.open(path, SPEC) as run, pytest.raises(KeyError, match="a defect"):
        run.commit(checkpoint_name(300), write)
    assert strange_names(path) == []


def test_the_limit_of_the_system_itself_is_reported(path: Path) -> None:
    """Not simulated: the kernel refuses to write past 300 bytes."""

    def work(_: Callable[[], None]) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))
        with RunDir.open(path, SPEC) as run, pytest.raises(DiskError, match="File too large"):
            commit(run, 300)

    assert not killed_at(0, work)
    assert names(path / "checkpoints") == ["step-00000100", "step-00000200"]


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match=f"Cannot write the run directory {tmp_path}/file/run"):
        RunDir.open(tmp_path / "file" / "run", SPEC)


def test_an_atomic_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files.atomic_write(tmp_path / "a.txt", "old")
    monkeypatch.setattr(os, "replace", _before(_raise_no_space, os.replace))
    with pytest.raises(DiskError, match="No space left"):
        files.atomic_write(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def _raise_no_space() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")
