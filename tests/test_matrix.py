"""The probes of the capability matrix: that they pass where all is well, and that each can fail; the shipped result."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft.tuners.lora import LoraModel

from peft_mllm.matrix import measures, probes
from peft_mllm.matrix.bench import Bench, samples, sharpen
from peft_mllm.matrix.candidates import PEFT_TYPES, Candidate, candidates, peft_types
from peft_mllm.matrix.known import DECISIVE
from peft_mllm.matrix.members import members, open_member
from peft_mllm.matrix.page import page
from peft_mllm.matrix.probes import FIRST, PROBES, try_one
from peft_mllm.matrix.result import installed, shipped
from peft_mllm.recompute import recompute_of
from peft_mllm.tuned import Tuned

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parent.parent
MATRIX = shipped()
SAME = all(MATRIX.versions[name] == installed()[name] for name in DECISIVE)
its_versions = pytest.mark.skipif(not SAME, reason="the shipped matrix is of other versions of peft or transformers")

LLAVA, QWEN2, GEMMA = "llava", "generic/qwen2_vl", "generic/gemma3"
AGAIN = [
    ("none", LLAVA), ("lora", LLAVA), ("prefix", LLAVA), ("adapter", LLAVA),
    ("peft POLY", LLAVA), ("peft TRAINABLE_TOKENS", LLAVA), ("peft PROMPT_TUNING", LLAVA),
    ("prefix", QWEN2), ("peft PROMPT_TUNING", QWEN2), ("prefix", GEMMA), ("peft PROMPT_TUNING", GEMMA),
]  # fmt: skip
"""Pairs that are tried anew here: what works, what fails, and what would fail silently."""
ALWAYS = {("lora", LLAVA), ("peft POLY", LLAVA), ("prefix", QWEN2), ("peft PROMPT_TUNING", QWEN2), ("prefix", GEMMA)}
"""One of each kind; the others are slow."""


@pytest.fixture(scope="module")
def tiny():
    opened = {}

    def made(member):
        if member not in opened:
            opened[member] = sharpen(open_member(member))
        return opened[member]

    return made


@pytest.fixture
def bench(tiny, tmp_path):
    return lambda candidate, member=LLAVA: Bench(candidates()[candidate], tiny(member), tmp_path)


# The shipped result is what is found here


@its_versions
@pytest.mark.parametrize(
    ("candidate", "member"),
    [pytest.param(*each, id=" on ".join(each), marks=[pytest.mark.slow] * (each not in ALWAYS)) for each in AGAIN],
)
def test_the_shipped_matrix_is_what_the_probes_find(candidate, member, bench):
    recorded = MATRIX.at(candidate, member)
    assert recorded is not None
    states = dict.fromkeys(recorded.ok, "ok") | dict.fromkeys(recorded.failed, "failed")
    states |= dict.fromkeys(recorded.none, "none")
    found = {}
    for name in PROBES:
        found[name] = try_one(name, bench(candidate, member)).state
        if name in FIRST and found[name] != "ok":
            break
    assert found == states


@its_versions
def test_it_has_every_method_type_and_model_there_is():
    names = list(candidates())
    assert list(MATRIX.candidates) == names
    assert list(MATRIX.members) == members()
    assert {(pair.candidate, pair.member) for pair in MATRIX.pairs} == {(n, m) for n in names for m in members()}
    assert list(MATRIX.probes) == list(PROBES)


def test_the_page_is_made_from_it():
    assert (ROOT / "docs" / "matrix.md").read_text(encoding="utf-8") == page(MATRIX), (
        "docs/matrix.md is out of date: run scripts/update_matrix.py"
    )


@its_versions
def test_peft_s_prompts_lose_what_ours_keep():
    """The reason to look: nothing else says that such a run is wrong."""
    for member, facts in MATRIX.members.items():
        ours, theirs = MATRIX.at("prefix", member), MATRIX.at("peft PROMPT_TUNING", member)
        assert ours is not None
        assert not {"positions", "mask"} & set(ours.failed), member
        if facts["model_type"] in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
            assert theirs is not None
            assert "positions" in theirs.failed
        if facts["model_type"] == "gemma3":
            assert theirs is not None
            assert "mask" in theirs.failed


def test_every_type_of_peft_is_tried_with_fields_of_its_own_or_needs_none():
    known = set(peft_types())
    assert set(PEFT_TYPES) <= known
    without = known - set(PEFT_TYPES)
    assert without <= {"BEFT", "LN_TUNING"}, f"give {without - {'BEFT', 'LN_TUNING'}} small fields in PEFT_TYPES"


# Every probe can fail. Each defect is planted where a real one would sit.


def scaled(function, when):
    """The function with its result a little too large, where that is asked for."""

    def changed(*args, **more):
        return function(*args, **more) * (1.01 if when(*args, **more) else 1)

    return changed


def verdict(name, bench):
    found = try_one(name, bench)
    return found.state, found.reason


@pytest.mark.parametrize("name", list(PROBES))
def test_a_probe_passes_on_a_method_without_defect(name, bench):
    assert verdict(name, bench("lora")) == ("ok", "")


@pytest.mark.parametrize(
    ("name", "candidate", "said"),
    [
        ("attaches", "peft ADAPTION_PROMPT", "Unsupported model type"),
        ("computes", "peft POLY", "task_ids"),
        ("computes", "peft XLORA", "takes no part"),
        ("trains", "peft ADALORA", "update_and_allocate"),
        ("batches", "peft LILY", "change each other's loss"),
        ("generates", "peft LILY", "with cache"),
        ("trees", "peft LILY", "off by"),
        ("generates", "peft CARTRIDGE", "ValueError"),
        ("connector", "peft TRAINABLE_TOKENS", "with connector does not fit"),
    ],
)
def test_defects_of_peft_are_found(name, candidate, said, bench):
    state, reason = verdict(name, bench(candidate))
    assert state == "failed"
    assert said in reason
    assert "/tmp" not in reason


@pytest.mark.parametrize(
    ("name", "candidate", "member"),
    [("positions", "peft PROMPT_TUNING", QWEN2), ("mask", "peft P_TUNING", GEMMA), ("plain peft", "prefix", QWEN2)],
)
def test_silent_defects_on_other_models_are_found(name, candidate, member, bench):
    assert verdict(name, bench(candidate, member))[0] == "failed"


def test_a_method_that_learns_nothing_is_found(bench, monkeypatch):
    losses = Tuned.answer_losses
    monkeypatch.setattr(Tuned, "answer_losses", lambda self, batch: losses(self, batch) * 0)
    assert verdict("trains", bench("lora")) == ("failed", "all its gradients are zero")


def test_a_parameter_without_gradient_is_found(bench, monkeypatch):
    tune = Bench.tune

    def loose(self, **more):
        tuned = tune(self, **more)
        tuned.base.stray = torch.nn.Parameter(torch.zeros(1))
        return tuned

    monkeypatch.setattr(Bench, "tune", loose)
    state, reason = verdict("trains", bench("lora"))
    assert state == "failed"
    assert "stray one" in reason


def test_a_frozen_weight_that_moves_is_found(bench, monkeypatch):
    def pushed(tuned, **more):
        losses = measures.train(tuned, **more)
        next(p for p in tuned.model.parameters() if not p.requires_grad).data.view(-1)[0].add_(1e-6)
        return losses

    monkeypatch.setattr(probes, "train", pushed)
    state, reason = verdict("frozen", bench("lora"))
    assert state == "failed"
    assert reason.startswith("1 tensors move")


def test_a_part_that_is_not_to_train_is_found(bench):
    everywhere = {"type": "LORA", "config": {"r": 4, "target_modules": "all-linear"}}
    reaching = replace(bench("lora"), candidate=Candidate("reaching", "peft", everywhere))
    state, reason = verdict("attaches", reaching)
    assert state == "failed"
    assert "is to stay frozen" in reason


def test_a_save_that_loses_something_is_found(bench, monkeypatch):
    save = Tuned.save

    def lossy(self, directory):
        with torch.no_grad():
            next(iter(self.trainable().values())).mul_(1.01)
        save(self, directory)

    monkeypatch.setattr(Tuned, "save", lossy)
    for name in ("reloads", "plain peft", "connector"):
        state, reason = verdict(name, bench("lora"))
        assert state == "failed", name
        assert "logits are off by" in reason


def test_a_merge_that_is_wrong_is_found(bench, monkeypatch):
    original = LoraModel.merge_and_unload

    def wrong(self, *args, **more):
        merged = original(self, *args, **more)
        with torch.no_grad():
            merged.lm_head.weight.mul_(1.01)
        return merged

    monkeypatch.setattr(LoraModel, "merge_and_unload", wrong)
    assert verdict("merges", bench("lora"))[0] == "failed"


def test_checkpointing_that_changes_gradients_is_found(bench, monkeypatch):
    logits = Tuned.answer_logits
    checkpointed = lambda self, batch: recompute_of(self.decoder) != "none"  # noqa: E731
    monkeypatch.setattr(Tuned, "answer_logits", scaled(logits, when=checkpointed))
    assert verdict("checkpointing", bench("lora"))[0] == "failed"


def test_trees_that_change_gradients_are_found(bench, monkeypatch):
    logits = Tuned.answer_logits
    in_trees = lambda self, batch: batch.attention_mask.ndim == 4  # noqa: E731
    monkeypatch.setattr(Tuned, "answer_logits", scaled(logits, when=in_trees))
    assert verdict("trees", bench("lora"))[0] == "failed"


@pytest.mark.parametrize("wrong", ["cache", "padding"])
def test_wrong_answers_are_found(wrong, bench, monkeypatch):
    generate = Tuned.generate

    def other(self, batch, **options):
        told = generate(self, batch, **options)
        hit = not options.get("use_cache", True) if wrong == "cache" else len(batch.input_ids) > 1
        return told + 1 if hit else told

    monkeypatch.setattr(Tuned, "generate", other)
    state, reason = verdict("generates", bench("lora"))
    assert state == "failed"
    assert wrong[:3] in reason


def test_an_adapter_that_stays_on_is_found(bench, monkeypatch):
    @contextmanager
    def not_really(self):
        yield self

    monkeypatch.setattr(Tuned, "untuned", not_really)
    assert verdict("switches off", bench("lora"))[0] == "failed"


def test_the_samples_make_a_tree_and_a_single(tiny):
    one, two, other = samples(tiny(LLAVA))
    assert one.images == two.images != other.images
    assert one.ids != two.ids
