"""Somebody's table of results: what is read from it, what is refused, and that it means what runs of our own mean."""

from __future__ import annotations

import csv
import io
import random
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binom, t, ttest_rel

from peft_mllm.errors import DataError
from peft_mllm.study.analyse import analyse
from peft_mllm.study.imported import read_table
from peft_mllm.study.inference.differences import differences_by_seed
from peft_mllm.study.outcomes import FULL, NOT_VARIED, ZERO_SHOT
from peft_mllm.study.reading import read_study
from runs import command
from synthetic_study import write_study

HEAD = ["method", "seed", "item", "score"]


def table(tmp_path: Path, head: Sequence[str], rows: Iterable[Sequence[object]], name: str = "results.csv") -> Path:
    file = tmp_path / name
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t" if name.endswith("tsv") else ",")
    writer.writerow(head)
    writer.writerows(rows)
    file.write_text(text.getvalue(), encoding="utf-8")
    return file


def grid(*columns: Sequence[object], items: int = 20, seeds: Sequence[int] = (1, 2)) -> list[list[object]]:
    """A line for each method, further label, seed and item; right at random, more often for later labels."""
    rng = random.Random(0)
    labels: list[list[object]] = [[]]
    for column in columns:
        labels = [[*each, label] for each in labels for label in column]
    return [
        [*each, seed, f"q{item}", int(rng.random() < 0.4 + 0.5 * place / len(labels))]
        for place, each in enumerate(labels)
        for seed in seeds
        for item in range(items)
    ]


# --- what is read ---


def test_lines_become_runs(tmp_path):
    rows = [["lora", 1, "a", 1], ["lora", 1, "b", 0], ["lora", 2, "a", 1], ["lora", 2, "b", 1], ["none", "", "a", 0]]
    study = read_table(table(tmp_path, HEAD, [*rows, ["none", "", "b", 1]], "charts.csv"))
    assert [(each.run, each.factors, each.seed) for each in study.outcomes] == [
        ("charts.csv:2", {"method": "lora", "task": "charts"}, 1),
        ("charts.csv:4", {"method": "lora", "task": "charts"}, 2),
        ("charts.csv:6", {"method": ZERO_SHOT, "task": "charts"}, None),
    ]
    answers = study.outcomes[0].scores["charts"]
    assert (answers.ids, answers.scores.tolist(), answers.value, answers.unit) == (("a", "b"), [100, 0], 50, "%")
    assert study.index.axes["method"] == (ZERO_SHOT, "lora")


@pytest.mark.parametrize("write", ["upper", "semicolon", "tsv", "bom", "blank lines", "spaces", "quotes"])
def test_a_table_is_read_however_it_was_written(tmp_path, write):
    plain = table(tmp_path, ["task", *HEAD], [["t", *row] for row in grid(["lora", "ia3"])])
    text = plain.read_text()
    name = "other.tsv" if write == "tsv" else "other.csv"
    changed = {
        "upper": text.replace("method,seed,item,score", "Method,SEED,Item,Score"),
        "semicolon": text.replace(",", ";"),
        "tsv": text.replace(",", "\t"),
        "bom": "\N{ZERO WIDTH NO-BREAK SPACE}" + text,
        "blank lines": text.replace("\n", "\n\n"),
        "spaces": text.replace(",", ", "),
        "quotes": text.replace("lora", '"lora"'),
    }[write]
    (tmp_path / name).write_text(changed, encoding="utf-8")
    one, two = read_table(plain), read_table(tmp_path / name)
    assert [(each.factors, each.seed) for each in one.outcomes] == [(each.factors, each.seed) for each in two.outcomes]
    for first, second in zip(one.outcomes, two.outcomes, strict=True):
        assert first.scores["t"].scores.tolist() == second.scores["t"].scores.tolist()


def test_a_line_is_named_where_it_stands_though_cells_take_several(tmp_path):
    rows = [["a\nb", *row] for row in grid(["lora", "ia3"], items=2, seeds=[1])]
    assert [each.run for each in read_table(table(tmp_path, ["note", *HEAD], rows)).outcomes] == [
        "results.csv:3",
        "results.csv:7",
    ]


