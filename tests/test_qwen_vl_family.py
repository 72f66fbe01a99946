"""Qwen-VL as a family: read from the published layout, trained by every kind of method, written, and read by others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, PretrainedConfig

import tiny
from peft_mllm.convert import convert
from peft_mllm.errors import ModelError
from peft_mllm.loading import load_family
from peft_mllm.models import MODELS
from peft_mllm.models.base import Loading
from peft_mllm.models.qwen_vl.configuration import QwenVLConfig
from peft_mllm.models.qwen_vl.modelling import QwenVLForConditionalGeneration
from peft_mllm.models.qwen_vl.processor import QwenVLProcessor
from peft_mllm.models.qwen_vl.tokenizer import QWenTokenizer
from peft_mllm.spec import ModelSpec
from qwen_originals import published_names, write_original

MILD = {"lora": {"alpha": 4.0}}
"""LoRA's default alpha, at a rank of 4, multiplies rounding errors by 64 and more."""
METHODS = ("lora", "ia3", "adapter", "prefix")
SHARD = "pytorch_model-00002-of-00002.bin"


@pytest.fixture(scope="module")
def qwen():
    return tiny.family("qwen_vl")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    directory = tmp_path_factory.mktemp("original")
    return directory, write_original(directory)


def load(directory, **more):
    return MODELS["qwen_vl"].load(directory, loading=Loading(**({"dtype": "float32"} | more)))


@torch.no_grad()
def logits(family):
    batch = tiny.padded(family, tiny.samples(family))
    return family.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **batch.pixels).logits


def equal(ours, theirs):
    theirs = theirs.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in ours.state_dict().items())


# Methods


def gradients(tuned, batch):
    tuned.model.train()
    tuned.answer_losses(batch).mean().backward()
    found = {name: parameter.grad for name, parameter in tuned.trainable().items()}
    tuned.model.eval()
    return found


def apart(ones, others):
    """Relative to the norm of all of them."""
    assert ones.keys() == others.keys()
    squares = sum((ones[name] - others[name]).pow(2).sum() for name in ones)
    return (squares / sum(each.pow(2).sum() for each in others.values())).sqrt().item()


def tuned_with(name, *, attn="sdpa", **parts):
    on = tiny.family("qwen_vl", attn=attn)
    return tiny.stir(tiny.tune(name, on=on, parts={"connector": True, **parts}, **MILD.get(name, {})))


@pytest.mark.parametrize("name", METHODS)
def test_shared_prefixes_give_the_gradients_of_padded_rows(qwen, name):
    samples = tiny.samples(qwen)
    plain = gradients(tuned_with(name), tiny.padded(qwen, samples))
    difference = apart(gradients(tuned_with(name), tiny.shared(qwen, samples)), plain)
    sys.stdout.write(f"{name}: {difference:.1e} (allowed 1e-05)\n")
    assert difference <= 1e-5


@pytest.mark.parametrize("name", METHODS)
def test_backends_and_checkpointing_change_nothing(qwen, name):
    batch = tiny.shared(qwen, tiny.samples(qwen))
    plain = gradients(tuned_with(name), batch)
    assert apart(gradients(tuned_with(name, attn="eager"), batch), plain) <= 1e-5
    assert apart(gradients(tuned_with(name, recompute="full"), batch), plain) <= 1e-6


def test_the_connector_is_the_resampler_with_norm_and_projection(qwen):
    tuned = tiny.tune("lora", on=tiny.family("qwen_vl"), parts={"connector": True})
    opened = {name for name in tuned.trainable() if qwen.anatomy.part_of(name) == "connector"}
    inside = {name.split(".visual.")[1].replace("modules_to_save.default.", "") for name in opened}
    tower = qwen.model.transformer.visual
    assert inside == {name for name, _ in tower.named_parameters() if name.startswith(("attn_pool", "ln_post", "proj"))}
    assert "attn_pool.query" in inside
    assert not any("pos_embed" in name for name in inside)


def test_what_the_released_code_called_the_connector(qwen):
    released = tiny.family("qwen_vl")
    released.anatomy = released.anatomy.released()
    tuned = tiny.tune("lora", on=released, parts={"connector": True})
    opened = {name for name in tuned.trainable() if released.anatomy.part_of(name) == "connector"}
    assert {name.replace(".modules_to_save.default", "").removeprefix("base_model.model.") for name in opened} == {
        "transformer.wte.weight", "lm_head.weight",
    }  # fmt: skip
    assert released.anatomy.part_of("transformer.visual.proj.weight") == "vision"


