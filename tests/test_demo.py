"""The demo is the smallest study: with other methods it stays one, and it ends with what to do next."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from peft_mllm.assets import QUICK
from peft_mllm.demo import USUAL_FACTORS, demo_study
from peft_mllm.methods import METHODS
from peft_mllm.study.definition import load_study
from peft_mllm.study.outcomes import FULL
from peft_mllm.study.plan import Plan
from peft_mllm.study.running import open_study
from runs import command
from test_study_state import finish

STUDIES = Path(__file__).resolve().parent.parent / "studies"


def test_it_is_the_study_that_is_shipped(tmp_path: Path) -> None:
    assert (STUDIES / QUICK.name).resolve() == QUICK
    assert demo_study(tmp_path) == load_study(QUICK).model_copy(update={"output_dir": str(tmp_path)})


def test_another_method_has_as_many_trials_at_multiples_of_its_own_rate(tmp_path: Path) -> None:
    plan = Plan(demo_study(tmp_path, methods=["lora", "layernorm", "full", "none"]))
    rates = {
        method: [run.spec.train.learning_rate for run in plan.trials if run.factors["method"] == method]
        for method in ("lora", "layernorm", FULL)
    }
    assert rates["layernorm"] == [factor * METHODS["layernorm"].learning_rate for factor in USUAL_FACTORS]
    assert len(plan.trials) == sum(map(len, rates.values())) == 9
    known = {run.id for run in Plan(demo_study(tmp_path)).trials}
    assert {run.id for run in plan.trials if run.factors["method"] != "layernorm"} <= known, "none runs again"


def test_another_task_is_asked_alike(tmp_path: Path) -> None:
    usual, other = demo_study(tmp_path), demo_study(tmp_path, task="scenes_row")
    assert other.axes["task"] == [{**usual.axes["task"][0], "name": "scenes_row"}]
    assert {run.spec.task.name for run in Plan(other).trials} == {"scenes_row"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "lorra"], "there is no method 'lorra'. Did you mean 'lora'?"),
        (["--task", "scenes_rows"], "'scenes_rows' is not new to the base. Did you mean 'scenes_row'?"),
        (["--task", "scenes_at"], "'scenes_at' is not new to the base."),
    ],
)
def test_what_is_not_there_is_said(tmp_path: Path, words: list[str], message: str) -> None:
    said = command("demo", *words, "--output", tmp_path / "demo")
    assert said.code == 2
    assert message in said.err
    assert not (tmp_path / "demo").exists()


def test_when_all_is_done_it_shows_the_table_the_report_and_what_to_do_next(tmp_path: Path) -> None:
    output = tmp_path / "my demo"
    state = open_study(demo_study(output))
    while open_runs := [run for run in state.known() if not state.is_done(run)]:
        for run in open_runs:
            finish(state, run, score=float(len(run.factors["method"])))
    said = command("demo", "--output", output)
    assert said.code == 0, said.err
    lines = said.out.splitlines()
    rows = [next(line for line in lines if line.startswith(name)).split() for name in ("zero-shot", "ia3", "prefix")]
    assert [row[1] for row in rows] == ["9.0", "3.0", "6.0"]
    assert f"The report: {output / 'report/index.html'}" in lines
    commands = [shlex.split(line) for line in lines if line.startswith("  peft-mllm ")]
    assert [words[1] for words in commands] == ["compare", "advise", "chat"]
    assert all((Path(run) / "result.json").is_file() for run in [*commands[0][2:], commands[2][2]])
    advised = command(*commands[1][1:])
    assert "runs" in advised.out
    assert advised.code in (0, 1), advised.err
