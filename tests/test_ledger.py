"""The ledger: operations against the paper's table and by hand, and what is absent where files do not say it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from peft_mllm.study.analyse import analyse
from peft_mllm.study.flops import Passed, Sizes, paper_answer_flops, paper_training_flops, training_flops
from peft_mllm.study.ledger import WALL_CLOCK, figures_of, trains_own
from peft_mllm.study.reading import read_study
from peft_mllm.study.results import read_result
from synthetic_study import CONNECTOR, LLM, write_study

# LLaVA-1.5 with CLIP ViT-L/14: decoder with embeddings and head, connector, tower; the paper's Table 15 is of these.
EMBEDDINGS = {"7B": 32_000 * 4096, "13B": 32_000 * 5120}
BASE = {"7B": 6_738_415_616 + 20_979_712 + 303_507_456, "13B": 13_015_864_320 + 31_467_520 + 303_507_456}
MLP = {"7B": 20_979_712, "13B": 31_467_520}
SHAPE = {"7B": (32, 4096), "13B": (40, 5120)}
ADDED = {
    ("7B", "adapter"): 201_326_592,
    ("7B", "lora"): 319_815_680,
    ("7B", "prefix"): 5_242_880,
    ("13B", "adapter"): 314_572_800,
    ("13B", "lora"): 500_695_040,
    ("13B", "prefix"): 8_192_000,
}
# Table 15: training with the connector frozen and tuned, and an answer with it frozen; what can be read
PRINTED = {
    ("7B", "adapter"): (1.526e15, 1.532e15, 4.105e10),
    ("7B", "lora"): (1.552e15, 1.561e15, 4.092e10),
    ("7B", "prefix"): (1.496e15, 1.498e15, 4.159e10),
    ("13B", "adapter"): (2.898e15, 2.908e15, 6.946e10),
    ("13B", "lora"): (2.947e15, None, 6.942e10),
    ("13B", "prefix"): (2.741e15, 2.749e15, 6.838e10),
}
SMALL = Sizes(llm=1000, lm_head=200, connector=50, vision=300, elsewhere=0, embeddings=200)
PASSED = Passed(tokens=10, patches=4)


@pytest.mark.parametrize(("model", "method"), PRINTED)
def test_the_papers_formula_gives_its_table(model: str, method: str) -> None:
    frozen, tuned, answer = PRINTED[model, method]
    base, added, connector = BASE[model], ADDED[model, method], MLP[model]
    tokens = frozen / paper_training_flops(base, added, 1)
    assert tokens == pytest.approx(1.03e5, rel=0.04)  # about one global batch of 128 samples
    if tuned is not None:  # the same tokens give the other column
        ours = paper_training_flops(base - connector, added + connector, 1) * tokens
        assert ours == pytest.approx(tuned, rel=3.5e-3)
    layers, width = SHAPE[model]
    weights = base + added - EMBEDDINGS[model]
    ours = paper_answer_flops(weights, layers=layers, width=width, tokens=round(tokens))
    assert ours == pytest.approx(answer, rel=2e-3)


def test_the_shares_of_the_paper_are_of_the_same_sizes() -> None:
    assert 100 * ADDED["7B", "lora"] / (BASE["7B"] + ADDED["7B", "lora"]) == pytest.approx(4.332, abs=5e-4)
    assert 100 * ADDED["13B", "adapter"] / (BASE["13B"] + ADDED["13B", "adapter"]) == pytest.approx(2.301, abs=2e-3)


@pytest.mark.parametrize(
    ("trained", "own", "of_token", "of_patch"),
    [
        # frozen weights: forward and gradient of activations; added ones also the gradient of the weight
        ({"llm": 30}, False, 4 * 1000 + 6 * 30, 2 * 50 + 2 * 300),
        # the model's own: nothing is added; the table of embeddings multiplies nothing
        ({"llm": 1200}, True, 6 * 1000, 2 * 50 + 2 * 300),
        # a connector that trains is passed backward, the tower before it is not
        ({"llm": 30, "connector": 50}, False, 4 * 1000 + 6 * 30, 6 * 50 + 2 * 300),
        # the first trained part is the connector: the language model is passed backward all the same
        ({"connector": 50}, False, 4 * 1000, 6 * 50 + 2 * 300),
        # with the tower everything is passed backward
        ({"llm": 30, "vision": 300}, False, 4 * 1000 + 6 * 30, 4 * 50 + 6 * 300),
    ],
)
def test_standard_accounting(trained: dict[str, int], own: bool, of_token: int, of_patch: int) -> None:
    assert training_flops(SMALL, trained, PASSED, own=own) == 10 * of_token + 4 * of_patch


def test_a_head_that_is_the_table_counts_once() -> None:
    tied = Sizes(llm=1000, lm_head=0, connector=0, vision=0, elsewhere=0, embeddings=200)
    assert tied.multiplied == SMALL.multiplied == 1000


def test_nothing_trained_costs_nothing() -> None:
    assert training_flops(SMALL, {}, PASSED, own=False) == 0


def test_which_methods_train_the_models_own_parameters() -> None:
    names = ("lora", "ia3", "prefix", "full", "none", "unheard of")
    assert [name for name in names if trains_own(name)] == ["full"]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(
        tmp_path_factory.mktemp("ledger") / "study",
        methods=("lora",),
        tasks=("scenes_next",),
        connectors=("frozen", "tuned"),
        seeds=(1,),
        questions=40,
        curve=2,
        epochs=4,
    )


def test_figures_of_a_run(study: Path) -> None:
    outcomes = {tuple(each.factors.values())[::2]: each for each in read_study(study).outcomes}
    tuned = outcomes["lora", "tuned"]
    result = tuned.result
    assert result is not None
    assert result.training is not None
    assert tuned.figures["trainable"] == 36_900 + CONNECTOR
    assert tuned.figures["seconds"] == result.training.seconds
    assert tuned.figures["seconds_scoring"] == pytest.approx(3 * 1.1)
    assert tuned.figures["memory"] == result.peak_memory_bytes
    assert tuned.figures["disk"] == result.adapter_bytes
    tokens, base = result.training.sequence_tokens, result.model.parameters
    assert tuned.figures["flops_paper"] == (2 * (base - CONNECTOR) + 4 * (36_900 + CONNECTOR)) * tokens
    last, best = tuned.curve[-1].scores["scenes_next"].value, tuned.curve[0].scores["scenes_next"].value
    assert tuned.figures["robustness"] == last - best
    assert "hallucination" not in tuned.figures
    full = outcomes["full fine-tuning", "frozen"]
    assert full.figures["flops_paper"] == (2 * (base - LLM) + 4 * LLM) * tokens


def test_zero_shot_costs_nothing_and_has_no_robustness(study: Path) -> None:
    bare = read_study(study).outcomes[0]
    assert bare.is_zero_shot
    assert {name: bare.figures[name] for name in ("trainable", "seconds", "disk", "flops", "flops_paper")} == {
        "trainable": 0,
        "seconds": 0,
        "disk": 0,
        "flops": 0,
        "flops_paper": 0,
    }
    assert "robustness" not in bare.figures


@pytest.mark.parametrize(
    ("section", "key", "lost"),
    [
        ("model", "parts", {"flops"}),
        ("model", "patches", {"flops"}),
        ("training", "sequence_tokens", {"flops", "flops_paper"}),
        ("", "peak_memory_bytes", {"memory"}),
    ],
)
def test_what_a_file_does_not_say_is_absent(
    study: Path, tmp_path: Path, section: str, key: str, lost: set[str]
) -> None:
    run = next(outcome.result for outcome in read_study(study).outcomes if outcome.factors["method"] == "lora")
    assert run is not None
    assert run.directory is not None
    content = json.loads((run.directory / "result.json").read_text())
    del (content[section] if section else content)[key], content["sha256"]
    (tmp_path / "predictions").symlink_to(run.directory / "predictions")
    content |= {"scores": {}, "curve": []}
    (tmp_path / "result.json").write_text(json.dumps(content))
    before = figures_of(run, (), "scenes_next").keys()
    assert before - figures_of(read_result(tmp_path), (), "scenes_next").keys() == lost


def test_lines_have_the_means_over_seeds(tmp_path: Path) -> None:
    study = read_study(write_study(tmp_path, methods=("lora",), tasks=("scenes_next",), questions=20, full=False))
    line = next(line for line in analyse(study).lines if line.factors["method"] == "lora")
    runs = [outcome for outcome in study.outcomes if outcome.run in line.runs]
    assert len(runs) == 3
    assert len({run.figures["seconds"] for run in runs}) == 3
    assert line.figures["seconds"] == pytest.approx(sum(run.figures["seconds"] for run in runs) / 3)
    assert line.figures.keys() >= WALL_CLOCK
