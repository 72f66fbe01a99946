"""Bundles of runs: who goes with whom, what is told of each, and a study that does not know of them."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

import fake_runs
from fake_runs import WORK, conduct_all, fake_job, open_jobs, until
from peft_mllm.errors import EXIT_INTERRUPTED, Interrupted
from peft_mllm.rundir import RunDir
from peft_mllm.study.engine import Attempts, Bundles, Ending, Engine, Job, Pool
from peft_mllm.study.engine.bundles import base_of, bundle_of
from peft_mllm.study.running import Machines, _engine
from runs import assert_same, command
from small_study import FAIR

CLOCKED = {"costs", "fronts", "matched"}
"""Tables about time and memory, which differ from one undisturbed study to the next."""


class Inner(Engine):
    """An engine that notes what it is given, and ends it when told."""

    name = "an engine"

    def __init__(self, slots: int = 2) -> None:
        self.given: list[Job] = []
        self.ended: list[Ending] = []
        self.stopped = self.closed = False
        self._slots = slots

    @property
    def slots(self) -> int:
        return self._slots

    def start(self, job: Job) -> None:
        self.given.append(job)

    def end(self, job: Job, code: int | None = 0, **codes: int | None) -> None:
        """All of a job with one code, or some members with others."""
        members = job.members or (job,)
        bundle = job.id if job.members else ""
        self.ended += [Ending(each.id, codes.get(each.id, code), bundle=bundle) for each in members]

    def endings(self, seconds: float) -> Sequence[Ending]:
        ended, self.ended = self.ended, []
        return ended

    def stop(self) -> None:
        self.stopped = True

    def close(self) -> None:
        self.closed = True

    @property
    def bundles(self) -> list[list[str]]:
        return [[each.id for each in job.members] or [job.id] for job in self.given]


def job(name: str, **spec: Any) -> Job:
    return Job(name, f"run {name}", Path("runs") / name, {"model": "tiny:llava", **spec})


def started(count: int, *, slots: int = 2, most: int = 4, **spec: Any) -> tuple[Bundles, Inner]:
    inner = Inner(slots)
    bundles = Bundles(inner, most)
    for number in range(count):
        bundles.start(job(str(number), **spec))
    return bundles, inner


# --- who goes with whom ---


@pytest.mark.parametrize(
    ("count", "sizes"), [(1, [1]), (2, [1, 1]), (3, [2, 1]), (5, [3, 2]), (8, [4, 4]), (11, [4, 4])]
)
def test_what_waits_is_shared_out_evenly(count: int, sizes: list[int]) -> None:
    bundles, inner = started(count)
    assert inner.given == []
    assert bundles.endings(0.0) == []
    assert [len(members) for members in inner.bundles] == sizes
    assert [name for members in inner.bundles for name in members] == [str(number) for number in range(sum(sizes))]
    assert (bundles.slots, bundles.name) == (8, "an engine, up to 4 runs of one base together")


def test_a_slot_is_free_when_all_of_its_bundle_ended() -> None:
    bundles, inner = started(11)
    bundles.endings(0.0)
    first, second = inner.given
    inner.ended = [Ending(member.id, 0, bundle=first.id) for member in first.members[:3]]
    assert [ending.id for ending in bundles.endings(0.0)] == ["0", "1", "2"]
    bundles.endings(0.0)
    assert len(inner.given) == 2
    inner.ended = [Ending("3", 0, bundle=first.id)]
    bundles.endings(0.0)
    bundles.endings(0.0)
    assert inner.bundles[2:] == [["8", "9", "10"]]
    inner.end(second)
    inner.end(inner.given[2])
    assert len(bundles.endings(0.0)) == 7


def test_a_run_alone_is_a_job_as_it_was() -> None:
    bundles, inner = started(1)
    bundles.endings(0.0)
    assert inner.given[0].members == ()
    inner.end(inner.given[0])
    assert [ending.id for ending in bundles.endings(0.0)] == ["0"]


def test_only_runs_of_one_base_go_together() -> None:
    inner = Inner(slots=1)
    bundles = Bundles(inner, 8)
    kinds = [{}, {"train": {"bf16": True}}, {"model": {"path": "x"}}, {"vision": "tuned"}, {"speed": {"shard": "full"}}]
    for number in range(10):
        bundles.start(job(str(number), **kinds[number % 5]))
    for _ in range(7):
        bundles.endings(0.0)
        inner.end(inner.given[-1])
        bundles.endings(0.0)
    assert inner.bundles == [["0", "5"], ["1", "6"], ["2", "7"], ["3"], ["4"], ["8"], ["9"]]


def test_what_decides_the_base_is_what_runs_are_refused_for() -> None:
    plain = job("a", train={"learning_rate": 1.0}, seed=3, method={"name": "ia3"})
    same = [job("b"), job("b", train={"bf16": False}), job("b", vision="frozen"), job("b", speed={"shard": "none"})]
    assert {base_of(each) for each in same} == {base_of(plain)}
    assert base_of(job("b", train=None)) == base_of(plain)


def test_a_bundle_is_a_job_of_its_members() -> None:
    bundle = bundle_of([job("a"), job("b"), job("c")])
    assert (bundle.id, bundle.title, bundle.log) == ("a+b+c", "run a and 2 more", Path("runs/a.log"))
    assert [member.id for member in bundle.members] == ["a", "b", "c"]


def test_one_that_did_not_end_well_among_others_is_by_itself_the_next_time() -> None:
    bundles, inner = started(8, slots=2)
    bundles.endings(0.0)
    inner.end(inner.given[0], -11)
    inner.end(inner.given[1], 0, **{"4": 65, "5": EXIT_INTERRUPTED})
    for again in bundles.endings(0.0):
        if again.code:
            bundles.start(job(again.id))
    inner._slots = 6
    bundles.endings(0.0)
    assert sorted(inner.bundles[2:]) == [["0"], ["1"], ["2"], ["3"], ["4"], ["5"]]
    bundles, inner = started(2, slots=1)
    bundles.endings(0.0)
    inner.ended = [replace(Ending(each, 75, in_use=True), bundle="0+1") for each in ("0", "1")]
    bundles.endings(0.0)
    bundles.start(job("0"))
    bundles.start(job("1"))
    bundles.endings(0.0)
    assert inner.bundles == [["0", "1"], ["0", "1"]]


def test_what_is_stopped_before_it_begins_never_does() -> None:
    bundles, inner = started(11)
    bundles.endings(0.0)
    bundles.stop()
    assert inner.stopped
    assert [(each.id, each.code) for each in bundles.endings(0.0)] == [(n, EXIT_INTERRUPTED) for n in ("8", "9", "10")]
    for each in inner.given:
        inner.end(each, EXIT_INTERRUPTED)
    assert len(bundles.endings(0.0)) == 8
    assert len(inner.given) == 2
    bundles.close()
    assert inner.closed


def test_an_engine_bundles_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert isinstance(_engine(Machines(slots=2)), Bundles)
    assert isinstance(_engine(Machines(slots=2, together=1)), Pool)
    assert _engine(Machines(slots=2, together=3)).slots == 6
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert isinstance(_engine(Machines()), Pool)
    assert _engine(Machines(together=4)).slots == 8


# --- on a real pool ---


def bundled(*, slots: int = 1, most: int = 8) -> Bundles:
    return Bundles(Pool(slots=slots, work=WORK), most)


def attempts_at(folder: Path, run: str) -> list[tuple[str, int | None]]:
    file = folder / "attempts" / f"{run}.jsonl"
    said = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [(line["state"], line["exit_code"]) for line in said]


def pids(jobs: Sequence[Job]) -> list[set[int]]:
    """The processes that each run was in."""
    logs = [each.directory / "metrics.jsonl" for each in jobs]
    return [{json.loads(line)["pid"] for line in log.read_text().splitlines()} for log in logs]


def test_a_bundle_is_one_process(tmp_path: Path) -> None:
    jobs = [fake_job(tmp_path, f"r{number}") for number in range(4)]
    conducted = conduct_all(jobs, tmp_path, engine=bundled())
    assert sorted(conducted.done) == [each.id for each in jobs]
    assert len(set.union(*pids(jobs))) == 1
    assert jobs[0].log.read_text().startswith("--- run r0 and 3 more: ")
    assert not (tmp_path / "attempts").exists()


def test_each_member_says_by_itself_how_it_ended(tmp_path: Path) -> None:
    ends = {"good": "well", "data": "data", "crash": "crash", "disk": "disk", "also": "well"}
    jobs = [fake_job(tmp_path, name, ends=how) for name, how in ends.items()]
    conducted = conduct_all(jobs, tmp_path, engine=bundled())
    assert sorted(conducted.done) == ["also", "good"]
    assert conducted.failed["data"] == "this run is told to end so: data"
    assert conducted.failed["crash"] == "RuntimeError: a defect"
    assert attempts_at(tmp_path, "data") == [("set aside", 65)]
    assert attempts_at(tmp_path, "crash") == [("failed", 70), ("failed", 70), ("set aside", 70)]
    assert attempts_at(tmp_path, "good") == []


@pytest.mark.parametrize(("how", "first"), [("segfault", "failed"), ("killed", "lost")])
def test_one_that_takes_its_process_with_it_is_found_and_the_others_are_done(
    tmp_path: Path, how: str, first: str
) -> None:
    jobs = [fake_job(tmp_path, name, ends=how if name == "bad" else "well") for name in ("a", "bad", "c", "d")]
    conducted = conduct_all(jobs, tmp_path, engine=bundled(slots=2))
    assert sorted(conducted.done) == ["a", "c", "d"]
    assert set(conducted.failed) == {"bad"}
    assert attempts_at(tmp_path, "a") == []  # it had its result
    assert attempts_at(tmp_path, "bad")[-1][0] == "set aside"
    again = conduct_all([fake_job(tmp_path / "2", each.id, ends=each.spec["ends"]) for each in jobs], tmp_path / "2",
                        engine=bundled(slots=1))  # fmt: skip
    assert sorted(again.done) == ["a", "c", "d"]
    assert [state for state, _ in attempts_at(tmp_path / "2", "c")] == [first]  # lost with its neighbour, once


def test_a_bundle_killed_from_outside_goes_on(tmp_path: Path) -> None:
    jobs = [fake_job(tmp_path, name, steps=8, seconds=0.05) for name in ("a", "b", "c")]
    killed: list[int] = []

    class Killer(fake_runs.QuietView):
        def show(self, board: Any) -> None:
            log = jobs[1].directory / "metrics.jsonl"
            if not killed and log.exists() and log.read_text().count("\n") >= 3:
                killed.append(json.loads(log.read_text().splitlines()[0])["pid"])
                os.kill(killed[0], signal.SIGKILL)

    conducted = conduct_all(jobs, tmp_path, engine=bundled(), view=Killer())
    assert sorted(conducted.done) == ["a", "b", "c"]
    assert killed
    assert [attempts_at(tmp_path, each.id) for each in jobs] == [[], [("lost", -9)], [("lost", -9)]]
    assert Attempts(tmp_path / "attempts").failures("b") == 0
    steps = [json.loads(line)["step"] for line in (jobs[1].directory / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 9))


def test_a_bundle_that_ends_without_a_word_has_failed_with_its_code(tmp_path: Path) -> None:
    with Pool(slots=1, work="os:_exit") as pool:  # a module without a way to do several: said by each
        jobs = [fake_job(tmp_path, name) for name in ("a", "b")]
        pool.start(bundle_of(jobs))
        found: list[Ending] = []
        until(lambda: found.extend(pool.endings(0.1)) or len(found) == 2)
    assert [(each.code, each.bundle) for each in found] == [(70, "a+b")] * 2
    assert all("one by one" in each.message for each in found)
    with Pool(slots=1, work="fake_runs:silent") as pool:
        pool.start(bundle_of(jobs))
        found.clear()
        until(lambda: found.extend(pool.endings(0.1)) or len(found) == 2)
    assert [each.code for each in found] == [9, 9]


def test_a_slot_serves_one_bundle_after_the_other(tmp_path: Path) -> None:
    jobs = [fake_job(tmp_path, f"r{number}") for number in range(7)]
    conducted = conduct_all(jobs, tmp_path, engine=bundled(slots=2, most=2))
    assert len(conducted.done) == 7
    assert len(set.union(*pids(jobs))) >= 4


def test_a_stopped_study_lets_bundles_save(tmp_path: Path) -> None:
    jobs = [fake_job(tmp_path, f"r{number}", steps=1000, seconds=0.02) for number in range(6)]

    class Stopper(fake_runs.QuietView):
        def show(self, board: Any) -> None:
            if any((each.directory / "metrics.jsonl").exists() for each in jobs):
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        conduct_all(jobs, tmp_path, engine=bundled(slots=1, most=3), view=Stopper())
    assert not (tmp_path / "attempts").exists()
    assert len(open_jobs(jobs)()) == 6
    assert RunDir(jobs[0].directory).latest_checkpoint() is not None


# --- a study of real runs ---


@pytest.mark.slow
def test_a_study_of_bundles_gives_the_tables_of_one_run_by_run(tmp_path: Path) -> None:
    said = {"1": tmp_path / "single", "4": tmp_path / "bundled"}
    tables: dict[str, dict[str, bytes]] = {}
    for together, folder in said.items():
        file = folder.with_suffix(".yaml")
        size = {"train": 16, "validation": 8, "test": 8}
        task = {"row": {"name": "scenes_row", "size": size}}
        axes = FAIR["axes"] | {"task": task, "seed": [1, 2, 3], "connector": ["frozen"]}
        search = FAIR["search"] | {"on": {"task": "row"}}
        study = FAIR | {"axes": axes, "search": search, "output_dir": str(folder)}
        file.write_text(yaml.safe_dump(study, sort_keys=False))
        ended = command("study", "run", file, "--slots", "2", "--together", together, "--no-report", "--json")
        assert ended.code == 0, ended.err
        assert json.loads(ended.out)["set_aside"] == {}
        report = folder.with_name(f"report-{together}")
        made = command("study", "report", folder, "--output", report)
        assert made.code == 0, made.err
        files = (report / "tables").iterdir()
        tables[together] = {each.name: each.read_bytes() for each in files if each.stem not in CLOCKED}
    runs = sorted(path.parent.name for path in said["1"].rglob("result.json"))
    assert runs == sorted(path.parent.name for path in said["4"].rglob("result.json"))
    counts = set()
    for result in said["1"].rglob("result.json"):
        other = said["4"] / result.parent.relative_to(said["1"])
        if (result.parent / "adapter").exists():
            assert_same(other, result.parent)
        counts.add(json.loads((other / "result.json").read_text())["together"])
    assert max(counts) == 4
    assert {"scores.csv", "scores.md"} <= tables["1"].keys()
    assert tables["1"] == tables["4"]
