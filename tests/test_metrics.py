"""Scoring rules: what is read from a prediction, what counts as right, and which figures come of it."""

from pathlib import Path

import pytest

from peft_mllm.errors import DataError, UserError
from peft_mllm.metrics import METRICS, metric_named, no_metric
from peft_mllm.metrics.scienceqa import read_letter
from peft_mllm.record import Record, Turn
from peft_mllm.tasks import TASKS

SAMPLES = Path(__file__).parents[2] / "shared" / "cases" / "data"
needs_samples = pytest.mark.skipif(not SAMPLES.is_dir(), reason=f"the real samples are not at {SAMPLES}")


def record(answer, **meta):
    return Record(id="1", turns=(Turn("user", "?"), Turn("assistant", answer)), meta=meta)


def science(index, **meta):
    return record("ABCDE"[index], choices=("x", "y", "z"), answer_index=index, **meta)


@pytest.mark.parametrize("name", list(METRICS))
def test_every_metric_names_the_rule_of_each_variant_in_one_line(name):
    metric = METRICS[name]
    assert metric.source
    assert metric().variant == next(iter(metric.variants))
    for variant, said in metric.variants.items():
        assert metric(variant).rule == said.rule
        assert said.rule.startswith(f"{name}/{variant}: ")
        assert "\n" not in said.rule
        assert said.formula
    assert all(said.changes for said in list(metric.variants.values())[1:]), "a variant says what it changes"


def test_a_string_names_metric_and_variant():
    assert metric_named("vqa").variant == "official"
    assert metric_named("vqa:vizwiz").variant == "vizwiz"
    with pytest.raises(UserError, match=r"no metric 'vqq'. Did you mean 'vqa'\?"):
        metric_named("vqq")
    with pytest.raises(UserError, match=r"'vqa' has no variant 'vizwizz'. Did you mean 'vizwiz'\?"):
        metric_named("vqa:vizwizz")
    assert no_metric("vqa:") is not None


@pytest.mark.parametrize(
    ("prediction", "letter"),
    [
        ("B", "B"),
        (" B", None),
        ("B. ", "B"),
        ("B. cow", "B"),
        ("The answer is B.", "B"),
        ("The answer is B because", "B"),
        ("It swims. The answer is A.", "A"),
        ("b", None),
        ("B.", None),
        ("B) cow", None),
        ("The answer is B", None),
        ("The answer is A. The answer is B.", None),
        ("D", None),
        ("The answer is Z.", None),
        ("cow", None),
        ("", None),
    ],
)
def test_scienceqa_reads_as_llava_does(prediction, letter):
    assert read_letter(prediction, 3) == letter


def test_scienceqa_counts_the_unparsed_as_wrong():
    records = [science(0), science(1), science(2), science(0)]
    scores = METRICS["scienceqa"]().score(["A", "A", "no idea", "E"], records)
    assert scores.headline == 25
    assert scores.per_question == [1, 0, 0, 0]
    assert scores.unparsed == 2


def test_scienceqa_subsets():
    records = [
        science(0, subject="natural science", grade="grade6", has_image=True, hint="h"),
        science(0, subject="social science", grade="grade7", has_image=True, hint=""),
        science(0, subject="language science", grade="grade12", has_image=False, hint=""),
    ]
    values = METRICS["scienceqa"]().score(["A", "B", "A"], records).values
    assert values == {
        "accuracy": pytest.approx(200 / 3),
        "accuracy/NAT": 100,
        "accuracy/SOC": 0,
        "accuracy/LAN": 100,
        "accuracy/TXT": 100,
        "accuracy/IMG": 50,
        "accuracy/NO": 100,
        "accuracy/G1-6": 100,
        "accuracy/G7-12": 50,
    }


def test_iconqa_strict_and_normalised():
    records = [record("8,488"), record("half"), record("7"), record("o'clock")]
    predictions = [" 8,488", "Half", "seven", "o'clock"]
    assert metric_named("iconqa").score(predictions, records).headline == 25
    scores = metric_named("iconqa:normalised").score(predictions, records)
    assert scores.headline == 75
    assert scores.unparsed == 0