@pytest.mark.parametrize(
    ("scores", "factor", "unit"),
    [([0, 1], 100, "%"), ([0.5, 0.25], 100, "%"), ([0, 100], 1, "%"), ([0, 5], 1, ""), ([-3.5, 120], 1, "")],
    ids=str,
)
def test_the_unit_is_decided_and_said(tmp_path, scores, factor, unit):
    study = read_table(table(tmp_path, HEAD, [["lora", 1, item, score] for item, score in enumerate(scores)]))
    answers = study.outcomes[0].scores["results"]
    assert answers.unit == unit
    assert answers.scores.tolist() == [factor * score for score in scores]
    assert any(f"between {min(scores):g} and {max(scores):g}" in note for note in study.notes)


def test_figures_of_a_run_are_its_costs(tmp_path):
    rows = [["lora", 1, "a", 1, 100, 2.5, ""], ["lora", 1, "b", 1, 100, 2.5, ""], ["ia3", 1, "a", 1, "", 2, 7]]
    file = table(tmp_path, [*HEAD, "trainable", "seconds", "disk"], [*rows, ["ia3", 1, "b", 0, "", 2, 7]])
    assert [each.figures for each in read_table(file).outcomes] == [
        {"trainable": 100, "seconds": 2.5},
        {"seconds": 2, "disk": 7},
    ]


# --- factors ---


def test_what_tells_runs_apart_is_a_factor(tmp_path):
    head = ["method", "connector", "rank", "seed", "item", "score"]
    study = read_table(table(tmp_path, head, grid(["lora", "ia3"], ["frozen", "tuned"], [8, 16])))
    assert study.index.axes["connector"] == ("frozen", "tuned")
    assert study.index.axes["rank"] == ("8", "16")
    assert len(study.outcomes) == 16


def test_a_factor_of_one_method_alone_is_one(tmp_path):
    rows = [[method, size, *rest] for method, size, *rest in grid(["lora", "ia3"], ["small", "large"])]
    rows = [row for row in rows if row[:2] != ["ia3", "large"]]
    rows = [[row[0], "" if row[0] == "ia3" else row[1], *row[2:]] for row in rows]
    study = read_table(table(tmp_path, ["method", "size", "seed", "item", "score"], rows))
    assert {each.factors["size"] for each in study.outcomes} == {"small", "large", NOT_VARIED}


def test_what_is_the_same_for_all_runs_is_kept_and_what_the_method_says_is_none(tmp_path):
    rows = [["llava", f"way of {row[0]}", *row] for row in grid(["lora", "ia3"])]
    study = read_table(table(tmp_path, ["model", "kind", *HEAD], rows))
    assert study.index.axes["model"] == ("llava",)
    assert "kind" not in study.index.axes
    assert any("kind" in note for note in study.notes)


def test_what_differs_within_a_run_is_no_factor(tmp_path):
    rows = [[*row, f"What is {row[2]}?", random.Random(i).choice("abc")] for i, row in enumerate(grid(["lora", "ia3"]))]
    study = read_table(table(tmp_path, [*HEAD, "question", "prediction"], rows))
    assert set(study.index.axes) == {"method", "task"}
    assert any("question and prediction" in note for note in study.notes)


def test_what_differs_by_seed_does_not_part_seeds(tmp_path):
    rows = [[*row, "monday" if row[1] == 1 else "tuesday"] for row in grid(["lora", "ia3"])]
    assert "day" not in read_table(table(tmp_path, [*HEAD, "day"], rows)).index.axes


def test_the_base_has_no_seed_and_no_level(tmp_path):
    rows = [row for row in grid(["zero-shot", "lora"], ["frozen", "tuned"]) if row[0] == "lora" or row[1] == "frozen"]
    rows = [row for row in rows if row[0] == "lora" or row[2] == 1]
    study = read_table(table(tmp_path, ["method", "connector", "seed", "item", "score"], rows))
    assert (study.outcomes[0].factors["connector"], study.outcomes[0].seed) == (NOT_VARIED, None)
    assert all(line.gain is not None for line in analyse(study).lines if line.factors["method"] == "lora")


def test_full_fine_tuning_is_known_by_its_usual_names(tmp_path):
    assert FULL in read_table(table(tmp_path, HEAD, grid(["full", "lora"]))).index.axes["method"]


# --- what is refused ---

