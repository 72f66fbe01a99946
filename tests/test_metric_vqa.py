"""VQA accuracy: every recorded answer normalised as officially, and what the variants make of the same answers."""

import json

import pytest

from peft_mllm.errors import DataError
from peft_mllm.metrics import metric_named
from peft_mllm.metrics.text import vqa_words
from peft_mllm.record import Record, Turn


def record(answers, **meta):
    return Record("1", (Turn("user", "?"), Turn("assistant", answers[0])), meta={"answers": tuple(answers), **meta})


def accuracy(prediction, answers, variant="official"):
    return metric_named(f"vqa:{variant}").score([prediction], [record(answers)]).per_question[0]


def test_every_recorded_answer_is_normalised_as_officially(cases):
    table = json.loads((cases / "metrics/vqa_normalisation/normalisation_table.json").read_text())
    rows = table["rows"]
    assert len(rows) == 11544
    assert [raw for raw, expected, _ in rows if vqa_words.official(raw) != expected] == []
    assert [raw for raw, _, expected in rows if vqa_words.evalai(raw) != expected] == []


def test_the_maintainers_own_examples(cases):
    expected = json.loads((cases / "metrics/vqa_normalisation/expected.json").read_text())
    for raw, said in expected["mmf_unit_tests (tests/datasets/test_processors.py)"].items():
        assert vqa_words.evalai(raw) == said
    for name in ("GT-Vision-Lab issue #1 (maintainer)", "mmf issue #187"):
        answers = [str(answer) for answer in expected[name]["gts"]]
        for prediction, score in expected[name]["accuracy"].items():
            assert accuracy(prediction, answers) == pytest.approx(score, abs=1e-12)
    case = expected["lmms-eval PR #794"]
    assert accuracy(case["candidate"], case["gts"]) == case["GTVision_HEAD"]
    assert accuracy(case["candidate"], case["gts"], "official-2015") == case["GTVision_pre2021"]
    assert accuracy(case["candidate"], case["gts"], "m4c") == 1


@pytest.mark.parametrize(("matches", "score"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_nine_of_ten(matches, score):
    answers = ["cat"] * matches + [f"dog{n}" for n in range(10 - matches)]
    assert accuracy("cat", answers) == pytest.approx(score, abs=1e-12)
    assert accuracy("cat", answers, "n3") == pytest.approx(min(1, matches / 3), abs=1e-12)


def test_what_the_variants_change():
    agreed = ["yes"] * 10
    said = {
        variant: accuracy("Yes", agreed, variant) for variant in ("official", "official-2015", "m4c", "vizwiz", "n3")
    }
    assert said == {"official": 0, "official-2015": 1, "m4c": 1, "vizwiz": 1, "n3": 1}
    differing = ["The cat"] * 9 + ["dog"]
    said = {variant: accuracy("cat", differing, variant) for variant in said}
    assert said == {"official": 1, "official-2015": 0, "m4c": 1, "vizwiz": 0, "n3": 1}
    assert accuracy("dont", ["don't"] * 9 + ["do"], "vizwiz") == 0, "its table has curly apostrophes"
    assert accuracy("dont", ["don't"] * 9 + ["do"], "n3") == 1


def test_only_the_first_32_periods_go():
    assert vqa_words.official("." * 40) == "." * 8
    assert vqa_words.official("3.") == "3"
    assert vqa_words.official("3.5") == "3.5"


def test_by_type():
    records = [
        record(["yes"] * 10, answer_type="yes/no", question_type="is the"),
        record(["2"] * 10, answer_type="number", question_type="how many"),
        record(["red"] * 10, answer_type="other", question_type="is the"),
    ]
    assert metric_named("vqa").score(["yes", "3", "red"], records).values == {
        "accuracy": pytest.approx(200 / 3),
        "accuracy/yes/no": 100,
        "accuracy/number": 0,
        "accuracy/other": 100,
        "accuracy/how many": 0,
        "accuracy/is the": 100,
    }


def test_needs_a_list_of_answers():
    with pytest.raises(DataError, match="no list of answers"):
        metric_named("vqa").score(["a"], [Record("1", (Turn("user", "?"), Turn("assistant", "a")))])
