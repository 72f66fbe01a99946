"""Answers by trees are those of transformers' generate, token for token, and compute what is shared once."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace

import pytest
import torch

import tiny
from peft_mllm import decoding
from peft_mllm.data.trees import collate_padded, pack, plant
from peft_mllm.decoding import Decoder
from peft_mllm.errors import ModelError
from peft_mllm.evaluation import evaluate, options
from peft_mllm.exactness import doubt, same_logits
from peft_mllm.models.generic.family import Generic
from peft_mllm.spec import GenerationSpec
from peft_mllm.world import World

pytestmark = pytest.mark.filterwarnings("ignore")
ONE = "<image>\n"
NEW = 9
AHEAD = {"paligemma", "gemma3"}  # their images look ahead, so nothing of theirs is a tree
OFTEN = ["llava", "qwen_vl", "qwen2_5_vl", "mllama"]  # one axis, its own modelling, three axes, layers that look across
EVERY = [*OFTEN, *(pytest.param(name, marks=pytest.mark.slow) for name in Generic.tiny_members() if name not in OFTEN)]
RECORDS = [
    *(tiny.record(f"a{i}", f"{ONE}What is at place {i}{' or near it' * (i % 3)}?", "x", images=(1,)) for i in range(5)),
    tiny.record("b", ONE + "Where?", "x", images=(2,)),
    *(tiny.record(f"c{i}", f"{ONE}Is it {i}?", "x", images=(3,)) for i in range(2)),
    tiny.record("turns", ONE + "Where is it?", "top left", "And now?", "gone", images=(1,)),
    tiny.record("again", ONE + "Where?", "x", images=(2,), system="Be brief."),
    tiny.record("twice", "Compare <image> with <image>.", "x", images=(1, 1)),
    tiny.record("text", "How many are two and two?", "x"),
    tiny.record("twice too", "Compare <image> with <image>, please.", "x", images=(1, 1)),
]


@functools.cache
def made(name):
    if name not in Generic.tiny_members():
        return tiny.family(name)
    try:
        family = Generic.tiny_member(name, image_size=28)
    except ModelError as error:
        pytest.skip(str(error))  # a processor's library is not here
    with torch.no_grad():
        for parameter in family.model.parameters():
            parameter.mul_(5 if parameter.ndim > 1 else 1)  # see tiny.family
    return family


def tuned_on(name, method="lora", *, attn=None, **config):
    """A tiny member with a method that is off its start."""
    family = copy.copy(made(name))
    family.model = copy.deepcopy(family.model)
    if attn:
        family.model.set_attn_implementation(attn)
    family.model.generation_config.update(**config)
    tuned = tiny.stir(tiny.tune(method, on=family), spread=0.1) if method != "none" else tiny.tune(method, on=family)
    tuned.model.eval()
    return tuned


def prompts(tuned, name="llava", records=RECORDS):
    # Mllama's text before an image looks evenly at all there is room for, so rows need equal numbers
    chosen = [each for each in records if name != "mllama" or len(each.images) == 1]
    return [tuned.family.encode(each, answer=False) for each in chosen]


def told(tuned, **more):
    return options(tuned, GenerationSpec(**more), NEW)


def cut(row, stops):
    end = next((i + 1 for i, token in enumerate(row) if token in stops), len(row))
    return row[:end]


def plain(tuned, samples, how):
    """What transformers' generate says, without the padding after an end."""
    batch = collate_padded(samples, pixels=tuned.family.pixels, pad_id=how["pad_token_id"], left=True)
    return [cut(row, how["eos_token_id"]) for row in tuned.generate(batch, **how).tolist()]


def early(answers):
    """Tokens that end some of the answers at different places, if they are taken for stops."""
    lengths = range(1, NEW)
    return [answers[i % len(answers)][length] for i, length in enumerate(lengths)][:3]


@pytest.mark.parametrize("method", ["none", "lora", "prefix"])
@pytest.mark.parametrize("name", EVERY)
def test_answers_are_those_of_generate(name, method, monkeypatch):
    """Prefixes and questions of many lengths, an image with one and with five questions, and twice in one prompt."""
    tuned = tuned_on(name, method)
    how, samples = told(tuned), None
    assert tuned.trees == (name not in AHEAD)
    if not tuned.trees:
        assert not Decoder(tuned, how).takes([tuned.family.encode(each, answer=False) for each in RECORDS[:5]])
        return
    samples = prompts(tuned, name)
    assert sorted(len(tree.samples) for tree in plant(samples, share=True))[-2:] == [2, 6] or name == "mllama"
    decoder = Decoder(tuned, how)
    assert decoder.takes(samples)
    expected = plain(tuned, samples, how)
    assert len(set(map(tuple, expected))) > 4, "a model that always says the same shows nothing"
    assert decoder.answer(samples) == expected
    how["eos_token_id"] = [*how["eos_token_id"], *early(expected)]
    ended = plain(tuned, samples, how)
    assert len(set(map(len, ended))) > 2
    assert Decoder(tuned, how).answer(samples) == ended
    monkeypatch.setattr(decoding, "ABREAST", 2)
    monkeypatch.setattr(decoding, "LEAVE", 1.0)
    assert Decoder(tuned, how).answer(samples[::-1]) == ended[::-1]


