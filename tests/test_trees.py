"""Trees compute what padded, unshared rows compute, and lose nothing."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import peft_mllm.data.trees as trees_module
import tiny
from peft_mllm.attention import Packing, tree_mask
from peft_mllm.data.encode import IGNORED, Sample
from peft_mllm.data.supply import Supply
from peft_mllm.data.trees import collate, collate_padded, plant
from peft_mllm.exactness import self_check
from peft_mllm.models import MODELS

CASES = [*tiny.method_cases(), ("lora", {"dora": True}), ("prefix", {"projection": True})]


def with_heads(tuned):
    """The method with connector open; for `none` that is all that trains."""
    return tiny.stir(tuned, spread=0.1)


def by_transformers(tuned, samples):
    """Mean loss over answer tokens by the model's own forward on padded rows, no code of ours after `encode`."""
    length = max(len(s.ids) for s in samples)
    ids = torch.zeros(len(samples), length, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, s in enumerate(samples):
        ids[row, : len(s.ids)] = torch.tensor(s.ids)
        labels[row, : len(s.ids)] = torch.tensor(s.labels)
        mask[row, : len(s.ids)] = 1
    pixels = tiny.pixels(tuned.family, [image.load() for s in samples for image in s.images])
    return tuned.base(input_ids=ids, attention_mask=mask, labels=labels, **pixels).loss


def loss_and_gradient(tuned, loss):
    gradients = torch.autograd.grad(loss, list(tuned.trainable().values()), allow_unused=True)
    named = zip(tuned.trainable().items(), gradients, strict=True)
    return loss.item(), {n: torch.zeros_like(p) if g is None else g for (n, p), g in named}


OFTEN = {"lora", "adapter", "prefix"}


def _marks(family, attn, case):
    often = family == "llava" and attn == "sdpa"
    some = case[0] in OFTEN and (family, attn) in (("llava", "eager"), ("qwen_vl", "sdpa"))
    return [] if often or some else [pytest.mark.slow]


@pytest.mark.parametrize(
    ("family", "attn", "case"),
    [
        pytest.param(*each, id=f"{each[0]}-{each[1]}-{tiny.label(each[2])}{len(each[2][1])}", marks=_marks(*each))
        for each in itertools.product(MODELS, ("sdpa", "eager"), CASES)
    ],
)
def test_loss_and_gradients_equal_the_plain_computation(family, case, attn):
    name, options = case
    parts = {"connector": True, "vision": name == "lora"}
    tuned = with_heads(tiny.tune(name, on=tiny.family(family, attn=attn), parts=parts, **options))
    if not tuned.trees:
        assert tuned.model.active_peft_config.is_prompt_learning
        return
    samples = tiny.samples(tuned.family)
    batch = tiny.shared(tuned.family, samples)
    assert batch.input_ids.shape[0] == 4  # of nine samples: two images, their pair, and text
    shared, gradient = loss_and_gradient(tuned, tuned.answer_losses(batch).mean())
    plain, expected = loss_and_gradient(tuned, by_transformers(tuned, samples))
    assert abs(shared - plain) <= 1e-5 * abs(plain)
    assert gradient.keys() == expected.keys()
    whole = torch.cat([g.flatten() for g in expected.values()]).norm()
    error = torch.cat([(gradient[key] - value).flatten() for key, value in expected.items()]).norm()
    assert error <= 1e-5 * whole
    for key, value in expected.items():  # and none of them hides in the sum
        assert (gradient[key] - value).norm() <= 1e-3 * max(value.norm(), 1e-3 * whole), key


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["lora", "prefix"])
def test_branches_do_not_see_each_other(name, attn):
    tuned = with_heads(tiny.tune(name, on=tiny.family(attn=attn)))
    samples = [s for s in tiny.samples(tuned.family) if s.id in ("a1", "a2", "turns", "a3")]
    batch = tiny.shared(tuned.family, samples)
    (tree,) = plant(samples, share=True)
    begin = tree.shared + len(samples[0].ids) - tree.shared
    end = begin + len(samples[1].ids) - tree.shared
    changed = replace(batch, input_ids=batch.input_ids.clone())
    changed.input_ids[0, begin:end] = torch.randint(20, 400, (end - begin,))
    with torch.no_grad():
        before, after = tuned.answer_logits(batch), tuned.answer_logits(changed)
    others = (batch.owners != 1) & (batch.columns >= tree.shared)
    assert (before[others] - after[others]).abs().max() <= 1e-7
    assert (before[batch.owners == 1] - after[batch.owners == 1]).abs().max() > 0.1
    shorter = tiny.shared(tuned.family, [samples[0], *samples[2:]])
    with torch.no_grad():
        without = tuned.answer_logits(shorter)
    assert torch.allclose(without, before[batch.owners != 1], atol=1e-5)