def test_every_parameter_has_its_part(qwen):
    parts = {name: qwen.anatomy.part_of(name) for name, _ in qwen.model.named_parameters()}
    of_tower = {name for name in parts if ".visual." in name}
    assert {parts[name] for name in of_tower} == {"connector", "vision"}
    assert {parts[name] for name in parts.keys() - of_tower} == {"llm"}


# The published layout


@pytest.mark.parametrize(("parts", "safetensors"), [(1, False), (3, False), (1, True), (2, True)])
def test_the_published_layout_loads(tmp_path, parts, safetensors):
    made = write_original(tmp_path, parts=parts, safetensors=safetensors)
    family = load(tmp_path)
    assert equal(family.model, made.model)
    assert tiny.samples(family) == tiny.samples(made)
    assert torch.equal(logits(family), logits(made))
    assert family.model.generation_config.eos_token_id == list(family.stops) == [258, 257, 256]
    assert family.model.generation_config.top_p == 0.3
    assert load(tmp_path, dtype="auto").model.dtype == torch.bfloat16
    assert load_family(ModelSpec(path=str(tmp_path)), dtype="float32").anatomy is MODELS["qwen_vl"].anatomy


def test_the_auto_classes_load_it_and_run_no_code(original):
    directory, made = original
    model = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32)
    assert type(model) is QwenVLForConditionalGeneration
    assert equal(model, made.model)
    assert type(AutoTokenizer.from_pretrained(directory)) is QWenTokenizer
    processor = AutoProcessor.from_pretrained(directory)
    assert type(processor) is QwenVLProcessor
    assert processor.image_processor.size["height"] == made.model.config.visual["image_size"]


def test_stored_keeps_the_type_of_each_tensor(original):
    directory, made = original
    stored = load(directory, dtype="stored").model
    assert {tensor.dtype for tensor in stored.state_dict().values()} == {torch.bfloat16}
    assert equal(stored.float(), made.model)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]), "damaged"),
        (lambda file: file.unlink(), "missing"),
        (lambda file: torch.save({"a": Path("a")}, file), "Python objects"),
        (lambda file: changed(file, lambda tensors: tensors.pop(next(iter(tensors)))), "lacks"),
        (lambda file: changed(file, lambda tensors: tensors.update(more=torch.ones(2))), "1 left over: more"),
        (lambda file: changed(file, halved), "1 of another shape"),
    ],
    ids=["truncated", "no shard", "objects", "lacking", "more", "shape"],
)
def test_a_damaged_checkpoint_is_refused(tmp_path, damage, said):
    write_original(tmp_path)
    damage(tmp_path / SHARD)
    with pytest.raises(ModelError, match=said):
        load(tmp_path)


def changed(file, change):
    tensors = torch.load(file, weights_only=True)
    change(tensors)
    torch.save(tensors, file)


def halved(tensors):
    name = next(iter(tensors))
    tensors[name] = tensors[name][:1]


def test_a_missing_tensor_is_named(tmp_path):
    write_original(tmp_path, parts=1)
    changed(tmp_path / "pytorch_model.bin", lambda tensors: tensors.pop("transformer.visual.proj"))
    with pytest.raises(ModelError, match=r"1 missing: transformer\.visual\.proj"):
        load(tmp_path)


def test_a_tokenizer_must_be_there_and_belong_to_the_weights(tmp_path):
    write_original(tmp_path)
    ranks = tmp_path / "qwen.tiktoken"
    lines = ranks.read_text()
    ranks.write_text(f"{lines}YWI= 256\n")
    with pytest.raises(ModelError, match="do not belong together"):
        load(tmp_path)
    ranks.unlink()
    with pytest.raises(ModelError, match=r"qwen\.tiktoken"):
        load(tmp_path)


def test_it_has_its_own_tower(original):
    with pytest.raises(ModelError, match="inside"):
        load(original[0], vision_tower="openai/clip-vit-large-patch14-336")


