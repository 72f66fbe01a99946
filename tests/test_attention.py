"""The attention port: learned keys and values equal peft's, with every backend and kind of positions."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, get_peft_model

import tiny
from peft_mllm.anatomy import Anatomy
from peft_mllm.attention import PADDING, PREFIX, connect_prefix, tree_mask
from peft_mllm.attention.masks import widen_mask

TOLD = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}


@pytest.fixture(scope="module")
def saved_prefix(tmp_path_factory):
    """A prefix away from its start, with its connector, on disk."""
    directory = tmp_path_factory.mktemp("prefix")
    tuned = tiny.stir(tiny.tune("prefix", parts={"connector": True}), spread=1.0)
    tuned.save(directory)
    return tuned, directory


def both_ways(saved_prefix, attn):
    """The same prefix in our port, and in peft's own way through the cache."""
    directory = saved_prefix[1]
    from peft_mllm.tuned import load_adapter

    ours = load_adapter(tiny.family(attn=attn), directory)
    plain = PeftModel.from_pretrained(tiny.family(attn=attn).model, str(directory))
    return ours, plain


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_it_equals_peft_to_the_bit(saved_prefix, attn):
    ours, plain = both_ways(saved_prefix, attn)
    for record in tiny.mixed_records():
        batch = tiny.padded(ours.family, [ours.family.encode(record)])
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, **batch.pixels}
        with torch.no_grad():
            assert torch.equal(ours.base(**inputs).logits, plain(**inputs).logits)
            assert torch.equal(ours.answer_logits(batch), plain(**inputs).logits[batch.rows, batch.columns]) or (
                (ours.answer_logits(batch) - plain(**inputs).logits[batch.rows, batch.columns]).abs().max() < 2e-6
            )


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_it_generates_as_peft(saved_prefix, attn):
    ours, plain = both_ways(saved_prefix, attn)
    batch = tiny.prompts(ours.family, tiny.mixed_records()[:1])
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, **batch.pixels}
    expected = plain.generate(**inputs, **TOLD)[:, batch.input_ids.shape[1] :]
    assert torch.equal(ours.generate(batch, **TOLD), expected)


def test_backends_agree(saved_prefix):
    of = None
    for attn in ("sdpa", "eager"):
        ours, _ = both_ways(saved_prefix, attn)
        with torch.no_grad():
            logits = ours.answer_logits(tiny.shared(ours.family, tiny.samples(ours.family)))
        assert of is None or torch.allclose(logits, of, atol=1e-5)
        of = logits


def test_padding_on_either_side_changes_nothing(saved_prefix):
    ours, _ = both_ways(saved_prefix, "sdpa")
    of = tiny.samples(ours.family)
    with torch.no_grad():
        alone = torch.cat([ours.answer_logits(tiny.padded(ours.family, [each])) for each in of])
        assert torch.allclose(ours.answer_logits(tiny.padded(ours.family, of)), alone, atol=1e-5)
        assert torch.allclose(ours.answer_logits(tiny.shared(ours.family, of, share=False)), alone, atol=1e-5)


@pytest.mark.slow  # torch compiles it, for a minute
def test_flex_attention_answers_the_same(saved_prefix):
    base = tiny.family(attn="flex_attention")
    batch = tiny.padded(base, tiny.samples(base)[:2])
    try:
        with torch.no_grad():
            tiny.tune("none", on=base).answer_logits(batch)
    except Exception as error:
        pytest.skip(f"flex attention does not run here even without a prefix: {type(error).__name__}")
    ours, _ = both_ways(saved_prefix, "flex_attention")
    reference, _ = both_ways(saved_prefix, "sdpa")
    with torch.no_grad():
        difference = ours.answer_logits(batch) - reference.answer_logits(batch)
    assert difference.abs().max() < 1e-4


