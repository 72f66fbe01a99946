"""Adapters of the released code: every tensor lands, and the numbers are the original's, or nothing is written."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import peft_mllm
import released as recorded
from peft_mllm.cli import app
from peft_mllm.errors import ModelError
from peft_mllm.released import import_adapter
from peft_mllm.tuned import load_adapter

KINDS = ("lora", "ia3", "bottleneck", "bottleneck_large", "parallel_adapter", "prefix")
PROMPTS = ("p0", "p1", "p2")
SAMPLES = ("t0", "t1", "t2", "t3")
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def llava(cases):
    return recorded.Llava(cases / "golden" / "llava")


@pytest.fixture(scope="module")
def imported(llava, tmp_path_factory):
    """Kind -> the imported directory; each is made once."""
    root = tmp_path_factory.mktemp("imported")
    for kind in KINDS:
        brought(llava, llava.adapter(kind), root / kind)
    return lambda kind: root / kind


def brought(llava, directory, output, **options):
    """An import onto the recorded base."""
    base = llava.base
    return import_adapter(directory, base=base.path, vision_tower=base.vision_tower, output=output, **options)


def forward(model, llava, name, dtype=torch.float32):
    return model(**llava.inputs(name, llava_placeholder(model), dtype)).logits[0]


def llava_placeholder(model):
    return (model.get_base_model() if isinstance(model, PeftModel) else model).config.image_token_id


# --- the original's numbers ---


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_logits(llava, imported, kind):
    tuned, wanted = load_adapter(llava.family(), imported(kind)), llava.wanted(kind)
    worst = max(recorded.apart(forward(tuned.base, llava, name), recorded.logits_of(wanted, name)) for name in PROMPTS)
    recorded.told(f"{kind} logits", worst, 2e-5)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_logits_by_plain_peft(llava, imported, kind):
    """peft's own forward, also of the prefix: nothing of ours is needed beyond the bottleneck's registration."""
    model = PeftModel.from_pretrained(llava.family().model, str(imported(kind)))
    worst = 0.0
    for name in PROMPTS:
        got = forward(model, llava, name)
        worst = max(worst, recorded.apart(got, recorded.logits_of(llava.wanted(kind), name)))
    recorded.told(f"{kind} logits by peft", worst, 2e-5)


@torch.no_grad()
def test_merged_logits(llava, imported):
    model = PeftModel.from_pretrained(llava.family().model, str(imported("lora"))).merge_and_unload()
    wanted = llava.wanted("lora")
    worst = max(recorded.apart(forward(model, llava, name), recorded.logits_of(wanted, name)) for name in PROMPTS)
    recorded.told("merged lora logits", worst, 5e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients(llava, imported, kind):
    tuned, wanted = load_adapter(llava.family(), imported(kind), trainable=True), llava.wanted(kind)
    losses, sums, tokens = [], [], 0
    for name in SAMPLES:
        labels = llava.labels(name)[:, 1:]
        logits = tuned.base(**llava.inputs(name, llava_placeholder(tuned.base))).logits[:, :-1]
        sums.append(torch.nn.functional.cross_entropy(logits[0], labels[0], reduction="sum"))
        tokens += int((labels != -100).sum())
        losses.append(abs(float(sums[-1].detach()) / int((labels != -100).sum()) - float(wanted[f"{name}.loss"])))
    batch = sum(sums) / tokens
    losses.append(abs(float(batch.detach()) - float(wanted["batch.loss"])))
    recorded.told(f"{kind} losses", max(losses), 5e-6)
    batch.backward()
    gradients = {original(name): parameter.grad for name, parameter in tuned.trainable().items()}
    if kind == "prefix":
        gradients |= through_encoder(llava, gradients.pop("prompt_encoder.embedding.weight"))
    norms = {name.replace(".default", ""): norm for name, norm in llava.norms(kind).items()}
    recorded.told(f"{kind} gradient norms", recorded.norms_apart(gradients, norms), 1e-5)


def original(name):
    """The released code's name of a trained parameter, without the adapter's."""
    name = name.replace(".language_model.", ".").replace("modules_to_save.", "").replace(".default", "")
    return name.replace("multi_modal_projector.linear_1", "mm_projector.0").replace(
        "multi_modal_projector.linear_2", "mm_projector.2"
    )


def through_encoder(llava, of_table):
    """Gradients of the encoder that the table came from, given the table's: the rest of the chain rule."""
    stored = torch.load(llava.adapter("prefix") / "non_adapter_trainables.bin", weights_only=True)
    names = [name for name in stored if name.startswith("prompt_encoder.")]
    e, w0, b0, w2, b2 = (stored[name].float().requires_grad_() for name in names)
    linear = torch.nn.functional.linear
    linear(torch.tanh(linear(e, w0, b0)), w2, b2).backward(of_table)
    return {name: leaf.grad for name, leaf in zip(names, (e, w0, b0, w2, b2), strict=True)}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_logits_in_bfloat16_throughout(llava, imported, kind):
    """As the released code trained: the model in bfloat16, and the adapter, too; the prefix under autocast."""
    family, wanted = llava.family("bfloat16"), llava.wanted(kind)
    if kind == "prefix":
        model = load_adapter(family, imported(kind), bf16=True).base
    else:
        model = PeftModel.from_pretrained(family.model, str(imported(kind)), autocast_adapter_dtype=False)
    worst = 0.0
    for name in PROMPTS:
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "prefix"):
            got = forward(model, llava, name, torch.bfloat16).float()
        right = next(value for key, value in wanted.items() if key.startswith("native_bf16") and f".{name}." in key)
        worst = max(worst, float((got[-len(right) :] - right).norm() / right.norm()))
    recorded.told(f"{kind} logits in bfloat16, relative", worst, 0.04)


