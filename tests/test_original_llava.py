"""Original LLaVA-1.5 and ShareGPT4V checkpoints give the numbers of the original code, natively loaded.

The recordings are the original code's own; each test prints the largest difference. The variants of a checkpoint
(files, towers, damage) are tried on tiny ones that the tests write.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import sentencepiece
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

import tiny
from originals import write_original
from peft_mllm.bins import read_bin
from peft_mllm.data.encode import IGNORED
from peft_mllm.data.formats import RecordFile
from peft_mllm.errors import DegradedModel, ModelError
from peft_mllm.loading import load_family
from peft_mllm.models.base import Loading
from peft_mllm.models.llava import SYSTEM, Llava
from peft_mllm.models.llava_tokenizer import load_tokenizer
from peft_mllm.spec import ModelSpec

PIXELS, FEATURES, LOGITS, LOSS, GRADIENT = 1e-6, 1e-5, 2e-5, 5e-6, 1e-5
SETS = ("llava", "sharegpt4v")


def within(what, ours, golden, tolerance, *, relative_to=1.0):
    difference = (ours - golden).abs().max().item() / relative_to
    sys.stdout.write(f"{what}: {difference:.2e} (allowed {tolerance:.0e})\n")
    assert ours.shape == golden.shape, what
    assert difference <= tolerance, what


class Golden:
    """One recorded folder, loaded in float32."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.tensors = load_file(folder / "golden.safetensors")
        self.said = json.loads((folder / "golden.json").read_text())
        self.tokenizing = json.loads((folder / "tokenizer_cases.json").read_text())
        self.family = self.load()
        self.image_token = self.family.model.config.image_token_id
        self.patches = self.tensors["image_features"].shape[1]

    def load(self, *, attn="sdpa", tower="vision_tower"):
        loading = Loading("float32", attn_implementation=attn, vision_tower=str(self.folder / tower))
        return Llava.load(self.folder / "checkpoint", loading=loading)

    def images(self, *names):
        return [Image.open(self.folder / "images" / name).convert("RGB") for name in names]

    def expanded(self, ids):
        """Recorded ids with as many placeholders as an image has patches."""
        return [t for token in ids.tolist() for t in ([self.image_token] * self.patches if token == -200 else [token])]

    def records(self):
        return list(RecordFile(self.folder / "train_samples.json", image_root=self.folder / "images"))

    def prompt(self, name):
        """A recorded prompt as a record: its text is taken apart again."""
        told = self.said["prompts"][name]
        rounds = told["prompt"].removeprefix(f"{SYSTEM} ").split("</s>")
        turns = [text.removeprefix("USER: ").split(" ASSISTANT:") for text in rounds]
        texts = [part.removeprefix(" ") if i else part for turn in turns for i, part in enumerate(turn)]
        images = tuple(Shown(self.folder / "images" / image) for image in told["images"])
        record = tiny.record(name, *texts)
        return type(record)(id=name, turns=record.turns, images=images)


class Shown(tiny.ImageSource):
    def __init__(self, path):
        self.path = path

    @property
    def key(self):
        return str(self.path)

    def load(self):
        return Image.open(self.path).convert("RGB")


@pytest.fixture(scope="module", params=SETS)
def golden(request, cases):
    return Golden(cases / "golden" / request.param)


PROMPTS = pytest.mark.parametrize("prompt", ["p0", "p1", "p2", "p3"])


# Text


def test_every_string_has_the_original_ids(golden):
    tokenizer = golden.family.tokenizer
    assert [case["text"] for case in golden.tokenizing["tokenizer(text).input_ids"] if case["text"].startswith(" ")]
    for case in golden.tokenizing["tokenizer(text).input_ids"]:
        assert tokenizer(case["text"])["input_ids"] == case["ids"], case["text"]


