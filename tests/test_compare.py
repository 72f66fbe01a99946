"""The comparison claims what its figures carry, and no more."""

import csv
import io
import json

import pytest
from rich.console import Console

from peft_mllm.study.compare import compare
from peft_mllm.study.conclude import conclusion
from peft_mllm.study.render import csv_table, json_table, markdown_table, terminal_table
from peft_mllm.study.results import read_results
from peft_mllm.study.statistics import estimate_difference, estimate_mean
from peft_mllm.study.wording import GLUE, and_list, count, duration, figure
from study_samples import SEEN, TASK, write_run, write_study


@pytest.fixture
def build(tmp_path):
    """Compare runs, each given as name and options."""

    def _build(*runs, seen=SEEN):
        folders = [write_run(tmp_path, name, **options) for name, options in runs]
        return compare(read_results(folders), task=TASK, seen=seen)

    return _build


ZERO = ("zero-shot", {"parameters": 0, "accuracy": 30, "seen": 96})
LORA = ("lora", {"accuracy": 95, "seen": 90})
IA3 = ("ia3", {"accuracy": 60, "seen": 95, "parameters": 900})
ADAPTER = ("adapter", {"accuracy": 93, "seen": 94, "parameters": 5000})


def said(comparison):
    return conclusion(comparison).replace(GLUE, " ")


def test_wilson_keeps_its_width_at_the_ends():
    perfect = estimate_mean([1.0] * 50, value=100.0)
    assert perfect.high == pytest.approx(100)
    assert perfect.low == pytest.approx(92.87, abs=0.01)


def test_wilson_against_the_published_formula():
    # 81 of 263, Newcombe 1998, table I, method 3: 0.2553 to 0.3662
    estimate = estimate_mean([1.0] * 81 + [0.0] * 182, value=8100 / 263)
    assert (estimate.low, estimate.high) == pytest.approx((25.53, 36.62), abs=0.005)


def test_graded_scores_are_bootstrapped_in_their_unit():
    scores = [0.0, 0.3, 0.6, 1.0] * 50
    estimate = estimate_mean(scores, value=47.5)
    standard_error = 100 * 0.3699 / 200**0.5
    assert estimate.low == pytest.approx(47.5 - 1.96 * standard_error, abs=0.6)
    assert estimate.high == pytest.approx(47.5 + 1.96 * standard_error, abs=0.6)


def test_difference_is_paired():
    """Two runs that share the hard questions are told apart by far less than their own intervals."""
    first, second = [100.0] * 60 + [0.0] * 40, [100.0] * 50 + [0.0] * 50
    paired = estimate_difference([(first, second)], value=10)
    assert 4 <= paired.low <= 6
    assert 15 <= paired.high <= 17


def test_without_questions_there_is_no_interval():
    assert estimate_mean([], value=90).low is None
    assert estimate_difference([([], [])], value=10).low is None


def test_rows_and_changes(build):
    zero, lora = build(ZERO, LORA).rows
    assert lora.score.value == 95
    assert lora.gain.value == 65
    assert lora.gain.low < 65 < lora.gain.high
    assert lora.seen == pytest.approx(90.5)
    assert lora.forgotten.value == pytest.approx(6)
    assert lora.share == pytest.approx(100 * 9000 / 1_400_000)
    assert (zero.gain, zero.forgotten) == (None, None)


def test_clear_best_is_marked_and_said(build):
    comparison = build(ZERO, LORA, IA3)
    assert [row.best for row in comparison.rows] == [False, True, False]
    assert said(comparison).startswith(f"lora is best: 95.0 % on {TASK} (91.0 to 97.3), 65.0 points above zero-shot.")
    assert "ia3 forgot least (1.0 points)" in said(comparison)
    assert "**95.0" in markdown_table(comparison)


def test_overlap_is_no_best(build):
    comparison = build(ZERO, LORA, ADAPTER, IA3)
    assert not any(row.best for row in comparison.rows)
    assert said(comparison).startswith(
        f"On {TASK}, lora (95.0 %) and adapter (93.0 %) cannot be told apart by 200 questions. "
        "Of these, adapter trains the fewest parameters (5.0 k)"
    )
    assert "**" not in markdown_table(comparison)


