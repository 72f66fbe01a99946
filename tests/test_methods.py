"""Every method on every family: what trains, what does not, what is saved, and what comes out."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import tiny
from peft_mllm.errors import MethodError, ModelError
from peft_mllm.methods import METHODS
from peft_mllm.models import MODELS
from peft_mllm.models.base import Loading
from peft_mllm.tuned import attach, load_adapter, trained_parts

CASES = tiny.method_cases()
MORE = [
    ("lora", {"rslora": True}),
    ("lora", {"dora": True}),
    ("lora", {"init": "pissa"}),
    ("prefix", {"projection": True, "projection_width": 12}),
    ("adapter", {"preset": "houlsby", "scaling": "learned", "init": "normal"}),
    ("adapter", {"before": ("q",), "after": ("o",), "parallel": ("up",), "scaling": 0.5}),
]
FAMILIES = [name for name in MODELS if name != "generic"]
every_case = pytest.mark.parametrize("case", CASES, ids=tiny.label)
every_family = pytest.mark.parametrize("family", tiny.FAMILIES)
OFTEN = {"lora", "adapter", "prefix"}


def _marks(family, case):
    is_often = family == "llava" or (case[0] in OFTEN and family != "generic")
    return [] if is_often else [pytest.mark.slow]


often = pytest.mark.parametrize(
    ("family", "case"),
    [
        pytest.param(family, case, id=f"{family}-{tiny.label(case)}", marks=_marks(family, case))
        for family in MODELS
        for case in CASES
    ],
)
"""Every method on LLaVA, and some of them on the others; the rest is slow."""
LOCATED = [name for name in METHODS if "location" in METHODS[name].Options.model_fields]


def tuned_for(family, case, **more):
    name, options = case
    return tiny.tune(name, on=tiny.family(family), **options, **more)


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict(keep_vars=True).items()}


def moved(before, model):
    after = model.state_dict(keep_vars=True)
    return {name for name in before if not torch.equal(before[name], after[name])}


def parts_of(tuned, names):
    return {tuned.family.anatomy.part_of(name) for name in names}


@every_family
@every_case
def test_something_trains_and_what_is_frozen_does_not_move_by_a_bit(family, case):
    tuned = tuned_for(family, case)
    assert bool(tuned.trainable()) == METHODS[case[0]].tunes_llm
    before = state(tuned.model)
    if tuned.trainable():
        samples = tiny.samples(tuned.family, tiny.few_records())
        list(tiny.train(tuned, tiny.batch_for(tuned, samples), steps=3, lr=0.01))
    assert bool(moved(before, tuned.model)) == bool(tuned.trainable())
    assert {tuned.family.anatomy.part_of(name) for name in moved(before, tuned.model)} <= {"llm"}
    assert moved(before, tuned.model) <= set(tuned.trainable())


@every_family
@every_case
def test_attaching_leaves_the_base_as_it_was(family, case):
    before = state(tiny.family(family).model)
    tuned = tuned_for(family, case)
    inside = {name.replace(".base_layer", ""): p for name, p in tuned.base.state_dict().items()}
    assert all(torch.equal(inside[name], value) for name, value in before.items() if name in inside)
    assert len(before.keys() - inside.keys()) <= 4 * 2  # peft may move what it replaces into a wrapper


@every_family
@every_case
def test_it_starts_as_the_base(family, case):
    """Adding virtual tokens cannot be identity; everything else on the shelf starts as the base."""
    base = tiny.family(family)
    batch = tiny.padded(base, tiny.samples(base, tiny.few_records()))
    with torch.no_grad():
        expected = tiny.tune("none", on=base).answer_logits(batch)
        tuned = tuned_for(family, case)
        difference = (tuned.answer_logits(batch) - expected).abs().max().item()
    adds_tokens = isinstance(tuned.model, PeftModel) and tuned.model.active_peft_config.is_prompt_learning
    assert (difference > 1e-4) if adds_tokens else (difference <= 1e-6)


@often
def test_the_loss_falls(family, case):
    tuned = tuned_for(family, case)
    if not tuned.trainable():
        return
    batch = tiny.batch_for(tuned, tiny.samples(tuned.family, tiny.few_records()))
    losses = list(tiny.train(tuned, batch, steps=12, lr=0.05))
    assert min(losses[-3:]) < losses[0] - 2e-3


@often
@pytest.mark.parametrize(("connector", "vision"), [(True, False), (False, True), (True, True)])
def test_opened_parts_train_and_no_others(family, case, connector, vision):
    tuned = tuned_for(family, case, parts={"connector": connector, "vision": vision})
    wanted = {part for part, asked in (("connector", connector), ("vision", vision)) if asked}
    if METHODS[case[0]].tunes_llm:
        wanted.add("llm")
    assert parts_of(tuned, tuned.trainable()) == wanted
    rates = dict.fromkeys(("llm", "connector", "vision"), 1e-3)
    assert {part.part for part in trained_parts(tuned, rates, wanted)} == wanted
    before = state(tuned.model)
    samples = tiny.samples(tuned.family, tiny.few_records())
    list(tiny.train(tuned, tiny.batch_for(tuned, samples), steps=1, lr=0.01))
    assert parts_of(tuned, moved(before, tuned.model)) == wanted
    assert moved(before, tuned.model) <= set(tuned.trainable())
    connectors = [tuned.base.get_submodule(path) for path in tuned.family.anatomy.connector]
    total = sum(p.numel() for module in connectors for p in module.parameters())
    opened = sum(p.numel() for n, p in tuned.trainable().items() if parts_of(tuned, [n]) == {"connector"})
    assert opened in ((0,) if not connector else (total // 2, total))  # peft keeps a frozen copy beside it


@often
def test_checkpointing_gives_the_same_gradients(family, case):
    gradients = []
    for checkpointing in (False, True):
        parts = {"connector": True, "recompute": "full" if checkpointing else "none"}
        tuned = tiny.stir(tuned_for(family, case, parts=parts))
        tuned.model.train()
        samples = tiny.samples(tuned.family, tiny.few_records())
        tuned.answer_losses(tiny.batch_for(tuned, samples)).mean().backward()
        gradients.append({name: p.grad for name, p in tuned.trainable().items()})
    plain, recomputed = gradients
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        assert gradient is not None, name
        assert recomputed[name] is not None, name
        assert torch.allclose(gradient, recomputed[name], rtol=1e-5, atol=1e-9), name


@often
def test_cached_generation_equals_uncached(family, case):
    tuned = tiny.stir(tuned_for(family, case), spread=0.3)
    asked = 3 if tuned.takes_padding else 1
    batch = tiny.prompts(tuned.family, tiny.mixed_records()[:asked])
    told = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
    cached = tuned.generate(batch, use_cache=True, **told)
    assert cached.shape == (asked, 6)
    assert torch.equal(cached, tuned.generate(batch, use_cache=False, **told))


@often
def test_a_left_padded_batch_is_answered_as_one_by_one(family, case):
    tuned = tiny.stir(tuned_for(family, case), spread=0.3)
    told = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
    records = [tiny.mixed_records()[i] for i in (0, 1, 4, 5)]
    if not tuned.takes_padding:
        with pytest.raises(AssertionError):  # peft's prompt methods lose positions: evaluation asks one by one
            tuned.generate(tiny.prompts(tuned.family, records), **told)
        return
    together = tuned.generate(tiny.prompts(tuned.family, records), **told)
    alone = torch.cat([tuned.generate(tiny.prompts(tuned.family, [each]), **told) for each in records])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("name", LOCATED)
@every_family
def test_locations_are_disjoint_and_make_up_both(family, name):
    kinds = [options for case, options in CASES if case == name and "target_modules" not in str(options)]
    kinds = [options for options in kinds if "num_virtual_tokens" not in str(options)]
    for options in kinds:
        trained = {}
        for location in ("attention", "mlp", "both"):
            given = options if name != "adapter" else options | {"preset": "parallel"}
            tuned = tiny.tune(name, on=tiny.family(family), **given, location=location)
            trained[location] = set(tuned.trainable())
            assert parts_of(tuned, trained[location]) == {"llm"}
            layers = tuned.base.get_submodule(tuned.family.anatomy.layers)
            for i in range(len(layers)):
                assert any(f"{tuned.family.anatomy.layers}.{i}." in n for n in trained[location])
        assert all(trained.values())
        assert trained["attention"].isdisjoint(trained["mlp"])
        assert trained["attention"] | trained["mlp"] == trained["both"]


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("adapter", {"preset": "pfeiffer", "location": "attention"}, "no place at attention"),
        ("adapter", {"before": ("q",), "location": "mlp"}, "take the place of preset"),
        ("adapter", {"before": ("q",), "preset": "houlsby"}, "take the place of preset"),
        ("adapter", {"before": ("qkv",)}, "no linear qkv"),
        ("adapter", {"before": ("q",), "after": ("q",)}, "two positions"),
        ("adapter", {"non_linearity": "tahn"}, "tahn"),
        ("prefix", {"projection_width": 8}, "projection"),
        ("peft", {"type": "VERRA"}, "VERA"),
        ("peft", {"type": "VERA", "config": {"rr": 4}}, "no field 'rr'"),
        ("peft", {"type": "PROMPT_TUNING", "config": {"num_virtual_tokens": 4}, "location": "mlp"}, "no effect"),
        ("peft", {"type": "VERA", "config": {"target_modules": ["no_such"]}}, "VERA"),
        ("peft", {"type": "PROMPT_TUNING"}, "PROMPT_TUNING"),
    ],
)
def test_what_has_no_effect_or_no_meaning_is_refused(name, options, said):
    with pytest.raises(MethodError, match=said):
        tiny.tune(name, **options)


# What is saved


def everywhere(batch):
    """A batch of one row with predictions read at all its columns."""
    columns = torch.arange(batch.input_ids.shape[1])
    return dataclasses.replace(batch, rows=torch.zeros_like(columns), columns=columns)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Every method with the connector tuned, moved from its start and saved, and its logits at that time."""
    root = tmp_path_factory.mktemp("saved")
    asked: dict = {"logits": {}}
    trained = {}
    for family in FAMILIES[:1]:
        base = tiny.family(family)
        base.save(root / "base")
        batch = tiny.padded(base, tiny.samples(base)[:1])
        asked["inputs"] = {
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask,
            **batch.pixels,
        }
        for number, case in enumerate([*CASES, *MORE]):
            name = f"{number:02d}-{tiny.label(case)}"
            tuned = tiny.stir(tuned_for(family, case, parts={"connector": True}), spread=0.1)
            tuned.model.eval()
            with torch.no_grad():
                asked["logits"][name] = tuned.answer_logits(everywhere(batch))[None]
            (root / "saved").mkdir(exist_ok=True)
            tuned.save(root / "saved" / name)
            trained[name] = {n: p.detach().clone() for n, p in tuned.trainable().items()}
    torch.save(asked, root / "asked.pt")
    return root, trained, asked