def test_the_oldest_llama_tokenizers_are_read_as_they_were(golden, tmp_path):
    """Without `legacy: false`, what follows any special token begins with a mark of space."""
    for file in ("tokenizer.model", "special_tokens_map.json"):
        shutil.copy(golden.folder / "checkpoint" / file, tmp_path)
    told = json.loads((golden.folder / "checkpoint" / "tokenizer_config.json").read_text())
    for legacy in ({"legacy": True}, {}):
        kept = {key: value for key, value in told.items() if key != "legacy"} | legacy
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(kept))
        tokenizer = load_tokenizer(tmp_path, rows=len(golden.family.tokenizer))
        for case in golden.tokenizing["tokenizer(text).input_ids"]:
            assert tokenizer(case["text"])["input_ids"] == case["ids_legacy_true"], case["text"]


def test_a_whole_prompt_with_marks_has_the_ids_of_its_chunks(golden):
    """The original tokenises around the images; here the tokenizer itself knows where an image ends."""
    cases = golden.tokenizing["tokenizer_image_token"] + golden.tokenizing["conversation_prompts"]
    for case in cases:
        ids = golden.family.tokenizer(case.get("text") or case["prompt"])["input_ids"]
        assert [-200 if token == golden.image_token else token for token in ids] == case["ids"], case


def test_the_placeholder_is_no_new_row_and_no_text(golden):
    model, tokenizer = golden.family.model, golden.family.tokenizer
    rows = json.loads((golden.folder / "checkpoint" / "config.json").read_text())["vocab_size"]
    assert model.lm_head.out_features == model.model.language_model.embed_tokens.num_embeddings == rows
    assert tokenizer.convert_tokens_to_ids("<image>") == golden.image_token < rows
    assert (tokenizer.unk_token_id, tokenizer.pad_token_id) == (0, 0)
    every_lead = bytes(range(256)).decode("latin-1") + "é図🙂\ud7ff\U0010ffff"
    assert golden.image_token not in tokenizer(every_lead)["input_ids"]


def test_random_strings_have_sentencepieces_own_ids(golden):
    plain = sentencepiece.SentencePieceProcessor(model_file=str(golden.folder / "checkpoint" / "tokenizer.model"))
    draw = random.Random(0)
    words = golden.said["prompts"]["p1"]["prompt"].replace("<image>", "").replace("</s>", "").split(" ")
    for _ in range(500):
        text = "".join(
            draw.choice(["", " ", "  ", "\n", "\u2581"])
            + (draw.choice(words) if draw.random() < 0.6 else chr(draw.choice([draw.randrange(32, 0x3000), 0x1F600])))
            for _ in range(draw.randrange(1, 12))
        )
        assert golden.family.tokenizer(text)["input_ids"] == [1, *plain.encode(text)], repr(text)


@PROMPTS
def test_prompts_have_the_original_ids(golden, prompt):
    sample = golden.family.encode(golden.prompt(prompt), answer=False)
    assert list(sample.ids) == golden.expanded(golden.tensors[f"{prompt}.input_ids"])


@pytest.mark.parametrize("i", range(4))
def test_training_samples_have_the_original_ids_and_labels(golden, i):
    record = golden.records()[i]
    sample = golden.family.encode(record)
    ids, labels = golden.tensors[f"t{i}.input_ids"], golden.tensors[f"t{i}.labels"]
    assert list(sample.ids) == golden.expanded(ids)
    repeats = [golden.patches if token == -200 else 1 for token in ids.tolist()]
    assert list(sample.labels) == labels.repeat_interleave(torch.tensor(repeats)).tolist()
    assert golden.family.encode(record, labels="upstream") == sample
    learned = "".join(golden.family.tokenizer.convert_ids_to_tokens([t for t in sample.labels if t != IGNORED]))
    supervised = "".join(golden.said["train"][f"t{i}"]["supervised_text"])
    assert learned.replace("\u2581", "").replace(" ", "") == supervised.replace(" ", "")


# Images


