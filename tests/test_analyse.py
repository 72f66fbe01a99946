"""The analysis finds what was put into synthetic studies, claims no more, and is the same for the same files."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peft_mllm.study.analyse import analyse
from peft_mllm.study.analysis import Analysis, Block, Line
from peft_mllm.study.index import Planned
from peft_mllm.study.inference.differences import difference, paired_differences
from peft_mllm.study.outcomes import FULL, NOT_VARIED, ZERO_SHOT, Answers, Outcome
from peft_mllm.study.reading import StudyResults, read_study
from peft_mllm.study.statistics import Estimate
from peft_mllm.study.wording import figure, interval
from synthetic_study import write_study

Make = Callable[..., Analysis]
ONE = {"tasks": ("scenes_next",), "connectors": ("frozen",)}


@pytest.fixture
def make(tmp_path: Path) -> Make:
    numbers = count()
    return lambda **said: analyse(read_study(write_study(tmp_path / str(next(numbers)), **{"seed_sd": 0.05, **said})))


@pytest.fixture(scope="module")
def main(tmp_path_factory: pytest.TempPathFactory) -> StudyResults:
    """Methods by connector by tasks, with a curve: lora is best, and tuning the connector helps."""
    return read_study(
        write_study(
            tmp_path_factory.mktemp("analyse") / "study",
            effects={"lora": 2.0, "tuned": 0.5},
            forgets={"lora": 1.5},
            seed_sd=0.05,
            transfers=True,
            curve=2,
            epochs=5,
            trials=3,
        )
    )


@pytest.fixture(scope="module")
def found(main: StudyResults) -> Analysis:
    return analyse(main)


def line_of(found: Analysis, method: str, **factors: str) -> Line:
    wanted = {"method": method, **factors}
    return next(line for line in found.lines if wanted.items() <= line.factors.items())


def block_of(found: Analysis, **factors: str) -> Block:
    return next(block for block in found.blocks if factors.items() <= block.factors.items())


# --- lines and blocks ---


def test_a_block_is_what_differs_in_the_contrast_alone(found: Analysis) -> None:
    assert [dict(block.factors) for block in found.blocks] == [
        {"task": task, "connector": connector}
        for task in ("scenes_next", "scenes_at", "scenes_count")
        for connector in ("frozen", "tuned")
    ]
    for block in found.blocks:
        methods = [found.lines[place].factors["method"] for place in block.lines]
        assert sorted(methods) == sorted([ZERO_SHOT, "adapter", "lora", "ia3", "prefix", FULL])
        scores = [line.score.value for place in block.lines if (line := found.lines[place]).score]
        assert scores == sorted(scores, reverse=True)
        assert len(block.differences) == 10  # zero-shot does not compete


def test_the_best_method_is_told_apart_and_named(found: Analysis) -> None:
    for block in found.blocks:
        best = found.lines[block.lines[0]]
        assert best.factors["method"] == "lora"
        assert best.best
        assert best.letters == block.letters[0] == "a"
        where = f"On {block.factors['task']} with connector {block.factors['connector']}, lora is best: "
        assert block.sentence.startswith(where)
        assert block.ranks[0].name == "lora"
        assert block.ranks[0].first > 0.99
    assert sum(line.best for line in found.lines) == len(found.blocks)


def test_differences_are_those_of_the_statistics(main: StudyResults, found: Analysis) -> None:
    block = found.blocks[0]
    members = {each: line_of(found, each, **block.factors) for each in ("adapter", "lora", "ia3", "prefix", FULL)}
    runs = {outcome.run: outcome for outcome in main.outcomes}
    groups = {
        name: np.stack([runs[run].scores["scenes_next"].scores for run in line.runs]) for name, line in members.items()
    }
    expected = {frozenset((each.first, each.second)): each for each in paired_differences(groups)}
    for ours in block.differences:
        theirs = expected[frozenset((ours.first, ours.second))]
        assert ours.p == pytest.approx(theirs.difference.p)
        assert ours.p_adjusted == pytest.approx(theirs.adjusted)
        assert abs(ours.value) == pytest.approx(abs(theirs.difference.value))
        assert ours.value >= 0  # the higher line stands first


@pytest.mark.parametrize("methods", [("adapter", "lora"), ("adapter", "lora", "ia3", "prefix")])
def test_a_difference_has_one_interval(make: Make, methods: tuple[str, ...]) -> None:
    """The one among all pairs is the one by which a claim of the paper is judged, as far as it is printed."""
    found = make(**ONE, methods=methods, seeds=(1, 2, 3), effects={"adapter": 1.0}, seed_sd=0.2)
    pair = next(each for each in found.blocks[0].differences if {each.first, each.second} == {"adapter", "lora"})
    assert pair.low is not None
    assert pair.high is not None
    sign = 1 if pair.first == "adapter" else -1
    low, high = sorted((sign * pair.low, sign * pair.high))
    printed = interval(Estimate(sign * pair.value, low, high), signed=True)
    assert f"adapter minus lora {figure(sign * pair.value, signed=True)} ({printed})" in found.claims[0].because


def test_zero_shot_is_paired_with_every_seed(main: StudyResults, found: Analysis) -> None:
    runs = {outcome.run: outcome for outcome in main.outcomes}
    bare = runs[line_of(found, ZERO_SHOT, task="scenes_at").runs[0]].scores["scenes_at"].scores
    line = line_of(found, "ia3", task="scenes_at", connector="frozen")
    scores = np.stack([runs[run].scores["scenes_at"].scores for run in line.runs])
    expected = difference(scores, np.broadcast_to(bare, scores.shape))
    assert line.gain is not None
    assert (line.gain.value, line.gain.low, line.gain.high) == pytest.approx(
        (expected.value, expected.low, expected.high)
    )


def test_zero_shot_itself_neither_gains_nor_competes(found: Analysis) -> None:
    for line in found.lines:
        if line.factors["method"] == ZERO_SHOT:
            assert (line.gain, line.forgotten, line.letters, line.best, line.seeds) == (None, None, "", False, 1)


def test_what_was_forgotten_is_the_mean_over_seen_tasks(main: StudyResults, found: Analysis) -> None:
    runs = {outcome.run: outcome for outcome in main.outcomes}
    line = line_of(found, "lora", task="scenes_next", connector="tuned")
    bare = runs[line_of(found, ZERO_SHOT, task="scenes_next").runs[0]]
    lost = [bare.scores[task].value - runs[run].scores[task].value for run in line.runs for task in found.seen]
    assert line.forgotten is not None
    assert line.forgotten.value == pytest.approx(np.mean(lost))
    assert line.forgotten.low is not None
    assert line.forgotten.low > 0
    assert line.seen == pytest.approx(
        np.mean([runs[run].scores[task].value for run in line.runs for task in found.seen])
    )


def test_a_task_that_was_trained_on_is_not_forgotten(make: Make) -> None:
    found = make(**ONE, seen=("scenes_next", "scenes_colour"), questions=40)
    line = line_of(found, "lora")
    (runs,) = [[o for o in found.outcomes if o.run in line.runs]]
    assert line.seen == pytest.approx(np.mean([outcome.scores["scenes_colour"].value for outcome in runs]))


def test_equal_methods_cannot_be_told_apart(make: Make) -> None:
    found = make(**ONE, full=False)
    (block,) = found.blocks
    assert "cannot be told apart (3" in block.sentence
    assert "Of these, ia3 trains the fewest parameters" in block.sentence
    assert set(block.letters) == {"a", ""}
    assert not any(line.best for line in found.lines)


def test_one_seed_tells_no_two_methods_apart(make: Make) -> None:
    found = make(**ONE, seeds=(5,), effects={"lora": 3.0})
    (block,) = found.blocks
    assert line_of(found, "lora").sd is None
    assert not any(line.best for line in found.lines)
    assert "Methods cannot be told apart by one seed" in block.sentence
    assert any("every line has one run" in note for note in found.notes)


def test_a_run_that_failed_takes_a_seed_from_its_own_pairs_alone(make: Make) -> None:
    whole = make(**ONE)
    found = make(**ONE, failed=1)
    assert [line.seeds for line in found.lines] == [1, 3, 3, 3, 3, 2]
    (block,), (before,) = found.blocks, whole.blocks
    values = {frozenset((each.first, each.second)): each.value for each in before.differences}
    for each in block.differences:
        assert each.p is not None
        if FULL not in (each.first, each.second):
            assert abs(each.value) == pytest.approx(abs(values[frozenset((each.first, each.second))]))
    assert found.failed[0][1] == "The loss is not a number."
    assert any("1 run was set aside" in note for note in found.notes)


def test_a_line_with_one_seed_among_three_waits(make: Make) -> None:
    found = make(**ONE, missing=2)  # of full fine-tuning, and of prefix, one seed less
    runs = [outcome for outcome in found.outcomes if outcome.factors["method"] == FULL]
    study = StudyResults(_index(found), tuple(o for o in found.outcomes if o not in runs[1:]), (), (), 3)
    found = analyse(study)
    (block,) = found.blocks
    waiting = [each for each in block.differences if FULL in (each.first, each.second)]
    assert [each.p for each in waiting] == [None] * 4
    assert line_of(found, FULL).letters == ""
    assert any(f"{FULL}" in note and "cannot be compared" in note for note in found.notes)


def _index(found: Analysis) -> Any:
    from peft_mllm.study.index import Index

    return Index(
        title="", question="", protocol="", facts=[], contrast=found.contrast, axes=found.axes, seen=found.seen,
        runs=[], expected=0,
    )  # fmt: skip


# --- axes that not every method has ---


def test_sizes_of_a_method_compete_with_other_methods(make: Make) -> None:
    sizes = {"lora": ["rank 8", "rank 16"], "adapter": ["bottleneck 16", "bottleneck 32"]}
    found = make(**ONE, methods=("lora", "adapter", "ia3"), sizes=sizes, full=False)
    (block,) = found.blocks
    names = {name for each in block.differences for name in (each.first, each.second)}
    assert names == {"lora rank 8", "lora rank 16", "adapter bottleneck 16", "adapter bottleneck 32", "ia3"}
    assert {(each.low_level, each.high_level, *each.where.values()) for each in found.effects} == {
        ("rank 8", "rank 16", "lora"),
        ("bottleneck 16", "bottleneck 32", "adapter"),
    }


def test_methods_with_a_size_of_their_own_each_compete_all_the_same(make: Make) -> None:
    found = make(**ONE, methods=("lora", "adapter"), sizes={"lora": ["rank 8"], "adapter": ["bottleneck 32"]})
    (block,) = found.blocks
    assert len(block.differences) == 3


def test_a_condition_that_each_method_has_alone_is_no_part_of_it(tmp_path: Path) -> None:
    study = read_study(write_study(tmp_path, tasks=("scenes_next",), methods=("lora", "ia3"), full=False))
    pairs = {("lora", "tuned"), ("ia3", "frozen")}
    kept = [o for o in study.outcomes if o.is_zero_shot or (o.factors["method"], o.factors["connector"]) in pairs]
    found = analyse(replace(study, outcomes=tuple(kept)))
    assert [block.factors["connector"] for block in found.blocks] == ["frozen", "tuned"]
    assert not any(block.differences for block in found.blocks)


def test_parameters_are_matched_from_below(make: Make) -> None:
    sizes = {"lora": ["rank 8", "rank 16"], "adapter": ["bottleneck 8", "bottleneck 32"]}
    found = make(**ONE, methods=("lora", "adapter", "ia3"), sizes=sizes, questions=20)
    views: dict[float, dict[str, str]] = {}
    for row in found.matched:
        if row.by == "parameters":
            assert row.spent <= row.budget
            views.setdefault(row.budget, {})[row.factors["method"]] = row.factors["size"]
    # 1,150 is ia3 alone; adapter has 24,600 and 98,400, lora 36,900 and 73,800
    assert views == {
        24_600: {"ia3": NOT_VARIED, "adapter": "bottleneck 8"},
        36_900: {"ia3": NOT_VARIED, "adapter": "bottleneck 8", "lora": "rank 8"},
        73_800: {"ia3": NOT_VARIED, "adapter": "bottleneck 8", "lora": "rank 16"},
        98_400: {"ia3": NOT_VARIED, "adapter": "bottleneck 32", "lora": "rank 16"},
    }


def without(study: StudyResults, method: str, axis: str) -> StudyResults:
    """The axis means nothing for the method: its runs at the first label stand for all."""
    first = next(iter(study.index.axes[axis]))
    kept = [
        replace(each, factors={**each.factors, axis: NOT_VARIED}) if each.factors["method"] == method else each
        for each in study.outcomes
        if each.factors["method"] != method or each.factors[axis] == first
    ]
    return replace(study, outcomes=tuple(kept))


def test_a_method_without_a_location_competes_at_every_location(tmp_path: Path) -> None:
    axes = {"location": ["attention", "mlp", "both"]}
    study = read_study(write_study(tmp_path, **ONE, axes=axes, effects={"lora": 2.5}, seed_sd=0.05))  # type: ignore[arg-type]
    found = analyse(without(study, "prefix", "location"))
    assert [block.factors["location"] for block in found.blocks] == ["attention", "mlp", "both"]
    prefix = line_of(found, "prefix")
    for block in found.blocks:
        assert found.lines.index(prefix) in block.lines
        assert block.letters[block.lines.index(found.lines.index(prefix))]
    assert {(each.low_level, each.high_level) for each in found.effects} == {
        ("attention", "mlp"),
        ("mlp", "both"),
        ("attention", "both"),
    }
    assert "prefix" not in {each.where.get("method") for each in found.effects}


# --- factors, tasks, curve ---


def test_the_effect_of_a_factor_is_found(found: Analysis) -> None:
    pooled = next(each for each in found.effects if not each.where)
    assert (pooled.axis, pooled.low_level, pooled.high_level, pooled.cells) == ("connector", "frozen", "tuned", 15)
    assert pooled.agree >= 13
    assert pooled.value.low is not None
    assert pooled.value.low > 0
    lines = {(line.factors["method"], line.factors["task"], line.factors["connector"]): line for line in found.lines}
    expected = np.mean(
        [
            line.score.value - frozen.score.value
            for (method, task, connector), line in lines.items()
            if connector == "tuned" and (frozen := lines[method, task, "frozen"]).score and line.score
        ]
    )
    assert pooled.value.value == pytest.approx(expected)
    assert [dict(each.where) for each in found.effects] == [
        {},
        *({"method": name} for name in ("adapter", "lora", "ia3", "prefix", FULL)),
        *({"task": name} for name in ("scenes_next", "scenes_at", "scenes_count")),
    ]


def test_no_effect_is_claimed_where_there_is_none(make: Make) -> None:
    found = make(tasks=("scenes_next", "scenes_at"))
    assert found.effects
    assert all(each.p_adjusted is not None and each.p_adjusted > 0.05 for each in found.effects)


def test_levels_are_compared_with_their_neighbours_and_end_to_end(make: Make) -> None:
    found = make(**ONE, methods=("lora",), axes={"data_size": ["1k", "5k", "10k"]}, effects={"5k": 1.0, "10k": 2.0})
    pooled = [(each.low_level, each.high_level) for each in found.effects if not each.where]
    assert pooled == [("1k", "5k"), ("5k", "10k"), ("1k", "10k")]
    assert all(each.value.value > 0 for each in found.effects)


def test_overall_is_the_mean_over_tasks(found: Analysis) -> None:
    assert len(found.overall) == 10
    for each in found.overall:
        lines = [line for line in found.lines if each.factors.items() <= line.factors.items()]
        assert each.tasks == len(lines) == 3
        assert each.score.value == pytest.approx(np.mean([line.score.value for line in lines if line.score]))
        assert each.score.low is not None
        assert each.score.high is not None
        assert each.score.low < each.score.value < each.score.high
    assert [each.rank.name for each in found.overall if each.rank.mean < 1.5] == ["lora", "lora"]


def test_scores_on_other_tasks_fall_along_the_curve(found: Analysis) -> None:
    assert {each.point for each in found.transfers} == {None, 0, 1, 2}
    assert {each.target for each in found.transfers} == {"scenes_next", "scenes_at", "scenes_count"}
    assert all(each.source != each.target for each in found.transfers)

    def mean(point: int | None) -> float:
        return float(np.mean([each.value.value for each in found.transfers if each.point == point]))

    assert mean(None) == mean(0) > mean(1) > mean(2)
    one = next(each for each in found.transfers if each.point == 1)
    bare = line_of(found, ZERO_SHOT, task=one.source)
    outcome = next(outcome for outcome in found.outcomes if outcome.run == bare.runs[0])
    assert one.change == pytest.approx(one.value.value - outcome.scores[one.target].value)


def test_the_seen_tasks_are_no_targets_unless_they_are_trained_on(found: Analysis, make: Make) -> None:
    assert not set(found.seen) & {each.target for each in found.transfers}
    other = make(tasks=("scenes_next", "scenes_colour"), connectors=("frozen",), transfers=True, questions=20)
    assert {(each.source, each.target) for each in other.transfers} == {
        ("scenes_next", "scenes_colour"),
        ("scenes_colour", "scenes_next"),
    }


def test_robustness_is_what_further_training_costs(found: Analysis) -> None:
    falls = [line.robustness for line in found.lines if line.robustness is not None]
    assert len(falls) == 30
    assert np.mean(falls) < 0


def test_the_view_of_equal_time_ends_with_the_fastest(main: StudyResults, found: Analysis) -> None:
    rows = [row for row in found.matched if row.by == "time"]
    assert len(rows) == 30
    for row in rows:
        block = block_of(found, task=row.factors["task"], connector=row.factors["connector"])
        trained = [found.lines[place] for place in block.lines if found.lines[place].factors["method"] != ZERO_SHOT]
        runs = {run for line in trained for run in line.runs}
        assert row.budget == min(each.figures["seconds"] for each in main.outcomes if each.run in runs)
        assert row.spent <= row.budget
        assert (row.seeds, row.missing) == (3, ())
        assert row.shared == block.factors
        assert row.value.low is not None
        assert row.value.low >= 0
    slow = next(row for row in rows if row.factors["method"] == FULL and row.factors["connector"] == "frozen")
    runs = [each for each in main.outcomes if dict(each.factors) == dict(slow.factors)]
    assert runs[0].result is not None
    final = min(point.eval_loss for point in runs[0].result.points if point.eval_loss is not None)
    assert slow.value.value > final - 0.1
    assert slow.spent < runs[0].figures["seconds"]


def test_a_line_is_in_equal_time_with_all_its_seeds_or_not_at_all(main: StudyResults) -> None:
    """One run of lora takes a hundred times as long, and is not evaluated before the others are done."""

    def slow(outcome: Outcome) -> Outcome:
        if outcome.factors["method"] != "lora" or outcome.seed != 2:
            return outcome
        assert outcome.result is not None
        points = tuple(
            replace(point, seconds=None if point.seconds is None else 100 * point.seconds)
            for point in outcome.result.points
        )
        seconds = {"seconds": 100 * outcome.figures["seconds"]}
        figures = {**outcome.figures, **seconds}
        return replace(outcome, figures=figures, result=replace(outcome.result, points=points))

    found = analyse(replace(main, outcomes=tuple(map(slow, main.outcomes))))
    rows = [row for row in found.matched if row.by == "time"]
    assert {row.factors["method"] for row in rows} == {"adapter", "ia3", "prefix", FULL}
    assert {row.missing for row in rows} == {("lora",)}
    assert found.untimed == ()


def test_no_line_of_a_front_is_beaten(found: Analysis) -> None:
    pairs = {(front.x, front.y) for front in found.fronts}
    assert pairs == {
        ("trainable", "score"), ("seconds", "score"), ("disk", "score"), ("memory", "score"), ("flops", "score"),
        ("forgotten", "gain"),
    }  # fmt: skip
    for front in (each for each in found.fronts if each.x == "trainable"):
        block = block_of(found, **front.factors)
        lines = [found.lines[place] for place in block.lines if found.lines[place].factors["method"] != ZERO_SHOT]
        points = {id(line): (line.figures["trainable"], -line.score.value) for line in lines if line.score}
        kept = {id(found.lines[place]) for place in front.lines}
        for name, (x, y) in points.items():
            beaten = any(a <= x and b <= y and (a, b) != (x, y) for a, b in points.values())
            assert (name in kept) == (not beaten)


def test_trials_stand_beside_the_runs_that_count(found: Analysis) -> None:
    assert len(found.trials) == 12
    assert sum(trial.chosen for trial in found.trials) == 4
    assert not {trial.run for trial in found.trials} & {run for line in found.lines for run in line.runs}


# --- the same files, the same analysis ---


def described(found: Analysis) -> str:
    """All but the arrays, and paths."""
    return repr(replace(found, outcomes=()))


def test_the_same_files_give_the_same_analysis(tmp_path: Path, main: StudyResults, found: Analysis) -> None:
    directory = tmp_path / "study"
    first = main.outcomes[0].result
    assert first is not None
    assert first.directory is not None
    shutil.copytree(first.directory.parent.parent, directory)
    from peft_mllm.study.index import read_index, write_index

    index = read_index(directory)
    write_index(directory, replace(index, runs=[*index.runs[7:], *reversed(index.runs[:7])]))
    assert described(analyse(read_study(directory))) == described(found)


def test_slower_machines_conclude_the_same(main: StudyResults, found: Analysis) -> None:
    """No time or memory decides a score, an order, a letter or a sentence."""
    rng = np.random.default_rng(0)
    outcomes = tuple(
        replace(
            each, figures={**each.figures, "seconds": float(rng.uniform(1, 99)), "memory": 1e9 * float(rng.random())}
        )
        for each in main.outcomes
    )
    other = analyse(replace(main, outcomes=outcomes))
    for name in ("blocks", "overall", "effects", "transfers", "trials", "claims", "notes"):
        assert repr(getattr(other, name)) == repr(getattr(found, name))
    for ours, theirs in zip(found.lines, other.lines, strict=True):
        assert replace(theirs, figures={}) == replace(ours, figures={})


# --- tables of others ---


def imported(method: str, seed: int, scores: np.ndarray[Any, Any], ids: tuple[str, ...]) -> Outcome:
    answers = Answers("mmlu", "given", float(scores.mean()), "%", ids, scores)
    return Outcome(f"{method}-{seed}", {"method": method, "task": "mmlu"}, seed, {"mmlu": answers})


def test_outcomes_without_a_file_are_analysed_too() -> None:
    rng = np.random.default_rng(1)
    ids = tuple(f"q{i}" for i in range(90))
    hard = rng.random(90)
    runs = [
        imported(method, seed, 100.0 * (rng.random(90) * 0.4 + skill > hard), ids[: 90 - 10 * (method == "b")])
        if method != "b"
        else imported(method, seed, 100.0 * (rng.random(80) * 0.4 + skill > hard[:80]), ids[:80])
        for method, skill in (("a", 0.7), ("b", 0.2), ("c", 0.2))
        for seed in (1, 2, 3)
    ]
    index = replace(_index_of_table(), axes={"method": ["a", "b", "c"], "task": ["mmlu"]})
    found = analyse(StudyResults(index, tuple(runs), (), (), 0))
    (block,) = found.blocks
    assert "a is best" in block.sentence
    assert any("same questions of mmlu" in note for note in found.notes)
    assert any("no zero-shot run" in note for note in found.notes)
    assert [*found.fronts, *found.matched, *found.paper] == []


def headlines(seeds: tuple[int, ...]) -> tuple[Outcome, ...]:
    """Runs of two methods, 20 points apart, whose single questions nobody knows."""
    return tuple(
        Outcome(f"{method}-{seed}", {"method": method, "task": "mmlu"}, seed, {"mmlu": answers})
        for method, value in (("a", 70.0), ("b", 50.0))
        for seed in seeds
        for answers in [Answers("mmlu", "given", value + seed + 0.1 * (method == "b") * seed**2, "%")]
    )


def test_headlines_alone_are_compared_by_seed() -> None:
    found = analyse(StudyResults(_index_of_table(), headlines((1, 2, 3)), (), (), 0))
    (block,) = found.blocks
    assert "a is best" in block.sentence
    (each,) = block.differences
    assert each.p is not None
    assert each.p < 0.01


def test_headlines_of_one_seed_are_shown_and_not_told_apart() -> None:
    found = analyse(StudyResults(_index_of_table(), headlines((1,)), (), (), 0))
    assert [line.score.low for line in found.lines if line.score] == [None, None]
    (block,) = found.blocks
    assert "cannot be told apart by one seed" in block.sentence
    assert not any(line.best for line in found.lines)


def test_equal_lines_of_a_table_are_said_to_be_equal_and_no_more() -> None:
    rng = np.random.default_rng(2)
    ids = tuple(f"q{i}" for i in range(50))
    runs = [imported(name, seed, 100.0 * (rng.random(50) > 0.5), ids) for name in ("a", "b") for seed in (1, 2, 3)]
    (block,) = analyse(StudyResults(_index_of_table(), tuple(runs), (), (), 0)).blocks
    assert "cannot be told apart (3" in block.sentence
    assert "parameters" not in block.sentence


def _index_of_table() -> Any:
    from peft_mllm.study.index import Index

    return Index(
        title="A table", question="", protocol="", facts=[], contrast="method",
        axes={"method": ["a", "b"], "task": ["mmlu"]}, seen=[], runs=[], expected=0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("metric", "unit", "values", "low", "high"),
    [
        ("given", "%", (99.0, 96.0), 78.44, 100.0),
        ("given", "%", (0.5, 3.5), 0.0, 21.06),
        ("given", "", (99.0, 96.0), 78.44, 116.56),  # nobody knows how large it can be
        ("pope", "", (0.99, 0.96), 0.7844, 1.0),
        ("caption:official", "", (0.99, 0.96), 0.7844, 1.1656),
        ("given", "%", (104.0, 101.0), 83.44, 102.5),  # no per cents; what was measured stays inside
    ],
)
def test_no_interval_leaves_the_scores_that_there_are(
    metric: str, unit: str, values: tuple[float, ...], low: float, high: float
) -> None:
    runs = tuple(
        Outcome(f"a-{seed}", {"method": "a", "task": "mmlu"}, seed, {"mmlu": Answers("mmlu", metric, value, unit)})
        for seed, value in enumerate(values)
    )
    (line,) = analyse(StudyResults(_index_of_table(), runs, (), (), 0)).lines
    assert line.score is not None
    assert (line.score.low, line.score.high) == pytest.approx((low, high), rel=1e-3)


def test_a_mean_over_tasks_stays_among_the_scores_too() -> None:
    rng = np.random.default_rng(3)
    ids = tuple(f"q{i}" for i in range(12))
    runs = tuple(
        Outcome(f"{name}-{task}-{seed}", {"method": name, "task": task}, seed,
                {task: Answers(task, "given", float(own.mean()), "%", ids, own)})
        for name, level in (("a", 99.0), ("b", 60.0)) for task in ("x", "y") for seed in (1, 2)
        for own in [np.clip(level - 9.0 * (seed == 2) + rng.normal(0, 1, 12), 0, 100)]
    )  # fmt: skip
    index = replace(_index_of_table(), axes={"method": ["a", "b"], "task": ["x", "y"]})
    found = analyse(StudyResults(index, runs, (), (), 0))
    assert [each.score.high for each in found.overall if each.factors["method"] == "a"] == [100.0]
    assert any(each.high is not None and each.high > 41 for block in found.blocks for each in block.differences)
    assert all(0 <= line.score.low < line.score.high <= 100 for line in found.lines if line.score)


# --- cautions ---


def tried(method: str, *values: str, chosen: int, task: str = "mmlu") -> list[Planned]:
    factors = {"method": method, "task": task}
    return [
        Planned(f"{method}-{task}-{at}", "", "trial", factors, 7, tried=value, chosen=at == chosen)
        for at, value in enumerate(values)
    ]


@pytest.mark.parametrize(
    ("trials", "said"),
    [
        (
            tried("a", "learning rate 0.001", "learning rate 0.01", "learning rate 0.003", chosen=1),
            ["a: the chosen learning rate 0.01 is the largest tried; a larger one may be better."],
        ),
        (tried("a", "learning rate 0.001", "learning rate 0.01", "learning rate 0.003", chosen=2), []),
        (
            tried(
                "a", *(f"rank {r}, learning_rate {rate}" for r in (8, 16, 64) for rate in ("1e-4", "2e-3")), chosen=2
            ),
            ["a: the chosen learning rate 1e-4 is the smallest tried; a smaller one may be better."],
        ),
        (
            tried("a", "rank 8", "rank 16", chosen=1) + tried("a", "rank 8", "rank 16", chosen=0, task="other"),
            [
                "a: the chosen rank 16 is the largest tried in 1 of 2 searches; a larger one may be better.",
                "a: the chosen rank 8 is the smallest tried in 1 of 2 searches; a smaller one may be better.",
            ],
        ),
        (tried("a", "dropout 0", "dropout 0.1", chosen=0), []),  # there is nothing below
        (tried("a", "optim AdamW", "optim SGD", chosen=0), []),
        (tried("a", "rank 8", "rank 16", "rank 32", chosen=-1), []),  # under way
        (tried("a", "rank 8", chosen=0), []),
    ],
)
def test_a_choice_at_the_edge_of_what_was_tried_is_said(trials: list[Planned], said: list[str]) -> None:
    index = replace(_index_of_table(), runs=trials)
    found = analyse(StudyResults(index, headlines((1, 2, 3)), (), (), 0))
    assert [note for note in found.notes if "the chosen" in note] == said


def test_a_search_of_real_files_is_read(make: Make) -> None:
    found = make(**ONE, trials=2)  # the second is chosen
    lora = [note for note in found.notes if note.startswith("lora: ")]
    assert lora == ["lora: the chosen learning rate 0.0002 is the largest tried; a larger one may be better."]
