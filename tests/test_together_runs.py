"""Runs that are trained together end as each of them by itself, whatever becomes of the others."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from peft_mllm import training
from peft_mllm.common import Encodings
from peft_mllm.data.encode import Sample
from peft_mllm.errors import DivergedError, Interrupted, SpecError
from peft_mllm.record import Record
from peft_mllm.run import run
from peft_mllm.rundir import RunDir
from peft_mllm.specfile import parse_spec
from peft_mllm.together import outcomes_of, run_together, why_not_together
from peft_mllm.together.joined import SharedBase
from runs import (
    assert_same,
    checkpoints,
    command,
    fork,
    kill_at,
    metrics,
    read,
    signal_after_steps,
    status,
    tiny,
    train_forked,
    wait,
    write_spec,
)

LORA: dict[str, Any] = {"name": "lora", "rank": 4, "alpha": 8, "dropout": 0.1}
CHANGES: dict[str, dict[str, Any]] = {
    "lora": {"method": LORA},
    "seeded": {"method": LORA, "seed": 3, "train": {"num_train_epochs": 1}},  # it ends early, and reads otherwise
    "ia3": {"method": {"name": "ia3"}, "train": {"gradient_accumulation_steps": 1, "learning_rate": 1e-1}},
    "wild": {"method": LORA, "train": {"learning_rate": 1e20, "max_grad_norm": 0.0}},
    "full": {"method": {"name": "full"}, "train": {"learning_rate": 1e-3}},
}


def assert_same_both_ways(folder: Path, changes: list[dict[str, Any]]) -> None:
    """Each of these runs comes out together as it does alone."""
    ways = {
        way: [parse_spec(tiny(folder / way / str(number), **change)) for number, change in enumerate(changes)]
        for way in ("alone", "together")
    }
    for spec in ways["alone"]:
        run(spec, quiet=True)
    run_together(ways["together"], quiet=True)
    for number in range(len(changes)):
        assert_same(folder / "together" / str(number), folder / "alone" / str(number))


def spec_of(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    return tiny(folder / name, **(CHANGES[name] | changes))


def specs_in(folder: Path, *names: str) -> list[Any]:
    return [parse_spec(spec_of(folder, name)) for name in names]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each run by itself."""
    folder = tmp_path_factory.mktemp("alone")
    for name in CHANGES:
        if name != "wild":
            run(parse_spec(spec_of(folder, name)), quiet=True)
    with pytest.raises(DivergedError):
        run(parse_spec(spec_of(folder, "wild")), quiet=True)
    return folder


def assert_as_alone(folder: Path, alone: Path, *names: str) -> None:
    for name in names:
        assert_same(folder / name, alone / name)
        assert states(folder / name) == states(alone / name)
        assert status(folder / name)["state"] == "done"


