"""Talking with a model: the conversation, the stream of an answer, the adapter switched off, and what is saved."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

import tiny
from peft_mllm.chat.conversation import Conversation, see
from peft_mllm.chat.saving import save
from peft_mllm.chat.voice import GrowingText, Voice
from peft_mllm.data.formats import RecordFile
from peft_mllm.errors import DataError, MethodError
from peft_mllm.evaluation import ask, pad_token
from peft_mllm.loading import load_family
from peft_mllm.record import IMAGE_MARK, Turn
from peft_mllm.spec import ModelSpec
from peft_mllm.tasks import TASKS
from peft_mllm.tasks.scenes import ScenesOptions
from peft_mllm.tuned import load_adapter, untouched
from runs import command

TOLD = {"num_beams": 1, "do_sample": False}


@pytest.fixture(scope="module")
def embedded():
    return untouched(load_family(ModelSpec(path="embedded"), dtype="float32"))


@pytest.fixture(scope="module")
def scenes():
    return TASKS["scenes_at"](ScenesOptions(size={"test": 3}, seed=1)).records("test")[:]


@pytest.fixture
def picture(tmp_path):
    def made(number=1, **options):
        file = tmp_path / f"picture{number}.png"
        tiny.Picture(number, **options).load().save(file)
        return file

    return made


def evaluated(tuned, record, max_new_tokens=24):
    """What the evaluation would have got for an answer."""
    options = {"max_new_tokens": max_new_tokens, "eos_token_id": list(tuned.family.stops), **TOLD}
    sample = tuned.family.encode(record, answer=False)
    return ask(tuned, [sample], {**options, "pad_token_id": pad_token(tuned)})[0].text


# --- answers ---


def test_the_first_answer_is_the_evaluations(embedded, scenes, tmp_path):
    voice = Voice(embedded, max_new_tokens=24)
    for number, scene in enumerate(scenes):
        file = tmp_path / f"{number}.png"
        scene.images[0].load().save(file)
        asked = Conversation().ask(scene.turns[0].text.replace(IMAGE_MARK, ""), [see(file)])
        assert asked.turns[0] == scene.turns[0]
        answer = voice.answer(asked)
        assert answer.text == evaluated(embedded, scene)
        assert (answer.ended, answer.adapter) == ("itself", None)


@pytest.mark.parametrize("seed", range(4))
def test_the_pieces_are_the_whole(seed):
    """A random model says anything, half characters too."""
    tuned = untouched(tiny.family(seed=seed))
    for record in tiny.mixed_records():
        pieces: list[str] = []
        answer = Voice(tuned, max_new_tokens=24).answer(record, say=pieces.append)
        assert "".join(pieces) == answer.text
        assert all(pieces)
        if answer.ended == "itself":
            assert answer.text == evaluated(tuned, record)
        else:
            assert answer.tokens == 24
            assert evaluated(tuned, record).startswith(answer.text)


@pytest.mark.parametrize(
    "text",
    ["Grüße, 世界!", "日本語の文", "a 🦙 in two   spaces\n\n\tand a tab", "e\u0301 👩‍👩‍👧 x", "no", "", "ends in 🦙"],
)
def test_characters_of_many_tokens_appear_whole(embedded, text):
    tokenizer = embedded.family.tokenizer
    ids = tokenizer(f" {text}", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    growing = GrowingText(tokenizer)
    pieces = [growing.grow(ids[:end]) for end in range(1, len(ids) + 1)] + [growing.finish(ids, cut=False)]
    assert "".join(pieces) == growing.said == tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert not any("\ufffd" in piece for piece in pieces)
    assert len([piece for piece in pieces if piece]) >= min(2, len(text.split()))


def test_a_character_that_was_cut_is_left_out(embedded):
    tokenizer = embedded.family.tokenizer
    ids = tokenizer(" so 🦙", add_special_tokens=False)["input_ids"]
    growing = GrowingText(tokenizer)
    assert tokenizer.decode(ids[:-1]).endswith("\ufffd"), "a llama is several tokens"
    for end in range(1, len(ids)):
        growing.grow(ids[:end])
    assert growing.finish(ids[:-1], cut=True) == ""
    assert growing.said == "so"


def test_an_answer_is_stopped():
    talkative = untouched(tiny.family())
    heard: list[str] = []
    answer = Voice(talkative, max_new_tokens=200).answer(
        tiny.mixed_records()[0], say=heard.append, stop=lambda: len(heard) >= 3
    )
    assert answer.ended == "stopped"
    assert answer.text == "".join(heard)
    assert 3 <= answer.tokens < 200


def test_drawn_answers_differ_from_question_to_question():
    voice = Voice(untouched(tiny.family()), max_new_tokens=12, temperature=3.0)
    records = [Conversation().ask("What?", id=f"question {number}") for number in (1, 2, 1)]
    first, second, again = (voice.answer(record).text for record in records)
    assert first == again != second


def test_a_conversation_that_is_too_long_says_so(embedded):
    limit = embedded.decoder.config.max_position_embeddings
    voice = Voice(embedded, max_new_tokens=8)
    with pytest.raises(DataError, match=rf"too long: [\d,]+ tokens.*takes {limit:,}.*/undo"):
        voice.answer(Conversation().ask("word " * limit))


def test_an_answer_ends_where_the_model_does():
    family = tiny.family()
    family.model.get_submodule(family.anatomy.llm).config.max_position_embeddings = 100
    voice = Voice(untouched(family), max_new_tokens=512)
    record = Conversation().ask("What?")
    answer = voice.answer(record)
    assert answer.prompt_tokens + answer.tokens <= 100
    assert answer.ended == "length"


# --- the adapter switched off ---


def logits(tuned, batch):
    asked = tuned.base if tuned._through_base else tuned.model
    with torch.no_grad():
        found = asked(**tuned._inputs(batch)).logits
    return found[:, -batch.input_ids.shape[1] :]


SWITCHED = [case for case in tiny.method_cases() if case[0] not in ("none", "full")]


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("case", SWITCHED, ids=tiny.label)
def test_with_the_adapter_off_it_is_the_base_to_the_bit(case, attn):
    name, options = case
    family, base = tiny.family(attn=attn), untouched(tiny.family(attn=attn))
    parts = {"connector": True, "vision": name == "lora"}
    tuned = tiny.stir(tiny.tune(name, on=family, parts=parts, **options), spread=0.3)
    tuned.model.eval()
    trained = set(tuned.trainable())
    batch, question = tiny.padded(family, tiny.samples(family)), tiny.prompts(family, tiny.mixed_records()[:1])
    before, wanted = logits(tuned, batch), logits(base, batch)
    with tuned.untuned() as off:
        assert torch.equal(logits(off, batch), wanted)
        said = off.generate(question, do_sample=False, max_new_tokens=6)
    assert torch.equal(said, base.generate(question, do_sample=False, max_new_tokens=6))
    assert (before - wanted).abs().max() > 0.1
    assert torch.equal(logits(tuned, batch), before), "it is on again"
    assert set(tuned.trainable()) == trained


def test_it_is_on_again_after_an_error():
    tuned = tiny.stir(tiny.tune("prefix", parts={"connector": True}), spread=0.5)
    batch = tiny.padded(tuned.family, tiny.samples(tuned.family)[:1])
    before = logits(tuned, batch)
    with pytest.raises(ZeroDivisionError), tuned.untuned():
        raise ZeroDivisionError
    assert torch.equal(logits(tuned, batch), before)


def test_a_loaded_adapter_stays_frozen(tmp_path):
    tiny.stir(tiny.tune("lora", parts={"connector": True})).save(tmp_path)
    tuned = load_adapter(tiny.family(), tmp_path)
    before = set(tuned.trainable())
    with tuned.untuned():
        pass
    assert set(tuned.trainable()) == before


@pytest.mark.parametrize("name", ["none", "full"])
def test_what_has_no_adapter_cannot_be_switched(name):
    voice = Voice(tiny.tune(name))
    assert not voice.has_adapter
    with pytest.raises(MethodError, match="no adapter"):
        voice.answer(tiny.mixed_records()[0], adapter=False)


def test_what_moved_the_base_cannot_be_switched():
    with pytest.raises(MethodError, match="pissa"), tiny.tune("lora", init="pissa").untuned():
        pass
    biased = tiny.tune("peft", type="LORA", config={"r": 4, "bias": "all"})
    with pytest.raises(MethodError, match="biases"), biased.untuned():
        pass


# --- the conversation ---


def test_images_come_at_any_turn(picture):
    tuned = untouched(tiny.family())
    one, two, three = (see(picture(number)) for number in (1, 2, 3))
    talk = Conversation()
    talk = talk.answered(talk.ask("Hello"), "Hi")
    talk = talk.answered(talk.ask("And this?", [one]), "a")
    talk = talk.answered(talk.ask("These?", [two, three]), "b")
    record = talk.ask("So?")
    assert record.images == (one, two, three)
    assert [turn.text for turn in record.turns] == [
        "Hello", "Hi", "<image>\nAnd this?", "a", "<image>\n<image>\nThese?", "b", "So?", "",
    ]  # fmt: skip
    sample = tuned.family.encode(record, answer=False)
    assert sample.images == (one, two, three)
    assert Voice(tuned, max_new_tokens=4).answer(record).prompt_tokens == len(sample.ids)
    assert talk.undone().undone().ask("So?").images == ()


def test_the_image_of_a_later_turn_is_seen(picture):
    """The same words with another image have another answer."""
    voice = Voice(untouched(tiny.family()), max_new_tokens=8)
    talk = Conversation().answered(Conversation().ask("Hello"), "Hi")
    said = {voice.answer(talk.ask("What is it?", [see(picture(number))])).text for number in (1, 2, 3)}
    assert len(said) > 1


def test_marks_say_where_images_go(picture):
    images = [see(picture(number)) for number in (1, 2)]
    asked = Conversation().ask("Is <image> like <image>?", images)
    assert asked.turns[0].text == "Is <image> like <image>?"
    with pytest.raises(DataError, match="1 <image> marks for 2"):
        Conversation().ask("Is <image> it?", images)
    with pytest.raises(DataError, match="1 <image> marks for 0"):
        Conversation().ask("Is <image> it?")
    assert Conversation().ask("", images).turns[0].text == "<image>\n<image>"
    with pytest.raises(DataError, match="nothing to ask"):
        Conversation().ask("  ")
    with pytest.raises(DataError, match="UTF-8"):
        Conversation().ask("\udcff")


def test_the_system_turn():
    record = Conversation(system="Be brief.").ask("What?")
    assert record.turns[0] == Turn("system", "Be brief.")


def test_images_are_read_as_in_training(tmp_path):
    upright = Image.effect_noise((40, 30), 80).convert("RGB")
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    assert see(tmp_path / "turned.png").load().tobytes() == upright.tobytes()
    broken = (tmp_path / "turned.png").read_bytes()[:200]
    (tmp_path / "broken.png").write_bytes(broken)
    for name in ("broken.png", "none.png", "."):
        with pytest.raises(DataError, match=name.replace(".", r"\.") if name != "." else "folder"):
            see(tmp_path / name)


def test_an_image_stays_as_it_was_seen(picture):
    file = picture()
    seen = see(file)
    before = seen.load().tobytes()
    file.unlink()
    assert seen.load().tobytes() == before


# --- saving ---


def test_what_is_saved_can_be_trained_on(picture, tmp_path):
    talk = Conversation(system="Be brief.")
    talk = talk.answered(talk.ask("Hello"), "Hi, 世界")
    talk = talk.answered(talk.ask("These?", [see(picture(1)), see(picture(2))]), "the same")
    talk = talk.answered(talk.ask("And this?", [see(picture(1))]), "no")
    file = save(talk, tmp_path / "elsewhere" / "talks.jsonl")
    assert command("data", "check", file).code == 0
    (record,) = RecordFile(file)
    assert record.turns == talk.record().turns
    for image, seen in zip(record.images, talk.record().images, strict=True):
        assert image.load().tobytes() == seen.load().tobytes()
    assert len(list((tmp_path / "elsewhere" / "talks_images").iterdir())) == 2
    before = file.read_bytes()
    save(talk, file)
    assert file.read_bytes() == before, "the same conversation is not added twice"
    save(talk.undone(), file)
    assert file.read_bytes().startswith(before)
    assert len(RecordFile(file)) == 2
    said = command("data", "check", file, "--json")
    assert (said.code, json.loads(said.out)["used"]) == (0, 2)


def test_a_file_of_ones_own_is_added_to(tmp_path):
    talk = Conversation().answered(Conversation().ask("Hello"), "Hi")
    file = tmp_path / "mine.jsonl"
    own = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
    file.write_text(own)  # without a line break at its end
    save(talk, file)
    assert file.read_text().splitlines()[0] == own
    assert len(RecordFile(file)) == 2


@pytest.mark.parametrize("content", ["no JSON\n", '[{"id": 1}]', '{"x": 1}\n', "\xff\xfe"])
def test_another_file_is_left_alone(tmp_path, content):
    talk = Conversation().answered(Conversation().ask("Hello"), "Hi")
    file = tmp_path / "other.jsonl"
    file.write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError, match=r"other\.jsonl is there already"):
        save(talk, file)
    assert file.read_bytes() == content.encode("latin-1")


def test_nothing_and_empty_answers_are_not_saved(tmp_path):
    with pytest.raises(DataError, match="nothing was asked"):
        save(Conversation(), tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="question 1 is empty"):
        save(Conversation().answered(Conversation().ask("Hello"), ""), tmp_path / "a.jsonl")
    assert list(tmp_path.iterdir()) == []
