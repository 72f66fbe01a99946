"""Runs that train nothing, for tests of what runs a study: they keep a real run directory, and do as they are told.

As a program it is a driver: `python fake_runs.py FOLDER [ADDRESS]` conducts the jobs in FOLDER/jobs.json, on a pool or
on a Ray cluster, and ends as the command line would.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from peft_mllm.errors import DataError, DiskError, DivergedError, Interrupted, SpecError, UserError
from peft_mllm.interrupt import stop_requests
from peft_mllm.rundir import RunDir, checkpoint_name
from peft_mllm.study.engine import Conducted, Engine, Job, Pool, QuietView, View, conduct

WORK = "fake_runs:work"
# Ray reads these when it is imported; its processes on this machine then take orders from the tests alone.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])

ERRORS = {"data": DataError, "disk": DiskError, "diverged": DivergedError, "spec": SpecError}


def work(spec: Mapping[str, Any]) -> None:
    """Take `steps` steps of `seconds`, with a checkpoint each, then end as `ends` says."""
    with stop_requests() as stop, RunDir.open(Path(spec["output_dir"]), spec) as run:
        if run.result() is not None:
            return
        last = run.latest_checkpoint()
        done = last.step if last else 0
        run.rewind_log(done)
        for step in range(done + 1, spec["steps"] + 1):
            if stop():
                raise Interrupted("asked to stop")
            time.sleep(spec["seconds"])
            run.log({"step": step, "loss": 1 / step, "tokens_per_second": 10.0, "pid": os.getpid()})
            run.commit(checkpoint_name(step), lambda folder: (folder / "state").write_text("state") and None)
            run.set_status("running", step=step, stage="training", total=spec["steps"])
        if not (run.path.parent / "mended").exists():
            end(spec["ends"])
        run.write_result({"threads": os.environ["OMP_NUM_THREADS"], "device": os.environ.get("CUDA_VISIBLE_DEVICES")})
        run.set_status("done", exit_code=0)


def work_together(specs: Sequence[Mapping[str, Any]]) -> list[BaseException | None]:
    """One after the other in one process; what ended each. Who is asked to stop begins no other."""
    errors: list[BaseException | None] = []
    for spec in specs:
        try:
            if any(isinstance(error, Interrupted) for error in errors):
                raise Interrupted("asked to stop")
            work(spec)
            errors.append(None)
        except Exception as error:
            errors.append(error)
    return errors


def silent(spec: Mapping[str, Any]) -> None:
    """Not asked."""


def silent_together(specs: Sequence[Mapping[str, Any]]) -> list[BaseException | None]:
    """End the process, as a library may that gives up."""
    os._exit(9)


def end(how: str) -> None:
    """What comes before the result, if anything does."""
    if how in ERRORS:
        raise ERRORS[how](f"this run is told to end so: {how}")
    if how == "crash":
        raise RuntimeError("a defect")
    if how == "segfault":
        sys.stderr.write("about to fall over\n")
        sys.stderr.flush()
        os.kill(os.getpid(), signal.SIGSEGV)
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "exit 0":
        sys.exit(0)


def fake_job(folder: Path, name: str, *, ends: str = "well", steps: int = 1, seconds: float = 0.0) -> Job:
    """A job whose run directory is in FOLDER/runs."""
    directory = folder / "runs" / name
    spec = {"output_dir": str(directory), "ends": ends, "steps": steps, "seconds": seconds}
    return Job(id=name, title=f"run {name}", directory=directory, spec=spec)


def open_jobs(jobs: Sequence[Job]) -> Callable[[], list[Job]]:
    """What `conduct` asks: those without a result."""
    return lambda: [job for job in jobs if RunDir(job.directory).result() is None]


def conduct_all(jobs: Sequence[Job], folder: Path, *, engine: Engine | None = None, **changes: Any) -> Conducted:
    """Conduct fake jobs on a pool of two, unless told otherwise."""
    view: View = changes.pop("view", QuietView())
    engine = engine or Pool(slots=2, work=WORK)
    expected = changes.pop("expected", len(jobs))
    ask = changes.pop("ask", open_jobs(jobs))
    return conduct(ask, engine, attempts_dir=folder / "attempts", expected=expected, view=view, **changes)


def write_jobs(folder: Path, jobs: Sequence[Job]) -> None:
    """For `main`."""
    said = [{"id": job.id, "title": job.title, "directory": str(job.directory), "spec": job.spec} for job in jobs]
    (folder / "jobs.json").write_text(json.dumps(said))


def until(true: Callable[[], object], *, seconds: float = 30.0) -> None:
    """Wait until something is true; a test fails where it does not become so."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def living(folder: Path) -> list[int]:
    """The processes that work for a study: the folder is in their command line or environment."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            said = (entry / "environ").read_bytes() + (entry / "cmdline").read_bytes()
            dead = (entry / "stat").read_text().rpartition(")")[2].split()[0] in "ZX"
        except OSError:
            continue
        if str(folder).encode() in said and not dead:
            found.append(int(entry.name))
    return found


def main(folder: Path, address: str | None, work: str) -> int:
    """A driver in a process of its own."""
    from peft_mllm.study.engine import RayCluster

    said = json.loads((folder / "jobs.json").read_text())
    jobs = [Job(**{**each, "directory": Path(each["directory"])}) for each in said]
    try:
        engine = RayCluster(address, slots=2, work=work) if address else Pool(slots=2, work=work)
        conducted = conduct_all(jobs, folder, engine=engine)
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    sys.stdout.write(json.dumps({"done": conducted.done, "failed": dict(conducted.failed)}))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2] or None, sys.argv[3]))
