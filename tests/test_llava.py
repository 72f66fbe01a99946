"""LLaVA-1.5: the text, the labels, the tokens and the pixels are the original's."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import AutoProcessor, PreTrainedTokenizerFast

import tiny
from peft_mllm.assets import EMBEDDED
from peft_mllm.data.encode import IGNORED
from peft_mllm.errors import DataError, ModelError
from peft_mllm.models import MODELS
from peft_mllm.models.base import Loading
from peft_mllm.models.llava import image_tokens, load_image_processor, pad_to_square
from peft_mllm.record import ImageSource

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@pytest.fixture(scope="module")
def llava():
    return tiny.family("llava")


@pytest.fixture(scope="module")
def embedded():
    return MODELS["llava"].load(EMBEDDED, loading=Loading("float32"))


def text_of(family, sample):
    """The sample as text, each image as <image>."""
    image = family.model.config.image_token_id
    ids = [token for i, token in enumerate(sample.ids) if token != image or sample.ids[i - 1] != image]
    return family.tokenizer.decode(ids)


def learned(family, sample):
    """The stretches of text that are learned."""
    stretches, last = [], None
    for i, label in enumerate(sample.labels):
        if label != IGNORED:
            assert label == sample.ids[i]
            stretches = [*stretches, [label]] if last != i - 1 else [*stretches[:-1], [*stretches[-1], label]]
            last = i
    return [family.tokenizer.decode(stretch) for stretch in stretches]


def test_it_is_vicuna_v1(llava):
    asked = tiny.record("x", "<image>\nWhat is it?", "A cat.", "And now?", "It is gone.", images=(1,))
    sample = llava.encode(asked)
    expected = f"<s>{SYSTEM} USER: <image>\nWhat is it? ASSISTANT: A cat.</s>USER: And now? ASSISTANT: It is gone.</s>"
    assert text_of(llava, sample) == expected
    assert [said.strip() for said in learned(llava, sample)] == ["A cat.</s>", "It is gone.</s>"]
    assert sample.ids.count(llava.model.config.image_token_id) == 4
    assert sample.answer_tokens == sum(label != IGNORED for label in sample.labels)
    assert sample.image_end == max(i for i, t in enumerate(sample.ids) if t == llava.model.config.image_token_id) + 1


def test_a_prompt_ends_where_the_answer_begins(llava):
    asked = tiny.record("x", "<image>\nWhat is it?", "A cat.", "And now?", "It is gone.", images=(1,))
    prompt, whole = llava.encode(asked, answer=False), llava.encode(asked)
    assert text_of(llava, prompt).endswith("USER: And now? ASSISTANT:")
    assert "A cat.</s>" in text_of(llava, prompt)
    assert whole.ids[: len(prompt.ids)] == prompt.ids
    last = [i for i, label in enumerate(whole.labels) if label != IGNORED and i >= len(prompt.ids)]
    assert last == list(range(len(prompt.ids), len(whole.ids)))  # nothing between prompt and answer


@pytest.mark.parametrize("answer", ["yes", "A", "2", " spaced ", "</s>", "Grüße, 世界!", "a\nb", "USER: ha ASSISTANT:"])
def test_prompt_and_answer_meet_at_a_token(llava, answer):
    asked = tiny.record("x", "<image>\nWhat is it?", answer, images=(1,))
    prompt, whole = llava.encode(asked, answer=False), llava.encode(asked)
    assert whole.ids[: len(prompt.ids)] == prompt.ids
    assert set(whole.labels[: len(prompt.ids)]) == {IGNORED}
    assert whole.labels[len(prompt.ids) :] == whole.ids[len(prompt.ids) :]
    assert whole.ids[-1] == llava.tokenizer.eos_token_id


def test_a_system_turn_takes_the_place_of_the_usual_one(llava):
    sample = llava.encode(tiny.record("x", "Hello", "Hi.", system="Be brief."))
    assert text_of(llava, sample) == "<s>Be brief. USER: Hello ASSISTANT: Hi.</s>"


def test_text_alone(llava):
    sample = llava.encode(tiny.record("x", "Hello", "Hi."))
    assert text_of(llava, sample) == f"<s>{SYSTEM} USER: Hello ASSISTANT: Hi.</s>"
    assert sample.images == ()
    assert sample.image_end == 0


@pytest.mark.parametrize(
    ("said", "rendered"),
    [
        ("<image>\nWhat?", "<image>\nWhat?"),
        ("What?\n<image>", "<image>\nWhat?"),
        ("What is <image> here?", "<image>\nWhat is  here?"),
        ("<image>", "<image>"),
    ],
)
def test_a_single_image_goes_to_the_front(llava, said, rendered):
    sample = llava.encode(tiny.record("x", said, "A cat.", images=(1,)))
    assert text_of(llava, sample) == f"<s>{SYSTEM} USER: {rendered} ASSISTANT: A cat.</s>"


def test_several_images_keep_their_places(llava):
    asked = tiny.record("x", "Is <image> the same as <image>\nor not?", "No.", images=(1, 2))
    sample = llava.encode(asked)
    assert "USER: Is <image> the same as <image>\nor not? ASSISTANT:" in text_of(llava, sample)
    assert sample.images == asked.images


def test_images_that_touch_are_two(llava):
    sample = llava.encode(tiny.record("x", "<image><image>\nThe same?", "No.", images=(1, 2)))
    assert sample.ids.count(llava.model.config.image_token_id) == 8


def test_images_of_two_turns_keep_their_turns(llava):
    asked = tiny.record("x", "<image>\nThis?", "A cat.", "And this?\n<image>", "A dog.", images=(1, 2))
    said = text_of(llava, llava.encode(asked))
    assert "USER: <image>\nThis? ASSISTANT: A cat.</s>USER: <image>\nAnd this? ASSISTANT: A dog.</s>" in said


@pytest.mark.parametrize(("text", "images"), [("no mark", (1,)), ("<image>", ()), ("<image><image>", (1,))])
def test_marks_and_images_must_agree(llava, text, images):
    with pytest.raises(DataError, match="<image>"):
        llava.encode(tiny.record("x", text, "A cat.", images=images))


def test_a_mark_in_an_answer_is_no_image(llava):
    """An answer that holds the mark would put the image token among what is learned."""
    asked = tiny.record("x", "What?", "I see <image> here", images=(1,))
    with pytest.raises(DataError, match="<image>"):
        llava.encode(asked)


# The tokens of a real prompt

GOLD = [
    1, 319, 13563, 1546, 263, 12758, 5199, 322, 385, 23116, 21082, 20255, 29889, 450, 20255, 4076, 8444, 29892,
    13173, 29892, 322, 1248, 568, 6089, 304, 278, 5199, 29915, 29879, 5155, 29889, 3148, 1001, 29901, 29871, -200,
    29871, 13, 12148, 8453, 445, 1967, 297, 9493, 29889, 319, 1799, 9047, 13566, 29901,
]  # fmt: skip
PIECES = [
    "▁A", "▁chat", "▁between", "▁a", "▁curious", "▁human", "▁and", "▁an", "▁artificial", "▁intelligence",
    "▁assistant", ".", "▁The", "▁assistant", "▁gives", "▁helpful", ",", "▁detailed", ",", "▁and", "▁pol",
    "ite", "▁answers", "▁to", "▁the", "▁human", "'", "s", "▁questions", ".", "▁US", "ER", ":", "▁",
    "<image>", "▁", "\n", "Please", "▁describe", "▁this", "▁image", "▁in", "▁detail", ".", "▁A", "SS",
    "IST", "ANT", ":",
]  # fmt: skip


def llama_tokenizer():
    """A tokenizer built as Llama's, with those pieces of its vocabulary that the real prompt has, at their ids."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocabulary |= {piece: i for piece, i in zip(PIECES, GOLD[1:], strict=True) if i >= 0}
    scored = {i: piece for piece, i in vocabulary.items()}
    table = [(scored.get(i, f"<unused {i}>"), -float(len(scored)) if i in scored else -1e4) for i in range(32000)]
    made = Tokenizer(models.Unigram(table, unk_id=0, byte_fallback=False))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Replace("▁", " ")
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_the_table_of_pieces_is_the_recording(cases):
    recorded = json.loads((cases / "llava" / "llava_v1_prompt_token_gold.json").read_text())
    assert recorded["input_ids"] == GOLD
    joined = "".join(PIECES).replace("▁<image>▁", " <image>").replace("▁", " ").strip()
    assert joined == recorded["prompt"]


