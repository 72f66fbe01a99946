"""`peft-mllm score`: every official format is read as it is, and what is broken is one message."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from peft_mllm.errors import EXIT_BAD_DATA, EXIT_USAGE
from peft_mllm.metrics import METRICS
from runs import command

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = ROOT.parent / "shared" / "cases" / "data"


def write(path: Path, value: Any) -> Path:
    """A file: JSON, or JSON lines for a list in a name that ends so, or text as it is."""
    if isinstance(value, str):
        path.write_text(value, encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(line) + "\n" for line in value), encoding="utf-8")
    else:
        path.write_text(json.dumps(value), encoding="utf-8")
    return path


def score(*words: str | Path) -> dict[str, Any]:
    """What the command prints with --json, and nothing else."""
    said = command("score", *words, "--json")
    assert said.code == 0, said.err
    assert said.err == ""
    return json.loads(said.out)


def refused(*words: str | Path) -> str:
    """The one message of a command that must fail, and prints nothing else."""
    said = command("score", *words, "--json")
    assert said.code == EXIT_BAD_DATA, said.out + said.err
    assert said.out == ""
    assert "Traceback" not in said.err
    return said.err


def annotation(question: int, answers: list[str], **more: Any) -> dict[str, Any]:
    listed = [{"answer": answer, "answer_confidence": "yes", "answer_id": n} for n, answer in enumerate(answers, 1)]
    return {"question_id": question, "image_id": question // 10, "answers": listed, **more}


@pytest.fixture
def vqa(tmp_path: Path) -> tuple[Path, Path]:
    """Two questions in the files of VQA: results and annotations."""
    notes = [
        annotation(10, ["cat"] * 3 + ["dog"] * 7, answer_type="other", question_type="what is"),
        annotation(20, ["yes"] * 10, answer_type="yes/no", question_type="is the"),
    ]
    refs = {"info": {}, "task_type": "Open-Ended", "annotations": notes, "license": {}, "data_type": "mscoco"}
    results = [{"question_id": 20, "answer": "Yes"}, {"question_id": 10, "answer": "The cat."}]
    return write(tmp_path / "results.json", results), write(tmp_path / "annotations.json", refs)


# --- what is printed ---


def test_one_object_with_the_name_of_the_rule_and_numbers_unrounded(vqa: tuple[Path, Path]) -> None:
    said = score("vqa", "--predictions", vqa[0], "--references", vqa[1])
    assert said == {
        "metric": "vqa", "variant": "official", "rule": METRICS["vqa"].variants["official"].rule,
        "n": 2, "unparsed": 0,
        "scores": {
            "accuracy": pytest.approx(45), "accuracy/yes/no": 0, "accuracy/other": pytest.approx(90),
            "accuracy/is the": 0, "accuracy/what is": pytest.approx(90),
        },
    }  # fmt: skip
    assert score("vqa", "--predictions", vqa[0], "--references", vqa[1], "--variant", "m4c")["scores"]["accuracy"] == 95
    assert score("vqa:m4c", "--predictions", vqa[0], "--references", vqa[1])["variant"] == "m4c"


def test_people_get_a_table_with_the_rule(vqa: tuple[Path, Path]) -> None:
    said = command("score", "vqa", "--predictions", vqa[0], "--references", vqa[1])
    assert said.code == 0
    assert METRICS["vqa"].variants["official"].rule in said.out
    assert "2 scored" in said.out
    assert "45.00" in said.out


def test_per_item_writes_a_line_for_each(vqa: tuple[Path, Path], tmp_path: Path) -> None:
    items = tmp_path / "items.jsonl"
    score("vqa", "--predictions", vqa[0], "--references", vqa[1], "--per-item", items)
    lines = [json.loads(line) for line in items.read_text().splitlines()]
    assert [(line["id"], line["prediction"]) for line in lines] == [("10", "The cat."), ("20", "Yes")]
    assert [line["score"] for line in lines] == [pytest.approx(0.9), 0]


def test_it_imports_no_torch(vqa: tuple[Path, Path]) -> None:
    words = ["score", "vqa", "--predictions", str(vqa[0]), "--references", str(vqa[1])]
    program = (
        "import sys\nfrom peft_mllm.cli import main\ntry:\n    main()\nfinally:\n"
        "    sys.stderr.write(' '.join({'torch', 'transformers', 'scipy', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stderr == ""


def test_several_files_follow_one_option(tmp_path: Path) -> None:
    for name, label in (("random", "yes"), ("popular", "no")):
        write(tmp_path / f"coco_pope_{name}.jsonl", [{"question_id": 1, "image": "a", "text": "?", "label": label}])
        write(tmp_path / f"said_{name}.jsonl", [{"question": "?", "answer": "Yes"}])
    refs = [tmp_path / f"coco_pope_{name}.jsonl" for name in ("random", "popular")]
    said = [tmp_path / f"said_{name}.jsonl" for name in ("random", "popular")]
    first = score("pope", "--references", *refs, "--predictions", *said)
    assert first == score("pope", "--references", refs[0], "--references", refs[1],
                          "--predictions", said[0], "--predictions", said[1])  # fmt: skip
    assert first == score("--references", *refs, "--predictions", *said, "pope")
    assert first["scores"]["accuracy"] == 0.5
    assert first["scores"]["accuracy/random"] == 1


# --- what is refused ---


def test_ids_must_be_the_same_and_are_listed(vqa: tuple[Path, Path], tmp_path: Path) -> None:
    said = write(tmp_path / "p.json", [{"question_id": q, "answer": "x"} for q in (10, 30, 30)])
    message = refused("vqa", "--predictions", said, "--references", vqa[1])
    for listed in ("missing: no prediction for 1 of 2 ids (1): 20", "extra: a prediction without", "duplicate", ": 30"):
        assert listed in message
    assert "--partial" in message
    assert "duplicate" in refused("vqa", "--predictions", said, "--references", vqa[1], "--partial")


def test_partial_scores_what_is_there_and_says_so(vqa: tuple[Path, Path], tmp_path: Path) -> None:
    said = write(tmp_path / "p.json", [{"question_id": q, "answer": "dog"} for q in (10, 30)])
    result = score("vqa", "--predictions", said, "--references", vqa[1], "--partial")
    assert (result["partial"], result["missing"], result["extra"], result["n"]) == (True, 1, 1, 1)
    assert result["scores"]["accuracy"] == 100
    shown = command("score", "vqa", "--predictions", said, "--references", vqa[1], "--partial").out
    assert "PARTIAL: 1 references without a prediction" in shown
    nothing = write(tmp_path / "q.json", [{"question_id": 99, "answer": "dog"}])
    assert "nothing to score" in refused("vqa", "--predictions", nothing, "--references", vqa[1], "--partial")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "the file is empty"),
        ("yes\nno\n", "line 1, column 1: not JSON"),
        ('[{"question_id": 10, "answer": "a"}, {"question_', "line 1, column 39: not JSON"),
        ('{"question_id": 10, "answer": "a"}\n{"question_id": 20, "ans', "p.json:2: not JSON"),
        ("[]", "the list is empty"),
        ("7", "expected a list of objects, found a number"),
        ('["cat"]', "entry 1: expected an object, found text"),
        ('{"10": "cat"}', "expected a list"),
        ('[{"question_id": 10, "answer": 7}]', "entry 1: the answer is 7, a number, and must be text"),
        ('[{"question_id": 10, "answer": null}]', "entry 1: the answer is None, null, and must be text"),
        ('[{"question_id": 10}]', "entry 1: has no answer"),
        ('[{"answer": "a"}]', "entry 1: has no id"),
        ('[{"question_id": [1], "answer": "a"}]', "entry 1: the id is [1], a list"),
        ('[{"question_id": 10, "question_id": 11, "answer": "a"}]', "duplicate keys in one object: question_id"),
    ],
)
def test_a_broken_file_of_predictions_is_one_message(
    vqa: tuple[Path, Path], tmp_path: Path, content: str, reason: str
) -> None:
    said = write(tmp_path / "p.json", content)
    message = refused("vqa", "--predictions", said, "--references", vqa[1])
    assert reason in message
    assert message.startswith(str(said))


def test_broken_references_are_one_message(vqa: tuple[Path, Path], tmp_path: Path) -> None:
    def message(value: Any) -> str:
        return refused("vqa", "--predictions", vqa[0], "--references", write(tmp_path / "r.json", value))

    assert "entry 1: has no answers" in message([{"question_id": 10, "answers": []}])
    assert "not public" in message([{"question_id": 10}])
    assert "entry 1: 'answers' is 'cat', text" in message([{"question_id": 10, "answers": "cat"}])
    assert "one of its answers is 3, a number" in message([{"question_id": 10, "answers": [3]}])
    assert "duplicate ids among the references" in message([annotation(10, ["a"]), annotation(10, ["a"])])
    absent = refused("vqa", "--predictions", vqa[0], "--references", tmp_path / "absent.json")
    assert "absent.json: cannot be read (No such file or directory)" in absent
    (tmp_path / "latin.json").write_bytes(b'[{"question_id": 10, "answer": "caf\xe9"}]')
    assert "byte 35: not UTF-8" in refused("vqa", "--predictions", tmp_path / "latin.json", "--references", vqa[1])


def test_unknown_names_are_corrected(vqa: tuple[Path, Path]) -> None:
    for words, reason in (
        (("vqaa",), "Did you mean 'vqa'?"),
        (("vqa", "--variant", "vizwis"), "Did you mean 'vizwiz'?"),
        (("vqa:m4c", "--variant", "n3"), "Give one."),
        (("vqa", "--judge", "http://a", "--judge-model", "b"), "for the metric mmhal alone"),
    ):
        said = command("score", *words, "--predictions", vqa[0], "--references", vqa[1])
        assert said.code == EXIT_USAGE
        assert reason in said.err


# --- the official formats ---


def test_question_files_restrict_and_check(vqa: tuple[Path, Path], tmp_path: Path) -> None:
    one = write(tmp_path / "one.json", {"questions": [{"question_id": 10, "image_id": 1, "question": "?"}]})
    said = write(tmp_path / "p.json", [{"question_id": 10, "answer": "dog"}])
    assert score("vqa", "--predictions", said, "--references", vqa[1], "--questions", one)["n"] == 1
    two = write(tmp_path / "two.json", {"questions": [{"question_id": 99}]})
    assert "have no reference: 99" in refused("vqa", "--predictions", said, "--references", vqa[1], "--questions", two)


def test_textvqa_answers_of_llava_are_joined_by_image_and_question(tmp_path: Path) -> None:
    data = [
        {"question_id": 34602, "image_id": "0054c9", "question": "What brand is it?", "answers": ["nokia"] * 10},
        {"question_id": 34603, "image_id": "0054c9", "question": "What color?", "answers": ["red"] * 10},
    ]
    tail = "\nReference OCR token: A, B\nAnswer the question using a single word or phrase."
    answers = [
        {"question_id": "0054c9", "prompt": f"what color?{tail}", "text": "Red", "answer_id": "x", "metadata": {}},
        {"question_id": "0054c9", "prompt": f"what brand is it?{tail}", "text": "a Nokia?"},
    ]
    refs, said = write(tmp_path / "val.json", {"data": data}), write(tmp_path / "a.jsonl", answers)
    assert score("vqa", "--predictions", said, "--references", refs, "--variant", "m4c")["scores"]["accuracy"] == 100


def test_vizwiz(tmp_path: Path) -> None:
    notes = [
        {"image": f"VizWiz_val_{n}.jpg", "question": "?", "answer_type": kind, "answerable": 1,
         "answers": [{"answer": answer, "answer_confidence": "yes"} for answer in answers]}
        for n, (kind, answers) in enumerate(
            [("other", ["cup"] * 3 + ["mug"] * 7), ("unanswerable", ["unanswerable"] * 10)]
        )
    ]  # fmt: skip
    said = [{"image": f"VizWiz_val_{n}.jpg", "answer": "cup"} for n in range(2)]
    refs, results = write(tmp_path / "val.json", notes), write(tmp_path / "r.json", said)
    scores = score("vqa", "--predictions", results, "--references", refs, "--variant", "vizwiz")["scores"]
    assert scores == {"accuracy": 50, "accuracy/other": 100, "accuracy/unanswerable": 0}
    llava = write(
        tmp_path / "a.jsonl", [{"question_id": row["image"], "prompt": "?", "text": row["answer"]} for row in said]
    )
    other = score("vqa", "--predictions", llava, "--references", refs)["scores"]["accuracy"]
    assert other == pytest.approx(45), "nine of ten, and answers without ids are left out one by one"


def problem(answer: int, split: str = "test", **more: Any) -> dict[str, Any]:
    return {"question": "?", "choices": ["x", "y"], "answer": answer, "hint": "", "image": None, "split": split,
            "subject": "natural science", "grade": "grade2", **more}  # fmt: skip


def test_scienceqa_scores_the_split_that_was_answered(tmp_path: Path) -> None:
    problems = {"1": problem(0), "2": problem(1, image="image.png"), "3": problem(1, "train")}
    refs = write(tmp_path / "problems.json", problems)
    said = write(tmp_path / "a.jsonl", [{"question_id": "1", "prompt": "?", "text": "A"},
                                        {"question_id": "2", "prompt": "?", "text": "no idea"}])  # fmt: skip
    result = score("scienceqa", "--predictions", said, "--references", refs)
    assert (result["n"], result["unparsed"]) == (2, 1)
    assert result["scores"]["accuracy"] == 50
    assert result["scores"]["accuracy/IMG"] == 0
    assert result["scores"]["accuracy/NAT"] == 50
    part = write(tmp_path / "part.jsonl", [{"question_id": "1", "text": "A"}])
    assert "missing" in refused("scienceqa", "--predictions", part, "--references", refs)
    asked = write(tmp_path / "asked.json", [{"id": "1", "conversations": []}])
    assert score("scienceqa", "--predictions", part, "--references", refs, "--questions", asked)["n"] == 1


def test_scienceqa_official_result_file(tmp_path: Path) -> None:
    refs = write(tmp_path / "problems.json", {"1": problem(0), "2": problem(1)})
    result = {"acc": 100.0, "results": {"1": 0, "2": 1}, "outputs": {"1": "The answer is A.", "2": "It is y."}}
    said = write(tmp_path / "r.json", result)
    words = ("scienceqa", "--predictions", said, "--references", refs, "--variant")
    assert score(*words, "stored")["scores"]["accuracy"] == 100
    assert score(*words, "llava")["scores"]["accuracy"] == 50
    assert score(*words, "official")["unparsed"] == 1
    wrong = write(tmp_path / "w.json", {"results": {"1": "A", "2": 1}})
    assert "results[1]: is 'A', text, and must be an index" in refused(
        "scienceqa", "--predictions", wrong, *words[3:], "stored"
    )


def test_iconqa_results_are_indices_where_there_are_choices(tmp_path: Path) -> None:
    problems = {
        "5": {"question": "?", "choices": ["1", "0"], "answer": 1, "ques_type": "choose_txt", "grade": "grade1"},
        "6": {"question": "?", "choices": ["a.png", "b.png"], "answer": 0, "ques_type": "choose_img", "grade": "prek"},
        "7": {"question": "?", "choices": None, "answer": "Half", "ques_type": "fill_in_blank", "grade": "prek"},
        "8": {"question": "?", "choices": None, "answer": "9", "ques_type": "fill_in_blank", "grade": "prek"},
    }
    refs = write(tmp_path / "problems.json", problems)
    write(tmp_path / "pid2skills.json", {pid: ["counting"] for pid in problems})
    splits = {
        "choose_txt_test": ["5"],
        "choose_img_test": ["6"],
        "fill_in_blank_test": ["7"],
        "fill_in_blank_val": ["8"],
    }
    write(tmp_path / "pid_splits.json", splits)
    said = write(tmp_path / "r.json", {"accuracy": 1, "results": {"5": 1, "6": 1, "7": "half"}})
    result = score("iconqa", "--predictions", said, "--references", refs)
    assert result["n"] == 3
    assert result["scores"]["accuracy/choose_txt"] == 100
    assert result["scores"]["accuracy/choose_img"] == 0
    assert result["scores"]["accuracy/fill_in_blank"] == 0
    assert result["scores"]["accuracy/counting"] == pytest.approx(100 / 3)
    normalised = score("iconqa", "--predictions", said, "--references", refs, "--variant", "normalised")["scores"]
    assert normalised["accuracy/fill_in_blank"] == 100
    written = write(tmp_path / "a.jsonl", [{"question_id": "5", "text": "0"}])
    assert score("iconqa", "--predictions", written, "--references", refs)["scores"]["accuracy"] == 100


def test_ocrvqa_release_and_lists(tmp_path: Path) -> None:
    book = {"questions": ["Who?", "What?"], "answers": ["Jo", "Crime"], "title": "t", "split": 3}
    refs = write(tmp_path / "dataset.json", {"0123": book, "0456": {**book, "split": 1}})
    said = write(
        tmp_path / "p.json",
        [{"question_id": "0123_0", "answer": "jo"}, {"question_id": "0123_1", "answer": "It is crime"}],
    )
    assert score("ocrvqa", "--predictions", said, "--references", refs)["scores"] == {"accuracy": 50}
    assert score("ocrvqa:substring", "--predictions", said, "--references", refs)["scores"] == {"accuracy": 100}
    both = write(tmp_path / "both.json", [{"image_path": "a", "question": "?", "gt_answers": ["Jo"], "answer": "Jo"}])
    assert score("ocrvqa", "--predictions", both, "--references", both)["scores"] == {"accuracy": 100}


def test_exact_takes_a_runs_predictions_and_llava_records(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image>\n?"}, {"from": "gpt", "value": "A cat"}]
    refs = write(tmp_path / "data.json", [{"id": "a", "image": "a.png", "conversations": turns}])
    said = write(tmp_path / "p.jsonl", [{"id": "a", "question": "?", "prediction": "a cat", "answer": "x", "score": 0}])
    assert score("exact", "--predictions", said, "--references", refs)["scores"] == {"accuracy": 100}
    short = write(tmp_path / "short.json", [{"answer": "a"}])
    assert "missing" in refused(
        "exact", "--predictions", short, "--references", write(tmp_path / "r.json", [{"answer": "a"}] * 2)
    )


def test_gqa(tmp_path: Path) -> None:
    types = {"structural": "query", "semantic": "attr", "detailed": "d"}
    questions = {
        "1": {"question": "?", "answer": "red", "types": types, "isBalanced": True, "imageId": "9"},
        "2": {"question": "?", "answer": "blue", "types": types, "isBalanced": False, "imageId": "9"},
    }
    refs = write(tmp_path / "questions.json", questions)
    said = write(
        tmp_path / "p.json", [{"questionId": "1", "prediction": "red"}, {"questionId": "2", "prediction": "?"}]
    )
    result = score("gqa", "--predictions", said, "--references", refs)
    assert (result["n"], result["scores"]["accuracy"]) == (1, 100)
    llava = write(tmp_path / "a.jsonl", [{"question_id": "1", "prompt": "?", "text": "Red."}])
    assert score("gqa", "--predictions", llava, "--references", refs)["scores"]["accuracy"] == 0
    assert score("gqa:llava", "--predictions", llava, "--references", refs)["scores"]["accuracy"] == 100


def test_captions(tmp_path: Path) -> None:
    texts = {1: ["A dog runs.", "a dog"], 2: ["Two cats!"]}
    notes = [{"image_id": key, "id": n, "caption": text} for key, each in texts.items() for n, text in enumerate(each)]
    refs = write(tmp_path / "refs.json", {"images": [{"id": 1}, {"id": 2}], "annotations": notes, "type": "captions"})
    said = write(
        tmp_path / "p.json", [{"image_id": 1, "caption": "a dog runs"}, {"image_id": 2, "caption": "two cats"}]
    )
    scores = score("caption", "--predictions", said, "--references", refs)["scores"]
    assert list(scores) == ["CIDEr", "Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L"]
    assert scores["ROUGE_L"] == pytest.approx(1)
    twice = write(tmp_path / "t.json", [{"image_id": key, "caption": "a"} for key in (1, 2, 2)])
    assert "duplicate" in refused("caption", "--predictions", twice, "--references", refs)
    without = write(tmp_path / "w.json", {"images": [{"id": 1}, {"id": 3}], "annotations": notes})
    assert "1 images have no caption: 3" in refused("caption", "--predictions", said, "--references", without)


# --- POPE, whose official answers have nothing but their order ---


def labels(tmp_path: Path, name: str, words: list[str]) -> Path:
    rows = [
        {
            "question_id": n,
            "image": f"COCO_{n}.jpg",
            "text": f"Is there a {word} in the image?",
            "label": "no" if n % 2 else "yes",
        }
        for n, word in enumerate(words, 1)
    ]
    return write(tmp_path / f"coco_pope_{name}.json", "".join(json.dumps(row) + "\n" for row in rows))


def test_pope_by_order(tmp_path: Path) -> None:
    refs = labels(tmp_path, "random", ["dog", "cat", "cup"])
    rows = [{"question": f"is there a {word} in the image?", "answer": said} for word, said in
            (("dog", "No"), ("cat", "Yes"), ("cup", "Yes, one."))]  # fmt: skip
    said = write(tmp_path / "said.jsonl", rows)
    scores = score("pope", "--predictions", said, "--references", refs)["scores"]
    assert scores["accuracy"] == scores["accuracy/random"] == pytest.approx(2 / 3)
    assert scores["recall"] == 1
    swapped = write(tmp_path / "swapped.jsonl", [rows[1], rows[0], rows[2]])
    assert "not in the order of the labels" in refused("pope", "--predictions", swapped, "--references", refs)
    short = write(tmp_path / "short.jsonl", rows[:2])
    assert "3 labels and 2 answers" in refused("pope", "--predictions", short, "--references", refs)


def test_pope_of_llava_by_category(tmp_path: Path) -> None:
    sets = {"adversarial": ["dog", "cat"], "popular": ["cup", "car"], "random": ["bed", "bus"]}
    refs = [labels(tmp_path, name, words) for name, words in sets.items()]
    asked = [
        {"question_id": 100 * s + n, "image": f"COCO_{n}.jpg", "category": name,
         "text": f"Is there a {word} in the image?\nAnswer the question using a single word or phrase."}
        for s, (name, words) in enumerate(sets.items()) for n, word in enumerate(words, 1)
    ]  # fmt: skip
    questions = write(tmp_path / "q.jsonl", asked)
    answers = [{"question_id": row["question_id"], "prompt": row["text"], "text": "Yes"} for row in asked]
    said = write(tmp_path / "a.jsonl", answers)
    result = score("pope", "--predictions", said, "--questions", questions, "--references", *refs)
    assert result["n"] == 6
    assert result["scores"]["f1/popular"] == pytest.approx(2 / 3)
    assert result["scores"]["yes_ratio"] == 1
    message = refused(
        "pope",
        "--predictions",
        write(tmp_path / "b.jsonl", answers[:-1]),
        "--questions",
        questions,
        "--references",
        *refs,
    )
    assert "missing: 202" in message
    assert "Give LLaVA's question file" in refused("pope", "--predictions", said, "--references", *refs)
    assert "answers of the sets random" in refused(
        "pope", "--predictions", said, "--questions", questions, "--references", *refs[:2]
    )


def test_pope_by_id_where_both_sides_have_it(tmp_path: Path) -> None:
    refs = labels(tmp_path, "random", ["dog", "cat"])
    rows = [{"question_id": 2, "answer": "yes"}, {"question_id": 1, "answer": "no"}]
    said = write(tmp_path / "a.jsonl", rows)
    assert score("pope", "--predictions", said, "--references", refs)["scores"]["accuracy"] == 1
    wrong = write(tmp_path / "b.jsonl", [{"question_id": 7, "answer": "no"}, rows[0]])
    assert "random/7" in refused("pope", "--predictions", wrong, "--references", refs)
    label = write(tmp_path / "coco_pope_popular.json", '{"question_id": 1, "text": "?", "label": "maybe"}\n')
    assert "json:1: the label is 'maybe'" in refused("pope", "--predictions", said, "--references", label)


# --- the real files that lie beside the repository ---


@pytest.mark.skipif(not SAMPLES.is_dir(), reason=f"the real samples are not at {SAMPLES}")
def test_the_right_answers_to_the_real_problems_score_full_marks(tmp_path: Path) -> None:
    problems = json.loads((SAMPLES / "scienceqa/problems.json").read_text())
    test = json.loads((SAMPLES / "scienceqa/pid_splits.json").read_text())["test"]
    said = write(tmp_path / "a.jsonl", [{"question_id": pid, "text": "ABCDE"[problems[pid]["answer"]]} for pid in test])
    result = score("scienceqa", "--predictions", said, "--references", SAMPLES / "scienceqa/problems.json")
    assert result["n"] == len(test) == 210
    assert set(result["scores"].values()) == {100}

    examples = {
        path.parent.name: json.loads(path.read_text()) for path in (SAMPLES / "iconqa_examples").rglob("data.json")
    }
    results = write(tmp_path / "r.json", {"results": {pid: entry["answer"] for pid, entry in examples.items()}})
    result = score("iconqa", "--predictions", results, "--references", SAMPLES / "iconqa_examples")
    assert result["n"] == 150
    assert set(result["scores"].values()) == {100}


def test_the_page_of_metrics_is_up_to_date() -> None:
    check = [sys.executable, "scripts/metrics_page.py", "--check"]
    done = subprocess.run(check, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
