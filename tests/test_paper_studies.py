"""The paper's studies as files: they plan, and each run has the paper's hyperparameters."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

import pytest

from peft_mllm.assets import PAPER
from peft_mllm.methods import METHODS
from peft_mllm.study.definition import load_study
from peft_mllm.study.outcomes import FULL, ZERO_SHOT
from peft_mllm.study.paper.names import RATES, paper_model
from peft_mllm.study.plan import Plan, Run

ROOT = Path(__file__).resolve().parent.parent
STUDIES = ("main", "connector", "location", "data_size", "stability", "generalisation", "hallucination", "vision")


@cache
def plan(name: str) -> Plan:
    return Plan(load_study(ROOT / f"studies/{name}.yaml"))


@cache
def runs(name: str) -> tuple[Run, ...]:
    return tuple(run for combination in plan(name).combinations for run in plan(name).finals(combination, None))


def count(name: str, **factors: str) -> int:
    return sum(all(run.factors[axis] == label for axis, label in factors.items()) for run in runs(name))


@pytest.mark.parametrize("name", STUDIES)
def test_every_run_has_the_papers_hyperparameters(name):
    assert len({run.id for run in runs(name)}) == len(runs(name))
    for run in runs(name):
        train = run.spec.train
        qwen = paper_model(run.spec.model.path) == "Qwen-VL-Chat"
        assert train.per_device_train_batch_size * train.gradient_accumulation_steps == 128
        assert train.num_train_epochs == (12 if name in ("generalisation", "hallucination") else 3)
        assert (train.lr_scheduler_type, train.bf16, train.optim) == ("cosine", True, "AdamW")
        assert (train.warmup_ratio, train.weight_decay, train.adam_beta2, train.connector_learning_rate) == (
            (0.01, 0.1, 0.95, 1e-5) if qwen else (0.03, 0, 0.999, 2e-5)
        )
        assert run.spec.data.labels == ("upstream" if qwen else "answer")
        assert not train.load_best_model_at_end
        rate = train.learning_rate or METHODS[run.spec.method.name].learning_rate
        if name != "stability" and run.spec.method.name in RATES:
            assert rate == RATES[run.spec.method.name]


@pytest.mark.parametrize("name", STUDIES)
def test_zero_shot_and_full_fine_tuning_are_there(name):
    assert {run.factors["method"] for run in plan(name).references} == {ZERO_SHOT}
    models, tasks = ({run.factors[axis] for run in runs(name)} for axis in ("model", "task"))
    assert len(plan(name).references) == len(models) * len(tasks)
    assert {run.factors["task"] for run in runs(name) if run.factors["method"] == FULL} == tasks


def test_methods_are_the_papers():
    options = {run.spec.method.name: run.spec.method.options for run in runs("main")}
    assert (options["lora"]["rank"], options["lora"]["alpha"], options["lora"]["location"]) == (128, 256, "both")
    assert (options["adapter"]["bottleneck"], options["adapter"]["preset"], options["adapter"]["init"]) == (
        256,
        "paper",
        "normal",
    )
    assert (options["prefix"]["virtual_tokens"], options["prefix"]["projection"]) == (20, False)


def test_main_is_table_1_and_both_readings_of_qwens_connector():
    assert {run.factors["connector"] for run in runs("main") if run.factors["model"] != "Qwen-VL-Chat"} == {
        "frozen",
        "tuned",
    }
    assert count("main", connector="released") == 4 * 8
    assert count("main", method="lora", model="LLaVA-1.5-13B") == 2 * 8


def test_stability_has_every_size_and_every_rate_once():
    for method in ("lora", "adapter", "prefix"):
        assert count("stability", method=method) == (4 + 3) * 2 * 3
        sizes = {run.factors["size"] for run in runs("stability") if run.factors["method"] == method}
        rates = {run.spec.train.learning_rate for run in runs("stability") if run.factors["method"] == method}
        assert (len(sizes), rates) == (4, {2e-4, 5e-5, 1e-5, 5e-6})
        own = [
            r
            for r in runs("stability")
            if r.factors["method"] == method and r.spec.train.learning_rate == RATES[method]
        ]
        assert len({run.factors["size"] for run in own}) == 4
    assert count("stability", method="ia3") == 4 * 2 * 3


def test_location_size_of_data_and_tower():
    assert {(r.factors["method"], r.spec.method.options.get("location")) for r in runs("location")} == {
        *((method, place) for method in ("lora", "ia3", "adapter") for place in ("attention", "mlp", "both")),
        (FULL, None),
    }
    assert {(r.spec.data.max_train_samples, r.spec.data.subset) for r in runs("data_size")} == {
        (size, "random") for size in (1000, 5000, 10_000)
    }
    assert {run.spec.vision for run in runs("vision")} == {"frozen", "tuned"}


def test_along_the_curve():
    assert {run.spec.curve.after_best for run in runs("generalisation")} == {4}
    assert {run.spec.curve.epochs for run in runs("hallucination")} == {(3.0, 6.0, 9.0, 12.0)}
    for run in runs("generalisation"):
        names = [run.spec.task.name, *(task.name for task in run.spec.evaluate)]
        assert sorted(names) == ["iconqa_txt", "scienceqa", "vizwiz"]


def test_the_page_says_how_many_runs_each_has():
    page = (ROOT / "docs/paper.md").read_text(encoding="utf-8")
    said = re.findall(r"^\| \[(\w+)\]\(\.\./studies/\w+\.yaml\) \| [^|]+ \| (\d+) \|", page, re.MULTILINE)
    assert {name: int(runs) for name, runs in said} == {name: plan(name).expected for name in STUDIES}


def test_every_table_of_the_paper_with_runs_has_a_study():
    page = (ROOT / "docs/paper.md").read_text(encoding="utf-8")
    studies = page[page.index("## The studies as files") : page.index("`protocol: paper` in each")]
    named = set(re.findall(r"\d+", " ".join(re.findall(r"\| (?:Tables?|Figure) ([\d, ]+) \|", studies))))
    tables = {table["table"].split()[1] for table in json.loads(PAPER.read_text(encoding="utf-8"))["tables"]}
    assert tables - {"15"} <= named