# --- what is written ---


@pytest.mark.parametrize("kind", KINDS)
def test_every_number_is_kept(llava, imported, kind):
    """Nothing is rounded: the values and types are those of the released files."""

    def digest(tensors):
        return sorted((str(t.dtype), tuple(t.shape), t.float().sum().item(), t.float().norm().item()) for t in tensors)

    before = [
        tensor
        for file in llava.adapter(kind).iterdir()
        if file.suffix in (".bin", ".safetensors")
        for name, tensor in (load_file(file) if file.suffix != ".bin" else torch.load(file, weights_only=True)).items()
        if not name.startswith("prompt_encoder.")
    ]
    assert digest(load_file(imported(kind) / WEIGHTS).values()) == digest(before)


def test_the_report_names_every_file(llava, tmp_path):
    directory = copied(llava, "prefix", tmp_path)
    (directory / "training_args.bin").write_bytes(b"a pickle")
    (directory / "global_step100").mkdir()
    report = brought(llava, directory, tmp_path / "out")
    assert report.method == "prefix"
    assert report.options == {"virtual_tokens": 5}
    assert report.connector == ["model.multi_modal_projector"]
    assert set(report.files) == {"adapter_config.json", "adapter_model.bin", "non_adapter_trainables.bin"}
    assert "5 of their encoder, which only resuming needs" in report.files["non_adapter_trainables.bin"]
    assert "DeepSpeed" in report.ignored["global_step100"]
    assert "pickle" in report.ignored["training_args.bin"]
    assert any("this very table" in note for note in report.notes)


def test_the_method_is_told(llava, tmp_path):
    report = brought(llava, llava.adapter("parallel_adapter"), tmp_path / "out")
    assert (report.method, report.options["bottleneck"]) == ("adapter", 8)
    assert report.options["parallel"] == ["gate", "up", "down"]
    assert (tmp_path / "out" / "README.md").is_file()


