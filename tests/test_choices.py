"""Multiple choice by likelihood: the figures are those of the plain computation, and the rule is in the result."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import tiny
from peft_mllm import choices
from peft_mllm.choices import RULES, choices_of, choose, tree_of, trees_of
from peft_mllm.evaluation import evaluate
from peft_mllm.record import Turn
from peft_mllm.spec import GenerationSpec
from peft_mllm.world import World
from runs import command, lines

TEXTS = ("red", "a red circle", "the blue one", "none of these, as it seems")
PROMPT_METHOD = ("peft", {"type": "PROMPT_TUNING", "config": {"num_virtual_tokens": 4}})


def choice(id, *, letters=False, images=(1,), index=1, texts=TEXTS):
    mark = "<image>\n" * len(images)
    answer = "ABCDE"[index] if letters else texts[index]
    made = tiny.record(id, f"{mark}What is it? {id}", answer, images=images)
    return replace(made, meta={"choices": texts, "answer_index": index})


RECORDS = [choice("a"), choice("b", letters=True), choice("c", images=()), choice("d", images=(1, 2), index=0)]


def plain_losses(tuned, record, texts):
    """Each choice alone, by the model's own forward: cross-entropy of its tokens, without the end mark."""
    family = tuned.family
    found = []
    for text in texts:
        sample = family.encode(replace(record, turns=(*record.question, Turn("assistant", text))))
        start = len(family.encode(record, answer=False).ids)
        ids = sample.ids[start:]
        ids = ids[: next((i for i, token in enumerate(ids) if token in family.stops), len(ids))]
        batch = tiny.padded(family, [sample])
        with torch.no_grad():
            logits = tuned.base(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **batch.pixels).logits[
                0
            ]
        losses = torch.nn.functional.cross_entropy(
            logits[start - 1 : start - 1 + len(ids)], torch.tensor(ids), reduction="none"
        )
        found.append(losses)
    return found


@pytest.mark.parametrize("family", ["llava", "qwen_vl"])
@pytest.mark.parametrize("method", ["lora", "prefix"])
def test_trees_give_the_figures_of_the_plain_computation(family, method):
    tuned = tiny.stir(tiny.tune(method, on=tiny.family(family)))
    tuned.model.eval()
    padded = replace(tuned, trees=False)
    for rule in RULES:
        by_tree = choose(tuned, RECORDS, rule, rows=4, pad_id=0)
        by_rows = choose(padded, RECORDS, rule, rows=3, pad_id=0)
        for record, one, other in zip(RECORDS, by_tree, by_rows, strict=True):
            texts = choices_of(record)
            torch.testing.assert_close(torch.tensor(one.losses), torch.tensor(other.losses), rtol=1e-5, atol=1e-6)
            assert one.text == other.text == texts[min(range(4), key=one.losses.__getitem__)]
            assert (one.stop, one.tokens > 0) == ("choice", True)
    if method == "lora":
        for rule in RULES:
            for record, answer in zip(RECORDS, choose(tuned, RECORDS, rule, rows=4, pad_id=0), strict=True):
                texts = choices_of(record)
                losses = plain_losses(tuned, record, texts)
                expected = {
                    "likelihood": [each.mean().item() for each in losses],
                    "likelihood_sum": [each.sum().item() for each in losses],
                    "likelihood_chars": [
                        each.sum().item() / len(text) for each, text in zip(losses, texts, strict=True)
                    ],
                }[rule]
                assert answer.losses == pytest.approx(expected, rel=1e-4)


def test_the_rules_choose_differently():
    """A long choice costs more in all and less a token: on some questions the three rules part."""
    tuned = tiny.stir(tiny.tune("lora"))
    records = [choice(f"q{i}", images=(i,)) for i in range(12)]
    taken = {rule: [answer.text for answer in choose(tuned, records, rule, rows=4, pad_id=0)] for rule in RULES}
    assert taken["likelihood"] != taken["likelihood_sum"]


def test_a_method_without_trees_chooses_too():
    name, options = PROMPT_METHOD
    tuned = tiny.stir(tiny.tune(name, **options))
    tuned.model.eval()
    assert not tuned.trees
    together = choose(tuned, RECORDS, "likelihood", rows=8, pad_id=0)
    alone = [choose(tuned, [record], "likelihood", rows=1, pad_id=0)[0] for record in RECORDS]
    for one, other in zip(together, alone, strict=True):
        assert one.text == other.text
        assert one.losses == pytest.approx(other.losses, rel=1e-4)


