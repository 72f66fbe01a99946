"""The shipped base is an ordinary directory, small, and knows what its card says."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration

import peft_mllm
import tiny
from peft_mllm.models.base import Loading
from peft_mllm.models.llava import Llava
from peft_mllm.scenes import make_scene
from peft_mllm.tasks import TASKS
from peft_mllm.tasks.scenes import SEEN, UNSEEN, ScenesOptions

BASE = Path(peft_mllm.__file__).parent / "assets" / "embedded"
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(BASE)


@pytest.fixture(scope="module")
def model():
    return LlavaForConditionalGeneration.from_pretrained(BASE, dtype=torch.float32).eval()


@torch.no_grad()
def accuracy(model, processor, name, count):
    task = TASKS[name](ScenesOptions(size={"test": count}, seed=1))
    records = task.records("test")[:]
    prompts = [
        processor.apply_chat_template([{"role": "user", "content": r.turns[0].text}], add_generation_prompt=True)
        for r in records
    ]
    images = [r.images[0].load() for r in records]
    inputs = processor(images=images, text=prompts, padding=True, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=task.max_new_tokens, do_sample=False)
    said = processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(a.strip() == r.answer for a, r in zip(said, records, strict=True)) / count


def test_it_is_small(model):
    assert sum(path.stat().st_size for path in BASE.iterdir()) <= 6_000_000
    assert 1_000_000 <= sum(p.numel() for p in model.parameters()) <= 3_000_000


@pytest.mark.parametrize("name", SEEN)
def test_it_answers_what_it_was_trained_on(model, processor, name):
    assert accuracy(model, processor, name, 120) >= 0.95


def test_its_card_has_the_measured_figures():
    facts = json.loads((BASE / "training.json").read_text())
    assert set(facts["seen"]) == set(SEEN)
    assert set(facts["unseen"]) == set(UNSEEN)
    assert min(score["accuracy"] for score in facts["seen"].values()) >= 95
    assert facts["seconds"] <= 45 * 60
    for score in facts["unseen"].values():
        assert score["accuracy"] <= max(40, score["commonest_answer"] + 5)
    text = (BASE / "README.md").read_text()
    assert all(f"{score['accuracy']:.1f}" in text for score in facts["seen"].values())


@pytest.mark.parametrize("image_first", [True, False])
def test_the_template_is_vicuna(processor, image_first):
    parts = [{"type": "image"}, {"type": "text", "text": "What is at the top left?"}]
    messages = [
        {"role": "user", "content": parts if image_first else parts[::-1]},
        {"role": "assistant", "content": [{"type": "text", "text": "red circle"}]},
        {"role": "user", "content": "And now?"},
    ]
    said = f"{SYSTEM} USER: <image>\nWhat is at the top left? ASSISTANT: red circle</s>USER: And now?"
    assert processor.apply_chat_template(messages) == said
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == said + " ASSISTANT:"
    assert processor.apply_chat_template(messages[:2]).endswith(" ASSISTANT: red circle</s>")
    as_text = {"role": "user", "content": "<image>\nWhat is at the top left?"}
    assert processor.apply_chat_template([as_text, *messages[1:]]) == said


def test_the_template_takes_another_system_sentence(processor):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    assert processor.apply_chat_template(messages) == "Be brief. USER: Hello"


def test_the_processor_tokenises_like_the_pieces_around_the_image(processor):
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    before, after = f"{SYSTEM} USER: ", "\nWhat is at the top left? ASSISTANT:"
    inputs = processor(images=make_scene(0).draw(), text=f"{before}<image>{after}", return_tensors="pt")
    pieces = [tokenizer.encode(text, add_special_tokens=False) for text in (before, after)]
    image = [tokenizer.convert_tokens_to_ids("<image>")] * 9
    assert inputs["input_ids"][0].tolist() == [tokenizer.bos_token_id, *pieces[0], *image, *pieces[1]]


@pytest.mark.parametrize("answer", ["red circle", "nothing", "2", "yes", "A", "Grüße, 世界!"])
def test_the_answer_does_not_change_the_tokens_of_the_question(processor, answer):
    tokenizer = processor.tokenizer
    prompt = f"{SYSTEM} USER: What is at the top left? ASSISTANT:"
    whole, asked = (tokenizer(text)["input_ids"] for text in (f"{prompt} {answer}</s>", prompt))
    assert whole[: len(asked)] == asked
    assert whole[len(asked) :] == tokenizer.encode(f" {answer}</s>", add_special_tokens=False)
    assert whole[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(whole, skip_special_tokens=True) == f"{prompt} {answer}"


def test_words_of_the_tasks_are_single_tokens(processor):
    for word in (" red", " circle", " left", " yes", " nothing", " ASSISTANT", " assistant"):
        assert len(processor.tokenizer.encode(word, add_special_tokens=False)) == 1


def test_a_plain_processor_sees_the_same_pixels():
    """Wide pictures too: both pad to a square with the mean colour, and neither crops."""
    family = Llava.load(BASE, loading=Loading("float32"))
    processor = AutoProcessor.from_pretrained(BASE)
    for size in ((392, 141), (141, 392), (48, 48)):
        image = Image.effect_noise(size, 80).convert("RGB")
        plain = processor(images=image, text="<image>", return_tensors="pt")["pixel_values"]
        assert (plain - tiny.pixels(family, [image])["pixel_values"]).abs().max() < 1e-6
