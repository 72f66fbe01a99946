"""POPE, CHAIR, AMBER and MMHal-Bench: their rules, their slips, and a judge that is only called when given."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from peft_mllm.errors import DataError
from peft_mllm.metrics import Given, metric_named
from peft_mllm.metrics.judge import Judge
from peft_mllm.metrics.mmhal import rating
from peft_mllm.metrics.pope import parse_official, parse_strict
from peft_mllm.metrics.text.objects import objects_of
from peft_mllm.record import Record, Turn
from peft_mllm.scoring import score_files


def record(answer, key="1", question="?", **meta):
    return Record(key, (Turn("user", question), Turn("assistant", answer)), meta=meta)


# --- POPE ---


@pytest.mark.parametrize(
    ("text", "official", "strict"),
    [
        ("Yes", "yes", "yes"),
        ("No, there is none.", "no", None),
        ("There is not. Yes.", "no", None),
        ("Yes. No dog.", "yes", None),
        (" no ", "no", "no"),
        ("NO", "yes", "no"),
        ("Nope", "yes", None),
        ("", "yes", None),
    ],
)
def test_pope_reads_as_the_official_script_and_strictly(text, official, strict):
    assert parse_official(text) == official
    assert parse_strict(text) == strict


def test_pope_figures_of_each_set_and_their_means():
    records = [record("yes", category="random"), record("no", category="random"),
               record("yes", category="popular"), record("no", category="popular")]  # fmt: skip
    values = metric_named("pope").score(["Yes", "No", "Yes", "Yes"], records).values
    assert values["accuracy/random"] == values["f1/random"] == 1
    assert values["precision/popular"] == 0.5
    assert values["f1/popular"] == pytest.approx(2 / 3)
    assert values["f1"] == pytest.approx((1 + 2 / 3) / 2)
    assert values["yes_ratio"] == 0.75
    assert list(values)[:5] == ["accuracy", "precision", "recall", "f1", "yes_ratio"]


def test_pope_strict_counts_what_it_cannot_read_as_wrong_only():
    scores = metric_named("pope:strict").score(["yes", "maybe", "no"], [record("yes"), record("yes"), record("no")])
    assert scores.values == {"accuracy": 2 / 3, "precision": 1, "recall": 1, "f1": 1, "yes_ratio": 1 / 3}
    assert scores.unparsed == 1


# --- CHAIR ---


def test_chair_objects_and_figures_are_the_official_ones(cases):
    folder = cases / "metrics/chair"
    given = Given([folder / "captions_minigpt4.json"], [folder / "gt_objects.json"])
    scored = score_files("chair", metric_named("chair"), given)
    expected = json.loads((folder / "expected.json").read_text())
    assert len(scored.records) == expected["n"]
    for name, value in scored.scores.values.items():
        assert value == pytest.approx(expected[name], abs=1e-9)
    words = json.loads((folder / "expected_words_minigpt4.json").read_text())
    wrong = [
        line["id"]
        for line in scored.lines()
        if {"gen": line["objects"], "hall": line["hallucinated"]} != words[line["id"]]
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("caption", "objects"),
    [
        ("A baby elephant by two Fire Hydrants.", ["elephant", "fire hydrant"]),
        ("Women with wine glasses and knives.", ["person", "wine glass", "knife"]),
        ("A toilet seat; a seat near the toilet", ["toilet", "toilet"]),
        ("a passenger train on train tracks", ["train"]),
        ("The man's dog's ball", ["person", "dog", "sports ball"]),
        ("a man in a bow tie", ["person", "tie"]),
        ("a motor bike and an iPhone", []),
        ("cookies", []),
    ],
)
def test_chair_reads_objects_with_the_slips_of_its_source(caption, objects):
    assert [name for _, name in objects_of(caption)] == objects


def test_chair_from_coco_annotations(tmp_path):
    write = lambda name, value: (tmp_path / name).write_text(json.dumps(value)) and tmp_path / name  # noqa: E731
    instances = {
        "images": [{"id": 7}, {"id": 8}],
        "categories": [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}],
        "annotations": [{"image_id": 7, "category_id": 18}, {"image_id": 9, "category_id": 1}],
    }
    captions = {
        "annotations": [{"image_id": 7, "id": 1, "caption": "A man."}, {"image_id": 8, "id": 2, "caption": "A cat"}]
    }
    said = [{"image_id": 7, "caption": "a dog, a man and a kite"}, {"image_id": 8, "caption": "nothing"}]
    refs = [write("instances.json", instances), write("captions.json", captions)]
    predictions = write("said.json", said)
    values = score_files("chair", metric_named("chair"), Given([predictions], refs)).scores.values
    assert values == {"CHAIRs": 0.5, "CHAIRi": 1 / 3, "Recall": 2 / 3}
    with pytest.raises(DataError, match="there are no captions"):
        score_files("chair", metric_named("chair"), Given([predictions], refs[:1]))


# --- AMBER ---


def test_amber_takes_no_as_the_positive_class(tmp_path):
    kinds = ["discriminative-hallucination", "discriminative-attribute-state", "discriminative-relation", "generative"]
    notes = [
        {"id": n, "type": kind, "truth": ["a"] if kind == "generative" else "no"} for n, kind in enumerate(kinds, 1)
    ]
    notes[1]["truth"] = "yes"
    said = [{"id": 1, "response": "No"}, {"id": 2, "response": "Yes"}, {"id": 3, "response": "No."}]
    (tmp_path / "annotations.json").write_text(json.dumps(notes))
    (tmp_path / "said.json").write_text(json.dumps(said))
    given = Given([tmp_path / "said.json"], [tmp_path / "annotations.json"])
    scored = score_files("amber", metric_named("amber"), given)
    values = scored.scores.values
    assert values["accuracy"] == pytest.approx(200 / 3)
    assert (values["precision"], values["recall"]) == (100, 50)
    assert values["f1"] == pytest.approx(100 * 2 * 0.5 / 1.5001)
    assert values["f1/existence"] == pytest.approx(100 * 2 / 2.001)
    assert values["accuracy/relation"] == 0
    assert scored.scores.unparsed == 1
    assert score_files("amber", metric_named("amber:forgiving"), given).scores.headline == 100


# --- MMHal-Bench ---


@pytest.fixture
def endpoint():
    """A judge on this machine: rates by the length of the model's answer, and remembers what it was asked."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.path, self.headers.get("Authorization"), body))
            if body["model"] == "absent":
                self.send_error(404)
                return
            good = "good" in body["messages"][0]["content"]
            reply = {"choices": [{"message": {"content": f"Because.\nRating: {6 if good else 1}"}}]}
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(reply).encode())

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", asked
    server.shutdown()
    server.server_close()


