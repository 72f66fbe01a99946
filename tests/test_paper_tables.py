"""The paper's tables: as they are printed, and beside ours."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from paper_outcomes import outcome, study
from peft_mllm.assets import PAPER
from peft_mllm.study.outcomes import ZERO_SHOT
from peft_mllm.study.paper import paper_cells, paper_notes
from peft_mllm.study.paper.names import canonical_task, paper_model, setting_of

PRINTED = json.loads(PAPER.read_text(encoding="utf-8"))
TABLES = {table["table"]: table for table in PRINTED["tables"]}
COLUMNS = [column.get("task") for column in TABLES["Table 1"]["columns"]]
SEVEN_B = {"model": "LLaVA-1.5-7B"}


def level(value):
    return lambda own, task: value


def cells(outcomes):
    return {(cell.table, cell.row, cell.column): cell for cell in paper_cells(outcomes)}


# --- as printed ---


@pytest.mark.parametrize("table", PRINTED["tables"], ids=lambda table: table["table"])
def test_every_row_has_a_figure_or_null_for_each_column(table):
    assert all(len(row["values"]) == len(table["columns"]) for row in table["rows"])
    assert any(value is not None for row in table["rows"] for value in row["values"])


def test_printed_averages_are_the_means_of_their_rows():
    checked = 0
    for table in PRINTED["tables"]:
        if table["columns"][-1]["column"] == "Avg":
            for row in table["rows"]:
                *single, average = row["values"]
                if None not in row["values"]:
                    checked += 1
                    assert average == pytest.approx(np.mean(single), abs=0.11), (table["table"], row["row"])
    assert checked > 60


def test_what_cannot_be_read_is_left_empty():
    rows = {row["row"]: row["values"] for row in TABLES["Table 1"]["rows"]}
    assert rows["LLaVA-1.5-7B, IA3"] == [None] * 9
    assert rows["Qwen-VL-Chat, LoRA, connector tuned"] == [None] * 9
    assert rows["LLaVA-1.5-13B, IA3, connector tuned"][-1] == 78.5


# --- names ---


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("liuhaotian/llava-v1.5-7b", "LLaVA-1.5-7B"),
        ("llava-hf/llava-1.5-13b-hf", "LLaVA-1.5-13B"),
        ("models/llava-1.5-7b", "LLaVA-1.5-7B"),
        ("/data/LLaVA_v1.5_7B", "LLaVA-1.5-7B"),
        ("Lin-Chen/ShareGPT4V-7B", "ShareGPT4V-7B"),
        ("Qwen/Qwen-VL-Chat", "Qwen-VL-Chat"),
        ("Lin-Chen/ShareGPT4V-13B", ""),
        ("Qwen/Qwen-VL", ""),
        ("llava-hf/llava-v1.6-vicuna-7b-hf", ""),
        ("embedded", ""),
    ],
)
def test_a_model_is_known_by_its_source(source, name):
    assert paper_model(source) == name


def test_a_task_is_known_by_any_of_its_names():
    assert [canonical_task(name) for name in ("ScienceQA", "IconQA-txt", "my_task")] == [
        "scienceqa",
        "iconqa_txt",
        "my_task",
    ]


def test_the_spec_decides_over_the_label():
    run = outcome(level(50), **SEVEN_B, method="lora", size=16, task="okvqa")
    said = setting_of(replace(run, factors={"method": "my best", "task": "T", "model": "M"}))
    assert (said.model, said.method, said.size, said.task) == ("LLaVA-1.5-7B", "lora", 16.0, "okvqa")


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("lora", {"dora": True}),
        ("lora", {"init": "pissa"}),
        ("adapter", {"preset": "houlsby"}),
        ("adapter", {"after": ["o"]}),
    ],
)
def test_a_variant_is_not_the_papers_method(method, options):
    plain, variant = (outcome(level(50), **SEVEN_B, method=method, task="okvqa", options=o) for o in ({}, options))
    labelled = replace(variant, factors={**variant.factors, "method": "mine"})
    assert setting_of(plain).method == method
    assert setting_of(labelled).method == "mine"
    assert paper_cells([labelled]) == ()


def test_an_imported_line_goes_by_its_labels():
    labels = {"model": "LLaVA-1.5-7B", "method": "LoRA", "task": "OKVQA", "size": "rank 16", "data_size": "5k"}
    said = setting_of(replace(outcome(level(50)), factors=labels, result=None))
    assert (said.model, said.method, said.size, said.data_size, said.task) == (
        "LLaVA-1.5-7B",
        "lora",
        16,
        5000,
        "okvqa",
    )


def test_twenty_thousand_of_ocrvqa_are_all_of_it():
    assert setting_of(outcome(level(50), task="ocrvqa", data_size=20_000)).data_size is None
    assert setting_of(outcome(level(50), task="vizwiz", data_size=20_000)).data_size == 20_000


# --- beside ours ---


def test_a_study_on_other_models_has_no_cells():
    assert paper_cells([outcome(level(50), method="lora", task="okvqa")]) == ()
    assert paper_notes(()) == ()


def test_a_run_stands_beside_its_cell_with_difference_and_interval():
    found = cells(study(level(60), settings=[{**SEVEN_B, "method": "adapter", "connector": "frozen", "task": "okvqa"}]))
    cell = found["Table 1", "LLaVA-1.5-7B, Adapter", "OKVQA"]
    assert cell.paper == 59.4
    assert cell.ours.value == pytest.approx(60, abs=1)
    assert cell.difference == pytest.approx(cell.ours.value - 59.4)
    assert cell.ours.low < cell.ours.value < cell.ours.high
    other = found["Table 1", "LLaVA-1.5-7B, Adapter", "VizWiz"]
    assert (other.paper, other.ours, other.difference) == (66.7, None, None)
    assert {table for table, _, _ in found} == {"Table 1", "Table 15"}


def test_an_unreadable_cell_has_ours_alone():
    found = cells([outcome(level(60), **SEVEN_B, method="ia3", connector="frozen", task="okvqa")])
    cell = found["Table 1", "LLaVA-1.5-7B, IA3", "OKVQA"]
    assert cell.paper is None
    assert cell.difference is None
    assert cell.ours is not None
    assert ("Table 1", "LLaVA-1.5-7B, IA3", "VizWiz") not in found


def test_captions_are_times_a_hundred():
    found = cells([outcome(level(90), **SEVEN_B, method="adapter", connector="frozen", task="flickr30k")])
    assert found["Table 1", "LLaVA-1.5-7B, Adapter", "Flickr30k"].ours.value == pytest.approx(90, abs=1)


def test_scienceqa_counts_questions_with_an_image():
    run = outcome(level(80), **SEVEN_B, method="lora", connector="frozen", task="scienceqa")
    answers = run.scores["scienceqa"]
    cell = cells([run])["Table 1", "LLaVA-1.5-7B, LoRA", "SQA (img)"]
    assert cell.ours.value == pytest.approx(answers.scores[1::2].mean())
    assert cell.ours.value != pytest.approx(answers.scores.mean())


def test_an_average_needs_every_column():
    runs = [
        outcome(level(70), **SEVEN_B, method="lora", connector="frozen", task=task) for task in COLUMNS if task != "*"
    ]
    row = ("Table 1", "LLaVA-1.5-7B, LoRA", "Avg")
    whole, lacking = cells(runs)[row], cells(runs[1:])[row]
    single = [cell.ours for key, cell in cells(runs).items() if key[:2] == row[:2] and key[2] != "Avg"]
    assert whole.ours.value == pytest.approx(np.mean([each.value for each in single]))
    assert whole.ours.high - whole.ours.low < min(each.high - each.low for each in single)
    assert lacking.ours is None
    assert lacking.paper == 76.1


@pytest.mark.parametrize("other", [{"size": 16}, {"location": "mlp"}, {"data_size": 1000}, {"vision": "tuned"}])
def test_another_setting_is_not_the_papers_main_row(other):
    run = outcome(level(60), **SEVEN_B, method="lora", connector="tuned", task="vizwiz", **other)
    assert not any(table == "Table 1" for table, _, _ in cells([run]))


def test_the_nearest_rate_counts_where_there_are_several():
    runs = [
        outcome(level(value), **SEVEN_B, method="lora", connector="tuned", task="okvqa", learning_rate=rate)
        for rate, value in ((5e-5, 40), (2e-4, 60))
    ]
    found = cells(runs)
    assert found["Table 2", "LoRA, both", "OKVQA"].ours.value == pytest.approx(60, abs=1.5)
    assert found["Table 14", "LoRA, learning rate 5e-05", "OKVQA"].ours.value == pytest.approx(40, abs=1.5)


def test_sizes_places_data_and_tower_have_their_tables():
    shared = {**SEVEN_B, "method": "lora", "connector": "tuned"}
    settings = [
        {"task": "okvqa", "size": 16},
        {"task": "okvqa", "location": "attention"},
        {"task": "vizwiz", "data_size": 5000},
        {"task": "vizwiz", "vision": "tuned"},
    ]
    found = cells(study(level(60), settings=settings, **shared))
    for key in (
        ("Table 6", "LoRA, rank 16", "OKVQA"),
        ("Table 2", "LoRA, attention", "OKVQA"),
        ("Table 3", "LoRA, 5000 samples", "VizWiz"),
        ("Table 12", "LoRA, vision tower tuned", "VizWiz"),
    ):
        assert found[key].ours is not None, key
    spread = found["Table 6", "LoRA, rank 16", "OKVQA, SD over seeds"]
    assert spread.paper == 0.53
    assert 0 < spread.ours.value < 3


def test_qwens_connector_is_shown_both_ways():
    runs = [
        outcome(level(value), model="Qwen-VL-Chat", method="adapter", connector=connector, task="okvqa")
        for connector, value in (("tuned", 55), ("released", 50))
    ]
    found = cells(runs)
    row = "Qwen-VL-Chat, Adapter, connector tuned"
    assert found["Table 1", row, "OKVQA"].ours.value == pytest.approx(55, abs=1.5)
    released = found["Table 1", f"{row} (connector as the released code has it)", "OKVQA"]
    assert released.ours.value == pytest.approx(50, abs=1.5)
    assert released.paper == 51.1
    assert any("released code" in note for note in paper_notes(paper_cells(runs)))


def test_transfer_is_read_along_the_curve():
    def truth(own, task):
        return 60.0 - 5 * own["point"]

    run = outcome(truth, **SEVEN_B, method="ia3", connector="tuned", task="vizwiz", also=["iconqa_txt"], curve=4)
    found = cells([run])
    row = ("Table 4", "IA3, VizWiz to IconQA-txt")
    assert found[*row, "overfitting epoch 1"].paper == 42.6
    assert [found[*row, f"overfitting epoch {point}"].ours.value for point in (1, 4)] == pytest.approx(
        [55, 40], abs=1.5
    )
    assert found["Table 4", "IA3, average of the six pairs", "overfitting epoch 1"].ours is None


def test_a_judges_figures_stand_beside_table_5():
    shared = {**SEVEN_B, "connector": "tuned", "task": "iconqa_txt", "also": ["mmhal"]}
    found = cells([outcome(level(2), **shared, method="prefix")])
    row = ("Table 5", "Prefix, trained on IconQA-txt")
    assert found[*row, "Hallucination rate"].paper == 0.7
    assert found[*row, "Hallucination rate"].ours.value == pytest.approx(0.98, abs=0.02)
    assert found[*row, "Overall score"].paper is None
    assert found[*row, "Overall score"].ours.value == pytest.approx(2, abs=1.5)


def test_the_share_that_trains_is_counted_as_the_paper_counts():
    found = cells([outcome(level(60), **SEVEN_B, method="adapter", connector="frozen", task="okvqa")])
    cell = found["Table 15", "LLaVA-1.5-7B, Adapter", "Trainable, %"]
    assert cell.ours.value == pytest.approx(2.771, abs=5e-4)  # 201.33 M beside 7,063 M


def test_zero_shot_and_full_fine_tuning_are_not_in_the_papers_tables():
    run = outcome(level(60), **SEVEN_B, method="full", task="okvqa")
    zero = replace(run, factors={**run.factors, "method": ZERO_SHOT}, seed=None)
    assert paper_cells([run, zero]) == ()