def test_the_projection_is_baked_into_the_table(tmp_path):
    tuned = tiny.stir(tiny.tune("prefix", projection=True, projection_width=12), spread=0.3)
    assert len(tuned.trainable()) == 5  # embedding, and weight and bias of two layers
    tuned.save(tmp_path)
    plain = PeftModel.from_pretrained(tiny.family().model, str(tmp_path))
    batch = tiny.padded(tuned.family, tiny.samples(tuned.family)[:1])
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, **batch.pixels}
    tuned.model.eval()
    with torch.no_grad():
        assert torch.equal(tuned.base(**inputs).logits, plain(**inputs).logits)


def test_every_layer_has_its_own_keys_and_values(saved_prefix):
    tuned, _ = saved_prefix
    batch = tiny.padded(tuned.family, tiny.samples(tuned.family))
    table = next(p for n, p in tuned.trainable().items() if "prompt_encoder" in n)
    loss = tuned.answer_losses(batch).mean()
    (gradient,) = torch.autograd.grad(loss, table)
    assert gradient.shape == (4, 2 * 2 * 2 * 8)  # tokens; layers, key and value, heads, head width
    assert (gradient != 0).all()


def test_widened_masks():
    device = torch.device("cpu")
    prompt = widen_mask(None, 2, 3, 3, "sdpa", device)
    assert prompt[0, 0].tolist() == [[True] * 3 + [False] * 2, [True] * 4 + [False], [True] * 5]
    chunk = widen_mask(None, 1, 2, 4, "sdpa", device)  # two new tokens after two in the cache
    assert chunk[0, 0].tolist() == [[True] * 4 + [False], [True] * 5]
    assert widen_mask(None, 2, 1, 9, "sdpa", device) is None
    assert widen_mask(None, 2, 5, 5, "flash_attention_2", device) is None
    padded = widen_mask(torch.tensor([[0, 1, 1]]), 2, 3, 3, "flash_attention_2", device)
    assert padded.tolist() == [[1, 1, 0, 1, 1]]
    added = widen_mask(torch.full((1, 1, 2, 2), -5.0), 1, 2, 2, "eager", device)
    assert added.tolist() == [[[[0.0, -5.0, -5.0], [0.0, -5.0, -5.0]]]]


def test_a_tree_is_this_mask():
    mask = tree_mask(torch.tensor([[PREFIX, PREFIX, 0, 0, 1, 2, 2, PADDING]]))[0, 0].int()
    assert mask[7, 7]  # padding has something to see, and nobody sees it
    assert mask[:7].tolist() == [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0, 0],
        [1, 1, 0, 0, 0, 1, 0, 0],
        [1, 1, 0, 0, 0, 1, 1, 0],
    ]


# A family with three axes of positions, which peft's own prefix cannot do

QWEN = Anatomy(
    llm="model.language_model",
    layers="model.language_model.layers",
    self_attention="self_attn",
    attention={role: f"self_attn.{role}_proj" for role in ("q", "k", "v", "o")},
    mlp={role: f"mlp.{role}_proj" for role in ("gate", "up", "down")},
    norms={"attention": "input_layernorm", "mlp": "post_attention_layernorm"},
    final_norm="model.language_model.norm",
    connector=("model.visual.merger",),
    vision=("model.visual.patch_embed", "model.visual.blocks"),
    lm_head="lm_head",
)


