"""What training kept: the figures are those of the plain computation, before is the base, and it is measured once."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import tiny
from peft_mllm import retention
from peft_mllm.assets import PLAIN_TEXT
from peft_mllm.data.encode import IGNORED
from peft_mllm.models import MODELS
from peft_mllm.retention import TEXT, Subject, answers_of, measure, measure_base, plain_text, retained
from peft_mllm.study.analyse import analyse
from peft_mllm.study.pages.runs import details
from peft_mllm.study.reading import read_study
from peft_mllm.study.view import View
from peft_mllm.tuned import untouched
from peft_mllm.world import World
from runs import command, read, write_spec
from runs import tiny as tiny_spec

RECORDS = [record for record in tiny.mixed_records() if record.id in ("a1", "a2", "b1", "text", "pair1")]


def figures(tuned, subject, rows=2):
    return measure(tuned, [subject], rows=rows, world=World())[subject.name]


@pytest.mark.parametrize("method", ["lora", "prefix"])
def test_the_figures_are_those_of_the_plain_computation(method):
    tuned = tiny.stir(tiny.tune(method), spread=0.5)
    family = tuned.family
    subject = answers_of("mixed", RECORDS, family, most=4)
    assert len(subject.samples) == 4
    losses, hits, whole = [], [], []
    for sample in subject.samples:
        batch = tiny.padded(family, [sample])
        with torch.no_grad():
            logits = tuned.answer_logits(batch)
        losses.append(torch.nn.functional.cross_entropy(logits, batch.targets, reduction="none"))
        hits.append(logits.argmax(1) == batch.targets)
        whole.append(bool(hits[-1].all()))
    found = figures(tuned, subject, rows=3)
    assert found["tokens"] == sum(map(len, losses))
    assert found["loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)
    assert found["token_accuracy"] == pytest.approx(100 * torch.cat(hits).float().mean().item())
    assert found["exact"] == pytest.approx(25 * sum(whole))
    assert figures(tuned, subject, rows=1)["loss"] == pytest.approx(found["loss"], rel=1e-5)


def test_exact_is_what_greedy_decoding_would_say():
    tuned = tiny.tune("none")
    record = RECORDS[0]
    prompt = tiny.prompts(tuned.family, [record])
    said = tuned.generate(prompt, do_sample=False, max_new_tokens=3, min_new_tokens=3)[0].tolist()
    ids = tuned.family.encode(record, answer=False).ids
    made = tuned.family.encode(record)
    as_said = replace(
        made,
        ids=(*ids, *said),
        labels=(IGNORED,) * len(ids) + tuple(said),
        extras={name: values[:1] * (len(ids) + 3) for name, values in made.extras.items()},
    )
    other = replace(as_said, ids=(*ids, *said[:2], 7), labels=(*as_said.labels[:-1], 7))
    assert figures(tuned, Subject("x", (as_said,), True))["exact"] == 100
    assert figures(tuned, Subject("x", (as_said, other), True))["exact"] == 50


@pytest.mark.parametrize("family", list(MODELS))
def test_plain_text_is_all_there(family):
    made = tiny.family(family)
    subject = plain_text(made)
    assert subject is not None
    assert max(len(sample.ids) for sample in subject.samples) <= retention.CHUNK
    assert len(subject.samples) >= 8
    tokens = sum(len(sample.ids) for sample in subject.samples)
    expected = sum(len(made.tokenizer(part.strip())["input_ids"]) for part in PLAIN_TEXT.read_text().split("\n\n"))
    assert tokens == expected
    found = figures(untouched(made), Subject(TEXT, subject.samples[:2], answers=False))
    assert found["loss"] > 0
    assert "exact" not in found
    assert found["tokens"] == sum(len(sample.ids) - 1 for sample in subject.samples[:2])


def test_the_base_is_measured_once(tmp_path, monkeypatch):
    monkeypatch.setenv("PEFT_MLLM_CACHE", str(tmp_path))
    measured = []
    real = retention.measure
    monkeypatch.setattr(
        retention, "measure", lambda t, s, **o: (measured.extend(x.name for x in s), real(t, s, **o))[1]
    )
    tuned = untouched(tiny.family())
    subjects = [answers_of("a", RECORDS[:2], tuned.family, most=8), answers_of("b", RECORDS[2:], tuned.family, most=8)]

    def base(fingerprint="base", some=subjects):
        return measure_base(tuned, some, fingerprint=fingerprint, rows=2, world=World())

    first = base()
    assert measured == ["a", "b"]
    assert base() == first
    assert measured == ["a", "b"]
    base(fingerprint="another")
    assert measured == ["a", "b"] * 2
    base(some=[replace(subjects[0], samples=subjects[1].samples[:1])])
    assert measured == ["a", "b", "a", "b", "a"]
    for file in (tmp_path / "retention").iterdir():
        file.write_text(file.read_text().replace("loss", "lost"))
    assert base() == first, "a damaged file is measured again"
    assert len(measured) == 7
    monkeypatch.setenv("PEFT_MLLM_CACHE", "/dev/null/no")
    assert base() == first, "nor is a cache needed"


def test_a_result_says_what_was_forgotten(tmp_path):
    small = {"name": "scenes_count", "size": {"test": 6}}
    task = {"name": "scenes_blank", "size": {"train": 16, "validation": 0, "test": 4}}
    few = {"max_steps": 6, "learning_rate": 3e-2, "eval_strategy": "no", "save_strategy": "no"}
    spec = tiny_spec(tmp_path / "run", model="embedded", task=task, evaluate=[small], train=few)
    said = command("train", write_spec(tmp_path / "s.yaml", spec))
    assert said.code == 0, said.err
    kept = read(tmp_path / "run/result.json")["retention"]
    assert set(kept) == {TEXT, "scenes_count"}
    for sides in kept.values():
        assert sides["before"]["loss"] != sides["after"]["loss"]
        assert sides["before"]["tokens"] == sides["after"]["tokens"]
    assert kept["scenes_count"]["before"]["exact"] == 100, "the base knows this task"
    assert kept["scenes_count"]["after"]["loss"] > kept["scenes_count"]["before"]["loss"]
    assert "retention, plain text: loss" in said.err
    texts = details(View(analyse(read_study(tmp_path / "run"))))["texts"]
    assert any(text.endswith(" after") and "the reference to the token: 100.0" in text for text in texts)

    zero = tiny_spec(tmp_path / "zero", model="embedded", method="none", task=task, evaluate=[small])
    assert command("train", write_spec(tmp_path / "z.yaml", zero)).code == 0
    untrained = read(tmp_path / "zero/result.json")["retention"]
    assert untrained == retained(
        {name: sides["before"] for name, sides in kept.items()}, {name: sides["before"] for name, sides in kept.items()}
    )
    off = json.loads(
        command(
            "train",
            tmp_path / "z.yaml",
            f"output_dir={tmp_path / 'off'}",
            "retention={text: false, samples: 0}",
            "--json",
        ).out
    )
    assert off["retention"] == {}
