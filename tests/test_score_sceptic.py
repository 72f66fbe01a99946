"""`peft-mllm score` on files as they come: other line ends, other types of id, other orders, and no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from peft_mllm.errors import EXIT_BAD_DATA
from peft_mllm.metrics import METRICS
from runs import command

GOOD = [{"question_id": 10, "answer": "yes"}, {"question_id": 20, "answer": "no"}]


def write(path: Path, value: Any) -> Path:
    content = value if isinstance(value, bytes) else json.dumps(value).encode()
    path.write_bytes(content)
    return path


def lines(values: list[dict[str, Any]], end: bytes) -> bytes:
    return end.join(json.dumps(value).encode() for value in values)


def score(*words: str | Path) -> dict[str, Any]:
    said = command("score", *words, "--json")
    assert said.code == 0, said.err
    found: dict[str, Any] = json.loads(said.out)
    return found


def note(key: int, word: str, **more: Any) -> dict[str, Any]:
    answers = [{"answer": word, "answer_confidence": "yes", "answer_id": n} for n in range(10)]
    return {"question_id": key, "image_id": key // 10, **more, "answers": answers}


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    """Annotations of two questions, with keys that the rule does not need."""
    listed = [
        {
            "question_id": key, "image_id": 1, "question_type": "is", "answer_type": "yes/no",
            "multiple_choice_answer": word,
            "answers": [{"answer": word, "answer_confidence": "maybe", "answer_id": n} for n in range(1, 11)],
        }
        for key, word in ((10, "yes"), (20, "no"))
    ]  # fmt: skip
    header = {"info": {"version": "2.0"}, "license": {}, "data_subtype": "val2014", "annotations": listed}
    return write(tmp_path / "annotations.json", header)


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + json.dumps(GOOD).encode(),
        json.dumps(GOOD, indent=4).replace("\n", "\r\n").encode(),
        lines(GOOD, b"\r\n"),
        lines(GOOD, b"\n\n") + b"\n\n",
        json.dumps([{**entry, "question_id": str(entry["question_id"]), "extra": [1]} for entry in GOOD]).encode(),
        json.dumps({"results": GOOD[::-1]}).encode(),
    ],
    ids=["bom", "pretty-crlf", "lines-crlf", "blank-lines", "text-ids", "reversed-in-an-object"],
)
def test_the_same_answers_in_other_clothes(tmp_path: Path, notes: Path, content: bytes) -> None:
    said = command("score", "vqa", "--predictions", write(tmp_path / "p", content), "--references", notes, "--json")
    assert said.code == 0, said.err
    assert json.loads(said.out)["scores"]["accuracy"] == 100


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (json.dumps(GOOD).encode("utf-16"), "not UTF-8"),
        (b"\0\0\0", "not JSON"),
        (b'[{"question_id": NaN, "answer": "a"}]', "must be a whole number or text"),
        (b'[{"question_id": 10.0, "answer": "a"}]', "must be a whole number or text"),
        (b'[{"question_id": null, "answer": "a"}]', "must be a whole number or text"),
        (b'[{"question_id": 10, "answer": true}]', "must be text"),
        (b'[{"question_id": 10, "answer": "a"}] rest', "not JSON"),
        (b'{"question_id": 10, "answer": "a"}\n[1]\n', "expected an object, found a list"),
        (b'[{"question_id": "\\ud83d", "answer": "a"}]', "extra"),
    ],
)
def test_what_is_broken_is_one_message_and_nothing_on_standard_output(
    tmp_path: Path, notes: Path, content: bytes, reason: str
) -> None:
    said = command("score", "vqa", "--predictions", write(tmp_path / "p", content), "--references", notes, "--json")
    assert said.code == EXIT_BAD_DATA
    assert said.out == ""
    assert reason in said.err
    assert "Traceback" not in said.err


@pytest.mark.parametrize("option", ["--predictions", "--references", "--questions"])
def test_a_folder_is_no_file(tmp_path: Path, notes: Path, option: str) -> None:
    files = {"--predictions": write(tmp_path / "p.json", GOOD), "--references": notes, option: tmp_path}
    said = command("score", "vqa", *(word for pair in files.items() for word in pair), "--json")
    assert (said.code, said.out) == (EXIT_BAD_DATA, "")
    assert f"{tmp_path}: cannot be read (Is a directory)" in said.err


def test_items_that_cannot_be_written_print_no_score(tmp_path: Path, notes: Path) -> None:
    items = tmp_path / "absent" / "items.jsonl"
    words = ("--predictions", write(tmp_path / "p.json", GOOD), "--references", notes, "--per-item", items, "--json")
    said = command("score", "vqa", *words)
    assert said.code not in (0, None)
    assert said.out == ""
    assert str(items) in said.err


def test_items_do_not_overwrite_what_is_read(tmp_path: Path, notes: Path) -> None:
    said = write(tmp_path / "p.json", GOOD)
    before = said.read_bytes()
    done = command("score", "vqa", "--predictions", said, "--references", notes, "--per-item", said, "--json")
    assert done.code not in (0, None)
    assert (done.out, said.read_bytes()) == ("", before)


def test_one_object_has_these_keys_alone(tmp_path: Path, notes: Path) -> None:
    found = score("vqa", "--predictions", write(tmp_path / "p.json", GOOD), "--references", notes)
    assert set(found) == {"metric", "variant", "rule", "n", "unparsed", "scores"}


@pytest.mark.parametrize("content", ["[" * 100000, '[{"question_id": ' + "1" * 5000 + ', "answer": "a"}]'])
def test_json_that_python_cannot_hold_is_one_message(tmp_path: Path, notes: Path, content: str) -> None:
    said = write(tmp_path / "p.json", content.encode())
    done = command("score", "vqa", "--predictions", said, "--references", notes, "--json")
    assert (done.code, done.out) == (EXIT_BAD_DATA, "")
    assert f"{said}: not JSON that can be read" in done.err


def test_a_wrong_type_inside_references_is_no_defect_of_ours(tmp_path: Path) -> None:
    wrong = {"images": [{"id": 7}], "categories": 5, "annotations": [{"id": 1, "image_id": 7, "category_id": [1]}]}
    refs, said = write(tmp_path / "i.json", wrong), write(tmp_path / "p.json", [{"image_id": 7, "caption": "a"}])
    done = command("score", "chair", "--predictions", said, "--references", refs, "--json")
    assert (done.code, done.out) == (EXIT_BAD_DATA, "")
    assert str(refs) in done.err


def test_no_metric_imports_torch() -> None:
    """Each metric is built and its figures' modules are imported, in a process that has nothing else."""
    program = (
        "import sys\nfrom peft_mllm import scoring\nfrom peft_mllm.metrics import METRICS\n"
        "from peft_mllm.cli import scores\n"
        "from peft_mllm.metrics.text import ngrams, objects, ptb, vqa_words\n"
        "[METRICS[name]() for name in METRICS]\nprint(len(METRICS))\n"
        "print(sorted({'torch', 'transformers', 'peft', 'scipy', 'PIL'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == [str(len(METRICS)), "[]"]


# --- VQA ---


def test_okvqa_other_is_a_type_of_answer_and_of_question(tmp_path: Path) -> None:
    listed = [
        note(10, "race", answer_type="other", question_type="four"),
        note(20, "x", answer_type="other", question_type="other"),
    ]
    said = write(tmp_path / "p.json", [{"question_id": 10, "answer": "race"}, {"question_id": 20, "answer": "no"}])
    refs = write(tmp_path / "r.json", {"annotations": listed})
    scores = score("vqa", "--predictions", said, "--references", refs)["scores"]
    assert scores["accuracy/other"] == 50
    assert scores["accuracy/other (question)"] == 0


def test_a_questions_id_may_be_the_number_of_another_image(tmp_path: Path) -> None:
    refs = write(tmp_path / "r.json", [note(42000, "a", image_id=42), note(42000001, "b", image_id=42000)])
    asked = write(tmp_path / "q.json", {"questions": [{"question_id": 42000, "image_id": 42, "question": "?"}]})
    said = write(tmp_path / "p.json", [{"question_id": 42000, "answer": "a"}])
    assert score("vqa", "--predictions", said, "--questions", asked, "--references", refs)["n"] == 1


@pytest.mark.parametrize("answered", [[10], [10, 99]])
def test_vqa_is_partial_where_what_was_asked_has_no_reference(tmp_path: Path, answered: list[int]) -> None:
    refs = write(tmp_path / "r.json", [note(10, "a")])
    asked = write(tmp_path / "q.json", [{"question_id": key, "question": "?"} for key in (10, 99)])
    said = write(tmp_path / "p.json", [{"question_id": key, "answer": "a"} for key in answered])
    words = ("vqa", "--predictions", said, "--questions", asked, "--references", refs)
    assert command("score", *words, "--json").code == EXIT_BAD_DATA
    found = score(*words, "--partial")
    assert (found["n"], found["partial"], found["missing"], found["extra"]) == (1, True, 0, 1)


def test_textvqa_scores_a_question_asked_twice_against_its_last_annotation(tmp_path: Path) -> None:
    texts = [(1, "What?", "a"), (2, "Who?", "x"), (3, "what?", "b")]
    listed = [{"question_id": key, "image_id": "f0", "question": text, "answers": [word] * 10}
              for key, text, word in texts]  # fmt: skip
    refs = write(tmp_path / "r.json", {"data": listed})
    prompts = [("What?\nReference OCR token: \nShort.", "b"), ("Who?\nShort.", "x"), ("what?\nShort.", "b")]
    rows = [{"question_id": "f0", "prompt": prompt, "text": text} for prompt, text in prompts]
    said = write(tmp_path / "a.jsonl", lines(rows, b"\n"))
    found = score("vqa:m4c", "--predictions", said, "--references", refs)
    assert (found["n"], found["scores"]["accuracy"]) == (3, 100)
    by_id = [{"question_id": key, "answer": word} for key, _, word in texts]
    found = score("vqa:m4c", "--predictions", write(tmp_path / "p.json", by_id), "--references", refs)
    assert found["scores"]["accuracy"] == 100


# --- the choices of ScienceQA and IconQA ---


def test_stored_options_may_be_whole_numbers_as_text(tmp_path: Path) -> None:
    problem = {"question": "?", "choices": ["a", "b"], "hint": "", "image": None, "subject": "", "grade": "grade2"}
    refs = write(tmp_path / "problems.json", {"4": {**problem, "answer": 1}, "5": {**problem, "answer": 0}})
    words = ("scienceqa:stored", "--references", refs, "--predictions")
    found = score(*words, write(tmp_path / "r.json", {"results": {"4": "1", "5": "-1"}}))
    assert (found["scores"]["accuracy"], found["unparsed"]) == (50, 1)
    for wrong in ("B", "1.0", "", "9" * 5000, True, 1.0):
        said = command("score", *words, write(tmp_path / "w.json", {"results": {"4": wrong, "5": 0}}), "--json")
        assert (said.code, said.out) == (EXIT_BAD_DATA, "")
        assert "results[4]" in said.err
        assert "must be an index" in said.err


def test_iconqa_compares_indices_where_two_choices_read_alike(tmp_path: Path) -> None:
    problem = {"question": "?", "choices": ["1", "1"], "answer": 1, "ques_type": "choose_txt", "grade": "prek"}
    refs = write(tmp_path / "problems.json", {"7": problem})
    for index in (0, 1):
        said = write(tmp_path / "r.json", {"results": {"7": index}})
        assert score("iconqa", "--predictions", said, "--references", refs)["scores"]["accuracy"] == 100 * index


# --- captions ---


def test_chair_reads_popes_captions_as_published_objects_over_several_lines(tmp_path: Path) -> None:
    rows = [{"question_id": n, "prompt": "?", "text": "A dog.", "image_id": n + 5, "metadata": {}} for n in range(3)]
    text = "\n".join(json.dumps(row, indent=4) for row in rows) + "\n"
    said = write(tmp_path / "Instruction1_llava.json", text.encode())
    refs = write(tmp_path / "gt.json", {"5": ["dog"], "6": ["cat"], "7": ["dog"]})
    assert score("chair", "--predictions", said, "--references", refs)["scores"]["CHAIRs"] == pytest.approx(1 / 3)


def test_captions_are_tokenised_in_the_order_of_the_images(tmp_path: Path) -> None:
    """The official text has the images' order; "B." is split where the next line begins with "A "."""
    texts = [(1, "a plan B."), (3, "dogs run"), (2, "A dog runs"), (2, "a dog")]
    listed = [{"image_id": key, "id": n, "caption": text} for n, (key, text) in enumerate(texts)]
    refs = write(tmp_path / "r.json", {"images": [{"id": 1}, {"id": 2}, {"id": 3}], "annotations": listed})
    captions = [{"image_id": key, "caption": text} for key, text in ((1, "a plan b"), (2, "x"), (3, "y"))]
    items = tmp_path / "items.jsonl"
    score("caption", "--predictions", write(tmp_path / "p.json", captions), "--references", refs, "--per-item", items)
    by_id = {line["id"]: line for line in map(json.loads, items.read_text().splitlines())}
    assert by_id["1"]["ROUGE_L"] == pytest.approx(1)


# --- POPE ---


@pytest.fixture
def pope(tmp_path: Path) -> tuple[list[Path], Path, list[dict[str, Any]]]:
    """Label files of two sets, LLaVA's question file for both, and answers to all of it."""
    refs, asked = [], []
    for first, name in ((0, "random"), (10, "popular")):
        rows = [{"question_id": n, "image": f"{n}.jpg", "text": f"Is there a {word}?", "label": "yes"}
                for n, word in ((1, "a"), (2, "b"))]  # fmt: skip
        refs.append(write(tmp_path / f"coco_pope_{name}.json", lines(rows, b"\n")))
        asked += [{**row, "question_id": first + n, "category": name} for n, row in enumerate(rows, 1)]
    answers = [{"question_id": row["question_id"], "prompt": "?", "text": "Yes"} for row in asked]
    return refs, write(tmp_path / "q.jsonl", lines(asked, b"\n")), answers


def test_pope_is_partial_where_sets_or_answers_are_dropped(
    tmp_path: Path, pope: tuple[list[Path], Path, list[dict[str, Any]]]
) -> None:
    refs, asked, answers = pope
    said = write(tmp_path / "a.jsonl", lines(answers, b"\n"))
    words = ("pope", "--questions", asked, "--partial", "--references")
    assert "partial" not in score(*words, *refs, "--predictions", said)
    found = score(*words, refs[0], "--predictions", said)
    assert (found["n"], found["partial"], found["missing"], found["extra"]) == (2, True, 0, 2)
    more = write(tmp_path / "b.jsonl", lines([*answers[1:], {"question_id": 99, "prompt": "?", "text": "No"}], b"\n"))
    found = score(*words, *refs, "--predictions", more)
    assert (found["n"], found["partial"], found["missing"], found["extra"]) == (3, True, 1, 1)


@pytest.mark.parametrize(
    "image", [42, "42", "000000000042", "val2014/COCO_val2014_000000000042.jpg", "000000000042.png"]
)
def test_popes_images_are_the_same_in_any_form(tmp_path: Path, image: object) -> None:
    """The labels have no id, and six questions for each image: its name is no id of a question."""
    name, words = "COCO_val2014_000000000042.jpg", ("dog", "cat", "cup")
    labels = [{"image": name, "text": f"Is there a {word}?", "label": "yes"} for word in words]
    refs = write(tmp_path / "coco_pope_random.json", lines(labels, b"\n"))
    rows = [{"image": image, "question": f"Is there a {word}?", "answer": "yes"} for word in words]
    said = write(tmp_path / "a.json", rows)
    found = score("pope", "--predictions", said, "--references", refs)
    assert (found["n"], found["scores"]["accuracy"]) == (3, 1)
    part = score("pope", "--predictions", write(tmp_path / "b.json", rows[1:]), "--references", refs, "--partial")
    assert (part["n"], part["missing"], part["scores"]["accuracy"]) == (2, 1, 1)
    other = write(tmp_path / "c.json", [*rows[:2], {**rows[2], "image": 43}])
    refused = command("score", "pope", "--predictions", other, "--references", refs, "--json")
    assert refused.code == EXIT_BAD_DATA
    assert "answers 'is there a cup?' of image 43, the label asks 'is there a cup?' of image 42" in refused.err