def test_the_verb(llava, tmp_path):
    arguments = ["import-adapter", str(llava.adapter("ia3")), "--base", llava.base.path, "--out", str(tmp_path / "o")]
    done = CliRunner().invoke(app, [*arguments, "--vision-tower", llava.base.vision_tower, "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["options"] == {"on": ["k", "v", "down"]}
    assert len(load_file(tmp_path / "o" / WEIGHTS)) == 10


def test_a_converted_base_and_a_score(llava, imported, tmp_path):
    """The base may be the original or its Hugging Face form; the adapter is the same, and can be evaluated on it."""
    llava.family().save(tmp_path / "hf")
    import_adapter(llava.adapter("bottleneck_large"), base=str(tmp_path / "hf"), output=tmp_path / "out")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (imported("bottleneck_large") / WEIGHTS).read_bytes()
    task = {"name": "scenes_count", "size": {"train": 8, "validation": 8, "test": 8}}
    scores = peft_mllm.evaluate(tmp_path / "out", [task], base=str(tmp_path / "hf"), limit=2, quiet=True)
    assert scores["scenes_count"]["n"] == 2


def test_it_trains_on(llava, imported, tmp_path):
    """A few steps lower the loss, and what is saved loads with the same logits."""
    for kind in ("lora", "bottleneck_large", "prefix"):
        tuned = load_adapter(llava.family(), imported(kind), trainable=True)
        inputs = llava.inputs("t0", llava_placeholder(tuned.base))
        optimizer = torch.optim.AdamW(tuned.trainable().values(), lr=3e-3)
        losses = []
        for _ in range(4):
            loss = tuned.base(**inputs, labels=llava.labels("t0")).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        assert losses[-1] < losses[0] - 0.1, kind
        assert {tuned.family.anatomy.part_of(name) for name in tuned.trainable()} >= {"connector"}
        (tmp_path / kind).mkdir()
        tuned.save(tmp_path / kind)
        with torch.no_grad():
            trained = tuned.base(**inputs).logits
            again = load_adapter(llava.family(), tmp_path / kind).base(**inputs).logits
        assert torch.equal(trained, again), kind


# --- the wrinkles that such files have ---


def copied(llava, kind, tmp_path):
    return shutil.copytree(llava.adapter(kind), tmp_path / "theirs")


def renamed(directory, file, rename, *, to=None, change=lambda tensors: tensors):
    """Rewrite a file of weights with other names, and perhaps under another name itself."""
    path = directory / file
    tensors = load_file(path) if path.suffix != ".bin" else torch.load(path, weights_only=True)
    path.unlink()
    tensors = change({rename(name): tensor for name, tensor in tensors.items()})
    path = directory / (to or file)
    save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)


def same(name):
    return name


WRINKLES = {
    "default segments": ("lora", WEIGHTS, lambda name: name.replace(".weight", ".default.weight"), None),
    "ia3 default segments": ("ia3", WEIGHTS, lambda name: name.replace("ia3_l", "ia3_l.default"), None),
    "module prefixes": ("lora", WEIGHTS, lambda name: f"module.{name}", None),
    "one model. less": ("lora", WEIGHTS, lambda name: name.replace("model.model.layers", "model.layers"), None),
    "no wrappers": ("ia3", WEIGHTS, lambda name: name[name.index("layers.") :], None),
    ".bin": ("lora", WEIGHTS, same, "adapter_model.bin"),
    ".safetensors": ("bottleneck_large", "adapter_model.bin", same, WEIGHTS),
    "the name of upstream": ("lora", "non_adapter_trainables.bin", same, "non_lora_trainables.bin"),
    "connector.bin": ("prefix", "non_adapter_trainables.bin", same, "connector.bin"),
    "the projector of pre-training": (
        "ia3", "non_adapter_trainables.bin", lambda name: name[name.index("model.mm_") :], "mm_projector.bin",
    ),
}  # fmt: skip


@pytest.mark.parametrize("wrinkle", WRINKLES)
def test_a_wrinkle_changes_nothing(llava, imported, tmp_path, wrinkle):
    kind, file, rename, to = WRINKLES[wrinkle]
    directory = copied(llava, kind, tmp_path)
    renamed(directory, file, rename, to=to)
    brought(llava, directory, tmp_path / "out")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (imported(kind) / WEIGHTS).read_bytes()


def test_a_whole_state_dict(llava, imported, tmp_path):
    """An intermediate checkpoint: adapter, projector and the whole base in one file."""
    directory = copied(llava, "bottleneck_large", tmp_path)
    whole = torch.load(llava.root / "checkpoint" / "pytorch_model.bin", weights_only=True)
    whole = {f"base_model.model.{name}": tensor for name, tensor in whole.items() if "mm_projector" not in name}
    for file in ("adapter_model.bin", "non_adapter_trainables.bin"):
        whole |= torch.load(directory / file, weights_only=True)
        (directory / file).unlink()
    torch.save(whole, directory / "pytorch_model.bin")
    report = brought(llava, directory, tmp_path / "out")
    assert load_file(tmp_path / "out" / WEIGHTS).keys() == load_file(imported("bottleneck_large") / WEIGHTS).keys()
    assert "the base's own weights, unchanged" in report.files["pytorch_model.bin"]


def test_a_frozen_connector(llava, tmp_path):
    directory = copied(llava, "ia3", tmp_path)
    torch.save({}, directory / "non_adapter_trainables.bin")
    report = brought(llava, directory, tmp_path / "out")
    assert report.connector == []
    assert "no tensors" in report.files["non_adapter_trainables.bin"]
    assert any("the base's own stays" in note for note in report.notes)
    assert all("ia3_l" in name for name in load_file(tmp_path / "out" / WEIGHTS))


@torch.no_grad()
def test_a_learned_scaling(llava, tmp_path):
    directory = copied(llava, "bottleneck_large", tmp_path)
    scale = torch.tensor([2.0])
    renamed(directory, "adapter_model.bin", same, change=lambda tensors: tensors | {
        name.replace("adapter_up.weight", "adapter_scaling"): scale for name in tensors if "adapter_up" in name
    })  # fmt: skip
    settings(directory, scaling="learned")
    brought(llava, directory, tmp_path / "learned")
    doubled = copied(llava, "bottleneck_large", tmp_path / "d")
    settings(doubled, scaling=2.0)
    brought(llava, doubled, tmp_path / "doubled")
    learned, fixed = (load_adapter(llava.family(), tmp_path / name).base for name in ("learned", "doubled"))
    torch.testing.assert_close(forward(learned, llava, "p0"), forward(fixed, llava, "p0"))


def settings(directory, **changes):
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_lora_without_its_configuration(llava, imported, tmp_path):
    directory = copied(llava, "lora", tmp_path)
    (directory / "adapter_config.json").unlink()
    with pytest.raises(ModelError, match=r"Give --lora-alpha.* 8, but only who trained it knows"):
        brought(llava, directory, tmp_path / "out")
    report = brought(llava, directory, tmp_path / "out", lora_alpha=8)
    assert (report.options["rank"], report.options["alpha"]) == (4, 8)
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (imported("lora") / WEIGHTS).read_bytes()
    with pytest.raises(ModelError, match="no effect"):
        brought(llava, llava.adapter("lora"), tmp_path / "other", lora_alpha=8)
    renamed(directory, WEIGHTS, same, change=without("layers.1.mlp.up_proj"))
    with pytest.raises(ModelError, match=r"1.mlp.up_proj should have tensors"):
        brought(llava, directory, tmp_path / "other", lora_alpha=8)


# --- what is refused ---


def shortened(tensors):
    return {name: tensor[..., :-1].clone() if "layers.1" in name else tensor for name, tensor in tensors.items()}


def emptied(tensors):
    return {name: torch.zeros(0) if "lora_B" in name else tensor for name, tensor in tensors.items()}


def without(part):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}


