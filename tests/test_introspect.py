"""Parts found in config and module tree: those of each architecture, written by hand, and what is done in doubt."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText

from peft_mllm.errors import ModelError
from peft_mllm.models.generic.family import Generic
from peft_mllm.models.generic.introspect import anatomy_of
from peft_mllm.models.generic.member import PATCH
from peft_mllm.models.generic.members import MEMBERS
from peft_mllm.models.generic.tiny import make

SPLIT = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj"}
GATED = {"gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}
USUAL = {
    "llm": "model.language_model",
    "attention": SPLIT,
    "mlp": GATED,
    "norms": {"attention": "input_layernorm", "mlp": "post_attention_layernorm"},
    "connector": ("model.multi_modal_projector",),
    "vision": ("model.vision_tower",),
}
QWEN_BLOCKS = ("model.visual.blocks.0", "model.visual.blocks.1")
EXPECTED = {
    "qwen2_vl": {"connector": ("model.visual.merger",), "vision": ("model.visual.patch_embed", *QWEN_BLOCKS)},
    "qwen2_5_vl": {"connector": ("model.visual.merger",), "vision": ("model.visual.patch_embed", *QWEN_BLOCKS)},
    "qwen3_vl": {
        "connector": (
            "model.visual.merger", "model.visual.deepstack_merger_list.0", "model.visual.deepstack_merger_list.1",
        ),
        "vision": ("model.visual.patch_embed", "model.visual.pos_embed", *QWEN_BLOCKS),
    },
    "llava_next": {},
    "llava_onevision": {},
    "internvl": {},
    "idefics3": {"llm": "model.text_model", "connector": ("model.connector",), "vision": ("model.vision_model",)},
    "smolvlm": {"llm": "model.text_model", "connector": ("model.connector",), "vision": ("model.vision_model",)},
    "paligemma": {},
    "gemma3": {"norms": {"attention": "input_layernorm", "mlp": "pre_feedforward_layernorm"}},
    "mllama": {"vision": ("model.vision_model",)},
    "glm4v": {
        "mlp": {"gate_up": "mlp.gate_up_proj", "down": "mlp.down_proj"},
        "connector": ("model.visual.merger", "model.visual.downsample"),
        "vision": (
            "model.visual.embeddings", "model.visual.patch_embed", *QWEN_BLOCKS, "model.visual.post_conv_layernorm",
            "model.visual.post_layernorm",
        ),
    },
}  # fmt: skip


def built(member, **changes):
    """A member's model on the meta device, some fields of its configurations changed."""
    model, _ = make(member, image_size=2 * PATCH, seed=0)
    config = model.config
    for part, fields in changes.items():
        for name, value in fields.items():
            setattr(getattr(config, part), name, value)
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


def test_each_member_is_expected():
    assert EXPECTED.keys() == MEMBERS.keys()


@pytest.mark.parametrize("member", list(EXPECTED))
def test_parts_are_named_correctly(member):
    try:
        model = built(member)
    except ModelError as error:
        pytest.skip(str(error))  # a processor's library is not here
    expected = USUAL | EXPECTED[member]
    found = anatomy_of(model)
    assert {field: getattr(found, field) for field in expected} == expected
    assert found.layers == f"{expected['llm']}.layers"
    assert found.final_norm == f"{expected['llm']}.norm"
    assert found.self_attention == "self_attn"
    assert found.lm_head == "lm_head"
    found.check(model)


@pytest.mark.parametrize("member", list(EXPECTED))
def test_every_parameter_of_tower_and_connector_is_in_one_part(member):
    """What a model has beside decoder and head, it has in one of the parts, but for single parameters."""
    try:
        model = built(member)
    except ModelError as error:
        pytest.skip(str(error))
    found = anatomy_of(model)
    parts = {name: found.part_of(name) for name, _ in model.named_parameters()}
    named = {n for n, part in parts.items() if part == "llm" and not n.startswith((f"{found.llm}.", "lm_head."))}
    assert named <= {"model.image_newline"}
    inside = [name for name in parts if name.startswith(f"{found.llm}.")]
    assert {parts[name] for name in inside} == {"llm"}


def test_the_layers_that_look_across_keep_their_attention():
    model = built("mllama")
    found = anatomy_of(model)
    import re

    pattern = found.pattern(("q", "k", "v", "o", "gate", "up", "down"))
    reached = {name for name, _ in model.named_modules() if re.fullmatch(pattern, name)}
    assert not any("cross_attn" in name for name in reached)
    assert {f"model.language_model.layers.{i}.mlp.up_proj" for i in range(3)} <= reached
    assert {name for name in reached if "q_proj" in name} == {
        "model.language_model.layers.0.self_attn.q_proj", "model.language_model.layers.2.self_attn.q_proj",
    }  # fmt: skip


