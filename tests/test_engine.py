"""A pool of processes and what conducts it: failures are counted, losses are not, and nothing is left over."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import fake_runs
from fake_runs import WORK, conduct_all, fake_job, living, open_jobs, until, write_jobs
from peft_mllm.errors import DataError, DiskError
from peft_mllm.rundir import RunDir
from peft_mllm.study.engine import Attempts, EngineError, Job, Pool
from peft_mllm.study.engine.pool import visible_devices


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def attempts_at(folder: Path, run: str) -> list[tuple[str, int | None]]:
    return [(line["state"], line["exit_code"]) for line in lines(folder / "attempts" / f"{run}.jsonl")]


# --- how runs end ---


def test_all_runs_are_done_and_the_log_lies_beside(tmp_path):
    jobs = [fake_job(tmp_path, f"r{i}") for i in range(5)]
    conducted = conduct_all(jobs, tmp_path)
    assert sorted(conducted.done) == [job.id for job in jobs]
    assert (conducted.failed, conducted.waiting) == ({}, 0)
    assert all(RunDir(job.directory).result() for job in jobs)
    assert jobs[0].log == tmp_path / "runs" / "r0.log"
    assert jobs[0].log.read_text().startswith("--- run r0: ")
    assert not (tmp_path / "attempts").exists()


def test_a_poison_run_is_set_aside_with_its_cause_and_the_others_go_on(tmp_path):
    jobs = [fake_job(tmp_path, "bad", ends="crash"), *(fake_job(tmp_path, f"r{i}") for i in range(4))]
    conducted = conduct_all(jobs, tmp_path)
    assert sorted(conducted.done) == ["r0", "r1", "r2", "r3"]
    assert conducted.failed == {"bad": "RuntimeError: a defect"}
    assert attempts_at(tmp_path, "bad") == [("failed", 70), ("failed", 70), ("set aside", 70)]
    assert jobs[0].log.read_text().count("Traceback") == 3


@pytest.mark.parametrize(("how", "code"), [("data", 65), ("spec", 2), ("diverged", 3)])
def test_what_would_fail_again_in_the_same_way_is_set_aside_at_once(tmp_path, how, code):
    jobs = [fake_job(tmp_path, "bad", ends=how), fake_job(tmp_path, "good")]
    conducted = conduct_all(jobs, tmp_path)
    assert conducted.done == ("good",)
    assert conducted.failed == {"bad": f"this run is told to end so: {how}"}
    assert attempts_at(tmp_path, "bad") == [("set aside", code)]


def test_a_run_that_falls_over_says_so_by_the_end_of_its_log(tmp_path):
    conducted = conduct_all([fake_job(tmp_path, "bad", ends="segfault")], tmp_path)
    assert "about to fall over" in conducted.failed["bad"]
    assert str(tmp_path / "runs" / "bad.log") in conducted.failed["bad"]
    assert attempts_at(tmp_path, "bad") == [("failed", -11), ("failed", -11), ("set aside", -11)]


def test_a_run_that_is_always_killed_at_one_point_is_set_aside_in_the_end(tmp_path):
    conducted = conduct_all([fake_job(tmp_path, "bad", ends="killed")], tmp_path)
    assert set(conducted.failed) == {"bad"}
    assert [state for state, _ in attempts_at(tmp_path, "bad")] == ["lost", "failed", "failed", "set aside"]


def test_a_run_that_was_killed_from_outside_goes_on_and_nothing_is_counted(tmp_path):
    job = fake_job(tmp_path, "r", steps=30, seconds=0.05)
    killed: list[int] = []

    class Killer(fake_runs.QuietView):
        def show(self, board: Any) -> None:
            log = job.directory / "metrics.jsonl"
            done = lines(log)[-1] if log.exists() and log.read_text().endswith("\n") else {"step": 0}
            if len(killed) < 4 and done["step"] >= 5 * (len(killed) + 1):
                killed.append(done["pid"])
                os.kill(done["pid"], signal.SIGKILL)

    conducted = conduct_all([job], tmp_path, view=Killer())
    assert conducted.done == ("r",)
    assert attempts_at(tmp_path, "r") == [("lost", -9)] * 4
    assert Attempts(tmp_path / "attempts").failures("r") == 0
    assert [line["step"] for line in lines(job.directory / "metrics.jsonl")] == list(range(1, 31))


def test_a_run_that_ends_well_without_a_result_has_failed(tmp_path):
    conducted = conduct_all([fake_job(tmp_path, "bad", ends="exit 0")], tmp_path)
    assert "no result that verifies" in conducted.failed["bad"]


def test_runs_that_become_known_later_are_run_and_those_that_never_do_are_counted(tmp_path):
    trial, final = fake_job(tmp_path, "trial"), fake_job(tmp_path, "final")

    def ask() -> list[Job]:
        return open_jobs([trial, final] if RunDir(trial.directory).result() else [trial])()

    assert conduct_all([], tmp_path, ask=ask, expected=2).done == ("trial", "final")
    bad = fake_job(tmp_path, "bad", ends="data")
    conducted = conduct_all([bad], tmp_path, expected=5, done=2)
    assert (set(conducted.failed), conducted.waiting) == ({"bad"}, 2)


def test_runs_that_cannot_write_stop_the_study_and_are_not_all_used_up(tmp_path):
    jobs = [fake_job(tmp_path, f"r{i}", ends="disk") for i in range(20)]
    with pytest.raises(DiskError, match="told to end so: disk"):
        conduct_all(jobs, tmp_path)
    assert len(list((tmp_path / "attempts").iterdir())) <= 5


def test_one_run_that_cannot_write_does_not_stop_the_others(tmp_path):
    jobs = [fake_job(tmp_path, "bad", ends="disk"), *(fake_job(tmp_path, f"r{i}") for i in range(4))]
    conducted = conduct_all(jobs, tmp_path)
    assert (len(conducted.done), set(conducted.failed)) == (4, {"bad"})


def test_retry_begins_the_count_anew(tmp_path):
    jobs = [fake_job(tmp_path, "bad", ends="data")]
    assert conduct_all(jobs, tmp_path).failed
    (tmp_path / "runs" / "mended").touch()
    assert set(conduct_all(jobs, tmp_path).failed) == {"bad"}
    assert conduct_all(jobs, tmp_path, retry=True).done == ("bad",)
    assert [state for state, _ in attempts_at(tmp_path, "bad")] == ["set aside", "forgiven"]


# --- what it runs in ---


def test_a_slot_has_its_device_and_its_threads(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-abc")
    jobs = [fake_job(tmp_path, f"r{i}", seconds=0.5) for i in range(2)]
    pool = Pool(threads=2, work=WORK)
    assert pool.slots == 2
    conduct_all(jobs, tmp_path, engine=pool)
    results = [RunDir(job.directory).result() for job in jobs]
    assert sorted(result["device"] for result in results if result) == ["3", "GPU-abc"]
    assert {result["threads"] for result in results if result} == {"2"}


@pytest.mark.parametrize(("said", "devices"), [("", []), ("-1", []), ("0", ["0"]), ("1, 2", ["1", "2"])])
def test_devices_are_those_that_the_environment_names(monkeypatch, said, devices):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", said)
    assert visible_devices() == devices


def test_without_a_device_there_is_a_slot_for_each_core(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr("peft_mllm.study.engine.pool.cores_of_this_machine", lambda: 8)
    assert (Pool().slots, Pool().threads) == (8, 1)
    assert (Pool(threads=3).slots, Pool(slots=5).threads) == (2, 1)


def test_what_cannot_be_imported_is_one_clear_error(tmp_path):
    with pytest.raises(EngineError, match=r"does not start:(.|\n)*no_such_module"):
        conduct_all([fake_job(tmp_path, "r")], tmp_path, engine=Pool(work="no_such_module:work"))


def test_the_driver_imports_no_torch():
    program = "import sys, peft_mllm.study.engine; print(*({'torch', 'ray', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "\n"


def test_the_lock_of_a_killed_run_is_free_while_its_neighbour_lives(tmp_path):
    """Both were forked from one process: neither may hold what the other opened."""
    one, other = (fake_job(tmp_path, name, steps=1000, seconds=0.05) for name in ("one", "other"))
    with Pool(slots=2, work=WORK) as pool:
        for job in (one, other):
            pool.start(job)
            until(lambda job=job: (pool.endings(0.05), (job.directory / "metrics.jsonl").exists())[1])
        os.kill(lines(one.directory / "metrics.jsonl")[0]["pid"], signal.SIGKILL)
        until(lambda: pool.endings(0.05))
        with RunDir.open(one.directory, one.spec):
            pass


# --- drivers that are stopped, killed, and not alone ---


def driver(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, fake_runs.__file__, str(folder), "", WORK],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "STUDY": str(folder)},
    )  # fmt: skip


def steps_of(job: Job) -> int:
    log = job.directory / "metrics.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def test_a_stopped_driver_lets_its_runs_save_and_ends_with_75(tmp_path):
    jobs = [fake_job(tmp_path, f"r{i}", steps=40, seconds=0.05) for i in range(3)]
    write_jobs(tmp_path, jobs)
    first = driver(tmp_path)
    until(lambda: steps_of(jobs[0]) > 2 and steps_of(jobs[1]) > 2)
    first.terminate()
    said = first.communicate(timeout=30)[1]
    assert first.returncode == 75, said
    assert "2 runs under way were saved; the same command goes on" in said
    assert living(tmp_path) == []
    assert all((RunDir(job.directory).status() or {})["state"] == "interrupted" for job in jobs[:2])
    assert not (tmp_path / "attempts").exists()
    second = driver(tmp_path)
    assert sorted(json.loads(second.communicate(timeout=60)[0])["done"]) == ["r0", "r1", "r2"]
    assert [steps_of(job) for job in jobs] == [40, 40, 40]


def test_a_second_ctrl_c_ends_it_at_once(tmp_path):
    jobs = [fake_job(tmp_path, "r", steps=1, seconds=60)]
    write_jobs(tmp_path, jobs)
    first = driver(tmp_path)
    until(lambda: (jobs[0].directory / "checkpoints").exists())
    first.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert first.poll() is None
    first.send_signal(signal.SIGINT)
    assert "Stopped at once" in first.communicate(timeout=10)[1]
    assert first.returncode == 75
    until(lambda: living(tmp_path) == [], seconds=5)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends processes with their parent")
def test_nothing_survives_a_killed_driver(tmp_path):
    jobs = [fake_job(tmp_path, f"r{i}", steps=40, seconds=0.05) for i in range(2)]
    write_jobs(tmp_path, jobs)
    first = driver(tmp_path)
    until(lambda: all(steps_of(job) > 2 for job in jobs))
    assert len(living(tmp_path)) == 4  # driver, server, two runs
    first.kill()
    first.communicate()
    until(lambda: living(tmp_path) == [], seconds=2)
    second = driver(tmp_path)
    assert sorted(json.loads(second.communicate(timeout=60)[0])["done"]) == ["r0", "r1"]


@pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")
def test_a_killed_server_is_started_again_and_its_runs_go_on(tmp_path):
    jobs = [fake_job(tmp_path, f"r{i}", steps=40, seconds=0.05) for i in range(2)]
    write_jobs(tmp_path, jobs)
    first = driver(tmp_path)
    until(lambda: all(steps_of(job) > 2 for job in jobs))
    runs = {lines(job.directory / "metrics.jsonl")[0]["pid"] for job in jobs}
    (server,) = set(living(tmp_path)) - runs - {first.pid}
    os.kill(server, signal.SIGKILL)
    assert sorted(json.loads(first.communicate(timeout=60)[0])["done"]) == ["r0", "r1"]
    assert attempts_at(tmp_path, "r0") == [("lost", None)]


@pytest.mark.slow
def test_two_drivers_share_a_study_and_each_run_is_done_once(tmp_path, monkeypatch):
    monkeypatch.setattr("peft_mllm.study.engine.conductor.AGAIN", 0.3)
    jobs = [fake_job(tmp_path, f"r{i}", steps=10, seconds=0.05) for i in range(8)]
    write_jobs(tmp_path, jobs)
    other = driver(tmp_path)
    until(lambda: steps_of(jobs[0]))
    done_here: list[str] = []

    class Listener(fake_runs.QuietView):
        def ended(self, title: str, how: str) -> None:
            done_here.append(title)

    mine = conduct_all(jobs, tmp_path, view=Listener())
    said = other.communicate(timeout=60)
    assert other.returncode == 0, said
    assert mine.failed == json.loads(said[0])["failed"] == {}
    assert not (tmp_path / "attempts").exists(), "to be second is no failure"
    for job in jobs:
        written = lines(job.directory / "metrics.jsonl")
        assert [line["step"] for line in written] == list(range(1, 11))
        assert len({line["pid"] for line in written}) == 1
    assert sorted(mine.done) == [job.id for job in jobs]
    assert 0 < len(done_here) < len(jobs), "both had their share"


# --- what is recorded ---


def test_a_line_that_a_kill_tore_is_no_attempt(tmp_path):
    attempts = Attempts(tmp_path)
    attempts.failed("r", 70, "one")
    with (tmp_path / "r.jsonl").open("a") as file:
        file.write('{"time": "2026-')
    assert attempts.failures("r") == 1
    assert attempts.failed("r", 70, "two") == "failed"
    assert attempts.failed("r", 70, "three") == "set aside"
    assert [each.cause for each in attempts.of("r")] == ["one", "two", "three"]
    assert attempts.set_aside("r") == "three"


def test_a_loss_counts_only_where_the_run_stood_still(tmp_path):
    attempts = Attempts(tmp_path)
    assert [attempts.lost("r", None, "gone", progress=f"step {step}") for step in range(5)] == ["lost"] * 5
    assert attempts.failures("r") == 0
    states = [attempts.lost("r", None, "gone", progress="step 4") for _ in range(3)]
    assert states == ["failed", "failed", "set aside"]


def test_attempts_that_somebody_changed_are_refused_by_name(tmp_path):
    (tmp_path / "r.jsonl").write_text('{"state": "failed"}\n')
    with pytest.raises(DataError, match=r"r\.jsonl: not what was written"):
        Attempts(tmp_path).of("r")