@pytest.mark.parametrize("method", ["ia3", "adapter", "full"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_with_other_methods_and_backends(method, attn):
    tuned = tuned_on("llava", method, attn=attn)
    samples, how = prompts(tuned), told(tuned)
    decoder = Decoder(tuned, how)
    assert decoder.takes(samples)
    assert decoder.answer(samples) == plain(tuned, samples, how)


def test_one_prompt_is_answered_as_many_are():
    tuned = tuned_on("llava")
    samples, how = prompts(tuned), told(tuned)
    decoder = Decoder(tuned, how)
    assert decoder.takes(samples)
    assert [decoder.answer([sample])[0] for sample in samples] == decoder.answer(samples)
    assert decoder.answer([samples[0]] * 2) == decoder.answer(samples[:1]) * 2
    how["max_new_tokens"] = 1
    assert Decoder(tuned, how).answer(samples) == [row[:1] for row in decoder.answer(samples)]


def test_a_packed_batch_before_it_leaves_nothing_behind():
    tuned = tuned_on("llava")
    samples = prompts(tuned)
    expected = Decoder(tuned, told(tuned)).answer(samples)
    trees = plant(tiny.samples(tuned.family), share=True)
    with torch.no_grad():
        tuned.answer_logits(pack(trees, pixels=tuned.family.pixels, pad_id=0))
    assert Decoder(tuned, told(tuned)).answer(samples) == expected


def test_a_penalty_of_repetition_is_the_models_own():
    plainly, punished = tuned_on("llava"), tuned_on("llava", repetition_penalty=1.7)
    samples, how = prompts(punished), told(punished)
    alone = [plain(punished, [sample], how)[0] for sample in samples]
    assert Decoder(punished, how).answer(samples) == alone
    assert Decoder(plainly, how).answer(samples) != alone


def test_in_bfloat16_it_is_proven_as_well():
    tuned = replace(tuned_on("llava"), bf16=True)
    samples = prompts(tuned)
    decoder = Decoder(tuned, told(tuned))
    assert decoder.takes(samples)
    assert set(map(len, decoder.answer(samples))) <= set(range(1, NEW + 1))


# --- what it saves ---


def test_a_prefix_is_computed_once_and_what_is_done_leaves():
    tuned = tuned_on("llava")
    samples, how = prompts(tuned, records=RECORDS[:8]), told(tuned)
    decoder = Decoder(tuned, how)
    expected = decoder.answer(samples)
    how["eos_token_id"] = [row[0] for row in expected[:5]]  # the first image's are done at once
    shapes = []
    layer = tuned.base.get_submodule(f"{tuned.family.anatomy.layers}.0")
    hook = layer.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape[:2])))
    said = Decoder(tuned, how).answer(samples)
    hook.remove()
    trees = plant(samples, share=True)
    prefix = max(decoding._shared(tree) for tree in trees)
    questions = max(sum(len(s.ids) - decoding._shared(tree) for s in tree.samples) for tree in trees)
    assert shapes[:2] == [(3, prefix), (3, questions)]
    longest = [max(len(said[samples.index(sample)]) for sample in tree.samples) for tree in trees]
    assert min(longest) == 1
    assert [rows for rows, _ in shapes[2:]] == [sum(n > step for n in longest) for step in range(1, max(longest))]
    computed = sum(rows * width for rows, width in shapes)
    assert computed < 0.6 * 8 * max(len(sample.ids) for sample in samples)


# --- where transformers' generate is asked ---


@pytest.mark.parametrize(
    "config",
    [{"suppress_tokens": [5]}, {"min_new_tokens": 2}, {"no_repeat_ngram_size": 2}],
    ids=lambda c: next(iter(c)),
)
def test_rules_that_are_not_followed_here_are_left_to_generate(config):
    tuned = tuned_on("llava", **config)
    assert not Decoder(tuned, told(tuned)).takes(prompts(tuned))


def test_options_that_are_not_followed_here_are_left_to_generate():
    tuned = tuned_on("llava")
    samples = prompts(tuned)
    for how in (told(tuned, do_sample=True), told(tuned, num_beams=2), told(tuned) | {"stop_strings": "x"}):
        assert not Decoder(tuned, how).takes(samples)
    assert not Decoder(replace(tuned, trees=False), told(tuned)).takes(samples)
    assert Decoder(tuned, told(tuned)).takes(samples)