# --- models that have no tiny member, by transformers' own default configuration on the meta device ---


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("mistral3", {}),
        ("video_llama_3", {"connector": ("model.projector",), "vision": ("model.vision_model",)}),
        ("deepseek_vl", {"connector": ("model.aligner",), "vision": ("model.vision_model",)}),
        ("blip-2", {
            "llm": "language_model.model.decoder",
            "attention": SPLIT | {"o": "self_attn.out_proj"},
            "mlp": {"up": "fc1", "down": "fc2"},
            "norms": {"attention": "self_attn_layer_norm", "mlp": "final_layer_norm"},
            "connector": ("qformer", "language_projection"),
            "vision": ("vision_model",),
            "lm_head": "language_model.lm_head",
        }),
        ("aria", {"mlp": {}}),
    ],
)  # fmt: skip
def test_other_layouts(kind, expected):
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(kind))
    found = anatomy_of(model)
    assert {f: getattr(found, f) for f in USUAL | expected} == USUAL | expected


def test_two_towers_are_not_clear():
    """Such as one that sees and one that paints."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.for_model("janus"))
    with pytest.raises(ModelError, match=r"found: model.vision_model, model.vqmodel.*anatomy: \{vision"):
        anatomy_of(model)
    declared = {"vision": ["model.vision_model"], "connector": ["model.aligner"]}
    found = anatomy_of(model, declared)
    assert (found.vision, found.connector) == (("model.vision_model",), ("model.aligner",))


def test_an_encoder_decoder_is_not_clear():
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.for_model("florence2"))
    with pytest.raises(ModelError, match=r"one decoder stack is wanted; found: .*encoder, .*decoder.*anatomy: \{llm"):
        anatomy_of(model)


# --- in doubt ---


def test_unknown_names_are_listed_with_their_widths():
    model = built("internvl")
    for layer in model.model.language_model.layers:
        layer.self_attn.strange = layer.self_attn.q_proj
        del layer.self_attn.q_proj
    with pytest.raises(ModelError, match=r"self_attn.strange 32 -> 32.*anatomy: \{attention") as caught:
        anatomy_of(model)
    assert "peft-mllm inspect" in str(caught.value)
    declared = {"attention": SPLIT | {"q": "self_attn.strange"}, "mlp": GATED}
    assert anatomy_of(model, declared).attention["q"] == "self_attn.strange"


def test_a_name_with_the_wrong_width_is_not_believed():
    model = built("internvl")
    for layer in model.model.language_model.layers:
        layer.self_attn.q_proj = nn.Linear(32, 64, device="meta")
    with pytest.raises(ModelError, match=r"self_attn\.q_proj 32 -> 64"):
        anatomy_of(model)


def test_half_an_mlp_is_not_believed():
    model = built("internvl")
    for layer in model.model.language_model.layers:
        layer.mlp.strange = layer.mlp.up_proj
        del layer.mlp.up_proj
    with pytest.raises(ModelError, match=r"mlp.strange 32 -> 64.*anatomy: \{mlp"):
        anatomy_of(model)


def test_two_of_one_role_are_not_clear():
    model = built("internvl")
    for layer in model.model.language_model.layers:
        layer.mlp.more = nn.ModuleDict({"up_proj": nn.Linear(32, 64, device="meta")})
    with pytest.raises(ModelError, match=r"one linear 'up' in a layer.*mlp.more.up_proj, mlp.up_proj"):
        anatomy_of(model)


def test_a_tower_without_a_way_out_is_not_clear():
    model = built("qwen2_5_vl")
    model.model.visual.merger = nn.Linear(24, 7, device="meta")
    with pytest.raises(ModelError, match=r"between vision tower and language model.*anatomy: \{connector"):
        anatomy_of(model)
    declared = anatomy_of(model, {"connector": ["model.visual.merger"]})
    assert declared.connector == ("model.visual.merger",)
    assert declared.vision == ("model.visual.patch_embed", *QWEN_BLOCKS)


def test_what_is_declared_must_be_there():
    model = built("internvl")
    with pytest.raises(ModelError, match=r"model.anatomy has no field conector"):
        anatomy_of(model, {"conector": ["model.multi_modal_projector"]})
    with pytest.raises(ModelError, match=r"names model.projector, which this InternVL\w+ does not have"):
        anatomy_of(model, {"connector": ["model.projector"]})


def test_a_declared_part_is_used_by_the_family():
    made, processor = make("internvl", image_size=2 * PATCH, seed=0)
    family = Generic(made, processor, declared={"connector": ["model.multi_modal_projector.linear_1"]})
    assert family.anatomy.connector == ("model.multi_modal_projector.linear_1",)
