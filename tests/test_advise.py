"""Advice: what follows from evidence and what does not, what the limits do, and the study that would tell more."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from peft_mllm.errors import DataError, SpecError
from peft_mllm.study import sources
from peft_mllm.study.advise import Limits, advise, same_model, same_task
from peft_mllm.study.advising import all_beyond, brief, exclusions, sentences, what_is_missing
from peft_mllm.study.definition import load_study
from peft_mllm.study.evidence import SHIPPED, Evidence, read_evidence, write_evidence
from peft_mllm.study.inference.differences import paired_differences
from peft_mllm.study.inference.power import smallest_difference
from peft_mllm.study.outcomes import FULL, ZERO_SHOT
from peft_mllm.study.plan import Plan
from peft_mllm.study.sources import evidence_at, gathered, shipped
from peft_mllm.study.suggest import known_task, suggestion
from peft_mllm.tasks import TASKS
from runs import command
from synthetic_study import TRAINABLE, write_study

ROOT = Path(__file__).resolve().parent.parent
EFFECTS = {"lora": 1.4, "adapter": 1.4, "ia3": 0.0, "prefix": -0.4, FULL: 1.4}
EQUALS = {"lora", "adapter", FULL}


@pytest.fixture(scope="module")
def evidence(tmp_path_factory) -> Evidence:
    folder = tmp_path_factory.mktemp("studies") / "one"
    return evidence_at(
        write_study(folder, effects=EFFECTS, connectors=("frozen",), questions=200, forgets={"lora": 3.0}, seed_sd=0.05)
    )


def ask(evidence: Evidence, task: str = "scenes_next", model: str = "embedded", **limits: object):
    return advise([evidence], model, task, Limits(**limits))


def names(options) -> set[str]:
    return {option.name for option in options}


# --- what follows ---


@pytest.fixture
def nothing_shipped(monkeypatch):
    """What is shipped is evidence on the embedded base, too, and would answer beside the test's own."""
    monkeypatch.setattr(sources, "shipped", lambda: [])


def test_equals_are_not_told_apart_and_worse_ones_are(evidence):
    verdict = ask(evidence).verdict
    assert (verdict.kind, verdict.tasks, verdict.seeds, verdict.questions) == ("direct", ("scenes_next",), 3, 200)
    assert names(verdict.top) == EQUALS
    assert names(verdict.lower) == {"ia3", "prefix"}
    said = " ".join(sentences(verdict))
    assert "cannot be told apart" in said
    assert "The score gives no reason to prefer one. Of these, adapter trains the fewest parameters" in said
    assert "best" not in said


def test_equals_may_differ_by_what_is_not_ruled_out(evidence):
    verdict = ask(evidence).verdict
    choice = next(each for each in evidence.choices if each.tasks == ("scenes_next",))
    bounds = [
        max(abs(each.low), abs(each.high))
        for each in choice.differences
        if verdict.top[0].name in (each.first, each.second) and {each.first, each.second} <= EQUALS
    ]
    assert len(bounds) == 2
    assert verdict.apart_by == max(bounds)


def test_one_that_is_told_apart_from_all_is_best(tmp_path):
    study = write_study(
        tmp_path, effects={"lora": 2.0, FULL: -0.5}, connectors=("frozen",), seed_sd=0.05, questions=300
    )
    verdict = ask(evidence_at(study)).verdict
    assert names(verdict.top) == {"lora"}
    assert next(sentences(verdict)).endswith("is best: told apart from each of 4 others.")


def test_who_is_like_the_base_is_said_to_be(tmp_path):
    levels = dict.fromkeys(("lora", "ia3"), -0.5)
    study = write_study(tmp_path, methods=("lora", "ia3"), effects=levels, full=False, connectors=("frozen",))
    assert any("told apart from the model as it is" in each for each in sentences(ask(evidence_at(study)).verdict))


