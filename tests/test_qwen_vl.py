"""Qwen-VL gives the numbers of the original code: two recordings, each by two attention backends.

Each test prints the largest difference; the tolerances are those of the recordings' README.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import PIL
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import tiny
from peft_mllm.models.qwen_vl.configuration import QwenVLConfig
from peft_mllm.models.qwen_vl.images import QwenVLImageProcessor
from peft_mllm.models.qwen_vl.modelling import QwenVLForConditionalGeneration
from peft_mllm.models.qwen_vl.rotary import logn, ntk_level
from qwen_originals import published_names

PIXELS, FEATURES, LOGITS, LOSS, GRADIENT = 1e-6, 1e-5, 2e-5, 5e-6, 1e-5


def within(what, ours, golden, tolerance, *, relative_to=1.0):
    assert ours.shape == golden.shape, what
    told(what, (ours - golden).abs().max().item() / relative_to, tolerance)


def told(what, difference, tolerance):
    sys.stdout.write(f"{what}: {difference:.2e} (allowed {tolerance:.0e})\n")
    assert difference <= tolerance, what


def opened(folder):
    return [Image.open(folder / f"img{i}.png").convert("RGB") for i in (0, 1)]


def pixels_of(images, side):
    processor = QwenVLImageProcessor(size={"height": side, "width": side})
    return processor(images=images, return_tensors="pt")["pixel_values"]


def greedy(model, ids, *, new, **more):
    """Greedily decoded ids; no token ends them, and none of the prompt is padding."""
    told = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": new}
    return model.generate(ids, **told, eos_token_id=None, pad_token_id=0, **more)[:, ids.shape[1] :]


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def backend(request):
    return request.param


# The larger recording


class Golden:
    """The recorded folder: its numbers, and the model it was recorded of."""

    def __init__(self, folder: Path, backend: str):
        self.folder = folder
        self.numbers = load_file(folder / "golden.safetensors")
        self.said = json.loads((folder / "golden.json").read_text())
        loaded, self.found = QwenVLForConditionalGeneration.from_pretrained(
            folder / "checkpoint", dtype=torch.float32, attn_implementation=backend, output_loading_info=True
        )
        self.model = loaded.eval()

    def __getitem__(self, name):
        return self.numbers[name]

    def logits(self, name, images=(), **more):
        pixels = {"pixel_values": self["pixel_values"][list(images)]} if images else {}
        return self.model(input_ids=self[f"{name}.input_ids"], **pixels, **more).logits

    def gradients(self):
        """By the names of the published checkpoint, and then zero again."""
        found = {name: p.grad for name, p in self.model.named_parameters()}
        self.model.zero_grad()
        return {name.removesuffix(".weight") if bare(name) else name: grad for name, grad in found.items()}


def bare(name):
    return name.endswith((".proj.weight", ".positional_embedding.weight")) and ".visual." in name


@pytest.fixture(scope="module")
def golden(cases, backend):
    return Golden(cases / "golden" / "qwen_vl", backend)


@pytest.fixture
def training(golden):
    golden.model.train()
    yield golden
    golden.model.eval()


SHOWN = {"text": (), "one_image": (0,), "two_images": (0, 1), "long_text": ()}


def test_every_tensor_of_the_checkpoint_lands(golden):
    assert not any(golden.found.values())


def test_pixels(golden):
    within("pixels", pixels_of(opened(golden.folder), 144), golden["pixel_values"], PIXELS)


@torch.no_grad()
def test_image_features(golden):
    features = golden.model.get_image_features(golden["pixel_values"])
    within("features", features, golden["image_features"], FEATURES)


@torch.no_grad()
@pytest.mark.parametrize("name", SHOWN)
def test_logits(golden, name):
    recorded = golden[f"{name}.logits" if name == "text" else f"{name}.logits_last16"]
    within(name, golden.logits(name, SHOWN[name])[:, -recorded.shape[1] :], recorded, LOGITS)


@torch.no_grad()
def test_logits_of_left_padded_rows(golden):
    there = golden["leftpad.attention_mask"]
    ours = golden.logits("leftpad", attention_mask=there)
    within("leftpad", ours[there > 0], golden["leftpad.logits"][there > 0], LOGITS)
    ours = golden.logits("leftpad_image", (0,), attention_mask=golden["leftpad_image.attention_mask"])
    within("leftpad_image", ours[:, -8:], golden["leftpad_image.logits_last8"], LOGITS)


@torch.no_grad()
def test_cached_steps_keep_the_prompts_ntk_factor(golden):
    out = golden.model(input_ids=golden["cross_prompt.input_ids"], use_cache=True)
    steps = [out.logits[:, -1]]
    for token in golden["cached_steps.forced_ids"][0]:
        out = golden.model(input_ids=token.view(1, 1), past_key_values=out.past_key_values, use_cache=True)
        steps.append(out.logits[:, -1])
    within("cached steps", torch.cat(steps), golden["cached_steps.logits"], LOGITS)


@pytest.mark.parametrize(("cached", "recorded"), [(True, "cached"), (False, "nocache")])
def test_greedy_ids_across_the_length_of_pretraining(golden, cached, recorded):
    ours = greedy(golden.model, golden["cross_prompt.input_ids"], new=16, use_cache=cached)
    assert torch.equal(ours, golden[f"greedy_cross_{recorded}_16"])


@pytest.mark.parametrize("cached", [True, False])
def test_greedy_ids_about_an_image(golden, cached):
    pixels = golden["pixel_values"][:1]
    ours = greedy(golden.model, golden["one_image.input_ids"], new=8, use_cache=cached, pixel_values=pixels)
    assert torch.equal(ours, golden["greedy_one_image_8"])


@torch.no_grad()
@pytest.mark.parametrize("name", ["long_text", "one_image"])
def test_logits_in_training_have_neither_ntk_nor_logn(training, name):
    recorded = training[f"{name}.train_mode_logits_last16"]
    within(f"{name} in training", training.logits(name, SHOWN[name])[:, -16:], recorded, LOGITS)


def test_loss_and_gradients_of_every_parameter(training):
    names = ("input_ids", "labels", "attention_mask", "pixel_values")
    told_model = {name: training[name if name == "pixel_values" else f"train.{name}"] for name in names}
    out = training.model(**told_model)
    within("loss", out.loss.detach().view(1), training["train.loss"], LOSS)
    last = [row[mask][-8:] for row, mask in zip(out.logits, told_model["attention_mask"], strict=True)]
    within("last logits", torch.stack(last).detach(), training["train.last8_valid_logits"], LOGITS)
    out.loss.backward()
    gradients, norms = training.gradients(), training.said["grad_norms"]
    assert gradients.keys() == norms.keys()
    told("gradient norms", max(abs(gradients[n].norm().item() - norm) / norm for n, norm in norms.items()), GRADIENT)
    for name in (each for each in training.numbers if each.startswith("train.grad.")):
        ours = gradients[name.removeprefix("train.grad.").removesuffix(".row_norms")]
        ours = ours.norm(dim=-1) if name.endswith(".row_norms") else ours
        within(name, ours, training[name], GRADIENT, relative_to=training[name].abs().max().item())


@torch.no_grad()
@pytest.mark.parametrize("sample", [0, 1, 2])
def test_loss_of_each_sample(training, sample):
    length = training["train.attention_mask"][sample].sum()
    ids, labels = (training[f"train.{name}"][sample : sample + 1, :length] for name in ("input_ids", "labels"))
    pixels = {0: training["pixel_values"][:1], 1: None, 2: training["pixel_values"][1:]}[sample]
    loss = training.model(input_ids=ids, labels=labels, pixel_values=pixels).loss
    within(f"loss {sample}", loss.view(1), training[f"train.{sample}.loss"], LOSS)


def test_a_step_of_text_alone_gives_the_tower_gradients_of_zero(training):
    length = training["train.attention_mask"][1].sum()
    ids, labels = (training[f"train.{name}"][1:2, :length] for name in ("input_ids", "labels"))
    training.model(input_ids=ids, labels=labels).loss.backward()
    gradients = training.gradients()
    of_tower = [gradient for name, gradient in gradients.items() if ".visual." in name]
    assert len(of_tower) == sum(".visual." in name for name in training.said["grad_norms"])
    assert not any(gradient.any() for gradient in of_tower)
    norm = training.said["text_only_grad"]["transformer.wte"]
    told("wte", abs(gradients["transformer.wte.weight"].norm().item() - norm) / norm, GRADIENT)


# The smaller one


@pytest.fixture(scope="module")
def small(cases, backend):
    folder = cases / "qwen_vl_tiny_golden"
    config = QwenVLConfig.from_pretrained(folder)
    model = QwenVLForConditionalGeneration(config).eval()
    model.set_attn_implementation(backend)
    stored = {name: tensor.float() for name, tensor in load_file(folder / "model_fp16.safetensors").items()}
    bare_names = dict(zip(published_names(model), model.state_dict(), strict=True))
    model.load_state_dict({bare_names[name]: tensor for name, tensor in stored.items()})
    return folder, model, load_file(folder / "golden.safetensors")


def test_small_pixels(small):
    folder, _, numbers = small
    ours = pixels_of(opened(folder), 56)
    within("small pixels, wide", ours[:1], numbers["pixel_values"][:1], PIXELS)
    if int(PIL.__version__.split(".")[0]) < 13:
        pytest.skip("recorded with Pillow 13, which shrinks tall images down before across; its older versions do not")
    within("small pixels, tall", ours[1:], numbers["pixel_values"][1:], PIXELS)


@torch.no_grad()
def test_small_features(small):
    _, model, numbers = small
    within("small features", model.get_image_features(numbers["pixel_values"]), numbers["image_features"], FEATURES)


@torch.no_grad()
def test_small_logits(small):
    _, model, numbers = small
    one, two = numbers["pixel_values"][:1], numbers["pixel_values"]
    for name, pixels, last in (
        ("text_eval", None, 12), ("long_text_eval_last8", None, 8), ("one_image_eval", one, 266),
        ("two_images_eval_last8", two, 8),
    ):  # fmt: skip
        ids = numbers[f"ids_{name[: name.index('_eval')]}"]
        within(name, model(input_ids=ids, pixel_values=pixels).logits[:, -last:], numbers[f"logits_{name}"], LOGITS)
    there = numbers["mask_leftpad"]
    ours = model(input_ids=numbers["ids_leftpad"], attention_mask=there).logits
    within("leftpad", ours[there > 0], numbers["logits_leftpad_eval"][there > 0], LOGITS)


@torch.no_grad()
def test_small_training(small):
    _, model, numbers = small
    model.train()
    try:
        ids, pixels = numbers["ids_one_image"], numbers["pixel_values"][:1]
        labels = ids.masked_fill(torch.arange(ids.shape[1]) <= ids[0].tolist().index(301), -100)  # after </img>
        out = model(input_ids=ids, pixel_values=pixels, labels=labels)
        long = model(input_ids=numbers["ids_long_text"]).logits[:, -8:]
    finally:
        model.eval()
    within("one image in training", out.logits, numbers["logits_one_image_train"], LOGITS)
    within("long text in training", long, numbers["logits_long_text_train_last8"], LOGITS)
    within("loss", out.loss, numbers["loss_one_image_train"], LOSS)


@pytest.mark.parametrize("cached", [True, False])
def test_small_greedy_ids(small, cached):
    _, model, numbers = small
    recorded = numbers["greedy_text120_20_crosses_seq_length" if cached else "greedy_text120_20_nocache"]
    ours = greedy(model, numbers["ids_long_text"][:, :120], new=20, use_cache=cached)
    assert torch.equal(ours, recorded)
    pixels = numbers["pixel_values"][:1]
    ours = greedy(model, numbers["ids_one_image"], new=6, use_cache=cached, pixel_values=pixels)
    assert torch.equal(ours, numbers["greedy_one_image_6"])


# What the recordings do not show


def test_the_published_checkpoint_has_a_place_for_each_of_its_853_tensors_and_no_other(cases):
    folder = cases / "qwen_vl_chat"
    with torch.device("meta"):
        model = QwenVLForConditionalGeneration(QwenVLConfig.from_pretrained(folder))
    ours = {name: list(tensor.shape) for name, tensor in published_names(model).items()}
    index = json.loads((folder / "pytorch_model.bin.index.json").read_text())
    patterns = json.loads((folder / "qwen_vl_chat_state_dict_patterns.json").read_text())["patterns"]
    shapes = {each["pattern"].replace("{i}", str(i)): each["shape"] for each in patterns for i in range(each["count"])}
    assert len(shapes) == 853
    assert ours == shapes
    assert ours.keys() == index["weight_map"].keys()
    assert 2 * sum(torch.Size(shape).numel() for shape in ours.values()) == index["metadata"]["total_size"]


def test_positions_given_are_kept():
    """A row that starts later, with positions that say so, is another row of the same: rotary angles are relative."""
    model = tiny.family("qwen_vl").model
    ids = torch.randint(0, 256, (1, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        counted = model(input_ids=ids, position_ids=torch.arange(24)[None]).logits
        shifted = model(input_ids=ids, position_ids=torch.arange(24)[None] + 100).logits
        stretched = model(input_ids=ids, position_ids=torch.arange(24)[None] * 3).logits
        beyond = model(input_ids=ids, position_ids=torch.arange(24)[None] + 2048).logits
    assert torch.equal(plain, counted)
    assert torch.allclose(plain, shifted, atol=1e-4)
    assert not torch.allclose(plain, stretched, atol=1e-2)
    assert not torch.allclose(plain, beyond, atol=1e-3)  # other frequencies, and logN


def test_a_rows_answer_does_not_depend_on_what_it_is_asked_with():
    """In generation positions follow the mask, so that padding past the pretraining's length changes nothing."""
    model = tiny.family("qwen_vl").model
    model.config.seq_length = 32
    generator = torch.Generator().manual_seed(0)
    long, short = (torch.randint(0, 256, (1, length), generator=generator) for length in (40, 20))
    rows = torch.cat([long, torch.nn.functional.pad(short, (20, 0))])
    there = torch.ones_like(rows)
    there[1, :20] = 0
    options = {"do_sample": False, "max_new_tokens": 20, "eos_token_id": None, "pad_token_id": 0}
    together = model.generate(rows, attention_mask=there, **options)[:, 40:]
    assert torch.equal(together[:1], greedy(model, long, new=20))
    assert torch.equal(together[1:], greedy(model, short, new=20))


