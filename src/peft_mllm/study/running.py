"""Running a study: what has no verified result is run, by a pool or by Ray, and the index is kept as more is known."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from peft_mllm.errors import DataError
from peft_mllm.study.attempts import ATTEMPTS_FOLDER, MOST_ATTEMPTS
from peft_mllm.study.definition import Study
from peft_mllm.study.engine import Bundles, Conducted, Engine, Job, Pool, RayCluster, conduct, view_for
from peft_mllm.study.index import read_index
from peft_mllm.study.matched import matched_axis
from peft_mllm.study.plan import Plan
from peft_mllm.study.state import State
from peft_mllm.study.wording import and_list

EngineName = Literal["pool", "ray"]
TOGETHER, SMALL_STEP = 8, 8
"""Where nothing else is said, so many runs of one base in one process on CPUs, if each computes so few questions at
once: with more, a core has enough to do with one run, and together they were no quicker."""


@dataclass(frozen=True)
class Machines:
    """On what a study runs.

    Attributes:
        engine: a pool of processes here, or Ray.
        slots: runs at once; found out if None.
        threads: of each run; 1 on a CPU if None.
        address: of a Ray cluster; one is started here if None.
        together: runs of one base in one process, at most; if None 8 whose steps are small, without a GPU, and 1 with.
    """

    engine: EngineName = "pool"
    slots: int | None = None
    threads: int | None = None
    address: str | None = None
    together: int | None = None


def open_study(study: Study, *, attempts: int = MOST_ATTEMPTS) -> State:
    """A study with its plan, in its directory.

    Raises:
        SpecError: it cannot be planned.
    """
    with study.naming_places():
        plan = Plan(study, matched=matched_axis(study))
    return State(plan, Path(study.output_dir), attempts=attempts)


def made_otherwise(study: Study) -> str:
    """What the study in its directory was run with, where that is not what the study says here; in words, or empty.

    The report is of what was run last, so whoever reads it beside the study's file has to know.
    """
    directory = Path(study.output_dir)
    try:
        index = read_index(directory)
    except DataError:
        return ""  # nothing was run, or the report says what is wrong
    here, there = (dict(_by_axis(said)) for said in (study.model_dump(mode="json"), index.definition))
    if not there or there == here:
        return ""
    named = [key for key in dict.fromkeys([*here, *there]) if here.get(key) != there.get(key) and key != "output_dir"]
    if not named:
        return ""
    return (
        f"{directory} was last run with another {and_list(named)} than the file says ({index.expected} runs): the "
        "report is of that. `peft-mllm study run` with the same overrides goes on there; without any it is the file's "
        "again."
    )


def _by_axis(definition: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """A definition's keys, of axes and what is fixed each its own."""
    for key, value in definition.items():
        if key in ("axes", "fixed") and isinstance(value, Mapping):
            yield from ((f"{key}.{name}", inner) for name, inner in value.items())
        else:
            yield key, value


def run_study(
    study: Study, machines: Machines, *, attempts: int = MOST_ATTEMPTS, retry: bool = False, console: Console
) -> Conducted:
    """Run what has no verified result, in whatever state an earlier call left the study.

    Args:
        study: its definition.
        machines: on which it runs.
        attempts: failures after which a run is set aside.
        retry: try again what was set aside.
        console: where progress is shown.

    Raises:
        Interrupted: SIGTERM or Ctrl-C; what was under way is saved.
        UserError: nothing can be run.
    """
    state = open_study(study, attempts=attempts)
    for note in state.plan.notes():
        console.print(f"Note: {note}", markup=False)
    state.write_index()
    indexed: set[str] = set()

    def jobs() -> list[Job]:
        known = {run.id for run in state.known()}
        if known != indexed:  # a search is decided: more runs are known
            state.write_index()
            indexed.update(known)
        return state.pending()

    done = len(state.known()) - len(state.pending())
    if done == state.plan.expected:
        return Conducted((), {}, 0)
    conducted = conduct(
        jobs,
        _engine(machines),
        attempts_dir=state.directory / ATTEMPTS_FOLDER,
        attempts=attempts,
        expected=state.plan.expected,
        done=done,
        retry=retry,
        view=view_for(console),
    )
    state.write_index()
    return conducted


def _engine(machines: Machines) -> Engine:
    if machines.engine == "ray":
        return RayCluster(address=machines.address, slots=machines.slots, threads=machines.threads)
    pool = Pool(slots=machines.slots, threads=machines.threads)
    if machines.together is not None:
        return Bundles(pool, machines.together) if machines.together > 1 else pool
    return pool if pool.has_devices else Bundles(pool, TOGETHER, questions=SMALL_STEP)