def test_the_real_prompt_has_its_fifty_tokens(llava):
    system = SYSTEM.replace("user", "human")
    told = type(llava)(llava.model, llama_tokenizer(), llava.image_processor)
    asked = tiny.record("x", "<image>\nPlease describe this image in detail.", "", images=(1,), system=system)
    sample = told.encode(asked, answer=False)
    placeholder = llava.model.config.image_token_id
    expected = [t for token in GOLD for t in ([placeholder] * 4 if token == -200 else [token])]
    assert list(sample.ids) == expected
    assert sample.ids[sample.image_end] == 29871
    assert set(sample.labels) == {IGNORED}


def test_labels_with_a_llama_tokenizer(llava):
    """Its marks of space belong to no text and its `</s>` is followed by another: labels must not shift."""
    told = type(llava)(llava.model, llama_tokenizer(), llava.image_processor)
    turns = ("<image>\nPlease describe this image.", "a human and an image.", "the questions", "detail")
    sample = told.encode(tiny.record("x", *turns, images=(1,), system="A chat"))
    said = told.tokenizer.convert_ids_to_tokens([t for t in sample.labels if t != IGNORED])
    assert said == ["▁a", "▁human", "▁and", "▁an", "▁image", ".", "</s>", "▁detail", "</s>"]
    assert [piece.strip() for piece in learned(told, sample)] == ["a human and an image.</s>", "detail</s>"]