def test_pixels(golden, tmp_path):
    images = golden.images("img0.png", "img1.png")
    ids = torch.zeros(1, 1, dtype=torch.long)
    within("pixel_values", golden.family.pixels([images], ids)["pixel_values"], golden.tensors["pixel_values"], PIXELS)
    copied = tmp_path / "checkpoint"
    shutil.copytree(golden.folder / "checkpoint", copied, copy_function=shutil.copyfile)
    for ratio in ("square", None):
        change(copied, image_aspect_ratio=ratio)
        loading = Loading("float32", vision_tower=str(golden.folder / "vision_tower"))
        square = Llava.load(copied, loading=loading).pixels([images], ids)["pixel_values"]
        within("pixel_values_square", square, golden.tensors["pixel_values_square"], PIXELS)


@pytest.mark.parametrize("tower", ["vision_tower", "vision_tower_full_clip"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_features(golden, tower, attn):
    if not (golden.folder / tower).is_dir():
        pytest.skip(f"{golden.folder.name} has no {tower}")
    model = golden.load(attn=attn, tower=tower).model
    with torch.no_grad():
        seen = model.model.vision_tower(golden.tensors["pixel_values"], output_hidden_states=True)
        within(f"[{attn}] vision_features", seen.hidden_states[-2][:, 1:], golden.tensors["vision_features"], FEATURES)
        made = model.model.get_image_features(golden.tensors["pixel_values"], return_dict=True).pooler_output
    within(f"[{attn}] image_features", torch.stack(tuple(made)), golden.tensors["image_features"], FEATURES)


# The model


@pytest.fixture(params=["sdpa", "eager"])
def attending(request, golden):
    golden.family.model.set_attn_implementation(request.param)
    yield request.param
    golden.family.model.set_attn_implementation("sdpa")


def asked(golden, prompt):
    batch = tiny.prompts(golden.family, [golden.prompt(prompt)])
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, **batch.pixels}


@PROMPTS
def test_logits(golden, attending, prompt):
    with torch.no_grad():
        logits = golden.family.model(**asked(golden, prompt)).logits[0]
    names = [name for name in (f"{prompt}.logits", f"{prompt}.logits_last16") if name in golden.tensors]
    for name in names:
        recorded = golden.tensors[name]
        within(f"[{attending}] {name}", logits[-len(recorded) :], recorded, LOGITS)
    assert names


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "uncached"])
@PROMPTS
def test_greedy_answers(golden, prompt, cached):
    model, inputs = golden.family.model, asked(golden, prompt)
    ends, model.generation_config.eos_token_id = model.generation_config.eos_token_id, None
    try:
        made = model.generate(**inputs, max_new_tokens=8, do_sample=False, use_cache=cached)
    finally:
        model.generation_config.eos_token_id = ends
    assert made[0, inputs["input_ids"].shape[1] :].tolist() == golden.tensors[f"{prompt}.greedy_ids"].tolist()


def padded(golden, samples):
    """Rows, right-padded as the original collates them, for the model's own loss."""
    length = max(len(sample.ids) for sample in samples)
    ids = torch.tensor([[*sample.ids, *[0] * (length - len(sample.ids))] for sample in samples])
    mask = torch.tensor([[1] * len(sample.ids) + [0] * (length - len(sample.ids)) for sample in samples])
    labels = torch.tensor([[*sample.labels, *[IGNORED] * (length - len(sample.labels))] for sample in samples])
    images = [image.load() for sample in samples for image in sample.images]
    pixels = golden.family.pixels([images], ids) if images else {}
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, **pixels}


