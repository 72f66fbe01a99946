"""From directories to outcomes: what the index says, what was not finished, and runs that no study planned."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from peft_mllm.errors import DataError
from peft_mllm.study.index import read_index, write_index
from peft_mllm.study.outcomes import FULL, NOT_VARIED, ZERO_SHOT
from peft_mllm.study.reading import read_study
from synthetic_study import write_study


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(
        tmp_path_factory.mktemp("reading") / "study",
        methods=("lora", "ia3"),
        tasks=("scenes_next", "scenes_at"),
        seeds=(1, 2),
        questions=24,
        trials=2,
        curve=1,
        epochs=3,
    )


def test_every_run_is_read_with_its_factors(small: Path) -> None:
    study = read_study(small)
    assert (len(study.outcomes), len(study.trials), study.missing, study.failed) == (2 + 3 * 2 * 2 * 2, 4, 0, ())
    run = study.outcomes[-1]
    assert run.factors == {"method": FULL, "task": "scenes_at", "connector": "tuned"}
    assert run.seed == 2
    assert set(run.scores) == {"scenes_at", "scenes_colour", "scenes_exists"}
    assert [point.best for point in run.curve] == [True, False]


def test_scores_are_in_the_headlines_unit(small: Path) -> None:
    for outcome in read_study(small).outcomes:
        for answers in [*outcome.scores.values(), *(each for point in outcome.curve for each in point.scores.values())]:
            assert answers.unit == "%"
            assert set(answers.scores) <= {0.0, 100.0}
            assert answers.scores.mean() == pytest.approx(answers.value)
            assert len(answers.ids) == 24


def test_zero_shot_comes_first_and_has_no_seed(small: Path) -> None:
    first = read_study(small).outcomes[0]
    assert first.is_zero_shot
    assert first.seed is None
    assert first.factors["connector"] == NOT_VARIED


def test_the_order_in_which_runs_became_known_is_of_no_account(small: Path, tmp_path: Path) -> None:
    shutil.copytree(small, tmp_path / "study")
    index = read_index(tmp_path / "study")
    write_index(tmp_path / "study", replace(index, runs=[*reversed(index.runs)]))
    here, there = read_study(small), read_study(tmp_path / "study")
    assert [each.run for each in here.outcomes] == [each.run for each in there.outcomes]
    assert [each.run for each in here.trials] == [each.run for each in there.trials]


def test_trials_have_the_validation_score(small: Path) -> None:
    for trial in read_study(small).trials:
        result = json.loads((small / "runs" / trial.run / "result.json").read_text())
        assert trial.score == result["scores"]["scenes_next"]["values"]["accuracy"]
    assert [trial.chosen for trial in read_study(small).trials] == [False, True, False, True]


def test_runs_without_a_result_are_missing_or_failed(tmp_path: Path) -> None:
    study = read_study(
        write_study(tmp_path, methods=("lora",), tasks=("scenes_next",), questions=8, failed=1, missing=2)
    )
    assert study.missing == 2
    assert study.failed == ((f"{FULL} \N{MIDDLE DOT} scenes_next \N{MIDDLE DOT} tuned \N{MIDDLE DOT} seed 3",
                             "The loss is not a number."),)  # fmt: skip


def test_runs_that_are_not_known_yet_are_missing(small: Path, tmp_path: Path) -> None:
    shutil.copytree(small, tmp_path / "study")
    index = read_index(tmp_path / "study")
    write_index(tmp_path / "study", replace(index, expected=index.expected + 7))
    assert read_study(tmp_path / "study").missing == 7


def test_a_tasks_label_takes_the_place_of_its_name(small: Path, tmp_path: Path) -> None:
    shutil.copytree(small, tmp_path / "study")
    index = read_index(tmp_path / "study")
    names = {"scenes_next": "Next to it", "scenes_at": "At"}
    runs = [replace(run, factors={**run.factors, "task": names[run.factors["task"]]}) for run in index.runs]
    axes = {**index.axes, "task": list(names.values())}
    write_index(tmp_path / "study", replace(index, runs=runs, axes=axes, seen=["scenes_colour", "scenes_at"]))
    study = read_study(tmp_path / "study")
    run = study.outcomes[-1]
    assert run.task == "At"
    assert run.scores["At"].task == "scenes_at"
    assert study.index.seen == ("scenes_colour", "At")


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no result\.json in it or below"):
        read_study(tmp_path)


# --- runs that no study planned ---


def test_axes_are_what_differs(small: Path, tmp_path: Path) -> None:
    shutil.copytree(small / "runs", tmp_path / "mine")
    for trial in read_study(small).trials:
        shutil.rmtree(tmp_path / "mine" / trial.run)
    planned, inferred = read_study(small), read_study(tmp_path / "mine")
    assert inferred.index.axes == {
        "method": [ZERO_SHOT, "ia3", "lora", FULL],
        "task": ["scenes_at", "scenes_next"],
        "connector": ["frozen", "tuned"],
    }
    assert inferred.index.seen == ("scenes_colour", "scenes_exists")
    assert {(*sorted(each.factors.items()), each.seed) for each in inferred.outcomes} == {
        (*sorted(each.factors.items()), each.seed) for each in planned.outcomes
    }


def edited(source: Path, target: Path, **changes: object) -> None:
    """A copy of a run whose spec says something else; `a__b` is a key within a section."""
    shutil.copytree(source, target)
    content = json.loads((target / "result.json").read_text())
    content.pop("sha256")
    for key, value in changes.items():
        *around, last = key.split("__")
        inner = content
        for name in around:
            inner = inner[name]
        inner[last] = value
    (target / "result.json").write_text(json.dumps(content))


@pytest.fixture
def one(small: Path) -> Path:
    outcomes = read_study(small).outcomes
    run = next(each for each in outcomes if each.factors["method"] == "lora" and each.factors["connector"] == "frozen")
    return small / "runs" / run.run


@pytest.mark.parametrize(
    ("changes", "axis", "labels"),
    [
        ({"spec__data__max_train_samples": 1000}, "data_size", ["1000", "all"]),
        ({"trainable__llm__learning_rate": 0.001}, "learning_rate", ["0.0002", "0.001"]),
        ({"method__location": "mlp"}, "location", ["both", "mlp"]),
        ({"method__options": {"rank": 16}}, "method", ["lora, rank 16", "lora, rank 8"]),
        ({"spec__vision": "tuned"}, "vision", ["frozen", "tuned"]),
        ({"model__source": "some/other"}, "model", ["embedded", "other"]),
        ({"spec__train__num_train_epochs": 6.0}, "train.num_train_epochs", ["3", "6"]),
    ],
)
def test_whatever_differs_becomes_an_axis(
    one: Path, tmp_path: Path, changes: dict[str, object], axis: str, labels: list[str]
) -> None:
    edited(one, tmp_path / "a")
    edited(one, tmp_path / "b", **changes)
    study = read_study(tmp_path)
    assert list(study.index.axes[axis]) == labels
    assert set(study.index.axes) == {"method", "task", axis}
    assert len(study.outcomes) == 2
    assert study.notes == ()


def test_a_run_that_says_the_same_again_is_left_out_and_named(one: Path, tmp_path: Path) -> None:
    edited(one, tmp_path / "a")
    edited(one, tmp_path / "again")
    study = read_study(tmp_path)
    assert len(study.outcomes) == 1
    assert study.notes == ("Left out, since another run has the same spec: again.",)


def test_runs_scored_on_validation_data_are_left_out_beside_others(one: Path, tmp_path: Path) -> None:
    edited(one, tmp_path / "a" / "tested")
    edited(one, tmp_path / "a" / "tried", spec__scored="validation")
    study = read_study(tmp_path / "a")
    assert [each.run for each in study.outcomes] == ["tested"]
    assert study.notes == (
        "Left out: 1 run scored on validation data (`scored: validation`), as trials of a search are.",
    )
    edited(one, tmp_path / "b" / "tried", spec__scored="validation")
    study = read_study(tmp_path / "b")
    assert len(study.outcomes) == 1
    assert study.notes == ("All scores are of validation data: `scored: validation` in the specs.",)


def test_a_run_alone_is_a_study_of_one(one: Path) -> None:
    study = read_study(one)
    assert len(study.outcomes) == 1
    assert study.index.title == one.name


def test_scores_that_are_no_plain_mean_keep_their_headline(one: Path, tmp_path: Path) -> None:
    """A headline that is the mean of several sets is no fixed multiple of the grades' mean."""
    edited(one, tmp_path / "a", scores__scenes_next__values={"accuracy": 51.5})
    answers = read_study(tmp_path).outcomes[0].scores["scenes_next"]
    assert answers.scores.mean() == pytest.approx(51.5)
    assert len(np.unique(answers.scores)) == 2


def test_hallucination_is_of_one_task_for_all_runs(small: Path, tmp_path: Path) -> None:
    """A run's own task comes first in its file; a figure of it says nothing beside another's on another task."""
    runs = [each for each in read_study(small).outcomes if each.factors["method"] == "lora"][:2]
    for number, run in enumerate(runs):
        result = json.loads((small / "runs" / run.run / "result.json").read_text())
        described = {
            "metric": "listed",
            "split": "test",
            "n": 9,
            "values": {"f1": 50.0, "hallucination_rate": 7.0 + number},
        }
        own = {**described, "values": {"f1": 50.0, "hallucination_rate": 99.0}}
        scores = {**({"scenes_a": own} if number else {}), "scenes_describe": described, **result["scores"]}
        edited(small / "runs" / run.run, tmp_path / str(number), scores=scores)
    assert [each.figures["hallucination"] for each in read_study(tmp_path).outcomes] == [7.0, 8.0]
