"""The verbs of studies as a user sees them, on runs that are made up: engines and reports have their own tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from typer.testing import CliRunner

from peft_mllm.cli import app
from peft_mllm.errors import ModelError, SpecError
from peft_mllm.memory import asked
from peft_mllm.spec import Spec, SpeedSpec
from peft_mllm.study.definition import load_study
from peft_mllm.study.estimate import forecast
from peft_mllm.study.running import made_otherwise, open_study
from small_study import FAIR
from synthetic_study import write_study
from test_study_state import finish, finish_trials, state_of


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(FAIR | {"output_dir": str(tmp_path / "study")}, sort_keys=False))
    return path


def say(*arguments: Any) -> str:
    done = CliRunner().invoke(app, [str(each) for each in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture
def followed(monkeypatch: pytest.MonkeyPatch) -> list[Spec]:
    """The specs whose memory is planned; a made-up figure stands for the seconds that it takes to follow a model."""
    specs: list[Spec] = []

    def peak_of(spec: Spec, bare: Any, records: Any) -> int:
        specs.append(spec)
        return 2**20 * len(specs)

    monkeypatch.setattr(asked, "peak_of", peak_of)
    return specs


def test_a_plan_counts_the_runs_and_says_what_they_cost(file: Path, followed: list[Spec]) -> None:
    shown = " ".join(say("study", "plan", file).split())
    assert "50 of 50 runs to do" in shown
    assert "Time is a rough guess" in shown
    followed.clear()
    planned = json.loads(say("study", "plan", file, "--json"))
    assert len(planned["runs"]) == 50
    kinds = {(spec.method.name, spec.connector) for spec in followed}
    assert len(followed) == len(kinds) == 7, "memory is planned once for each kind of run"
    assert {run["memory"] for run in planned["runs"]} == {2**20 * n for n in range(1, 8)}
    sizes = {
        run["factors"]["method"]: run["trainable"] for run in planned["runs"] if run["factors"]["connector"] != "tuned"
    }
    assert sizes["zero-shot"] == 0
    assert sizes["ia3"] == 2560  # 2 layers: keys and values of each, and the inner activations
    assert 0 < sizes["ia3"] < sizes["lora"] < sizes["full fine-tuning"]
    flops = {
        run["factors"]["method"]: run["flops"] for run in planned["runs"] if run["factors"]["connector"] == "frozen"
    }
    assert flops["ia3"] < flops["full fine-tuning"]
    assert planned["totals_of_open_runs"]["seconds"] > 0


def test_a_plan_starts_nothing(file: Path, followed: list[Spec]) -> None:
    say("study", "plan", file)
    assert not (file.parent / "study").exists()


def test_memory_is_what_the_memory_plan_says(file: Path) -> None:
    plan = open_study(load_study(file)).plan
    tuned = next(run for run in plan.trials if run.factors["method"] == "lora")
    base = next(run for run in plan.references if run.factors["method"] == "zero-shot")
    found = forecast([tuned, base], []).runs
    plain = tuned.spec.model_copy(update={"speed": SpeedSpec(recompute="none")})
    (row,) = asked.plan_of(plain, available=2**40).table
    assert found[tuned.id].memory == pytest.approx(row.peak, rel=0.1)
    assert found[base.id].memory == row.parts["weights"] - 4 * found[tuned.id].trainable


def test_status_tells_what_is_done_and_what_was_set_aside(file: Path) -> None:
    state = state_of(file.parent / "study")
    finish(state, state.plan.references[0])
    bad = state.plan.trials[0]
    state.attempts.failed(bad.id, 65, "data/train.jsonl:7: the image is not there")
    counts = json.loads(say("study", "status", file, "--json"))
    assert (counts["done"], counts["set aside"], counts["expected"]) == (1, 1, 50)
    assert counts["not_known_yet"] == 36
    aside = [run for run in json.loads(say("study", "status", file, "--json"))["runs"] if run["state"] == "set aside"]
    assert [run["cause"] for run in aside] == ["data/train.jsonl:7: the image is not there"]
    shown = " ".join(say("study", "status", file).split())
    assert "set aside" in shown
    assert "36 not known before their trials are done" in shown


def test_a_study_that_is_done_runs_nothing_and_makes_no_process(file: Path, followed: list[Spec]) -> None:
    state = state_of(file.parent / "study")
    finish_trials(state)
    for run in state.known():
        if not state.is_done(run):
            finish(state, run)
    assert "All 50 runs are done" in " ".join(say("study", "plan", file).split())
    said = json.loads(say("study", "run", file, "--no-report", "--json"))
    assert said == {"done": [], "set_aside": {}, "waiting": 0, "report": None}
    assert (file.parent / "study" / "study.json").is_file()


def test_who_reads_the_file_hears_that_the_study_was_run_with_other_values(file: Path) -> None:
    four = "axes.seed=[1,2,3,4]"
    state = open_study(load_study(file, [four]))
    for run in state.plan.references:
        finish(state, run)
    state.write_index()
    said = f"{file.parent / 'study'} was last run with another axes.seed than the file says (62 runs)"
    for verb in ("status", "report"):
        assert said in " ".join(say("study", verb, file).split())
        assert said in json.loads(say("study", verb, file, "--json"))["note"]
    assert "note" not in json.loads(say("study", "status", file, four, "--json"))
    open_study(load_study(file)).write_index()
    assert "note" not in json.loads(say("study", "status", file, "--json"))
    moved = load_study(file).model_copy(update={"title": "t2"})
    assert "another title than" in made_otherwise(moved)


def test_a_hub_that_does_not_answer_is_said_at_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Nobody:
        def head(self, *_: Any, **__: Any) -> None:
            raise OSError("no route")

    monkeypatch.setattr(huggingface_hub, "get_session", Nobody)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ModelError) as error:
        say("study", "plan", file, "axes.model={A: some/model, B: embedded}")
    said = str(error.value)
    assert said.startswith("some/model is no local directory, and the hub")
    assert "no route. Name a local directory: 'axes.model={A: DIRECTORY}'. If it" in said
    assert "HF_HUB_OFFLINE=1" in said
    with pytest.raises(ModelError, match=r"fixed\.model=DIRECTORY"):
        say("study", "plan", file, "fixed.model=some/model")


def test_the_report_says_in_short_what_was_found(tmp_path: Path) -> None:
    study = write_study(tmp_path / "study", tasks=("scenes_next",), connectors=("frozen",), effects={"lora": 3.0})
    shown = " ".join(say("study", "report", study).split())
    assert "lora is best" in shown
    assert shown.endswith(f"The report: {study / 'report' / 'index.html'}")
    assert json.loads(say("study", "report", study, "--json")) == {"report": str(study / "report" / "index.html")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engine", "cloud"], "--engine cloud: there are pool and ray."),
        (["--address", "auto"], "--address is of a Ray cluster; say --engine ray, too."),
        (["axes.method=[lorra]"], "there is no method 'lorra'"),
        (["fixed.train.epochs=1"], "unknown key 'train.epochs'"),
    ],
)
def test_what_cannot_run_is_said_before_anything_starts(file: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(SpecError) as error:
        say("study", "run", file, *arguments)
    assert message in str(error.value)
    assert not (file.parent / "study").exists()


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"There is no study file .*none\.yaml"):
        say("study", "plan", tmp_path / "none.yaml")