def test_losses(golden, attending):
    samples = [golden.family.encode(record) for record in golden.records()]
    alone = tiny.tune("none", on=golden.family)
    with torch.no_grad():
        for i, sample in enumerate(samples):
            recorded = golden.tensors[f"t{i}.loss"].squeeze()
            within(f"[{attending}] t{i}.loss", golden.family.model(**padded(golden, [sample])).loss, recorded, LOSS)
        inputs, recorded = padded(golden, samples), golden.tensors["batch.loss"].squeeze()
        assert torch.equal(inputs["labels"], golden.tensors["batch.expanded_labels"])
        assert torch.equal(inputs["attention_mask"].bool(), golden.tensors["batch.expanded_attention_mask"])
        answer = golden.family.model(**inputs)
        within(f"[{attending}] batch.loss", answer.loss, recorded, LOSS)
        for name, batch in {"padded": tiny.padded, "as trees": tiny.shared}.items():
            loss = alone.answer_losses(batch(golden.family, samples)).mean()
            within(f"[{attending}] batch.loss {name}", loss, recorded, LOSS)
    lengths = inputs["attention_mask"].sum(1).tolist()
    last = torch.stack([row[length - 8 : length] for row, length in zip(answer.logits, lengths, strict=True)])
    within(f"[{attending}] batch.valid_last8_logits", last, golden.tensors["batch.valid_last8_logits"], LOGITS)


def ours(original):
    """Our name of an original parameter."""
    for theirs, name in (
        ("model.mm_projector.0.", "model.multi_modal_projector.linear_1."),
        ("model.mm_projector.2.", "model.multi_modal_projector.linear_2."),
        ("model.", "model.language_model."),
    ):
        if original.startswith(theirs):
            return name + original.removeprefix(theirs)
    return original


def test_gradients(golden, attending):
    model = golden.family.model
    model.requires_grad_(True)
    model.model.vision_tower.requires_grad_(False)  # the original runs it without gradients
    try:
        model(**padded(golden, [golden.family.encode(record) for record in golden.records()])).loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    finally:
        model.zero_grad(set_to_none=True)
        model.requires_grad_(True)
    norms = {ours(name): norm for name, norm in golden.said["batch_grad_norms"].items()}
    assert norms.keys() == gradients.keys()
    relative = {name: abs(gradients[name].norm().item() / norm - 1) for name, norm in norms.items()}
    worst = max(relative, key=relative.__getitem__)
    largest = torch.tensor(relative[worst])
    within(f"[{attending}] norms of {len(norms)} gradients, most at {worst}", largest, torch.tensor(0.0), GRADIENT)
    recorded = {name: value for name, value in golden.tensors.items() if name.startswith("batch.grad.")}
    assert recorded
    for name, value in recorded.items():
        mine = gradients[ours(name.removeprefix("batch.grad."))]
        within(f"[{attending}] {name}", mine, value, GRADIENT, relative_to=value.abs().max().item())


# Checkpoints in all their shapes


def change(checkpoint: Path, **changes) -> None:
    file = checkpoint / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def load(made, *, tower=None, dtype="float32"):
    return Llava.load(made.checkpoint, loading=Loading(dtype, vision_tower=tower and str(tower)))


def assert_same_model(family, model):
    mine, theirs = family.model.state_dict(), model.state_dict()
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(mine[name].float(), tensor), name


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"parts": 3},
        {"safetensors": True},
        {"safetensors": True, "parts": 2},
        {"kind": "share4v", "tower_name": "tuned"},
        {"inside": True},
        {"inside": True, "parts": 2, "safetensors": True},
        {"tower": "v5"},
        {"tower": "full"},
        {"tower_dtype": torch.bfloat16},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float32},
        {"changes": {"tie_word_embeddings": True}},
        {"changes": {"num_key_value_heads": 4}},
        {"changes": {"mm_vision_select_feature": "cls_patch", "mm_vision_select_layer": -1}},
        {"changes": {"mm_use_im_patch_token": True}},
        {"changes": {"rope_scaling": {"type": "linear", "factor": 2.0}}},
    ],
    ids=lambda shape: " ".join(f"{key}={value}" for key, value in shape.items()) or "plain",
)
def test_every_tensor_lands(tmp_path, shape):
    made = write_original(tmp_path, **shape)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DegradedModel)
        family = load(made)
    assert_same_model(family, made.model)
    text = "USER: <image> What is it? ASSISTANT:".replace("<image>", "")
    inputs = torch.tensor([family.tokenizer(text)["input_ids"]])
    with torch.no_grad():
        logits, expected = family.model(inputs).logits, made.model(inputs).logits
    if not shape.get("changes", {}).get("rope_scaling"):
        assert torch.equal(logits, expected)
    sample = family.encode(tiny.record("x", "<image>\nWhat?", "red", images=(1,)))
    assert sample.ids.count(family.model.config.image_token_id) == (5 if "cls_patch" in str(shape) else 4)
    assert tiny.tune("none", on=family).answer_losses(tiny.shared(family, [sample])).isfinite().all()


