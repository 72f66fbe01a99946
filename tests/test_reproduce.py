"""A run done again from its result: how much came again, what differs around it, and what is refused first."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_mllm.errors import EXIT_BAD_DATA, EXIT_INTERRUPTED, EXIT_USAGE, DataError, ModelError, SpecError
from peft_mllm.files import file_digest
from peft_mllm.reproduce import REPORT, compare_with, rerun
from peft_mllm.run import run
from peft_mllm.rundir import ADAPTER, RunDir
from peft_mllm.specfile import parse_spec
from runs import assert_same, command, fork, lines, read, signal_after_steps, tiny, wait

TASK = "scenes_at"
QUESTIONS = 40
SIZE = {"train": 12, "validation": 4, "test": QUESTIONS}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; copies of it are doctored."""
    path = tmp_path_factory.mktemp("reproduce") / "run"
    run(parse_spec(tiny(path, task={"name": TASK, "size": SIZE}, name="first")), quiet=True)
    return path


@pytest.fixture
def other(done: Path, tmp_path: Path) -> Path:
    """A copy of it to doctor."""
    shutil.copytree(done, tmp_path / "other")
    return tmp_path / "other"


def doctor(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a run's result, sealed as if it had come so."""
    with RunDir.open(path, read(path / "spec.json")) as opened:
        result = opened.result()
        assert result is not None
        change(result)
        opened.write_result(result)


def answer(path: Path, right: int, words: str = "something else") -> None:
    """Let the first `right` questions be answered rightly, and in other words."""
    file = path / "predictions" / f"{TASK}.jsonl"
    found = [line | {"score": 0.0} for line in lines(file)]
    changed = [line | {"score": 1.0, "prediction": words} for line in found[:right]]
    file.write_text("".join(json.dumps(line) + "\n" for line in changed + found[right:]))

    def change(result: dict[str, Any]) -> None:
        score = result["scores"][TASK]
        score |= {"values": {"accuracy": 100 * right / QUESTIONS}, "predictions_sha256": file_digest(file)}

    doctor(path, change)


# --- done again ---


def test_on_one_machine_a_run_comes_again_to_the_bit(done: Path) -> None:
    before = {file: file.read_bytes() for file in done.rglob("*") if file.is_file()}
    said = command("reproduce", done)
    again = done.with_name("run-reproduced")
    assert (said.code, said.err.count("Traceback")) == (0, 0)
    assert "bit-identical" in said.out
    assert "tensors are the same to the bit" in said.out
    assert_same(done, again)
    assert {file: file.read_bytes() for file in done.rglob("*") if file.is_file()} == before
    report = read(again / REPORT)
    assert (report["level"], report["reproduced"], report["environment"]) == ("bit-identical", True, {})
    assert report["adapter"]["compared"] == len(load_file(next((done / ADAPTER).glob("*.safetensors"))))
    assert report["losses"]["compared"] == 6 + 3  # of six steps, and validated at every second
    # once more: nothing is trained, and the comparison is the same
    said = command("reproduce", done, "--json")
    assert (said.code, json.loads(said.out)) == (0, report)


def test_an_interrupted_rerun_goes_on(done: Path, tmp_path: Path) -> None:
    def stopped() -> None:
        signal_after_steps(3, signal.SIGTERM)()
        command_line = command("reproduce", done, "--output", tmp_path / "again")
        raise SystemExit(command_line.code)

    assert wait(fork(stopped, tmp_path / "log")) == EXIT_INTERRUPTED
    assert compare_with(done, rerun(done, tmp_path / "again", quiet=True)).level == "bit-identical"
    assert read(tmp_path / "again" / "result.json")["training"]["resumed"]


def test_a_run_that_trains_nothing_is_the_same_in_its_answers(tmp_path: Path) -> None:
    spec = tiny(tmp_path / "zero", method="none", task={"name": TASK, "size": {"test": 4}})
    run(parse_spec(spec), quiet=True)
    outcome = compare_with(tmp_path / "zero", rerun(tmp_path / "zero", quiet=True))
    assert outcome.level == "same answers"
    assert (outcome.adapter.equal, outcome.adapter.note) == (None, "nothing was trained")


def test_a_step_is_as_large_as_it_was_in_several_processes(other: Path, tmp_path: Path) -> None:
    def halve(result: dict[str, Any]) -> None:
        result["processes"] = 2
        result["spec"]["train"]["gradient_accumulation_steps"] //= 2

    doctor(other, halve)
    outcome = compare_with(other, rerun(other, tmp_path / "again", quiet=True))
    assert outcome.level == "bit-identical"
    assert outcome.environment["processes"] == (2, 1)


# --- the levels ---


def test_another_last_bit_of_one_tensor_is_seen(done: Path, other: Path) -> None:
    file = next((other / ADAPTER).glob("*.safetensors"))
    tensors = load_file(file)
    name = sorted(tensors)[1]
    tensors[name].view(-1)[0] = torch.nextafter(tensors[name].view(-1)[0], torch.tensor(9.0))

    def write(directory: Path) -> None:
        shutil.copytree(file.parent, directory, dirs_exist_ok=True, ignore=shutil.ignore_patterns("MANIFEST.json"))
        save_file(tensors, directory / file.name, metadata={"format": "pt"})

    with RunDir.open(other, read(other / "spec.json")) as opened:
        opened.commit(ADAPTER, write)
    outcome = compare_with(done, other)
    assert outcome.level == "same answers"
    assert (outcome.adapter.equal, outcome.adapter.where) == (False, name)
    assert outcome.adapter.largest is not None
    assert 0 < outcome.adapter.largest < 1e-6


def test_another_loss_is_seen(done: Path, other: Path) -> None:
    log = lines(other / "metrics.jsonl")
    log[0]["loss"] += 0.25
    (other / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    outcome = compare_with(done, other)
    assert (outcome.level, outcome.losses.largest, outcome.losses.where) == ("same answers", 0.25, "loss, step 1")


def test_an_adapter_that_is_not_there_is_not_called_the_same(done: Path, other: Path) -> None:
    shutil.rmtree(other / ADAPTER)
    outcome = compare_with(other, done)
    assert (outcome.level, outcome.adapter.equal) == ("same answers", None)
    assert "MANIFEST.json is missing" in outcome.adapter.note


@pytest.mark.parametrize(("right", "level", "code"), [(1, "same within the interval", 0), (30, "not reproduced", 1)])
def test_other_scores_are_the_same_or_not_by_their_interval(
    done: Path, tmp_path: Path, right: int, level: str, code: int
) -> None:
    for name, number in (("there", 0), ("here", right)):
        shutil.copytree(done, tmp_path / name)
        answer(tmp_path / name, number)
    said = command("reproduce", tmp_path / "there", "--output", tmp_path / "here", "--json")
    found = json.loads(said.out)
    assert (said.code, found["level"], found["reproduced"]) == (code, level, not code)
    assert len(found["tasks"][TASK]["other_answers"]) == right
    assert found["tasks"][TASK]["difference"] == pytest.approx(100 * right / QUESTIONS)
    low, high = found["tasks"][TASK]["interval"]
    assert (low <= 0 <= high) is (code == 0)
    shown = command("reproduce", tmp_path / "there", "--output", tmp_path / "here")
    assert shown.code == code
    assert f"{right} of {QUESTIONS}" in shown.out
    assert level in shown.out


def test_what_differs_around_the_run_is_listed(done: Path, other: Path) -> None:
    doctor(other, lambda result: result["environment"].update(torch="1.0", device="a toaster"))
    environment = compare_with(other, done).environment
    assert environment.keys() == {"torch", "device"}
    assert environment["device"] == ("a toaster", read(done / "result.json")["environment"]["device"])
    assert "device: a toaster there, " in command("reproduce", other, "--output", done).out


# --- what is refused, before anything is trained ---


def test_another_base_is_another_run(other: Path, tmp_path: Path) -> None:
    doctor(other, lambda result: result["model"].update(fingerprint="f00d"))
    with pytest.raises(ModelError, match=r"The base is not the one of .*was f00d.*get the weights"):
        rerun(other, tmp_path / "again", quiet=True)
    assert not any((tmp_path / "again" / "checkpoints").iterdir())
    assert command("reproduce", other, "--output", tmp_path / "again").code == EXIT_USAGE


def test_other_training_data_is_another_run(other: Path, tmp_path: Path) -> None:
    doctor(other, lambda result: result["data"]["train"].update(fingerprint="f00d"))
    with pytest.raises(DataError, match=r"training data of scenes_at is not that of .*was f00d"):
        rerun(other, tmp_path / "again", quiet=True)
    assert not any((tmp_path / "again" / "checkpoints").iterdir())


def test_other_questions_cannot_be_compared(other: Path, tmp_path: Path) -> None:
    file = other / "predictions" / f"{TASK}.jsonl"
    found = lines(file)
    found[3]["question"] = "What is it?"
    file.write_text("".join(json.dumps(line) + "\n" for line in found))
    with pytest.raises(DataError, match=rf"questions of scenes_at .* 1 that differ \({found[3]['id']} for instance"):
        rerun(other, tmp_path / "again", quiet=True)
    assert not any((tmp_path / "again" / "checkpoints").iterdir())


def test_a_finished_rerun_of_another_base_is_refused_too(done: Path, other: Path) -> None:
    doctor(other, lambda result: result["model"].update(fingerprint="f00d"))
    with pytest.raises(ModelError, match="The base is not the one"):
        compare_with(done, other)


def test_only_a_finished_run_can_be_done_again(other: Path, tmp_path: Path) -> None:
    (other / "result.json").unlink()
    said = command("reproduce", other)
    assert said.code == EXIT_BAD_DATA
    assert f"{other} is no finished run (it is done, step 6)" in said.err
    assert not (tmp_path / "other-reproduced").exists()
    assert "is no finished run: it has no result.json" in command("reproduce", tmp_path / "absent").err


def test_a_run_is_not_done_again_upon_itself(done: Path) -> None:
    with pytest.raises(SpecError, match="is the run itself"):
        rerun(done, done)
