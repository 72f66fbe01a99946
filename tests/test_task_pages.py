"""docs/tasks.md says what the tasks are, and its commands work on releases in their owners' layouts."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from releases import RELEASES, SCORED, publish
from runs import command, lines

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "tasks.md"


def commands(name):
    """The two commands of a task's section."""
    section = PAGE.read_text(encoding="utf-8").split(f"\n## {name}\n")[1].split("\n## ")[0]
    block = re.search(r"```bash\n(.*?)```", section, re.DOTALL)[1]
    prepare, evaluate = (shlex.split(line)[1:] for line in block.strip().splitlines())
    return prepare, evaluate


def test_the_page_is_up_to_date():
    check = [sys.executable, "scripts/tasks_page.py", "--check"]
    done = subprocess.run(check, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_every_task_is_prepared_and_evaluated_by_the_commands_of_the_page(tmp_path, monkeypatch):
    """Evaluated together: the commands' tasks in one call, so that the base is loaded once."""
    monkeypatch.chdir(tmp_path)
    asked = []
    for name in RELEASES:
        publish(name, tmp_path / "downloads" / name)
        prepare, evaluate = commands(name)
        said = command(*prepare, "--partial")
        assert said.code == 0, said.err
        assert evaluate[:3] == ["evaluate", "embedded", "--task"]
        asked += evaluate[2:]
    said = command("evaluate", "embedded", *asked, "--output", "scores", "--limit", 2)
    assert said.code == 0, said.err
    for name in RELEASES:
        answers = lines(tmp_path / "scores/predictions" / f"{name}.jsonl")
        assert len([each for each in answers if "prediction" in each]) == min(2, SCORED[name])


def test_a_run_trains_on_a_sample_and_says_which(tmp_path, monkeypatch):
    from runs import read, tiny, write_spec

    monkeypatch.chdir(tmp_path)
    publish("vizwiz", tmp_path / "downloads/vizwiz")
    assert command(*commands("vizwiz")[0], "--partial").code == 0
    task = {"name": "vizwiz", "root": "datasets/vizwiz", "train_size": 4, "test_size": 2, "prompt": "qwen-vl"}
    spec = tiny(tmp_path / "run", task=task, train={"max_steps": 2})
    said = command("train", write_spec(tmp_path / "spec.yaml", spec))
    assert said.code == 0, said.err
    result = read(tmp_path / "run/result.json")
    assert result["data"]["train"]["trained_on"] == 4
    assert result["data"]["train"]["origin"]["sample"]["size"] == 4
    assert result["scores"]["vizwiz"]["n"] == 2
    assert result["scores"]["vizwiz"]["origin"]["partial"]
