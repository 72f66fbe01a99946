"""What a result says that costs are computed from, held against a count of its own; and what is shown meanwhile."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

import peft_mllm
from peft_mllm import training as loop
from peft_mllm.errors import DataError
from peft_mllm.models import MODELS
from peft_mllm.parts import NAMES, parts_of, sizes_of
from peft_mllm.rundir import RunDir
from peft_mllm.spec import NamedSpec
from peft_mllm.specfile import build
from peft_mllm.study.results import read_result
from peft_mllm.tasks import TASKS
from runs import kill_at, lines, read, status, tiny, train_forked, write_spec

TASK = {"name": "scenes_at", "size": {"train": 16, "validation": 4, "test": 6}}
"""Four questions about each image."""
TRAINED = {"num_train_epochs": 2, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}


def records(split: str) -> Any:
    return build(TASKS, NamedSpec(name="scenes_at", options={"size": TASK["size"]})).records(split)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    spec = tiny(tmp_path_factory.mktemp("run") / "run", task=TASK, data={"group_by_image": True}, train=TRAINED)
    return peft_mllm.train(spec, quiet=True)


def test_training_is_counted_as_if_nothing_was_shared(shared):
    family = MODELS["llava"].tiny()
    every = [family.encode(record) for record in records("train")]
    training = shared["training"]
    assert training["sequence_tokens"] == 2 * sum(len(sample.ids) for sample in every)
    assert training["images"] == 2 * 16
    assert training["answer_tokens"] == 2 * sum(sample.answer_tokens for sample in every)
    assert training["tokens"] < training["sequence_tokens"], "this run shares"


def test_sharing_changes_what_is_computed_and_not_the_count(tmp_path, shared):
    data = {"group_by_image": True, "share_prefix": False}
    training = peft_mllm.train(tiny(tmp_path / "run", task=TASK, data=data, train=TRAINED), quiet=True)["training"]
    assert training["tokens"] == training["sequence_tokens"] == shared["training"]["sequence_tokens"]
    assert training["images"] == shared["training"]["images"]


def test_rows_that_are_padded_are_counted_alike(tmp_path, shared):
    """peft's own prompt methods share nothing, and widen the rows by virtual tokens, which are no tokens of samples."""
    method = {"name": "peft", "type": "PROMPT_TUNING", "config": {"num_virtual_tokens": 4}}
    training = peft_mllm.train(tiny(tmp_path / "run", task=TASK, method=method, train=TRAINED), quiet=True)["training"]
    assert training["sequence_tokens"] == shared["training"]["sequence_tokens"]
    assert training["images"] == 32


def test_counts_survive_a_kill(tmp_path):
    spec = write_spec(tmp_path / "spec.yaml", tiny(tmp_path / "whole"))
    assert train_forked(spec, log=tmp_path / "log") == 0
    kill = kill_at(loop, "train_step", 4)  # after a checkpoint, and one step that it does not hold
    target = f"output_dir={tmp_path / 'run'}"
    assert train_forked(spec, target, log=tmp_path / "log", prepare=kill) == -signal.SIGKILL
    assert train_forked(spec, target, log=tmp_path / "log") == 0
    whole, mine = (read(tmp_path / name / "result.json")["training"] for name in ("whole", "run"))
    assert mine["resumed"] == 1
    for key in ("tokens", "answer_tokens", "sequence_tokens", "images"):
        assert mine[key] == whole[key] > 0


def test_answers_are_counted(tmp_path):
    spec = tiny(tmp_path / "run", task=TASK, method="none")
    score = peft_mllm.train(spec, quiet=True)["scores"]["scenes_at"]
    family = MODELS["llava"].tiny()
    prompts = [family.encode(record, answer=False) for record in records("test")]
    assert score["prompt_tokens"] == sum(len(sample.ids) for sample in prompts)
    said = lines(tmp_path / "run" / "predictions" / "scenes_at.jsonl")
    assert score["new_tokens"] == sum(line["tokens"] for line in said) > 0


@pytest.mark.parametrize("name", list(MODELS))
def test_parts_are_the_whole_and_no_parameter_counts_twice(name):
    family = MODELS[name].tiny()
    parts = {part.name: part.parameters for part in parts_of(family.model, family.anatomy)}
    assert tuple(parts) == NAMES
    assert sum(parts.values()) == sum(p.numel() for p in family.model.parameters())
    sizes = sizes_of(family.model, family.anatomy)
    assert sizes["parts"] == parts
    rows = family.model.get_input_embeddings().weight.shape[0]
    assert sizes["embeddings"] == rows * sizes["width"]
    assert sizes["embeddings"] < parts["llm"]
    assert sizes["layers"] == len(family.model.get_submodule(family.anatomy.layers))


def test_a_result_has_them_and_a_study_reads_them(shared):
    model = shared["model"]
    assert sum(model["parts"].values()) == model["parameters"]
    result = read_result(Path(shared["spec"]["output_dir"]))
    assert dict(result.parts) == model["parts"]
    assert (result.model.embeddings, result.model.layers, result.model.width) == (
        model["embeddings"],
        model["layers"],
        model["width"],
    )
    assert result.training is not None
    assert result.training.sequence_tokens == shared["training"]["sequence_tokens"]
    assert result.training.images == 32
    assert result.scores["scenes_at"].prompt_tokens == shared["scores"]["scenes_at"]["prompt_tokens"]


# --- what is shown meanwhile ---


def test_stages(tmp_path, monkeypatch):
    seen: list[dict[str, Any]] = []
    real = RunDir.set_status

    def set_status(self: RunDir, *args: Any, **more: Any) -> None:
        real(self, *args, **more)
        seen.append(status(self.path))

    monkeypatch.setattr(RunDir, "set_status", set_status)
    spec = tiny(tmp_path / "run", evaluate=[{"name": "scenes_colour", "size": {"test": 2}}], curve={"after_best": 1})
    result = peft_mllm.train(spec, quiet=True)
    stages = list(dict.fromkeys(each["stage"] for each in seen))
    points = [point["step"] for point in result["curve"] if not point["best"]]
    tasks = ("scenes_at", "scenes_colour")
    assert stages == [
        "loading",
        "training",
        "measuring retention",
        *(f"scoring {task}" for task in tasks),
        *(f"scoring {task} at step {step}" for step in points for task in tasks),
        "",
    ]
    assert [each["step"] for each in seen if each["stage"] == "training"] == [0, 2, 4, 6]
    assert {each["total"] for each in seen if each["stage"] == "training"} == {6}
    assert {each["state"] for each in seen[:-1]} == {"running"}
    assert (seen[-1]["state"], seen[-1]["step"], seen[-1]["total"]) == ("done", 6, 6)


def test_a_failure_says_at_which_stage(tmp_path):
    with pytest.raises(DataError):
        peft_mllm.train(tiny(tmp_path / "run", task={**TASK, "size": {"train": 0, "test": 1}}), quiet=True)
    said = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (said["state"], said["stage"], said["step"], said["total"]) == ("failed", "loading", None, None)
