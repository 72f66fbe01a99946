"""The loop computes what it says: loss, gradients, schedule, evaluation, the best checkpoint, what is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import peft_mllm
from peft_mllm.assets import EMBEDDED
from peft_mllm.attention import Packing
from peft_mllm.data.trees import collate_padded
from peft_mllm.errors import DataError, DivergedError, MethodError, SpecError
from peft_mllm.methods import METHODS
from peft_mllm.models import MODELS
from peft_mllm.seeds import derive
from peft_mllm.spec import NamedSpec
from peft_mllm.specfile import build
from peft_mllm.tasks import TASKS
from peft_mllm.training import STATE
from peft_mllm.tuned import attach
from runs import checkpoints, lines, losses, metrics, non_finite_files, status, tiny, weights

STILL = {"name": "lora", "rank": 4, "alpha": 8, "dropout": 0.0}
EIGHT = {"name": "scenes_at", "size": {"train": 8, "validation": 0, "test": 1}}


def train(directory: Path, **changes: Any) -> dict[str, Any]:
    return peft_mllm.train(tiny(directory, **changes), quiet=True)


def sgd(**options: Any) -> dict[str, Any]:
    """One plain step over all eight samples: the weights' change is minus the gradient."""
    return {
        "optim": "SGD",
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
        "warmup_ratio": 0.0,
        "max_grad_norm": 0.0,
        "max_steps": 1,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
    } | options


def split(micro_batch: int) -> dict[str, int]:
    return {"per_device_train_batch_size": micro_batch, "gradient_accumulation_steps": 8 // micro_batch}


def started() -> Any:
    """The model as a run of seed 42 begins it."""
    torch.manual_seed(derive(42, "init"))
    return attach(MODELS["llava"].tiny(), build(METHODS, NamedSpec(name="lora", options=_options(STILL))))


def _options(named: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in named.items() if key != "name"}


def as_saved(name: str) -> str:
    return name.replace(".default", "")


def moved(run: Path) -> dict[str, torch.Tensor]:
    """How each weight changed."""
    before = {as_saved(name): p.detach() for name, p in started().trainable().items()}
    return {name: tensor - before[name] for name, tensor in weights(run).items()}


# --- the loss and its gradient ---


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps over eight samples, each step in one batch."""
    run = tmp_path_factory.mktemp("whole") / "run"
    train(run, method=STILL, task=EIGHT, train={**split(8), "num_train_epochs": 4})
    return run


@pytest.mark.parametrize("micro_batch", [*(pytest.param(n, marks=pytest.mark.slow) for n in (4, 2)), 3, 1])
def test_micro_batches_change_nothing(tmp_path, whole, micro_batch):
    options = split(micro_batch)
    if micro_batch == 3:  # the step's last micro-batch is smaller
        options["gradient_accumulation_steps"] = 3
    train(tmp_path / "run", method=STILL, task=EIGHT, train={**options, "num_train_epochs": 4})
    assert len(losses(whole)) == 4
    assert losses(tmp_path / "run") == pytest.approx(losses(whole), rel=1e-6)
    norms = [[line["grad_norm"] for line in metrics(run)] for run in (whole, tmp_path / "run")]
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)


@pytest.mark.parametrize("micro_batch", [8, 2])
def test_a_step_is_the_mean_over_all_its_answer_tokens(tmp_path, micro_batch):
    """Against a computation of its own: padded rows, one by one, torch's cross-entropy."""
    result = train(tmp_path / "run", method=STILL, task=EIGHT, train=sgd(**split(micro_batch)))
    tuned = started()
    records = build(TASKS, NamedSpec(name="scenes_at", options=_options(EIGHT))).records("train")
    total, per_sample = [], []
    for record in records:
        batch = collate_padded([tuned.family.encode(record)], pixels=tuned.family.pixels, pad_id=0)
        logits = tuned.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **batch.pixels).logits
        each = torch.nn.functional.cross_entropy(logits[0, batch.columns], batch.targets, reduction="none")
        total.append(each)
        per_sample.append(each.mean().item())
    mean = torch.cat(total).mean()
    mean.backward()
    assert losses(tmp_path / "run") == pytest.approx([mean.item()], rel=1e-6)
    assert abs(sum(per_sample) / len(per_sample) - mean.item()) > 1e-4, "the mean of means is not told apart"
    change = moved(tmp_path / "run")
    for name, parameter in tuned.trainable().items():
        torch.testing.assert_close(change[as_saved(name)], -parameter.grad, rtol=1e-4, atol=1e-6)
    assert result["training"]["answer_tokens"] == sum(len(each) for each in total)