def test_the_question_is_shared_and_no_choice_is():
    family = tiny.family()
    record = choice("a", texts=("red one", "red two"))
    samples = [
        family.encode(replace(record, turns=(*record.question, Turn("assistant", text)))) for text in choices_of(record)
    ]
    tree = tree_of(samples)
    assert tree.shared == len(family.encode(record, answer=False).ids)
    assert tree.shared > samples[0].image_end


def asked_as(family, records):
    """Each record with each of its choices."""
    return [
        [
            family.encode(replace(record, turns=(*record.question, Turn("assistant", text))))
            for text in choices_of(record)
        ]
        for record in records
    ]


def several(id, words, *, images=(1,)):
    """A question of so many words about an image, with two choices."""
    return choice(f"{id} {'word ' * words}", images=images, texts=("yes", "no"))


def test_questions_share_their_image_where_that_costs_less():
    family, wide = tiny.family(), 4096

    def rows(asked, width=wide):
        return [sorted({sample.id.split()[0] for sample in tree.samples}) for tree in trees_of(asked, width)]

    short = asked_as(family, [several("a", 0), several("b", 0), several("c", 1, images=(2,)), several("d", 0)])
    assert rows(short) == [["a", "b", "d"], ["c"]]
    assert all(tree.shared >= tree.samples[0].image_end for tree in trees_of(short, wide))
    long = asked_as(family, [several("a", 60), several("b", 60)])
    assert rows(long) == [["a"], ["b"]], "else each question is computed for each choice"
    between = asked_as(family, [several(name, 4) for name in "abcd"])
    assert rows(between) == [["a", "b", "c", "d"]]
    assert rows(between, 4) == [["a"], ["b"], ["c"], ["d"]], "where scores are all that counts"
    alone = [several(f"x{n}", 0, images=(n,)) for n in range(2, 9)]
    uneven = asked_as(family, [*(several(f"{i}", 0) for i in range(12)), *alone])
    assert len(rows(uneven)) == 19, "padding counts"
    texts = asked_as(family, [choice("a", images=()), choice("b", images=())])
    assert rows(texts) == [["a"], ["b"]]


@pytest.mark.parametrize("method", ["lora", "prefix"])
@pytest.mark.parametrize("family", ["llava", "qwen_vl"])
def test_sharing_an_image_changes_no_figure(family, method, monkeypatch):
    monkeypatch.setattr(choices, "trees_of", lambda asked, width: trees_of(asked, 4096))
    tuned = tiny.stir(tiny.tune(method, on=tiny.family(family)))
    tuned.model.eval()
    records = [several("a", 0), several("b", 0, images=(2,)), several("c", 1), several("d", 0), choice("e", images=())]
    assert len(choices.trees_of(asked_as(tuned.family, records[:4]), 32)) == 2
    for some in (records, records[:4]):
        by_tree = choose(tuned, some, "likelihood", rows=4, pad_id=0)
        alone = [choose(replace(tuned, trees=False), [each], "likelihood", rows=4, pad_id=0)[0] for each in some]
        for one, other in zip(by_tree, alone, strict=True):
            torch.testing.assert_close(torch.tensor(one.losses), torch.tensor(other.losses), rtol=1e-5, atol=1e-6)
            assert one.text == other.text
    assert len({answer.losses for answer in by_tree}) > 2


# --- the proof ---


def all_before(segments, *, last=None):
    """A mask by which a choice sees those beside it."""
    return torch.ones(segments.shape[1], segments.shape[1], dtype=torch.bool).tril().expand(len(segments), 1, -1, -1)


def by_choice(tuned, records, **more):
    return evaluate(
        tuned, records, metric="exact", max_new_tokens=3, generation=GenerationSpec(choices="likelihood"), batch_size=3,
        seed=0, world=World(), **more,
    )  # fmt: skip


