"""The study's models from their authors' own files to the end, by the commands of docs/models.md.

A tiny ShareGPT4V and a tiny Qwen-VL in the original layouts are converted, fine-tuned with the four methods of the
study, evaluated, exported with a seal, and talked with.
"""

from __future__ import annotations

import io
import json
import sys
from contextlib import nullcontext

import pytest

import originals
import qwen_originals
from exports import quick_seals
from runs import command, read, tiny, write_spec

METHODS = {
    "lora": {"name": "lora", "rank": 4, "alpha": 8},
    "ia3": {"name": "ia3"},
    "adapter": {"name": "adapter", "bottleneck": 8},
    "prefix": {"name": "prefix", "virtual_tokens": 4},
}


@pytest.fixture(scope="module", params=["sharegpt4v", "qwen_vl"])
def converted(request, tmp_path_factory):
    """The directory that `peft-mllm convert` makes of the original."""
    root = tmp_path_factory.mktemp(request.param)
    words = ["convert", root / "original", root / "converted", "--json"]
    if request.param == "sharegpt4v":
        made = originals.write_original(root / "original", kind="share4v", parts=2)
        words = ["convert", made.checkpoint, root / "converted", "--vision-tower", made.tower, "--json"]
    else:
        qwen_originals.write_original(root / "original")
    done = command(*words)
    assert done.code == 0, done.err
    assert json.loads(done.out)["tensors"] > 0
    return root / "converted"


@pytest.mark.parametrize(
    "method", ["lora", *(pytest.param(name, marks=pytest.mark.slow) for name in list(METHODS)[1:])]
)
def test_from_the_authors_files_to_a_talk(converted, method, tmp_path, monkeypatch):
    spec = write_spec(
        tmp_path / "spec.yaml",
        tiny(tmp_path / "run", model=str(converted), method=METHODS[method], connector="tuned", train={"max_steps": 2}),
    )
    trained = command("train", spec, "--json")
    assert trained.code == 0, trained.err
    result = read(tmp_path / "run" / "result.json")
    assert result["trainable"].keys() == {"llm", "connector"}
    assert result["self_check"]["passed"]

    scored = command("evaluate", tmp_path / "run", "--json")
    assert scored.code == 0, scored.err
    assert json.loads(scored.out)["scenes_at"]["values"] == result["scores"]["scenes_at"]["values"]

    # those that are always run fork the process that proves the seal; the slow ones start it anew
    with quick_seals() if method == "lora" else nullcontext():
        exported = command("export", tmp_path / "run", "--output", tmp_path / "exported", "--json")
    assert exported.code == 0, exported.err
    seal = json.loads(exported.out)
    assert seal["effect"] > 0
    assert seal["reloaded"]["difference"] <= seal["reloaded"]["tolerance"]

    monkeypatch.setattr(sys, "stdin", io.StringIO("What is there?\nAnd now?\n"))
    talked = command("chat", tmp_path / "exported", "--max-new-tokens", "3", "--json")
    assert talked.code == 0, talked.err
    answers = [json.loads(line) for line in talked.out.splitlines()]
    assert [answer["question"] for answer in answers] == ["What is there?", "And now?"]
    assert all(answer["adapter"] for answer in answers)
