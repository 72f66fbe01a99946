"""Adapters of the released code for Qwen-VL: with embeddings and head beside them, which it called the connector."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import released as recorded
import tiny
from peft_mllm.errors import ModelError
from peft_mllm.models.qwen_vl.configuration import QwenVLConfig
from peft_mllm.models.qwen_vl.modelling import QwenVLForConditionalGeneration
from peft_mllm.released import import_adapter
from peft_mllm.tuned import load_adapter

KINDS = ("lora", "ia3", "bottleneck")
FALLBACKS = {"lora_trainer_fallback": 8, "ia3_trainer_fallback": None}


@pytest.fixture(scope="module")
def qwen(cases):
    return recorded.QwenVL(cases / "golden" / "qwen_vl")


@pytest.fixture(scope="module")
def imported(qwen, tmp_path_factory):
    root = tmp_path_factory.mktemp("imported")
    for kind in KINDS:
        import_adapter(qwen.adapter(kind), base=qwen.base, output=root / kind)
    for kind, alpha in FALLBACKS.items():
        import_adapter(qwen.adapter(kind), base=qwen.base, output=root / kind, lora_alpha=alpha)
    return lambda kind: root / kind


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_logits(qwen, imported, kind):
    model = PeftModel.from_pretrained(qwen.model(), str(imported(kind)))
    worst = max(
        recorded.apart(model(**qwen.inputs(name)).logits[0], recorded.logits_of(qwen.wanted(kind), name))
        for name in ("text", "one_image", "long_text")
    )
    recorded.told(f"qwen {kind} logits", worst, 2e-5)


@pytest.mark.parametrize("kind", FALLBACKS)
@torch.no_grad()
def test_logits_of_what_the_trainer_left(qwen, imported, kind):
    """pytorch_model.bin with `.default` in its names, and no configuration; the base's own embeddings stay."""
    model = PeftModel.from_pretrained(qwen.model(), str(imported(kind)))
    wanted = qwen.wanted(kind.split("_", maxsplit=1)[0])
    worst = max(
        recorded.apart(model(**qwen.inputs(name)).logits[0], recorded.logits_of(wanted, f"adapter_only.{name}"))
        for name in ("text", "one_image")
    )
    recorded.told(f"qwen {kind} logits", worst, 2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients(qwen, imported, kind):
    model = PeftModel.from_pretrained(qwen.model(), str(imported(kind)), is_trainable=True)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    loss = model(**qwen.training()).loss
    recorded.told(f"qwen {kind} loss", abs(float(loss.detach()) - float(qwen.wanted(kind)["train.loss"])), 5e-6)
    loss.backward()
    gradients = {
        name.replace("modules_to_save.", "").replace(".default", ""): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    norms = {name.replace(".default", ""): norm for name, norm in qwen.norms(kind).items()}
    recorded.told(f"qwen {kind} gradient norms", recorded.norms_apart(gradients, norms), 1e-5)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_logits_in_bfloat16_throughout(qwen, imported, kind):
    model = PeftModel.from_pretrained(qwen.model(torch.bfloat16), str(imported(kind)), autocast_adapter_dtype=False)
    worst = 0.0
    for name in ("text", "one_image"):
        right = recorded.logits_of(qwen.wanted(kind), f"native_bf16.{name}")
        got = model(**qwen.inputs(name, torch.bfloat16)).logits[0, -len(right) :].float()
        worst = max(worst, float((got - right).norm() / right.norm()))
    recorded.told(f"qwen {kind} logits in bfloat16, relative", worst, 0.04)


def test_a_file_written_twice_is_read_once(qwen, tmp_path):
    report = import_adapter(qwen.adapter("bottleneck"), base=qwen.base, output=tmp_path / "out")
    assert "12 that another file has as well" in report.files["pytorch_model.bin"]
    assert report.connector == ["transformer.wte", "lm_head"]
    assert report.options["before"] == ["gate", "up"]
    assert report.options["after"] == ["o"]
    directory = shutil.copytree(qwen.adapter("bottleneck"), tmp_path / "theirs")
    other = {
        name: tensor + 1 for name, tensor in torch.load(directory / "pytorch_model.bin", weights_only=True).items()
    }
    torch.save(other, directory / "pytorch_model.bin")
    with pytest.raises(ModelError, match="different values"):
        import_adapter(directory, base=qwen.base, output=tmp_path / "other")


def test_another_vocabulary(qwen, tmp_path):
    directory = shutil.copytree(qwen.adapter("ia3"), tmp_path / "theirs")
    connector = torch.load(directory / "connector.bin", weights_only=True)
    torch.save({name: tensor[:-1].clone() for name, tensor in connector.items()}, directory / "connector.bin")
    with pytest.raises(ModelError, match=r"wte.weight is 319 x 256, but this base's transformer.wte.weight is 320"):
        import_adapter(directory, base=qwen.base, output=tmp_path / "out")


@pytest.fixture(scope="module")
def sample_bases(cases, tmp_path_factory):
    """Models as wide as those that the small sample adapters were made on; a model alone, without a tokenizer."""
    root = tmp_path_factory.mktemp("bases")
    settings = json.loads((cases / "golden" / "qwen_vl" / "checkpoint" / "config.json").read_text())
    QwenVLForConditionalGeneration(QwenVLConfig(**settings | {"intermediate_size": 256})).save_pretrained(root / "qwen")
    text = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    llava = LlavaConfig(
        text_config=LlamaConfig(**text, num_attention_heads=4),
        vision_config=CLIPVisionConfig(**vision, image_size=28, patch_size=14),
        image_token_index=63,
    )
    LlavaForConditionalGeneration(llava).save_pretrained(root / "llava")
    return root


@pytest.mark.parametrize(
    ("sample", "method", "tensors"),
    [
        ("llava_lora", "lora", 32),
        ("llava_ia3", "ia3", 10),
        ("llava_bottleneck", "adapter", 16),
        ("llava_prefix", "prefix", 5),
        ("qwen_lora", "lora", 18),
        ("qwen_ia3", "ia3", 4),
        ("qwen_bottleneck", "adapter", 12),
    ],
)
def test_the_sample_adapters(cases, sample_bases, tmp_path, sample, method, tensors):
    """One of each kind as the released code saved it, with the real configurations of the published scripts."""
    directory = cases / "seed_adapter_samples" / sample
    base = str(sample_bases / sample.split("_", maxsplit=1)[0])
    report = import_adapter(directory, base=base, output=tmp_path / "out")
    assert (report.method, report.tensors) == (method, tensors)


def test_an_adapter_of_llava(qwen, cases, tmp_path):
    theirs = recorded.Llava(cases / "golden" / "llava").adapter("lora")
    with pytest.raises(ModelError, match=r"32 tensors .* have no place"):
        import_adapter(theirs, base=qwen.base, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@torch.no_grad()
def test_a_learned_prefix(tmp_path):
    """The released code's patched Qwen-VL is not public, so its file is made here, from our own method's table."""
    family = tiny.family("qwen_vl")
    family.save(tmp_path / "base")
    tuned = tiny.stir(tiny.tune("prefix", on=family))
    sample = tiny.samples(family)[:2]
    wanted = tuned.answer_logits(tiny.padded(family, sample))
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    table = tuned.model.prompt_encoder["default"].embedding.weight
    torch.save({"prompt_embeddings": table.detach().clone()}, theirs / "adapter_model.bin")
    torch.save(
        {"base_model.transformer.wte.weight": family.model.get_input_embeddings().weight * 1.5},
        theirs / "connector.bin",
    )
    report = import_adapter(theirs, base=str(tmp_path / "base"), output=tmp_path / "out")
    assert (report.options, report.connector) == ({"virtual_tokens": 4}, ["transformer.wte"])
    again = tiny.family("qwen_vl")
    loaded = load_adapter(again, tmp_path / "out")
    assert "base_model.transformer.wte.weight" in load_file(tmp_path / "out" / "adapter_model.safetensors")
    family.model.get_input_embeddings().weight.mul_(1.5)
    torch.testing.assert_close(
        loaded.answer_logits(tiny.padded(again, sample)), tuned.answer_logits(tiny.padded(family, sample))
    )
    assert not torch.allclose(wanted, loaded.answer_logits(tiny.padded(again, sample)))