@pytest.mark.parametrize("limit", [0.0, 0.25, 1e6])
def test_clipping(tmp_path, limit):
    train(tmp_path / "run", method=STILL, task=EIGHT, train=sgd(max_grad_norm=limit))
    norm = torch.stack([change.norm() for change in moved(tmp_path / "run").values()]).norm().item()
    (line,) = metrics(tmp_path / "run")
    assert line["grad_norm"] > 0.25, "the norm that is logged is the one before clipping"
    assert norm == pytest.approx(0.25 if limit == 0.25 else line["grad_norm"], rel=1e-4)


def test_schedule(tmp_path):
    options = {"lr_scheduler_type": "linear", "warmup_steps": 2, "learning_rate": 4e-3}
    train(tmp_path / "run", train=options)
    rates = [line["learning_rate"] for line in metrics(tmp_path / "run") if "loss" in line]
    assert rates == pytest.approx([0, 2e-3, 4e-3, 3e-3, 2e-3, 1e-3])


def test_each_part_has_its_own_rate_and_vectors_do_not_decay(tmp_path):
    options = sgd(learning_rate=1e-9, connector_learning_rate=0.5, weight_decay=1.0, optim="SGD")
    result = train(tmp_path / "run", method=STILL, task=EIGHT, connector="tuned", train=options)
    assert result["trainable"]["connector"]["learning_rate"] == 0.5
    plain = sgd(learning_rate=1e-9, connector_learning_rate=0.5, optim="SGD")
    train(tmp_path / "plain", method=STILL, task=EIGHT, connector="tuned", train=plain)
    base = MODELS["llava"].tiny().model.state_dict()
    decayed, still = weights(tmp_path / "run"), weights(tmp_path / "plain")
    names = [name for name in decayed if "projector" in name]
    assert len(names) == 4
    for name in names:
        start = base[name.removeprefix("base_model.model.")]
        shrunk = 0.5 * start if start.ndim > 1 else torch.zeros_like(start)
        torch.testing.assert_close(still[name] - decayed[name], shrunk, rtol=1e-4, atol=1e-6)


def test_loss_falls(tmp_path):
    train(tmp_path / "run", method=STILL, task=EIGHT, train={**split(8), "num_train_epochs": 12})
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0] - 0.2


# --- how long, how often ---


def test_a_partial_epoch_a_partial_batch_and_max_steps(tmp_path):
    result = train(tmp_path / "half", train={"num_train_epochs": 0.5})
    assert result["training"]["steps"] == 2
    assert result["training"]["epochs"] == pytest.approx(2 / 3)
    result = train(tmp_path / "more", train={"max_steps": 8})  # more than the data has
    assert result["training"]["steps"] == 8
    assert len(losses(tmp_path / "more")) == 8
    result = train(tmp_path / "wide", train={"per_device_train_batch_size": 64})  # wider than the data
    assert result["training"]["steps"] == 2
    ten = {"name": "scenes_at", "size": {"train": 10, "validation": 0, "test": 1}}
    result = train(tmp_path / "ten", task=ten, train={"num_train_epochs": 1})
    assert result["training"]["steps"] == 3
    one_epoch = train(tmp_path / "one", task=ten, train={"num_train_epochs": 1, **split(8)})
    assert result["training"]["answer_tokens"] == one_epoch["training"]["answer_tokens"]