def test_positions_restart_at_the_prefix():
    family = tiny.family()
    samples = [s for s in tiny.samples(family) if s.id.startswith("b")]
    batch = tiny.shared(family, samples)
    (tree,) = plant(samples, share=True)
    n, one, two = tree.shared, len(samples[0].ids), len(samples[1].ids)
    assert batch.position_ids[0].tolist() == [*range(n), *range(n, one), *range(n, two)]
    # the questions are equal: sharing goes on to the answers, and stops there
    assert n == min(s.labels.index(next(x for x in s.labels if x != IGNORED)) for s in samples)


def answered(text, number, *, mark="<image>\n", system=None, id=None):
    return tiny.record(id or text, mark + text, "yes", images=(number,), system=system)


def groups(records):
    planted = plant(tiny.samples(tiny.family(), records), share=True)
    return sorted(sorted(s.id for s in tree.samples) for tree in planted)


def test_only_what_is_the_same_is_shared():
    assert groups([answered("a", 1), answered("b", 1)]) == [["a", "b"]]
    assert groups([answered("a", 1), answered("b", 2)]) == [["a"], ["b"]]
    assert groups([answered("a", 1), answered("b", 1, system="Be brief.")]) == [["a"], ["b"]]
    early = tiny.record("early", "<image>\nIs it?", "yes", "Sure?", "no", images=(1,))
    late = tiny.record("late", "Hello", "yes", "<image>\nIs it?", "no", images=(1,))
    assert groups([early, late]) == [["early"], ["late"]]
    swapped = [tiny.record(f"{a}{b}", "<image> <image>", "x", images=(a, b)) for a, b in ((1, 2), (2, 1))]
    assert groups(swapped) == [["12"], ["21"]]
    one_two = [tiny.record("one", "<image> it", "x", images=(1,)), swapped[0]]
    assert groups(one_two) == [["12"], ["one"]]
    texts = [tiny.record(id, "same", "x") for id in ("t1", "t2")]
    assert groups(texts) == [["t1"], ["t2"]]


def test_samples_that_differ_before_their_image_do_not_share_it():
    """The image stands in the second turn: what precedes it holds an answer, which is never shared."""
    asked = [
        tiny.record(id, "Hello", "hi there", "<image>\nIs it " + what, "no", images=(1,))
        for id, what in (("a", "red?"), ("b", "blue?"))
    ]
    family = tiny.family()
    samples = tiny.samples(family, asked)
    trees = plant(samples, share=True)
    batch = tiny.shared(family, samples)
    assert batch.answer_tokens == sum(s.answer_tokens for s in samples)
    for tree in trees:
        if tree.shared:
            assert tree.shared >= tree.samples[0].image_end  # one image, else its features are placed wrongly
    tuned = with_heads(tiny.tune("lora", on=family))
    loss, _ = loss_and_gradient(tuned, tuned.answer_losses(batch).mean())
    plain, _ = loss_and_gradient(tuned, by_transformers(tuned, samples))
    assert abs(loss - plain) <= 1e-5 * plain


def test_equal_samples_share_and_are_learned_twice():
    family = tiny.family()
    samples = tiny.samples(family, [answered("a", 1, id="x"), answered("a", 1, id="y")])
    (tree,) = plant(samples, share=True)
    assert tree.shared < len(samples[0].ids)
    batch = tiny.shared(family, samples)
    assert batch.sample_ids == ("x", "y")
    assert batch.answer_tokens == 2 * samples[0].answer_tokens


def test_images_follow_their_rows():
    """Text rows between image rows, pairs of images: each placeholder gets its own picture's features."""
    family = tiny.family()
    for batch in (tiny.shared(family, tiny.samples(family)), tiny.padded(family, tiny.samples(family))):
        placeholders = (batch.input_ids == family.model.config.image_token_id).sum().item()
        assert placeholders == 4 * batch.pixels["pixel_values"].shape[0]


# Random trees


@st.composite
def sample_lists(draw):
    """Samples of small tokens, so that many share much, also in their answers."""
    token = st.integers(3, 5)
    samples = []
    for i in range(draw(st.integers(1, 6))):
        picture = draw(st.sampled_from([None, 1, 2]))
        front = [] if picture is None else [3] * draw(st.integers(0, 1)) + [9, 9]
        before = [4, 5] if front and draw(st.integers(0, 3)) == 0 else []
        # a turn before the image's: its last token is learned
        ids = before + front
        labels = [IGNORED] * (len(before) - 1) + before[-1:] + [IGNORED] * len(front)
        for _ in range(draw(st.integers(1, 3))):
            question = draw(st.lists(token, min_size=1, max_size=4))
            answer = draw(st.lists(token, min_size=1, max_size=3))
            ids += question + answer
            labels += [IGNORED] * len(question) + answer
        images = () if picture is None else (tiny.Picture(picture),)
        samples.append(Sample(f"s{i}", tuple(ids), tuple(labels), images, len(before) + len(front)))
    return samples


def seen_by(batch, row, column):
    """(position, token) pairs that a place attends to."""
    at = batch.attention_mask[row, 0, column].nonzero()[:, 0]
    return sorted((batch.position_ids[row, i].item(), batch.input_ids[row, i].item()) for i in at)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(sample_lists(), st.booleans())
