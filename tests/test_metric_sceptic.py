"""Scores against plain re-computations from the published rules, on answers made at random."""

from __future__ import annotations

import math
import random
import re
from collections import Counter

import pytest

from peft_mllm.metrics import metric_named
from peft_mllm.metrics.text.objects import objects_of
from peft_mllm.metrics.text.ptb import ptb_tokens
from peft_mllm.metrics.text.vqa_words import contractions, vizwiz_contractions
from peft_mllm.record import Record, Turn


def record(key, answer, **meta):
    return Record(str(key), (Turn("user", "?"), Turn("assistant", answer)), meta=meta)


# --- VQA: the official steps one by one, and a mean over nine of ten that leaves each answer out by hand ---

POOL = [
    "yes", "Yes", "YES", "no", "the cat", "a cat", "cat", "cats.", "2", "two", "Two dogs", "1,000", "1,000 - 2", "3.5",
    "3.", ".5", "u.s.a.", "don't", "dont", "what's up?", "t-shirt", "black/white", "black / white", "red, white",
    "none", "\tblue\n", "", "the", "$5.00", "10:30", "somebody'd", "let's", "it's ok, right?", "." * 40,
    "caf\u00e9", "\u00bd",
]  # fmt: skip
MARKS = [";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@", "`", ",", "?", "!"]
NUMBERS = {"none": "0"} | {word: str(n) for n, word in enumerate(
    ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"])}  # fmt: skip


def no_punctuation(text):
    out = text
    for mark in MARKS:
        touches = mark + " " in text or " " + mark in text or re.search(r"(\d)(\,)(\d)", text)
        out = out.replace(mark, "" if touches else " ")
    return re.compile(r"(?!<=\d)(\.)(?!\d)").sub("", out, count=int(re.UNICODE))


def digits_and_articles(text, table):
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(table.get(word, word) for word in words if word not in ("a", "an", "the"))


def stripped(text):
    return text.replace("\n", " ").replace("\t", " ").strip()


def normal(text, table=None):
    return digits_and_articles(no_punctuation(stripped(text)), contractions() if table is None else table)


def evalai(text):
    return normal(text.lower().replace(",", "").replace("?", "").replace("'s", " 's"))


def nine_of_ten(given, answers):
    without = [answers[:i] + answers[i + 1 :] for i in range(len(answers))]
    return sum(min(1, sum(answer == given for answer in each) / 3) for each in without) / len(answers)


def vqa_by_hand(variant, given, answers):
    if variant == "official":
        given, answers = stripped(given), [stripped(answer) for answer in answers]
        differ = len(set(answers)) > 1
        return nine_of_ten(normal(given), list(map(normal, answers))) if differ else nine_of_ten(given, answers)
    if variant == "official-2015":
        differ = len(set(answers)) > 1
        return nine_of_ten(normal(given), [no_punctuation(answer) if differ else answer for answer in answers])
    if variant == "m4c":
        return nine_of_ten(evalai(given), list(map(evalai, answers)))
    if variant == "vizwiz":
        return min(1, answers.count(normal(given, vizwiz_contractions())) / 3)
    return min(1, list(map(normal, answers)).count(normal(given)) / 3)


@pytest.mark.parametrize("variant", ["official", "official-2015", "m4c", "vizwiz", "n3"])
def test_vqa_is_the_rule_by_hand(variant):
    draw = random.Random(7)
    predictions, records, expected = [], [], []
    for key in range(400):
        few = draw.sample(POOL, draw.choice([1, 2, 3]))
        answers = [draw.choice(few) for _ in range(10)]
        given = draw.choice([*few, draw.choice(POOL), draw.choice(few).upper(), draw.choice(few) + "."])
        predictions.append(given)
        records.append(record(key, answers[0], answers=tuple(answers), answer_type=draw.choice(["number", "yes/no"])))
        expected.append(vqa_by_hand(variant, given, answers))
    assert 0 < sum(expected) < len(expected)
    scores = metric_named(f"vqa:{variant}").score(predictions, records)
    assert scores.per_question == pytest.approx(expected, abs=1e-12)
    assert scores.headline == pytest.approx(100 * sum(expected) / len(expected), abs=1e-9)
    numbers = [score for score, each in zip(expected, records, strict=True) if each.meta["answer_type"] == "number"]
    assert scores.values["accuracy/number"] == pytest.approx(100 * sum(numbers) / len(numbers), abs=1e-9)


# --- POPE: a table of four counts for each set ---


def test_pope_is_a_confusion_table_for_each_set():
    draw = random.Random(3)
    said = ["Yes", "No", "no.", "Yes, there is no dog", "There is not", "NO", "", "Nope.", "Yes. No", "No,", "not-"]
    names = ["adversarial"] * 30 + ["random"] * 20 + ["popular"] * 25
    answers = [draw.choice(said) for _ in names]
    labels = [draw.choice(["yes", "no"]) for _ in names]
    records = [record(n, label, category=name) for n, (label, name) in enumerate(zip(labels, names, strict=True))]
    values = metric_named("pope").score(answers, records).values
    each = []
    for name in ("random", "popular", "adversarial"):
        count = Counter()
        for answer, label, of in zip(answers, labels, names, strict=True):
            if of == name:
                text = answer.split(".")[0] if answer.find(".") != -1 else answer
                words = text.replace(",", "").split(" ")
                count["no" if "No" in words or "not" in words or "no" in words else "yes", label] += 1
        tp, fp, fn, tn = (count[pair] for pair in (("yes", "yes"), ("yes", "no"), ("no", "yes"), ("no", "no")))
        precision, recall = tp / (tp + fp), tp / (tp + fn)
        total = tp + fp + fn + tn
        each.append({
            "accuracy": (tp + tn) / total, "precision": precision, "recall": recall,
            "f1": 2 * precision * recall / (precision + recall), "yes_ratio": (tp + fp) / total,
        })  # fmt: skip
        for figure, value in each[-1].items():
            assert values[f"{figure}/{name}"] == pytest.approx(value, abs=1e-12)
    for figure in each[0]:
        assert values[figure] == pytest.approx(sum(one[figure] for one in each) / 3, abs=1e-12)


# --- captions: the formulas written out, on tokens that are words already ---


def grams(words, n):
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def cider_by_hand(captions, references):
    images = len(captions)
    df = Counter(
        gram
        for refs in references
        for gram in {gram for ref in refs for n in range(1, 5) for gram in grams(ref.split(), n)}
    )

    def vector(text, n):
        idf = {gram: math.log(images) - math.log(max(1, df[gram])) for gram in grams(text.split(), n)}
        return {gram: count * idf[gram] for gram, count in grams(text.split(), n).items()}

    def norm(weights):
        return math.sqrt(sum(weight * weight for weight in weights.values()))

    each = []
    for caption, refs in zip(captions, references, strict=True):
        total = 0.0
        for ref in refs:
            difference = max(0, len(caption.split()) - 1) - max(0, len(ref.split()) - 1)
            for n in range(1, 5):
                mine, theirs = vector(caption, n), vector(ref, n)
                dot = sum(min(mine[gram], theirs.get(gram, 0)) * theirs.get(gram, 0) for gram in mine)
                lengths = norm(mine) * norm(theirs)
                total += (dot / lengths if lengths else dot) * math.exp(-(difference**2) / 72)
        each.append(10 * total / 4 / len(refs))
    return each


def test_cider_is_the_formula_by_hand():
    draw = random.Random(11)
    words = ["dog", "cat", "runs", "sits", "red", "mat", "on", "big"]

    def text():
        return " ".join(draw.choice(words) for _ in range(draw.choice([1, 2, 5, 9])))

    references = [tuple(text() for _ in range(draw.choice([1, 3, 5]))) for _ in range(30)]
    captions = [draw.choice(refs) if n % 3 else text() for n, refs in enumerate(references)]
    records = [record(n, refs[0], references=refs) for n, refs in enumerate(references)]
    scores = metric_named("caption").score(captions, records)
    expected = cider_by_hand(captions, references)
    assert scores.per_question == pytest.approx(expected, abs=1e-9)
    assert scores.headline == pytest.approx(sum(expected) / len(expected), abs=1e-9)


# --- words as the tokenisers of the official scorers part them ---


@pytest.mark.parametrize(
    ("caption", "objects"),
    [
        ("The kids' bikes, and the dogs', and a cat", ["person", "bicycle", "dog", "cat"]),
        ("a dog\u2014cat", ["dog", "cat"]),
        ("a car\u2013cat", ["car", "cat"]),
        ("(the dogs')", ["dog"]),
    ],
)
def test_chair_splits_words_as_nltk(caption, objects):
    assert [name for _, name in objects_of(caption)] == objects


@pytest.mark.parametrize(
    ("raw", "tokens"),
    [
        ("Yahoo! is", "yahoo ! is"),
        ("E! of", "e ! of"),
        ("'EM x", "'em x"),
        ("OL' x", "ol' x"),
        ("EV'RY", "ev'ry"),
        ("HTTP://X.ORG/a x", "http://x.org/a x"),
        ("&AMP; x", "& x"),
        ("&nbsp; x", "x"),
        ("RIDE B. THE DOG", "ride b . the dog"),
        ("U.S. THE x", "u.s. . the x"),
        ("-lrb- x", "-lrb- x"),
        ("CAP'N", "cap'n"),
        ("'90S x", "'90s x"),
    ],
)
def test_tokens_of_odd_case_are_stanfords(raw, tokens):
    assert " ".join(ptb_tokens([raw, "zz"])[0]) == tokens