def test_all_placements_of_a_model_and_task_are_one_family(tmp_path):
    verdict = ask(evidence_at(write_study(tmp_path, methods=("lora", "ia3"), full=False, questions=60))).verdict
    assert len(verdict.top) + len(verdict.lower) == 4
    (choice,) = [each for each in verdict.evidence.choices if each.tasks == ("scenes_next",)]
    assert len(choice.differences) == 6
    ordered = sorted(choice.differences, key=lambda each: each.p)
    assert ordered[0].p_adjusted == pytest.approx(min(1.0, 6 * ordered[0].p))


def test_one_seed_is_no_answer(tmp_path):
    advice = ask(evidence_at(write_study(tmp_path, seeds=(1,), effects=EFFECTS, questions=300)))
    assert advice.verdict is None
    assert "One seed tells no two methods apart" in next(sentences(advice.others[0]))
    assert "there is one seed" in what_is_missing(advice)


# --- what evidence is of ---


def test_other_tasks_are_weaker_and_their_mean(evidence):
    advice = ask(evidence, task="scenes_row")
    verdict = advice.verdict
    assert (verdict.kind, set(verdict.tasks)) == ("other tasks", {"scenes_next", "scenes_at", "scenes_count"})
    lines = [line for line in evidence.lines if line.factors["method"] == "lora"]
    option = next(option for option in verdict.top if option.name == "lora")
    assert option.score.value == pytest.approx(np.mean([line.score.value for line in lines]))
    assert option.forgotten.value == pytest.approx(np.mean([line.forgotten.value for line in lines]))
    assert "no direct evidence" in what_is_missing(advice)


def test_another_model_is_no_evidence(evidence):
    advice = ask(evidence, model="liuhaotian/llava-v1.5-7b")
    assert advice.verdict is None
    assert not advice.others
    assert advice.elsewhere[0].kind == "other model"
    assert "none of liuhaotian/llava-v1.5-7b" in what_is_missing(advice)


def test_direct_evidence_goes_before_more_of_another_task(evidence, tmp_path):
    small = evidence_at(
        write_study(tmp_path, tasks=("scenes_row",), methods=("lora", "ia3"), questions=30, seeds=(1, 2))
    )
    advice = advise([evidence, small], "embedded", "scenes_row", Limits())
    assert advice.verdict.evidence.place == small.place
    assert [each.kind for each in advice.others] == ["other tasks"]


@pytest.mark.parametrize(
    ("asked", "source", "label", "same"),
    [
        ("embedded", "embedded", "", True),
        ("Qwen/Qwen-VL-Chat", "models/qwen-vl-chat", "", True),
        ("llava-hf/llava-1.5-7b-hf", "liuhaotian/llava-v1.5-7b", "", True),
        ("liuhaotian/llava-v1.5-13b", "liuhaotian/llava-v1.5-7b", "", False),
        ("mine", "a/b", "Mine", True),
        ("", "", "", False),
        ("embedded", "", "", False),
    ],
)
def test_when_a_model_is_the_one_asked_for(asked, source, label, same):
    assert same_model(asked, source, label) is same


def test_two_directories_of_one_name_are_two_models(tmp_path):
    for each in ("a", "b"):
        (tmp_path / each / "model").mkdir(parents=True)
    assert not same_model(str(tmp_path / "a/model"), str(tmp_path / "b/model"), "")
    assert same_model(str(tmp_path / "a/model"), str(tmp_path / "b/../a/model"), "")


def test_when_a_task_is_the_one_asked_for():
    assert same_task("ScienceQA", "scienceqa", "SQA")
    assert same_task("next", "scenes_next", "next")
    assert not same_task("scenes_next", "scenes_row", "row")
    with pytest.raises(SpecError, match="Did you mean 'vizwiz'"):
        known_task("vizwizz", [])


# --- limits ---


def test_limits_exclude_and_say_what_they_cost(evidence):
    verdict = ask(evidence, disk=10_000.0).verdict
    assert names(verdict.top) == {"ia3"}
    assert names(verdict.excluded) == {*EQUALS, "prefix"}
    assert all(option.exceeds == ("disk",) for option in verdict.excluded)
    assert set(verdict.above) == EQUALS
    assert "What the limits cost" in " ".join(sentences(verdict))