def test_iconqa_choice_that_is_none_of_them_is_unparsed():
    records = [record("6:00 P.M.", choices=("6:00 A.M.", "6:00 P.M."))] * 3
    scores = metric_named("iconqa:normalised").score(["6:00 p.m.", "6:00 A.M.", "B"], records)
    assert scores.per_question == [1, 0, 0]
    assert scores.parsed == ["6:00 P.M.", "6:00 A.M.", None]
    assert scores.unparsed == 1


def test_iconqa_by_grade_and_by_each_skill():
    records = [
        record("1", grade="prek", skills=("counting",)),
        record("2", grade="grade1", skills=("counting", "time")),
    ]
    values = METRICS["iconqa"]().score(["1", "3"], records).values
    assert values["accuracy/prek"] == 100
    assert values["accuracy/counting"] == 50
    assert values["accuracy/time"] == 0


@pytest.mark.parametrize("name", ["scienceqa", "iconqa"])
def test_partial_predictions_are_refused(name):
    with pytest.raises(ValueError):
        METRICS[name]().score(["A"], [science(0), science(1)])


@needs_samples
@pytest.mark.parametrize(
    ("name", "root"),
    [("scienceqa", "scienceqa"), ("iconqa_txt", "iconqa_examples"), ("iconqa_blank", "iconqa_examples")],
)
def test_the_right_answers_score_full_marks(name, root):
    task = TASKS[name](TASKS[name].Options(root=SAMPLES / root))
    records = task.records("test")
    scores = metric_named(task.metric).score([record.answer for record in records], records)
    assert set(scores.values.values()) == {100.0}
    assert scores.unparsed == 0


@pytest.mark.parametrize("name", sorted(set(METRICS) - {"amber", "mmhal", "pope"}))
def test_nothing_to_score_is_an_error(name):
    with pytest.raises(DataError, match="no records"):
        METRICS[name]().score([], [])


def test_scienceqa_official_guesses_the_same_every_time():
    records = [record("B", choices=("x", "y"), answer_index=1) for _ in range(1)]
    many = [Record(str(n), records[0].turns, meta=records[0].meta) for n in range(400)]
    scores = metric_named("scienceqa:official").score(["no idea"] * 400, many)
    assert scores.unparsed == 400
    assert 40 < scores.headline < 60
    assert scores.per_question == metric_named("scienceqa:official").score(["no idea"] * 400, many).per_question
    assert metric_named("scienceqa:official").score(["B"], records).unparsed == 1, "a letter alone is not read"
    assert metric_named("scienceqa:official").score(["The answer is B."], records).headline == 100


def test_scienceqa_stored_is_an_index():
    metric = metric_named("scienceqa:stored")
    assert metric.score(["1", "-1"], [science(1), science(1)]).headline == 50
    with pytest.raises(DataError, match="no index"):
        metric.score(["B"], [science(1)])


def test_gqa_official_and_llava():
    records = [record("yes", types={"structural": "verify"}), record("dog", types={"structural": "query"})]
    assert metric_named("gqa").score(["Yes.", "dog"], records).values == {
        "accuracy": 50, "accuracy/binary": 0, "accuracy/open": 100, "accuracy/query": 100, "accuracy/verify": 0,
    }  # fmt: skip
    assert metric_named("gqa:llava").score(["Yes.", "Dog"], records).headline == 100


def test_ocrvqa_exact_and_substring():
    records = [record("Jo Nesbo"), record("No")]
    said = [" jo nesbo\n", "The answer is no, it is a novel."]
    assert metric_named("ocrvqa").score(said, records).per_question == [1, 0]
    assert metric_named("ocrvqa:substring").score(said, records).per_question == [1, 1]
    assert metric_named("ocrvqa:substring").score(["note"], [record("no")]).headline == 0
