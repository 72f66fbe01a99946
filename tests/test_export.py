"""Out again: what is exported is whole, loads elsewhere, says what it is; what fails is not there at all."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import peft_mllm
from exports import METHODS, apart, heard, left_in, quick_seals, trained
from peft_mllm.card import adapter_card
from peft_mllm.errors import DiskError, MethodError, ModelError, SpecError, UserError
from peft_mllm.exporting import export as stages
from peft_mllm.exporting.seal import broken
from peft_mllm.files import file_digest
from peft_mllm.spec import Spec
from peft_mllm.specfile import parse_spec
from runs import command, read
from tiny import family, tune

STUDIED = ("lora", "ia3", "adapter", "prefix")
OTHERS = {"dora": "frozen", "layernorm": "tuned", "full": "tuned", "oft": "frozen", "loha": "tuned", "prompt": "frozen"}
AS_IT_IS = [(method, connector) for method in STUDIED for connector in ("frozen", "tuned")] + list(OTHERS.items())
ALWAYS = {
    ("lora", "tuned"),
    ("prefix", "frozen"),
    ("full", "tuned"),
}
"""One of each kind of directory; the others are slow."""


def blocks(card: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", card.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LoRA with the connector."""
    return trained(tmp_path_factory.mktemp("runs") / "lora", "lora", connector="tuned")


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Exports; that of the bottleneck adapter is sealed by really fresh processes."""
    folder = tmp_path_factory.mktemp("exported from runs")
    made = sources(run, folder)
    for name, source in made.items():
        with nullcontext() if name == "adapter" else quick_seals():
            peft_mllm.export(source, output_dir=folder / name, merge=name == "merged", quiet=True)
    return {name: folder / name for name in made}


def sources(run: Path, folder: Path) -> dict[str, Path]:
    """What is exported: name -> run."""
    bottleneck = trained(folder / "run", "adapter", connector="tuned")
    random = trained(folder / "random", "prefix", model="tiny:llava")
    return {"lora": run, "merged": run, "adapter": bottleneck, "tiny": random}


# --- what is there ---


@pytest.mark.parametrize(
    ("method", "connector"), [pytest.param(*each, marks=[pytest.mark.slow] * (each not in ALWAYS)) for each in AS_IT_IS]
)
def test_every_method(tmp_path, method, connector):
    run = trained(tmp_path / "run", method, connector=connector)
    with quick_seals():
        seal = peft_mllm.export(run, quiet=True)
    directory = Path(seal["directory"])
    assert seal["reloaded"]["difference"] <= 1e-5
    assert seal["effect"] > 1e-3
    assert broken(directory) == []
    if method == "full":
        assert seal["form"] == "model"
        assert apart(heard(directory), heard(run / "adapter")) == 0
        return
    assert {path.name for path in directory.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "README.md", "seal.json",
    }  # fmt: skip
    weights = load_file(directory / "adapter_model.safetensors")
    assert any("multi_modal_projector" in name for name in weights) == (connector == "tuned")
    assert apart(heard("embedded", directory), heard("embedded", run / "adapter")) == 0


def test_the_seal_lists_every_file(exported):
    for directory in exported.values():
        seal = read(directory / "seal.json")
        files = {path.name for path in directory.iterdir()} - {"seal.json"}
        assert set(seal["files"]) == files
        assert all(file_digest(directory / name) == digest for name, digest in seal["files"].items())
        assert seal["versions"]["torch"]
        assert seal["probe"]["conversations"] == 4
        assert seal["probe"]["positions"] > 20


def test_who_loads_it_is_found_out(exported):
    by = {name: read(directory / "seal.json")["reloaded"]["by"] for name, directory in exported.items()}
    assert by == {"lora": "plain", "merged": "plain", "adapter": "taught", "tiny": "ours"}


@pytest.mark.slow
def test_really_fresh_processes_find_the_same(run, exported, tmp_path):
    for name, source in sources(run, tmp_path).items():
        seal = peft_mllm.export(source, output_dir=tmp_path / name, merge=name == "merged", quiet=True)
        assert seal["reloaded"]["by"] == read(exported[name] / "seal.json")["reloaded"]["by"]
        assert seal["probe"] == read(exported[name] / "seal.json")["probe"]


def test_the_probe_is_always_the_same(exported):
    asked = {name: read(directory / "seal.json")["probe"]["sha256"] for name, directory in exported.items()}
    assert asked["lora"] == asked["merged"] == asked["adapter"] != asked["tiny"]  # other pixels


def test_a_base_alone_has_no_effect_and_says_so(tmp_path):
    run = trained(tmp_path / "run", "none")
    with quick_seals():
        seal = peft_mllm.export(run, quiet=True)
    assert seal["effect"] == 0
    assert "nothing was trained" in (Path(seal["directory"]) / "README.md").read_text()


def test_a_peft_directory_is_exported_on_its_base(tmp_path, exported):
    with quick_seals():
        said = command("export", exported["lora"], "--base", "embedded", "--output", tmp_path / "again", "--json")
    assert said.code == 0, said.err
    assert json.loads(said.out)["form"] == "adapter"
    config = read(tmp_path / "again" / "adapter_config.json")
    assert config["base_model_name_or_path"] == "embedded"
    name = "adapter_model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (exported["lora"] / name).read_bytes()
    assert "result.json" in (tmp_path / "again" / "README.md").read_text()


@pytest.mark.slow
def test_in_bfloat16(tmp_path):
    run = trained(tmp_path / "run", "lora", connector="tuned", model={"path": "embedded", "dtype": "bfloat16"})
    with quick_seals():
        seal = peft_mllm.export(run, quiet=True)
        merged = peft_mllm.export(run, merge=True, quiet=True)
    assert seal["reloaded"] | {"by": ""} == {
        "by": "", "dtype": "bfloat16", "device": "cpu", "difference": 0.0, "tolerance": 2e-2,
    }  # fmt: skip
    assert 0 < merged["merged"]["difference"] <= merged["merged"]["tolerance"] == 5e-2


def test_the_command_says_what_it_did(tmp_path, run):
    with quick_seals():
        said = command("export", run, "--output", tmp_path / "new" / "my adapter")
    assert said.code == 0, said.err
    assert "logits differ by: 0.0e+00" in said.out
    assert "PeftModel.from_pretrained" in said.out
    assert str(tmp_path / "new" / "my adapter") in said.out


# --- the card ---


@pytest.mark.slow
def test_the_code_of_every_card_runs(exported, tmp_path):
    """In one fresh process: the merged model first, which needs nothing of ours, nor peft."""
    program = ["import os, sys", "import torch", "counted = {}"]
    program += ["def trained(model):", "    opened = globals().get('weights') or dict(model.named_parameters())"]
    program.append("    return sum(p.numel() for p in opened.values() if p.requires_grad)")
    for name in ("merged", "lora", "adapter", "tiny"):
        program += [f"os.chdir({str(exported[name])!r})", *blocks(exported[name] / "README.md", "python")]
        program.append(f"counted[{name!r}] = trained(model)")
        if name == "merged":
            program.append("assert not {'peft', 'peft_mllm'} & set(sys.modules)")
    (tmp_path / "cards.py").write_text("\n".join([*program, "print(counted)"]))
    done = subprocess.run([sys.executable, tmp_path / "cards.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    counted = yaml.safe_load(done.stdout.splitlines()[-1])
    for name in ("lora", "adapter", "tiny"):  # the last block of an adapter's card opens it for training
        saved = load_file(exported[name] / "adapter_model.safetensors")
        assert counted[name] == sum(tensor.numel() for tensor in saved.values())


def test_its_commands_are_ours(exported, monkeypatch):
    for name in ("lora", "merged"):
        monkeypatch.chdir(exported[name])
        (line,) = blocks(exported[name] / "README.md", "bash")
        assert line.split()[0] == "peft-mllm"
        said = command(*line.split()[1:-1], "{name: scenes_next, size: {train: 0, test: 2}}", "--json")
        assert said.code == 0, said.err
        assert json.loads(said.out)["scenes_next"]["n"] == 2


def test_the_card_says_what_the_result_says(exported, run):
    result, text = read(run / "result.json"), (exported["lora"] / "README.md").read_text()
    header = yaml.safe_load(text.split("---")[1])
    assert header["library_name"] == "peft"
    assert header["base_model"] == "embedded"
    assert header["license"] == "apache-2.0"
    assert "LORA" in header["tags"]
    score = result["scores"]["scenes_next"]
    assert f"{score['values']['accuracy']:.2f} | {score['n']} | {score['rule']}" in text
    for trained_part in result["trainable"].values():
        assert f"{trained_part['parameters']:,} parameters" in text
    assert f"| seed | {result['seed']} |" in text
    assert result["data"]["train"]["fingerprint"][:16] in text
    assert f"transformers {result['environment']['transformers']}" in text
    assert result["notes"][0] in text
    seal = read(exported["lora"] / "seal.json")
    assert f"{seal['effect']:.1e}" in text
    assert seal["probe"]["sha256"][:16] in text
    merged = yaml.safe_load((exported["merged"] / "README.md").read_text().split("---")[1])
    assert merged["library_name"] == "transformers"
    assert merged["base_model_relation"] == "finetune"


def test_the_spec_in_the_card_is_the_runs(exported, run):
    (block,) = blocks(exported["lora"] / "README.md", "yaml")
    again = parse_spec(yaml.safe_load(block))
    assert isinstance(again, Spec)
    assert again.id == read(run / "result.json")["spec_id"]


def test_a_published_card_has_no_paths_of_this_machine(run, tmp_path, monkeypatch):
    result = read(run / "result.json")
    result["spec"]["task"]["options"]["root"] = "/home/somebody/data/iconqa"
    monkeypatch.setattr(stages, "open_source", _with_result(stages.open_source, result))
    with quick_seals():
        made = peft_mllm.export(run, output_dir=tmp_path / "out", quiet=True)
    text = (Path(made["directory"]) / "README.md").read_text()
    assert "root: iconqa" in text
    assert "/home" not in text
    assert str(tmp_path) not in text


def _with_result(real, result):
    import dataclasses

    return lambda *words: dataclasses.replace(real(*words), result=result)


@pytest.mark.parametrize(("kind", "base", "needs"), [
    ("LORA", "somebody/llava", None), ("BOTTLENECK", "somebody/llava", "import peft_mllm"),
    ("LORA", "tiny:llava", "load_family"),
])  # fmt: skip
def test_a_runs_own_adapter_has_a_card_too(kind, base, needs):
    class Config:
        peft_type = type("Kind", (), {"value": kind})
        base_model_name_or_path = base

    text = adapter_card(Config)
    assert needs is None or needs in text
    assert ("peft_mllm" in text) == (needs is not None)
    compile(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0], "card", "exec")


# --- what is not exported, and leaves nothing ---


def flip(file: Path) -> None:
    """Change one weight that counts."""
    tensors = load_file(file)
    name = next(name for name in tensors if "lora_B" in name or "q_proj" in name)
    tensors[name] = tensors[name] + 0.05 * torch.randn(tensors[name].shape)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("form", [{}, {"merge": True}, {"as_lora": 4}], ids=["adapter", "merged", "lora"])
def test_corrupted_weights_fail_the_seal(tmp_path, run, monkeypatch, form):
    real = stages._set_base

    def corrupt(directory: Path, base: str) -> None:
        real(directory, base)
        (weights,) = directory.glob("*.safetensors")
        flip(weights)

    monkeypatch.setattr(stages, "_set_base", corrupt)
    with quick_seals(), pytest.raises(ModelError, match="differ by"):
        peft_mllm.export(run, output_dir=tmp_path / "new" / "out", quiet=True, **form)
    assert left_in(tmp_path) == []


def test_a_fresh_process_that_fails_says_why(tmp_path, run, monkeypatch):
    monkeypatch.setattr(stages, "_set_base", lambda directory, base: (directory / "adapter_config.json").unlink())
    with quick_seals(), pytest.raises(ModelError, match="adapter_config"):
        peft_mllm.export(run, output_dir=tmp_path / "out", quiet=True)
    assert left_in(tmp_path) == []


def test_no_effect_is_refused(tmp_path):
    fam = family()
    fam.model.name_or_path = "tiny:llava"
    tune("lora", on=fam).save(tmp_path / "untrained")  # B is zero
    before = left_in(tmp_path)
    with quick_seals(), pytest.raises(MethodError, match="changes nothing"):
        peft_mllm.export(tmp_path / "untrained", output_dir=tmp_path / "out", quiet=True)
    assert left_in(tmp_path) == before


def test_a_damaged_run_is_refused(tmp_path, run):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    flip(copy / "adapter" / "adapter_model.safetensors")
    with pytest.raises(DiskError, match="sha256"):
        peft_mllm.export(copy, quiet=True)
    assert not (copy / "export").exists()


def test_another_runs_adapter_is_refused(tmp_path, run):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    other = trained(tmp_path / "other", "lora")
    shutil.rmtree(copy / "adapter")
    shutil.copytree(other / "adapter", copy / "adapter")
    with pytest.raises(DiskError, match="another run"):
        peft_mllm.export(copy, quiet=True)


def test_an_unfinished_run_is_refused(tmp_path, run):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / "result.json").unlink()
    with pytest.raises(SpecError, match="not finished"):
        peft_mllm.export(copy, quiet=True)
    shutil.rmtree(copy / "adapter")
    with pytest.raises(SpecError, match="not finished"):
        peft_mllm.export(copy, quiet=True)


def test_a_broken_seal_is_refused(tmp_path, exported):
    copy = tmp_path / "copy"
    shutil.copytree(exported["lora"], copy)
    flip(copy / "adapter_model.safetensors")
    with pytest.raises(DiskError, match=r"adapter_model\.safetensors has another sha256"):
        peft_mllm.export(copy, output_dir=tmp_path / "out", quiet=True)


def test_what_is_there_is_not_touched(tmp_path, run):
    (tmp_path / "out").mkdir()
    said = command("export", run, "--output", tmp_path / "out")
    assert said.code == 2
    assert "is there already" in said.err
    assert left_in(tmp_path) == ["out"]


@pytest.mark.parametrize(("words", "message"), [
    (["RUN", "--merge", "--as-lora", "4"], "not both"),
    (["RUN", "--check", "4"], "as_lora"),
    (["RUN", "--base", "embedded"], "Leave --base out"),
    (["embedded"], "nothing of ours"),
    (["no-such-directory"], "nothing of ours"),
    (["RUN/adapter"], "--output"),
])  # fmt: skip
def test_mistakes(run, words, message):
    said = command("export", *(word.replace("RUN", str(run)) for word in words))
    assert said.code == 2
    assert message in said.err
    assert "Traceback" not in said.err


def test_a_full_disk_leaves_nothing(tmp_path, run, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(stages, "write_seal", full)
    with quick_seals(), pytest.raises(DiskError, match="Cannot write the export"):
        peft_mllm.export(run, output_dir=tmp_path / "out", quiet=True)
    assert left_in(tmp_path) == []


def test_the_cases_name_methods_that_there_are():
    assert {method for method, _ in AS_IT_IS} | {"none"} == set(METHODS)
    assert issubclass(SpecError, UserError)