def test_what_is_not_known_is_excluded_by_nothing_and_said(evidence):
    lines = tuple(
        replace(line, figures={name: value for name, value in line.figures.items() if name != "memory"})
        if line.factors["method"] == "lora"
        else line
        for line in evidence.lines
    )
    verdict = ask(replace(evidence, lines=lines), memory=1.0).verdict
    assert names(verdict.top) == {"lora"}
    assert any("Not known is the memory of lora" in each for each in sentences(verdict))


def test_a_limit_on_what_is_forgotten(evidence):
    lost = {option.name: option.forgotten for option in ask(evidence).verdict.top}
    verdict = ask(evidence, forgotten=lost["adapter"].value + 0.01).verdict
    assert "adapter" in names(verdict.top)
    assert "lora" in names(verdict.excluded)
    assert next(option for option in verdict.top if option.name == "adapter").uncertain
    assert any("may have forgotten more" in each for each in sentences(verdict))


def test_the_connector_may_be_asked_for(tmp_path):
    one = evidence_at(write_study(tmp_path, methods=("lora",), full=False, questions=30))
    verdict = ask(one, connector="tuned").verdict
    assert {option.setting.connector for option in verdict.top} == {"tuned"}


@pytest.mark.usefixtures("nothing_shipped")
def test_a_connector_that_nobody_tried(evidence, folder):
    advice = ask(evidence, connector="tuned")
    assert advice.verdict is None
    assert list(sentences(advice.others[0])) == ["No candidate has the connector that was asked for."]
    said = command("advise", "--model", "embedded", "--task", "scenes_next", "--connector", "tuned")
    assert (said.code, "study plan" in said.out, "axes.size" in said.out) == (1, True, False)


def test_nothing_within_the_limits_is_no_answer(evidence):
    advice = ask(evidence, seconds=0.5)
    assert advice.verdict is None
    assert "within the limits" in what_is_missing(advice)


# --- evidence as files ---


def test_evidence_reads_back_as_it_was(evidence, tmp_path):
    write_evidence(tmp_path / "one.json", evidence)
    assert read_evidence(tmp_path / "one.json") == evidence
    assert ask(read_evidence(tmp_path / "one.json")) == ask(evidence)


def test_evidence_holds_no_single_answers(evidence, tmp_path):
    write_evidence(tmp_path / "one.json", evidence)
    text = (tmp_path / "one.json").read_text()
    assert "test-1-0" not in text
    assert len(text) < 200_000


def test_evidence_that_does_not_fit_is_refused(evidence, tmp_path):
    write_evidence(tmp_path / "one.json", evidence)
    content = json.loads((tmp_path / "one.json").read_text())
    content["choices"][0]["seeds"] = "three"
    (tmp_path / "one.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"one\.json: choices\.0\.seeds"):
        read_evidence(tmp_path / "one.json")


def test_what_is_shipped_is_whole():
    for each in shipped():
        assert each.missing == 0, f"{each.place} is of a study that was not finished"
        assert not re.search(r"/(tmp|home|root|work)/", str(each)), f"{each.place} names a machine's paths"
        assert len(each.settings) == len(each.lines)


def test_the_script_writes_what_is_read(tmp_path):
    study = write_study(tmp_path / "one", methods=("lora",), questions=20, tasks=("scenes_at",))
    script = [sys.executable, "scripts/update_evidence.py", str(study), "--into", str(tmp_path / "into")]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert read_evidence(tmp_path / "into" / "one.json") == evidence_at(study)
    (found,) = shipped(tmp_path / "into")
    assert found.place == f"one, {SHIPPED}"
    write_study(tmp_path / "two", methods=("lora",), questions=20, tasks=("scenes_at",), missing=1)
    done = subprocess.run([*script[:2], str(tmp_path / "two")], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, "finish the study first" in done.stderr) == (1, True)


def test_every_study_is_found_and_a_damaged_one_is_named(tmp_path):
    write_study(tmp_path / "one", methods=("lora",), questions=10, tasks=("scenes_at",))
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "study.json").write_text("{")
    found, notes = gathered([], runs=tmp_path)
    assert found[0].title == "Synthetic study"
    assert len(found) == 1 + len(shipped())
    assert any("two" in note and "not JSON" in note for note in notes)
    with pytest.raises(DataError):
        gathered([tmp_path / "two"])


