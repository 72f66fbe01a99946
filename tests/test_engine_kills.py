"""A study whose driver, servers, runs, workers and machines are killed ends with the bytes of an undisturbed one."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import fake_runs
from fake_runs import conduct_all, living, until, write_jobs
from peft_mllm.rundir import RunDir
from peft_mllm.study.engine import Attempts, Job, Pool, status_of
from peft_mllm.study.engine.jobs import WORK
from runs import assert_same, command, tiny

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc"),
]

RUNS = 12
CLOCKED = {"costs", "fronts", "matched"}
"""Tables about time and memory, which differ from one undisturbed study to the next."""


def study(folder: Path) -> list[Job]:
    """Three methods, each with four seeds, on a base that knows some of the answers."""
    folder.mkdir()
    known = {
        "model": "embedded",
        "task": {"name": "scenes_next", "size": {"train": 12, "validation": 4, "test": 8}},
        "generation": {"max_new_tokens": 4},
    }
    methods = [{"name": "lora", "rank": 4, "alpha": 8, "dropout": 0.1}, {"name": "ia3"}, {"name": "adapter"}]
    jobs = []
    for number in range(RUNS):
        name = f"run-{number:02}"
        spec = tiny(folder / "runs" / name, method=methods[number % 3], seed=number // 3, **known)
        jobs.append(Job(name, name, folder / "runs" / name, spec))
    write_jobs(folder, jobs)
    return jobs


def poison(folder: Path) -> Job:
    """A run whose data is not there."""
    task = {"name": "custom", "train": str(folder / "missing.jsonl"), "test": str(folder / "missing.jsonl")}
    spec = tiny(folder / "runs" / "poison", task=task)
    return Job("poison", "poison", folder / "runs" / "poison", spec)


def tables(jobs: list[Job]) -> dict[str, bytes]:
    """The tables of a study's report, each in every form that it is written in, by file name."""
    folder = jobs[0].directory.parents[1]
    report = folder.with_name("report")
    said = command("study", "report", folder, "--output", report)
    assert said.code == 0, said.err
    return {file.name: file.read_bytes() for file in (report / "tables").iterdir() if file.stem not in CLOCKED}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[Job]:
    folder = tmp_path_factory.mktemp("undisturbed") / "study"
    jobs = study(folder)
    assert len(conduct_all(jobs, folder, engine=Pool(slots=2)).done) == RUNS
    return jobs


def assert_same_study(jobs: list[Job], others: list[Job]) -> None:
    for job, other in zip(jobs, others, strict=True):
        assert_same(job.directory, other.directory)
    mine, undisturbed = tables(jobs), tables(others)
    assert {"scores.csv", "scores.md", "scores.tex", "differences.csv", "blocks.csv"} <= mine.keys()
    assert mine.keys() == undisturbed.keys()
    assert [name for name in mine if mine[name] != undisturbed[name]] == []
    lines = list(csv.DictReader(mine["scores.csv"].decode().splitlines()))
    assert [(line["method"], line["seeds"]) for line in lines] == [("adapter", "4"), ("ia3", "4"), ("lora", "4")]
    assert len({line["score"] for line in lines}) == 3  # figures that could differ, and no row of noughts


class Driver:
    """The command that a person gives again whenever it ended before the study did."""

    def __init__(self, folder: Path, address: str = "") -> None:
        self._folder, self._address, self.kills = folder, address, 0
        self._start()

    def _start(self) -> None:
        command = [sys.executable, fake_runs.__file__, str(self._folder), self._address, WORK]
        marked = {**os.environ, "PEFT_MLLM_STUDY": str(self._folder)}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=marked)

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()
        self._start()

    def result(self) -> dict[str, Any]:
        out, err = self.process.communicate(timeout=200)
        assert self.process.returncode == 0, err
        said: dict[str, Any] = json.loads(out)
        return said


def running(jobs: list[Job]) -> list[int]:
    """The processes of the runs that are under way."""
    found = [RunDir(job.directory).status() or {} for job in jobs]
    alive = set(living(jobs[0].directory.parents[1]))
    return [said["pid"] for said in found if said.get("state") == "running" and said["pid"] in alive]


def parent_of(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def kill_at_random(
    driver: Driver, jobs: list[Job], order: list[str], victims: dict[str, Callable[[int], object]]
) -> list[str]:
    """Kill what `order` names, each at a random moment after a run has begun; what was hit."""
    moments, hit = random.Random(12), []
    for what in order:
        under_way: list[int] = []
        while not under_way and not driver.ended:
            until(lambda: driver.ended or running(jobs), seconds=120)
            time.sleep(moments.uniform(0.0, 0.5))  # a run takes about a second on an idle machine
            under_way = running(jobs)
        if under_way:
            victims[what](moments.choice(under_way))
            hit.append(what)
    return hit


def kill(process: int) -> None:
    with suppress(ProcessLookupError):  # it ended in this moment
        os.kill(process, signal.SIGKILL)


def kill_parent(run: int, generations: int) -> None:
    try:
        for _ in range(generations):
            run = parent_of(run)
    except FileNotFoundError:
        return
    kill(run)


def test_the_pool_ends_with_the_same_bytes_whatever_is_killed(tmp_path, undisturbed):
    folder = tmp_path / "study"
    jobs = study(folder)
    bad = poison(folder)
    write_jobs(folder, [bad, *jobs])
    driver = Driver(folder)
    order = ["run", "driver", "run", "run", "server", "run", "driver", "run", "run", "driver", "run", "run"]
    victims = {"run": kill, "server": lambda run: kill_parent(run, 1), "driver": lambda run: driver.kill()}
    hit = kill_at_random(driver, jobs, order, victims)
    said = driver.result()
    assert len(hit) >= 10
    assert set(said["failed"]) == {"poison"}
    assert "missing.jsonl" in said["failed"]["poison"]
    assert [each.exit_code for each in Attempts(folder / "attempts").of("poison")] == [65]
    assert {each.state for each in status_of(jobs, folder / "attempts")} == {"done"}
    assert_same_study(jobs, undisturbed)
    assert living(folder) == []


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head without room for runs, and two machines with room for one each."""
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    from ray.cluster_utils import Cluster

    small = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={**small, "num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        cluster.add_node(**small)
    yield cluster, small
    cluster.shutdown()


def test_ray_ends_with_the_same_bytes_whatever_is_killed(tmp_path, undisturbed, cluster):
    nodes, small = cluster
    folder = tmp_path / "study"
    jobs = study(folder)
    driver = Driver(folder, nodes.address)

    def kill_machine(run: int) -> None:
        kill(nodes.list_all_nodes()[-1].all_processes["raylet"][0].process.pid)
        nodes.add_node(wait=False, **small)

    victims = {
        "run": kill,
        "server": lambda run: kill_parent(run, 1),
        "worker": lambda run: kill_parent(run, 2),
        "machine": kill_machine,
        "driver": lambda run: driver.kill(),
    }
    hit = kill_at_random(driver, jobs, ["run", "worker", "driver", "run", "machine", "server", "run"], victims)
    said = driver.result()
    assert len(hit) >= 6
    assert said["failed"] == {}
    assert_same_study(jobs, undisturbed)
    until(lambda: living(folder) == [], seconds=10)