def test_other_qwens_are_told_apart(cases, tmp_path):
    config, _ = PretrainedConfig.get_config_dict(cases / "qwen_vl_chat")
    recognises = MODELS["qwen_vl"].recognises
    assert recognises(config)
    text = {name: value for name, value in config.items() if name != "visual"}
    for other, said in ((text, "text model"), (text | {"audio": {"n_mels": 80}}, "Qwen-Audio")):
        assert not recognises(other)
        assert not any(MODELS[name].recognises(other) for name in MODELS)
        (tmp_path / "config.json").write_text(json.dumps(other))
        with pytest.raises(ValueError, match=said):
            AutoModelForImageTextToText.from_pretrained(tmp_path)
        with pytest.raises(ModelError):
            load_family(ModelSpec(path=str(tmp_path)), dtype="float32")
    assert not recognises(config | {"model_type": "qwen2_vl"})


@pytest.mark.parametrize("wrong", [{"rotary_pct": 0.5}, {"hidden_size": 64, "visual": {"output_dim": 128}}])
def test_sizes_that_do_not_fit_are_refused(wrong):
    with pytest.raises(ValueError):
        QwenVLConfig(**wrong)


# Written again


def test_saved_it_has_the_published_names_and_is_the_same(qwen, tmp_path):
    qwen.save(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as written:
        assert set(written.keys()) == published_names(qwen.model).keys()
    again = load(tmp_path)
    assert equal(again.model, qwen.model)
    assert tiny.samples(again) == tiny.samples(qwen)
    picture = tiny.Picture(1).load()
    ids = torch.zeros(1, 1, dtype=torch.long)
    ours, theirs = (each.pixels([[picture]], ids)["pixel_values"] for each in (qwen, again))
    assert torch.equal(ours, theirs)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert "auto_map" not in saved
    assert not MODELS["qwen_vl"].original(saved)
    again.save(tmp_path / "twice")
    with safe_open(tmp_path / "twice" / "model.safetensors", framework="pt") as written:
        assert set(written.keys()) == published_names(qwen.model).keys()


def test_converted_it_is_the_same(original, tmp_path):
    directory, made = original
    convert(str(directory), tmp_path / "new", quiet=True)
    assert equal(load(tmp_path / "new").model, made.model)
    assert json.loads((tmp_path / "new" / "config.json").read_text())["dtype"] == "bfloat16"
    assert json.loads((tmp_path / "new" / "generation_config.json").read_text())["eos_token_id"] == [258, 257, 256]
    with pytest.raises(ModelError, match="already"):
        convert(str(tmp_path / "new"), tmp_path / "newer", quiet=True)


ELSEWHERE = """
import sys, json
import peft_mllm
assert not {"torch", "transformers"} & set(sys.modules)
import torch
torch.set_num_threads(1)
from transformers import Qwen2ForCausalLM  # loads transformers' own parts in another order than the Auto classes do
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from PIL import Image
picture, *directories = sys.argv[1:]
part = {"type": "image"}
asked = [{"role": "user", "content": [part, {"type": "text", "text": "What is it?"}]}]
answers = []
for saved in directories:
    processor = AutoProcessor.from_pretrained(saved)
    model = AutoModelForImageTextToText.from_pretrained(saved)
    text = processor.apply_chat_template(asked, add_generation_prompt=True)
    inputs = processor(images=[Image.open(picture)], text=text, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
    assert type(AutoTokenizer.from_pretrained(saved)).__name__ == "QWenTokenizer"
    answers.append([inputs["input_ids"][0].tolist(), logits[0, -1].tolist()])
sys.stdout.write(json.dumps(answers))
"""


@pytest.mark.slow
def test_elsewhere_after_importing_us_the_auto_classes_do_it_all(original, tmp_path):
    """The published layout, and the one that `save` writes."""
    directory, made = original
    made.save(tmp_path / "saved")
    picture = tiny.Picture(1)
    picture.load().save(tmp_path / "picture.png")
    source = Path(__file__).parent.parent / "src"
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(tmp_path / "picture.png"), str(tmp_path / "saved"), str(directory)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(source), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    prompt = made.encode(tiny.record("x", "<image>\nWhat is it?", "red", images=(1,)), answer=False)
    batch = tiny.padded(made, [prompt])
    for dtype, (ids, last) in zip((torch.float32, torch.bfloat16), json.loads(done.stdout), strict=True):
        assert list(prompt.ids) == ids
        with torch.no_grad():
            ours = made.model.to(dtype)(input_ids=batch.input_ids, **batch.pixels).logits[0, -1].float()
        assert torch.equal(ours, torch.tensor(last))
    made.model.float()
