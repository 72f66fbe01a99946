"""Lean layers compute what plain layers compute, keep less of it, and leave no trace when they are taken off."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import tiny
from peft_mllm.anatomy import Anatomy
from peft_mllm.data.supply import Supply
from peft_mllm.exactness import lean_where_exact
from peft_mllm.identity import state_of
from peft_mllm.lean import Levers, install, kernels, lean_of, remove
from peft_mllm.models import MODELS
from peft_mllm.recompute import set_recompute
from peft_mllm.tuned import untouched

CASES = [
    *[case for case in tiny.method_cases() if case[0] != "none"],
    ("lora", {"location": "attention", "rslora": True}),
    ("lora", {"location": "mlp"}),
    ("lora", {"dora": True}),
    ("ia3", {"location": "attention"}),
    ("adapter", {"preset": "houlsby"}),
    ("adapter", {"preset": "parallel", "location": "both", "scaling": "learned"}),
    ("adapter", {"before": ("o", "down"), "after": ("gate",), "non_linearity": "gelu"}),
]
BY_FUNCTIONS = ("lora", "ia3", "adapter", "prefix")
"""Methods whose layers are computed by functions wholly."""
LLAMA = Anatomy(
    llm="model",
    layers="model.layers",
    self_attention="self_attn",
    attention={role: f"self_attn.{role}_proj" for role in "qkvo"},
    mlp={role: f"mlp.{role}_proj" for role in ("gate", "up", "down")},
    norms={"attention": "input_layernorm", "mlp": "post_attention_layernorm"},
    final_norm="model.norm",
    connector=(),
    vision=(),
    lm_head="lm_head",
)


def family(name):
    return tiny.family(name) if name in MODELS else MODELS["generic"].tiny_member(name, image_size=28)


def tuned_on(name, case, **parts):
    method, options = case
    tuned = tiny.stir(tiny.tune(method, on=family(name), parts=parts, **options), spread=0.02)
    tuned.model.train()
    return tuned, tiny.batch_for(tuned, tiny.samples(tuned.family))


def loss_and_gradient(tuned, batch, seed=0):
    torch.manual_seed(seed)
    loss = tuned.answer_losses(batch).mean()
    gradients = torch.autograd.grad(loss, list(tuned.trainable().values()), allow_unused=True)
    pairs = zip(tuned.trainable().values(), gradients, strict=True)
    return loss.item(), torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in pairs])


def error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def put_on(tuned, **levers):
    return install(tuned.base, tuned.family.anatomy, Levers(**levers))


def label(case):
    options = case[1]
    return "-".join([tiny.label(case), *(f"{k}={v}" for k, v in options.items() if k not in {*tiny.SMALL, "config"})])


# Exactness


@pytest.mark.parametrize(
    "name", ["llava", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen_vl", "qwen2_5_vl"))]
)
@pytest.mark.parametrize("case", CASES, ids=label)
def test_loss_and_gradients_are_those_of_the_plain_layers(name, case):
    tuned, batch = tuned_on(name, case, connector=True)
    loss, gradient = loss_and_gradient(tuned, batch)
    for levers in ({"functions": False}, {"trim": False}, {}):
        lean = put_on(tuned, **levers)
        found, ours = loss_and_gradient(tuned, batch)
        assert abs(found - loss) <= 1e-6 * loss, levers
        assert error(ours, gradient) <= 1e-5, levers
        assert lean.trimmed == (levers.get("trim", True) and tuned.takes_padding)  # the others act in PeftModel
        if levers.get("functions", True) and case[0] in BY_FUNCTIONS and not case[1].get("dora"):
            assert all(layer.lean_parts.by_functions for layer in layers_of(tuned))
            assert all(layer.lean_parts.heads and layer.lean_parts.out for layer in layers_of(tuned))
            assert all(layer.lean_parts.gated for layer in layers_of(tuned))
    remove(tuned.base, tuned.family.anatomy)
    assert torch.equal(loss_and_gradient(tuned, batch)[1], gradient)


def layers_of(tuned):
    return list(tuned.base.get_submodule(tuned.family.anatomy.layers).children())


@pytest.mark.parametrize("member", ["llava_next", "internvl", "smolvlm", "qwen3_vl", "gemma3", "mllama", "glm4v"])
@pytest.mark.slow
def test_other_architectures_are_computed_right_whether_they_are_known_or_not(member):
    tuned, batch = tuned_on(member, ("lora", {}))
    loss, gradient = loss_and_gradient(tuned, batch)
    lean = put_on(tuned)
    found, ours = loss_and_gradient(tuned, batch)
    assert abs(found - loss) <= 1e-6 * loss
    assert error(ours, gradient) <= 1e-5
    assert lean.used == (member not in ("qwen3_vl", "gemma3", "glm4v"))  # norms on queries, four norms, fused gates


@pytest.mark.parametrize("name", ["llava", "qwen_vl"])
@pytest.mark.parametrize("case", [("lora", {"dropout": 0.3}), ("adapter", {"preset": "parallel", "dropout": 0.3})])
def test_dropout_draws_the_masks_that_the_modules_draw(name, case):
    tuned, batch = tuned_on(name, case)
    _, gradient = loss_and_gradient(tuned, batch, seed=3)
    _, other = loss_and_gradient(tuned, batch, seed=4)
    lean = put_on(tuned, trim=False)
    assert error(loss_and_gradient(tuned, batch, seed=3)[1], gradient) <= 1e-5
    assert error(other, gradient) > 0.1
    assert lean.layers == len(layers_of(tuned))


@pytest.mark.parametrize("case", [("lora", {"alpha": 8}), ("ia3", {}), ("adapter", {}), ("prefix", {})], ids=label)
def test_autocast_gives_what_it_gives_plain_layers(case):
    tuned, batch = tuned_on("llava", case)
    exact = loss_and_gradient(tuned, batch)[1]
    half = dataclasses.replace(tuned, bf16=True)
    plain = loss_and_gradient(half, batch)[1]
    put_on(tuned)
    ours = loss_and_gradient(half, batch)[1]
    assert error(plain, exact) > 1e-3
    assert error(ours, plain) <= 2e-2
    assert error(ours, exact) <= 1.5 * error(plain, exact)


@pytest.mark.parametrize("policy", ["selective", "full", 2, "offload"])
@pytest.mark.parametrize("case", [("lora", {"dropout": 0.2}), ("prefix", {})], ids=label)
def test_what_is_computed_again_is_the_same(policy, case):
    tuned, batch = tuned_on("llava", case)
    put_on(tuned)
    _, gradient = loss_and_gradient(tuned, batch)
    kept = saved_bytes(tuned, batch)
    set_recompute(tuned.base, tuned.family.anatomy, policy)
    assert torch.equal(loss_and_gradient(tuned, batch)[1], gradient)
    assert lean_of(tuned.decoder).trimmed
    assert policy == "offload" or saved_bytes(tuned, batch) < kept


def test_grouped_queries():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 40}
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, attention_bias=True, **sizes))
    model.requires_grad_(False)
    ids = torch.randint(0, 40, (2, 9))
    embeds = model.model.embed_tokens(ids).requires_grad_()

    def gradient():
        return torch.autograd.grad(model(inputs_embeds=embeds, use_cache=False).logits.logsumexp(-1).sum(), embeds)[0]

    plain = gradient()
    assert install(model, LLAMA).layers == 2
    assert error(gradient(), plain) <= 1e-5


def test_the_kernels_give_autograds_gradients():
    torch.manual_seed(0)

    def double(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    x, w, grad = double(5, 8).requires_grad_(), double(8), double(5, 8)
    (expected,) = torch.autograd.grad(kernels.rms_norm(x, w, 1e-3), x, grad)
    assert torch.allclose(kernels.rms_norm_back(grad, x.detach(), w, 1e-3), expected, atol=1e-12)
    gate_up = double(5, 16).requires_grad_()
    gate, up = gate_up.chunk(2, -1)
    (expected,) = torch.autograd.grad(torch.nn.functional.silu(gate) * up, gate_up, grad)
    assert torch.allclose(kernels.silu_product_back(grad, gate_up.detach()), expected, atol=1e-12)
    heads, grad = double(1, 5, 2, 4).requires_grad_(), double(1, 5, 2, 4)
    cos, sin = double(1, 5, 1, 4), double(1, 5, 1, 4)
    (expected,) = torch.autograd.grad(kernels.rotate(heads.clone(), cos, sin), heads, grad)
    assert torch.allclose(kernels.rotate_back(grad.clone(), cos, sin), expected, atol=1e-12)


# What is kept


def saved_in(model, forward):
    """Bytes that autograd saves in a forward, each memory once, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    assert result is not None
    return sum(size for size, _ in held.values())


