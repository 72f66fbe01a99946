"""The training curve: the checkpoints that are scored, the same after any kill, and nothing else changed by it."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import peft_mllm
from peft_mllm import curve, evaluation, run, training
from peft_mllm.cli import main
from peft_mllm.errors import SpecError
from peft_mllm.progress import Progress, curve_steps
from peft_mllm.rundir import RunDir
from peft_mllm.spec import CurveSpec
from peft_mllm.specfile import parse_spec
from peft_mllm.study.results import read_result
from runs import (
    assert_same,
    checkpoints,
    fork_training,
    in_processes,
    kill_after,
    kill_at,
    lines,
    metrics,
    outcome,
    read,
    status,
    tiny,
    train_forked,
    unclocked,
    weights,
    write_spec,
)

RISING = {"learning_rate": 2.0, "lr_scheduler_type": "constant", "eval_steps": 1, "max_steps": 6, "save_steps": 4}
"""The validation loss falls, and then rises: there are points after the best."""
STILL = {"name": "lora", "rank": 4, "alpha": 8, "dropout": 0.0}
OTHER = {"name": "scenes_colour", "size": {"validation": 4, "test": 4}}
CURVE = {"after_best": 2, "epochs": [0.4, 2.0]}
STEPS_PER_EPOCH = 3


def specified(output_dir: Path, **changes: Any) -> dict[str, Any]:
    changes["train"] = RISING | changes.get("train", {})
    shuffled = {"group_by_image": False}
    return tiny(output_dir, **{"method": STILL, "evaluate": [OTHER], "curve": CURVE, "data": shuffled} | changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("curve")


@pytest.fixture(scope="module")
def spec(folder: Path) -> Path:
    return write_spec(folder / "spec.yaml", specified(folder / "whole"))


@pytest.fixture(scope="module")
def whole(folder: Path, spec: Path) -> Path:
    assert train_forked(spec, log=folder / "log") == 0, (folder / "log").read_text()
    return folder / "whole"


# --- which steps ---


def progressed(losses: list[float], every: int = 1) -> Progress:
    """As if these validation losses had been measured."""
    progress = Progress(step=every * len(losses))
    progress.evaluations = [(every * (i + 1), loss) for i, loss in enumerate(losses)]
    if losses:
        best = min(range(len(losses)), key=losses.__getitem__)
        progress.best_step, progress.best_eval_loss = every * (best + 1), losses[best]
    return progress


@pytest.mark.parametrize(
    ("asked", "losses", "steps"),
    [
        ({"after_best": 2}, [5, 3, 4, 5, 6], [20, 30, 40]),
        ({"after_best": 2}, [5, 3, 3, 3], [20, 30, 40]),  # the first of equal ones is the best
        ({"after_best": 4}, [5, 4, 3], [30]),  # nothing is after the last
        ({"epochs": [1, 2]}, [5, 3, 4, 5], [20, 40]),
        ({"epochs": [1.25, 9]}, [5, 3, 4, 5], [20, 40]),  # of two as near, the earlier; past the end, the last
        ({"after_best": 1, "epochs": [1]}, [5, 3, 2, 5], [20, 30, 40]),
        ({"after_best": 1, "epochs": [1]}, [], []),
        ({}, [5, 3], []),
    ],
)
def test_which_steps_are_scored(asked, losses, steps):
    assert curve_steps(progressed(losses, every=10), CurveSpec(**asked), steps_per_epoch=20) == steps


def test_what_is_needed_at_the_end_is_kept_at_every_moment_before():
    drawn = random.Random(4)
    for _ in range(300):
        losses = [drawn.choice([1.0, 2.0, 3.0, drawn.random()]) for _ in range(drawn.randint(1, 12))]
        asked = CurveSpec(after_best=drawn.randint(0, 4), epochs=tuple(drawn.uniform(0.1, 4) for _ in range(3)))
        at_end = curve_steps(progressed(losses, every=3), asked, 7)
        for now in range(1, len(losses)):
            kept = curve_steps(progressed(losses[:now], every=3), asked, 7)
            assert [step for step in at_end if step <= 3 * now and step not in kept] == []


# --- what is scored ---


def test_the_curve_has_the_best_and_what_comes_after(whole):
    result = read(whole / "result.json")
    evaluated = {line["step"]: line["eval_loss"] for line in metrics(whole) if "eval_loss" in line}
    best = min(evaluated, key=evaluated.get)
    assert 1 < best < 6, "this test needs a run that gets worse at last"
    expected = sorted({1, 6, *(step for step in range(best, best + 3) if step <= 6)})
    assert [point["step"] for point in result["curve"]] == expected
    for point in result["curve"]:
        assert point["eval_loss"] == evaluated[point["step"]]
        assert point["epoch"] == point["step"] / STEPS_PER_EPOCH
        assert point["best"] == (point["step"] == best)
        assert set(point["scores"]) == {"scenes_at", "scenes_colour"}
    (at_best,) = [point for point in result["curve"] if point["best"]]
    assert at_best["scores"] == result["scores"]  # the weights are the same, and are asked once


@pytest.mark.parametrize("step", [1, 6])
def test_a_point_is_scored_as_the_run_that_ends_there(tmp_path, whole, step):
    options = RISING | {"max_steps": step, "load_best_model_at_end": False}
    peft_mllm.train(specified(tmp_path / "short", train=options, curve={}), quiet=True)
    (point,) = [point for point in read(whole / "result.json")["curve"] if point["step"] == step]
    short = read(tmp_path / "short" / "result.json")["scores"]
    for task, score in short.items():
        there = point["scores"][task]
        assert there["predictions"] == f"predictions/step-{step:08d}/{task}.jsonl"
        assert there["values"] == score["values"]
        assert lines(whole / there["predictions"]) == lines(tmp_path / "short" / score["predictions"])


def test_the_rest_of_the_run_is_as_without_a_curve(tmp_path, whole):
    peft_mllm.train(specified(tmp_path / "plain", curve={}), quiet=True)
    plain, mine = (read(each / "result.json") for each in (tmp_path / "plain", whole))
    assert plain["curve"] == []
    assert unclocked(plain["scores"]) == unclocked(mine["scores"])
    assert plain["retention"] == mine["retention"]
    assert plain["training"]["best"] == mine["training"]["best"]
    assert metrics(tmp_path / "plain") == metrics(whole)
    for name, tensor in weights(tmp_path / "plain").items():
        assert torch.equal(tensor, weights(whole)[name])


def test_checkpoints_go_once_the_curve_is_scored(whole):
    best = read(whole / "result.json")["training"]["best"]["step"]
    kept = checkpoints(whole)
    assert best in kept
    assert len(kept) == 3  # the newest two, and the best
    assert status(whole)["state"] == "done"


def test_a_study_reads_it(whole):
    result, written = read_result(whole), read(whole / "result.json")
    assert [point.step for point in result.curve] == [point["step"] for point in written["curve"]]
    assert [point.best for point in result.curve].count(True) == 1
    for point, raw in zip(result.curve, written["curve"], strict=True):
        for task, score in raw["scores"].items():
            assert point.scores[task].values == score["values"]
            assert [each.prediction for each in point.predictions[task]] == [
                line["prediction"] for line in lines(whole / score["predictions"])
            ]


def test_without_training_there_is_no_curve(tmp_path):
    result = peft_mllm.train(specified(tmp_path / "run", method="none"), quiet=True)
    assert result["curve"] == []
    assert set(result["scores"]) == {"scenes_at", "scenes_colour"}


# --- kills ---


def test_kills_at_random_moments(tmp_path, spec, whole):
    """Most of the time of this run is the scoring of its curve."""
    target, moments, kills = tmp_path / "run", random.Random(7), 0
    while kills < 5:
        if not kill_after(fork_training(spec, f"output_dir={target}", log=tmp_path / "log"), moments.uniform(0, 0.9)):
            assert_same(target, whole)
            shutil.rmtree(target)
        else:
            kills += 1
    assert train_forked(spec, f"output_dir={target}", log=tmp_path / "log") == 0
    assert_same(target, whole)
    assert checkpoints(target) == checkpoints(whole)


MOMENTS = {
    "between two points": kill_at(curve, "load_parameters", 2),
    "in the middle of a point": kill_at(evaluation, "ask", 7),
    "before the result": kill_at(RunDir, "write_result", 1),
    "before checkpoints go": kill_at(run, "finish", 1),
}


ALWAYS = ("in the middle of a point", "before the result")


@pytest.mark.parametrize(
    "moment", [pytest.param(name, marks=[pytest.mark.slow] * (name not in ALWAYS)) for name in MOMENTS]
)
def test_a_kill_at_a_known_moment(tmp_path, spec, whole, moment):
    target, log = tmp_path / "run", tmp_path / "log"
    assert train_forked(spec, f"output_dir={target}", log=log, prepare=MOMENTS[moment]) == -signal.SIGKILL
    answered = sum(len(file.read_text().splitlines()) for file in (target / "predictions").rglob("*.jsonl"))
    assert answered > 0
    assert train_forked(spec, f"output_dir={target}", log=log, prepare=_counting(tmp_path / "asked")) == 0
    assert_same(target, whole)
    assert checkpoints(target) == checkpoints(whole)
    assert status(target)["state"] == "done"
    asked = [int(line) for line in (tmp_path / "asked").read_text().split()]
    points = len(read(target / "result.json")["curve"])
    assert sum(asked) == 8 * points - answered, "what was answered is not asked again"


def _counting(file: Path) -> Any:
    """For `prepare`: how many questions each call asks goes into a file."""

    def prepare() -> None:
        real = evaluation.ask
        file.touch()

        def ask(tuned: Any, samples: Any, *args: Any, **kwargs: Any) -> Any:
            with file.open("a") as log:
                log.write(f"{len(samples)}\n")
            return real(tuned, samples, *args, **kwargs)

        evaluation.ask = ask

    return prepare


def test_a_damaged_checkpoint_of_the_curve_is_made_again(tmp_path, spec, whole):
    target, log = tmp_path / "run", tmp_path / "log"
    kill = kill_at(curve, "load_parameters", 2)
    assert train_forked(spec, f"output_dir={target}", log=log, prepare=kill) == -signal.SIGKILL
    needed = [point["step"] for point in read(whole / "result.json")["curve"]]
    assert set(needed) <= set(checkpoints(target))
    state = target / "checkpoints" / f"step-{needed[-2]:08d}" / training.STATE
    state.write_bytes(state.read_bytes()[:-3])
    assert train_forked(spec, f"output_dir={target}", log=log) == 0
    assert f"step-{needed[-2]:08d} cannot be used" in log.read_text()
    assert_same(target, whole)


def test_a_stop_between_questions(tmp_path, spec, whole):
    target, log = tmp_path / "run", tmp_path / "log"

    def prepare() -> None:
        real = curve.load_parameters

        def load_parameters(*args: Any) -> None:
            real(*args)
            os.kill(os.getpid(), signal.SIGTERM)

        curve.load_parameters = load_parameters

    assert train_forked(spec, f"output_dir={target}", log=log, prepare=prepare) == 75
    assert status(target)["state"] == "interrupted"
    assert status(target)["stage"].startswith("scoring scenes_at at step ")
    assert train_forked(spec, f"output_dir={target}", log=log) == 0
    assert_same(target, whole)


def test_folders_of_an_earlier_attempt_go(tmp_path, spec, whole):
    """On a device whose sums differ from time to time, a run that is made again may have other points."""
    target, log = tmp_path / "run", tmp_path / "log"
    kill = kill_at(curve, "load_parameters", 1)
    assert train_forked(spec, f"output_dir={target}", log=log, prepare=kill) == -signal.SIGKILL
    (target / "predictions" / "step-00000099").mkdir()
    (target / "predictions" / "step-00000099" / "scenes_at.jsonl").write_text("{}\n")
    assert train_forked(spec, f"output_dir={target}", log=log) == 0
    assert_same(target, whole)


def test_two_processes_score_the_same_curve(tmp_path, spec, whole):
    def work(rank: int) -> None:
        words = ["train.gradient_accumulation_steps=1", f"output_dir={tmp_path / 'two'}"]
        sys.argv = ["peft-mllm", "train", str(spec), *words]
        main()

    assert in_processes(2, work, tmp_path / "log") == [0, 0], (tmp_path / "log-0").read_text()
    one, two = outcome(whole), outcome(tmp_path / "two")
    assert [point["step"] for point in two["curve"]] == [point["step"] for point in one["curve"]]
    for mine, others in zip(two["curve"], one["curve"], strict=True):
        assert mine["eval_loss"] == pytest.approx(others["eval_loss"], rel=1e-4)
        assert {task: score["n"] for task, score in mine["scores"].items()} == {"scenes_at": 4, "scenes_colour": 4}
    assert checkpoints(tmp_path / "two") == checkpoints(whole)


# --- what cannot work ---


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train": {"eval_strategy": "no"}}, "train.eval_strategy is no"),
        ({"train": {"early_stopping_patience": 1}}, "curve.after_best 2 is never reached"),
        ({"train": {"max_steps": -1, "num_train_epochs": 1}}, "curve.epochs has 2, and train.num_train_epochs is 1"),
        ({"curve": {"after_best": -1}}, "curve.after_best"),
        ({"curve": {"epochs": [0]}}, "curve.epochs"),
        ({"curve": {"epoch": [1]}}, "unknown key 'curve.epoch'"),
    ],
)
def test_a_curve_that_cannot_be_is_refused(tmp_path, changes, said):
    with pytest.raises(SpecError) as caught:
        parse_spec(specified(tmp_path / "run", **changes))
    assert said in str(caught.value)


def test_a_curve_without_validation_data_is_refused(tmp_path):
    task = {"name": "scenes_at", "size": {"train": 12, "validation": 0, "test": 4}}
    with pytest.raises(SpecError, match=r"scenes_at has no validation data.*data\.validation_fraction"):
        peft_mllm.train(specified(tmp_path / "run", task=task), quiet=True)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_epochs_in_any_order_are_one_run():
    first, second = ({"curve": {"epochs": each}} for each in ([2, 1], [1.0, 2, 2]))
    specs = [
        parse_spec({"method": "lora", "task": "scenes_row", "output_dir": "x", **each}) for each in (first, second)
    ]
    assert specs[0].id == specs[1].id
    assert specs[0].id != parse_spec({"method": "lora", "task": "scenes_row", "output_dir": "x"}).id