# Pixels


class Drawn(ImageSource):
    def __init__(self, size):
        self.size = size

    @property
    def key(self):
        return str(self.size)

    def load(self):
        return tiny.Picture(7, self.size).load()


def test_an_image_is_padded_to_a_square_with_the_mean_colour():
    wide = pad_to_square(Image.new("RGB", (30, 11), (1, 2, 3)), (122, 116, 104))
    assert wide.size == (30, 30)
    assert [wide.getpixel((0, y)) for y in (0, 8, 9, 19, 20, 29)] == [
        (122, 116, 104), (122, 116, 104), (1, 2, 3), (1, 2, 3), (122, 116, 104), (122, 116, 104),
    ]  # fmt: skip
    tall = pad_to_square(Image.new("RGB", (10, 30), (1, 2, 3)), (122, 116, 104))
    assert [tall.getpixel((x, 0)) for x in (9, 10, 19, 20)] == [(122, 116, 104), (1, 2, 3), (1, 2, 3), (122, 116, 104)]
    square = Image.new("RGB", (8, 8))
    assert pad_to_square(square, (122, 116, 104)).size == (8, 8)


@pytest.mark.parametrize("size", [(60, 31), (31, 60), (50, 50), (7, 90), (400, 225), (225, 400), (336, 336)])
def test_pixels_equal_transformers_own_llava_processor(size):
    """With CLIP's usual constants the colour is (122, 116, 104)."""
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    family = tiny.family("llava")
    like = {
        "size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}, "do_center_crop": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
        "do_convert_rgb": True, "resample": 3,
    }  # fmt: skip
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    family.image_processor = CLIPImageProcessorPil(**like)
    image = Drawn(size).load()
    ours = tiny.pixels(family, [image])["pixel_values"]
    theirs = LlavaImageProcessorPil(**like, do_pad=True)(images=[image], return_tensors="pt")["pixel_values"]
    assert ours.shape == (1, 3, 56, 56)
    assert torch.equal(ours, theirs)


