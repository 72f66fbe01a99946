"""What is seen of a study while it runs, and how its runs stand according to their files."""

from __future__ import annotations

import io
import json
import os
import time
from pathlib import Path

import pytest
from rich.console import Console

from fake_runs import conduct_all, fake_job, work
from peft_mllm.errors import DataError
from peft_mllm.rundir import RunDir, checkpoint_name
from peft_mllm.study.engine import Attempts, Job, LineView, LiveView, QuietView, status_of, view_for
from peft_mllm.study.engine.live import Board, drawing, summary


def begun(job: Job, *, step: int = 3) -> RunDir:
    """A run that this process writes, some steps in."""
    run = RunDir.open(job.directory, job.spec)
    run.log({"step": step, "loss": 0.75, "tokens_per_second": 1234.5})
    run.log({"step": step, "eval_loss": 0.5})
    run.commit(checkpoint_name(step), lambda folder: (folder / "state").write_text("state") and None)
    run.set_status("running", step=step, stage="training", total=60)
    return run


def board(running: list[Job], **changes: object) -> Board:
    facts = {
        "engine": "2 processes", "expected": 10, "done": 4, "set_aside": 1, "elsewhere": 0, "slots": 2, "left": 90.0,
    }  # fmt: skip
    return Board(running=running, **{**facts, **changes})  # type: ignore[arg-type]


def drawn(of: Board, last: list[str], *, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(drawing(of, last))
    return console.file.getvalue()  # type: ignore[attr-defined]


# --- how runs stand ---


def test_a_run_that_lives_shows_where_it_is(tmp_path):
    job = fake_job(tmp_path, "r")
    with begun(job):
        (stands,) = status_of([job], tmp_path / "attempts")
    assert (stands.state, stands.stage, stands.step, stands.total) == ("running", "training", 3, 60)
    assert (stands.loss, stands.tokens_per_second) == (0.75, 1234.5)
    assert stands.host == os.uname().nodename


def test_a_run_whose_process_is_gone_is_interrupted_whatever_it_says(tmp_path):
    job = fake_job(tmp_path, "r")
    child = os.fork()
    if not child:
        begun(job)
        os._exit(9)
    os.waitpid(child, 0)
    assert (RunDir(job.directory).status() or {})["state"] == "running"
    (stands,) = status_of([job], tmp_path / "attempts")
    assert (stands.state, stands.step, stands.host) == ("interrupted", 3, "")


def test_a_run_of_another_machine_lives_as_long_as_its_lease_is_renewed(tmp_path):
    job = fake_job(tmp_path, "r")
    begun(job).close()
    lock = job.directory / "lock"
    lock.write_text(json.dumps({**json.loads(lock.read_text()), "host": "far-away", "released": False}))
    assert status_of([job], tmp_path)[0].state == "running"
    os.utime(lock, (time.time() - 120, time.time() - 120))
    assert status_of([job], tmp_path)[0].state == "interrupted"


def test_each_state_is_told_apart(tmp_path):
    jobs = {name: fake_job(tmp_path, name) for name in ("done", "failed", "aside", "waiting", "lost", "by hand")}
    attempts = Attempts(tmp_path / "attempts")
    work(jobs["done"].spec)
    attempts.failed("failed", 70, "a\ndefect")
    attempts.failed("aside", 65, "no data")
    attempts.lost("lost", None, "gone", progress="step 1")
    begun(jobs["lost"]).close()
    with pytest.raises(DataError), RunDir.open(jobs["by hand"].directory, jobs["by hand"].spec):
        raise DataError("told so")
    stands = {each.id: each for each in status_of(jobs.values(), tmp_path / "attempts")}
    assert {name: each.state for name, each in stands.items()} == {
        "done": "done", "failed": "failed", "aside": "set aside", "waiting": "waiting", "lost": "interrupted",
        "by hand": "failed",
    }  # fmt: skip
    assert (stands["failed"].failures, stands["failed"].cause) == (1, "a defect")
    assert stands["aside"].cause == "no data"
    assert stands["by hand"].cause == "told so"


# --- views ---


def test_the_drawing_has_a_line_for_each_run_and_what_is_left(tmp_path):
    jobs = [fake_job(tmp_path, "a"), fake_job(tmp_path, "b")]
    with begun(jobs[0]):
        text = drawn(board(jobs), ["run x: done in 12 s"], width=140)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[:4] == [
        "run does step loss tokens/s",
        "run a training 3 of 60 0.750 1,234",
        "run b starting",
        "run x: done in 12 s",
    ]
    assert "4 of 10 done, 1 set aside, 2 running (2 processes), about 1 min 30 s left" in text.replace("\xa0", " ")


def test_many_runs_are_counted_and_names_are_no_markup(tmp_path):
    jobs = [Job(f"r{i}", f"[red]run {i}", tmp_path / f"r{i}", {}) for i in range(40)]
    text = drawn(board(jobs), ["[bold]odd: done"], width=60)
    assert "[red]run 15" in text
    assert "and 24 more" in text
    assert "[bold]odd" in text
    assert all(len(line) <= 60 for line in text.splitlines()[:-2])


def test_a_log_file_gets_a_line_per_run_and_a_summary_now_and_then(tmp_path, monkeypatch):
    console = Console(file=io.StringIO(), width=100)
    jobs = [fake_job(tmp_path, "bad", ends="data"), fake_job(tmp_path, "good")]
    conduct_all(jobs, tmp_path, view=LineView(console))
    said = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert sorted(line.split(" in ")[0] for line in said) == [
        "run bad: set aside: this run is told to end so: data",
        "run good: done",
    ]
    view = LineView(console)
    view.show(board(jobs))
    assert len(console.file.getvalue().splitlines()) == 2  # type: ignore[attr-defined]
    monkeypatch.setattr("peft_mllm.study.engine.live.QUIET_SECONDS", 0.0)
    view.show(board(jobs[1:]))
    last = console.file.getvalue().splitlines()[-1]  # type: ignore[attr-defined]
    assert last.startswith(
        "4 of 10 done, 1 set aside, 1 running (2 processes), about 1\xa0min\xa030\xa0s left: run good ("
    )


def test_on_a_terminal_what_went_wrong_stays(tmp_path):
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    jobs = [fake_job(tmp_path, "bad", ends="data"), fake_job(tmp_path, "good")]
    view = view_for(console)
    assert isinstance(view, LiveView)
    conduct_all(jobs, tmp_path, view=view)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "run bad: set aside: this run is told to end so: data" in said
    assert "2 processes, 1 thread each" in said


def test_a_view_fits_its_console(tmp_path: Path):
    assert isinstance(view_for(Console(file=io.StringIO())), LineView)
    assert isinstance(view_for(Console(file=io.StringIO(), quiet=True)), QuietView)


def test_before_a_run_has_ended_nobody_knows_how_long_it_takes(tmp_path):
    assert summary(board([], left=None, set_aside=0, elsewhere=3)) == (
        "4 of 10 done, 0 running (2 processes), 3 held by other processes"
    )
