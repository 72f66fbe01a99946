"""Two processes compute what one computes with the same global batch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from own_data import chat, image, jsonl
from peft_mllm import cli
from peft_mllm.models.llava import Llava
from runs import (
    checkpoints,
    command,
    in_processes,
    lines,
    losses,
    metrics,
    non_finite_files,
    read,
    signal_after_steps,
    status,
    tiny,
    train_forked,
    weights,
    write_spec,
)

ONE = {"gradient_accumulation_steps": 2}
TWO = "train.gradient_accumulation_steps=1"
LAUNCHED = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
TASK = {"name": "scenes_at", "size": {"train": 14, "validation": 5, "test": 5}}
"""Uneven on purpose: the last step has too few samples for all micro-batches, and one process answers more."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def spec(folder: Path) -> Path:
    return write_spec(folder / "spec.yaml", tiny(folder / "one", task=TASK, train=ONE))


@pytest.fixture(scope="module")
def one(folder: Path, spec: Path) -> Path:
    assert train_forked(spec, log=folder / "log") == 0
    return folder / "one"


def train_in_two(spec: Path, *words: str, log: Path, prepare: Any = lambda rank: None) -> list[int]:
    def work(rank: int) -> None:
        prepare(rank)
        sys.argv = ["peft-mllm", "train", str(spec), *words]
        cli.main()

    return in_processes(2, work, log)


def assert_like(run: Path, one: Path) -> None:
    mine, others = metrics(run), metrics(one)
    assert [(line["step"], set(line)) for line in mine] == [(line["step"], set(line)) for line in others]
    assert losses(run) == pytest.approx(losses(one), rel=1e-5)
    for key in ("eval_loss", "grad_norm"):
        assert [line[key] for line in mine if key in line] == pytest.approx(
            [line[key] for line in others if key in line], rel=1e-4
        )
    for name, tensor in weights(run).items():
        torch.testing.assert_close(tensor, weights(one)[name], rtol=1e-3, atol=1e-5)
    answers, reference = (lines(each / "predictions" / "scenes_at.jsonl") for each in (run, one))
    assert [line["id"] for line in answers] == [line["id"] for line in reference]
    assert len(answers) == 5
    trained, expected = (read(each / "result.json")["training"] for each in (run, one))
    for key in ("steps", "answer_tokens", "epochs"):
        assert trained[key] == expected[key]