def test_a_study_that_has_only_begun_is_named(tmp_path):
    write_study(tmp_path / "one", methods=("lora",), questions=10, tasks=("scenes_at",), full=False, missing=6)
    _, notes = gathered([], runs=tmp_path)
    assert any("no run that counts is done yet, 6 are to come" in note for note in notes)


def test_the_demo_is_evidence_as_all_studies_are(tmp_path):
    for place in ("demo", "studies/one"):
        write_study(tmp_path / place, methods=("lora",), questions=10, tasks=("scenes_at",))
    found, _ = gathered([], runs=tmp_path)
    assert [each.place for each in found][:2] == [(tmp_path / each).as_posix() for each in ("demo", "studies/one")]


def test_what_is_shipped_and_here_counts_once(tmp_path, monkeypatch):
    study = write_study(tmp_path / "studies/one", methods=("lora",), questions=10, tasks=("scenes_at",))
    (tmp_path / "evidence").mkdir()
    write_evidence(tmp_path / "evidence/one.json", evidence_at(study))
    monkeypatch.setattr(sources, "shipped", lambda: shipped(tmp_path / "evidence"))
    assert len(gathered([], runs=tmp_path / "studies")[0]) == 1
    assert len(gathered([], runs=tmp_path / "none")[0]) == 1


# --- the study that would give it ---


ASKED_OF = ["embedded", "tiny:llava", "Qwen/Qwen-VL-Chat", "liuhaotian/llava-v1.5-7b", "some/other"]


def _is_often(model, task, smaller):
    """Each model, each task and both sizes, but not each with each."""
    return not smaller and (model == "some/other" or task in ("scenes_next", "scienceqa"))


@pytest.mark.parametrize(
    ("model", "task", "smaller"),
    [
        pytest.param(*each, marks=[pytest.mark.slow] * (not _is_often(*each) and each[1:] != ("vizwiz", True)))
        for each in itertools.product(ASKED_OF, TASKS, (False, True))
    ],
)
def test_the_study_can_be_planned(model, task, smaller):
    found = suggestion(model, task, smaller=smaller)
    words = shlex.split(found.command("plan"))
    assert words[:3] == ["peft-mllm", "study", "plan"]
    plan = Plan(load_study(words[3], words[4:]))
    trained = [run for each in plan.combinations for run in plan.finals(each, None)]
    assert {run.spec.task.name for run in trained} == {task}
    assert len({run.seed for run in trained}) == 3
    assert len({run.spec.model.path for run in trained}) == 1
    assert same_model(model, trained[0].spec.model.path, "")
    assert {run.spec.connector for run in trained} == {"frozen", "tuned"}
    assert {run.spec.method.name for run in trained} == {"lora", "ia3", "adapter", "prefix", "full"}
    assert plan.study.output_dir.startswith("runs/studies/")


def test_the_paper_s_own_values_are_kept_for_its_models():
    words = shlex.split(suggestion("Qwen/Qwen-VL-Chat", "iconqa_txt").command("run"))
    plan = Plan(load_study(words[3], words[4:]))
    (run, *_) = plan.finals(plan.combinations[0], None)
    assert run.spec.train.weight_decay == 0.1
    assert run.spec.task.options["root"] == "data/iconqa/choose_txt"


def test_a_task_of_somebody_s_table_has_no_study():
    assert suggestion("embedded", "charts") is None


def test_a_limit_that_is_nearly_kept_is_said_with_the_digits_that_show_it(evidence):
    limits = Limits(forgotten=next(o.forgotten.value for o in ask(evidence).verdict.top if o.name == "lora") - 0.004)
    (said,) = (line for line in exclusions(ask(evidence, forgotten=limits.forgotten).verdict, limits) if "lora" in line)
    lost, limit = re.findall(r"[\d.]+(?=\N{NO-BREAK SPACE}points)", said)
    assert float(lost) > float(limit)
    assert len(lost) < 7