def states(run: Path) -> dict[str, bytes]:
    """Parameters and optimizer at each checkpoint."""
    found = {file.parent.name: file.read_bytes() for file in (run / "checkpoints").glob(f"*/{training.STATE}")}
    assert len(found) == len(checkpoints(run)) > 0
    return found


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many runs each product was of."""
    sizes: list[int] = []
    joined = SharedBase._joined

    def noted(self: Any, entering: Any) -> Any:
        sizes.append(len(entering))
        return joined(self, entering)

    monkeypatch.setattr(SharedBase, "_joined", noted)
    return sizes


def test_each_run_is_the_run_alone_and_one_that_diverges_hurts_nobody(
    tmp_path: Path, alone: Path, at_once: list[int]
) -> None:
    names = [*CHANGES]
    outcomes = outcomes_of(specs_in(tmp_path, *names), quiet=True)
    kinds = [type(outcome) for outcome in outcomes]
    assert kinds == [dict, dict, dict, DivergedError, dict]
    assert_as_alone(tmp_path, alone, "lora", "seeded", "ia3", "full")
    assert metrics(tmp_path / "wild") == metrics(alone / "wild")
    assert status(tmp_path / "wild")["state"] == status(alone / "wild")["state"]
    assert max(at_once) == 4  # all but `full`, which is in no product
    assert len(set(at_once)) > 1  # they end one by one
    together = read(tmp_path / "lora" / "result.json")
    assert (together["together"], read(alone / "lora" / "result.json")["together"]) == (len(names), 1)
    assert together["training"]["seconds"] > 0


def test_a_stopped_bundle_is_saved_and_goes_on(tmp_path: Path, alone: Path) -> None:
    names = ("lora", "seeded", "ia3")
    log = tmp_path / "log"

    def work() -> None:
        signal_after_steps(4, signal.SIGTERM)()
        outcomes = outcomes_of(specs_in(tmp_path, *names), quiet=True)
        assert all(isinstance(outcome, Interrupted) for outcome in outcomes), outcomes

    assert wait(fork(work, log)) == 0, log.read_text()
    assert [status(tmp_path / name)["state"] for name in names] == ["interrupted"] * 3
    assert not (tmp_path / "lora" / "result.json").exists()
    assert all(isinstance(outcome, dict) for outcome in run_together(specs_in(tmp_path, *names), quiet=True))
    assert read(tmp_path / "lora" / "result.json")["training"]["resumed"] == 1
    for name in names:
        assert_same(tmp_path / name, alone / name)


@pytest.mark.slow
def test_two_ctrl_c_end_a_bundle_at_once_and_it_goes_on(tmp_path: Path, alone: Path) -> None:
    names = ("lora", "seeded", "ia3")
    files = [write_spec(tmp_path / f"{name}.yaml", spec_of(tmp_path, name)) for name in names]
    log, twice = tmp_path / "log", signal_after_steps(5, signal.SIGINT, signal.SIGINT)
    assert train_forked(files[0], *map(str, files[1:]), log=log, prepare=twice) != 0
    assert [(tmp_path / name / "result.json").exists() for name in names] == [False] * 3
    assert train_forked(files[0], *map(str, files[1:]), log=log) == 0, log.read_text()
    for name in names:
        assert_same(tmp_path / name, alone / name)


def test_equal_samples_of_other_names_are_not_one() -> None:
    """Dropout is a function of a sample's name, and two runs may have data with the same content."""
    made = []

    def encode(record: Record, *, answer: bool, labels: str) -> Sample:
        made.append((record.id, answer, labels))
        return Sample(record.id, (1,), (1,))

    remembered = Encodings().before(encode)
    one, other = (Record(id=name, turns=()) for name in ("one", "other"))
    for record in (one, other, one):
        assert remembered(record).id == record.id
    remembered(one, labels="upstream")
    remembered(one, answer=False)
    asked = [("one", True, "answer"), ("other", True, "answer"), ("one", True, "upstream"), ("one", False, "answer")]
    assert made == asked


def test_a_finished_run_is_its_result_and_the_others_are_trained(tmp_path: Path, alone: Path) -> None:
    shutil.copytree(alone / "lora", tmp_path / "lora")
    (spec,) = specs_in(tmp_path, "lora")
    before = read(tmp_path / "lora" / "result.json")
    outcomes = run_together([*specs_in(tmp_path, "seeded"), spec], quiet=True)
    assert isinstance(outcomes[1], dict)
    assert outcomes[1].items() <= before.items()
    assert read(tmp_path / "lora" / "result.json") == before
    assert_as_alone(tmp_path, alone, "seeded", "lora")