def with_(name, *shape):
    return lambda tensors: tensors | {name: torch.randn(*shape)}


PROJECTOR, TABLE = "non_adapter_trainables.bin", "adapter_model.bin"
ROOT = "base_model.model.model."
REFUSED = {
    "a name from elsewhere": ("lora", WEIGHTS, with_(ROOT + "layers.0.mlp.w1.lora_A.weight", 4, 64), r"1 tensor .*w1"),
    "the tower": ("lora", WEIGHTS, with_(ROOT + "vision_tower.layers.0.q_proj.lora_A.weight", 4, 32), "no place"),
    "a layer too many": ("ia3", WEIGHTS, with_(ROOT + "layers.2.mlp.down_proj.ia3_l", 1, 176), "no place"),
    "a target without tensors": ("ia3", WEIGHTS, without("layers.1.mlp"), r"1.mlp.down_proj should have tensors"),
    "half a target": ("lora", WEIGHTS, without("layers.1.mlp.up_proj.lora_B"), "lacks lora_B"),
    "no target": ("ia3", WEIGHTS, with_(ROOT + "layers.0.mlp.up_proj.ia3_l", 176, 1), "does not target"),
    "another width": ("lora", WEIGHTS, shortened, "must be 4 x 176"),
    "an empty shard": ("lora", WEIGHTS, emptied, "ZeRO-3 had not gathered"),
    "half a projector": ("lora", PROJECTOR, without("mm_projector.2"), "only a part is there"),
    "a third linear": ("lora", PROJECTOR, with_(ROOT + "mm_projector.4.weight", 64, 64), "no place"),
    "weights of another base": ("lora", PROJECTOR, with_(ROOT + "norm.weight", 64), "differs from this base"),
    "two methods": ("ia3", WEIGHTS, with_(ROOT + "layers.0.mlp.up_proj.adapter_up.weight", 64, 8), "BOTTLENECK and"),
    "a shorter prefix": ("prefix", TABLE, lambda tensors: {n: t[:-1].clone() for n, t in tensors.items()}, "5 x 256"),
    "no up": ("bottleneck", TABLE, without("adapter_up"), "lacks adapter_up"),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_it_is_refused(llava, tmp_path, mistake):
    kind, file, change, message = REFUSED[mistake]
    directory = copied(llava, kind, tmp_path)
    renamed(directory, file, same, change=change)
    with pytest.raises(ModelError, match=message):
        brought(llava, directory, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_other_refusals(llava, tmp_path):
    directory = copied(llava, "lora", tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    with pytest.raises(ModelError, match="is there already"):
        brought(llava, directory, tmp_path / "there")
    (directory / "extra.pt").touch()
    with pytest.raises(ModelError, match=r"extra.pt may hold weights"):
        brought(llava, directory, tmp_path / "out")
    (directory / "extra.pt").unlink()
    (directory / WEIGHTS).unlink()
    with pytest.raises(ModelError, match="no adapter in it"):
        brought(llava, directory, tmp_path / "out")
    with pytest.raises(ModelError, match="none of the files"):
        brought(llava, tmp_path / "there", tmp_path / "out")
    with pytest.raises(ModelError, match="no directory"):
        brought(llava, tmp_path / "nowhere", tmp_path / "out")


def test_an_encoder_of_another_time(llava, tmp_path):
    """The table and the encoder disagree: the table, which is what peft loads, is used, and that is said."""
    directory = copied(llava, "prefix", tmp_path)
    renamed(directory, PROJECTOR, same, change=lambda tensors: {n: t + 0.01 for n, t in tensors.items()})
    report = brought(llava, directory, tmp_path / "out")
    assert any(note.startswith("WARNING: the encoder") for note in report.notes)


def test_an_encoder_without_its_table(llava, imported, tmp_path):
    directory = copied(llava, "prefix", tmp_path)
    (directory / TABLE).unlink()
    brought(llava, directory, tmp_path / "out")
    name = "prompt_embeddings"
    torch.testing.assert_close(
        load_file(tmp_path / "out" / WEIGHTS)[name], load_file(imported("prefix") / WEIGHTS)[name]
    )


SETTINGS = {
    "another rank": ("lora", {"r": 8}, "have rank 4"),
    "a size": ("bottleneck", {"bottleneck_size": 16}, "must be 16 x 64"),
    "the other position": ("bottleneck", {"use_parallel_adapter": True}, "must be"),
    "scaling": ("bottleneck", {"scaling": "learned"}, "tensors say otherwise"),
    "another type": ("lora", {"peft_type": "IA3"}, "those of LORA"),
    "what it never did": ("lora", {"use_dora": True}, "use_dora"),
    "a module that trained": ("lora", {"modules_to_save": ["lm_head"]}, "lm_head was trained"),
    "tokens": ("prefix", {"num_virtual_tokens": 7}, "7 x 256"),
    "scaled vectors": ("ia3", {"feedforward_modules": []}, "must be"),
}


@pytest.mark.parametrize("mistake", SETTINGS)
def test_a_configuration_that_does_not_fit(llava, tmp_path, mistake):
    kind, changes, message = SETTINGS[mistake]
    directory = copied(llava, kind, tmp_path)
    settings(directory, **changes)
    with pytest.raises(ModelError, match=message):
        brought(llava, directory, tmp_path / "out")
    assert not (tmp_path / "out").exists()
