"""The demo: the smallest study, which comes with the package; with other methods or another new task, if asked."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft_mllm.assets import QUICK
from peft_mllm.errors import SpecError
from peft_mllm.methods import METHODS
from peft_mllm.shelf import did_you_mean
from peft_mllm.study.definition import Study, load_study
from peft_mllm.study.index import read_index
from peft_mllm.study.outcomes import FULL
from peft_mllm.tasks.scenes import UNSEEN

ALWAYS = ("none", "full")
USUAL_FACTORS = (20, 50, 100)
"""What a method that the study does not know is tried with, in multiples of its own learning rate: a base of a million
parameters needs far more than one of seven billion."""


def demo_study(output: Path, *, methods: Sequence[str] = (), task: str | None = None) -> Study:
    """The study that the demo runs; zero-shot and full fine-tuning belong to it in any case.

    Args:
        output: directory of the runs and of the report.
        methods: names on the methods shelf; the four of the paper if left out.
        task: a generated task that the base has not seen.

    Raises:
        SpecError: a name is unknown.
    """
    study = load_study(QUICK)
    changes: dict[str, Any] = {"output_dir": str(output)}
    axes = dict(study.axes)
    if task is not None:
        if task not in UNSEEN:
            raise SpecError(f"--task: '{task}' is not new to the base. {did_you_mean(task, list(UNSEEN))}")
        axes["task"] = [{**axes["task"][0], "name": task}]
    if names := [name for name in dict.fromkeys(methods) if name not in ALWAYS]:
        assert study.search is not None
        trials = study.search.trials
        axes["method"] = {name: study.axes["method"].get(name) for name in names}
        tried = {name: trials.get(name) or _trials(name) for name in names} | {FULL: trials[FULL]}
        changes["search"] = study.search.model_copy(update={"trials": tried})
    return study.model_copy(update={**changes, "axes": axes})


def _trials(name: str) -> dict[str, list[float]]:
    if name not in METHODS:
        raise SpecError(f"--methods: there is no method '{name}'. {did_you_mean(name, list(METHODS))}")
    return {"learning_rate": [factor * METHODS[name].learning_rate for factor in USUAL_FACTORS]}


def next_steps(output: Path) -> list[tuple[str, str]]:
    """Commands to go on with when the study is done, each with what it does."""
    runs = [run for run in read_index(output).runs if run.stage == "final" and run.seed is not None]
    first = runs[0]
    other = next(run for run in runs if run.factors["method"] != first.factors["method"])
    one, two = (shlex.quote(str(output / run.directory)) for run in (first, other))
    where = f"--model embedded --task {first.factors['task']} --results {shlex.quote(str(output))}"
    return [
        (f"peft-mllm compare {one} {two}", "where two methods differ, question by question"),
        (f"peft-mllm advise {where} --max-size 100kB", "which method to take, within limits"),
        (f"peft-mllm chat {one}", "talk with what was trained"),
    ]