def test_what_is_measured_and_beyond_a_limit_is_said_before_what_is_not_measured(evidence):
    assert all_beyond(ask(evidence)) == ""
    lines = tuple(
        replace(line, figures={k: v for k, v in line.figures.items() if k != "memory"}) for line in evidence.lines
    )
    advice = advise([evidence, replace(evidence, lines=lines, place="b")], "embedded", "scenes_next", Limits(memory=1))
    assert advice.verdict.evidence.place == "b"
    assert all_beyond(advice).startswith(
        "Of embedded on scenes_next, all 5 candidates whose limited figures are known are"
    )
    assert all_beyond(advise([evidence], "embedded", "scenes_next", Limits(memory=1))) == ""


def test_a_study_that_did_not_measure_what_is_forgotten_answers_no_limit_on_it(evidence):
    """Others do, be they weaker; with one candidate measured, the study itself does."""
    lines = tuple(replace(line, forgotten=None) for line in evidence.lines)
    without = replace(evidence, lines=lines, place="without")
    larger = replace(without, choices=tuple(replace(each, questions=10**6) for each in without.choices))
    assert advise([evidence, larger], "embedded", "scenes_next", Limits()).verdict.evidence.place == "without"
    advice = advise([evidence, larger], "embedded", "scenes_next", Limits(forgotten=100.0))
    assert advice.verdict.evidence.place == evidence.place
    (other,) = (each for each in advice.others if each.evidence.place == "without")
    assert "What is forgotten was not measured there" in brief(other)
    alone = advise([larger], "embedded", "scenes_next", Limits(forgotten=100.0))
    assert alone.verdict is None
    assert what_is_missing(alone) == "Evidence is missing: what is forgotten was not measured in without."
    lines = tuple(
        each if each.factors["method"] == "lora" else replace(each, forgotten=None) for each in evidence.lines
    )
    partly = replace(larger, lines=lines)
    assert advise([partly], "embedded", "scenes_next", Limits(forgotten=100.0)).verdict is not None


# --- the verb ---


@pytest.fixture
def folder(tmp_path, monkeypatch):
    write_study(tmp_path / "runs/studies/one", effects=EFFECTS, connectors=("frozen",), questions=120, seed_sd=0.05)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("nothing_shipped")
def test_the_verb_answers_and_cites(folder):
    said = command("advise", "--model", "embedded", "--task", "scenes_next", "--max-size", "1MB")
    assert said.code == 0, said.err
    assert "Direct evidence: embedded on scenes_next" in said.out
    assert "cannot be told apart" in said.out
    assert "full fine-tuning: size 3.9\N{NO-BREAK SPACE}MB > 1.0\N{NO-BREAK SPACE}MB" in said.out
    for run in re.findall(r"runs/studies/one/runs/[\w-]+", said.out):
        assert (folder / run / "result.json").is_file()
    assert "runs/studies/one/runs/lora-scenes_next-" in said.out
    assert "study plan" not in said.out


def test_the_verb_says_which_study_is_missing(folder):
    said = command("advise", "--model", "some/other", "--task", "vizwiz")
    assert said.code == 1
    assert "Evidence is missing" in said.out
    assert said.out.index("peft-mllm study plan") < said.out.index("peft-mllm study run")
    assert "peft-mllm data prepare vizwiz" in said.out
    said = command("advise", "--model", "embedded", "--task", "scenes_next", "--max-size", "1")
    assert said.code == 0
    said = command("advise", "--model", "embedded", "--task", "scenes_next", "--max-size", "1kB")
    assert (said.code, "axes.size=" in said.out) == (1, True)
    said = command("advise", "--model", "embedded", "--task", "scenes_next", "--max-time", "1s")
    assert (said.code, "study plan" in said.out) == (1, False)


@pytest.mark.usefixtures("nothing_shipped")
def test_the_verb_speaks_to_programs(folder):
    said = command("advise", "--model", "embedded", "--task", "scenes_next", "--max-memory", "2GiB", "--json")
    found = json.loads(said.out)
    assert (said.code, found["limits"]["memory"], found["missing"], found["study"]) == (0, 2 * 2**30, "", None)
    assert {each["name"] for each in found["answer"]["cannot_be_told_apart"]} == EQUALS
    assert found["answer"]["cannot_be_told_apart"][0]["runs"][0].startswith("runs/studies/one/runs/")
    missing = json.loads(command("advise", "--model", "x/y", "--task", "vizwiz", "--json").out)
    assert missing["answer"] is None
    assert missing["on_other_models"][0]["kind"] == "other model"
    assert "axes.model={y: x/y}" in shlex.split(missing["study"]["run"])