def test_a_scaled_rotary_embedding_is_kept(tmp_path):
    made = write_original(tmp_path, changes={"rope_scaling": {"type": "linear", "factor": 4.0}})
    scaled = load(made).model.model.language_model.rotary_emb.inv_freq
    change(made.checkpoint, rope_scaling=None)
    plain = load(made).model.model.language_model.rotary_emb.inv_freq
    assert torch.allclose(scaled * 4, plain)
    assert torch.allclose(plain, 10000.0 ** (-torch.arange(0, 8, 2) / 8))  # not the file's, which are ones


def test_types(tmp_path):
    made = write_original(tmp_path, tower_dtype=torch.bfloat16)
    for dtype, wanted in {"auto": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}.items():
        model = load(made, dtype=dtype).model
        assert {tensor.dtype for tensor in model.state_dict().values()} == {wanted}
        assert model.model.language_model.rotary_emb.inv_freq.dtype == torch.float32
    stored = load(made, dtype="stored").model
    assert {stored.lm_head.weight.dtype, stored.model.vision_tower.dtype} == {torch.float16, torch.bfloat16}


def test_a_given_tower_goes_before_the_one_inside(tmp_path):
    made = write_original(tmp_path / "a", inside=True)
    other = write_original(tmp_path / "b", seed=1)
    family = load(made, tower=other.tower)
    assert torch.equal(family.model.lm_head.weight, made.model.lm_head.weight)
    name = "model.vision_tower.encoder.layers.0.mlp.fc1.weight"
    theirs = other.model.state_dict()
    name = name if name in theirs else name.replace("vision_tower.", "vision_tower.vision_model.")
    assert torch.equal(family.model.state_dict()[name], theirs[name])
    assert str(other.tower) in " ".join(family.notes)
    assert "inside the checkpoint" in " ".join(load(made).notes)


def test_it_is_recognised_and_loaded_by_its_spec(tmp_path):
    made = write_original(tmp_path, kind="share4v", tower_name="tuned")
    family = load_family(ModelSpec(path=str(made.checkpoint)), dtype="float32")
    assert isinstance(family, Llava)
    assert_same_model(family, made.model)
    assert family.model.generation_config.eos_token_id == 2
    assert family.model.generation_config.temperature in (None, 1.0)  # it does not sample


def test_a_spare_row_is_the_placeholder(tmp_path):
    made = write_original(tmp_path, vocabulary=424)
    assert load(made).model.config.image_token_id == 420


def test_an_added_token_keeps_its_row_and_may_be_the_placeholder(tmp_path):
    made = write_original(tmp_path, vocabulary=422)
    (made.checkpoint / "added_tokens.json").write_text(json.dumps({"<image>": 421, "<im_patch>": 420}))
    family = load(made)
    assert family.model.config.image_token_id == 421
    assert family.tokenizer("a<im_patch>")["input_ids"][-1] == 420


@pytest.mark.parametrize(
    ("added", "said"),
    [({"<x>": 425}, "do not follow the 420"), ({"<x>": 420}, "421 ids, its model only 420 rows")],
)
def test_an_added_token_without_a_row_is_an_error(tmp_path, added, said):
    made = write_original(tmp_path)
    (made.checkpoint / "added_tokens.json").write_text(json.dumps(added))
    with pytest.raises(ModelError, match=said):
        load(made)


