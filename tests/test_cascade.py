"""Attention of packed rows without a mask: parts that see what the mask lets them see, forward and backward."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from peft_mllm.attention import Packing, kernels
from peft_mllm.attention.cascade import cascade
from peft_mllm.attention.kernels import Seen
from peft_mllm.attention.packing import Joined, seeing
from peft_mllm.data.trees import collate_padded, cut, pack, plant

lengths = st.integers(1, 6)
packings = st.lists(st.tuples(lengths, st.lists(lengths, max_size=4)), min_size=1, max_size=5).map(
    lambda trees: Packing(
        tuple(p for p, own in sorted(trees, key=lambda t: not t[1])), tuple(tuple(own) for _, own in trees if own)
    )
)


def visible(packing):
    """(T, T) which token sees which, told token by token."""
    owners = [(tree, None) for tree, length in enumerate(packing.prefixes) for _ in range(length)]
    for tree, own in enumerate(packing.branches):
        owners += [(tree, branch) for branch, length in enumerate(own) for _ in range(length)]
    return torch.tensor(
        [
            [j <= i and one[0] == other[0] and other[1] in (None, one[1]) for j, other in enumerate(owners)]
            for i, one in enumerate(owners)
        ]
    )


def by_mask(query, key, value, packing, learned):
    mask = visible(packing)
    for each in learned:
        mask = (
            torch.cat([torch.ones(len(mask), each.shape[2], dtype=torch.bool), mask], 1) if each is learned[0] else mask
        )
    if learned:
        key, value = torch.cat([learned[0], key], 2), torch.cat([learned[1], value], 2)
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)


@pytest.mark.parametrize("how", ["flash", "flash in blocks", "plain"])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(packing=packings, shared=st.sampled_from([1, 2]), learned=st.integers(0, 3), seed=st.integers(0, 99))
def test_it_is_the_masked_attention(how, packing, shared, learned, seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(heads, tokens):
        return torch.randn(1, heads, tokens, 8, dtype=torch.float64, generator=generator).requires_grad_()

    tensors = [draw(4, packing.length), *(draw(4 // shared, packing.length) for _ in "kv")]
    front = [draw(4 // shared, learned) for _ in "kv"] if learned else []
    with pytest.MonkeyPatch.context() as patch:
        if how == "flash in blocks":
            patch.setattr(kernels, "BLOCK", 2)
        if how == "plain":
            patch.setattr(kernels, "_cpu_forward", kernels._plain_forward)
            patch.setattr(kernels, "_cpu_backward", kernels._plain_backward)
        seen = [Seen(seeing(learned, begin=0, length=packing.length), *(each[0] for each in front))] if front else []
        ours = cascade(*tensors, packing, scale=8**-0.5, learned=seen)
        weight = torch.randn(ours.shape, dtype=torch.float64, generator=generator)
        found = torch.autograd.grad((ours * weight).sum(), [*tensors, *front])
    masked = by_mask(*tensors, packing, front)
    expected = torch.autograd.grad((masked * weight).sum(), [*tensors, *front])
    tolerance = 1e-10
    assert (ours - masked).abs().max() <= tolerance
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= tolerance * 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_masked_attention_in_lesser_types(dtype):
    packing = Packing((40, 30, 20), ((7, 5, 5), (4,)))
    torch.manual_seed(0)
    exact = [torch.randn(1, heads, packing.length, 16) for heads in (4, 2, 2)]
    tensors = [each.to(dtype).requires_grad_() for each in exact]
    reference = [each.detach().double().requires_grad_() for each in tensors]
    ours, masked = cascade(*tensors, packing, scale=0.25), by_mask(*reference, packing, [])
    found = torch.autograd.grad(ours.float().square().sum(), tensors)
    expected = torch.autograd.grad(masked.square().sum(), reference)
    for one, other in zip([ours, *found], [masked, *expected], strict=True):
        assert one.dtype == dtype
        assert (one.double() - other).norm() <= {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype] * other.norm()


def test_joined_rows_are_computed_as_if_each_were_alone():
    rows = (Packing((9, 4), ((3, 2),)), Packing((5,)), Packing((7,), ((2, 2),)))
    joined = Joined(rows)
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, joined.length, 8, requires_grad=True) for heads in (4, 2, 2))
    learned = torch.randn(2, 2, 3, 8, requires_grad=True)  # seen by the second row alone
    weight = torch.randn(1, 4, joined.length, 8)

    def front(begin):
        return [Seen(seeing(3, begin=begin, length=5), *learned)]

    together = cascade(query, key, value, joined, scale=0.3, learned=front(joined.begins[1]))
    found = torch.autograd.grad((together * weight).sum(), [query, key, value, learned])
    apart = [
        cascade(
            *(each[:, :, begin : begin + row.length] for each in (query, key, value)),
            row,
            scale=0.3,
            learned=front(0) if row is rows[1] else [],
        )
        for begin, row in zip(joined.begins, rows, strict=True)
    ]
    expected = torch.autograd.grad((torch.cat(apart, 2) * weight).sum(), [query, key, value, learned])
    assert torch.equal(together, torch.cat(apart, 2))
    assert all(map(torch.equal, found, expected))
    assert joined.longest == 12


def test_neighbours_of_equal_length_are_one_product():
    within, across, own = Packing((9, 9, 5), ((3, 3), (3,))).parts
    assert [run.count for run in within.runs] == [2, 1]
    assert [(run.query, run.queries, run.key, run.keys) for run in across.runs] == [(23, 6, 0, 9), (29, 3, 9, 9)]
    assert [run.count for run in own.runs] == [3]
    assert Packing((9, 9, 5), ((3, 3), (3,))).longest == 12


CASES = [*tiny.method_cases(), ("lora", {"dora": True}), ("prefix", {"projection": True})]


@pytest.mark.parametrize("family", ["llava", "qwen_vl", "generic"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: tiny.label(case) + str(len(case[1])))
def test_packed_trees_give_the_gradients_of_padded_rows(family, case):
    name, options = case
    tuned = tiny.stir(tiny.tune(name, on=tiny.family(family), parts={"connector": True}, **options), spread=0.1)
    if not tuned.packs:
        assert tuned.model.active_peft_config.is_prompt_learning
        return
    tuned.model.eval()
    tuned.base.double()
    samples = tiny.samples(tuned.family)
    layout = {"pixels": tuned.family.pixels, "pad_id": 0}
    packed = pack(plant(samples, share=True), **layout)
    assert packed.input_ids.shape == (1, packed.tokens)  # no padding
    assert packed.tokens < packed.sequence_tokens
    ours, gradient = loss_and_gradient(tuned, packed)
    plain, expected = loss_and_gradient(tuned, collate_padded(samples, **layout))
    assert abs(ours - plain) <= 1e-7 * plain
    # norms and rotary positions are in float32 whatever the model
    assert (gradient - expected).norm() <= 1e-6 * expected.norm()


def loss_and_gradient(tuned, batch):
    doubled = {n: v.double() if v.is_floating_point() else v for n, v in batch.pixels.items()}
    logits = tuned.answer_logits(replace(batch, pixels=doubled))
    order = batch.owners * 100_000 + torch.tensor([int(t) for t in batch.targets])
    loss = torch.nn.functional.cross_entropy(logits, batch.targets)
    assert len(order) == len(logits)
    parameters = list(tuned.trainable().values())
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return loss.item(), torch.cat(
        [torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(parameters, found, strict=True)]
    )


@pytest.mark.parametrize("name", ["lora", "prefix"])
def test_a_checkpointed_layer_is_packed_in_the_backward_pass_too(name):
    family = tiny.family()
    plain = tiny.stir(tiny.tune(name, on=family), spread=0.1)
    batch = pack(plant(tiny.samples(family), share=True), pixels=family.pixels, pad_id=0)
    parameters = list(plain.trainable().values())
    expected = torch.autograd.grad(plain.answer_losses(batch).mean(), parameters)
    plain.decoder.gradient_checkpointing_enable({"use_reentrant": False})
    plain.model.train()
    for module in plain.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    found = torch.autograd.grad(plain.answer_losses(batch).mean(), parameters)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["lora", "prefix"])
def test_a_forward_of_the_model_itself_is_not_taken_for_the_packed_row(name):
    tuned = tiny.stir(tiny.tune(name))
    tuned.model.eval()
    samples = tiny.samples(tuned.family)
    batch = pack(plant(samples, share=True), pixels=tuned.family.pixels, pad_id=0)
    as_long = torch.arange(batch.input_ids.shape[1])[None] % 50 + 10
    with torch.no_grad():
        before = tuned.base(input_ids=as_long).logits
        tuned.answer_logits(batch)
        assert torch.equal(tuned.base(input_ids=as_long).logits, before)
        assert torch.equal(tuned.base(input_ids=as_long, attention_mask=torch.ones_like(as_long)).logits, before)


def test_a_tree_too_large_is_cut_and_loses_nothing():
    samples = tiny.samples(tiny.family())
    (tree,) = plant([s for s in samples if s.id in ("a1", "a2", "a3", "turns")], share=True)
    parts = list(cut(tree, tree.shared + 1 + max(len(s.ids) - tree.shared for s in tree.samples)))
    assert [s for part in parts for s in part.samples] == list(tree.samples)
    assert len(parts) > 1
    assert all(part.shared == tree.shared for part in parts)
