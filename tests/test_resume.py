"""A run that was killed, stopped, damaged or refused ends as one that nothing happened to, to the bit."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

import peft_mllm
from own_data import chat, image, jsonl
from peft_mllm import evaluation, files, run, scored, training
from peft_mllm.errors import DiskError, DivergedError, SpecError
from peft_mllm.models.llava import Llava
from peft_mllm.rundir import RunDir
from peft_mllm.tuned import Tuned
from runs import (
    assert_same,
    checkpoints,
    command,
    fork_training,
    kill_after,
    kill_at,
    metrics,
    non_finite_files,
    outcome,
    read,
    signal_after_steps,
    status,
    tiny,
    train_forked,
    wait,
    write_spec,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def spec(folder: Path) -> Path:
    return write_spec(folder / "spec.yaml", tiny(folder / "undisturbed"))


@pytest.fixture(scope="module")
def undisturbed(folder: Path, spec: Path) -> Path:
    assert train_forked(spec, log=folder / "log") == 0
    return folder / "undisturbed"


def copied(undisturbed: Path, spec: Path, target: Path, *, steps: int) -> Path:
    """The run as it was after some steps: interrupted there, so that a test can go on from it."""
    code = train_forked(
        spec, f"output_dir={target}", log=target.with_suffix(".log"),
        prepare=signal_after_steps(steps, signal.SIGTERM),
    )  # fmt: skip
    assert code == 75
    return target


# --- kills ---


@pytest.mark.parametrize("number", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_kills_at_random_moments(tmp_path, folder, spec, undisturbed, number):
    """Moments over the whole duration; a run that a kill hit late is hit again when it resumes."""
    began = time.monotonic()
    assert train_forked(spec, f"output_dir={tmp_path / 'clocked'}", log=tmp_path / "log") == 0
    duration = time.monotonic() - began
    moments = random.Random(20)
    kills = runs = 0
    where: list[str] = []
    while kills < number:
        runs += 1
        target = tmp_path / f"run {runs}"
        while True:
            child = fork_training(spec, f"output_dir={target}", log=tmp_path / "log")
            if kills == number:
                assert wait(child) == 0
                break
            if not kill_after(child, moments.uniform(0, duration)):
                break
            kills += 1
            where.append(_stage(target))
        assert_same(target, undisturbed)
        assert status(target)["state"] == "done"
    assert len(set(where)) >= (3 if number == 20 else 1), f"the kills were not spread: {where}"


def _stage(target: Path) -> str:
    if (target / "adapter").exists():
        return "scoring"
    return f"{len(metrics(target))} lines" if (target / "metrics.jsonl").exists() else "starting"


def _half_written(tensors: dict[str, torch.Tensor], path: Path) -> None:
    path.write_bytes(b"x" * 1000)
    os.kill(os.getpid(), signal.SIGKILL)


NAMED_MOMENTS: dict[str, Callable[[], None]] = {
    "before the spec is written": kill_at(RunDir, "_prepare", 1),
    "before the first step": kill_at(training, "train_step", 1),
    "while validating": kill_at(training, "mean_loss", 2),
    "between the log and the checkpoint": kill_at(training, "save_checkpoint", 2),
    "in the middle of a checkpoint": lambda: setattr(training, "save_file", _half_written),
    "before old checkpoints go": kill_at(RunDir, "rotate", 3),
    "before the final adapter": kill_at(Tuned, "save", 1),
    "in the middle of the scoring": kill_at(evaluation, "ask", 2),
    "before the predictions": kill_at(scored, "write_lines", 1),
    "before the result": kill_at(RunDir, "write_result", 1),
    "after the result": kill_at(run, "finish", 1),
}


MOSTLY_ALIKE = {
    "before the spec is written", "before the first step", "between the log and the checkpoint",
    "before old checkpoints go", "before the final adapter", "before the predictions", "after the result",
}  # fmt: skip
"""Moments whose neighbours are always tested."""


@pytest.mark.parametrize(
    "moment",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in MOSTLY_ALIKE)) for name in NAMED_MOMENTS],
)
def test_a_kill_at_a_known_moment(tmp_path, spec, undisturbed, moment):
    target, log = tmp_path / "run", tmp_path / "log"
    code = train_forked(spec, f"output_dir={target}", log=log, prepare=NAMED_MOMENTS[moment])
    assert code == -signal.SIGKILL
    assert train_forked(spec, f"output_dir={target}", log=log) == 0
    assert_same(target, undisturbed)
    assert status(target)["state"] == "done"
    assert list(target.rglob(".t*")) == []


def test_a_window_of_the_log_that_a_checkpoint_cuts(tmp_path, folder):
    """Losses are logged every third step, checkpoints made every second: the window must not be lost."""
    options = {"logging_steps": 3}
    spec = write_spec(tmp_path / "spec.yaml", tiny(tmp_path / "whole", train=options))
    assert train_forked(spec, log=tmp_path / "log") == 0
    kill = kill_at(training, "train_step", 6)
    assert train_forked(spec, f"output_dir={tmp_path / 'run'}", log=tmp_path / "log", prepare=kill) < 0
    assert train_forked(spec, f"output_dir={tmp_path / 'run'}", log=tmp_path / "log") == 0
    assert_same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("optim", [pytest.param("SGD", marks=pytest.mark.slow), "Adafactor"])
def test_optimizers_with_another_state(tmp_path, optim):
    options = {"optim": optim, "max_steps": 4, "eval_strategy": "no", "learning_rate": 1e-2}
    if optim == "SGD":
        options["optim_args"] = {"momentum": 0.9}
    spec = write_spec(tmp_path / "spec.yaml", tiny(tmp_path / "whole", train=options))
    assert train_forked(spec, log=tmp_path / "log") == 0
    stop = signal_after_steps(3, signal.SIGTERM)
    assert train_forked(spec, f"output_dir={tmp_path / 'run'}", log=tmp_path / "log", prepare=stop) == 75
    assert train_forked(spec, f"output_dir={tmp_path / 'run'}", log=tmp_path / "log") == 0
    assert_same(tmp_path / "run", tmp_path / "whole")


def test_workers_that_prepare_ahead_change_nothing(tmp_path, undisturbed):
    options = {"dataloader_num_workers": 2}
    spec = write_spec(tmp_path / "spec.yaml", tiny(tmp_path / "run", train=options))
    kill = kill_at(training, "train_step", 4)
    assert train_forked(spec, log=tmp_path / "log", prepare=kill) == -signal.SIGKILL
    assert train_forked(spec, log=tmp_path / "log") == 0
    assert_same(tmp_path / "run", undisturbed)


# --- stops ---


@pytest.mark.parametrize(
    ("number", "steps"),
    [pytest.param(signal.SIGTERM, 1, marks=pytest.mark.slow), (signal.SIGINT, 3), (signal.SIGTERM, 6)],
)
def test_a_signal_saves_and_ends_with_75(tmp_path, spec, undisturbed, number, steps):
    target, log = tmp_path / "run", tmp_path / "log"
    prepare = signal_after_steps(steps, number)
    assert train_forked(spec, f"output_dir={target}", log=log, prepare=prepare) == 75
    said = status(target)
    assert (said["state"], said["exit_code"]) == ("interrupted", 75)
    assert checkpoints(target)[-1] == steps
    assert log.read_text().count("Stopped at step") == 1
    assert "Traceback" not in log.read_text()
    assert train_forked(spec, f"output_dir={target}", log=log) == 0
    assert_same(target, undisturbed)
    assert read(target / "result.json")["training"]["resumed"] == 1


def test_ctrl_c_twice_stops_at_once(tmp_path, spec, undisturbed):
    target, log = tmp_path / "run", tmp_path / "log"
    prepare = signal_after_steps(3, signal.SIGINT, signal.SIGINT)
    assert train_forked(spec, f"output_dir={target}", log=log, prepare=prepare) == 75
    assert status(target)["state"] == "interrupted"
    assert "Traceback" not in log.read_text()
    assert "same command" in log.read_text()
    assert checkpoints(target) == [2]
    assert train_forked(spec, f"output_dir={target}", log=log) == 0
    assert_same(target, undisturbed)


def test_a_signal_while_scoring(tmp_path, spec, undisturbed):
    target, log = tmp_path / "run", tmp_path / "log"

    def prepare() -> None:
        real = evaluation.ask

        def ask(*args: Any, **kwargs: Any) -> list[str]:
            os.kill(os.getpid(), signal.SIGTERM)
            return real(*args, **kwargs)

        evaluation.ask = ask

    assert train_forked(spec, f"output_dir={target}", log=log, prepare=prepare) == 75
    assert status(target)["state"] == "interrupted"
    assert train_forked(spec, f"output_dir={target}", log=log) == 0
    assert_same(target, undisturbed)


@pytest.mark.slow
def test_sigterm_to_the_real_command(tmp_path):
    """A process of its own, with its own start; it goes on from another working directory."""
    options = {"num_train_epochs": 8, "save_strategy": "epoch", "eval_strategy": "epoch"}
    task = {"name": "scenes_at", "size": {"train": 16, "validation": 2, "test": 2}}
    target = tmp_path / "a run, with spaces"
    spec = write_spec(tmp_path / "my spec.yaml", tiny(target, task=task, train=options))
    process = subprocess.Popen(
        [sys.executable, "-m", "peft_mllm", "train", str(spec)], stderr=subprocess.PIPE, text=True
    )
    log = target / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") > 3):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert status(target)["state"] == "interrupted"
    assert "the same command goes on from there" in said
    assert "Traceback" not in said
    elsewhere = lambda: os.chdir("/")  # noqa: E731
    assert train_forked(spec, log=tmp_path / "log", prepare=elsewhere) == 0
    other = f"output_dir={tmp_path / 'whole'}"
    assert train_forked(spec, other, log=tmp_path / "log") == 0
    assert_same(target, tmp_path / "whole")


# --- damage ---


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage", [*(pytest.param(each, marks=pytest.mark.slow) for each in (_truncate, Path.unlink)), _flip]
)
def test_a_damaged_newest_checkpoint(tmp_path, spec, undisturbed, damage):
    target = copied(undisturbed, spec, tmp_path / "run", steps=5)
    assert checkpoints(target)[-1] == 5
    damage(target / "checkpoints" / "step-00000005" / training.STATE)
    log = tmp_path / "log"
    assert train_forked(spec, f"output_dir={target}", log=log) == 0
    said = log.read_text()
    assert "step-00000005" in said
    assert f"{training.STATE} " in said
    reason = {_truncate: "bytes, not", _flip: "sha256", Path.unlink: "is missing"}[damage]
    assert reason in said
    assert_same(target, undisturbed)


def test_all_checkpoints_damaged(tmp_path, spec, undisturbed):
    target = copied(undisturbed, spec, tmp_path / "run", steps=5)
    for state in target.rglob(training.STATE):
        _flip(state)
    assert train_forked(spec, f"output_dir={target}", log=tmp_path / "log") == 0
    assert_same(target, undisturbed)


@pytest.fixture(scope="module")
def past_its_best(folder: Path) -> tuple[Path, Path]:
    """A spec whose validation loss rises at last, and its undisturbed run."""
    options = {"learning_rate": 2.0, "lr_scheduler_type": "constant", "eval_steps": 1, "max_steps": 5}
    still = {"name": "lora", "rank": 4, "alpha": 8, "dropout": 0.0}
    spec = write_spec(
        folder / "best.yaml", tiny(folder / "best", method=still, data={"group_by_image": False}, train=options)
    )
    assert train_forked(spec, log=folder / "log") == 0
    best = read(folder / "best" / "result.json")["training"]["best"]
    assert best["restored"]
    return spec, folder / "best"


def test_a_damaged_best_checkpoint(tmp_path, past_its_best):
    """It is made again from an older one, or from the start: the same command must be able to end."""
    spec, whole = past_its_best
    target = tmp_path / "run"
    kill = kill_at(Tuned, "save", 1)
    assert train_forked(spec, f"output_dir={target}", log=tmp_path / "log", prepare=kill) < 0
    best = read(whole / "result.json")["training"]["best"]["step"]
    _flip(target / "checkpoints" / f"step-{best:08d}" / training.STATE)
    code = train_forked(spec, f"output_dir={target}", log=tmp_path / "log")
    if code == 74:  # then what it advises must help
        assert "Delete it" in (tmp_path / "log").read_text()
        shutil.rmtree(target / "checkpoints" / f"step-{best:08d}")
        code = train_forked(spec, f"output_dir={target}", log=tmp_path / "log")
    assert code == 0, (tmp_path / "log").read_text()
    assert_same(target, whole)


def test_stopping_early_survives_a_kill(tmp_path):
    options = {"learning_rate": 1e-30, "eval_steps": 1, "max_steps": 50, "early_stopping_patience": 2}
    spec = write_spec(tmp_path / "spec.yaml", tiny(tmp_path / "whole", train=options))
    assert train_forked(spec, log=tmp_path / "log") == 0
    target, kill = tmp_path / "run", kill_at(Tuned, "save", 1)
    assert train_forked(spec, f"output_dir={target}", log=tmp_path / "log", prepare=kill) < 0
    assert train_forked(spec, f"output_dir={target}", log=tmp_path / "log") == 0
    assert_same(target, tmp_path / "whole")
    assert len(metrics(target)) == 6


# --- the same directory again ---


def test_a_finished_run_is_not_trained_again(undisturbed, spec):
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*") if path.is_file()}
    result = read(undisturbed / "result.json")
    again = peft_mllm.train(spec, quiet=True)
    assert again == {key: value for key, value in result.items() if key not in ("sha256", "spec_sha256")}
    changed = [path.name for path, time in before.items() if path.stat().st_mtime_ns != time]
    assert changed in ([], ["lock"])


def test_another_spec_in_the_same_directory(undisturbed, spec):
    before = outcome(undisturbed)
    said = command("train", spec, "train.learning_rate=0.5", "method.rank=2", "seed=7")
    assert said.code == 2
    for difference in (
        "train.learning_rate: 0.01 there, 0.5 here",
        "method.options.rank: 4 there, 2 here",
        "seed: 42 there",
    ):
        assert difference in said.err
    assert "output_dir" in said.err
    assert "Traceback" not in said.err
    assert outcome(undisturbed) == before
    assert status(undisturbed)["state"] == "done"


def test_what_changes_no_outcome_may_change(undisturbed, spec):
    assert command("train", spec, "train.logging_steps=5", "name=other").code == 0
    said = command("train", spec, "train.dataloader_num_workers=1")
    assert said.code == 0, said.err


def test_a_damaged_result_is_said(tmp_path, undisturbed, spec):
    shutil.copytree(undisturbed, tmp_path / "run")
    _truncate(tmp_path / "run" / "result.json")
    with pytest.raises(DiskError, match=r"result\.json"):
        peft_mllm.train(spec, f"output_dir={tmp_path / 'run'}", quiet=True)
    (tmp_path / "run" / "result.json").unlink()
    peft_mllm.train(spec, f"output_dir={tmp_path / 'run'}", quiet=True)
    assert_same(tmp_path / "run", undisturbed)


def test_the_same_spec_twice_at_once(tmp_path, spec, undisturbed):
    target = tmp_path / "run"
    slow = lambda: setattr(training, "train_step", _slow(training.train_step))  # noqa: E731
    first = fork_training(spec, f"output_dir={target}", log=tmp_path / "first", prepare=slow)
    while not (target / "metrics.jsonl").exists():
        time.sleep(0.01)
    said = command("train", spec, f"output_dir={target}")
    assert said.code == 2
    assert f"in use by process {first}" in said.err
    assert wait(first) == 0
    assert_same(target, undisturbed)


def _slow(real: Callable[..., Any]) -> Callable[..., Any]:
    def step(*args: Any) -> Any:
        time.sleep(0.1)
        return real(*args)

    return step


# --- what must not be saved ---


@pytest.fixture
def poisoned(tmp_path, monkeypatch):
    """Own data in which one image gives pixels that are no numbers; `poisoned(place)` is its spec."""
    colour = (1, 2, 3)
    real = Llava.pixels

    def pixels(self: Llava, images: Any, input_ids: Any) -> dict[str, torch.Tensor]:
        made = real(self, images, input_ids)
        for i, each in enumerate(one for row in images for one in row):
            if each.getpixel((0, 0)) == colour:
                made["pixel_values"][i] = float("nan")
        return made

    monkeypatch.setattr(Llava, "pixels", pixels)

    def data(name: str, bad: int | None) -> str:
        records = []
        for i in range(12):
            image(tmp_path / name / f"{i}.png", colour if i == bad else (20 * i, 50, 100))
            records.append(chat(answer=f"It is {i}.", id=f"sample-{i}", images=[f"{name}/{i}.png"]))
        return str(jsonl(tmp_path / f"{name}.jsonl", records))

    def spec(*, train: int | None = None, validation: int | None = None) -> dict[str, Any]:
        files = {"train": data("train", train), "validation": data("validation", validation)}
        return tiny(tmp_path / "run", task={"name": "custom", **files, "test": files["validation"]})

    return spec


@pytest.mark.parametrize("place", [11, 2])  # behind, and among, those that the self-check looks at
def test_a_loss_that_is_no_number(tmp_path, poisoned, place):
    spec = write_spec(tmp_path / "spec.yaml", poisoned(train=place))
    said = command("train", spec)
    assert said.code == 3, said.err
    assert f"sample-{place}" in said.err
    assert not [i for i in range(12) if i != place and f"sample-{i}," in said.err]
    assert "Traceback" not in said.err
    assert (status(tmp_path / "run")["state"], status(tmp_path / "run")["exit_code"]) == ("failed", 3)
    assert non_finite_files(tmp_path / "run") == []
    assert not (tmp_path / "run" / "adapter").exists()
    if (tmp_path / "run" / "metrics.jsonl").exists():
        assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()
    assert command("train", spec).code == 3  # again the same, not another end


def test_a_validation_loss_that_is_no_number(tmp_path, poisoned):
    """It must not count as the best one; and the run must be able to go on after it, or end with 3."""
    spec = write_spec(tmp_path / "spec.yaml", poisoned(validation=5))
    stop = signal_after_steps(3, signal.SIGTERM)
    codes = [train_forked(spec, log=tmp_path / "log", prepare=stop), train_forked(spec, log=tmp_path / "log")]
    said = (tmp_path / "log").read_text()
    assert "Traceback" not in said
    assert codes[-1] == 3, said
    assert "sample-5" in said


def test_a_gradient_that_is_no_number(tmp_path, monkeypatch):
    """The loss is finite, the gradient not: the step's samples are named, and nothing is applied."""
    real = Tuned.answer_losses
    calls = [0]

    def answer_losses(self: Tuned, batch: Any) -> torch.Tensor:
        losses = real(self, batch)
        calls[0] += self.model.training
        if calls[0] == 5 and losses.requires_grad:
            losses.register_hook(lambda gradient: gradient * float("inf"))
        return losses

    monkeypatch.setattr(Tuned, "answer_losses", answer_losses)
    with pytest.raises(DivergedError, match="gradient's norm") as caught:
        peft_mllm.train(tiny(tmp_path / "run"), quiet=True)
    assert "step 3" in str(caught.value)
    assert str(caught.value).count("train-0-") == 4
    assert checkpoints(tmp_path / "run") == [2]
    assert non_finite_files(tmp_path / "run") == []


