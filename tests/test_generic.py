"""The generic family: each tiny member reads as its own processor does, and is tuned as any other model."""

from __future__ import annotations

import copy
import functools
import json

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, Gemma2Config

import tiny
from peft_mllm.data.encode import IGNORED
from peft_mllm.data.trees import plant
from peft_mllm.errors import DataError, ModelError
from peft_mllm.loading import load_family
from peft_mllm.models.base import Loading
from peft_mllm.models.generic.family import Generic
from peft_mllm.models.generic.tiny import MEMBERS
from peft_mllm.spec import ModelSpec
from peft_mllm.tuned import load_adapter, trained_parts, untouched

pytestmark = pytest.mark.filterwarnings("ignore")
METHODS = ["lora", "ia3", "adapter", "prefix", "full", "layernorm"]
ONE_TURN = {"paligemma"}  # without a chat template: one question about images
ALIKE = {"mllama"}  # its text before an image looks evenly at all there is room for, so rows need equal numbers
every_member = pytest.mark.parametrize("member", list(MEMBERS))
every_method = pytest.mark.parametrize("name", METHODS)
OFTEN = {"qwen2_5_vl", "mllama"}  # several axes of positions; layers that look across: the others when asked (slow)
some_members = pytest.mark.parametrize(
    "member", [name if name in OFTEN else pytest.param(name, marks=pytest.mark.slow) for name in MEMBERS]
)


@functools.cache
def _made(member):
    try:
        made = Generic.tiny_member(member, image_size=28)
    except ModelError as error:
        pytest.skip(str(error))  # a processor's library is not here
    with torch.no_grad():
        for parameter in made.model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)  # see tiny.family
    return made


def family(member):
    """A member with a model of its own; the processor is shared, since making and comparing one takes time."""
    made = copy.copy(_made(member))
    made.model = copy.deepcopy(made.model)
    return made


def records(member):
    """Conversations that a member reads, several of them about one image."""
    if member in ONE_TURN:
        return [each for each in tiny.mixed_records() if len(each.images) == 1 and len(each.turns) == 2]
    if member in ALIKE:
        return [each for each in tiny.mixed_records() if len(each.images) == 1]
    return tiny.mixed_records()


def messages(record):
    """A record in the form of transformers' chat templates."""
    said = []
    for turn in record.turns:
        parts = []
        for i, text in enumerate(turn.text.split("<image>")):
            parts += [{"type": "image"}] if i else []
            parts += [{"type": "text", "text": text.strip("\n")}] if text.strip("\n") else []
        said.append({"role": turn.role, "content": parts})
    return said


def own_inputs(fam, record, *, answer):
    """What the member's own processor and chat template make of a record."""
    images = [source.load() for source in record.images]
    if fam.chat is None:
        text = "<image>" * len(images) + record.turns[0].text.replace("<image>", "").strip()
        more = {"suffix": [record.answer]} if answer else {}
        return fam.processor(text=[text], images=[images], return_tensors="pt", **more)
    turns = messages(record)
    text = fam.tokenizer.apply_chat_template(
        turns if answer else turns[:-1], chat_template=fam.processor.chat_template, tokenize=False,
        add_generation_prompt=not answer,
    )  # fmt: skip
    more = {"add_special_tokens": False} if text.startswith("<s>") else {}
    return fam.processor(text=[text], images=[images] if images else None, return_tensors="pt", **more)


# --- reading ---


@every_member
@pytest.mark.parametrize("answer", [False, True], ids=["prompt", "whole"])
def test_it_reads_as_its_own_processor(member, answer):
    fam = family(member)
    for record in records(member):
        sample = fam.encode(record, answer=answer)
        expected = own_inputs(fam, record, answer=answer)
        wanted = tuple(expected["input_ids"][0].tolist())
        if answer and not fam._template_ends:
            # the end token stands in the place of what the template writes after an answer
            assert sample.ids[-1] == fam.tokenizer.eos_token_id
            wanted = (*wanted[: len(sample.ids) - 1], sample.ids[-1])
        assert sample.ids == wanted
        for name, values in sample.extras.items():
            told = tuple(expected[name][0].tolist()) if name in expected else values
            assert values == (told if len(told) == len(values) else (*told, 0))