@pytest.mark.parametrize(
    ("strategy", "evaluated", "saved"),
    [("no", [], [6]), ("steps", [4, 6], [4, 6]), ("epoch", [3, 6], [3, 6])],
)
def test_when_it_evaluates_and_saves(tmp_path, strategy, evaluated, saved):
    options = {"eval_strategy": strategy, "save_strategy": strategy, "eval_steps": 4, "save_steps": 4}
    result = train(tmp_path / "run", train={**options, "save_total_limit": 9, "learning_rate": 1e-3})
    assert [line["step"] for line in metrics(tmp_path / "run") if "eval_loss" in line] == evaluated
    assert checkpoints(tmp_path / "run") == saved
    assert (result["training"]["best"] is None) == (strategy == "no")


def test_logged_losses_are_means_over_their_window(tmp_path):
    train(tmp_path / "each", method=STILL, task=EIGHT, train={"per_device_train_batch_size": 1})
    train(
        tmp_path / "three",
        method=STILL,
        task=EIGHT,
        train={"per_device_train_batch_size": 1, "logging_steps": 3},
    )
    assert [line["step"] for line in metrics(tmp_path / "three")] == [3, 6, 8]
    assert min(losses(tmp_path / "each")[:3]) < losses(tmp_path / "three")[0]
    assert losses(tmp_path / "three")[0] < max(losses(tmp_path / "each")[:3])


def test_the_best_checkpoint_is_restored_and_saved(tmp_path):
    options = {"learning_rate": 2.0, "eval_steps": 1, "max_steps": 5, "lr_scheduler_type": "constant"}
    shuffled = {"group_by_image": False}
    result = train(tmp_path / "run", method=STILL, data=shuffled, train={**options, "save_total_limit": 1})
    best = result["training"]["best"]
    evaluated = {line["step"]: line["eval_loss"] for line in metrics(tmp_path / "run") if "eval_loss" in line}
    assert best == {
        "step": min(evaluated, key=evaluated.get),
        "eval_loss": min(evaluated.values()),
        "restored": True,
    }
    assert best["step"] < 5, "this test needs a run that gets worse"
    state = load_file(tmp_path / "run" / "checkpoints" / f"step-{best['step']:08d}" / STATE)
    saved = weights(tmp_path / "run")
    for name, tensor in saved.items():
        (match,) = [v for k, v in state.items() if k.startswith("parameter|") and as_saved(k[10:]) == name]
        assert torch.equal(tensor, match)
    last = train(tmp_path / "last", method=STILL, data=shuffled, train={**options, "load_best_model_at_end": False})
    assert last["training"]["best"] == {**best, "restored": False}
    assert any(not torch.equal(tensor, saved[name]) for name, tensor in weights(tmp_path / "last").items())


def test_early_stopping(tmp_path):
    options = {"learning_rate": 1e-30, "eval_steps": 1, "max_steps": 50, "early_stopping_patience": 2}
    result = train(tmp_path / "run", method=STILL, train=options)
    assert result["training"]["stopped_early"]
    assert result["training"]["steps"] == 3
    assert result["training"]["best"]["step"] == 1
    assert len(losses(tmp_path / "run")) == 3


def test_early_stopping_logs_its_last_steps(tmp_path):
    options = {"learning_rate": 1e-30, "eval_steps": 1, "max_steps": 50, "early_stopping_patience": 2}
    train(tmp_path / "run", method=STILL, train={**options, "logging_steps": 2})
    assert [line["step"] for line in metrics(tmp_path / "run") if "loss" in line] == [2, 3]


def test_validation_split_off_the_training_data(tmp_path):
    task = {"name": "scenes_at", "size": {"train": 16, "validation": 0, "test": 1}}
    data = {"validation_fraction": 0.25}
    result = train(tmp_path / "run", task=task, data=data, train={"max_steps": 2})
    account = result["data"]["train"]
    assert account["trained_on"] + account["validation"] == 16
    assert account["validation"] > 0
    task["size"]["validation"] = 4  # a task with validation data of its own keeps all that it learns from
    result = train(tmp_path / "own", task=task, data=data, train={"max_steps": 2})
    account = result["data"]["train"]
    assert (account["trained_on"], account["validation"]) == (16, 4)


