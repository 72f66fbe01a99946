"""A study's file becomes its runs: every combination once, the same trials for every method, references beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from peft_mllm.errors import SpecError
from peft_mllm.study.definition import Study, load_study
from peft_mllm.study.outcomes import FULL, NOT_VARIED, ZERO_SHOT
from peft_mllm.study.plan import Plan, chosen_level
from small_study import FAIR, SIZE

PAPER: dict[str, Any] = {key: FAIR[key] for key in ("title", "fixed", "axes", "output_dir")} | {"protocol": "paper"}


def planned(base: dict[str, Any] = PAPER, **changes: Any) -> Plan:
    axes = base["axes"] | changes.pop("axes", {})
    return Plan(Study.model_validate({**base, **changes, "axes": axes}))


def finals(plan: Plan) -> list[Any]:
    return [run for combination in plan.combinations for run in plan.finals(combination, None)]


def test_every_combination_is_a_run_and_full_fine_tuning_takes_part() -> None:
    plan = planned()
    runs = finals(plan)
    assert len(runs) == len({run.id for run in runs}) == 3 * 2 * 2 * 3
    assert {run.factors["method"] for run in runs} == {"lora", "ia3", FULL}
    assert plan.expected == len(runs) + 2  # and zero-shot on two tasks


def test_zero_shot_is_one_run_for_each_model_and_task() -> None:
    plan = planned()
    assert [run.factors for run in plan.references] == [
        {"method": ZERO_SHOT, "connector": NOT_VARIED, "task": task} for task in ("next", "row")
    ]
    spec = plan.references[0].spec
    assert spec.method.name == "none"
    assert spec.connector == "frozen"
    assert spec.train.per_device_eval_batch_size == 8
    assert plan.references[0].seed is None


def test_a_run_is_the_same_whatever_stands_beside_it() -> None:
    alone = planned(axes={"method": ["ia3"], "seed": [2]})
    ids = {run.id for run in finals(planned())}
    assert {run.id for run in finals(alone) if run.factors["method"] == "ia3"} <= ids


def test_trials_are_made_where_the_search_says_and_never_see_test_data() -> None:
    plan = planned(FAIR)
    assert len(plan.trials) == 2 * 3 * 2  # rates x methods x connector settings, on one of two tasks
    assert {run.spec.scored for run in plan.trials} == {"validation"}
    assert {run.spec.task.name for run in plan.trials} == {"scenes_next"}
    assert {run.seed for run in plan.trials} == {7}
    assert all(not run.spec.evaluate and not run.spec.retention.text for run in plan.trials)


def test_what_was_chosen_goes_into_the_runs_that_count() -> None:
    plan = planned(FAIR)
    rows = [c for c in plan.combinations if c.factors["task"] == "row" and c.factors["method"] == "lora"]
    search = plan.searches[plan.search_of(rows[0])]
    chosen = chosen_level(search, [(50.0, 0.1), (70.0, 0.2)])
    assert chosen == 1
    runs = plan.finals(rows[0], search.levels[chosen])
    assert [run.spec.train.learning_rate for run in runs] == [1e-2] * 3
    assert [run.spec.seed for run in runs] == [1, 2, 3]
    assert {run.spec.scored for run in runs} == {"test"}


@pytest.mark.parametrize(
    ("scores", "place"),
    [
        ([(50.0, 0.5), (50.0, 0.4)], 1),
        ([(50.0, 0.4), (50.0, 0.4)], 0),
        ([None, (1.0, 9.0)], 1),
        ([None, None], None),
    ],
)
def test_of_equal_scores_the_lower_loss_is_chosen_then_the_first(scores: list[Any], place: int | None) -> None:
    plan = planned(FAIR)
    assert chosen_level(next(iter(plan.searches.values())), scores) == place


def test_an_axis_may_differ_by_method() -> None:
    plan = planned(axes={"size": {"by": "method", "lora": {"rank": [4, 8]}}, "connector": ["frozen"]})
    labels = {(run.factors["method"], run.factors["size"]) for run in finals(plan)}
    assert labels == {("lora", "rank 4"), ("lora", "rank 8"), ("ia3", NOT_VARIED), (FULL, NOT_VARIED)}
    ranks = {run.spec.method.options["rank"] for run in finals(plan) if run.factors["size"] == "rank 8"}
    assert ranks == {8}


def test_rows_of_options_are_taken_as_they_are() -> None:
    size = {"by": "method", "lora": [{"rank": 4, "alpha": 8}, {"rank": 8, "alpha": 16}]}
    runs = [run for run in finals(planned(axes={"size": size})) if run.factors["method"] == "lora"]
    assert {(run.spec.method.options["rank"], run.spec.method.options["alpha"]) for run in runs} == {(4, 8), (8, 16)}


def test_a_method_without_a_location_takes_part_once() -> None:
    plan = planned(axes={"method": ["lora", "prefix"], "location": ["attention", "mlp", "both"]})
    assert {run.factors["location"] for run in finals(plan) if run.factors["method"] == "prefix"} == {NOT_VARIED}
    located = {run.spec.method.options["location"] for run in finals(plan) if run.factors["method"] == "lora"}
    assert located == {"attention", "mlp", "both"}


def test_a_label_may_set_several_keys_and_leaves_the_others_of_a_section() -> None:
    models = {"small": {"model": "embedded", "train.weight_decay": 0.1}, "tiny": "tiny:llava"}
    fixed = {"model": {"dtype": "float32"}, "train": {"num_train_epochs": 1}}
    runs = finals(planned(fixed=fixed, axes={"model": models}))
    assert {(r.factors["model"], r.spec.model.path, r.spec.train.weight_decay) for r in runs} == {
        ("small", "embedded", 0.1),
        ("tiny", "tiny:llava", 0.0),
    }
    assert {(r.spec.model.dtype, r.spec.train.num_train_epochs) for r in runs} == {("float32", 1.0)}


def test_exclusions_take_out_what_they_name() -> None:
    plan = planned(exclude=[{"method": ["ia3", FULL], "connector": "tuned"}])
    assert {r.factors["method"] for r in finals(plan) if r.factors["connector"] == "tuned"} == {"lora"}


def test_a_task_is_not_evaluated_beside_itself() -> None:
    others = [{"name": name, "size": SIZE} for name in ("scenes_next", "scenes_row", "scenes_at")]
    runs = finals(planned(fixed={"evaluate": others}))
    asked = {run.factors["task"]: tuple(task.name for task in run.spec.evaluate) for run in runs}
    assert asked == {"next": ("scenes_row", "scenes_at"), "row": ("scenes_next", "scenes_at")}


def unfair(change: dict[str, Any]) -> dict[str, Any]:
    search = FAIR["search"] | change
    return {"search": search}


def sized(**size: int) -> dict[str, Any]:
    return {"axes": {"task": {"next": {"name": "scenes_next", "size": SIZE | size}}}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"axes": {"seed": [1, 2]}}, "axes.seed: the fair protocol needs at least 3 seeds"),
        ({"search": None}, "search: the fair protocol needs trials for every method"),
        (unfair({"seed": 2}), "search.seed: 2 is a seed of the study"),
        (unfair({"trials": {"lora": {"learning_rate": [1e-3]}}}), "search.trials: 'ia3' has none"),
        (
            unfair({"trials": FAIR["search"]["trials"] | {"ia3": {"learning_rate": [1e-2]}}}),
            "gives every method the same number of trials (lora 2, ia3 1, full fine-tuning 2)",
        ),
        (
            unfair({"trials": FAIR["search"]["trials"] | {"lorra": {}}}),
            "there is no method 'lorra'. Did you mean 'lora'",
        ),
        (unfair({"on": {"task": "nxt"}}), "search.on.task: task has no 'nxt'. Did you mean 'next'"),
        (unfair({"on": {"tusk": "next"}}), "search.on.tusk: there is no axis 'tusk'. Did you mean 'task'"),
        (
            {"axes": {"learning_rate": [1e-3, 1e-2]}},
            "search.trials.lora: train.learning_rate is set by an axis already",
        ),
        ({"exclude": [{"method": "lorra"}]}, "exclude[0].method: method has no 'lorra'"),
        ({"contrast": "methods"}, "contrast: there is no axis 'methods'"),
        (
            {"axes": {"method": {"lora": {"rnk": 4}, "ia3": None}}},
            "unknown key 'method.rnk'. Did you mean 'rank'? (In the run lora / frozen / next.)",
        ),
        ({"seen": ["scenes_nxt"]}, "seen[0]: there is no task 'scenes_nxt'. Did you mean 'scenes_next'?"),
        (sized(train=-64), "task.size.train: must be 0 or more, not -64"),
        (sized(test=-64), "task.size.test: must be 0 or more, not -64"),
        (sized(test=0), "task.size.test: scenes_next has no question there, so there is nothing to score"),
        (sized(validation=0), "task.size.validation: scenes_next has no question there"),
        ({"axes": {"flavour": ["a", "b"]}}, "axes.flavour: 'flavour' is no key of a run's spec"),
        ({"axes": {"connector": []}}, "axes.connector: write a list of values"),
        ({"axes": {"seed": ["a"]}}, "axes.seed: seeds are whole numbers"),
    ],
)
def test_what_cannot_be_is_said(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as error:
        finals(planned(FAIR, **changes))
    assert message in str(error.value)


def test_a_study_file_is_read_with_overrides_and_errors_name_the_line(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(PAPER, sort_keys=False))
    study = load_study(file, ["axes.seed=[5]", "fixed.train.max_steps=2"])
    assert Plan(study).seeds == (5,)
    assert study.fixed["train"]["max_steps"] == 2
    file.write_text(file.read_text() + "axis: {}\n")
    with pytest.raises(SpecError, match=r"study\.yaml:\d+: unknown key 'axis'. Did you mean 'axes'"):
        load_study(file)


LINES = """title: t
fixed:
  model: embedded
  train: {num_train_epochs: 1}
