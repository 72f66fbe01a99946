"""Captions: tokens as Stanford's program has them, and the COCO scorer's figures to 1e-9."""

import importlib.util
import json
import shutil

import pytest

from peft_mllm.errors import DataError
from peft_mllm.metrics import Given, metric_named
from peft_mllm.metrics.text.ngrams import bleu, cider_d, rouge_l
from peft_mllm.metrics.text.ptb import PUNCTUATION, ptb_tokens, tokenise
from peft_mllm.record import Record, Turn
from peft_mllm.scoring import score_files


@pytest.fixture(scope="module")
def example(cases):
    return cases / "metrics/coco_fakecap"


def load(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_tokens_are_stanfords_line_for_line(cases):
    folder = cases / "metrics/ptb_tokenizer"
    lines = (folder / "hypo_4000.txt").read_text(encoding="utf-8").splitlines()
    expected = (folder / "tokenized_hypo_4000.txt").read_text(encoding="utf-8").splitlines()
    assert len(lines) == len(expected) == 4000
    without = [" ".join(token for token in line.split(" ") if token not in PUNCTUATION) for line in expected]
    assert [" ".join(tokens) for tokens in ptb_tokens(lines)] == [line.strip() for line in expected]
    assert tokenise(lines) == [line.strip() for line in without]


def test_edge_cases_are_stanfords(cases):
    for raw, expected in load(cases / "metrics/ptb_tokenizer/expected.json")["edge_cases"].items():
        assert tokenise([raw]) == [expected]


@pytest.mark.parametrize(
    ("raw", "tokens"),
    [
        ("can't it's dogs' he'd've", "ca n't it 's dogs ' he 'd 've"),
        ("cannot gonna 'tis y'all rock'n'roll", "can not gon na 't is y' all rock 'n' roll"),
        ("Mr. and Dr. no. 5 p.m. dog.", "mr. and dr. no. 5 p.m. dog ."),
        ("the U.S. The end", "the u.s. . the end"),
        ("plan B. The end", "plan b . the end"),
        ("etc. And", "etc. . and"),
        ("1 1/2 and/or 3.5 1,000 -5 10:30", "1\u00a01/2 and/or 3.5 1,000 -5 10:30"),
        ('"hi" (a) [b] {c}', "`` hi '' -lrb- a -rrb- -lsb- b -rsb- -lcb- c -rcb-"),
        ("\u00bd \u20ac5 50% #1 A&B R&B", "1/2 $ 5 50 % # 1 a&b r&b"),
        ("www.foo.com me@x.org photo.jpg @joe #tag", "www.foo.com me@x.org photo.jpg @joe #tag"),
        ("a--b - \u2014 wait... ?! !!!", "a -- b - -- wait ... ?! !!!"),
        (":) ^_^ <br> <", ":-rrb- ^_^ <br> <"),
        ("x\u200by \U0001f600 \u2603", "x y \u2603"),
    ],
)
def test_what_the_program_does_to_odd_text(raw, tokens):
    assert " ".join(ptb_tokens([raw])[0]) == tokens


def test_an_abbreviation_looks_at_the_next_line():
    assert ptb_tokens(["etc.", "Then", "etc.", "then"]) == [["etc.", "."], ["then"], ["etc."], ["then"]]


def test_tokens_of_the_example_are_the_official_ones(example):
    expected = load(example / "expected_ptb_tokens.json")
    captions = {}
    for annotation in load(example / "captions_val2014_fakecap_refs.json")["annotations"]:
        captions.setdefault(str(annotation["image_id"]), []).append(annotation["caption"])
    assert {key: tokenise(texts) for key, texts in captions.items()} == expected["refs"]


def test_figures_are_the_official_ones_of_the_corpus_and_of_each_image(example):
    results, refs = (example / f"captions_val2014_fakecap_{name}.json" for name in ("results", "refs"))
    scored = score_files("caption", metric_named("caption"), Given([results], [refs]))
    overall = load(example / "expected.json")["overall"]
    assert set(scored.scores.values) == set(overall) - {"METEOR"}
    for name, value in scored.scores.values.items():
        assert value == pytest.approx(overall[name], abs=1e-9)
    each = load(example / "expected_per_image.json")
    assert len(scored.records) == len(each) == 1000
    worst = max(
        abs(value - each[line["id"]][name])
        for line in scored.lines()
        for name, value in line.items()
        if name in overall
    )
    assert worst < 1e-9
    assert sum(scored.scores.per_question) / 1000 == pytest.approx(scored.scores.headline, abs=1e-12)


def test_untokenised_is_what_another_suite_prints(example):
    results, refs = (example / f"captions_val2014_fakecap_{name}.json" for name in ("results", "refs"))
    values = score_files("caption", metric_named("caption:untokenised"), Given([results], [refs])).scores.values
    expected = load(example / "expected.json")["alternatives_for_tolerance"]["raw_no_tokenisation(VLMEvalKit)"]
    assert {name: round(values[name], 6) for name in expected} == expected


def test_small_figures_by_hand():
    assert cider_d(["a b"], [["a b"]]).corpus == 0, "one image: every n-gram is in every document"
    assert rouge_l(["a b c"], [["a c"]]).corpus == pytest.approx((1 + 1.44) * (2 / 3) * 1 / (1 + 1.44 * 2 / 3))
    assert bleu(["a b c d"], [["a b c d", "x"]])[3].corpus == pytest.approx(1, abs=1e-8)
    assert bleu(["a b"], [["a b c", "a"]])[0].corpus == pytest.approx(1), "of two as close, the shorter"
    assert rouge_l([""], [["a"]]).corpus == 0


def test_a_record_without_references_has_its_answer():
    records = [
        Record(str(n), (Turn("user", "?"), Turn("assistant", text))) for n, text in enumerate(("A dog.", "a cat"))
    ]
    assert metric_named("caption").score(["a dog", "A cat!"], records).values["ROUGE_L"] == pytest.approx(1)


def test_meteor_without_java_says_what_is_missing(monkeypatch):
    record = Record("1", (Turn("user", "?"), Turn("assistant", "a dog")))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(DataError, match=r"METEOR is a Java program, and there is no 'java'"):
        metric_named("caption:meteor").score(["a dog"], [record])


@pytest.mark.skipif(importlib.util.find_spec("pycocoevalcap") is not None, reason="pycocoevalcap is installed")
def test_meteor_without_the_extra_says_how_to_get_it(monkeypatch):
    record = Record("1", (Turn("user", "?"), Turn("assistant", "a dog")))
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/java")
    with pytest.raises(DataError, match=r"pip install 'peft-mllm\[java\]'"):
        metric_named("caption:meteor").score(["a dog"], [record])


@pytest.mark.skipif(importlib.util.find_spec("pycocoevalcap") is None, reason="the extra 'java' is not installed")
@pytest.mark.skipif(shutil.which("java") is None, reason="there is no Java")
def test_meteor_is_the_official_one_of_each_image(example):
    results = load(example / "captions_val2014_fakecap_results.json")[:20]
    each = load(example / "expected_per_image.json")
    refs = load(example / "captions_val2014_fakecap_refs.json")["annotations"]
    records = [
        Record(str(one["image_id"]), (Turn("user", "?"), Turn("assistant", "")), meta={
            "references": [ref["caption"] for ref in refs if ref["image_id"] == one["image_id"]]
        })
        for one in results
    ]  # fmt: skip
    scores = metric_named("caption:meteor").score([one["caption"] for one in results], records)
    for record, detail in zip(records, scores.details, strict=True):
        assert detail["METEOR"] == pytest.approx(each[record.id]["METEOR"], abs=1e-9)