def fresh(root, *arguments):
    source = Path(__file__).parent.parent / "src"
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "fresh.py"), str(root), *arguments],
        env=os.environ | {"PYTHONPATH": str(source)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_fresh_process_with_plain_libraries_gives_the_same_logits(saved):
    root, _, asked = saved
    differences = fresh(root)
    assert differences.keys() == asked["logits"].keys()
    assert {name: d for name, d in differences.items() if d != 0} == {}


@pytest.mark.slow
def test_it_loads_when_ours_is_imported_first(saved, tmp_path):
    root, _, _ = saved
    (tmp_path / "saved").mkdir()
    for name in ("base", "asked.pt", *(f"saved/{p.name}" for p in root.glob("saved/*adapter"))):
        (tmp_path / name).symlink_to(root / name)
    differences = fresh(tmp_path, "ours-first")
    assert len(differences) >= 2
    assert set(differences.values()) == {0}


def in_file(name):
    """peft's name in the file of a parameter."""
    name = name.replace("lora_magnitude_vector.default.weight", "lora_magnitude_vector")
    return name.replace(".modules_to_save.default", "").replace(".default", "")


def test_the_file_holds_what_trains_and_nothing_of_the_base(saved):
    root, trained, _ = saved
    base = {f"base_model.model.{name}" for name in tiny.family(FAMILIES[0]).model.state_dict()}
    (connector,) = tiny.family(FAMILIES[0]).anatomy.connector
    for name, parameters in trained.items():
        path = root / "saved" / name / "adapter_model.safetensors"
        if not path.exists():
            continue
        written = load_file(path)
        expected = {in_file(n): p for n, p in parameters.items() if "prompt_encoder" not in n}
        assert written.keys() >= expected.keys(), name
        assert all(torch.equal(written[n], p) for n, p in expected.items()), name
        beside = written.keys() - expected.keys()
        if any("prompt_encoder" in n for n in parameters):
            assert beside == {"prompt_embeddings"}, name
            table = [p for n, p in parameters.items() if n.endswith("embedding.weight")]
            assert len(parameters) - len(expected) > 1 or torch.equal(written["prompt_embeddings"], table[0])
        else:
            assert all("vera_" in n for n in beside), (name, beside)  # its frozen random projections
        assert {n for n in written if n in base} <= {n for n in expected if connector in n or "norm" in n}
        assert sum(p.numel() for n, p in written.items() if connector in n) > 0


def test_a_whole_model_is_saved_where_there_is_no_peft_method(saved):
    root, trained, _ = saved
    whole = [name for name in trained if (root / "saved" / name / "config.json").exists()]
    assert {name.split("-")[1] for name in whole} == {"none", "full"}
    for name in whole:
        again = MODELS[FAMILIES[0]].load(root / "saved" / name, loading=Loading("float32"))
        parameters = dict(again.model.named_parameters())
        assert all(torch.equal(parameters[n], p) for n, p in trained[name].items())
        assert again.encode(tiny.mixed_records()[0]) == tiny.samples(tiny.family(FAMILIES[0]))[0]


def test_it_loads_in_this_process_too(saved):
    root, trained, asked = saved
    for name in trained:
        if not (root / "saved" / name / "adapter_config.json").exists():
            continue
        family = MODELS[FAMILIES[0]].load(root / "base", loading=Loading("float32"))
        tuned = load_adapter(family, root / "saved" / name)
        batch = tiny.padded(family, tiny.samples(family)[:1])
        with torch.no_grad():
            answered = tuned.answer_logits(everywhere(batch))
        assert torch.equal(answered, asked["logits"][name][0]), name


def test_saving_changes_nothing(tmp_path):
    tuned = tiny.stir(tiny.tune("prefix", projection=True))
    before, config = state(tuned.model), dict(vars(tuned.model.active_peft_config))
    tuned.save(tmp_path)
    assert not moved(before, tuned.model)
    assert vars(tuned.model.active_peft_config) == config
    assert not json.loads((tmp_path / "adapter_config.json").read_text())["prefix_projection"]


def test_an_adapter_of_a_deeper_base_is_refused(saved):
    """peft drops the layers that the base does not have without a word."""
    root, trained, _ = saved
    family = tiny.family()
    del family.model.model.language_model.layers[1]
    with pytest.raises(ModelError):
        load_adapter(family, root / "saved" / next(name for name in trained if "lora" in name))


def test_a_directory_that_is_no_adapter_is_refused(saved):
    with pytest.raises(ModelError, match="adapter"):
        load_adapter(tiny.family(), saved[0] / "base")


# On the real LLaVA-1.5-7B configuration, without weights


@pytest.fixture(scope="module")
def seven_billion():
    """Its config as published (llava-hf/llava-1.5-7b-hf); what it leaves out is vicuna-7b's, the defaults."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=1024, image_size=336, intermediate_size=4096, num_attention_heads=16,
            num_hidden_layers=24, patch_size=14, projection_dim=768,
        ),
        text_config=LlamaConfig(vocab_size=32064, max_position_embeddings=4096, rms_norm_eps=1e-5),
        image_token_index=32000, vision_feature_layer=-2, vision_feature_select_strategy="default",
    )  # fmt: skip

    def make():
        with torch.device("meta"):
            return LlavaForConditionalGeneration(config)

    return make


@pytest.mark.parametrize(
    ("name", "count"),
    [("lora", 319_815_680), ("ia3", 614_400), ("adapter", 201_326_592), ("prefix", 5_242_880)],
)
def test_the_paper_counts_on_the_real_model(seven_billion, name, count):
    llava = MODELS["llava"]
    base = llava.__new__(llava)
    base.model = seven_billion()
    llava.anatomy.check(base.model)
    with torch.device("meta"):
        tuned = attach(base, METHODS[name](METHODS[name].Options()), connector=True)
    rates = dict.fromkeys(("llm", "connector", "vision"), 1e-3)
    counted = {p.part: p.parameters for p in trained_parts(tuned, rates, {"llm", "connector"})}
    assert counted == {"llm": count, "connector": 20_979_712}


@pytest.mark.parametrize("config", [{"r": 4, "target_modules": ["q_proj"]}, {"r": 4, "target_modules": "all-linear"}])
def test_targets_that_reach_into_the_vision_tower_are_refused(config):
    tuned = tiny.tune("peft", type="LORA", config=config)
    with pytest.raises(MethodError, match="to stay frozen"):
        trained_parts(tuned, dict.fromkeys(("llm", "connector", "vision"), 1e-3), {"llm"})


def test_layer_norm_tuning_of_peft_means_the_norms():
    """Linears are the right targets for every other type; here they would be full fine-tuning."""
    tuned = tiny.tune("peft", type="LN_TUNING", config={})
    assert tuned.trainable()
    assert all("norm" in name for name in tuned.trainable())


@pytest.mark.parametrize("name", ["adapter", "prefix", "lora", "ia3"])
def test_bfloat16_computes_with_float32_parameters(name):
    base = tiny.family()
    base.model.to(torch.bfloat16)
    tuned = tiny.tune(name, on=base, parts={"connector": True, "bf16": True})
    assert {p.dtype for p in tuned.trainable().values()} == {torch.float32}
    batch = tiny.shared(base, tiny.samples(base))
    losses = list(tiny.train(tuned, batch, steps=4, lr=0.02))
    assert losses[-1] < losses[0]
    assert {p.dtype for p in tuned.trainable().values()} == {torch.float32}
    told = {"do_sample": False, "max_new_tokens": 3, "min_new_tokens": 3}
    assert tuned.generate(tiny.prompts(base, tiny.mixed_records()[:2]), **told).shape == (2, 3)


def test_beams_and_sampling_go_through():
    tuned = tiny.stir(tiny.tune("prefix"), spread=0.3)
    batch = tiny.prompts(tuned.family, tiny.mixed_records()[:3])
    beams = tuned.generate(batch, num_beams=3, do_sample=False, max_new_tokens=4, min_new_tokens=4)
    assert beams.shape == (3, 4)
    alone = [
        tuned.generate(
            tiny.prompts(tuned.family, [each]), num_beams=3, do_sample=False, max_new_tokens=4, min_new_tokens=4
        )
        for each in tiny.mixed_records()[:3]
    ]
    assert torch.equal(beams, torch.cat(alone))
    drawn = []
    for _ in range(2):
        torch.manual_seed(3)
        drawn.append(tuned.generate(batch, do_sample=True, top_p=0.9, max_new_tokens=4))
    assert torch.equal(*drawn)
