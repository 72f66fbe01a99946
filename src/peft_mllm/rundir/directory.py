"""`RunDir`: the reader and the one writer of a run directory."""

from __future__ import annotations

import logging
import os
import re
import socket
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Literal, Self

from peft_mllm.errors import EXIT_INTERNAL, EXIT_INTERRUPTED, DiskError, UserError
from peft_mllm.files import (
    append_line,
    atomic_write,
    disk_errors,
    read_json,
    read_lines,
    read_sealed,
    sealed_json,
    sync_directory,
    sync_file,
    write_json,
    write_lines,
)
from peft_mllm.rundir.claim import SPEC, START_AGAIN, has_work, read_if_there, refuse_what_is_not_ours, spec_digest
from peft_mllm.rundir.commits import (
    commit_directory,
    directory_size,
    read_manifest,
    remove_directory,
    remove_leftovers,
    verify,
)
from peft_mllm.rundir.lock import LOCK, Lock

State = Literal["running", "interrupted", "failed", "done"]

CHECKPOINTS = "checkpoints"
PREDICTIONS = "predictions"
PLAN = "plan.json"
ADAPTER = "adapter"

_STEP = re.compile(r"step-(\d+)")
_NO_FACTS: Mapping[str, Any] = MappingProxyType({})
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that verifies.

    Attributes:
        path: its directory.
        step: how many optimizer steps it holds.
        facts: what its writer said beside the files.
    """

    path: Path
    step: int
    facts: Mapping[str, Any]


def checkpoint_name(step: int) -> str:
    """Where the checkpoint of a step goes, for `RunDir.commit`."""
    return f"{CHECKPOINTS}/step-{step:08d}"


def warn_rejected(path: Path, reasons: list[str]) -> None:
    """Say that a checkpoint is not used, and why."""
    _log.warning("The checkpoint %s is not used: %s.", path, "; ".join(reasons))


class RunDir:
    """One run's directory: `RunDir(path)` reads it, `RunDir.open(path, spec)` is its one writer."""

    def __init__(self, path: Path):
        self.path = path
        self._lock: Lock | None = None
        self._trusted: set[Path] = set()  # checkpoints that this process wrote or verified
        self._step: int | None = None
        self._total: int | None = None
        self._stage = ""

    @classmethod
    def open(cls, path: Path, spec: Mapping[str, Any], *, ignore: Collection[str] = ()) -> Self:
        """Create the directory, or resume in it.

        Args:
            path: created with its parents if absent.
            spec: the resolved spec, as JSON can hold it.
            ignore: dotted keys (`train.workers`, or `hardware` with all below it) that do not change the
                outcome, and may differ between the spec given and the one stored.

        Raises:
            SpecError: the directory belongs to another spec, or to something that is no run.
            UserError: another process is writing it; names host and process id.
            DiskError: it cannot be written.
        """
        run = cls(Path(path))
        refuse_what_is_not_ours(run.path, spec, ignore)  # before anything is touched
        with disk_errors(run.path, "the run directory"):
            run.path.mkdir(parents=True, exist_ok=True)
        run._lock = Lock.acquire(run.path / LOCK)
        try:
            refuse_what_is_not_ours(run.path, spec, ignore)  # another writer may have been first
            run._prepare(spec)
        except BaseException:
            run.close()
            raise
        return run

    def close(self) -> None:
        """Let the next writer in."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            # The error in flight is the one to report; that the status cannot be written as well is not.
            with suppress(UserError):
                self._set_status_of(error)
        self.close()

    def commit(self, name: str, write: Callable[[Path], None], *, facts: Mapping[str, Any] = _NO_FACTS) -> Path:
        """Let `write` fill a directory, and make it appear whole, sealed and durable.

        Args:
            name: `checkpoint_name(step)` or `ADAPTER`; a directory of that name is replaced.
            write: called with an empty directory to write the files into.
            facts: kept in the manifest, and returned with the checkpoint.

        Raises:
            DiskError: names the path, and on a full disk the free and needed bytes. Nothing is left of the
                attempt; older checkpoints are untouched.
            UserError: this process is no longer the writer.
        """
        lock, target = self._writer(), self.path / name
        self._sync_log()
        manifest = {"name": target.name, "spec_sha256": spec_digest(self.path), "facts": facts}
        commit_directory(target, write, manifest=manifest, needed=self._likely_size(target), check=lock.check)
        self._trusted.add(target)
        return target

    def latest_checkpoint(
        self,
        on_reject: Callable[[Path, list[str]], None] = warn_rejected,
        *,
        doubt: Callable[[Checkpoint], list[str]] = lambda checkpoint: [],
    ) -> Checkpoint | None:
        """The newest checkpoint that verifies; each newer one is reported with the reasons against it.

        Args:
            on_reject: called with each that is not used, and why.
            doubt: further reasons against one that verifies.
        """
        for step, path in self._checkpoints():
            doubts = self._doubts(path)
            if not doubts:
                checkpoint = Checkpoint(path, step, read_manifest(path)["facts"])
                doubts = doubt(checkpoint)
                if not doubts:
                    return checkpoint
            on_reject(path, doubts)
        return None

    def drop_after(self, step: int) -> None:
        """Remove the checkpoints of steps after `step`, which a resumed run makes again."""
        self._writer()
        for later, path in self._checkpoints():
            if later > step:
                remove_directory(path)

    def rotate(self, *, keep: int, protect: Collection[Path | str] = ()) -> None:
        """Remove all checkpoints but the newest `keep` that verify, and those in `protect`.

        Args:
            keep: at least 1. A checkpoint that does not verify is not counted, and goes.
            protect: paths, absolute or relative to the run, e.g. of the best checkpoint so far.
        """
        if keep < 1:
            raise ValueError(f"keep must be at least 1, and is {keep}")
        self._writer()
        checkpoints = [path for _, path in self._checkpoints()]
        good = [path for path in checkpoints if path in self._trusted or not self._doubts(path)]
        kept = {*good[:keep], *(self.path / path for path in protect)}
        for path in checkpoints:
            if path not in kept:
                self._writer()  # again: what was verified in between takes its time
                remove_directory(path)

    def log(self, line: Mapping[str, Any]) -> None:
        """Append a line to metrics.jsonl; it is durable at the next commit."""
        self._writer()
        append_line(self.path / "metrics.jsonl", line)

    def metrics(self) -> list[dict[str, Any]]:
        """The lines that were logged."""
        try:
            return read_lines(self.path / "metrics.jsonl")
        except (OSError, ValueError) as error:
            raise DiskError(f"The log of {self.path} cannot be used: {error}. Mend or delete it.") from error

    def rewind_log(self, step: int) -> None:
        """Drop the lines of steps after `step`: a resumed run writes them again."""
        self._writer()
        lines = self.metrics()
        kept = [line for line in lines if line.get("step", 0) <= step]
        if len(kept) < len(lines):
            write_lines(self.path / "metrics.jsonl", kept, what="the log")

    def set_status(
        self,
        state: State,
        *,
        exit_code: int | None = None,
        message: str = "",
        stage: str | None = None,
        step: int | None = None,
        total: int | None = None,
    ) -> None:
        """Say how the run stands; a stage, step or total that is not given stays as it was.

        Args:
            state: in one word.
            exit_code: of the process that ends with it.
            message: why.
            stage: what is being done: loading, training, scoring NAME.
            step: the last that is saved.
            total: how many steps there will be.
        """
        self._writer()
        self._step = self._step if step is None else step
        self._total = self._total if total is None else total
        self._stage = self._stage if stage is None else stage
        status = {
            "state": state,
            "exit_code": exit_code,
            "message": message,
            "stage": self._stage,
            "step": self._step,
            "total": self._total,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        write_json(self.path / "status.json", status, what="the status")

    def status(self) -> dict[str, Any] | None:
        """What `set_status` wrote last; None if nothing yet. `running` may be the word of a killed writer."""
        return read_if_there(self.path / "status.json", read_json)

    def keep_plan(self, plan: Mapping[str, Any]) -> None:
        """Keep how steps are computed, sealed, for a later call that goes on."""
        self._writer()
        content = sealed_json({"spec_sha256": spec_digest(self.path), **plan})
        atomic_write(self.path / PLAN, content, what="the memory plan")

    def kept_plan(self) -> dict[str, Any] | None:
        """What `keep_plan` wrote; None if nothing yet, and for one that is damaged or another run's."""
        try:
            plan = read_sealed(self.path / PLAN)
        except (OSError, ValueError):
            return None
        return plan if plan.pop("spec_sha256", None) == spec_digest(self.path) else None

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Write result.json, sealed: from here on the run is done."""
        self._writer()
        content = sealed_json({"spec_sha256": spec_digest(self.path), **result})
        atomic_write(self.path / "result.json", content, what="the result")

    def result(self) -> dict[str, Any] | None:
        """The result; None if there is none yet.

        Raises:
            DiskError: result.json is not what was written, or is another run's.
        """
        result = read_if_there(self.path / "result.json", read_sealed)
        if result is not None and result.pop("spec_sha256", None) != spec_digest(self.path):
            raise DiskError(f"{self.path / 'result.json'} belongs to another run. {START_AGAIN}")
        return result

    def make_folders(self, parent: str, names: Collection[str]) -> None:
        """Make folders in a folder of the run, and remove the others that an earlier attempt made there.

        Args:
            parent: `PREDICTIONS`, or another that is there.
            names: relative to the run.
        """
        self._writer()
        wanted = {self.path / name for name in names}
        for folder in (self.path / parent).iterdir():
            if folder.is_dir() and folder not in wanted:
                remove_directory(folder)
        with disk_errors(self.path / parent, "in"):
            for folder in wanted:
                folder.mkdir(exist_ok=True)
            sync_directory(self.path / parent)

    def _writer(self) -> Lock:
        """The lock, checked: every write of a run passes here."""
        if self._lock is None:
            raise UserError(f"{self.path} is open for reading only.")
        self._lock.check()
        return self._lock

    def _prepare(self, spec: Mapping[str, Any]) -> None:
        if not (self.path / SPEC).exists() or not has_work(self.path):
            write_json(self.path / SPEC, spec, what="the spec")
        with disk_errors(self.path, "the run directory"):
            for name in (CHECKPOINTS, PREDICTIONS):
                (self.path / name).mkdir(exist_ok=True)
            sync_directory(self.path)
            folders = [folder for folder in (self.path / PREDICTIONS).iterdir() if folder.is_dir()]
            for folder in (*folders, self.path, self.path / CHECKPOINTS, self.path / PREDICTIONS):
                remove_leftovers(folder)

    def _sync_log(self) -> None:
        """Before a checkpoint is there, the lines of its steps are on the disk."""
        log = self.path / "metrics.jsonl"
        if log.exists():
            with disk_errors(log, "the log"):
                sync_file(log)

    def _checkpoints(self) -> list[tuple[int, Path]]:
        """Step and path of all checkpoints, newest first; whether they verify is another question."""
        folder = self.path / CHECKPOINTS
        paths = folder.iterdir() if folder.is_dir() else ()
        steps = [(int(match[1]), path) for path in paths if (match := _STEP.fullmatch(path.name))]
        return sorted(steps, reverse=True)

    def _doubts(self, checkpoint: Path) -> list[str]:
        """Why a checkpoint cannot be used here; what verifies is remembered."""
        doubts = verify(checkpoint) or self._doubts_of_origin(checkpoint)
        if not doubts:
            self._trusted.add(checkpoint)
        return doubts

    def _doubts_of_origin(self, checkpoint: Path) -> list[str]:
        manifest = read_manifest(checkpoint)
        doubts = []
        if manifest.get("name") != checkpoint.name:
            doubts.append(f"it is a copy of {manifest.get('name')}")
        if manifest.get("spec_sha256") != spec_digest(self.path):
            doubts.append("it belongs to another run")
        return doubts

    def _likely_size(self, target: Path) -> int | None:
        """Bytes of the newest directory of the same kind: what the next one will take."""
        siblings = [path for _, path in self._checkpoints() if path.parent == target.parent]
        return directory_size(siblings[0]) if siblings else None

    def _set_status_of(self, error: BaseException) -> None:
        if isinstance(error, KeyboardInterrupt):
            self.set_status("interrupted", exit_code=EXIT_INTERRUPTED, message="stopped by Ctrl-C")
        elif isinstance(error, UserError):
            state: State = "interrupted" if error.exit_code == EXIT_INTERRUPTED else "failed"
            self.set_status(state, exit_code=error.exit_code, message=str(error))
        else:
            message = f"{type(error).__name__}: {error}"
            self.set_status("failed", exit_code=EXIT_INTERNAL, message=message)
