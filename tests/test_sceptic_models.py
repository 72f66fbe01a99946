"""A second look at original checkpoints and released adapters, with sizes, tokenizers and names of its own.

Each reference is worked out here and not by the code under test: the model that a checkpoint was written from, the
SentencePiece library, Pillow and numpy, and forwards whose linears are patched by hand.
"""

from __future__ import annotations

import io
import json
import random
import re
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from PIL import Image
from safetensors.torch import save_file
from sentencepiece import sentencepiece_model_pb2
from torch.nn import functional
from transformers import CLIPVisionConfig, DynamicCache, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import originals
import tiny
from peft_mllm.errors import ModelError
from peft_mllm.loading import load_family
from peft_mllm.models.llava import SYSTEM
from peft_mllm.models.llava_tokenizer import load_tokenizer
from peft_mllm.record import IMAGE_MARK
from peft_mllm.released import import_adapter
from peft_mllm.spec import ModelSpec
from peft_mllm.tuned import load_adapter

ROWS = 600
IGNORED = -100
LINEARS = {
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip

TEXT = [
    "The quick brown fox jumps over the lazy dog........ 12345 == -- -- ======",
    "Schöne Größe, naïve café; 今日は良い天気です。 Привет мир!",
    "aaaa aaa aabaab abaaba ababa banana bananas anana",
    "USER: What colour is it? ASSISTANT: It is red.</s>USER: And this one? ASSISTANT: blue",
    "    indented    code   with    spaces\t\ttabs",
    "lol hahaha hahahaha xoxoxo ......... ---- ____ ____",
]
WORDS = [
    "river",
    "stone",
    "tower",
    "glass",
    "paper",
    "window",
    "yellow",
    "orange",
    "house",
    "train",
    "station",
    "garden",
]
PARTS = [
    *("<s>", "</s>", "<unk>", IMAGE_MARK, "<im", "age>", "<", " ", "  ", "\n", "\t", "\u2581", "..", "...", "aba", "a"),
    *("b", "an", "ana", "ha", "=", "-", "USER:", "ASSISTANT:", " quick", "é", "図", "🙂", "\u0301", "ÿ", "\x00"),
    *("<0x0A>", "<0xFF>", "\r\n", "12", "\ufeff", "\u3000", "\xa0", "\U0010ffff", "[PAD]", "The", "the"),
]


def trained(seed=0):
    """A SentencePiece model of Llama's kind, of other text than the recordings'."""
    draw, made = random.Random(seed), io.BytesIO()
    text = TEXT * 4 + [" ".join(draw.choices(WORDS, k=12)) for _ in range(100)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=made, vocab_size=ROWS, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, character_coverage=1.0,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2,
    )  # fmt: skip
    return made.getvalue()


@pytest.fixture(scope="module")
def sentence_model():
    return trained()


def write_tokenizer(directory, model, *, legacy=False, added=()):
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.model").write_bytes(model)
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": None}
    # the oldest files do not say that they are legacy
    (directory / "tokenizer_config.json").write_text(json.dumps(config | ({} if legacy else {"legacy": False})))
    if added:
        (directory / "added_tokens.json").write_text(json.dumps(dict(added)))


class Slow:
    """Llama's slow tokenizer, spelled out: special tokens are cut out, SentencePiece does the rest."""

    def __init__(self, model, *, legacy=False, added=()):
        protocol = sentencepiece_model_pb2.ModelProto()
        protocol.ParseFromString(model)
        protocol.normalizer_spec.add_dummy_prefix = legacy
        self.pieces = sentencepiece.SentencePieceProcessor(model_proto=protocol.SerializeToString())
        self.legacy = legacy
        self.special = {"<unk>": 0, "<s>": 1, "</s>": 2, **dict(added)}
        self.cut = re.compile("(" + "|".join(map(re.escape, self.special)) + ")")

    def __call__(self, text):
        whole = f"\u2581{text.replace(chr(0x2581), ' ')}" if text and not self.legacy else text
        stretches = [each for each in self.cut.split(whole) if each]
        if not self.legacy and len(stretches) > 1 and stretches[0] == "\u2581":
            stretches = stretches[1:]  # no mark of space before a special token
        ids = [[self.special[each]] if each in self.special else self.pieces.encode(each) for each in stretches]
        return [1, *chain.from_iterable(ids)]

    def around_images(self, text):
        """The ids of the stretches between images, begun once; -200 is an image."""
        ids = [1]
        for number, stretch in enumerate(text.split(IMAGE_MARK)):
            ids += [-200] * (number > 0) + self(stretch)[1:]
        return ids


@pytest.mark.parametrize("legacy", [False, True], ids=["today", "legacy"])
@pytest.mark.parametrize("added", [(), (("[PAD]", ROWS), ("<pad>", ROWS + 1))], ids=["plain", "added tokens"])
def test_any_string_has_the_slow_tokenizers_ids(sentence_model, tmp_path, legacy, added):
    write_tokenizer(tmp_path, sentence_model, legacy=legacy, added=added)
    ours, slow = load_tokenizer(tmp_path, rows=ROWS + len(added)), Slow(sentence_model, legacy=legacy, added=added)
    placeholder, draw = ours.convert_tokens_to_ids(IMAGE_MARK), random.Random(1)
    images = 0
    for _ in range(2000):
        text = "".join(
            draw.choice(PARTS) if draw.random() < 0.85 else chr(draw.choice([draw.randrange(1, 0x3000), 0x4E2D]))
            for _ in range(draw.randrange(14))
        )
        ids = [-200 if token == placeholder else token for token in ours(text)["input_ids"]]
        assert ids == slow.around_images(text), repr(text)
        images += ids.count(-200)
    assert images > 100


# Checkpoints


@dataclass(frozen=True)
class Shape:
    """What differs from a plain member; `config` is said in the checkpoint's config.json."""

    text: dict
    vision: dict
    config: dict
    layer: int = -2
    feature: str = "patch"


TEXT_SIZES = {
    "vocab_size": ROWS, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 3, "rms_norm_eps": 1e-6, "max_position_embeddings": 700, "tie_word_embeddings": False,
}  # fmt: skip
VISION_SIZES = {
    "hidden_size": 40, "intermediate_size": 60, "num_hidden_layers": 4, "num_attention_heads": 5, "image_size": 42,
    "patch_size": 7, "layer_norm_eps": 1e-5, "hidden_act": "quick_gelu",
}  # fmt: skip
LINEAR_ROPE = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
SHAPES = {
    "grouped": Shape({}, {}, {}),
    "one key": Shape({"num_attention_heads": 4, "num_key_value_heads": 1, "rms_norm_eps": 1e-4}, {}, {}),
    "last layer": Shape({}, {}, {"mm_vision_select_layer": -1}, layer=-1),
    "first layer": Shape({}, {}, {"mm_vision_select_layer": 1}, layer=1),
    "class token": Shape({}, {}, {"mm_vision_select_feature": "cls_patch"}, feature="cls_patch"),
    "other tower": Shape({}, {"hidden_act": "gelu", "layer_norm_eps": 1e-4, "image_size": 56, "patch_size": 14}, {}),
    "theta": Shape(
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}}, {}, {"rope_theta": 5e4, "rope_scaling": None}
    ),
    "scaled": Shape({"rope_parameters": LINEAR_ROPE}, {}, {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    "tied": Shape({"tie_word_embeddings": True}, {}, {}),
    "wide heads": Shape({"head_dim": 16}, {}, {}),
    "biases": Shape({"attention_bias": True}, {}, {}),
}


def written(directory, sentence_model, shape, *, legacy=False, parts=3, safetensors=False, **changes):
    """A random model, and the same in the original layout: checkpoint and tower."""
    text, vision = TEXT_SIZES | shape.text, VISION_SIZES | shape.vision
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision),
        text_config=LlamaConfig(**text),
        image_token_index=258,  # <0xFF>
        vision_feature_layer=shape.layer,
        vision_feature_select_strategy="default" if shape.feature == "patch" else "full",
        tie_word_embeddings=text["tie_word_embeddings"],
    )
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(len(str(shape)))
        model = LlavaForConditionalGeneration(config).eval()
        for name, parameter in model.named_parameters():
            spread = parameter * 6 if parameter.ndim > 1 else parameter + torch.randn_like(parameter) * 0.1
            parameter.copy_(spread if "vision_tower" in name else spread.half())
    state = {originals._original_name(name): tensor for name, tensor in model.state_dict().items()}
    tower = {name: state.pop(name) for name in list(state) if name.startswith("vision_model.")}
    state = {name: tensor.half() for name, tensor in state.items()}
    if text["tie_word_embeddings"]:
        del state["lm_head.weight"]
    checkpoint, outside = directory / "checkpoint", directory / "clip-vit-other"
    write_tokenizer(checkpoint, sentence_model, legacy=legacy)
    outside.mkdir()
    originals._write_weights(checkpoint, state, parts=parts, safetensors=safetensors)
    originals._write_weights(outside, tower, parts=1, safetensors=False)
    side = vision["image_size"]
    preprocessing = {**originals.CLIP_PREPROCESSING, "size": side, "crop_size": side}
    (outside / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    (outside / "config.json").write_text(json.dumps({"model_type": "clip_vision_model", **vision}))
    told = originals._config("llava", "nowhere/clip-vit-other", ROWS) | {"mm_hidden_size": vision["hidden_size"]}
    told |= {key: value for key, value in text.items() if key != "rope_parameters"} | shape.config | changes
    kept = {key: value for key, value in told.items() if value is not None}
    (checkpoint / "config.json").write_text(json.dumps(kept))
    return model, ModelSpec(path=str(checkpoint), vision_tower=str(outside))


def asked(family, seed=0):
    """A question with one image, as arguments of the forward; and one of text alone."""
    draw = torch.Generator().manual_seed(seed)
    side = family.model.config.vision_config.image_size
    text = torch.randint(260, ROWS - 10, (40,), generator=draw).tolist()
    ids = [1, 5, 400] + [family.model.config.image_token_id] * family._image_tokens + text
    pixels = torch.randn(1, 3, side, side, generator=draw)
    return {"input_ids": torch.tensor([ids]), "pixel_values": pixels}, {"input_ids": torch.tensor([text * 2])}


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_a_checkpoint_of_any_shape_is_the_model_it_was_written_from(sentence_model, tmp_path, name):
    files = {"parts": 1 + len(name) % 3, "safetensors": len(name) % 2 == 0}
    model, spec = written(tmp_path, sentence_model, SHAPES[name], **files)
    family = load_family(spec, dtype="float32")
    patches = (model.config.vision_config.image_size // model.config.vision_config.patch_size) ** 2
    assert family._image_tokens == patches + (SHAPES[name].feature == "cls_patch")
    for inputs in asked(family):
        wanted, given = model(**inputs).logits, family.model(**inputs).logits
        assert wanted.abs().max() > 1
        torch.testing.assert_close(given, wanted, rtol=0, atol=2e-5)


@pytest.fixture(scope="module")
def base(sentence_model, tmp_path_factory):
    return written(tmp_path_factory.mktemp("base"), sentence_model, SHAPES["grouped"])


@pytest.mark.parametrize("legacy", [False, True], ids=["today", "legacy"])
def test_labels_are_those_of_the_counting_rule(sentence_model, tmp_path, legacy):
    """The original counts tokens of the parts; where its counts come out, its labels are ours."""
    _, spec = written(tmp_path, sentence_model, SHAPES["grouped"], legacy=legacy)
    family, slow, draw = load_family(spec, dtype="float32"), Slow(sentence_model, legacy=legacy), random.Random(2)
    placeholder, width = family.model.config.image_token_id, family._image_tokens
    words = [*WORDS, "Größe", "図", "🙂", "yes", "No.", "42", "..."]
    for number in range(300):
        turns = [
            draw.choice([" ", "  ", "\n"]).join(draw.choices(words, k=draw.randrange(1, 7)))
            for _ in range(2 * draw.randrange(1, 4))
        ]
        shown = number % 2 == 0
        turns[0] = f"{IMAGE_MARK}\n{turns[0]}" if shown else turns[0]
        ids, labels = counted(slow, turns)
        spread = [width if token == -200 else 1 for token in ids]
        sample = family.encode(tiny.record("x", *turns, images=(1,) if shown else ()))
        expanded = [
            placeholder if token == -200 else token for token, n in zip(ids, spread, strict=True) for _ in range(n)
        ]
        assert list(sample.ids) == expanded, turns
        assert list(sample.labels) == [label for label, n in zip(labels, spread, strict=True) for _ in range(n)], turns


def counted(slow, turns):
    """Ids and labels as the original makes them: the lengths of the parts of each round, tokenised again."""
    said = [f"USER: {turn} " if i % 2 == 0 else f"ASSISTANT: {turn}</s>" for i, turn in enumerate(turns)]
    prompt = f"{SYSTEM} {''.join(said)}"
    ids, labels, at = slow.around_images(prompt), [IGNORED], 1
    for part in prompt.removesuffix("</s>").split("</s>"):
        question = part.split(" ASSISTANT: ")[0] + " ASSISTANT: "
        hidden, length = len(slow.around_images(question)) - 2, len(slow.around_images(part))
        labels += [IGNORED] * hidden + ids[at + hidden : at + length]
        at += length
    assert at == len(ids), "the counts come out"
    return ids, labels


@pytest.mark.parametrize("ratio", ["pad", "square", None])
@pytest.mark.parametrize(("mode", "size"), [("RGB", (61, 37)), ("L", (23, 90)), ("P", (50, 50)), ("1", (9, 31))])
def test_pixels_are_pillows_and_numpys(sentence_model, tmp_path, ratio, mode, size):
    _, spec = written(tmp_path, sentence_model, SHAPES["grouped"], image_aspect_ratio=ratio)
    family = load_family(spec, dtype="float32")
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise).convert(mode).convert("RGB")
    given = family.pixels([[image]], torch.zeros(1, 1, dtype=torch.long))["pixel_values"][0].permute(1, 2, 0).numpy()
    mean, deviation = (np.array(originals.CLIP_PREPROCESSING[key]) for key in ("image_mean", "image_std"))
    side, (width, height) = 42, image.size
    if ratio == "pad":
        square = Image.new("RGB", (max(size), max(size)), tuple(int(each * 255) for each in mean))
        square.paste(image, ((max(size) - width) // 2, (max(size) - height) // 2))
        cut = np.asarray(square.resize((side, side), Image.Resampling.BICUBIC))
    else:
        short = min(size)
        wide = image.resize((int(side * width / short), int(side * height / short)), Image.Resampling.BICUBIC)
        left, top = (wide.width - side) // 2, (wide.height - side) // 2
        cut = np.asarray(wide)[top : top + side, left : left + side]
    np.testing.assert_allclose(given, (cut / 255 - mean) / deviation, rtol=0, atol=1e-6)


# Adapters of the released code


def drawn(*shape, seed, scale=0.3, dtype=torch.float32):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def linear(model, layer, role):
    return model.model.language_model.layers[layer].get_submodule(LINEARS[role])


def name_of(layer, role, kind, *, front="base_model.model.model."):
    return f"{front}layers.{layer}.{LINEARS[role]}.{kind}"


def targets(roles):
    return [f"model.layers.{layer}.{LINEARS[role]}" for layer in range(3) for role in roles]


def connector_of(model, seed=9):
    """A trained projector by the released code's names, and the same put into the model."""
    tensors = {}
    for number, part in (("0", "linear_1"), ("2", "linear_2")):
        for kind, own in model.model.multi_modal_projector.get_submodule(part).named_parameters():
            seed += 1
            tensors[f"base_model.model.model.mm_projector.{number}.{kind}"] = drawn(*own.shape, seed=seed).half()
            own.data.copy_(tensors[f"base_model.model.model.mm_projector.{number}.{kind}"])
    return tensors


def write_released(directory, config, tensors, connector, *, file="adapter_model.bin", beside):
    directory.mkdir()
    if config:
        (directory / "adapter_config.json").write_text(json.dumps({"task_type": "CAUSAL_LM", **config}))
    save_file(tensors, directory / file) if file.endswith("safetensors") else torch.save(tensors, directory / file)
    torch.save(connector, directory / beside)


def at_linears(roles):
    return [(layer, role) for layer in range(3) for role in roles]


def lora(model):
    """Rank 6 in bfloat16 on a few linears, with the wrappers that distributed training leaves."""
    tensors = {}
    for number, (layer, role) in enumerate(at_linears(["q", "v", "down"])):
        part = linear(model, layer, role)
        down = drawn(6, part.in_features, seed=2 * number, dtype=torch.bfloat16)
        up = drawn(part.out_features, 6, seed=2 * number + 1, dtype=torch.bfloat16)
        part.weight.data += 10 / 6 * up.float() @ down.float()
        for kind, tensor in (("A", down), ("B", up)):
            tensors[name_of(layer, role, f"lora_{kind}.default.weight", front="module.base_model.model.model.")] = (
                tensor
            )
    short = ["q_proj", "v_proj", "down_proj"]
    return {"peft_type": "LORA", "r": 6, "lora_alpha": 10, "target_modules": short, "loftq_config": {}}, tensors


def ia3(model):
    tensors = {}
    for number, (layer, role) in enumerate(at_linears(["k", "v", "down"])):
        part = linear(model, layer, role)
        shape = (1, part.in_features) if role == "down" else (part.out_features, 1)
        tensors[name_of(layer, role, "ia3_l")] = 1 + drawn(*shape, seed=number)
        part.weight.data *= tensors[name_of(layer, role, "ia3_l")]
    config = {"peft_type": "IA3", "target_modules": targets(["k", "v", "down"])}
    return config | {"feedforward_modules": targets(["down"])}, tensors


def bottleneck(model, *, parallel=False, learned=False):
    """Serial before q and gate and after o and down, or beside them all."""
    tensors, roles = {}, ["q", "o", "gate", "down"]
    for number, (layer, role) in enumerate(at_linears(roles)):
        part, after = linear(model, layer, role), role in ("o", "down")
        read = part.out_features if after and not parallel else part.in_features
        wrote = part.out_features if after or parallel else part.in_features
        down = drawn(5, read, seed=3 * number, scale=0.6, dtype=torch.bfloat16)
        up = drawn(wrote, 5, seed=3 * number + 1, scale=0.6, dtype=torch.bfloat16)
        scale = drawn(1, seed=3 * number + 2, scale=2) if learned else torch.tensor([0.7])
        tensors |= {name_of(layer, role, f"adapter_{kind}.weight"): t for kind, t in (("down", down), ("up", up))}
        if learned:
            tensors[name_of(layer, role, "adapter_scaling")] = scale
        patch(part, down.float(), up.float(), scale, "beside" if parallel else "after" if after else "before")
    config = {
        "peft_type": "BOTTLENECK", "bottleneck_size": 5, "non_linearity": "relu", "target_modules": targets(roles),
        "scaling": "learned" if learned else 0.7, "use_parallel_adapter": parallel, "adapter_dropout": 0.05,
    }  # fmt: skip
    return config, tensors


def patch(part, down, up, scale, place):
    whole = part.forward

    def change(hidden):
        return scale * functional.linear(torch.relu(functional.linear(hidden, down)), up)

    def forward(hidden):
        if place == "before":
            return whole(hidden + change(hidden))
        out = whole(hidden)
        return out + change(hidden if place == "beside" else out)

    part.forward = forward


ADAPTERS = {
    "lora": (lora, {"beside": "non_lora_trainables.bin"}),
    "ia3": (ia3, {"file": "adapter_model.safetensors", "beside": "non_adapter_trainables.bin"}),
    "serial": (bottleneck, {"beside": "non_adapter_trainables.bin"}),
    "parallel": (lambda model: bottleneck(model, parallel=True), {"beside": "mm_projector.bin"}),
    "learned": (lambda model: bottleneck(model, learned=True), {"beside": "non_adapter_trainables.bin"}),
}


@pytest.fixture
def fresh(base):
    """The base once more, to be patched by hand."""
    return load_family(base[1], dtype="float32").model


@pytest.mark.parametrize("kind", ADAPTERS)
@torch.no_grad()
def test_an_imported_adapter_computes_what_was_patched_by_hand(base, fresh, tmp_path, kind):
    make, files = ADAPTERS[kind]
    config, tensors = make(fresh)
    write_released(tmp_path / "theirs", config, tensors, connector_of(fresh), **files)
    import_adapter(tmp_path / "theirs", base=base[1].path, output=tmp_path / "ours", vision_tower=base[1].vision_tower)
    family = load_family(base[1], dtype="float32")
    for inputs in asked(family):
        plain, wanted = family.model(**inputs).logits, fresh(**inputs).logits
        assert (wanted - plain).abs().max() > 1
    given = load_adapter(family, tmp_path / "ours").base
    for inputs in asked(family):
        torch.testing.assert_close(given(**inputs).logits, fresh(**inputs).logits, rtol=0, atol=3e-5)


@torch.no_grad()
def test_an_imported_prefix_is_a_cache_of_learned_keys(base, fresh, tmp_path):
    """With grouped keys; the text's positions begin after the virtual tokens."""
    tokens, layers, heads, width = 7, 3, 3, 8
    table = drawn(tokens, 2 * layers * heads * width, seed=0, scale=1.0)
    config = {
        "peft_type": "PREFIX_TUNING", "num_virtual_tokens": tokens, "num_layers": layers, "token_dim": heads * width,
        "num_attention_heads": heads, "encoder_hidden_size": 48, "prefix_projection": True,
    }  # fmt: skip
    connector = {
        name.replace("model.model.model.", "model.model."): tensor for name, tensor in connector_of(fresh).items()
    }
    write_released(
        tmp_path / "theirs", config, {"prompt_embeddings": table}, connector, beside="non_adapter_trainables.bin"
    )
    import_adapter(tmp_path / "theirs", base=base[1].path, output=tmp_path / "ours", vision_tower=base[1].vision_tower)
    tuned = load_adapter(load_family(base[1], dtype="float32"), tmp_path / "ours")
    inputs = asked(tuned.family)[1]  # text alone: no image stands between keys and words
    length = inputs["input_ids"].shape[1]
    cache = DynamicCache()
    pairs = table.view(tokens, 2 * layers, heads, width).permute(1, 2, 0, 3)
    for layer in range(layers):
        cache.update(pairs[2 * layer][None], pairs[2 * layer + 1][None], layer)
    read = fresh.model.language_model(
        **inputs,
        past_key_values=cache,
        attention_mask=torch.ones(1, tokens + length, dtype=torch.long),
        position_ids=torch.arange(tokens, tokens + length)[None],
    )
    wanted = fresh.lm_head(read.last_hidden_state)
    assert (wanted - fresh(**inputs).logits).abs().max() > 1
    torch.testing.assert_close(tuned.base(**inputs).logits, wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("mistake", ["a layer less", "a layer more", "another kind of tensor", "a setting that scales"])
def test_an_adapter_that_does_not_fit_is_refused_whole(base, fresh, tmp_path, mistake):
    config, tensors = lora(fresh)
    some = next(iter(tensors))
    if mistake == "a layer less":
        tensors = {name: tensor for name, tensor in tensors.items() if ".layers.1." not in name}
    elif mistake == "a layer more":
        tensors[some.replace("layers.0", "layers.3")] = tensors[some]
    elif mistake == "another kind of tensor":
        tensors[some.replace("lora_A", "lora_C")] = tensors[some]
    else:
        config["alpha_pattern"] = {"q_proj": 2}
    write_released(tmp_path / "theirs", config, tensors, {}, beside="non_lora_trainables.bin")
    with pytest.raises(ModelError):
        import_adapter(
            tmp_path / "theirs", base=base[1].path, output=tmp_path / "ours", vision_tower=base[1].vision_tower
        )
    assert [path.name for path in Path(tmp_path).iterdir()] == ["theirs"]