# What is wrong is said


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mm_projector_type": "linear"}, "mm_projector_type: linear"),
        ({"mm_projector_type": "mlp3x_gelu"}, "mm_projector_type: mlp3x_gelu"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio: anyres"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end"),
        ({"mm_vision_select_feature": "cls"}, "mm_vision_select_feature: cls"),
        ({"mm_vision_select_layer": None}, "mm_vision_select_layer"),
        ({"mm_resampler_type": "perceiver"}, "mm_resampler_type: perceiver"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"mm_hidden_size": 64}, "features of width 64.*gives 32.*--vision-tower"),
        ({"mm_vision_tower": None}, "names no vision tower"),
        ({"mm_vision_tower": "nobody/nothing"}, "mm_vision_tower.*nobody/nothing.*--vision-tower.*`vision_tower`"),
        ({"hidden_size": 40}, r"of another shape: .*embed_tokens\.weight \(420, 32\) instead of \(420, 40\)"),
        ({"num_hidden_layers": 3}, r"missing: model\.language_model\.layers\.2\..* and 1 more"),
        ({"num_hidden_layers": 1}, r"left over: model\.language_model\.layers\.1\."),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_listed(tmp_path, changes, said):
    made = write_original(tmp_path)
    change(made.checkpoint, **changes)
    with pytest.raises(ModelError, match=said):
        load_family(ModelSpec(path=str(made.checkpoint)), dtype="float32")


def test_a_key_that_lands_nowhere_is_an_error(tmp_path):
    made = write_original(tmp_path)
    weights = read_bin(made.checkpoint / "pytorch_model.bin") | {"model.image_newline": torch.ones(32)}
    torch.save(weights, made.checkpoint / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"left over: model\.image_newline"):
        load(made)


@pytest.mark.parametrize("where", ["checkpoint", "tower"])
def test_a_tensor_that_is_missing_is_an_error(tmp_path, where):
    made = write_original(tmp_path)
    file = getattr(made, where) / "pytorch_model.bin"
    weights = read_bin(file)
    gone = "model.norm.weight" if where == "checkpoint" else "vision_model.post_layernorm.bias"
    torch.save({name: tensor for name, tensor in weights.items() if name != gone}, file)
    with pytest.raises(ModelError, match=rf"missing: model\..*{gone.rsplit('_model.', 1)[-1].removeprefix('model.')}"):
        load(made)


def test_a_tower_that_is_no_clip_is_refused(tmp_path):
    made = write_original(tmp_path)
    (made.tower / "config.json").write_text(json.dumps({"model_type": "siglip_vision_model"}))
    with pytest.raises(ModelError, match="'siglip_vision_model' model"):
        load(made)
    (made.tower / "config.json").unlink()
    with pytest.raises(ModelError, match=r"config\.json cannot be read"):
        load(made)


def test_a_given_tower_must_be_there(tmp_path):
    made = write_original(tmp_path)
    with pytest.raises(ModelError, match=r"vision tower cannot be had: .*nowhere is no directory"):
        load(made, tower=tmp_path / "nowhere")


def test_a_checkpoint_without_its_tokenizer_is_refused(tmp_path):
    made = write_original(tmp_path)
    (made.checkpoint / "tokenizer.model").unlink()
    with pytest.raises(ModelError, match=r"tokenizer\.model is missing"):
        load(made)
    (made.checkpoint / "tokenizer.model").write_bytes(b"\x0e\xff no model")
    with pytest.raises(ModelError, match=r"tokenizer\.model is (no SentencePiece model|not of Llama)"):
        load(made)


def test_quantising_comes_after_converting(tmp_path):
    made = write_original(tmp_path)
    with pytest.raises(ModelError, match="peft-mllm convert"):
        Llava.load(made.checkpoint, loading=Loading("float32", quantization=object()))