def test_a_run_that_cannot_begin_is_told_and_the_others_go_on(tmp_path: Path, alone: Path) -> None:
    missing = {"name": "custom", "train": str(tmp_path / "no.jsonl"), "test": str(tmp_path / "no.jsonl")}
    wrong = parse_spec(spec_of(tmp_path, "ia3", task=missing))
    (tmp_path / "held").mkdir()
    held = parse_spec(tiny(tmp_path / "held"))
    with RunDir.open(tmp_path / "held", held.outcome()):
        outcomes = run_together([wrong, held, *specs_in(tmp_path, "seeded")], quiet=True)
    assert "no.jsonl" in str(outcomes[0])
    assert type(outcomes[1]).__name__ == "InUse"
    assert_as_alone(tmp_path, alone, "seeded")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "tiny:qwen_vl"}, "of different bases"),
        ({"train": {"bf16": True}}, "of different precision"),
        ({"vision": "tuned"}, "tunes the vision tower"),
        ({"speed": {"shard": "fsdp"}}, "holds the base in pieces"),
        ({"output_dir": "./b/../a"}, "is the directory of several"),
    ],
)
def test_what_cannot_share_a_base_is_said_and_nothing_is_begun(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    folder = changes.pop("output_dir", "b")
    one, other = tiny(tmp_path / "a"), tiny(tmp_path / folder, **changes)
    specs = [parse_spec(one), parse_spec(other)]
    assert said in why_not_together(specs)
    with pytest.raises(SpecError, match=r"^These runs cannot be trained together: .*" + said):
        run_together(specs, quiet=True)
    assert list(tmp_path.iterdir()) == []


def test_the_command_takes_several_specs_and_values_for_all(tmp_path: Path, alone: Path) -> None:
    names = ("seeded", "ia3")
    files = [write_spec(tmp_path / f"{name}.yaml", spec_of(tmp_path, name, seed=5)) for name in names]
    said = command("train", *files, "train.max_steps=2", "--json")
    assert said.code == 0, said.err
    for name in names:
        result = read(tmp_path / name / "result.json")
        assert (result["seed"], result["training"]["steps"], result["together"]) == (5, 2, 2)
    assert [each["seed"] for each in json.loads(said.out)] == [5, 5]
    again = command("train", *files, "train.max_steps=2")
    assert again.code == 0
    assert str(tmp_path / "ia3") in again.out.replace("\n", "")
    other = write_spec(tmp_path / "other.yaml", tiny(tmp_path / "other", model="tiny:qwen_vl"))
    refused = command("train", files[0], other)
    assert refused.code == 2
    assert "of different bases" in " ".join(refused.err.split())
    assert not (tmp_path / "other").exists()


def test_the_command_ends_with_the_code_of_a_run_that_failed(tmp_path: Path) -> None:
    short = {"num_train_epochs": 1}
    wild = spec_of(tmp_path, "wild")
    good = spec_of(tmp_path, "seeded")
    files = [
        write_spec(tmp_path / f"{number}.yaml", each | {"train": each["train"] | short})
        for number, each in enumerate((wild, good))
    ]
    said = command("train", *files)
    assert said.code == 3
    assert "lower train.learning_rate" in said.err
    assert (tmp_path / "seeded" / "result.json").exists()


@pytest.mark.slow
def test_early_stopping_and_the_best_weights_are_each_runs_own(tmp_path: Path) -> None:
    # at such a rate the validation loss soon rises
    early = {"early_stopping_patience": 1, "load_best_model_at_end": True, "num_train_epochs": 4}
    for folder in ("alone", "together"):
        specs = [
            parse_spec(tiny(tmp_path / folder / name, method=method, train=early | {"learning_rate": rate}))
            for name, method, rate in (("high", LORA, 0.1), ("low", LORA, 1e-4), ("ia3", {"name": "ia3"}, 1e-2))
        ]
        if folder == "alone":
            for spec in specs:
                run(spec, quiet=True)
        else:
            run_together(specs, quiet=True)
    for name in ("high", "low", "ia3"):
        assert_same(tmp_path / "together" / name, tmp_path / "alone" / name)
    ended = {name: read(tmp_path / "together" / name / "result.json")["training"] for name in ("high", "low")}
    assert ended["high"]["stopped_early"]
    assert ended["high"]["steps"] < ended["low"]["steps"]


@pytest.mark.slow
@pytest.mark.parametrize("where", [("train_step", 5), ("save_checkpoint", 4), ("mean_loss", 6)], ids=lambda w: w[0])
def test_a_killed_bundle_goes_on(tmp_path: Path, alone: Path, where: tuple[str, int]) -> None:
    names = ("lora", "seeded", "ia3", "full")
    log = tmp_path / "log"

    def work() -> None:
        kill_at(training, *where)()
        outcomes_of(specs_in(tmp_path, *names), quiet=True)

    assert wait(fork(work, log)) == -signal.SIGKILL, log.read_text()
    assert all(isinstance(outcome, dict) for outcome in run_together(specs_in(tmp_path, *names), quiet=True))
    for name in names:
        assert_same(tmp_path / name, alone / name)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tiny:generic/qwen2_5_vl", "tiny:qwen_vl"])
def test_other_families(tmp_path: Path, model: str) -> None:
    methods: list[dict[str, Any]] = [
        LORA,
        {"name": "ia3"},
        {"name": "prefix"},
        {"name": "lora", "rank": 4, "dora": True},
    ]
    assert_same_both_ways(
        tmp_path, [{"method": method, "model": model, "seed": number} for number, method in enumerate(methods)]
    )


@pytest.mark.slow
def test_runs_of_different_tasks_and_data(tmp_path: Path) -> None:
    sizes = {"size": {"train": 12, "validation": 4, "test": 4}}
    changes: list[dict[str, Any]] = [
        {"task": {"name": "scenes_at", **sizes}},
        {"task": {"name": "scenes_row", **sizes}, "connector": "tuned"},
        {"task": {"name": "scenes_at", **sizes}, "data": {"max_train_samples": 8, "subset": "random"}, "seed": 4},
        {"task": {"name": "scenes_at", **sizes}, "data": {"labels": "upstream"}},
        {"task": {"name": "scenes_at", **sizes}, "speed": {"deterministic": "world-size", "micro_batch_tokens": 64}},
        {"task": {"name": "scenes_at", **sizes}, "speed": {"lean": "off"}},
        {"task": {"name": "scenes_at", **sizes}, "speed": {"recompute": "full"}},
    ]
    assert_same_both_ways(tmp_path, changes)
