"""The command line: what it shows, what it prints to a program, and that Python's functions do the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from typer.main import get_command

import peft_mllm
from peft_mllm.assets import EMBEDDED
from peft_mllm.cli import app
from peft_mllm.errors import UserError
from peft_mllm.listing import SHELVES
from runs import assert_same, command, lines, read, tiny, write_spec

VERBS = [
    ["train"], ["evaluate"], ["list"], ["demo"], ["convert"], ["import-adapter"], ["export"], ["chat"], ["matrix"],
    ["inspect"], ["score"], ["compare"], ["reproduce"], ["annotate"], ["advise"], ["plan"],
    ["data", "check"], ["data", "prepare"], ["data", "preview"], ["data", "convert"],
    ["study", "plan"], ["study", "run"], ["study", "status"], ["study", "report"],
]  # fmt: skip


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_help_shows_examples(verb):
    said = command(*verb, "--help")
    assert said.code == 0
    assert "Examples" in said.out
    assert f"peft-mllm {' '.join(verb)}" in said.out
    assert "`" not in said.out, "marks of Markdown are shown"


def test_every_verb_is_tested():
    assert set(get_command(app).commands) == {verb[0] for verb in VERBS}


def test_help_of_the_whole():
    said = command("--help")
    assert said.code == 0
    for verb in VERBS:
        assert verb[0] in said.out
    assert command().out.strip() == said.out.strip()


@pytest.mark.parametrize("kind", SHELVES)
def test_list_contains_everything_on_the_shelf(kind):
    said = command("list", kind)
    assert said.code == 0
    shown = {line.split()[0] for line in said.out.splitlines() if line.strip() and not line.startswith(" ")}
    assert set(SHELVES[kind]) <= shown
    for name in SHELVES[kind]:
        assert SHELVES[kind].summary(name).split(" (")[0] in " ".join(said.out.split())
    as_json = json.loads(command("list", kind, "--json").out)
    assert set(as_json) == set(SHELVES[kind])
    for name, described in as_json.items():
        assert described["summary"] == SHELVES[kind].summary(name)


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in ("methods", "tasks") for name in SHELVES[kind]])
def test_list_shows_the_options_of_one(kind, name):
    said = command("list", kind, name)
    assert said.code == 0
    described = json.loads(command("list", kind, name, "--json").out)[name]
    fields = getattr(SHELVES[kind][name].Options, "model_fields", {})
    assert [option["name"] for option in described["options"]] == list(fields)
    for option in described["options"]:
        assert option["name"] in said.out
        assert option["meaning"], f"{option['name']} has no meaning"
        assert "Undefined" not in option["default"]


def test_a_list_of_what_there_is_not():
    said = command("list", "method")
    assert (said.code, "Did you mean 'methods'?" in said.err) == (2, True)
    said = command("list", "methods", "lorra")
    assert (said.code, "Did you mean 'lora'?" in said.err) == (2, True)


def test_wrong_usage():
    for words in (["trian"], ["train"], ["train", "--nonsense", "x"], ["data"], ["list"]):
        said = command(*words)
        assert said.code in (0, 2)
        assert "Traceback" not in said.err
        assert (said.err + said.out).strip()


def test_the_module_runs_without_torch():
    """`python -m peft_mllm` in a process of its own: what lists and helps imports neither, so it answers at once."""
    for words in (["list", "methods"], ["--help"]):
        code = (
            f"import sys, runpy; sys.argv = ['peft-mllm', *{words!r}]\n"
            "try: runpy.run_module('peft_mllm', run_name='__main__')\n"
            "finally: print('torch' in sys.modules, 'transformers' in sys.modules, file=sys.stderr)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stderr.split()[-2:] == ["False", "False"]


def test_python_gives_what_the_command_gives(tmp_path):
    spec = tiny(tmp_path / "cli")
    said = command("train", write_spec(tmp_path / "spec.yaml", spec), "train.max_steps=3", "--json")
    assert said.code == 0, said.err
    by_file = peft_mllm.train(
        tmp_path / "spec.yaml", "train.max_steps=3", f"output_dir={tmp_path / 'file'}", quiet=True
    )
    by_data = peft_mllm.train({**spec, "output_dir": str(tmp_path / "data")}, "train.max_steps=3", quiet=True)
    assert_same(tmp_path / "file", tmp_path / "cli")
    assert_same(tmp_path / "data", tmp_path / "cli")
    printed = json.loads(said.out)
    assert set(by_file) == set(by_data) == set(printed)
    for key in ("spec_id", "method", "model", "trainable", "data", "self_check", "notes", "seed"):
        assert by_file[key] == by_data[key] == printed[key]
    assert printed == {
        key: value
        for key, value in read(tmp_path / "cli" / "result.json").items()
        if key not in ("sha256", "spec_sha256")
    }
    evaluated = json.loads(command("evaluate", tmp_path / "cli", "--json").out)
    scores = peft_mllm.evaluate(str(tmp_path / "cli"), output_dir=tmp_path / "scores", quiet=True)
    assert scores["scenes_at"]["values"] == evaluated["scenes_at"]["values"]
    task = {"name": "scenes_count", "size": {"test": 3}}
    by_task = peft_mllm.evaluate(tmp_path / "cli", [task], quiet=True)
    assert by_task["scenes_count"]["n"] == 3
    assert lines(tmp_path / "scores/predictions/scenes_at.jsonl") == lines(tmp_path / "cli/predictions/scenes_at.jsonl")


def test_python_raises_what_the_command_says(tmp_path):
    with pytest.raises(UserError, match="Did you mean 'lora'"):
        peft_mllm.train({**tiny(tmp_path / "run"), "method": "lorra"})
    with pytest.raises(UserError, match=r"none\.yaml"):
        peft_mllm.train(str(tmp_path / "none.yaml"))


def test_python_takes_paths(tmp_path):
    changes = {"output_dir": tmp_path / "run", "model": {"path": EMBEDDED}}
    result = peft_mllm.train({**tiny(tmp_path), **changes}, "train.max_steps=1", quiet=True)
    assert (tmp_path / "run" / "result.json").is_file()
    assert result["model"]["source"] == str(EMBEDDED)


def test_quiet_is_quiet(tmp_path, capfd):
    peft_mllm.train(tiny(tmp_path / "run", train={"max_steps": 1}), quiet=True)
    peft_mllm.train(tiny(tmp_path / "run", train={"max_steps": 1}), quiet=True)
    said = capfd.readouterr()
    ours = [line for line in said.err.splitlines() if "Warning" not in line and "warnings.warn" not in line]
    assert (said.out, ours) == ("", [])


def test_list_options_of_several_values(tmp_path):
    spec = write_spec(tmp_path / "s.yaml", tiny(tmp_path / "run"))
    for value in ("tensorboard", "[tensorboard]", "[]"):
        said = command("train", spec, f"train.report_to={value}", "train.max_steps=1")
        assert said.code == 0 or "is not installed" in said.err, said.err


def test_the_environment_is_left_alone():
    before = dict(os.environ)
    command("list", "metrics")
    assert {k: v for k, v in os.environ.items() if before.get(k) != v}.keys() <= {"TRANSFORMERS_VERBOSITY"}
