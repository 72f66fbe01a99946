"""A study's state is its files: what is known, what is open, what was chosen. Runs are made up here, no model is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from peft_mllm.rundir import RunDir
from peft_mllm.spec import Spec
from peft_mllm.study.definition import Study
from peft_mllm.study.index import read_index
from peft_mllm.study.outcomes import FULL
from peft_mllm.study.plan import Plan, Run
from peft_mllm.study.state import State
from small_study import FAIR


def state_of(directory: Path, **changes: Any) -> State:
    axes = FAIR["axes"] | changes.pop("axes", {})
    study = Study.model_validate({**FAIR, **changes, "axes": axes, "output_dir": str(directory)})
    return State(Plan(study), directory)


def finish(state: State, run: Run, *, score: float = 50.0, loss: float = 0.5) -> None:
    """What a run leaves behind."""
    job = state.job(run)
    with RunDir.open(job.directory, Spec.model_validate(job.spec).outcome()) as writer:
        writer.write_result(
            {
                "schema": 1,
                "name": "made up",
                "spec": dict(job.spec),
                "method": {"name": run.spec.method.name},
                "model": {"source": "embedded"},
                "training": {"best": {"step": 1, "eval_loss": loss, "restored": False}},
                "scores": {
                    run.spec.task.name: {
                        "split": run.spec.scored,
                        "metric": "exact",
                        "n": 16,
                        "values": {"accuracy": score},
                    }
                },
            }
        )


def rate(run: Run) -> float:
    assert run.spec.train.learning_rate is not None
    return run.spec.train.learning_rate


def finish_trials(state: State) -> None:
    """The higher rate is the better one for lora, the lower one for the others."""
    for run in state.plan.trials:
        finish(state, run, score=rate(run) * (1 if run.factors["method"] == "lora" else -1))


def test_first_the_base_and_the_trials_are_open(tmp_path: Path) -> None:
    state = state_of(tmp_path)
    assert {job.id for job in state.pending()} == {run.id for run in (*state.plan.references, *state.plan.trials)}
    assert all(Path(job.spec["output_dir"]) == job.directory for job in state.pending())


def test_when_a_search_is_decided_its_runs_are_known_with_what_was_chosen(tmp_path: Path) -> None:
    state = state_of(tmp_path)
    finish_trials(state)
    finals = [run for run in state.known() if run.stage == "final" and run.seed is not None]
    assert len(finals) == len(state.plan.combinations) * 3
    rates = {run.factors["method"]: rate(run) for run in finals}
    assert rates == {"lora": 1e-2, "ia3": 1e-2, FULL: 1e-4}
    assert len(state.known()) == state.plan.expected


def test_a_search_waits_for_all_of_its_trials(tmp_path: Path) -> None:
    state = state_of(tmp_path)
    first, *others = next(iter(state.plan.searches.values())).runs
    for run in others:
        finish(state, run)
    assert not [run for run in state.known() if run.stage == "final" and run.seed is not None]
    finish(state, first)
    assert [run for run in state.known() if run.stage == "final" and run.seed is not None]


def test_a_trial_that_was_set_aside_is_not_waited_for(tmp_path: Path) -> None:
    state = state_of(tmp_path)
    first, second = next(iter(state.plan.searches.values())).runs
    finish(state, second)
    state.attempts.failed(first.id, 3, "diverged")
    chosen = {run.spec.train.learning_rate for run in state.known() if run.stage == "final" and run.seed is not None}
    assert chosen == {rate(second)}


def test_a_seed_that_is_added_runs_only_what_is_new(tmp_path: Path) -> None:
    state = state_of(tmp_path)
    finish_trials(state)
    for run in state.known():
        if not state.is_done(run):
            finish(state, run)
    assert not state.pending()
    grown = state_of(tmp_path, axes={"seed": [1, 2, 3, 4]})
    assert {job.spec["seed"] for job in grown.pending()} == {4}
    assert len(grown.pending()) == len(grown.plan.combinations)


def test_a_result_that_was_tampered_with_is_no_result(tmp_path: Path) -> None:
    state = state_of(tmp_path)
    run = state.plan.references[0]
    finish(state, run)
    file = state.job(run).directory / "result.json"
    file.write_text(file.read_text().replace("50.0", "99.0"))
    assert run.id in {job.id for job in state_of(tmp_path).pending()}


def test_the_index_says_what_was_tried_and_chosen(tmp_path: Path) -> None:
    state = state_of(tmp_path)
    finish_trials(state)
    state.write_index()
    index = read_index(tmp_path)
    tried = {(run.factors["method"], run.tried, run.chosen) for run in index.runs if run.stage == "trial"}
    assert ("lora", "learning rate 0.01", True) in tried
    assert ("lora", "learning rate 0.001", False) in tried
    values = {(run.factors["method"], run.values) for run in index.runs if run.stage == "final" and run.seed == 1}
    assert ("lora", "learning rate 0.01") in values
    assert index.expected == len(index.runs)
    assert dict(index.facts)["trials for each method"] == "2, with seed 7, on task next and taken for all"
    assert list(index.axes) == ["method", "connector", "task"]


def test_the_index_is_the_same_whatever_the_order_of_the_runs(tmp_path: Path) -> None:
    texts = []
    for name, order in (("a", 1), ("b", -1)):
        state = state_of(tmp_path / name)
        for run in list(state.plan.trials)[::order]:
            finish(state, run, score=rate(run))
        state.write_index()
        content = json.loads((tmp_path / name / "study.json").read_text())
        content["definition"].pop("output_dir")
        texts.append(content)
    assert texts[0] == texts[1]


@pytest.mark.parametrize("damage", ["{", ""])
def test_a_damaged_index_is_written_anew(tmp_path: Path, damage: str) -> None:
    state = state_of(tmp_path)
    state.write_index()
    (tmp_path / "study.json").write_text(damage)
    state.write_index()
    assert read_index(tmp_path).title == "t"
