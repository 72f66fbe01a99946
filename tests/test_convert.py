"""Converted checkpoints are what plain transformers loads, with the numbers of the original code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import peft_mllm.convert as convert_module
import plain
import tiny
from originals import write_original
from peft_mllm.cli import app
from peft_mllm.convert import convert
from peft_mllm.errors import DiskError, ModelError
from peft_mllm.models import MODELS
from peft_mllm.models.base import Loading
from peft_mllm.models.llava import Llava
from runs import command

LOGITS, PIXELS = 2e-5, 1e-6


def ask_plainly(*directories: Path) -> None:
    """In a process of its own, where nothing of ours is imported."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | extra_path()
    done = subprocess.run(
        [sys.executable, plain.__file__, *map(str, directories)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]


def extra_path() -> dict[str, str]:
    """Where this process has transformers from, when it is not the environment's own."""
    return {"PYTHONPATH": os.environ["PYTHONPATH"]} if "PYTHONPATH" in os.environ else {}


def within(what, ours, expected, tolerance):
    difference = (ours - expected).abs().max().item()
    sys.stdout.write(f"{what}: {difference:.2e} (allowed {tolerance:.0e})\n")
    assert ours.shape == expected.shape, what
    assert difference <= tolerance, what


def files(directory):
    return {path.name: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_fresh_process_gives_the_original_numbers(cases, tmp_path):
    """The converted goldens, by plain transformers: ids, pixels, logits."""
    goldens = {name: cases / "golden" / name for name in ("llava", "sharegpt4v")}
    for name, golden in goldens.items():
        convert(str(golden / "checkpoint"), tmp_path / name / "model", vision_tower=str(golden / "vision_tower"))
        prompts = json.loads((golden / "golden.json").read_text())["prompts"]
        asked = {
            prompt: {"text": told["prompt"], "images": [str(golden / "images" / image) for image in told["images"]]}
            for prompt, told in prompts.items()
        }
        (tmp_path / name / "asked.json").write_text(json.dumps(asked))
    ask_plainly(*(tmp_path / name for name in goldens))
    for name, golden in goldens.items():
        recorded = load_file(golden / "golden.safetensors")
        answered = load_file(tmp_path / name / "answered.safetensors")
        placeholder = json.loads((tmp_path / name / "model" / "config.json").read_text())["image_token_index"]
        for prompt in ("p0", "p1", "p2", "p3"):
            ids = answered[f"{prompt}.input_ids"][0].tolist()
            patches = recorded["image_features"].shape[1]
            expanded = [
                t
                for token in recorded[f"{prompt}.input_ids"].tolist()
                for t in ([placeholder] * patches if token == -200 else [token])
            ]
            assert ids == expanded
            for key in (f"{prompt}.logits", f"{prompt}.logits_last16"):
                if key in recorded:
                    logits = answered[f"{prompt}.logits"][0, -len(recorded[key]) :]
                    within(f"{name} {key}", logits, recorded[key], LOGITS)
            made = answered[f"{prompt}.generated"][0, len(ids) :].tolist()
            assert made == recorded[f"{prompt}.greedy_ids"][: len(made)].tolist()
        within(f"{name} pixels", answered["p3.pixel_values"], recorded["pixel_values"], PIXELS)


def test_its_processor_and_template_say_what_we_say(tmp_path):
    made = write_original(tmp_path, kind="share4v", parts=2, inside=True)
    done = convert(str(made.checkpoint), tmp_path / "model")
    family = Llava.load(tmp_path / "model", loading=Loading("float32"))
    pictures = [tmp_path / f"{i}.png" for i in (1, 2)]
    for i, path in enumerate(pictures, start=1):
        tiny.Picture(i).load().save(path)
    records = {
        "one": tiny.record("one", "<image>\nWhat is it?", "x", images=(1,)),
        "two": tiny.record("two", "<image>\n<image>\nThe same?", "x", images=(1, 2)),
        "turns": tiny.record("turns", "<image>\nWhat?", "A cat.", "And now?", "x", images=(1,)),
        "text": tiny.record("text", "  How many?\n", "x"),
        "system": tiny.record("system", "What?", "x", system="Be brief."),
    }
    asked = {}
    for name, record in records.items():
        messages = []
        for turn in record.turns[:-1]:
            text = turn.text.replace("<image>\n", "")
            shown = [{"type": "image"}] * turn.text.count("<image>")
            messages.append({"role": turn.role, "content": [{"type": "text", "text": text}, *shown]})
        asked[name] = {"messages": messages, "images": [str(path) for path in pictures[: len(record.images)]]}
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    plain.answer(tmp_path)  # in this process; another test has it in one where nothing of ours is imported
    answered = load_file(tmp_path / "answered.safetensors")
    for name, record in records.items():
        batch = tiny.prompts(family, [record])
        assert answered[f"{name}.input_ids"].tolist() == batch.input_ids.tolist(), name
        for key, value in batch.pixels.items():
            within(f"{name} {key}", answered[f"{name}.{key}"], value, PIXELS)
        with torch.no_grad():
            logits = family.model(batch.input_ids, **batch.pixels).logits
        within(f"{name} logits", answered[f"{name}.logits"], logits, LOGITS)
    assert done.notes == ["Vision tower: the one inside the checkpoint"]


def test_tensors_keep_the_types_they_are_stored_in(tmp_path):
    """A tower rounded to the language model's type would not give the original's features."""
    made = write_original(tmp_path, tower_dtype=torch.float32)
    convert(str(made.checkpoint), tmp_path / "stored")
    with safe_open(tmp_path / "stored" / "model.safetensors", "pt") as opened:
        types = {("vision" in name, opened.get_tensor(name).dtype) for name in opened.keys()}  # noqa: SIM118
    assert types == {(True, torch.float32), (False, torch.float16)}
    again = Llava.load(tmp_path / "stored", loading=Loading("float32")).model.state_dict()
    for name, tensor in made.model.state_dict().items():
        assert torch.equal(again[name], tensor), name
    # run as the original is: all of it in the language model's type
    run = Llava.load(tmp_path / "stored", loading=Loading("auto")).model
    assert {tensor.dtype for tensor in run.state_dict().values()} == {torch.float16}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_type_may_be_asked_for(tmp_path, dtype):
    made = write_original(tmp_path)
    convert(str(made.checkpoint), tmp_path / "new", dtype=dtype)
    written = load_file(tmp_path / "new" / "model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {getattr(torch, dtype)}
    assert json.loads((tmp_path / "new" / "config.json").read_text())["dtype"] == dtype


def test_a_checkpoint_that_samples_goes_on_sampling(tmp_path):
    made = write_original(tmp_path)
    told = {"eos_token_id": 2, "pad_token_id": 0, "do_sample": True, "temperature": 0.2, "max_length": 64}
    (made.checkpoint / "generation_config.json").write_text(json.dumps(told))
    convert(str(made.checkpoint), tmp_path / "new")
    written = json.loads((tmp_path / "new" / "generation_config.json").read_text())
    assert {key: written[key] for key in told} == told


def test_old_weights_of_another_family(tmp_path):
    """Qwen-VL's names are its own in both formats; what is old is the files."""
    old, new = tmp_path / "old", tmp_path / "new"
    family = MODELS["qwen_vl"].tiny()
    family.save(old)
    weights = load_file(old / "model.safetensors")
    (old / "model.safetensors").unlink()
    torch.save(weights, old / "pytorch_model.bin")
    done = convert(str(old), new, quiet=True)
    written = load_file(new / "model.safetensors")
    assert written.keys() == weights.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in weights.items())
    assert (done.tensors, done.read.keys()) == (len(family.model.state_dict()), {"pytorch_model.bin"})


def test_what_it_says(tmp_path):
    made = write_original(tmp_path, kind="share4v", parts=2, tower_name="clip-vit-tiny")
    done = CliRunner().invoke(app, ["convert", str(made.checkpoint), str(tmp_path / "deep" / "new")])
    assert done.exit_code == 0, done.output
    for said in ("pytorch_model-00001-of-00002.bin", f"Vision tower: {made.tower}", "plain CLIP", "loaded again and"):
        assert said in done.output
    told = CliRunner().invoke(app, ["convert", str(made.checkpoint), str(tmp_path / "second"), "--json"])
    report = json.loads(told.stdout)
    assert report["written"].keys() == files(tmp_path / "second").keys()
    assert report["parameters"] == sum(parameter.numel() for parameter in made.model.parameters())
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "second").iterdir()} == {
        (tmp_path / "second" / "config.json").stat().st_mode & 0o777
    }


