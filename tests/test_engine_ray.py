"""Ray as an engine: the same endings as on the pool. (What it does about kills is in test_engine_kills.py.)"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import fake_runs
from fake_runs import WORK, fake_job, living, until, write_jobs
from peft_mllm.rundir import RunDir
from peft_mllm.study.engine import Attempts, EngineError, RayCluster
from peft_mllm.study.engine.on_ray import passed_on


def driver(folder: Path, address: str = "local", work: str = WORK) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, fake_runs.__file__, str(folder), address, work],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PEFT_MLLM_STUDY": str(folder)},
    )  # fmt: skip


def test_without_ray_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(EngineError, match=r"pip install 'peft-mllm\[ray\]'"):
        RayCluster()


def test_no_secret_goes_to_other_machines():
    there = {"HF_HOME": "/models", "HF_TOKEN": "hf_x", "PEFT_MLLM_CACHE": "/c", "PEFT_MLLM_API_KEY": "k", "HOME": "/h"}
    assert passed_on(there) == {"HF_HOME": "/models", "PEFT_MLLM_CACHE": "/c"}


@pytest.mark.slow
def test_a_cluster_of_this_machine_runs_fails_stops_and_goes_on(tmp_path):
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    jobs = [
        fake_job(tmp_path, "bad", ends="data"),
        fake_job(tmp_path, "quick"),
        *(fake_job(tmp_path, f"r{i}", steps=200, seconds=0.05) for i in range(2)),
    ]
    write_jobs(tmp_path, jobs)
    first = driver(tmp_path)
    until(lambda: all((job.directory / "metrics.jsonl").exists() for job in jobs[2:]), seconds=90)
    first.send_signal(signal.SIGTERM)
    out, err = first.communicate(timeout=60)
    assert first.returncode == 75, out + err
    assert "the same command goes on" in err
    until(lambda: living(tmp_path) == [], seconds=5)
    assert [(RunDir(job.directory).status() or {})["state"] for job in jobs] == [
        "failed", "done", "interrupted", "interrupted",
    ]  # fmt: skip
    second = driver(tmp_path)
    out, err = second.communicate(timeout=90)
    assert second.returncode == 0, err
    said = json.loads(out)
    assert (sorted(said["done"]), set(said["failed"])) == (["r0", "r1"], {"bad"})
    assert [each.state for each in Attempts(tmp_path / "attempts").of("bad")] == ["set aside"]
    assert not (tmp_path / "attempts" / "r0.jsonl").exists(), "to be stopped is no failure"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("address", "work", "said"),
    [
        ("127.0.0.1:1", WORK, "There is no Ray cluster at 127.0.0.1:1"),
        ("ray://127.0.0.1:1", WORK, "on a machine of the cluster"),
        ("local", "no_such_module:work", "No module named 'no_such_module'"),
    ],
)
def test_what_cannot_run_anything_is_one_clear_error(tmp_path, address, work, said):
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    write_jobs(tmp_path, [fake_job(tmp_path, "r")])
    _, err = driver(tmp_path, address, work).communicate(timeout=120)
    assert said in err
    assert "Traceback" not in err
    assert not (tmp_path / "attempts").exists(), "it is not the run's failure"