def test_ntk_and_logn_by_hand():
    steps = {1: 0, 2048: 0, 2049: 1, 4096: 1, 4097: 2, 8192: 2, 8193: 3}
    assert ntk_level(torch.tensor(list(steps)), 2048).tolist() == list(steps.values())
    factors = logn(torch.tensor([[0, 2047, 2048, 4095]]), 2048).flatten()
    assert torch.allclose(factors, torch.tensor([1, 1, 1.0000641, 1.0909091]))


@pytest.mark.parametrize("pixels", [0, 2])
def test_images_and_their_places_must_match(pixels):
    family = tiny.family("qwen_vl")
    ids = torch.tensor([family.encode(tiny.record("x", "<image>\nWhat?", "red", images=(1,))).ids])
    given = torch.zeros(pixels, 3, 28, 28) if pixels else None
    with pytest.raises(ValueError, match="pixel_values"):
        family.model(input_ids=ids, pixel_values=given)
    with pytest.raises(ValueError, match="pixel_values"):
        family.model(input_ids=ids[:, :20], pixel_values=torch.zeros(1, 3, 28, 28))


def test_embeddings_in_the_place_of_ids_find_the_images_too():
    family = tiny.family("qwen_vl")
    batch = tiny.padded(family, tiny.samples(family))
    inputs = {"attention_mask": batch.attention_mask, **batch.pixels}
    with torch.no_grad():
        by_ids = family.model(input_ids=batch.input_ids, **inputs).logits
        embeds = family.model.get_input_embeddings()(batch.input_ids)
        assert torch.equal(family.model(inputs_embeds=embeds, **inputs).logits, by_ids)


def test_hidden_states_and_attentions_are_given():
    model = tiny.family("qwen_vl", attn="eager").model
    out = model(input_ids=torch.arange(9)[None], output_hidden_states=True, output_attentions=True)
    assert [tuple(states.shape) for states in out.hidden_states] == [(1, 9, 128)] * 3
    assert [tuple(weights.shape) for weights in out.attentions] == [(1, 4, 9, 9)] * 2


def test_pos_embed_is_no_parameter_and_is_the_fixed_table():
    tower = tiny.family("qwen_vl").model.transformer.visual
    assert "attn_pool.pos_embed" in tower.state_dict()
    assert "attn_pool.pos_embed" not in dict(tower.named_parameters())
    table = tower.attn_pool.pos_embed  # row 16 r + c: half tells c, half r
    assert torch.equal(table[5, :64], table[21, :64])
    assert torch.equal(table[16, 64:], table[17, 64:])
    assert torch.allclose(table[3, :2], torch.tensor([3.0, 3.0 * 10000 ** (-1 / 32)]).sin())
    assert torch.allclose(table[3, 32:33], torch.tensor([3.0]).cos())
