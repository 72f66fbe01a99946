"""Asking at work: batches by image, answers that survive a kill, and which answers are never taken for others."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

import tiny
from peft_mllm import evaluation
from peft_mllm.answers import Answer, AnswerFile, question_key
from peft_mllm.evaluation import evaluate, options, pad_token
from peft_mllm.features import watch
from peft_mllm.prompts import prompt_of, together
from peft_mllm.spec import GenerationSpec
from peft_mllm.tuned import untouched
from peft_mllm.world import World
from runs import assert_same, command, fork_training, lines, read, status, train_forked, wait, write_spec
from runs import tiny as tiny_spec

ONE = "<image>\n"
RECORDS = [
    tiny.record(f"q{i}", f"{ONE}What is at place {i}{' or near it' * (i % 3)}?", f"thing {i}", images=(i % 4,))
    for i in range(11)
] + [tiny.record("text", "How many are two and two?", "four")]


def asked(tuned, records=RECORDS, *, size=4, path=None, identity="", generation=None, **rest):
    return evaluate(
        tuned, records, metric="exact", max_new_tokens=5, generation=generation or GenerationSpec(), batch_size=size,
        seed=1, world=World(), identity=identity, path=path, **rest,
    )  # fmt: skip


@pytest.fixture(scope="module")
def tuned():
    return tiny.stir(tiny.tune("lora"))


# --- batches by image ---


def test_questions_of_one_image_are_asked_together(tuned):
    family = tuned.family
    prompts = [prompt_of(r, family.encode(r, answer=False), family.tokenizer) for r in RECORDS]
    for size in (1, 3, 4, 8, 100):
        batches = together(prompts, size)
        assert sorted(i for batch in batches for i in batch) == list(range(len(RECORDS)))
        assert max(map(len, batches)) <= size
        assert batches == together(prompts, size)
        if size >= 3:  # three questions an image, at most
            homes = {images: {n for n, b in enumerate(batches) for i in b if prompts[i].images == images} for images in
                     {prompt.images for prompt in prompts}}  # fmt: skip
            assert all(len(places) == 1 for places in homes.values())


@pytest.mark.parametrize("family", ["llava", "qwen_vl"])
def test_batches_change_no_answer(family):
    """In float32 and greedy: whoever is asked beside a question, and however often the tower runs."""
    tuned = tiny.stir(tiny.tune("lora", on=tiny.family(family)))
    alone = asked(tuned, size=1)
    assert len(set(alone.predictions)) > 3, "a model that always says the same shows nothing"
    for size in (3, 5, 100):
        assert asked(tuned, size=size).answers == alone.answers


@pytest.mark.parametrize("beams", [1, 2])
def test_the_tower_sees_an_image_once(monkeypatch, beams):
    """By trees, and where transformers' generate is asked, if somebody watches."""
    family = tiny.family()
    watch(family)
    tuned = tiny.stir(tiny.tune("lora", on=family))
    seen, opened = [], []
    tower = tuned.base.get_submodule(tuned.family.anatomy.vision[0])
    load = tiny.Picture.load
    monkeypatch.setattr(tiny.Picture, "load", lambda self: (opened.append(self.number), load(self))[1])
    others = [tiny.record(f"o{i}", f"{ONE}What is {i}?", "x", images=(9,)) for i in range(2)]
    asked(tuned, others, size=2, generation=GenerationSpec(num_beams=beams))  # the proofs
    real = tower.forward
    monkeypatch.setattr(tower, "forward", lambda pixels, *a, **k: (seen.append(len(pixels)), real(pixels, *a, **k))[1])
    opened.clear()
    asked(tuned, RECORDS[:11], size=100, generation=GenerationSpec(num_beams=beams))
    assert (sum(seen), sorted(opened)) == (4, [0, 1, 2, 3])


# --- what a line holds ---


