"""Two runs, question by question: the counts, the test, the page; and what cannot be compared is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from scipy.stats import binom

from peft_mllm.errors import DataError
from peft_mllm.files import file_digest, sealed_json, write_json, write_lines
from peft_mllm.study.results import Score
from peft_mllm.versus import compare_runs
from peft_mllm.versus.page import render
from peft_mllm.versus.pairs import _difference, mcnemar
from runs import command, lines, read, write_spec
from runs import tiny as tiny_spec

CHROMIUM = shutil.which("chromium")


def line(id: str, score: float, **more) -> dict:
    return {
        "id": id, "question": f"What is {id}?", "prediction": "x" if score else "y", "answer": "x", "score": score,
        "parsed": "x", "question_sha256": f"sha of {id}", "images": [], **more,
    }  # fmt: skip


def side(directory: Path, scores: dict[str, float], *, task: str = "mine", rule: str = "r", **more) -> Path:
    """What `evaluate --output` would have written."""
    file = directory / "predictions" / f"{task}.jsonl"
    file.parent.mkdir(parents=True)
    write_lines(file, [line(id, score, **more) for id, score in scores.items()])
    mean = 100 * sum(scores.values()) / len(scores)
    score = {
        "split": "test", "metric": "exact", "rule": rule, "n": len(scores), "values": {"accuracy": mean},
        "predictions": f"predictions/{task}.jsonl", "predictions_sha256": file_digest(file),
    }  # fmt: skip
    content = {"target": directory.name, "tasks": [], "model": {"source": "base"}, "scores": {task: score}}
    write_json(directory / "scores.json", content)
    return directory


def scores(only_a: int, only_b: int, both: int, neither: int) -> tuple[dict[str, float], dict[str, float]]:
    kinds = [(1.0, 0.0)] * only_a + [(0.0, 1.0)] * only_b + [(1.0, 1.0)] * both + [(0.0, 0.0)] * neither
    return {f"q{i}": a for i, (a, _) in enumerate(kinds)}, {f"q{i}": b for i, (_, b) in enumerate(kinds)}


@pytest.fixture
def two(tmp_path):
    a, b = scores(3, 12, 20, 5)
    return side(tmp_path / "a", a), side(tmp_path / "b", b)


def test_the_questions_are_counted(two):
    (contest,) = compare_runs(*two).contests
    assert (len(contest.only_a), len(contest.only_b), contest.both, contest.neither) == (3, 12, 20, 5)
    assert [pair.id for pair in contest.only_a] == ["q0", "q1", "q2"]
    assert contest.difference.value == pytest.approx(100 * (32 - 23) / 40)
    assert contest.difference.low < contest.difference.value < contest.difference.high
    assert contest.p == pytest.approx(2 * binom.cdf(3, 15, 0.5))
    assert contest.told_apart


def test_turned_round_it_is_the_same_contest(two):
    (one,), (other,) = compare_runs(*two).contests, compare_runs(*reversed(two)).contests
    assert other.p == one.p
    assert other.difference.value == -one.difference.value
    assert other.difference.low == pytest.approx(-one.difference.high, abs=3)


@pytest.mark.parametrize(
    ("a", "b", "p"), [(0, 0, 1.0), (1, 1, 1.0), (0, 1, 1.0), (0, 5, 0.0625), (0, 6, 0.03125), (10, 25, 0.01669)]
)
def test_mcnemar(a, b, p):
    """By hand: 2 * (1/2)**n for none against n; the last by summing the binomial."""
    assert mcnemar(a, b) == mcnemar(b, a) == pytest.approx(p, rel=1e-3)


def test_graded_scores_are_a_sign_test(tmp_path):
    a = side(tmp_path / "a", {"1": 0.3, "2": 0.6, "3": 1.0, "4": 0.3})
    b = side(tmp_path / "b", {"1": 0.6, "2": 1.0, "3": 1.0, "4": 0.3})
    (contest,) = compare_runs(a, b).contests
    assert (len(contest.only_a), len(contest.only_b), contest.both, contest.neither) == (0, 2, 1, 1)
    assert contest.p == 0.5
    assert not contest.told_apart


def test_the_interval_is_the_headlines_or_none(two):
    (contest,) = compare_runs(*two).contests
    unit = Score(split="test", metric="m", n=40, values={"f1": 23 / 40})
    other = Score(split="test", metric="m", n=40, values={"f1": 32 / 40})
    in_ones = _difference(unit, other, contest.pairs)
    assert in_ones.low == pytest.approx(contest.difference.low / 100)
    no_mean = _difference(Score("test", "m", 40, {"f1": 0.1}), other, contest.pairs)
    assert (no_mean.low, no_mean.high, round(no_mean.value, 9)) == (None, None, 0.7)


def test_a_side_without_a_right_answer_has_the_others_unit(tmp_path):
    a, b = side(tmp_path / "a", {str(i): 0.0 for i in range(9)}), side(tmp_path / "b", {str(i): 1.0 for i in range(9)})
    (contest,) = compare_runs(a, b).contests
    assert (contest.difference.low, contest.difference.high) == (100, 100)


REFUSED = {
    "other ids": ({"q0": 1.0, "new": 1.0}, {}, ["not asked the same questions", "new", "q1"]),
    "fewer": ({"q0": 1.0}, {}, ["not asked the same questions", "1 only in", "q1"]),
    "another reference": ({"q0": 1.0, "q1": 1.0}, {"answer": "z"}, ["the reference of 2 questions differs", "q0"]),
    "another question": ({"q0": 1.0, "q1": 1.0}, {"question": "z"}, ["the question of 2 questions differs"]),
    "another prompt": ({"q0": 1.0, "q1": 1.0}, {"question_sha256": "z"}, ["the prompt, image or choices of 2"]),
    "another rule": ({"q0": 1.0, "q1": 1.0}, {"rule": "strict"}, ["not scored by the same rule (r; strict)"]),
    "another task": ({"q0": 1.0, "q1": 1.0}, {"task": "other"}, ["no task that both have answered", "has other"]),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_compared_is_refused(tmp_path, what):
    given, more, words = REFUSED[what]
    a, b = side(tmp_path / "a", {"q0": 1.0, "q1": 0.0}), side(tmp_path / "b", given, **more)
    said = command("compare", a, b, "--output", tmp_path / "page.html")
    assert said.code == 65
    assert "Traceback" not in said.err
    for word in words:
        assert word in " ".join(said.err.split())
    assert not (tmp_path / "page.html").exists()


def test_broken_directories(two, tmp_path):
    a, b = two
    for words, told in (
        ((a, tmp_path), "neither result.json nor scores.json"),
        ((a, b, "--task", "no"), "Not both have answered no"),
    ):
        said = command("compare", *words)
        assert (said.code, told in " ".join(said.err.split())) == (65, True), said.err
    file = b / "predictions/mine.jsonl"
    file.write_text(file.read_text().replace('"score": 0.0', '"score": 1.0'))
    assert "was changed after it was scored" in command("compare", a, b).err
    file.unlink()
    assert command("compare", a, b).code == 65
    (b / "scores.json").write_text("{}")
    said = command("compare", a, b)
    assert (said.code, "scores.json" in said.err, "Traceback" in said.err) == (65, True, False)


def test_names_tell_the_two_apart(tmp_path):
    given = {"q0": 1.0}
    a, b = side(tmp_path / "x/same", given), side(tmp_path / "y/same", given)
    assert compare_runs(a, b).names == (str(a), str(b))
    assert compare_runs(a, side(tmp_path / "x/other", given)).names == ("same", "other")


def test_text_is_shown_as_it_is(tmp_path):
    bad = "<script>alert(1)</script>"
    a, b = side(tmp_path / "a", {"1": 1.0}, prediction=bad), side(tmp_path / "b", {"1": 0.0})
    page = render(compare_runs(a, b))
    assert bad not in page
    assert "&lt;script&gt;" in page
    assert "not shown" in page, "no task says where its images are"


# --- real runs ---


@pytest.fixture(scope="module")
def runs_of_two(tmp_path_factory):
    """The base as it is, and after some steps that make it forget how to count."""
    folder = tmp_path_factory.mktemp("versus")
    task = {"name": "scenes_blank", "size": {"train": 32, "validation": 0, "test": 16}}
    other = {"name": "scenes_count", "size": {"test": 16}}
    train = {
        "max_steps": 8, "learning_rate": 2e-2, "per_device_train_batch_size": 8, "eval_strategy": "no",
        "save_strategy": "no", "gradient_accumulation_steps": 1, "per_device_eval_batch_size": 24,
    }  # fmt: skip
    for method in ("none", "lora"):
        spec = tiny_spec(folder / method, model="embedded", method=method, task=task, evaluate=[other], train=train)
        said = command("train", write_spec(folder / f"{method}.yaml", spec), "generation.max_new_tokens=6")
        assert said.code == 0, said.err
    return folder


def test_the_verb(runs_of_two, tmp_path):
    page = tmp_path / "page.html"
    said = command("compare", runs_of_two / "none", runs_of_two / "lora", "--output", page, "--json")
    assert said.code == 0, said.err
    found = json.loads(said.out)
    assert found["page"] == str(page)
    assert set(found["tasks"]) == {"scenes_blank", "scenes_count"}
    for task, contest in found["tasks"].items():
        first, second = (lines(runs_of_two / run / "predictions" / f"{task}.jsonl") for run in ("none", "lora"))
        assert contest["only_a"] == [a["id"] for a, b in zip(first, second, strict=True) if a["score"] > b["score"]]
        assert contest["only_b"] == [a["id"] for a, b in zip(first, second, strict=True) if a["score"] < b["score"]]
        assert contest["n"] == 16
        assert contest["b"] - contest["a"] == pytest.approx(contest["difference"])
    divided = [id for contest in found["tasks"].values() for id in (*contest["only_a"], *contest["only_b"])]
    assert len(divided) > 5
    content = page.read_text()
    assert content.count("<article>") == content.count('<img src="data:image/png;base64,') == len(divided)
    for word in ("http:", "https:", "<script", "<link"):
        assert word not in content
    said = command("compare", runs_of_two / "none", runs_of_two / "lora", "--task", "scenes_blank")
    assert "scenes_blank" in said.out
    assert "scenes_count" not in said.out
    assert "McNemar's exact p" in said.out
    few = command("compare", runs_of_two / "none", runs_of_two / "lora", "--output", page, "--questions", "1")
    assert few.code == 0
    assert page.read_text().count("<article>") <= 4
    assert "evenly spread" in page.read_text()


def test_images_that_changed_are_not_shown(runs_of_two, tmp_path):
    for name in ("none", "lora"):
        shutil.copytree(runs_of_two / name, tmp_path / name)
    result = read(tmp_path / "none/result.json")
    result.pop("sha256")
    result["spec"]["evaluate"][0]["options"]["seed"] = 1  # other scenes, and other ids
    (tmp_path / "none/result.json").write_bytes(sealed_json(result))
    page = render(compare_runs(tmp_path / "none", tmp_path / "lora", task="scenes_count"))  # which it forgot
    assert "<img" not in page
    assert "images are not shown" in page


def test_the_output_of_evaluate_can_be_compared(runs_of_two, tmp_path):
    assert command("evaluate", runs_of_two / "none", runs_of_two / "lora", "--output", tmp_path / "out").code == 0
    by_scores = compare_runs(tmp_path / "out/none", tmp_path / "out/lora")
    by_runs = compare_runs(runs_of_two / "none", runs_of_two / "lora")
    assert [each.to_json() for each in by_scores.contests] == [each.to_json() for each in by_runs.contests]
    mixed = compare_runs(runs_of_two / "none", tmp_path / "out/lora")
    assert mixed.contests[0].to_json() == by_runs.contests[0].to_json()
    assert "<img" in render(by_scores)


def test_not_the_same_limit(runs_of_two, tmp_path):
    assert command("evaluate", runs_of_two / "lora", "--limit", "5", "--output", tmp_path / "few").code == 0
    with pytest.raises(DataError, match="11 only in"):
        compare_runs(runs_of_two / "none", tmp_path / "few")


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium to open the page with")
def test_a_browser_shows_the_page(runs_of_two, tmp_path):
    import subprocess

    page = tmp_path / "page.html"
    assert command("compare", runs_of_two / "none", runs_of_two / "lora", "--output", page).code == 0
    words = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    shot = tmp_path / "page.png"
    subprocess.run([*words, f"--screenshot={shot}", page.as_uri()], capture_output=True, timeout=120, check=True)
    from PIL import Image

    colours = Image.open(shot).convert("RGB").getcolors(1 << 24)
    assert colours is not None
    assert len(colours) > 50, "an empty page has few colours"