@every_member
@pytest.mark.parametrize("said", ["red", " a red one ", "Grüße, 世界!", "two\nlines", "\nbelow", "USER: ASSISTANT:"])
def test_what_is_learned_is_the_answer_and_its_end(member, said):
    fam = family(member)
    record = tiny.record("x", "<image>What is it?", said, images=(1,))
    sample, prompt = fam.encode(record), fam.encode(record, answer=False)
    assert sample.ids[: len(prompt.ids)] == prompt.ids
    learned = [i for i, label in enumerate(sample.labels) if label != IGNORED]
    assert learned == list(range(len(prompt.ids), len(prompt.ids) + len(learned)))
    assert all(sample.labels[i] == sample.ids[i] for i in learned)
    text = fam.tokenizer.decode([sample.ids[i] for i in learned])
    assert sample.ids[learned[-1]] in fam.stops
    end = fam.tokenizer.convert_ids_to_tokens(sample.ids[learned[-1]])
    # a template may put a space before an answer, and one that has no end of its own loses what stood there
    assert text.removesuffix(end).strip() == said.strip()


@every_member
def test_each_of_several_answers_is_learned(member):
    if member in ONE_TURN:
        pytest.skip("no chat template")
    fam = family(member)
    sample = fam.encode(tiny.record("x", "<image>A?", "one", "B?", "two", "C?", "one", images=(1,), system="Be brief."))
    stretches, last = [], None
    for i, label in enumerate(sample.labels):
        if label != IGNORED:
            stretches = [*stretches, [label]] if last != i - 1 else [*stretches[:-1], [*stretches[-1], label]]
            last = i
    told = [fam.tokenizer.decode(stretch, skip_special_tokens=True).strip() for stretch in stretches]
    assert told == ["one", "two", "one"]
    ended = [stretch[-1] in fam.stops for stretch in stretches]
    assert ended == ([True] * 3 if fam._template_ends else [False, False, True])


@every_member
def test_padded_rows_are_the_models_own_computation(member):
    """Each row of a batch has the logits of the model on the processor's own inputs, one record at a time."""
    fam = family(member)
    tuned = untouched(fam)
    chosen = records(member)
    of = tiny.samples(fam, chosen)
    with torch.no_grad():
        batch = tiny.padded(fam, of)
        together = tuned.answer_logits(batch)
        for i, record in enumerate(chosen):
            expected = own_inputs(fam, record, answer=fam._template_ends)
            expected.pop("labels", None)
            logits = fam.model(**expected).logits[0]
            columns = batch.columns[(batch.owners == i)]
            keep = columns < len(logits)
            difference = (together[batch.owners == i][keep] - logits[columns[keep]]).abs().max().item()
            assert difference <= 2e-5 * logits.abs().max().item(), (record.id, difference)


@every_member
def test_generation_is_transformers_own(member):
    fam = family(member)
    tuned = untouched(fam)
    told = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
    chosen = records(member)[:5]
    alone = []
    for record in chosen:
        inputs = own_inputs(fam, record, answer=False)
        inputs.pop("labels", None)
        alone.append(fam.model.generate(**inputs, **told)[:, inputs["input_ids"].shape[1] :])
    together = tuned.generate(tiny.prompts(fam, chosen), **told)
    assert torch.equal(together, torch.cat(alone))


@every_member
@pytest.mark.parametrize("name", ["lora", "adapter", "ia3", "prefix"])
def test_trees_are_exact_or_refused(member, name):
    fam = family(member)
    tuned = tiny.stir(tiny.tune(name, on=fam, parts={"connector": True}))
    tuned.model.train()
    assert tuned.trees == (member not in {"paligemma", "gemma3"})
    if not tuned.trees:
        return
    of = tiny.samples(fam, records(member))
    assert any(len(tree.samples) > 1 and tree.shared >= of[0].image_end > 0 for tree in plant(of, share=True))
    gradients = []
    for batch in (tiny.padded(fam, of), tiny.shared(fam, of)):
        tuned.answer_losses(batch).mean().backward()
        gradients.append(
            torch.cat(
                [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in tuned.trainable().values()]
            )
        )
        tuned.model.zero_grad()
    plain, shared = gradients
    assert (shared - plain).norm() <= 1e-5 * plain.norm()


def test_logits_that_are_more_than_the_heads():
    """PaliGemma 2's are bent by a tanh after the head, for training as in the model itself."""
    made = family("paligemma")
    config = copy.deepcopy(made.model.config)
    config.text_config = Gemma2Config(**{
        **config.text_config.to_dict(), "model_type": "gemma2", "final_logit_softcapping": 0.5, "sliding_window": 64,
        "attn_logit_softcapping": None, "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 8,
    })  # fmt: skip
    torch.manual_seed(0)
    bent = Generic(AutoModelForImageTextToText.from_config(config).eval(), made.processor)
    with torch.no_grad():
        for parameter in bent.model.parameters():
            parameter.mul_(5 if parameter.ndim > 1 else 1)
        batch = tiny.padded(bent, tiny.samples(bent, records("paligemma")[:3]))
        ours = untouched(bent).answer_logits(batch)
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, **batch.pixels, **batch.extras}
        theirs = bent.model(**inputs).logits[batch.rows, batch.columns]
    assert bent._plain_head == (theirs.abs().max() > 0.5)  # some versions of transformers leave it out
    assert torch.allclose(ours, theirs, atol=1e-6)
    tuned = tiny.tune("lora", on=bent)
    assert len(set(tiny.train(tuned, batch, steps=3, lr=0.01))) == 3


