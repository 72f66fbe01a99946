"""What a run asks of the matrix: known failures are refused with reason and remedy, before anything is loaded."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

import runs
from peft_mllm import run as junction
from peft_mllm.errors import MethodError
from peft_mllm.matrix.known import ESSENTIAL, REMEDY, SAYS, Combination, consult
from peft_mllm.matrix.result import DECISIVE, Matrix, Pair, installed
from peft_mllm.methods import METHODS
from peft_mllm.run import run
from peft_mllm.specfile import parse_spec

VERSIONS = {"peft": "1.0", "transformers": "6.0", "torch": "3.0"}
GOOD = ("attaches", *ESSENTIAL, "connector", "checkpointing")


def matrix(*pairs: Pair) -> Matrix:
    """Of lora, its variant dora and two types of peft, on a llava and two generic models."""
    return Matrix(
        made="2026-01-01",
        versions=VERSIONS,
        probes=dict.fromkeys(GOOD, ""),
        candidates={
            "lora": {"method": "lora", "marks": {}},
            "lora dora": {"method": "lora", "marks": {"dora": True}},
            "peft POLY": {"method": "peft", "marks": {"type": "POLY"}},
            "peft VERA": {"method": "peft", "marks": {"type": "VERA"}},
        },
        members={
            "llava": {"family": "llava", "model_type": "llava"},
            "generic/a": {"family": "generic", "model_type": "a"},
            "generic/b": {"family": "generic", "model_type": "b"},
        },
        pairs=pairs,
    )


def fails(candidate: str, member: str, probe: str) -> Pair:
    return Pair(candidate, member, ok=tuple(set(GOOD) - {probe}), failed={probe: f"{probe} is broken"})


def works(candidate: str, member: str) -> Pair:
    return Pair(candidate, member, ok=GOOD)


def combination(method="peft", options=None, family="generic", model_type="a", **more) -> Combination:
    return Combination(method, options or {"type": "POLY"}, family, model_type, **more)


def ask(known: Matrix, **changes) -> list[str]:
    return consult(combination(**changes), matrix=known, versions=VERSIONS)


@pytest.mark.parametrize("probe", ESSENTIAL)
def test_what_every_run_needs_is_refused_with_reason_and_remedy(probe):
    with pytest.raises(MethodError) as raised:
        ask(matrix(fails("peft POLY", "generic/a", probe)))
    said = str(raised.value)
    assert f"peft POLY {SAYS[probe]} on a models: {probe} is broken" in said
    assert "peft 1.0 and transformers 6.0" in said
    assert REMEDY.get(probe, "Choose another method") in said


@pytest.mark.parametrize(("probe", "asked"), [("connector", "connector"), ("checkpointing", "checkpointing")])
def test_what_only_some_runs_need_is_refused_only_there(probe, asked):
    known = matrix(fails("peft POLY", "generic/a", probe))
    assert ask(known) == []
    with pytest.raises(MethodError, match=r"Leave|Set speed\.recompute"):
        ask(known, **{asked: True})


@pytest.mark.parametrize("probe", ["attaches", "plain peft", "merges", "trees", "switches off", "batches"])
def test_what_a_run_does_without_or_says_itself_is_not_refused(probe):
    assert ask(matrix(fails("peft POLY", "generic/a", probe)), connector=True, checkpointing=True) == []


def test_each_kind_of_failure_that_refuses_is_said_in_words():
    assert set(SAYS) == {*ESSENTIAL, "connector", "checkpointing"}


def test_the_same_architecture_decides_then_the_family_then_all():
    known = matrix(fails("peft POLY", "llava", "trains"), fails("peft POLY", "generic/a", "trains"))
    assert ask(matrix(*known.pairs, works("peft POLY", "generic/b")), model_type="b") == []
    with pytest.raises(MethodError):
        ask(matrix(*known.pairs, works("peft POLY", "generic/b")), model_type="a")
    # of an architecture that was not tried, its family's must all fail; of a family that was not tried, all
    assert ask(matrix(*known.pairs, works("peft POLY", "generic/b")), model_type="new") == []
    with pytest.raises(MethodError):
        ask(known, model_type="new")
    with pytest.raises(MethodError):
        ask(known, family="new", model_type="new")
    assert ask(matrix(*known.pairs, works("peft POLY", "generic/b")), family="new", model_type="new") == []


def test_what_could_not_be_tried_says_nothing():
    absent = Pair("peft POLY", "generic/a", none={"attaches": "a library is not installed"})
    assert ask(matrix(absent)) == []
    assert ask(matrix()) == []


def test_options_choose_the_variant():
    known = matrix(fails("lora dora", "generic/a", "trains"), works("lora", "generic/a"))
    assert ask(known, method="lora", options={"rank": 8, "dora": False}) == []
    with pytest.raises(MethodError, match="lora dora"):
        ask(known, method="lora", options={"rank": 8, "dora": True})


def test_types_of_peft_are_known_in_either_case():
    with pytest.raises(MethodError):
        ask(matrix(fails("peft POLY", "generic/a", "trains")), options={"type": "poly", "config": {}})
    assert ask(matrix(fails("peft POLY", "generic/a", "trains")), options={"type": "vera"}) == []


def test_a_method_of_somebody_else_is_unknown():
    assert ask(matrix(fails("peft POLY", "generic/a", "trains")), method="theirs") == []


@pytest.mark.parametrize("package", DECISIVE)
def test_with_other_versions_it_is_a_note(package):
    known = matrix(fails("peft POLY", "generic/a", "trains"))
    (note,) = consult(combination(), matrix=known, versions=VERSIONS | {package: "9.9"})
    assert "trains is broken" in note
    assert f"{package} 9.9" in note
    assert "peft-mllm matrix --methods 'peft POLY'" in note


def test_another_torch_changes_nothing():
    with pytest.raises(MethodError):
        consult(
            combination(),
            matrix=matrix(fails("peft POLY", "generic/a", "trains")),
            versions=VERSIONS | {"torch": "9.9"},
        )


# The shipped matrix, in runs


def same_versions() -> bool:
    from peft_mllm.matrix.result import shipped

    return all(shipped().versions[name] == installed()[name] for name in DECISIVE)


needs_its_versions = pytest.mark.skipif(not same_versions(), reason="the shipped matrix is of other versions")


@needs_its_versions
@pytest.mark.parametrize("kind", ["POLY", "XLORA", "MULTITASK_PROMPT_TUNING"])
def test_a_run_of_what_is_known_to_fail_is_refused_before_a_model_is_loaded(kind, tmp_path, monkeypatch):
    loaded = []
    monkeypatch.setattr("peft_mllm.common.load_family", lambda *args, **more: loaded.append(args))
    config = {"adapters": {}, "hidden_size": 32} if kind == "XLORA" else {}
    spec = runs.tiny(tmp_path / "run", model="embedded", method={"name": "peft", "type": kind, "config": config})
    with pytest.raises(MethodError, match=f"peft {kind} cannot be trained on llava models"):
        run(parse_spec(spec), quiet=True)
    assert loaded == []


@needs_its_versions
def test_tokens_alone_train_but_not_with_the_connector(tmp_path):
    method = {"name": "peft", "type": "TRAINABLE_TOKENS", "config": {"token_indices": [20, 21]}}
    spec = runs.tiny(tmp_path / "both", method=method, connector="tuned")
    with pytest.raises(MethodError, match=r"together with the connector.*Leave connector frozen"):
        run(parse_spec(spec), quiet=True)


@pytest.mark.parametrize(("member", "lost"), [("qwen2_vl", "positions on several axes"), ("gemma3", "token_type_ids")])
def test_prompts_in_front_of_a_model_that_the_matrix_does_not_know_are_refused(member, lost, tmp_path, monkeypatch):
    monkeypatch.setattr(junction, "consult", lambda combination: [])
    method = {"name": "peft", "type": "PROMPT_TUNING", "config": {"num_virtual_tokens": 4}}
    spec = runs.tiny(tmp_path / "run", model=f"tiny:generic/{member}", method=method)
    with pytest.raises(MethodError, match=f"{lost}.*`prefix` is our own"):
        run(parse_spec(spec), quiet=True)


def test_a_note_of_other_versions_comes_into_the_result(tmp_path, monkeypatch):
    monkeypatch.setattr(junction, "consult", lambda combination: [f"{combination.method} is doubtful"])
    spec = runs.tiny(tmp_path / "run", train={"num_train_epochs": 1, "max_steps": 1})
    assert "lora is doubtful" in run(parse_spec(spec), quiet=True)["notes"]


def test_every_method_of_the_shelf_that_the_matrix_calls_ours_can_be_run():
    """Nothing that this package makes itself may be among the refused."""
    from peft_mllm.matrix.result import shipped

    ours = {name for name, each in shipped().candidates.items() if each["method"] != "peft"}
    assert {each["method"] for each in shipped().candidates.values()} == set(METHODS)
    broken = [p for p in shipped().pairs if p.candidate in ours and set(p.failed) & {"attaches", *ESSENTIAL}]
    assert broken == []


def test_asking_imports_nothing_heavy():
    program = (
        "import sys\nfrom peft_mllm.matrix.known import Combination, consult\n"
        "consult(Combination('lora', {}, 'llava', 'llava'))\n"
        "sys.stdout.write(' '.join({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert re.sub(r"\s", "", done.stdout) == ""
