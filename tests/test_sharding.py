"""A base in pieces over two processes: FSDP2 and ZeRO-3 give what one process gives that holds all of it."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tiny
from peft_mllm import cli
from peft_mllm.errors import SpecError
from peft_mllm.sharding import asked_for, shards_of
from peft_mllm.spec import SpeedSpec
from peft_mllm.world import World
from runs import (
    checkpoints,
    in_processes,
    lines,
    losses,
    read,
    signal_after_steps,
    train_forked,
    weights,
    write_spec,
)
from runs import (
    tiny as small,
)
from sharded import Alone, Case, broken, compared

QUICK = {
    # unequal numbers of batches in a step, and none; dropout; a tuned connector
    "lora": Case("lora", options={"dropout": 0.1}, parts={"connector": True}, tokens=60),
    "full": Case("full"),
}
METHODS = {
    "ia3": Case("ia3"),
    "adapter": Case("adapter"),
    "prefix": Case("prefix"),
    "layernorm": Case("layernorm"),
    "dora": Case("peft", options={"type": "LORA", "config": {"r": 4, "use_dora": True}}),
    "vera": Case("peft", options={"type": "VERA", "config": {"r": 8}}),
    "oft": Case("peft", options={"type": "OFT", "config": {"oft_block_size": 8}}),
    "prompt": Case("peft", options={"type": "PROMPT_TUNING", "config": {"num_virtual_tokens": 4}}),
}
WAYS = {
    "vision tuned": Case("lora", parts={"vision": True}),
    "all tuned": Case("full", parts={"connector": True, "vision": True}),
    "computed again": Case("lora", recompute="full"),
    "bf16": Case("lora", half=True),
    "bf16 full": Case("full", half=True, parts={"connector": True}),
    "mlp again": Case("lora", recompute="selective"),
}
MODELS = {
    "qwen_vl": Case("lora", "qwen_vl"),
    "qwen_vl full": Case("full", "qwen_vl"),
    "mllama": Case("lora", "mllama"),  # a text skips some of its layers
    "qwen2_5_vl": Case("adapter", "qwen2_5_vl"),
    "gemma3": Case("lora", "gemma3"),  # its head is its embeddings
    "idefics3": Case("prefix", "idefics3"),
}
OFF = 1e-5
"""Relative difference of what was trained, in the norm of all of it: rounding, after some steps of AdamW."""
WHOLE = {"gemma3": 0.7, "full": 0.7, "all tuned": 0.7, "bf16 full": 0.7, "qwen_vl full": 0.6, "mllama": 0.6}
"""Share of the language model that a process holds, where embeddings or some layers stay whole; else half of it."""

with_deepspeed = pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="DeepSpeed is not installed")


def results(cases: dict[str, Case], shard: str, folder: Path, find: Any = compared) -> dict[str, Any]:
    """What both processes found, by case."""

    def work(rank: int) -> None:
        world = World()
        found = {name: find(Case(**vars(case) | {"shard": shard}), world) for name, case in cases.items()}
        (folder / f"found-{rank}.json").write_text(json.dumps(found))
        world.close()

    codes = in_processes(2, work, folder / "log")
    assert codes == [0, 0], "".join((folder / f"log-{rank}").read_text()[-3000:] for rank in (0, 1))
    found, other = (json.loads((folder / f"found-{rank}.json").read_text()) for rank in (0, 1))
    for name in cases:  # pieces are not all of one size
        assert {**found[name], "held": 0} == {**other[name], "held": 0}, name
    return found


def assert_same(found: dict[str, Any], cases: dict[str, Case]) -> None:
    assert found.keys() == cases.keys()
    for name, each in found.items():
        assert each["difference"] <= OFF, (name, each)
        assert each["losses"] <= OFF, (name, each)
        assert each["moved"] > 100 * OFF, (name, each)
        assert each["answers"], (name, each)
        assert each["kept"] == 0, (name, each)
        assert each["held"] < WHOLE.get(name, 0.51), (name, each)


def test_what_trains_in_pieces_is_what_trains_in_one(tmp_path):
    assert_same(results(QUICK, "fsdp", tmp_path), QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("cases", [METHODS, WAYS, MODELS], ids=["methods", "ways", "models"])
def test_fsdp(tmp_path, cases):
    found = results(cases, "fsdp", tmp_path)
    assert_same(found, cases)
    assert max(each["spoken"] for each in found.values()) > 1, "no answer differs from another"


@pytest.mark.slow
@with_deepspeed
@pytest.mark.parametrize("cases", [QUICK, METHODS, WAYS, MODELS], ids=["quick", "methods", "ways", "models"])
def test_zero3(tmp_path, cases):
    cases = {name: case for name, case in cases.items() if case.name != "full"}
    assert_same(results(cases, "zero3", tmp_path), cases)


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["fsdp", pytest.param("zero3", marks=with_deepspeed)])
def test_a_forward_that_fails_keeps_nobody_waiting(tmp_path, shard):
    """A quicker way to answer is tried, and may fail on a model, in one process alone."""
    found = results({"lora": Case("lora")}, shard, tmp_path, broken)
    assert found == {"lora": {"failed": [0, 2], "answers": True}}


def test_zero3_cuts_what_is_frozen(tmp_path):
    tuned = tiny.tune("full")
    with pytest.raises(SpecError, match="fsdp"):
        shards_of(tuned.base, tuned.family.anatomy, Two(), "zero3", own=True)


# --- whole runs ---

TASK = {"name": "scenes_at", "size": {"train": 14, "validation": 5, "test": 5}}
RUNS: dict[str, dict[str, Any]] = {
    "fsdp": {"method": "full", "train": {"learning_rate": 1e-3}},
    "zero3": {"connector": "tuned"},
}


def spec_of(folder: Path, shard: str, **more: Any) -> Path:
    """A run that answers multiple choice as well, and keeps features of images."""
    changes = RUNS[shard]
    train = {"gradient_accumulation_steps": 2, **changes.get("train", {})}
    spec = small(
        folder / "one",
        **changes | {"task": TASK, "evaluate": [{"name": "scenes_choose", "size": {"test": 5}}], "train": train},
        speed={"vision_cache": str(folder / "vision")},
        **more,
    )
    return write_spec(folder / "spec.yaml", spec)


def train_in_two(spec: Path, output: Path, *words: str, prepare: Any = lambda rank: None) -> list[int]:
    said = [f"output_dir={output}", "train.gradient_accumulation_steps=1", *words]

    def work(rank: int) -> None:
        prepare(rank)
        sys.argv = ["peft-mllm", "train", str(spec), *said]
        cli.main()

    return in_processes(2, work, output.with_suffix(".log"))


def assert_like(run: Path, one: Path) -> None:
    """The same losses, weights, answers and scores as of one process, to rounding."""
    assert losses(run) == pytest.approx(losses(one), rel=1e-5)
    mine, others = weights(run), weights(one)
    assert mine.keys() == others.keys()
    off = sum((mine[name] - others[name]).double().pow(2).sum() for name in mine)
    assert (off / sum(each.double().pow(2).sum() for each in others.values())) ** 0.5 < OFF
    for task in ("scenes_at", "scenes_choose"):
        said, expected = (lines(each / "predictions" / f"{task}.jsonl") for each in (run, one))
        assert [line["prediction"] for line in said] == [line["prediction"] for line in expected]
    result, expected = (read(each / "result.json") for each in (run, one))
    for name, figures in expected["retention"].items():
        for side in ("before", "after"):
            assert result["retention"][name][side] == pytest.approx(figures[side], rel=1e-5)
    for check in ("self_check", "lean_check"):
        assert (result[check] or {}).get("passed") == (expected[check] or {}).get("passed")
    assert result["plan"]["predicted_bytes"] < expected["plan"]["predicted_bytes"] * 1.1
    assert result["plan"]["notes"] == expected["plan"]["notes"] == []


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["fsdp", pytest.param("zero3", marks=with_deepspeed)])
def test_a_run_in_pieces_and_one_that_goes_on(tmp_path, monkeypatch, shard):
    """Killed in pieces, gone on in pieces; stopped in pieces, gone on in one piece."""
    monkeypatch.setenv("PEFT_MLLM_CACHE", str(tmp_path / "cache"))
    spec = spec_of(tmp_path, shard)
    assert train_forked(spec, log=tmp_path / "log") == 0, (tmp_path / "log").read_text()
    monkeypatch.setenv("PEFT_MLLM_CACHE", str(tmp_path / "another cache"))  # the base is measured in pieces, too
    kill, stop = signal_after_steps(3, signal.SIGKILL), signal_after_steps(3, signal.SIGTERM)
    killed = train_in_two(spec, tmp_path / "two", f"speed.shard={shard}", prepare=lambda rank: kill())
    assert -signal.SIGKILL in killed
    assert checkpoints(tmp_path / "two")[-1] == 2
    codes = train_in_two(spec, tmp_path / "two", f"speed.shard={shard}")
    assert codes == [0, 0], (tmp_path / "two.log-0").read_text()[-3000:]
    assert_like(tmp_path / "two", tmp_path / "one")
    assert train_in_two(spec, tmp_path / "other", f"speed.shard={shard}", prepare=lambda rank: stop()) == [75, 75]
    assert train_forked(spec, f"output_dir={tmp_path / 'other'}", log=tmp_path / "log") == 0
    assert_like(tmp_path / "other", tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29611"],
        ["accelerate.commands.launch", "--num_processes", "2", "--use_fsdp", "--fsdp_version", "2"],
        pytest.param(
            ["accelerate.commands.launch", "--num_processes", "2", "--use_deepspeed", "--zero_stage", "3"],
            marks=with_deepspeed,
        ),
    ],
    ids=["torchrun", "accelerate fsdp", "accelerate deepspeed"],
)
def test_launchers(tmp_path, words):
    shard = "fsdp" if "zero_stage" not in " ".join(words) else "zero3"
    spec = write_spec(tmp_path / "spec.yaml", small(tmp_path / "run", task=TASK))
    told = ["speed.shard=fsdp"] if "torch.distributed.run" in words else []
    done = subprocess.run(
        [sys.executable, "-m", *words, "-m", "peft_mllm", "train", str(spec), *told],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PEFT_MLLM_CACHE": str(tmp_path)},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = read(tmp_path / "run" / "result.json")
    assert result["processes"] == 2
    assert result["shard"] == shard


# --- what is asked for ---


class Two(Alone):
    @property
    def size(self) -> int:
        return 2


@pytest.mark.parametrize(
    ("variables", "wanted", "expected"),
    [
        ({}, "auto", "none"),
        ({"ACCELERATE_USE_FSDP": "true"}, "auto", "fsdp"),
        ({"ACCELERATE_USE_FSDP": "true"}, "none", "none"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "auto", "zero3"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, "auto", "none"),
        ({}, "zero3", "zero3"),
    ],
)
def test_what_the_launcher_says_counts_where_the_spec_says_nothing(monkeypatch, variables, wanted, expected):
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_ZERO_STAGE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert asked_for(SpeedSpec(shard=wanted), Two(), quantization="none") == expected
    assert asked_for(SpeedSpec(shard=wanted), Alone(), quantization="none") == "none"


def test_a_quantised_base_is_not_cut():
    with pytest.raises(SpecError, match=r"model\.quantization"):
        asked_for(SpeedSpec(shard="fsdp"), Two(), quantization="4bit")