def test_prompts_that_share_nothing_are_left_to_generate():
    tuned = tuned_on("llava")
    samples = prompts(tuned)
    assert not Decoder(tuned, told(tuned)).takes([samples[i] for i in (0, 5, 6, 10, 11)])


def test_prompts_whose_length_turns_their_first_tokens_are_left_to_generate():
    """Qwen-VL's rotary angles go by the prompt's length, once that is past its pretraining's."""
    tuned = tuned_on("qwen_vl")
    samples = prompts(tuned)
    longest = max(len(sample.ids) for sample in samples)
    assert tuned.family.reach == tuned.base.config.seq_length > longest
    tuned.family.reach = longest - 1
    assert not Decoder(tuned, told(tuned)).takes(samples)
    tuned.family.reach = longest
    assert Decoder(tuned, told(tuned)).takes(samples)


# --- the proof ---


def all_before(segments, *, last):
    """A mask by which a question sees those beside it."""
    place = torch.arange(segments.shape[1])
    return (place <= place[-last:, None]).expand(len(segments), 1, last, -1)


def counted_on(branch):
    """An answer's token where it would stand in the cache."""
    piece = decoding_next(branch)
    return replace(piece, positions=piece.positions + 7)


decoding_next = decoding._next


@pytest.mark.parametrize(("name", "wrong"), [("tree_mask", all_before), ("_next", counted_on)])
def test_the_proof_finds_what_is_wrong_and_generate_answers(name, wrong, monkeypatch):
    tuned = tuned_on("llava")
    samples = prompts(tuned)
    monkeypatch.setattr(decoding, name, wrong)
    assert not Decoder(tuned, told(tuned)).takes(samples)
    how = {"metric": "exact", "max_new_tokens": NEW, "generation": GenerationSpec(), "batch_size": 9, "seed": 1}
    by_generate = evaluate(replace(tuned, trees=False, proofs={}), RECORDS, world=World(), **how)
    assert by_generate.proofs == {}
    tuned.proofs.clear()
    said = []
    for _ in range(2):
        failed = evaluate(tuned, RECORDS, world=World(), note=said.append, **how)
        assert failed.answers == by_generate.answers
        proof = failed.summary()["proofs"]["decoding"]
        assert not proof["passed"]
        assert proof["difference"] > proof["tolerance"] > 0
    assert len(said) == 1, "a model's failure is said once, however often it is asked"
    assert said[0].startswith("WARNING: on this model, answers to an image's questions together")
    assert f"differ by {proof['difference']:.1e}" in said[0]
    monkeypatch.undo()
    tuned.proofs.clear()
    passed = evaluate(tuned, RECORDS, world=World(), note=said.append, **how)
    assert passed.answers == by_generate.answers
    assert passed.summary()["proofs"]["decoding"]["passed"]
    assert len(said) == 1


@pytest.mark.parametrize("trouble", [AttributeError("no such cache"), RuntimeError("sizes"), torch.OutOfMemoryError()])
def test_a_model_whose_cache_is_another_is_asked_by_generate(trouble, monkeypatch):
    tuned = tuned_on("llava")

    def fails(*args, **kwargs):
        raise trouble

    monkeypatch.setattr(decoding, "DynamicCache", fails)
    if isinstance(trouble, torch.OutOfMemoryError):
        with pytest.raises(torch.OutOfMemoryError):
            Decoder(tuned, told(tuned)).takes(prompts(tuned))
    else:
        assert not Decoder(tuned, told(tuned)).takes(prompts(tuned))
        assert f"cannot be computed: {type(trouble).__name__}: {trouble}." in doubt(
            "decoding", tuned.proofs["decoding"]
        )


def test_logits_that_are_not_finite_prove_nothing():
    tuned = tuned_on("llava")
    plain = tiny.padded(tuned.family, tiny.samples(tuned.family))
    with torch.no_grad():
        logits = tuned.answer_logits(plain)
    assert same_logits(tuned, logits + 3, plain).passed, "a constant changes no probability"
    assert same_logits(tuned, logits * torch.nan, plain).why == "there its logits are not finite"
    assert not same_logits(tuned, logits * torch.nan, plain).passed
    next(iter(tuned.decoder.parameters())).data.fill_(torch.nan)
    proof = same_logits(tuned, logits, plain)
    assert (proof.passed, proof.why) == (False, "its logits are not finite")


def test_it_is_proven_once(monkeypatch):
    tuned = tuned_on("llava")
    samples, proofs = prompts(tuned), []
    real = decoding._prove
    monkeypatch.setattr(decoding, "_prove", lambda *args: (proofs.append(1), real(*args))[1])
    decoder = Decoder(tuned, told(tuned))
    assert decoder.takes(samples)
    assert decoder.takes(samples[:2])
    assert proofs == [1]