def test_the_warning_is_seen_on_the_command_line(tmp_path):
    made = write_original(tmp_path, kind="share4v", tower_name="clip-vit-tiny")
    said = command("convert", str(made.checkpoint), str(tmp_path / "new"), "--json")
    assert said.code == 0, said.err
    json.loads(said.out)
    assert said.err.count("Warning: ") == 1
    assert "plain CLIP" in said.err


def test_what_needs_no_converting_is_said(tmp_path):
    tiny.family().save(tmp_path / "hf")
    with pytest.raises(ModelError, match="in the Hugging Face format already"):
        convert(str(tmp_path / "hf"), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_directory_in_use_is_left_alone(tmp_path):
    made = write_original(tmp_path)
    for target in (made.tower, made.tower / "config.json"):
        before = files(made.tower)
        with pytest.raises(ModelError, match="is there already"):
            convert(str(made.checkpoint), target)
        assert files(made.tower) == before
    (tmp_path / "empty").mkdir()
    convert(str(made.checkpoint), tmp_path / "empty", quiet=True)
    assert (tmp_path / "empty" / "config.json").is_file()


def left_behind(tmp_path):
    return {path.name for path in tmp_path.iterdir()} - {"checkpoint", "clip-vit-tiny"}


def test_a_failure_leaves_nothing(tmp_path, monkeypatch):
    made = write_original(tmp_path)
    save = Llava.save

    def fail(error):
        def broken(family, directory):
            save(family, directory)
            raise error

        monkeypatch.setattr(Llava, "save", broken)

    for error in (KeyboardInterrupt(), RuntimeError("no")):
        fail(error)
        with pytest.raises(type(error)):
            convert(str(made.checkpoint), tmp_path / "new", quiet=True)
        assert left_behind(tmp_path) == set()
    fail(OSError(28, "No space left on device"))
    with pytest.raises(DiskError, match="No space left"):
        convert(str(made.checkpoint), tmp_path / "new", quiet=True)
    assert left_behind(tmp_path) == set()


def test_what_was_written_is_compared_with_what_was_read(tmp_path, monkeypatch):
    made = write_original(tmp_path)
    save = Llava.save

    def spoil(family, directory):
        save(family, directory)
        tensors = load_file(directory / "model.safetensors")
        name = next(name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight"))
        tensors[name][3, 3] += 1
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(Llava, "save", spoil)
    with pytest.raises(ModelError, match="not what was read"):
        convert(str(made.checkpoint), tmp_path / "new", quiet=True)
    assert left_behind(tmp_path) == set()


def test_a_full_disk_is_found_before_reading(tmp_path, monkeypatch):
    made = write_original(tmp_path)
    monkeypatch.setattr(convert_module.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10})())
    monkeypatch.setattr(convert_module, "load_family", None)
    with pytest.raises(DiskError, match="Free some space"):
        convert(str(made.checkpoint), tmp_path / "new", quiet=True)


def test_a_hub_id_is_read_from_what_was_fetched(tmp_path, monkeypatch):
    """The hub's cache, laid out by hand; only what is needed was fetched into it."""
    made = write_original(tmp_path / "made", kind="share4v", parts=2, tower_name="tuned-vit")
    hub = tmp_path / "home" / "hub"
    for name, source in {"models--lin--share": made.checkpoint, "models--lin--tuned-vit": made.tower}.items():
        (hub / name / "refs").mkdir(parents=True)
        (hub / name / "refs" / "main").write_text("0" * 40)
        (hub / name / "snapshots").mkdir()
        source.rename(hub / name / "snapshots" / ("0" * 40))
    checkpoint = hub / "models--lin--share" / "snapshots" / ("0" * 40) / "config.json"
    checkpoint.write_text(json.dumps(json.loads(checkpoint.read_text()) | {"mm_vision_tower": "lin/tuned-vit"}))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub))
    monkeypatch.chdir(tmp_path)
    done = command("convert", "lin/share", tmp_path / "new", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["notes"] == ["Vision tower: lin/tuned-vit"]
    again = Llava.load(tmp_path / "new", loading=Loading("float32")).model.state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in made.model.state_dict().items())
