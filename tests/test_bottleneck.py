"""The bottleneck adapter: where it goes, what it computes, over what it works."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tiny
from peft_mllm.errors import MethodError
from peft_mllm.methods.bottleneck import BottleneckLayer
from peft_mllm.models import MODELS
from peft_mllm.models.base import Loading
from peft_mllm.tuned import load_adapter, trained_parts

ATTENTION, MLP = ("q", "k", "v", "o"), ("gate", "up", "down")


def placed(tuned):
    """{(linear, position)} in the first decoder layer, and how many adapters there are in all."""
    layers = {n: m for n, m in tuned.base.named_modules() if isinstance(m, BottleneckLayer)}
    first = {(n.split(".")[-1].removesuffix("_proj"), m.position) for n, m in layers.items() if ".layers.0." in n}
    assert all(n.startswith(tuned.family.anatomy.layers) for n in layers)
    assert len(layers) == 2 * len(first)  # the tiny model has two layers
    return first


def at(position, roles):
    return {(role, position) for role in roles}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, at("before", ("gate", "up")) | at("after", ("down",))),
        ({"location": "attention"}, at("before", ("q", "k", "v")) | at("after", ("o",))),
        ({"location": "both"}, at("before", ("q", "k", "v", "gate", "up")) | at("after", ("o", "down"))),
        ({"preset": "houlsby"}, at("after", ("o", "down"))),
        ({"preset": "houlsby", "location": "mlp"}, at("after", ("down",))),
        ({"preset": "pfeiffer"}, at("after", ("down",))),
        ({"preset": "pfeiffer", "location": "both"}, at("after", ("down",))),
        ({"preset": "parallel"}, at("parallel", MLP)),
        ({"preset": "parallel", "location": "attention"}, at("parallel", ATTENTION)),
        ({"preset": "parallel", "location": "both"}, at("parallel", ATTENTION + MLP)),
        ({"before": ("k",), "parallel": ("down",)}, at("before", "k") | at("parallel", ("down",))),
    ],
)
def test_presets_put_adapters_where_they_say(options, expected):
    assert placed(tiny.tune("adapter", **options)) == expected


@pytest.mark.parametrize("act", ["tanh", "gelu", "relu"])
@pytest.mark.parametrize("scaling", [1.0, 0.25, "learned"])
@pytest.mark.parametrize("position", ["before", "after", "parallel"])
def test_it_computes_its_formula(position, scaling, act):
    tuned = tiny.stir(
        tiny.tune("adapter", **{position: ("up",)}, scaling=scaling, init="normal", non_linearity=act), spread=0.3
    )
    layer = tuned.base.get_submodule("model.language_model.layers.0.mlp.up_proj")
    down, up = layer.adapter_down["default"].weight, layer.adapter_up["default"].weight
    s = layer.adapter_scaling["default"] if scaling == "learned" else scaling
    f = {"tanh": torch.tanh, "gelu": nn.functional.gelu, "relu": torch.relu}[act]
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    w = layer.base_layer.weight
    assert w.shape == (64, 32)
    expected = {
        "before": lambda: (x + s * f(x @ down.T) @ up.T) @ w.T,
        "after": lambda: x @ w.T + s * f(x @ w.T @ down.T) @ up.T,
        "parallel": lambda: x @ w.T + s * f(x @ down.T) @ up.T,
    }[position]()
    assert torch.allclose(layer(x), expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(layer(x), x @ w.T, atol=1e-3)


def test_a_learned_scaling_starts_at_one_and_learns():
    tuned = tiny.tune("adapter", scaling="learned", init="normal")
    scales = {n: p for n, p in tuned.trainable().items() if "adapter_scaling" in n}
    assert len(scales) == 2 * 3
    assert all(p.shape == (1,) and p.item() == 1 for p in scales.values())
    list(tiny.train(tuned, tiny.batch_for(tuned, tiny.samples(tuned.family)), steps=2, lr=0.01))
    assert all(p.item() != 1 for p in scales.values())


def test_the_two_starts():
    base = tiny.family()
    batch = tiny.padded(base, tiny.samples(base))
    with torch.no_grad():
        expected = tiny.tune("none", on=base).answer_logits(batch)
        assert torch.equal(tiny.tune("adapter").answer_logits(batch), expected)
        assert not torch.equal(tiny.tune("adapter", init="normal").answer_logits(batch), expected)
    weights = torch.cat([p.flatten() for p in tiny.tune("adapter", init="normal").trainable().values()])
    assert abs(weights.std().item() - 0.02) < 1e-3
    assert abs(weights.mean().item()) < 2e-3


def test_dropout_acts_on_the_input_in_training_only():
    tuned = tiny.stir(tiny.tune("adapter", dropout=0.5), spread=0.3)
    layer = tuned.base.get_submodule("model.language_model.layers.0.mlp.down_proj")
    x = torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(0))
    tuned.model.eval()
    assert torch.equal(layer(x), layer(x))
    tuned.model.train()
    torch.manual_seed(0)
    answered = layer(x)
    torch.manual_seed(0)
    h = layer.base_layer(x)
    dropped = nn.functional.dropout(h, 0.5)
    expected = h + torch.tanh(dropped @ layer.adapter_down["default"].weight.T) @ layer.adapter_up["default"].weight.T
    assert torch.allclose(answered, expected, atol=1e-6)
    assert not torch.equal(layer(x), answered)


class EightBit(nn.Module):
    """A linear that holds its weight as bytes, as quantising libraries do; it is no nn.Linear."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = linear.weight.abs().max().item() / 127
        rounded = (linear.weight / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(rounded, requires_grad=False)

    def forward(self, x):
        return x @ (self.weight.to(x.dtype) * self.scale).T


def test_it_works_over_quantised_linears():
    base = tiny.family()
    layers = base.model.get_submodule(base.anatomy.layers)
    for layer in layers:
        for path in base.anatomy.roles("both").values():
            parent, name = path.split(".")
            setattr(layer.get_submodule(parent), name, EightBit(layer.get_submodule(path)))
    batch = tiny.shared(base, tiny.samples(base))
    with torch.no_grad():
        expected = tiny.tune("none", on=base).answer_logits(batch)
    tuned = tiny.tune("adapter", on=base, location="both")
    assert all(p.dtype == torch.float32 for p in tuned.trainable().values())
    with torch.no_grad():
        assert torch.equal(tuned.answer_logits(batch), expected)
    before = {n: p.clone() for n, p in tuned.base.named_parameters() if not p.requires_grad}
    losses = list(tiny.train(tuned, batch, steps=6, lr=0.05))
    assert losses[-1] < losses[0]
    now = dict(tuned.base.named_parameters())
    assert all(torch.equal(now[n], p) for n, p in before.items())


def test_it_works_over_a_bfloat16_base_in_float32():
    base = tiny.family()
    base.model.to(torch.bfloat16)
    tuned = tiny.tune("adapter", on=base, location="both")
    assert all(p.dtype == torch.float32 for p in tuned.trainable().values())
    layer = tuned.base.get_submodule("model.language_model.layers.0.mlp.down_proj")
    x = torch.randn(1, 3, 64).bfloat16()
    assert layer(x).dtype == torch.bfloat16
    assert torch.equal(layer(x), layer.base_layer(x))


def test_peft_can_switch_it_off_and_take_it_out():
    base = tiny.family()
    batch = tiny.padded(base, tiny.samples(base))
    with torch.no_grad():
        expected = tiny.tune("none", on=base).answer_logits(batch)
        tuned = tiny.stir(tiny.tune("adapter", on=base), spread=0.3)
        moved = tuned.answer_logits(batch)
        with tuned.model.disable_adapter():
            assert torch.equal(tuned.answer_logits(batch), expected)
        assert torch.equal(tuned.answer_logits(batch), moved)
        assert not torch.equal(moved, expected)
        plain = tuned.model.unload()
    assert not any(isinstance(m, BottleneckLayer) for m in plain.modules())


def with_biases():
    """A tiny LLaVA whose decoder linears have biases, as Qwen's attention has."""
    base = tiny.family()
    for layer in base.model.get_submodule(base.anatomy.layers):
        for path in base.anatomy.roles("both").values():
            linear = layer.get_submodule(path)
            linear.bias = nn.Parameter(torch.full((linear.out_features,), 0.1))
    base.model.config.text_config.attention_bias = True
    base.model.config.text_config.mlp_bias = True
    return base


@pytest.mark.parametrize(("bias", "linears"), [("adapter_only", 3), ("all", 7)])
def test_biases_that_train_are_saved_and_loaded(tmp_path, bias, linears):
    base = with_biases()
    base.save(tmp_path / "base")
    tuned = tiny.tune("adapter", on=base, bias=bias)
    rates = dict.fromkeys(("llm", "connector", "vision"), 1e-3)
    assert [part.part for part in trained_parts(tuned, rates, {"llm"})] == ["llm"]
    assert sum(n.endswith(".bias") for n in tuned.trainable()) == 2 * linears
    tiny.stir(tuned, spread=0.2)
    tuned.model.eval()
    tuned.save(tmp_path / "saved")
    batch = tiny.padded(base, tiny.samples(base))
    again = MODELS["llava"].load(tmp_path / "base", loading=Loading("float32"))
    with torch.no_grad():
        expected = tuned.answer_logits(batch)
        assert torch.equal(load_adapter(again, tmp_path / "saved").answer_logits(batch), expected)


@pytest.mark.parametrize("bias", ["all", "adapter_only"])
def test_biases_of_a_base_that_has_none_are_refused(bias):
    """`all` must not open the vision tower's, the only biases of a Llama-based LLaVA."""
    with pytest.raises(MethodError, match="bias"):
        tiny.tune("adapter", bias=bias)


def test_a_scaling_of_zero_is_refused():
    """Nothing would ever train: the gradients are zero, too."""
    with pytest.raises((MethodError, ValueError)):
        tiny.tune("adapter", scaling=0.0)