def test_pixels_come_in_order(llava):
    one, two = (tiny.Picture(i).load() for i in (1, 2))
    both = tiny.pixels(llava, [one, two])["pixel_values"]
    assert torch.equal(both[1:], tiny.pixels(llava, [two])["pixel_values"])
    assert not torch.equal(both[0], both[1])


def test_image_tokens_follow_the_config(llava):
    import copy

    config = copy.deepcopy(llava.model.config)
    assert image_tokens(config) == 4
    config.vision_config.image_size = 336
    assert image_tokens(config) == 576
    config.vision_feature_select_strategy = "full"
    assert image_tokens(config) == 577


def test_the_processor_is_pils(tmp_path):
    assert "Pil" in type(load_image_processor(EMBEDDED)).__name__


# The embedded base


@pytest.mark.parametrize(
    "record",
    [
        tiny.record("one", "<image>\nWhat is at the top left?", "red circle", images=(1,)),
        tiny.record("two", "<image>\nWhat is it?", "a cat", "And now?", "no", images=(1,)),
        tiny.record("text", "How many are two and two?", "4"),
        tiny.record("many", "Is <image> as <image>?", "no", images=(1, 2)),
        tiny.record("system", "<image>\nWhat?", "red", images=(1,), system="Be brief."),
    ],
    ids=lambda record: record.id,
)
def test_the_embedded_base_reads_as_plain_transformers(embedded, record):
    processor = AutoProcessor.from_pretrained(EMBEDDED)
    sample, prompt = embedded.encode(record), embedded.encode(record, answer=False)
    images = [image.load() for image in record.images] or None
    for said, ids, more in ((record.turns, sample.ids, False), (record.turns[:-1], prompt.ids, True)):
        told = [{"role": turn.role, "content": turn.text} for turn in said]
        text = processor.apply_chat_template(told, add_generation_prompt=more)
        inputs = processor(images=images, text=text, return_tensors="pt")
        assert tuple(inputs["input_ids"][0].tolist()) == ids
        if images:
            assert inputs["pixel_values"].shape == tiny.pixels(embedded, images)["pixel_values"].shape
    square = [tiny.Picture(3, (40, 40)).load()]
    theirs = processor(images=square, text="<image>", return_tensors="pt")["pixel_values"]
    assert torch.equal(theirs, tiny.pixels(embedded, square)["pixel_values"])


def test_it_is_recognised(llava):
    from transformers import PretrainedConfig

    config, _ = PretrainedConfig.get_config_dict(EMBEDDED)
    assert MODELS["llava"].recognises(config)
    assert MODELS["llava"].recognises({"model_type": "llava", "mm_vision_tower": "openai/clip"})
    assert not MODELS["llava"].recognises({"model_type": "llama"})


def test_a_tiny_member_is_the_same_each_time():
    one, two = (MODELS["llava"].tiny(image_size=28).model.state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    other = MODELS["llava"].tiny(image_size=28, seed=1).model.state_dict()
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])


def test_saved_and_loaded_it_is_the_same(llava, tmp_path):
    llava.save(tmp_path)
    again = MODELS["llava"].load(tmp_path, loading=Loading("float32"))
    of = tiny.samples(llava)
    assert tiny.samples(again) == of
    with torch.no_grad():
        batch = tiny.shared(llava, of)
        logits = tiny.tune("none", on=llava).answer_logits(batch)
        assert torch.equal(tiny.tune("none", on=again).answer_logits(tiny.shared(again, of)), logits)


def test_a_slow_tokenizer_is_refused(llava, tmp_path, monkeypatch):
    llava.save(tmp_path)
    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", property(lambda self: False))
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        MODELS["llava"].load(tmp_path, loading=Loading("float32"))