def test_a_tower_for_a_model_that_has_one_is_an_error(tmp_path):
    tiny.family().save(tmp_path)
    with pytest.raises(ModelError, match="has its vision tower inside"):
        Llava.load(tmp_path, loading=Loading("float32", vision_tower="x"))


# A plain CLIP where a tuned tower belongs


def warned(made, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        family = load(made, **options)
    found = [str(each.message) for each in caught if each.category is DegradedModel]
    assert [note for note in family.notes if "plain CLIP" in note] == found  # runs note what was warned of
    return found


TUNED = {"kind": "share4v", "tower_name": "ShareGPT4V-tiny_Pretrained_vit"}


def test_the_tuned_tower_is_nothing_to_warn_of(tmp_path):
    made = write_original(tmp_path, **TUNED)
    assert warned(made) == []
    renamed = made.tower.rename(tmp_path / "tower")  # its config still says what it is
    change(renamed, _name_or_path="ShareGPT4V-tiny_Pretrained_vit")
    assert warned(made, tower=renamed) == []


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ({"tower_name": "clip-vit-tiny-patch14"}, r"is a plain CLIP \(it is called clip-vit-tiny-patch14\)"),
        ({"tower_name": "t", "tower": "full"}, r"is a plain CLIP \(it comes with CLIP's text half\)"),
        ({"tower_name": "t", "tower": "v5"}, "nothing shows that .* is that tower"),
    ],
    ids=["by its name", "by its text half", "nothing known"],
)
def test_a_plain_clip_in_its_place_is_said(tmp_path, shape, said):
    made = write_original(tmp_path / "a", **TUNED)
    other = write_original(tmp_path / "b", **shape)
    (warning,) = warned(made, tower=other.tower)
    assert str(made.tower) in warning
    assert str(other.tower) in warning
    assert re.search(said, warning)


def test_a_name_in_the_towers_config_gives_it_away(tmp_path):
    made = write_original(tmp_path / "a", **TUNED)
    change(made.tower, _name_or_path="openai/clip-vit-large-patch14-336")
    (warning,) = warned(made)
    assert "it is called clip-vit-large-patch14-336" in warning


def test_a_llava_that_tuned_its_tower_wants_that_one(tmp_path):
    made = write_original(tmp_path, tower_name="clip-vit-tiny")
    assert warned(made) == []
    change(made.checkpoint, unfreeze_mm_vision_tower=True)
    assert len(warned(made)) == 1


def test_the_published_geometry_is_known(cases):
    """A tower inside a checkpoint needs no other file, when it is CLIP-L/14 at 336 pixels."""
    from peft_mllm.models.llava_tower import find_tower

    config = json.loads((cases / "llava" / "liuhaotian_llava-v1.5-7b_config.json").read_text())
    made = find_tower("x", config, given=None, inside=True).config
    recorded = json.loads((cases / "sharegpt4v" / "vit-large336-l12_config.json").read_text())
    for key, value in recorded.items():
        if key not in ("_name_or_path", "architectures", "dropout", "torch_dtype", "transformers_version"):
            assert getattr(made, key) == value, key


@pytest.mark.parametrize("name", ["7b", "13b"])
def test_the_published_llavas_have_a_place_for_every_published_name(cases, name):
    """On the meta device: the parameter count is the published one."""
    from accelerate import init_empty_weights

    from peft_mllm.models.llava_tower import find_tower
    from peft_mllm.models.original_llava import _llava_config

    config = json.loads((cases / "llava" / f"liuhaotian_llava-v1.5-{name}_config.json").read_text())
    tower = find_tower("x", config, given=None, inside=True)
    with init_empty_weights(include_buffers=False):
        model = LlavaForConditionalGeneration(_llava_config(config, tower, 258))
    beside = sum(p.numel() for n, p in model.named_parameters() if "vision_tower" not in n)
    assert beside == {"7b": 6_738_415_616 + 20_979_712, "13b": 13_015_864_320 + 31_467_520}[name]
    assert model.config.image_seq_length == 576