# --- precision, and what trains ---


@pytest.mark.parametrize(
    "changes", [{"train": {"bf16": True}}, {"model": {"path": str(EMBEDDED), "dtype": "bfloat16"}}]
)
def test_bfloat16_computes_in_it_and_saves_float32(tmp_path, changes):
    result = train(tmp_path / "run", **changes)
    assert status(tmp_path / "run")["state"] == "done"
    assert {tensor.dtype for tensor in weights(tmp_path / "run").values()} == {torch.float32}
    state = load_file(tmp_path / "run" / "checkpoints" / "step-00000006" / STATE)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert result["self_check"]["tolerance"] == 2e-2


def test_bfloat16_is_near_float32(tmp_path):
    for name in (True, False):
        train(tmp_path / str(name), method=STILL, train={"bf16": name})
    assert losses(tmp_path / "True") == pytest.approx(losses(tmp_path / "False"), rel=0.02)
    assert losses(tmp_path / "True") != losses(tmp_path / "False")


def test_computing_layers_again_changes_nothing(tmp_path):
    for name in ("full", "none"):
        train(tmp_path / name, speed={"recompute": name})
    assert losses(tmp_path / "full") == pytest.approx(losses(tmp_path / "none"), rel=1e-6)


def test_no_method_trains_nothing_and_is_scored(tmp_path):
    result = train(tmp_path / "run", method="none")
    assert result["trainable"] == {}
    assert result["adapter"] is None
    assert set(result["scores"]) == {"scenes_at"}
    assert not (tmp_path / "run" / "adapter").exists()
    assert len(lines(tmp_path / "run" / "predictions" / "scenes_at.jsonl")) == 4


CASES = {
    "full": ({"method": "full"}, {"llm"}),
    "connector alone": ({"method": "none", "connector": "tuned"}, {"connector"}),
    "vision alone": ({"method": "none", "vision": "tuned"}, {"vision"}),
    "everything": ({"method": "full", "connector": "tuned", "vision": "tuned"}, {"llm", "connector", "vision"}),
}


@pytest.mark.parametrize("name", CASES)
def test_training_the_model_itself(tmp_path, name):
    changes, parts = CASES[name]
    options = {"connector_learning_rate": 1e-2, "vision_learning_rate": 1e-2}
    result = train(tmp_path / "run", **changes, train=options)
    assert set(result["trainable"]) == parts
    family = MODELS["llava"].tiny()
    base, saved = family.model.state_dict(), weights(tmp_path / "run")
    changed = {
        family.anatomy.part_of(key)
        for key, tensor in base.items()
        for tensor_there in [_found(saved, key)]
        if tensor_there is not None and not torch.equal(tensor, tensor_there)
    }
    assert changed == parts
    scores = peft_mllm.evaluate(tmp_path / "run", quiet=True)
    assert scores["scenes_at"]["values"] == result["scores"]["scenes_at"]["values"]


def _found(saved: dict[str, torch.Tensor], key: str) -> torch.Tensor | None:
    """A saved weight, under the model's own name or the older one that transformers writes."""
    tails = (key, key.removeprefix("model."), key.replace("model.language_model.", "language_model.model."))
    return next((saved[tail] for tail in (*tails, f"language_model.{key}") if tail in saved), None)


@pytest.mark.parametrize("part", ["connector", "vision"])
def test_a_method_and_a_part(tmp_path, part):
    options = {f"{part}_learning_rate": 1e-2}
    result = train(tmp_path / "run", **{part: "tuned"}, train=options)
    assert set(result["trainable"]) == {"llm", part}
    word = {"connector": "projector", "vision": "vision_tower"}[part]
    saved = weights(tmp_path / "run")
    assert any("lora" in key for key in saved)
    count = sum(tensor.numel() for key, tensor in saved.items() if word in key)
    assert count == result["trainable"][part]["parameters"]
    scores = peft_mllm.evaluate(tmp_path / "run", output_dir=tmp_path / "again", quiet=True)
    assert scores["scenes_at"]["values"] == result["scores"]["scenes_at"]["values"]
    assert lines(tmp_path / "again/predictions/scenes_at.jsonl") == lines(tmp_path / "run/predictions/scenes_at.jsonl")