def test_a_batch_with_and_without_images():
    """Mllama pairs images with rows; its text-only rows have none."""
    fam = family("mllama")
    of = tiny.samples(fam, [tiny.mixed_records()[i] for i in (0, 1, 5)])
    try:
        batch = tiny.padded(fam, of)
    except DataError as error:
        pytest.skip(str(error))  # an older processor
    assert batch.pixels["cross_attention_mask"].shape[:3] == (*batch.input_ids.shape, 2)
    assert batch.pixels["cross_attention_mask"].flatten(1).any(1).tolist() == [True, False, True]
    with torch.no_grad():
        assert untouched(fam).answer_logits(batch).isfinite().all()


def test_a_template_that_takes_strings_alone():
    """Some write a list of parts with brackets and all, a system text above all."""
    fam = family("internvl")
    text = fam.processor.chat_template
    system = "{% if turn['role'] == 'system' %}{{ turn['content'] }}{% else %}"
    changed = text.replace("{% for part", system + "{% for part").replace(
        "{% endfor %}{{", "{% endfor %}{% endif %}{{", 1
    )
    other = with_template("internvl", lambda _: changed)
    record = tiny.record("x", "<image>What?", "red", images=(1,), system="Be brief.")
    assert other.encode(record) == fam.encode(record)


# --- tuning ---


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@some_members
@every_method
def test_only_what_is_asked_for_trains_and_the_loss_falls(member, name):
    fam = family(member)
    tuned = tiny.tune(name, on=fam, parts={"connector": name != "full"})
    wanted = {"llm"} if name == "full" else {"llm", "connector"}
    assert {fam.anatomy.part_of(each) for each in tuned.trainable()} == wanted
    trained_parts(tuned, dict.fromkeys(("llm", "connector", "vision"), 1e-3), wanted)
    before = state(tuned.model)
    batch = tiny.batch_for(tuned, tiny.samples(fam, records(member)[:4]))
    losses = list(tiny.train(tuned, batch, steps=6, lr=0.02))
    assert min(losses[-3:]) < losses[0] - 2e-3
    moved = {each for each, value in tuned.model.state_dict().items() if not torch.equal(before[each], value)}
    # what trains is tied to nothing else, but for an embedding that is the head as well
    tied = {"lm_head.weight"} if name == "full" else set()
    assert moved <= set(tuned.trainable()) | tied
    assert {fam.anatomy.part_of(each) for each in moved} == wanted


@some_members
@pytest.mark.parametrize("name", ["lora", "prefix"])
def test_every_part_can_be_opened(member, name):
    fam = family(member)
    tuned = tiny.tune(name, on=fam, parts={"connector": True, "vision": True})
    assert {fam.anatomy.part_of(each) for each in tuned.trainable()} == {"llm", "connector", "vision"}
    before = state(tuned.model)
    list(tiny.train(tuned, tiny.batch_for(tuned, tiny.samples(fam, records(member)[:2])), steps=1, lr=0.01))
    moved = {each for each, value in tuned.model.state_dict().items() if not torch.equal(before[each], value)}
    assert {fam.anatomy.part_of(each) for each in moved} == {"llm", "connector", "vision"}
    assert moved <= set(tuned.trainable())


@some_members
@every_method
def test_checkpointing_gives_the_same_gradients(member, name):
    gradients = []
    for checkpointing in (False, True):
        tuned = tiny.tune(
            name,
            on=family(member),
            parts={"connector": name != "full", "recompute": "full" if checkpointing else "none"},
        )
        tiny.stir(tuned)
        tuned.model.train()
        tuned.answer_losses(tiny.batch_for(tuned, tiny.samples(tuned.family, records(member)[:3]))).mean().backward()
        gradients.append({each: p.grad for each, p in tuned.trainable().items() if p.grad is not None})
    plain, recomputed = gradients
    assert plain.keys() == recomputed.keys()
    for each, gradient in plain.items():
        assert torch.allclose(gradient, recomputed[each], rtol=1e-5, atol=1e-8), each