def hard(n, kind):
    return record("right", str(n), "What?", question_type=kind, image_content=["dog", "ball"])


def test_mmhal_asks_the_judge_it_is_given(endpoint):
    url, asked = endpoint
    metric = metric_named("mmhal")
    metric.judge = Judge(url, "tiny-judge", "secret")
    scores = metric.score(["a good answer", "a bad one"], [hard(0, "attribute"), hard(1, "counting")])
    assert scores.values == {
        "score": 3.5, "hallucination_rate": 0.5, "score/attribute": 6, "score/counting": 1,
    }  # fmt: skip
    path, key, body = asked[0]
    assert (path, key) == ("/v1/chat/completions", "Bearer secret")
    assert body["model"] == "tiny-judge"
    assert body["temperature"] == 0
    for part in ("dog, ball", "What?", "right", "a good answer"):
        assert part in body["messages"][0]["content"]
    assert "secret" not in repr(metric.judge)


def test_mmhal_asks_nobody_without_a_judge():
    with pytest.raises(DataError, match=r"--judge URL"):
        metric_named("mmhal").score(["a"], [hard(0, "attribute")])


def test_a_judge_that_cannot_be_asked_is_one_message(endpoint):
    url, _ = endpoint
    with pytest.raises(DataError, match=r"answers 404"):
        Judge(url, "absent").ask("?")
    with pytest.raises(DataError, match="cannot be reached"):
        Judge("http://127.0.0.1:9", "m", pause=0, timeout=2).ask("?")
    with pytest.raises(DataError, match="must begin with http"):
        Judge("file:///etc/passwd", "m")


@pytest.mark.parametrize(
    ("review", "expected"),
    [("Fine.\nRating: 4", 4), ("rating: 0", 0), ("Rating: 4, or Rating: 5", None), ("four", None), ("Rating: 7", None)],
)
def test_a_review_has_exactly_one_rating(review, expected):
    assert rating(review) == expected


def test_mmhal_scores_stored_reviews(tmp_path):
    questions = [{"question_type": "other", "question": "a?", "gt_answer": "x", "image_content": []}] * 2
    reviews = [{"choices": [{"message": {"content": "Rating: 5"}}]}, "none"]
    (tmp_path / "questions.json").write_text(json.dumps(questions))
    (tmp_path / "reviews.json").write_text(json.dumps(reviews))
    given = Given([tmp_path / "reviews.json"], [tmp_path / "questions.json"])
    scored = score_files("mmhal", metric_named("mmhal:stored"), given)
    assert scored.scores.values == {"score": 2.5, "hallucination_rate": 0.5, "score/other": 2.5}
    assert scored.scores.unparsed == 1