# --- what cannot be trained ---


def test_nothing_to_train_on(tmp_path):
    task = {"name": "scenes_at", "size": {"train": 0, "validation": 0, "test": 4}}
    with pytest.raises(DataError, match="nothing to train on"):
        train(tmp_path / "run", task=task)
    assert status(tmp_path / "run")["state"] == "failed"


def test_a_task_without_test_questions(tmp_path):
    """It is trained without a score, or refused before training; not after it."""
    try:
        result = train(tmp_path / "run", task={"name": "scenes_at", "size": {"train": 4}})
    except DataError:
        assert not (tmp_path / "run" / "adapter").exists(), "refused only after training"
    else:
        assert result["scores"].get("scenes_at", {"n": 0})["n"] == 0


def test_names_that_torch_and_transformers_do_not_know(tmp_path):
    for name in ("optim", "lr_scheduler_type"):
        with pytest.raises(SpecError, match=name):
            train(tmp_path / name, train={name: "nonsense"})
    with pytest.raises(SpecError, match="optim_args"):
        train(tmp_path / "args", train={"optim_args": {"nonsense": 1}})


def test_a_location_without_effect(tmp_path):
    with pytest.raises((MethodError, SpecError)):
        train(tmp_path / "run", method={"name": "prefix", "location": "mlp"})


# --- divergence ---


@pytest.mark.parametrize(("optim", "rate"), [("AdamW", 1e25), ("SGD", 3e38)])
@pytest.mark.parametrize("steps", [1, 4])
def test_an_absurd_rate_saves_nothing_non_finite(tmp_path, optim, rate, steps):
    options = {"optim": optim, "learning_rate": rate, "warmup_ratio": 0.0, "max_grad_norm": 0.0}
    options |= {"save_steps": 1, "max_steps": steps, "eval_strategy": "no"}
    try:
        train(tmp_path / "run", method={**STILL, "alpha": 4096}, train=options)
        code = 0
    except DivergedError as error:
        code = error.exit_code
    assert status(tmp_path / "run")["exit_code"] == code
    assert non_finite_files(tmp_path / "run") == []
    for line in metrics(tmp_path / "run"):
        assert all(isinstance(value, (int, float)) for value in line.values())


def test_where_sharing_is_not_exact_nothing_is_shared(tmp_path, monkeypatch, capsys):
    """Where branches see each other, the self-check fails, says so, and the run is still right, in padded rows."""
    right = {"method": STILL, "task": EIGHT}
    expected = train(tmp_path / "alone", **right, data={"share_prefix": False}, speed={"attention": "mask"})
    assert expected["training"]["layout"] == "rows"

    def causal(segments: torch.Tensor) -> torch.Tensor:
        return torch.ones(len(segments), 1, *[segments.shape[1]] * 2, dtype=torch.bool).tril()

    def one_branch(prefixes: tuple[int, ...], own: tuple[tuple[int, ...], ...]) -> Packing:
        return Packing(prefixes, tuple((sum(lengths),) for lengths in own))

    monkeypatch.setattr("peft_mllm.data.trees.tree_mask", causal)
    monkeypatch.setattr("peft_mllm.data.trees.Packing", one_branch)
    result = peft_mllm.train(tiny(tmp_path / "shared", **right))
    assert not result["self_check"]["passed"]
    assert result["training"]["layout"] == "padded"
    said = " ".join(capsys.readouterr().err.split())
    assert "trees packed in one row do not give the gradients" in said
    assert "samples that share an image's prefix do not give the gradients" in said
    assert losses(tmp_path / "shared") == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)