def test_no_gain_is_said(build):
    comparison = build(ZERO, ("lora", {"accuracy": 30}), ("ia3", {"accuracy": 31}))
    assert "None of them can be told apart from zero-shot either." in said(comparison)


def test_one_run_is_best_of_nothing(build):
    comparison = build(ZERO, LORA)
    assert not comparison.rows[1].best
    assert said(comparison).startswith(f"lora reaches 95.0 % on {TASK}")


def test_without_zero_shot(build):
    comparison = build(LORA, IA3)
    assert any("no zero-shot run" in note for note in comparison.notes)
    assert "gain" not in markdown_table(comparison)
    assert "zero-shot" not in said(comparison)


def test_without_a_score(build):
    comparison = compare([], task=TASK)
    assert said(comparison) == f"No trained run has a score on {TASK}."
    assert csv_table(comparison) == "\n"


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"model": {"source": "other", "parameters": 9}}, "do not share one base model"),
        ({"data": {"train": {"task": TASK, "fingerprint": "other"}}}, "not trained on the same data"),
        ({"training": {"epochs": 1.0}}, "same number of epochs"),
        ({"n": 100}, "Not all runs answered the same questions"),
        ({"scores": {}}, f"Without a score on {TASK}: other."),
        ({"seed": 21}, "how far it moves with the seed"),
    ],
)
def test_what_makes_a_comparison_unfair_is_said(build, changes, note):
    comparison = build(ZERO, LORA, ("other", {**changes}))
    assert any(note in sentence for sentence in comparison.notes)


def test_other_questions_have_no_paired_interval(build):
    comparison = build(ZERO, ("lora", {"n": 100, "accuracy": 90}))
    assert comparison.rows[1].gain.value == 60
    assert comparison.rows[1].gain.low is None


def test_markdown_is_a_table_and_escapes(build):
    lines = markdown_table(build(ZERO, ("a|b <i>*x*", {"method": "lora"}))).splitlines()
    assert len(lines) == 4
    assert "a\\|b &lt;i>\\*x\\*" in lines[3]


def test_csv_guards_formulas_and_keeps_digits(build):
    comparison = build(ZERO, ("=HYPERLINK(1)", {}), ("+1", {}), ("-1", {}), ("@x", {}))
    rows = list(csv.DictReader(io.StringIO(csv_table(comparison))))
    assert [row["run"] for row in rows] == ["zero-shot", "'=HYPERLINK(1)", "'+1", "'-1", "'@x"]
    assert float(rows[1]["score_low"]) == comparison.rows[1].score.low
    assert rows[0]["gain"] == ""


def test_json_has_everything(build):
    content = json.loads(json_table(build(ZERO, LORA)))
    assert content["rows"][1]["score"]["value"] == 95
    assert content["notes"]


def test_terminal_table_fits_80_columns(tmp_path):
    comparison = compare(read_results(write_study(tmp_path)), task=TASK, seen=SEEN)
    console = Console(width=80, file=io.StringIO(), color_system=None)
    console.print(terminal_table(comparison))
    text = console.file.getvalue()
    assert "…" not in text
    assert "91.0 to 97.3" in text


def test_markup_in_a_name_is_only_text(build):
    console = Console(width=120, file=io.StringIO(), color_system=None)
    console.print(terminal_table(build(("[red]x[/red]", {}))))
    assert "[red]x[/red]" in console.file.getvalue()


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (figure(-0.04), "0.0"),
        (figure(-2.0), "\N{MINUS SIGN}2.0"),
        (figure(2.0, signed=True), "+2.0"),
        (figure(None), "\N{EN DASH}"),
        (count(614_400), f"614{GLUE}k"),
        (count(20_979_712), f"21.0{GLUE}M"),
        (count(12), "12"),
        (duration(3.21), f"3.2{GLUE}s"),
        (duration(185), f"3{GLUE}min{GLUE}5{GLUE}s"),
        (duration(7800), f"2{GLUE}h{GLUE}10{GLUE}min"),
        (and_list(["a", "b", "c"]), "a, b and c"),
        (and_list(["a", "b", "c", "d", "e"]), "a, b, c and 2 more"),
        (and_list([]), ""),
    ],
)
def test_wording(made, text):
    assert made == text