@pytest.mark.parametrize(
    ("limit", "said"),
    [
        (["--max-memory", "much"], "--max-memory much: write a number"),
        (["--max-size", "5parsecs"], "--max-size 5parsecs"),
        (["--max-time", "2"], "--max-time 2: write a number with s, min, h or d"),
        (["--connector", "open"], "--connector open"),
        (["--results", "nowhere"], "nowhere"),
        (["--task", "vizwizz"], "Did you mean 'vizwiz'"),
        (["--model", "embeded"], "--model embeded: there is no such model. Did you mean 'embedded'?"),
    ],
)
def test_what_is_asked_wrongly(folder, limit, said):
    named = [] if "--model" in limit else ["--model", "embedded"]
    words = [*named, *([] if "--task" in limit else ["--task", "scenes_next"]), *limit]
    answer = command("advise", *words)
    assert answer.code in (2, 65)
    assert said in answer.err


def test_a_table_is_evidence_of_the_model_that_it_names(folder):
    lines = [
        f"mine,{method},{seed},{item},{int((item * 7 + seed) % 10 < right)}"
        for method, right in (("lora", 8), ("ia3", 4))
        for seed in (1, 2, 3)
        for item in range(100)
    ]
    (folder / "charts.csv").write_text("\n".join(["model,method,seed,item,score", *lines]))
    said = command("advise", "--model", "mine", "--task", "charts", "--results", "charts.csv")
    assert said.code == 0, said.err
    assert "lora (80.0\N{NO-BREAK SPACE}%) is best" in said.out
    assert "charts.csv:2" in said.out
    nameless = [line.partition(",")[2] for line in ["model,method,seed,item,score", *lines]]
    (folder / "charts.csv").write_text("\n".join(nameless))
    said = command("advise", "--model", "mine", "--task", "charts", "--results", "charts.csv")
    assert (said.code, "no column 'model'" in said.out) == (1, True)


def test_what_is_trained_is_what_the_runs_say(evidence):
    for option in ask(evidence).verdict.top:
        assert option.figures["trainable"] == TRAINABLE[option.name]
        assert option.name != ZERO_SHOT


# --- how much data it takes ---


def test_the_smallest_difference_is_told_apart_about_as_often_as_it_says():
    rng, methods, studies = np.random.default_rng(0), 4, 150
    for seeds, questions in ((3, 200), (5, 400)):
        least = smallest_difference(seeds, questions, methods=methods)
        told = 0
        for _ in range(studies):
            groups = {
                str(m): 60
                + rng.normal(0, np.sqrt(500), (1, questions))
                + rng.normal(0, np.sqrt(500), (seeds, questions))
                + rng.normal(0, 1.0, (seeds, 1))
                + (least if m == 0 else 0)
                for m in range(methods)
            }
            told += paired_differences(groups)[0].told_apart
        assert 0.7 < told / studies < 0.97


def test_more_data_tells_smaller_differences():
    assert smallest_difference(5, 300) < smallest_difference(3, 300) < smallest_difference(2, 300)
    assert smallest_difference(3, 1000) < smallest_difference(3, 300)
    with pytest.raises(ValueError, match="one seed"):
        smallest_difference(1, 300)


def test_the_page_s_table_is_the_function_s():
    text = (ROOT / "docs/choose-a-method.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) seeds, SD (\d) \| ([\d. |]+) \|$", text, re.MULTILINE)
    assert len(rows) == 8
    for seeds, sd, cells in rows:
        found = [float(cell) for cell in cells.split("|")]
        expected = [smallest_difference(int(seeds), each, seed_sd=float(sd)) for each in (100, 300, 1000, 5000)]
        assert found == [round(each, 1) for each in expected]