@pytest.mark.parametrize("family", ["llava", "qwen_vl"])
def test_the_proof_finds_what_is_wrong_and_plain_rows_answer(family, monkeypatch):
    tuned = tiny.stir(tiny.tune("lora", on=tiny.family(family)))
    plain = by_choice(replace(tuned, trees=False), RECORDS)
    assert plain.proofs == {}
    right = by_choice(tuned, RECORDS)
    assert right.summary()["proofs"]["choices"]["passed"]
    tuned.proofs.clear()
    monkeypatch.setattr("peft_mllm.data.trees.tree_mask", all_before)
    said = []
    for _ in range(2):
        found = by_choice(tuned, RECORDS, note=said.append)
        assert found.predictions == plain.predictions == right.predictions
        for one, other in zip(found.answers, plain.answers, strict=True):
            assert one.losses == pytest.approx(other.losses, rel=1e-5)
        proof = found.summary()["proofs"]["choices"]
        assert proof["difference"] > proof["tolerance"]
    assert len(said) == 1
    assert "trees of choices do not give the logits of prompts one by one" in said[0]


def test_each_kind_of_tree_is_proven_and_once(monkeypatch):
    """The choices of a question, and those of two questions behind their image."""
    tuned, trees = tiny.stir(tiny.tune("lora")), []
    real = choices.collate
    monkeypatch.setattr(choices, "collate", lambda some, **how: (trees.append(some), real(some, **how))[1])
    text, images = [choice("t", images=())], [several("a", 0), several("b", 0), several("c", 0, images=(2,))]
    by_choice(tuned, text)
    assert list(tuned.proofs) == ["choices_of_text"]
    by_choice(tuned, images)
    assert list(tuned.proofs) == ["choices_of_text", "choices"]
    assert all(proof.passed for proof in tuned.proofs.values())
    assert [[len(tree.samples) for tree in some] for some in trees[:1] + trees[2:3]] == [[4], [2, 4]]
    assert [{sample.id.split()[0] for sample in tree.samples} for tree in trees[2]] == [{"a"}, {"a", "b"}]
    tried = len(trees)
    by_choice(tuned, images)
    by_choice(tuned, text)
    assert len(trees) == tried + 2


def test_choices_are_written_as_the_task_answers():
    assert choices_of(choice("a")) == TEXTS
    assert choices_of(choice("a", letters=True)) == ("A", "B", "C", "D")
    assert choices_of(tiny.record("a", "What?", "red")) == ()
    assert choices_of(replace(choice("a"), meta={"choices": ("x", "y"), "answer_index": 1})) == ()
    assert choices_of(replace(choice("a"), meta={"choices": TEXTS})) == ()
    twice = choice("a", texts=("red", "red", "blue"), index=2)
    assert choices_of(twice) == ()


def test_the_rule_is_named_and_the_rest_is_generated():
    tuned = tiny.tune("none")
    records = [*RECORDS, tiny.record("free", "What now?", "nothing")]

    def asked(some, choices):
        return evaluate(
            tuned, some, metric="exact", max_new_tokens=3, generation=GenerationSpec(choices=choices), batch_size=3,
            seed=0, world=World(),
        )  # fmt: skip

    done = asked(records, "likelihood")
    assert [answer.stop == "choice" for answer in done.answers] == [True] * 4 + [False]
    assert "4 by likelihood: the choice of the lowest mean" in done.answering
    assert "other 1 generated, greedy" in done.answering
    assert all(answer.text in choices_of(record) for answer, record in zip(done.answers, RECORDS, strict=False))
    assert asked(RECORDS, "likelihood_sum").answering == f"by likelihood: {RULES['likelihood_sum']}"
    assert len(next(iter(done.lines()))["choice_losses"]) == 4
    assert asked(records, "generate").answering == "generated, greedy"


def test_the_verb_on_real_questions(tmp_path, cases):
    root = cases / "data" / "iconqa_examples"
    task = f"{{name: iconqa_txt, root: {root}}}"
    words = ("evaluate", "embedded", "--task", task, "--limit", "6", "--output", tmp_path / "out", "--json")
    said = command(*words, "--choices", "likelihood")
    assert said.code == 0, said.err
    score = json.loads(said.out)["iconqa_txt"]
    assert "by likelihood" in score["answering"]
    assert score["unparsed"] == 0
    for line in lines(tmp_path / "out/predictions/iconqa_txt.jsonl"):
        assert len(line["choice_losses"]) > 1
        assert line["stop"] == "choice"
    again = json.loads(command(*words, "--choices", "likelihood").out)["iconqa_txt"]
    assert (again["resumed"], again["values"]) == (6, score["values"])
    assert json.loads(command(*words, "--choices", "generate").out)["iconqa_txt"]["resumed"] == 0