def test_a_line_holds_what_was_asked_and_how_it_ended(tuned, tmp_path):
    done = asked(tuned, path=tmp_path / "a.jsonl", identity="me")
    line, *_, text = done.lines()
    assert line["prompt"].count("<image>x4") == 1
    assert line["images"] == [image.key for image in RECORDS[0].images]
    assert text["images"] == []
    assert {line["stop"] for line in done.lines()} <= {"end", "length"}
    for answer in done.answers:
        assert 0 <= answer.tokens <= 5
        assert answer.stop == "end" or answer.tokens == 5
    assert len({line[key] for line in done.lines() for key in ("prompt_sha256", "question_sha256", "asked")}) == 36
    assert done.summary()["answering"] == "generated, greedy"
    assert done.summary()["conditions"]["model"] == "me"


def test_the_hash_of_a_question_is_the_models_own_and_that_of_its_words_is_not():
    records = [RECORDS[0]]
    one, other = (
        prompt_of(records[0], family.encode(records[0], answer=False), family.tokenizer)
        for family in (tiny.family("llava"), tiny.family("qwen_vl"))
    )
    assert one.question_sha256 == other.question_sha256
    assert one.sha256 != other.sha256


def test_an_end_is_told_from_a_cut(tuned):
    stops = [tuned.family.tokenizer.eos_token_id]
    row = [7, 8, stops[0], 3, 3]
    assert evaluation._answer(" x ", row, set(stops)) == Answer("x", 2, "end")
    assert evaluation._answer("x", row[:2], set(stops)) == Answer("x", 2, "length")
    assert options(tuned, GenerationSpec(), 3)["pad_token_id"] == pad_token(tuned)


# --- going on ---


class Stopped(Exception):  # noqa: N818
    pass


def stop_after(batches: int) -> Any:
    """A report that gives up after so many batches were asked, once the answers are on the disk."""
    count = -1  # the first report is of what was there

    def report(asked: int) -> None:
        nonlocal count
        count += 1
        if count == batches:
            raise Stopped

    return report


@pytest.fixture
def counted(monkeypatch):
    """The ids of the questions that are generated, in order."""
    ids: list[str] = []
    real = evaluation.ask
    monkeypatch.setattr(evaluation, "ask", lambda t, s, o, **k: (ids.extend(x.id for x in s), real(t, s, o, **k))[1])
    return ids


@pytest.mark.parametrize("sampled", [False, True])
def test_the_same_call_goes_on(tuned, tmp_path, counted, sampled):
    generation = GenerationSpec(do_sample=sampled, temperature=2.0)
    whole = asked(tuned, generation=generation)
    counted.clear()
    file = tmp_path / "a.jsonl"
    with pytest.raises(Stopped):
        asked(tuned, path=file, identity="me", generation=generation, report=stop_after(2))
    first = list(counted)
    counted.clear()
    again = asked(tuned, path=file, identity="me", generation=generation)
    assert not set(counted) & set(first)
    assert len(counted) + len(first) == len(RECORDS)
    assert again.resumed == len(first)
    assert again.answers == whole.answers
    counted.clear()
    assert asked(tuned, path=file, identity="me", generation=generation).answers == whole.answers
    assert counted == [], "a finished call asks nothing"


def test_a_torn_line_is_no_answer(tuned, tmp_path, counted):
    file = tmp_path / "a.jsonl"
    whole = asked(tuned, path=file, identity="me")
    for cut in (1, 20):  # one byte short of its end it is whole JSON, and yet nobody knows
        asked(tuned, path=file, identity="me")
        content = file.read_bytes()
        file.write_bytes(content[:-cut])
        counted.clear()
        assert asked(tuned, path=file, identity="me").answers == whole.answers
        assert 0 < len(counted) <= 4, "its batch is asked again, and no other"
        assert len(file.read_bytes().splitlines()) == len(RECORDS)


def test_a_foreign_line_is_passed_by(tmp_path):
    file = tmp_path / "a.jsonl"
    good = {"asked": "key", "prediction": "red", "tokens": 1, "stop": "end"}
    file.write_text('[]\nnonsense\n{"id": "old"}\n' + json.dumps(good) + "\n")
    assert AnswerFile(file).recall() == {"key": Answer("red", 1, "end")}
    assert AnswerFile(None).recall() == AnswerFile(tmp_path / "none").recall() == {}


