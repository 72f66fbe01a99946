"""`speed.deterministic: world-size`: the same run, bit for bit, on one process, two and four."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peft_mllm import cli
from peft_mllm.errors import SpecError
from peft_mllm.gradients import in_order
from peft_mllm.memory.relief import Relief
from peft_mllm.specfile import parse_spec
from peft_mllm.world import World
from runs import in_processes, outcome, read, signal_after_steps, tiny, train_forked, write_spec

CASES = {
    # four micro-batches a step, but three in the last of an epoch; dropout; parts of micro-batches
    "lora": {"connector": "tuned", "speed": {"micro_batch_tokens": 60}},
    "adapter": {"method": {"name": "adapter", "dropout": 0.1}, "speed": {"recompute": "full"}},
    "prefix": {"method": {"name": "prefix", "virtual_tokens": 4}, "vision": "tuned"},
    "full": {"method": "full", "train": {"learning_rate": 1e-3, "max_grad_norm": 0.1}},
    "bf16": {"train": {"bf16": True, "dataloader_num_workers": 1}},
    "in pieces": {"speed": {"shard": "fsdp"}},
}
MICRO_BATCHES = 4


def spec_of(folder: Path, changes: dict[str, Any], *, epochs: int = 1) -> Path:
    train = {"gradient_accumulation_steps": MICRO_BATCHES, "num_train_epochs": epochs, "eval_steps": 1}
    spec = tiny(
        folder / "one",
        **changes
        | {
            "task": {"name": "scenes_at", "size": {"train": 14, "validation": 5, "test": 5}},
            "retention": {"samples": 0},
            "train": train | changes.get("train", {}),
            "speed": {"deterministic": "world-size"} | changes.get("speed", {}),
        },
    )
    return write_spec(folder / "spec.yaml", spec)


def train_in(processes: int, spec: Path, output: Path, prepare: Any = lambda: None) -> set[int]:
    """Train with the same micro-batches on so many processes; exit codes."""
    words = [f"output_dir={output}", f"train.gradient_accumulation_steps={MICRO_BATCHES // processes}"]
    if processes == 1:
        return {train_forked(spec, *words, log=output.with_suffix(".log"), prepare=prepare)}

    def work(rank: int) -> None:
        prepare()
        sys.argv = ["peft-mllm", "train", str(spec), *words]
        cli.main()

    return set(in_processes(processes, work, output.with_suffix(".log")))


def bits(run: Path) -> dict[str, Any]:
    """What must be the same: hashes of all weights and optimizer states, and every figure that was measured."""
    files = [*(run / "adapter").glob("*.safetensors"), *(run / "checkpoints").glob("*/state.safetensors")]
    hashes = {str(file.relative_to(run)): hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(files)}
    assert len(hashes) > 2
    rest = {key: value for key, value in outcome(run).items() if key != "adapter"}
    return rest | {"files": hashes, "retention": read(run / "result.json")["retention"]}


def assert_same_bits(run: Path, other: Path) -> None:
    mine, others = bits(run), bits(other)
    for key in mine:
        assert mine[key] == others[key], key


def test_two_processes_give_the_bits_of_one(tmp_path):
    spec = spec_of(tmp_path, CASES["lora"])
    assert train_in(1, spec, tmp_path / "one") == {0}
    assert train_in(2, spec, tmp_path / "two") == {0}
    assert_same_bits(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_four_processes_give_the_bits_of_one(tmp_path, case):
    spec = spec_of(tmp_path, CASES[case])
    for processes in (1, 4):
        assert train_in(processes, spec, tmp_path / str(processes)) == {0}
    assert_same_bits(tmp_path / "4", tmp_path / "1")


@pytest.mark.slow
def test_going_on_with_another_number_of_processes(tmp_path):
    spec = spec_of(tmp_path, CASES["lora"], epochs=2)
    assert train_in(1, spec, tmp_path / "one") == {0}
    assert train_in(4, spec, tmp_path / "other", signal_after_steps(2, 15)) == {75}
    assert train_in(2, spec, tmp_path / "other") == {0}
    assert_same_bits(tmp_path / "other", tmp_path / "one")


@pytest.mark.slow
def test_what_trains_must_be_whole(tmp_path):
    spec = spec_of(tmp_path, {"method": "full", "speed": {"shard": "fsdp"}})
    assert train_in(2, spec, tmp_path / "run") == {2}
    assert "speed.deterministic: world-size" in (tmp_path / "run.log-0").read_text()


def test_what_is_compiled_would_depend_on_the_process():
    with pytest.raises(SpecError, match=r"speed\.compile: what is compiled depends"):
        parse_spec(tiny(Path("run"), speed={"deterministic": "world-size", "compile": True}))


class Member(World):
    """One of several processes, in a thread."""

    def __init__(self, rank: int, board: list[Any], together: Barrier):
        self._state = SimpleNamespace(process_index=rank, num_processes=len(board))
        self._board, self._together = board, together

    def tensors(self, mine: Tensor) -> list[Tensor]:
        self._board[self.rank] = mine
        self._together.wait()
        everyone = [each.clone() for each in self._board]
        self._together.wait()
        return everyone


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_the_order_of_a_sum_is_that_of_the_micro_batches(size):
    """Five micro-batches of two samples, each computed in two batches; processes may be more than these."""
    generator = torch.Generator().manual_seed(0)
    scales = 10 ** torch.linspace(-3, 3, 10)[torch.randperm(10, generator=generator)]
    gradients = torch.randn(10, 300, generator=generator) * scales[:, None]
    pairs = [gradients[i] + gradients[i + 1] for i in range(0, 10, 2)]
    expected = reduce(torch.add, pairs)
    assert not torch.equal(reduce(torch.add, reversed(pairs)), expected)
    step = [[i, i + 1] for i in range(0, 10, 2)]
    board, together = [None] * size, Barrier(size)

    def member(rank: int) -> list[Tensor]:
        parameters = [nn.Parameter(torch.zeros(10, 20)), nn.Parameter(torch.zeros(100)), nn.Parameter(torch.zeros(3))]
        mine = [SimpleNamespace(sample_ids=(i,)) for micro in step[rank::size] for i in micro]

        def compute(batches: Sequence[Any]) -> list[Tensor]:
            for batch in batches:
                (number,) = batch.sample_ids
                for parameter, part in zip(
                    parameters, gradients[number].split([200, 100]), strict=False
                ):  # not the last
                    part = part.view_as(parameter).clone()
                    parameter.grad = part if parameter.grad is None else parameter.grad.add_(part)
            return [torch.tensor([batch.sample_ids[0]]) for batch in batches]

        relief = Relief(relay=lambda *_: [], recompute=lambda _: None, note=lambda _: None, whole=True)
        computed, losses = in_order(compute, mine, step, parameters, Member(rank, board, together), relief)
        assert list(computed) == mine
        assert [int(each) for each in losses] == [batch.sample_ids[0] for batch in mine]
        return [parameter.grad for parameter in parameters]

    with ThreadPoolExecutor(size) as threads:
        for *used, unused in threads.map(member, range(size)):
            assert torch.equal(torch.cat([each.flatten() for each in used]), expected)
            assert not unused.any()