def saved_bytes(tuned, batch):
    return saved_in(tuned.model, partial(tuned.answer_losses, batch))


WIDTH, INNER, TOKENS, RANK = 256, 688, 256, tiny.SMALL["rank"]


def saved_by_a_layer(method, *, lean, **options):
    """Bytes a token at bfloat16 that one decoder layer saves: the difference between three layers and two."""
    saved = []
    for layers in (2, 3):
        sizes = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": layers, "vocab_size": 32}
        model = LlamaForCausalLM(LlamaConfig(num_attention_heads=4, **sizes)).bfloat16()
        model.requires_grad_(False)
        tuner = get_peft_model(model, tiny.method(method, **options).peft_config(LLAMA, model.config))
        tuner.train()
        for parameter in tuner.parameters():
            parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
        if lean:
            assert install(model, LLAMA, Levers(trim=False)).layers == layers
        embeds = torch.randn(1, TOKENS, WIDTH).bfloat16().requires_grad_()
        saved.append(saved_in(tuner, partial(model.model, inputs_embeds=embeds, use_cache=False)))
    return (saved[1] - saved[0]) / TOKENS


def test_a_layer_saves_twelve_h_and_four_f():
    lora = 7 * RANK * 2  # seven linears
    expected = 12 * WIDTH + 4 * INNER + lora
    assert abs(saved_by_a_layer("lora", lean=True) - expected) <= 0.02 * expected