@pytest.mark.parametrize("change", ["model", "limit", "beams", "prompt", "image", "bf16", "choices"])
def test_answers_of_something_else_are_never_taken(tuned, tmp_path, counted, change):
    file = tmp_path / "a.jsonl"
    asked(tuned, RECORDS[:3], path=file, identity="me")
    counted.clear()
    records, identity, generation, model = RECORDS[:3], "me", GenerationSpec(), tuned
    if change == "model":
        identity = "another"
    elif change == "limit":
        generation = GenerationSpec(max_new_tokens=4)
    elif change == "beams":
        generation = GenerationSpec(num_beams=2)
    elif change == "choices":
        generation = GenerationSpec(choices="likelihood")
    elif change == "bf16":
        model = untouched(tuned.family, bf16=True)
    elif change == "prompt":
        records = [tiny.record(f"q{i}", f"{ONE}Where is it?", f"thing {i}", images=(i,)) for i in range(3)]
    else:
        records = [tiny.record(r.id, r.turns[0].text, r.answer, images=(9,)) for r in records]
    assert asked(model, records, path=file, identity=identity, generation=generation).resumed == 0
    assert len(counted) == 3
    assert len(file.read_text().splitlines()) == 3


def test_the_hash_hangs_on_everything():
    keys = {question_key({"model": m}, i, p) for m in "ab" for i in "ab" for p in "ab"}
    assert len(keys) == 8


# --- a run ---


def run_spec(folder: Path, name: str) -> Path:
    task = {"name": "scenes_at", "size": {"train": 4, "validation": 0, "test": 6}}
    other = {"name": "scenes_count", "size": {"test": 6}}
    few = {"max_steps": 1, "eval_strategy": "no", "save_strategy": "no"}
    return write_spec(folder / f"{name}.yaml", tiny_spec(folder / name, task=task, evaluate=[other], train=few))


def die_after_answers(batches: int, number: int) -> Any:
    """For `prepare`: the process gets a signal once so many batches of answers are on the disk."""

    def prepare() -> None:
        real, done = AnswerFile.append, 0

        def append(self: AnswerFile, answers: Any) -> None:
            nonlocal done
            real(self, answers)
            done += 1
            if done == batches:
                os.kill(os.getpid(), number)

        AnswerFile.append = append  # type: ignore[method-assign]

    return prepare


@pytest.mark.parametrize(("batches", "number"), [(2, signal.SIGKILL), (4, signal.SIGKILL), (5, signal.SIGTERM)])
def test_a_run_that_dies_while_it_evaluates_goes_on(tmp_path, batches, number):
    assert train_forked(run_spec(tmp_path, "whole"), log=tmp_path / "log") == 0
    spec = run_spec(tmp_path, "cut")
    code = wait(fork_training(spec, log=tmp_path / "log", prepare=die_after_answers(batches, number)))
    assert code == (75 if number == signal.SIGTERM else -number)
    if number == signal.SIGTERM:
        assert status(tmp_path / "cut")["state"] == "interrupted"
    there = sum(len(lines(path)) for path in (tmp_path / "cut/predictions").iterdir())
    assert there == 2 * batches
    assert train_forked(spec, log=tmp_path / "log") == 0
    scores = read(tmp_path / "cut/result.json")["scores"]
    assert sum(score["resumed"] for score in scores.values()) == there
    assert_same(tmp_path / "cut", tmp_path / "whole")


def test_the_result_seals_its_predictions(tmp_path):
    from peft_mllm.files import file_digest

    assert command("train", run_spec(tmp_path, "run")).code == 0
    for task, score in read(tmp_path / "run/result.json")["scores"].items():
        assert score["predictions_sha256"] == file_digest(tmp_path / "run/predictions" / f"{task}.jsonl")