GOOD = [["lora", 1, "a", 1], ["lora", 1, "b", 0], ["ia3", 1, "a", 1], ["ia3", 1, "b", 0]]


@pytest.mark.parametrize(
    ("head", "rows", "said"),
    [
        (["methd", "seed", "item", "score"], GOOD, ["results.csv:1", "'method'", "methd"]),
        (HEAD, [*GOOD, ["ia3", 1, "c", "yes"]], ["results.csv:6", "'yes'", "'score'"]),
        (HEAD, [*GOOD, ["ia3", 1, "c", "0,5"]], ["results.csv:6", "point"]),
        (HEAD, [*GOOD, ["ia3", 1, "c", "nan"]], ["results.csv:6", "'nan'", "neither right nor wrong"]),
        (HEAD, [*GOOD, ["ia3", 1, "c", ""]], ["results.csv:6", "''"]),
        (HEAD, [*GOOD, ["ia3", 1, "c", "inf"]], ["results.csv:6", "'inf'"]),
        (HEAD, [*GOOD, ["ia3", 1, "a", 0]], ["results.csv:6", "item 'a'", "line 4", "tells the runs apart"]),
        (HEAD, [*GOOD, ["ia3", "one", "c", 0]], ["results.csv:6", "'one'", "whole number"]),
        (HEAD, [*GOOD, ["ia3", "", "c", 0]], ["results.csv:6", "whole number"]),
        (HEAD, [*GOOD, ["", 1, "c", 0]], ["results.csv:6", "method"]),
        (["methd", *HEAD[1:]], GOOD, ["results.csv:1", "Column 'methd' looks like 'method': rename it."]),
        (HEAD, [*GOOD, ["ia3", 1, "c"]], ["results.csv:6", "3 cells", "4 columns"]),
        (HEAD, [*GOOD[:2], ["ia3", 1, "x", 1]], ["no item in common", "results.csv:4"]),
        (["method", "seed", "score"], [["lora", 1, 1], ["lora", 1, 0]], ["results.csv:3", "line 2", "'item'"]),
        ([*HEAD, "seconds"], [[*GOOD[0], 5], [*GOOD[1], 6]], ["results.csv:3", "'seconds'", "results.csv:2"]),
        ([*HEAD, "seconds"], [[*GOOD[0], "5s"]], ["results.csv:2", "'5s'"]),
        ([*HEAD, "Score"], [[*GOOD[0], 5]], ["two columns", "'score'"]),
        (HEAD, [], ["no lines"]),
        ([], [], ["empty"]),
    ],
)
def test_what_cannot_be_read_is_said_with_its_place(tmp_path, head, rows, said):
    with pytest.raises(DataError) as error:
        read_table(table(tmp_path, head, rows))
    for words in said:
        assert words in str(error.value)


def test_a_line_said_twice_is_not_made_two_runs_by_another_column(tmp_path):
    rows = [[*row, "yes" if i % 3 else "no"] for i, row in enumerate(grid(["lora", "ia3"]))]
    with pytest.raises(DataError, match="the same run is there already"):
        read_table(table(tmp_path, [*HEAD, "prediction"], [*rows, [*rows[0][:4], "other"]]))


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "results.csv").write_bytes("method,seed,item,score\nlöra,1,a,1\n".encode("latin-1"))
    with pytest.raises(DataError, match="UTF-8"):
        read_table(tmp_path / "results.csv")
    with pytest.raises(DataError, match="cannot be read"):
        read_table(tmp_path / "nothing.csv")


def test_items_that_not_all_runs_have_are_left_out_and_counted(tmp_path):
    rows = grid(["lora", "ia3"], items=5)
    study = read_table(table(tmp_path, HEAD, rows[:-1]))
    assert all(each.scores["results"].ids == ("q0", "q1", "q2", "q3") for each in study.outcomes)
    assert any("1 of 5 items are left out" in note and "results.csv:17" in note for note in study.notes)


# --- what it means ---