@pytest.mark.parametrize(
    ("method", "options", "share"),
    [("lora", {}, 0.55), ("lora", {"dropout": 0.1}, 0.4), ("ia3", {}, 0.7), ("adapter", {}, 0.7)],
)
def test_much_less_is_saved_than_autograd_saves(method, options, share):
    with torch.autocast("cpu", torch.bfloat16):
        lean, plain = (saved_by_a_layer(method, lean=lean, **options) for lean in (True, False))
    assert lean <= share * plain


# On and off


@pytest.mark.parametrize("case", [("lora", {}), ("prefix", {})], ids=label)
def test_it_comes_off_without_a_trace(case):
    tuned, batch = tuned_on("llava", case)
    before = state_of(tuned.base, tuned.decoder)
    classes = [type(layer) for layer in layers_of(tuned)]
    put_on(tuned)
    loss_and_gradient(tuned, batch)
    remove(tuned.base, tuned.family.anatomy)
    assert state_of(tuned.base, tuned.decoder) == before
    assert [type(layer) for layer in layers_of(tuned)] == classes
    assert not any("lean" in name for layer in (tuned.decoder, *layers_of(tuned)) for name in vars(layer))


@pytest.mark.parametrize("case", [("lora", {}), ("ia3", {}), ("prefix", {})], ids=label)
def test_switched_off_it_is_the_base_to_the_bit(case):
    base = family("llava")
    batch = tiny.padded(base, tiny.samples(base))
    with torch.no_grad():
        expected = untouched(base).answer_logits(batch)
    tuned = tiny.stir(tiny.tune(case[0], on=base))
    put_on(tuned)
    with torch.no_grad(), tuned.untuned() as plain:
        assert torch.equal(plain.answer_logits(batch), expected)
    with torch.no_grad():
        assert not torch.equal(tuned.answer_logits(batch), expected)


def test_generating_is_as_it_was():
    tuned, _ = tuned_on("llava", ("lora", {}))
    tuned.model.eval()
    asked = tiny.prompts(tuned.family, tiny.mixed_records()[:3])
    told = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5}
    before = tuned.generate(asked, **told)
    put_on(tuned)
    assert torch.equal(tuned.generate(asked, **told), before)


def test_hidden_states_are_whole_for_everybody_else():
    tuned, batch = tuned_on("llava", ("lora", {}))
    lean = put_on(tuned)
    tuned.answer_losses(batch)
    assert lean.trimmed
    ids = torch.randint(5, 40, (2, 7))
    assert tuned.base(input_ids=ids).logits.shape[:2] == (2, 7)


def test_saved_adapters_are_equal(tmp_path):
    tuned, _ = tuned_on("llava", ("lora", {}))
    tuned.save(tmp_path / "plain")
    put_on(tuned)
    tuned.save(tmp_path / "lean")
    name = "adapter_model.safetensors"
    assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "lean" / name).read_bytes()


# The check at the start of a run


def checked(tuned, notes):
    supply = Supply((), None, tuned.family.pixels, pad_id=0, layout="rows", share=True)
    return lean_where_exact(tuned, tiny.samples(tuned.family), supply, Levers(), note=notes.append)


def test_the_check_puts_it_on():
    tuned, _ = tuned_on("llava", ("lora", {}))
    notes = []
    assert checked(tuned, notes).passed
    assert lean_of(tuned.decoder) is not None
    assert notes == []


@pytest.mark.parametrize("wrong", ["rms_norm_back", "silu_product_back", "rotate_back"])
def test_the_check_finds_a_wrong_gradient_and_says_so(monkeypatch, wrong):
    right = getattr(kernels, wrong)
    made = kernels.Kernels(**{wrong: lambda grad, *rest: right(grad.mul_(1.001), *rest)})
    monkeypatch.setattr("peft_mllm.lean.layers.Kernels", lambda: made)
    tuned, _ = tuned_on("llava", ("lora", {}))
    notes = []
    assert not checked(tuned, notes).passed
    assert lean_of(tuned.decoder) is None
    assert "not used in this run" in notes[0]


def test_a_norm_of_another_kind_is_left_to_its_modules():
    tuned, batch = tuned_on("llava", ("lora", {}))
    for layer in layers_of(tuned):
        kind = type(layer.input_layernorm)
        layer.input_layernorm.__class__ = type(kind.__name__, (kind,), {"forward": one_more})
    _, gradient = loss_and_gradient(tuned, batch)
    put_on(tuned)
    assert all(layer.lean_parts.heads is None and layer.lean_parts.gated for layer in layers_of(tuned))
    assert error(loss_and_gradient(tuned, batch)[1], gradient) <= 1e-5


def one_more(self, x):
    """Gemma's way: the weight counts from one."""
    return type(self).__mro__[1].forward(self, x) + x * torch.rsqrt(
        x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon
    )


def test_a_layer_with_a_number_of_its_own_is_left_alone():
    tuned, _ = tuned_on("llava", ("lora", {}))
    for layer in layers_of(tuned):
        layer.residual_multiplier = 0.5  # as Granite's
    assert not put_on(tuned).used