@some_members
@every_method
def test_it_answers_the_same_with_and_without_cache(member, name):
    tuned = tiny.stir(tiny.tune(name, on=family(member)), spread=0.1)
    if member == "paligemma" and "_update_model_kwargs_for_generation" not in vars(type(tuned.base)):
        pytest.skip("without a cache, this transformers takes generated tokens for the prompt's")
    batch = tiny.prompts(tuned.family, records(member)[:2])
    told = {"do_sample": False, "max_new_tokens": 3, "min_new_tokens": 3}
    assert torch.equal(tuned.generate(batch, use_cache=True, **told), tuned.generate(batch, use_cache=False, **told))


@some_members
@every_method
def test_a_saved_adapter_gives_the_same_logits(member, name, tmp_path):
    tuned = tiny.stir(tiny.tune(name, on=family(member), parts={"connector": name != "full"}))
    batch = tiny.padded(tuned.family, tiny.samples(tuned.family, records(member)[:3]))
    with torch.no_grad():
        expected = tuned.answer_logits(batch)
        plain = untouched(family(member)).answer_logits(batch)
        tuned.save(tmp_path)
        if name == "full":
            again = untouched(Generic.load(tmp_path, loading=Loading("float32")))
        else:
            again = load_adapter(family(member), tmp_path)
        assert torch.equal(again.answer_logits(batch), expected)
    assert not torch.allclose(plain, expected, atol=1e-3)


@every_member
def test_images_are_seen(member):
    fam = family(member)
    asked = [tiny.record("x", "<image>What is it?", "red", images=(n,)) for n in (1, 2)]
    with torch.no_grad():
        one, two = (untouched(fam).answer_logits(tiny.padded(fam, tiny.samples(fam, [each]))) for each in asked)
    assert (one - two).abs().max() > 1e-3 * one.abs().max()


# --- loading and saving ---


def legacy(directory):
    """Lay a saved directory out as older checkpoints on the hub: a file for each part, the template in JSON."""
    settings = json.loads((directory / "processor_config.json").read_text())
    images = settings.pop("image_processor")
    images["processor_class"] = settings["processor_class"]
    images["image_processor_type"] = images["image_processor_type"].removesuffix("Pil")
    (directory / "preprocessor_config.json").write_text(json.dumps(images))
    if video := settings.pop("video_processor", None):
        (directory / "video_preprocessor_config.json").write_text(json.dumps(video))
    if (directory / "chat_template.jinja").is_file():
        template = (directory / "chat_template.jinja").read_text()
        (directory / "chat_template.json").write_text(json.dumps({"chat_template": template}))
        (directory / "chat_template.jinja").unlink()
    if len(settings) > 1:
        (directory / "processor_config.json").write_text(json.dumps(settings))
    else:
        (directory / "processor_config.json").unlink()


@every_member
def test_a_saved_directory_is_the_same_model(member, tmp_path):
    fam = family(member)
    fam.save(tmp_path)
    record = records(member)[0]
    for layout in ("today's", "legacy"):
        if layout == "legacy":
            legacy(tmp_path)
        again = load_family(ModelSpec(path=str(tmp_path)), dtype="float32")
        assert isinstance(again, Generic)
        assert again.anatomy == fam.anatomy
        assert again.encode(record) == fam.encode(record)
        assert again.stops == fam.stops
        batches = [tiny.padded(each, tiny.samples(each, records(member)[:3])) for each in (fam, again)]
        with torch.no_grad():
            one, two = (untouched(each).answer_logits(batch) for each, batch in zip((fam, again), batches, strict=True))
        assert torch.equal(one, two)


@pytest.mark.parametrize("member", ["llava_next", "idefics3", "paligemma", "gemma3", "mllama"])
def test_plain_transformers_loads_what_is_saved(member, tmp_path):
    """The others have a processor for videos, which transformers loads with torchvision only."""
    fam = family(member)
    fam.save(tmp_path)
    plain = copy.copy(fam)
    plain.processor = AutoProcessor.from_pretrained(tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert type(plain.processor).__name__ == type(fam.processor).__name__
    record = records(member)[0]
    ours, theirs = own_inputs(fam, record, answer=False), own_inputs(plain, record, answer=False)
    ours.pop("labels", None), theirs.pop("labels", None)
    assert ours.keys() == theirs.keys()
    assert torch.equal(ours["input_ids"], theirs["input_ids"])
    with torch.no_grad():
        assert torch.allclose(fam.model(**ours).logits, model(**theirs).logits, atol=1e-5)


def test_settings_for_videos_are_kept(tmp_path):
    fam = family("qwen2_5_vl")
    fam.save(tmp_path)
    settings = json.loads((tmp_path / "processor_config.json").read_text())
    settings["video_processor"] = {"video_processor_type": "Qwen2VLVideoProcessor", "fps": 3}
    (tmp_path / "processor_config.json").write_text(json.dumps(settings))
    again = Generic.load(tmp_path, loading=Loading("float32"))
    again.save(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "processor_config.json").read_text())
    assert written["video_processor"] == settings["video_processor"]
    assert written["processor_class"] == "Qwen2_5_VLProcessor"