def test_a_table_means_what_the_same_runs_mean(tmp_path):
    study = read_study(write_study(tmp_path / "study", seen=(), questions=40, effects={"lora": 0.8, "tuned": 0.3}))
    rows = [
        [*(outcome.factors.get(axis, "") for axis in ("method", "task", "connector")), outcome.seed, item, score]
        for outcome in study.outcomes
        for answers in outcome.scores.values()
        for item, score in zip(answers.ids, answers.scores, strict=True)
    ]
    rows = [["" if cell in (None, NOT_VARIED) else cell for cell in row] for row in rows]
    random.Random(0).shuffle(rows)
    known = analyse(study)
    found = analyse(read_table(table(tmp_path, ["method", "task", "connector", "seed", "item", "score"], rows)))
    lines = {tuple(sorted(line.factors.items())): line for line in found.lines}
    assert len(lines) == len(known.lines)
    for line in known.lines:
        own = lines[tuple(sorted(line.factors.items()))]
        assert own.score.value == pytest.approx(line.score.value)
        assert own.sd == pytest.approx(line.sd) if line.sd is not None else own.sd is None
        if line.gain is not None:
            assert (own.gain.low, own.gain.high) == pytest.approx((line.gain.low, line.gain.high))
    assert sorted(d.p_adjusted for b in found.blocks for d in b.differences) == pytest.approx(
        sorted(d.p_adjusted for b in known.blocks for d in b.differences)
    )


def test_scores_of_whole_runs_have_intervals_over_seeds(tmp_path):
    lora, ia3 = [80.0, 83.0, 81.0], [70.0, 74.0, 71.5]
    rows = [[name, seed, score] for name, own in (("lora", lora), ("ia3", ia3)) for seed, score in enumerate(own)]
    analysis = analyse(read_table(table(tmp_path, ["method", "seed", "score"], [*rows, ["zero-shot", "", 50]])))
    line = next(line for line in analysis.lines if line.factors["method"] == "lora")
    half = t.ppf(0.975, 2) * np.std(lora, ddof=1) / np.sqrt(3)
    assert (line.score.low, line.score.high) == pytest.approx((np.mean(lora) - half, np.mean(lora) + half))
    assert (line.gain.low, line.gain.high) == pytest.approx((line.score.low - 50, line.score.high - 50))
    (block,) = analysis.blocks
    assert block.differences[0].p == pytest.approx(ttest_rel(lora, ia3).pvalue)
    assert "3\N{NO-BREAK SPACE}seeds)" in block.sentence
    assert any("nothing of other questions" in note for note in analysis.notes)
    assert not any("and other seeds" in note for note in analysis.notes)


def test_one_score_of_one_seed_tells_nothing(tmp_path):
    analysis = analyse(read_table(table(tmp_path, ["method", "seed", "score"], [["lora", 1, 90], ["ia3", 1, 20]])))
    assert [line.best for line in analysis.lines] == [False, False]
    assert analysis.lines[0].score.low is None
    assert any("Nothing here tells two methods apart" in note for note in analysis.notes)


@pytest.mark.parametrize(("seeds", "methods"), [(2, 5), (3, 5), (5, 4)])
def test_equal_methods_are_seldom_told_apart_by_seeds_alone(seeds, methods):
    studies, rng = 1000, np.random.default_rng(seeds)
    wrong = sum(
        any(
            each.told_apart
            for each in differences_by_seed({str(m): 70 + rng.normal(0, 2, seeds) for m in range(methods)})
        )
        for _ in range(studies)
    )
    assert wrong <= binom.ppf(0.999, studies, 0.05)
    assert wrong > 0


def test_a_hundred_thousand_lines_take_a_second_or_two(tmp_path):
    file = table(tmp_path, HEAD, grid(["lora", "ia3", "adapter", "prefix"], items=5000, seeds=range(5)))
    started = time.process_time()
    study = read_table(file)
    assert time.process_time() - started < 5
    assert len(study.outcomes) == 20


def test_a_report_is_made_of_a_table(tmp_path):
    file = table(tmp_path, HEAD, [*grid(["zero-shot"], seeds=[0]), *grid(["lora", "<b>ia3</b>"], seeds=[1, 2, 3])])
    said = command("study", "report", str(file))
    assert said.code == 0, said.err
    page = (tmp_path / "results-report" / "index.html").read_text(encoding="utf-8")
    assert "results.csv" in page
    assert "<b>ia3</b>" not in page
    said = command("study", "report", str(tmp_path / "none.csv"))
    assert (said.code, "cannot be read" in said.err) == (65, True)
