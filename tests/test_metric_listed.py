"""Lists of named things: what is right, what is missed, what is made up; and what a study takes of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from peft_mllm.errors import DataError
from peft_mllm.metrics import METRICS, metric_named
from peft_mllm.metrics.amber import AMBER
from peft_mllm.metrics.listed import Listed, names_of
from peft_mllm.record import Record, Turn
from peft_mllm.study.hallucination import FIGURES, hallucination_of, hallucinations
from peft_mllm.study.results import Method, Model, Result, Score
from peft_mllm.tasks import TASKS
from peft_mllm.tasks.scenes import MEASURES, SEEN, UNSEEN, ScenesOptions
from runs import command


def record(answer, **meta):
    return Record("1", (Turn("user", "List the shapes."), Turn("assistant", answer)), meta=meta)


def scored(said, answer, **meta):
    return Listed().score([said], [record(answer, **meta)])


# --- the rule ---


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("Red circle, blue  cross.", ["red circle", "blue cross"]),
        (" red circle ,, \n blue cross , ", ["red circle", "blue cross"]),
        ("nothing", []),
        ("None.", []),
        ("", []),
    ],
)
def test_names_are_read_forgivingly(text, names):
    assert names_of(text) == names


@pytest.mark.parametrize(
    ("said", "there", "precision", "recall", "f1", "rate", "made_up"),
    [
        ("a, b", "b, a", 100, 100, 100, 0, 0),
        ("a, x", "a, b", 50, 50, 50, 100, 50),
        ("a", "a, b", 100, 50, 200 / 3, 0, 0),
        ("a, x, y", "a", 100 / 3, 100, 50, 100, 200 / 3),
        ("a, a", "a", 50, 100, 200 / 3, 0, 0),  # said twice, and it is there
        ("a", "a, a", 100, 50, 200 / 3, 0, 0),
        ("nothing", "nothing", 100, 100, 100, 0, 0),
        ("nothing", "a", 0, 0, 0, 0, 0),
        ("a", "nothing", 0, 0, 0, 100, 100),
        ("", "nothing", 0, 0, 0, 0, 0),
    ],
)
def test_figures_of_one_answer(said, there, precision, recall, f1, rate, made_up):
    scores = scored(said, there)
    wanted = {"f1": f1, "precision": precision, "recall": recall, "hallucination_rate": rate, "hallucinated": made_up}
    assert scores.values == pytest.approx(wanted)
    assert next(iter(scores.values)) == "f1", "the headline, of which more is better"
    assert 100 * scores.per_question[0] == pytest.approx(scores.headline)


def test_figures_of_many_are_means_over_answers_and_a_share_of_all_names():
    answers = ["a, b", "x", "a, b, c, y"]
    scores = Listed().score(answers, [record("a, b"), record("a"), record("a, b, c")])
    assert scores.values["f1"] == pytest.approx(100 * (1 + 0 + 6 / 7) / 3)
    assert scores.values["hallucination_rate"] == pytest.approx(200 / 3)
    assert scores.values["hallucinated"] == pytest.approx(200 / 7)  # 2 of 7 names
    assert [each["hallucinated"] for each in scores.details] == [[], ["x"], ["y"]]
    assert sum(scores.per_question) / 3 * 100 == pytest.approx(scores.headline)


def test_what_is_no_thing_is_wrong_and_not_made_up():
    things = frozenset({"red circle", "blue cross"})
    scores = scored("yes, red circle", "red circle", things=things)
    assert (scores.values["precision"], scores.values["hallucination_rate"]) == (50, 0)
    assert (scores.parsed, scores.details[0]["named"]) == (["red circle"], ["red circle"])
    scores = scored("yes", "red circle", things=things)
    assert (scores.parsed, scores.headline, scores.values["hallucination_rate"]) == ([None], 0, 0)
    assert scored("blue cross", "red circle", things=things).values["hallucination_rate"] == 100
    assert scored("", "red circle").unparsed == 1
    assert scored("nothing", "nothing").parsed == ["nothing"]


def test_it_needs_something_to_score():
    with pytest.raises(DataError):
        Listed().score([], [])


def test_it_scores_files(tmp_path):
    (tmp_path / "said.json").write_text(json.dumps([{"id": "1", "answer": "a, x"}]))
    (tmp_path / "there.json").write_text(json.dumps([{"id": "1", "answer": "a, b"}]))
    files = ["--predictions", tmp_path / "said.json", "--references", tmp_path / "there.json"]
    said = command("score", "listed", *files, "--json")
    assert json.loads(said.out)["scores"]["hallucination_rate"] == 100


# --- the task ---


def test_the_task_asks_the_base_s_own_question_on_other_scenes():
    options = ScenesOptions(size={"test": 60})
    mine, captions = (TASKS[name](options).records("test") for name in ("scenes_describe", "scenes_caption"))
    assert {r.question[-1].text for r in mine} == {r.question[-1].text for r in captions}
    assert [r.images[0].key for r in mine] != [r.images[0].key for r in captions]
    for each in mine:
        assert each.answer == ", ".join(shape.name for shape in each.images[0].scene.shapes)
        assert set(names_of(each.answer)) <= each.meta["things"]
    scores = metric_named(TASKS["scenes_describe"].metric).score([r.answer for r in mine], mine[:])
    assert (scores.headline, scores.values["hallucination_rate"]) == (100, 0)


def test_it_is_no_further_kind_of_question():
    generated = {name for name in TASKS if name.startswith("scenes_")}
    assert generated == {*SEEN, *UNSEEN, *MEASURES}
    assert not set(MEASURES) & {*SEEN, *UNSEEN}
    assert TASKS["scenes_describe"].seen


# --- what a study takes ---


def run_with(**scores: Score) -> Result:
    return Result(schema=1, name="x", method=Method("lora"), model=Model("embedded"), scores=scores)


def score(metric, **values):
    return Score(split="test", metric=metric, n=2, values=values)


def test_every_figure_is_one_that_its_metric_gives():
    given = {
        "chair": METRICS["chair"]().score(["a dog"], [record("a dog", objects=["cat"])]),
        "listed": scored("a, x", "a"),
        "pope": METRICS["pope"]().score(["Yes", "Yes"], [record("yes"), record("no")]),
        "amber": AMBER().score(["Yes", "No"], [record("no", kind="relation"), record("no", kind="relation")]),
        "mmhal": metric_named("mmhal:stored").score(["Rating: 1", "Rating: 6"], [record("x"), record("x")]),
    }
    wanted = {"chair": 100, "listed": 100, "pope": 50, "amber": 50, "mmhal": 50}
    assert FIGURES.keys() == given.keys()
    for metric, scores in given.items():
        assert hallucination_of(run_with(t=score(metric, **scores.values))) == wanted[metric], metric


def test_a_run_says_it_of_each_task_that_measures_it():
    run = run_with(
        a=score("exact", accuracy=50.0),
        b=score("pope:strict", accuracy=0.9, precision=0.8, yes_ratio=0.5),
        c=score("listed", f1=90.0, hallucination_rate=7.0),
        d=score("listed", f1=90.0),
    )
    assert hallucinations(run) == {"b": pytest.approx(20), "c": 7}
    assert hallucination_of(run) == pytest.approx(20)
    assert (hallucination_of(run, "c"), hallucination_of(run, "a"), hallucination_of(run, "z")) == (7, None, None)
    assert hallucination_of(run_with()) is None
    silent = score("pope", accuracy=0.5, precision=0.0, yes_ratio=0.0)
    assert hallucination_of(run_with(t=silent)) is None  # who never says yes affirms nothing


def test_the_page_names_it():
    page = Path(__file__).resolve().parents[1] / "docs" / "metrics.md"
    assert "## listed" in page.read_text()
