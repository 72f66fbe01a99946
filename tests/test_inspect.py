"""`peft-mllm inspect`: facts of models without their weights, for people and for programs."""

from __future__ import annotations

import functools
import io
import json

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from peft_mllm.assets import EMBEDDED
from peft_mllm.cli import app
from peft_mllm.errors import ModelError
from peft_mllm.inspection import inspect_model
from peft_mllm.inspection.page import page, shortened
from peft_mllm.models import MODELS
from peft_mllm.models.generic.members import MEMBERS
from peft_mllm.spec import ModelSpec

pytestmark = pytest.mark.filterwarnings("ignore")


def looked_at(path, **more):
    return seen(path) if path.startswith("tiny:") else look(path, **more)


@functools.cache
def seen(path):
    return look(path)


def look(path, **more):
    try:
        return inspect_model(ModelSpec(path=path, **more))
    except ModelError as error:
        if "cannot be made here" in str(error):
            pytest.skip(str(error))
        raise


def shown(facts):
    console = Console(width=200, file=io.StringIO())
    console.print(page(facts))
    return console.file.getvalue()


OFTEN = {"qwen2_5_vl", "gemma3", "mllama"}  # looked at by other tests, too


@pytest.mark.parametrize(
    "path",
    [
        *("embedded", "tiny:llava", "tiny:qwen_vl"),
        *(pytest.param(f"tiny:generic/{m}", marks=[pytest.mark.slow] * (m not in OFTEN)) for m in MEMBERS),
    ],
)
def test_every_family_can_be_looked_at(path):
    facts = looked_at(path)
    assert facts.parameters == sum(part.parameters for part in facts.parts)
    assert {part.name for part in facts.parts} >= {"llm", "lm_head", "connector", "vision"}
    assert all(part.parameters > 0 for part in facts.parts if part.name != "lm_head")  # which may be the embedding
    assert {each.role for each in facts.linears} >= {"o", "down"}
    assert all(tokens > 0 for tokens in facts.image_tokens.values())
    learned = [text for text, is_learned in facts.chat if is_learned]
    assert learned[0].strip().startswith("A grey square.")
    assert learned[-1].endswith(facts.stops)
    costs = {(cost.method, cost.location): cost.parameters for cost in facts.costs}
    assert {method for method, _ in costs} == {"full", "lora", "ia3", "adapter", "prefix", "layernorm"}
    for method in ("lora", "layernorm"):
        assert costs[method, "attention"] + costs[method, "mlp"] == costs[method, "both"] > 0
    page_of_it = shown(facts)
    assert f"family '{facts.family}'" in page_of_it
    assert "⟦" in page_of_it
    json.dumps(facts.to_json())


def test_positions_and_trees_are_said():
    assert looked_at("tiny:generic/qwen2_5_vl").axes == 3
    assert looked_at("tiny:generic/internvl").axes == 1
    gemma = looked_at("tiny:generic/gemma3")
    assert not gemma.trees
    assert "Trees: no." in shown(gemma)
    assert looked_at("tiny:generic/qwen2_5_vl").trees


def test_layers_of_another_kind_are_said():
    facts = looked_at("tiny:generic/mllama")
    assert facts.other_layers == {"MllamaCrossAttentionDecoderLayer": 1}
    assert {each.role: [count for *_, count in each.shapes] for each in facts.linears}["q"] == [2]
    assert {each.role: [count for *_, count in each.shapes] for each in facts.linears}["up"] == [3]


def test_what_is_in_no_part_is_said():
    elsewhere = [part for part in looked_at("tiny:generic/llava_next").parts if part.name == "elsewhere"]
    assert [part.modules for part in elsewhere] == [("model.image_newline",)]


def test_a_model_without_its_weights(tmp_path):
    """Config, processor and tokenizer are enough, at the real size."""
    from transformers import LlavaConfig

    for file in EMBEDDED.iterdir():
        if file.suffix in (".json", ".jinja") and file.name != "training.json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    LlavaConfig(
        text_config={"model_type": "llama", "vocab_size": 32064, "max_position_embeddings": 4096},
        image_token_index=4,
    ).save_pretrained(tmp_path)
    facts = looked_at(str(tmp_path))
    assert facts.parameters > 7_000_000_000
    costs = {(cost.method, cost.location): cost.parameters for cost in facts.costs}
    assert costs["lora", "both"] == 319_815_680  # the paper's
    assert costs["ia3", "both"] == 614_400
    assert costs["prefix", ""] == 5_242_880
    assert {part.name: part.parameters for part in facts.parts}["connector"] == 20_979_712
    assert facts.image_tokens["640 x 480"] == 576


def test_a_generic_model_without_its_weights(tmp_path):
    MODELS["generic"].tiny_member("qwen2_5_vl").save(tmp_path)
    before = looked_at(str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    assert looked_at(str(tmp_path)) == before
    assert not any(p.device.type != "meta" for p in _bare(tmp_path).model.parameters())


def _bare(directory):
    from peft_mllm.loading import load_family

    return load_family(ModelSpec(path=str(directory)), dtype="float32", weights=False)


def test_parts_that_are_not_clear_are_said_with_the_remedy(tmp_path):
    """A model whose connector is not where connectors are."""
    MODELS["generic"].tiny_member("qwen2_5_vl").save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["vision_config"]["out_hidden_size"] = 40  # as a config whose widths do not fit together
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"between vision tower.*anatomy: \{connector: \.\.\.\}"):
        looked_at(str(tmp_path))
    facts = looked_at(str(tmp_path), anatomy={"connector": ["model.visual.merger"]})
    assert [part.modules for part in facts.parts if part.name == "connector"] == [("model.visual.merger",)]


def test_the_verb():
    said = CliRunner().invoke(app, ["inspect", "tiny:generic/llava_next", "--json"])
    assert said.exit_code == 0, said.output
    facts = json.loads(said.stdout)
    assert facts["architecture"] == "LlavaNextForConditionalGeneration"
    assert {part["name"]: part["modules"] for part in facts["parts"]}["connector"] == ["model.multi_modal_projector"]
    said = CliRunner().invoke(app, ["inspect", "tiny:generic/llava_next"])
    assert said.exit_code == 0
    assert "model.multi_modal_projector" in said.stdout


def test_what_is_no_model_is_one_line():
    with pytest.raises(ModelError, match=r"There is no model in \./nowhere"):
        looked_at("./nowhere")


def test_lists_of_modules_are_shortened():
    assert shortened([]) == []
    assert shortened(["a.norm", "a.0", "a.1", "a.2", "b.5", "c.1", "c.3"]) == [
        "a.norm",
        "a.0 to 2",
        "b.5",
        "c.1",
        "c.3",
    ]


def test_looking_needs_no_gpu_and_changes_no_seed():
    before = torch.random.get_rng_state()
    look("tiny:generic/internvl")
    assert torch.equal(before, torch.random.get_rng_state())