def test_nothing_is_lost_and_every_answer_sees_its_own_sample(samples, share):
    trees = plant(samples, share=share)
    planted = [s for tree in trees for s in tree.samples]
    assert sorted(s.id for s in planted) == sorted(s.id for s in samples)
    for tree in trees:
        assert all(s.ids[: tree.shared] == tree.samples[0].ids[: tree.shared] for s in tree.samples)
        assert all(s.images == tree.images for s in tree.samples)
        assert all(set(s.labels[: tree.shared]) <= {IGNORED} for s in tree.samples)
        assert all(tree.shared < len(s.ids) for s in tree.samples)
        assert len(tree.samples) == 1 or tree.shared >= tree.samples[0].image_end
        assert share or len(tree.samples) == 1
    batch = collate(trees, pixels=lambda images, ids: {"pixel_values": torch.zeros(sum(map(len, images)))}, pad_id=0)
    assert batch.tokens == sum(tree.length for tree in trees)
    assert batch.pixels.get("pixel_values", torch.zeros(0)).shape[0] == sum(len(t.images) for t in trees)
    assert len(batch.sample_ids) == len(planted)
    answers = list(zip(*(x.tolist() for x in (batch.rows, batch.columns, batch.targets, batch.owners)), strict=True))
    for owner, sample in enumerate(planted):
        assert batch.sample_ids[owner] == sample.id
        learned = [i for i, label in enumerate(sample.labels) if label != IGNORED]
        mine = [answer for answer in answers if answer[3] == owner]
        assert [target for _, _, target, _ in mine] == [sample.ids[i] for i in learned]
        for i, (row, column, _, _) in zip(learned, mine, strict=True):
            assert seen_by(batch, row, column) == list(enumerate(sample.ids[:i]))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(sample_lists(), st.booleans())
def test_padded_rows_hold_the_same(samples, left):
    batch = collate_padded(samples, pixels=lambda images, ids: {}, pad_id=0, left=left)
    targets = iter(batch.targets.tolist())
    for row, sample in enumerate(samples):
        there = batch.attention_mask[row].bool()
        assert batch.input_ids[row][there].tolist() == list(sample.ids)
        offset = int(there.int().argmax())
        for i, label in enumerate(sample.labels):
            if label != IGNORED:
                assert next(targets) == label
                assert (row, offset + i - 1) in set(zip(batch.rows.tolist(), batch.columns.tolist(), strict=True))


# The self-check


def checked(tuned, layout):
    supply = Supply((), tuned.family.encode, tuned.family.pixels, 0, layout, share=True)
    return self_check(tuned, tiny.samples(tuned.family), supply)


every_layout = pytest.mark.parametrize("layout", ["packed", "rows"])


@every_layout
def test_the_self_check_passes_where_sharing_is_exact(layout):
    check = checked(with_heads(tiny.tune("lora", dropout=0.3)), layout)
    assert check.passed
    assert check.samples == 9
    assert check.shared_tokens > 100


@pytest.mark.parametrize("name", ["lora", "ia3", "prefix"])
def test_the_self_check_finds_a_wrong_mask(monkeypatch, name):
    def causal(segments):
        return torch.ones(len(segments), 1, *[segments.shape[1]] * 2, dtype=torch.bool).tril()

    monkeypatch.setattr(trees_module, "tree_mask", causal)
    assert not checked(with_heads(tiny.tune(name)), "rows").passed


@pytest.mark.parametrize("name", ["lora", "ia3", "prefix"])
def test_the_self_check_finds_a_wrong_packing(monkeypatch, name):
    one_branch = lambda prefixes, own: Packing(prefixes, tuple((sum(lengths),) for lengths in own))  # noqa: E731
    monkeypatch.setattr(trees_module, "Packing", one_branch)
    assert not checked(with_heads(tiny.tune(name)), "packed").passed


@every_layout
def test_the_self_check_finds_wrong_positions(monkeypatch, layout):
    right = trees_module._laid_out

    def counted_on(*args):
        batch, segments = right(*args)
        positions = torch.arange(batch.input_ids.shape[1]).expand_as(batch.input_ids)
        return replace(batch, position_ids=positions), segments

    monkeypatch.setattr(trees_module, "_laid_out", counted_on)
    assert not checked(with_heads(tiny.tune("lora")), layout).passed


@every_layout
def test_the_self_check_holds_at_the_very_start_of_every_method(layout):
    """Before the first step LoRA's A has no gradient, since B is zero: the check must still mean something."""
    for name, options in tiny.method_cases():
        tuned = tiny.tune(name, **options)
        if tuned.packs and tuned.trainable():
            check = checked(tuned, layout)
            assert check.passed, (name, check)


@every_layout
def test_the_self_check_leaves_no_gradient_and_no_state(layout):
    tuned = with_heads(tiny.tune("lora"))
    checked(tuned, layout)
    assert all(p.grad is None for p in tuned.base.parameters())


def test_a_mask_is_never_a_row_of_nothing():
    assert tree_mask(torch.full((1, 5), -1)).any(-1).all()