@pytest.mark.slow
def test_a_real_launcher(tmp_path, spec, one):
    """`accelerate launch --cpu` would start one process whatever its number says; this one starts two anywhere."""
    target = tmp_path / "two"
    launch = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no"
    words = [*launch.split(), "--dynamo_backend", "no", "-m", "peft_mllm", "train", str(spec), TWO]
    done = subprocess.run(
        [sys.executable, *words, f"output_dir={target}"], capture_output=True, text=True, env=LAUNCHED, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert_like(target, one)
    assert read(target / "result.json")["processes"] == 2
    assert done.stdout.count("scenes_at") <= 1, "each process prints the table"


def test_forked_pair(tmp_path, spec, one):
    log = tmp_path / "log"
    assert train_in_two(spec, TWO, f"output_dir={tmp_path / 'two'}", log=log) == [0, 0]
    assert_like(tmp_path / "two", one)
    # a finished run is shared, not run again
    assert train_in_two(spec, TWO, f"output_dir={tmp_path / 'two'}", log=log) == [0, 0]


def test_a_signal_to_one_of_two(tmp_path, spec, one):
    target, log = tmp_path / "two", tmp_path / "log"

    def prepare(rank: int) -> None:
        if rank == 1:
            signal_after_steps(3, signal.SIGTERM)()

    assert train_in_two(spec, TWO, f"output_dir={target}", log=log, prepare=prepare) == [75, 75]
    assert checkpoints(target)[-1] == 3
    assert status(target)["state"] == "interrupted"
    assert train_in_two(spec, TWO, f"output_dir={target}", log=log) == [0, 0]
    assert_like(target, one)


@pytest.mark.parametrize("first", [1, 2])
def test_resuming_with_another_number_of_processes(tmp_path, spec, one, first):
    """The same global batch, so the same run: 1 x 2 micro-batches or 2 x 1."""
    target, log = tmp_path / "run", tmp_path / "log"
    stop, place = signal_after_steps(3, signal.SIGTERM), f"output_dir={target}"
    if first == 1:
        assert train_forked(spec, place, log=log, prepare=stop) == 75
        codes = train_in_two(spec, TWO, place, log=log)
    else:
        assert train_in_two(spec, TWO, place, log=log, prepare=lambda rank: stop()) == [75, 75]
        codes = [train_forked(spec, place, log=log)]
    said = "".join(path.read_text() for path in tmp_path.glob("log*"))
    assert set(codes) == {0}, said
    assert_like(target, one)


def test_another_number_of_processes_with_the_same_spec_is_no_silent_change(tmp_path, spec, one):
    """Twice the processes is twice the global batch: step 3 then means other samples."""
    target, log = tmp_path / "run", tmp_path / "log"
    place = f"output_dir={target}"
    assert train_forked(spec, place, log=log, prepare=signal_after_steps(3, signal.SIGTERM)) == 75
    codes = train_in_two(spec, place, log=log)
    if codes == [0, 0]:
        assert_like(target, one)
    else:
        assert set(codes) <= {1, 2, -signal.SIGTERM, 70}
        said = (tmp_path / "log-0").read_text()
        assert "processes" in said or "micro_batch" in said or "gradient_accumulation" in said
        assert "Traceback" not in said


def test_a_mistake_ends_both(tmp_path, spec, one):
    log = tmp_path / "log"
    codes = train_in_two(spec, TWO, "train.optim=nonsense", f"output_dir={tmp_path / 'run'}", log=log)
    assert codes == [2, 2]


def test_another_spec_ends_both(tmp_path, spec, one):
    """Only the main process opens the directory: the other must not wait for it for half an hour."""
    log = tmp_path / "log"
    codes = train_in_two(spec, "seed=7", f"output_dir={one}", log=log)
    assert codes[0] == 2
    assert codes[1] != 0


def test_the_process_that_saw_it_names_the_sample(tmp_path):
    """A loss that is no number in the second process: the message and status.json name that sample."""
    for i in range(12):
        image(tmp_path / f"{i}.png", (1, 2, 3) if i == 11 else (20 * i, 50, 100))
    records = [chat(answer=f"It is {i}.", id=f"sample-{i}", images=[f"{i}.png"]) for i in range(12)]
    data = str(jsonl(tmp_path / "data.jsonl", records))
    task = {"name": "custom", "train": data, "test": data}
    spec = write_spec(tmp_path / "spec.yaml", tiny(tmp_path / "run", task=task))

    def prepare(rank: int) -> None:
        real = Llava.pixels

        def pixels(self: Llava, images: Any, input_ids: Any) -> dict[str, torch.Tensor]:
            made = real(self, images, input_ids)
            for i, each in enumerate(one for row in images for one in row):
                if each.getpixel((0, 0)) == (1, 2, 3):
                    made["pixel_values"][i] = float("nan")
            return made

        Llava.pixels = pixels  # type: ignore[method-assign]

    for rank_of_bad in range(2):
        # which process gets the sample depends on the order, and that on the seed
        place = tmp_path / f"run {rank_of_bad}"
        words = (TWO, f"seed={_seed(rank_of_bad)}", f"output_dir={place}")
        codes = train_in_two(spec, *words, log=tmp_path / "log", prepare=prepare)
        assert codes == [3, 3], (tmp_path / "log-0").read_text()
        assert "sample-11" in status(place)["message"]
        assert "the loss is" in status(place)["message"]
        assert non_finite_files(place) == []


def _seed(rank: int) -> int:
    """A seed with which sample 11 falls to a process."""
    from peft_mllm.data.plan import Plan

    for seed in range(1000):
        plan = Plan(size=12, micro_batch=2, micro_batches=2, seed=seed)
        if 11 in plan.step(0)[rank]:
            return seed
    raise AssertionError


def test_one_process_after_the_other_scores_alike(tmp_path, one):
    said = command("evaluate", one, "--output", tmp_path / "scores")
    assert said.code == 0
    assert lines(tmp_path / "scores/predictions/scenes_at.jsonl") == lines(one / "predictions/scenes_at.jsonl")


def test_two_processes_go_on_where_one_was_stopped(tmp_path, one):
    """Which questions meet does not depend on how many processes there are, so whole batches are taken over."""
    output = tmp_path / "scores"
    assert command("evaluate", one, "--output", output).code == 0
    file = output / "predictions/scenes_at.jsonl"
    whole = lines(file)
    file.write_text("".join(file.read_text().splitlines(keepends=True)[1:]))

    def work(rank: int) -> None:
        sys.argv = ["peft-mllm", "evaluate", str(one), "--output", str(output), "--json"]
        cli.main()

    assert in_processes(2, work, tmp_path / "log") == [0, 0]
    assert lines(file) == whole
    assert 0 < read(output / "scores.json")["scores"]["scenes_at"]["resumed"] < 5
    said = [(tmp_path / f"log-{rank}").read_text() for rank in (0, 1)]
    assert ['"values"' in each for each in said] == [True, False], "one of them speaks"