@pytest.fixture(scope="module")
def qwen():
    """A tiny random Qwen2.5-VL, and inputs: an image of 2 x 3 merged patches amid text."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 120, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
        },
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32,
            "patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1], "spatial_merge_size": 2,
        },
        image_token_id=100, video_token_id=101, vision_start_token_id=102, vision_end_token_id=103,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    ids = torch.tensor([[5, 6, 7, 102, *[100] * 6, 103, 8, 9, 10, 11]])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == 100).long(),
        "pixel_values": torch.randn(24, 3 * 2 * 14 * 14),
        "image_grid_thw": torch.tensor([[1, 4, 6]]),
    }
    return model, inputs


def qwen_with_prefix(model, *, spread=1.0):
    model = copy.deepcopy(model)
    torch.manual_seed(1)
    peft = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    torch.nn.init.normal_(peft.prompt_encoder["default"].embedding.weight, std=spread)
    return peft, connect_prefix(peft, QWEN).eval()


def test_m_rope_keeps_its_three_axes(qwen):
    model, inputs = qwen
    QWEN.check(model)
    seen = {}
    _, ours = qwen_with_prefix(model)
    for name, each in (("plain", model), ("prefix", ours)):
        rotary = each.get_submodule("model.language_model.rotary_emb")
        rotary.register_forward_pre_hook(lambda m, args, name=name: seen.__setitem__(name, args[1].clone()))
    with torch.no_grad():
        plain, answered = model(**inputs).logits, ours(**inputs).logits
    assert seen["plain"].shape == seen["prefix"].shape == (3, 1, 15)
    assert not torch.equal(seen["plain"][1], seen["plain"][2])  # rows and columns of the image differ
    assert torch.equal(seen["prefix"], seen["plain"] + 3)
    assert not torch.allclose(plain, answered, atol=1e-2)


def test_m_rope_attention_is_the_formula(qwen):
    """Rotary positions are relative, so shifting all of them changes nothing: the prefix is keys and values."""
    model, inputs = qwen
    peft, ours = qwen_with_prefix(model, spread=0.5)
    attention = ours.get_submodule("model.language_model.layers.0.self_attn")
    from peft_mllm.attention import port

    seen = {}
    original = port._backend_function

    def spying(backend, module):
        function = original(backend, module)

        def call(m, query, key, value, mask, **kwargs):
            out = function(m, query, key, value, mask, **kwargs)
            if m is attention:
                seen.update(q=query, k=key, v=value, out=out[0])
            return out

        return call

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(port, "_backend_function", spying)
        ours(**inputs)
    table = peft.prompt_encoder["default"].embedding.weight.view(3, 4, 2, 8)  # tokens, (layer, k/v), heads, width
    assert torch.equal(seen["k"][0, :, :3], table[:, 0].transpose(0, 1))
    assert torch.equal(seen["v"][0, :, :3], table[:, 1].transpose(0, 1))
    keys, values = (seen[n].repeat_interleave(2, dim=1) for n in ("k", "v"))  # 2 heads of keys serve 4 of queries
    scores = seen["q"] @ keys.transpose(-1, -2) / 8**0.5
    future = torch.ones(15, 18, dtype=torch.bool).triu(4)
    expected = scores.masked_fill(future, float("-inf")).softmax(-1) @ values
    assert torch.allclose(seen["out"].transpose(1, 2), expected, atol=1e-5)


def test_m_rope_generates_the_same_with_and_without_cache(qwen):
    model, inputs = qwen
    _, ours = qwen_with_prefix(model)
    told = TOLD | {"pad_token_id": 0, "suppress_tokens": [100, 101, 102, 103]}
    cached = ours.generate(**inputs, **told, use_cache=True)
    assert torch.equal(cached, ours.generate(**inputs, **told, use_cache=False))
    assert not torch.equal(cached, model.generate(**inputs, **told))


def test_m_rope_generates_from_a_left_padded_batch(qwen):
    model, inputs = qwen
    _, ours = qwen_with_prefix(model)
    told = TOLD | {"pad_token_id": 0}
    alone = ours.generate(**inputs, **told)[:, 15:]
    front = torch.zeros(1, 4, dtype=torch.long)
    wide = {
        **inputs,
        **{
            name: torch.cat([front, inputs[name]], dim=1)
            for name in ("input_ids", "attention_mask", "mm_token_type_ids")
        },
    }
    assert torch.equal(ours.generate(**wide, **told)[:, 19:], alone)


def test_m_rope_checkpointing_gives_the_same_gradients(qwen):
    model, inputs = qwen
    gradients = []
    for checkpointing in (False, True):
        peft, ours = qwen_with_prefix(model)
        if checkpointing:
            ours.get_submodule(QWEN.llm).gradient_checkpointing_enable({"use_reentrant": False})
        ours.train()
        ours(**inputs, use_cache=False).logits.logsumexp(-1).mean().backward()
        gradients.append(peft.prompt_encoder["default"].embedding.weight.grad)
    assert gradients[0].abs().min() > 0
    assert torch.allclose(*gradients, rtol=1e-5, atol=1e-9)