axes:
  method:
    lora: {rank: 4}
    ia3:
  task:
    next: {name: scenes_next, size: {train: 64, validation: 16, test: 16}}
  connector: [frozen, tuned]
  seed: [1, 2, 3]
seen:
  - scenes_at
exclude:
  - {connector: tuned, method: ia3}
search:
  seed: 7
  trials:
    lora: {learning_rate: [1e-3, 1e-2]}
    ia3: {learning_rate: [1e-2, 1e-1]}
    full fine-tuning: {learning_rate: [1e-4, 1e-3]}
output_dir: runs/t
"""


@pytest.mark.parametrize(
    ("said", "instead", "message"),
    [
        ("ia3:\n", "iaa3:\n", ":8: axes.method.iaa3: there is no method 'iaa3'. Did you mean 'ia3'?"),
        ("rank: 4", "rnk: 4", ":7: unknown key 'method.rnk'. Did you mean 'rank'? (In the run lora / next / frozen.)"),
        ("num_train_epochs", "num_train_epoch", ":4: unknown key 'train.num_train_epoch'."),
        ("train: 64", "train: -64", ":10: task.size.train: must be 0 or more, not -64."),
        ("test: 16", "test: 0", ":10: task.size.test: scenes_next has no question there"),
        ("scenes_at", "scenes_att", ":14: seen[0]: there is no task 'scenes_att'. Did you mean 'scenes_at'?"),
        ("method: ia3}", "method: ia4}", ":16: exclude[0].method: method has no 'ia4'."),
        ("[1e-2, 1e-1]", "[1e-2]", ":19: search.trials: the fair protocol gives every method the same number"),
        ("    ia3: {learning_rate", "    ia3: {learning_rat", ":21: unknown key 'method.learning_rat'."),
        ("[frozen, tuned]", "[frozen, tuned, open]", ":11: connector: Input should be 'frozen', 'tuned' or 'released'"),
        ("[1, 2, 3]", "[1, 2]", ":12: axes.seed: the fair protocol needs at least 3 seeds."),
    ],
)
def test_what_cannot_be_is_said_with_file_and_line(tmp_path: Path, said: str, instead: str, message: str) -> None:
    file = tmp_path / "study.yaml"
    assert LINES.count(said) == 1
    file.write_text(LINES)
    Plan(load_study(file))
    file.write_text(LINES.replace(said, instead))
    with pytest.raises(SpecError) as error:
        Plan(load_study(file))
    assert str(error.value).startswith(f"{file}{message}")


def test_what_the_command_line_says_wrong_is_said_to_be_of_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(LINES)
    with pytest.raises(
        SpecError, match=r"^command line \(axes.method=\[iaa3\]\): axes.method\[0\]: there is no method"
    ):
        Plan(load_study(file, ["axes.method=[iaa3]"]))
    assert load_study(file) == load_study(file)


def test_an_axis_by_method_says_whom_it_leaves_out() -> None:
    assert list(planned().notes()) == []
    axis = {"by": "method", "lora": {"rank": [2, 4]}, FULL: {"learning_rate": [1e-4]}}
    assert list(planned(axes={"size": axis}).notes()) == [
        "axes.size says nothing of ia3, which is there once, without a level of it."
    ]


@pytest.mark.parametrize("file", sorted((Path(__file__).parents[1] / "studies").glob("*.yaml")), ids=lambda f: f.stem)
def test_the_studies_that_are_shipped_can_be_planned(file: Path) -> None:
    plan = Plan(load_study(file))
    runs = [*plan.references, *plan.trials, *finals(plan)]
    assert len(runs) == plan.expected
    assert len({run.id for run in runs}) == len(runs)


def test_an_axis_of_a_key_may_have_other_values_for_each_method() -> None:
    rates = {"by": "method", "lora": [1e-3, 1e-2], "ia3": [1e-1], FULL: [1e-4]}
    found = {
        (r.factors["method"], r.factors["learning_rate"], r.spec.train.learning_rate)
        for r in finals(planned(axes={"learning_rate": rates, "connector": ["frozen"]}))
    }
    assert found == {("lora", "0.001", 1e-3), ("lora", "0.01", 1e-2), ("ia3", "0.1", 1e-1), (FULL, "0.0001", 1e-4)}