# --- disks ---


def _full_after(count: int, error: Exception) -> Callable[[], None]:
    """For `prepare`: the disk is full when the `count`-th checkpoint is half written."""

    def prepare() -> None:
        real, calls = training.save_file, [0]

        def save_file(tensors: dict[str, torch.Tensor], path: Path) -> None:
            calls[0] += 1
            if calls[0] == count:
                path.write_bytes(b"half")
                raise error
            real(tensors, path)

        training.save_file = save_file

    return prepare


RUST = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    "error", [RUST, pytest.param(OSError(errno.ENOSPC, "No space left on device"), marks=pytest.mark.slow)]
)
def test_a_full_disk(tmp_path, spec, undisturbed, error):
    target, log = tmp_path / "run", tmp_path / "log"
    code = train_forked(spec, f"output_dir={target}", log=log, prepare=_full_after(2, error))
    said = log.read_text()
    assert code == 74, said
    assert "No space left on device" in said
    assert "step-00000004" in said
    assert "Free" in said
    assert "Traceback" not in said
    assert status(target)["exit_code"] == 74
    assert checkpoints(target) == [2]
    assert train_forked(spec, f"output_dir={target}", log=log) == 0
    assert_same(target, undisturbed)


def test_a_full_disk_at_the_final_adapter(tmp_path, spec, undisturbed):
    target, log = tmp_path / "run", tmp_path / "log"

    def prepare() -> None:
        def save(self: Tuned, directory: Path) -> None:
            (directory / "adapter_model.safetensors").write_bytes(b"half")
            raise RUST

        Tuned.save = save  # type: ignore[method-assign]

    assert train_forked(spec, f"output_dir={target}", log=log, prepare=prepare) == 74
    assert not (target / "adapter").exists()
    assert train_forked(spec, f"output_dir={target}", log=log) == 0
    assert_same(target, undisturbed)


def test_a_disk_that_fails_to_sync(tmp_path, spec, undisturbed):
    target, log = tmp_path / "run", tmp_path / "log"

    def prepare() -> None:
        real, calls = os.fsync, [0]

        def fsync(descriptor: int) -> None:
            calls[0] += 1
            if calls[0] == 12:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            real(descriptor)

        files.os.fsync = fsync

    code = train_forked(spec, f"output_dir={target}", log=log, prepare=prepare)
    assert code == 74, log.read_text()
    assert train_forked(spec, f"output_dir={target}", log=log) == 0
    assert_same(target, undisturbed)


def test_a_place_that_is_no_directory(tmp_path, spec):
    (tmp_path / "file").write_text("in the way")
    for place in (tmp_path / "file", tmp_path / "file" / "run"):
        said = command("train", spec, f"output_dir={place}")
        assert said.code in (2, 74)
        assert str(place) in said.err
        assert "Traceback" not in said.err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(SpecError, match=r"thesis\.txt"):
        peft_mllm.train(spec, f"output_dir={tmp_path / 'mine'}", quiet=True)