def test_a_checkpoint_without_a_processor_is_a_clear_error(tmp_path):
    fam = family("internvl")
    fam.save(tmp_path)
    (tmp_path / "processor_config.json").unlink()
    with pytest.raises(ModelError, match="processor"):
        load_family(ModelSpec(path=str(tmp_path)), dtype="float32")


def test_tiny_members_by_name():
    assert (
        load_family(ModelSpec(path="tiny:generic/qwen3_vl@28"), dtype="float32").model.config.model_type == "qwen3_vl"
    )
    assert load_family(ModelSpec(path="tiny:generic@28"), dtype="float32").model.config.model_type == "internvl"
    with pytest.raises(ModelError, match="Did you mean 'qwen3_vl'"):
        load_family(ModelSpec(path="tiny:generic/qwen3vl"), dtype="float32")
    with pytest.raises(ModelError, match="no member"):
        load_family(ModelSpec(path="tiny:llava/qwen3_vl"), dtype="float32")


# --- what cannot be read ---


def test_an_image_word_in_the_text_is_refused():
    with pytest.raises(DataError, match="stands for an image"):
        family("qwen2_5_vl").encode(tiny.record("x", "<image>What is <|image_pad|>?", "red", images=(1,)))


def test_marks_must_agree_with_images():
    fam = family("internvl")
    with pytest.raises(DataError, match="2 <image> marks for 1 images"):
        fam.encode(tiny.record("x", "<image><image>?", "red", images=(1,)))
    with pytest.raises(DataError, match="not the user's"):
        fam.encode(tiny.record("x", "What?", "<image>", images=(1,)))


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (tiny.record("x", "What?", "red"), "no text alone"),
        (tiny.record("x", "<image>What?", "red", "And?", "no", images=(1,)), "one question and one answer"),
        (tiny.record("x", "<image>What?", "red", images=(1,), system="Be brief."), "one question and one answer"),
    ],
)
def test_without_a_template_only_a_question_is_read(record, said):
    with pytest.raises(DataError, match=said):
        family("paligemma").encode(record)


def with_template(member, change):
    """A member with another chat template."""
    fam = family(member)
    processor = copy.copy(fam.processor)
    processor.chat_template = change(processor.chat_template)
    return Generic(fam.model, processor)


def test_a_template_that_writes_earlier_turns_anew_is_refused():
    """Such as those that drop what was thought before an answer, once another turn follows."""

    def thinking(text):
        said, kept = "part['text']", "(part['text'] if outer.last else part['text'].split('</think>')[-1])"
        return text.replace(said, kept).replace("in messages %}", "in messages %}{% set outer = loop %}")

    fam = with_template("internvl", thinking)
    thought = "<think>hm</think>red"
    fam.encode(tiny.record("x", "<image>What?", thought, images=(1,)))
    with pytest.raises(DataError, match="earlier turns anew"):
        fam.encode(tiny.record("x", "<image>What?", thought, "And?", "no", images=(1,)))


def test_a_template_that_asks_otherwise_than_it_answers_is_refused():
    fam = family("internvl")
    asks = lambda text: text.replace('"<|im_start|>assistant\\n" }}{% endif', '"<|im_start|>bot\\n" }}{% endif')  # noqa: E731
    with pytest.raises((DataError, ModelError), match="other words"):
        with_template("internvl", asks).encode(records("internvl")[0])
    assert fam.chat is not None


def test_a_processor_that_reads_otherwise_is_refused():
    """What is read is compared with the processor's own reading before anything is trained."""
    fam = family("qwen2_5_vl")

    class Other(type(fam.processor)):
        def __call__(self, **given):
            read = super().__call__(**given)
            read["input_ids"] = [[7, *row] for row in read["input_ids"]]
            return read

    processor = copy.copy(fam.processor)
    processor.__class__ = Other
    with pytest.raises(ModelError, match="cannot be trained"):
        Generic(fam.model, processor)
