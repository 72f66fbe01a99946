"""Quantised bases: the decoder's linears and no others, and every method trains on them or says why not."""

from __future__ import annotations

import importlib.util

import pytest
import torch

import peft_mllm
import runs
import tiny
from peft_mllm import quantization
from peft_mllm.errors import MethodError, ModelError
from peft_mllm.loading import load_family
from peft_mllm.quantization import decoder_linears, is_quantised, size_of
from peft_mllm.spec import ModelSpec
from peft_mllm.tuned import load_adapter, trained_parts, untouched

BITS = ("8bit", "4bit")
HERE = importlib.util.find_spec("bitsandbytes") is not None
needs_bitsandbytes = pytest.mark.skipif(not HERE, reason="bitsandbytes is not installed (extra `quant`)")

# Why a method, or a variant of it, cannot work on quantised weights; of types that peft has, by type.
REFUSED = {"full": "quantised weights do not train"}
REFUSED_TYPES = {"LOHA": {"4bit": "LOHA cannot work"}, "HRA": dict.fromkeys(BITS, "reads the linear's weights")}
VARIANTS = [
    ("lora", {"rank": 4, "dropout": 0.0, "dora": True}, {"8bit": "LORA cannot work"}),
    (
        "lora",
        {"rank": 4, "dropout": 0.0, "init": "pissa"},
        dict.fromkeys(BITS, "Please initialize PiSSA under float32"),
    ),
    ("lora", {"rank": 4, "dropout": 0.0, "rslora": True}, {}),
    ("peft", {"type": "HRA", "config": {"r": 4}}, REFUSED_TYPES["HRA"]),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Family -> a directory with its tiny member."""
    root = tmp_path_factory.mktemp("bases")
    for name in ("llava", "qwen_vl"):
        tiny.family(name).save(root / name)
    return lambda name: root / name


def base(path, bits, dtype="float32"):
    return load_family(ModelSpec(path=str(path), quantization=bits), dtype=dtype)


# --- without bitsandbytes ---


@pytest.mark.parametrize("bits", BITS)
def test_its_absence_is_said(monkeypatch, bits):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else found(name))
    with pytest.raises(ModelError, match=r"not installed: pip install 'peft-mllm\[quant\]'"):
        base("embedded", bits)


def test_nothing_is_quantised_unless_asked():
    family = load_family(ModelSpec(), dtype="float32")
    assert not any(is_quantised(module) for module in family.model.modules())


@pytest.mark.skipif(not HERE, reason="bitsandbytes is not installed (extra `quant`)")
def test_a_machine_that_cannot_run_it(monkeypatch):
    import transformers.integrations

    def refuse(raise_exception):
        raise RuntimeError("None of the available devices are supported.\nMore.")

    monkeypatch.setattr(transformers.integrations, "validate_bnb_backend_availability", refuse)
    with pytest.raises(ModelError, match=r"does not run on this machine \(None of the available devices"):
        base("embedded", "4bit")


# --- what is quantised ---


@needs_bitsandbytes
@pytest.mark.parametrize("name", ["llava", "qwen_vl"])
@pytest.mark.parametrize("bits", BITS)
def test_exactly_the_decoders_linears_are_quantised(saved, name, bits):
    family, full = base(saved(name), bits), tiny.family(name)
    quantised = {path for path, module in family.model.named_modules() if is_quantised(module)}
    assert quantised == decoder_linears(full.model, full.anatomy)
    kept = dict(family.model.named_parameters())
    for path, parameter in full.model.named_parameters():
        if path.rpartition(".")[0] not in quantised:
            assert torch.equal(kept[path], parameter), path
    assert sum(map(size_of, family.model.parameters())) == sum(p.numel() for p in full.model.parameters())


@needs_bitsandbytes
@pytest.mark.parametrize("bits", BITS)
def test_quantised_while_loading_or_after_it_is_the_same(saved, bits):
    """transformers does it shard by shard; we do it to a model that is there."""
    while_loading = base(saved("llava"), bits).model
    family = tiny.family("llava")
    dtype = "float32"
    quantization.settle(family.model, family.anatomy, quantization.config_for(bits, dtype=dtype))
    ours, theirs = family.model.state_dict(), while_loading.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for flag in ("is_quantized", "quantization_method", "is_loaded_in_8bit", "is_loaded_in_4bit"):
        assert getattr(family.model, flag, None) == getattr(while_loading, flag, None), flag


@needs_bitsandbytes
@pytest.mark.parametrize(("bits", "limit"), [("8bit", 0.02), ("4bit", 0.12)])
@torch.no_grad()
def test_a_linear_is_nearly_what_it_was(bits, limit):
    """The embedded base: 0.8 % of a linear's output in 8 bits, 9 % in 4 bits, which is what the methods promise."""
    family, full = base("embedded", bits), load_family(ModelSpec(), dtype="float32")
    generator = torch.Generator().manual_seed(0)
    for path in decoder_linears(full.model, full.anatomy):
        before, after = full.model.get_submodule(path), family.model.get_submodule(path)
        x = torch.randn(64, before.in_features, generator=generator)
        assert (after(x) - before(x)).norm() <= limit * before(x).norm(), path


@needs_bitsandbytes
def test_an_original_checkpoint(cases):
    path, tower = (cases / "golden" / "llava" / name for name in ("checkpoint", "vision_tower"))
    spec = ModelSpec(path=str(path), vision_tower=str(tower), quantization="4bit")
    family = load_family(spec, dtype="float32")
    quantised = {path for path, module in family.model.named_modules() if is_quantised(module)}
    assert len(quantised) == 7 * 2
    assert quantised == decoder_linears(family.model, family.anatomy)


@needs_bitsandbytes
def test_somebody_elses_quantisation_is_refused(saved, tmp_path):
    base(saved("llava"), "8bit").save(tmp_path)
    with pytest.raises(ModelError, match="14 differ"):
        base(tmp_path, "4bit")


# --- what trains on it ---


def cases_of(bits):
    """Each method of the shelf with small options, and the reason why it is refused, or None."""
    known = [
        (name, options, REFUSED.get(name) or REFUSED_TYPES.get(options.get("type", ""), {}).get(bits))
        for name, options in tiny.method_cases()
    ]
    return [(*case, bits) for case in known] + [(name, given, no.get(bits), bits) for name, given, no in VARIANTS]


EVERY = [case for bits in BITS for case in cases_of(bits)]


@needs_bitsandbytes
@pytest.mark.parametrize(
    ("name", "options", "refused", "bits"), EVERY, ids=[f"{tiny.label(case[:2])}-{case[3]}" for case in EVERY]
)
def test_a_method_trains_or_says_why_not(saved, tmp_path, name, options, refused, bits):
    family = base(saved("llava"), bits)
    if refused:
        with pytest.raises(MethodError, match=refused):
            tiny.tune(name, on=family, parts={"connector": True}, **options)
        return
    tuned = tiny.tune(name, on=family, parts={"connector": True}, **options)
    frozen = {path: p.detach().clone() for path, p in tuned.model.named_parameters() if not p.requires_grad}
    batch = tiny.padded(family, tiny.samples(family))
    optimizer = torch.optim.AdamW(tuned.trainable().values(), lr=1e-2)
    losses = []
    for _ in range(4):
        loss = tuned.answer_losses(batch).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.02
    assert all(torch.equal(frozen[path], p) for path, p in tuned.model.named_parameters() if path in frozen)
    tuned.model.eval()  # bitsandbytes computes 8 bits otherwise in training than in evaluation
    tuned.save(tmp_path)
    with torch.no_grad():
        trained = tuned.answer_logits(batch)
        if (tmp_path / "adapter_config.json").is_file():
            again = load_adapter(base(saved("llava"), bits), tmp_path)
        else:
            again = untouched(base(tmp_path, bits))
        again.model.eval()
        assert torch.equal(again.answer_logits(batch), trained)


@needs_bitsandbytes
@pytest.mark.parametrize("name", ["lora", "ia3", "adapter", "prefix"])
def test_trees_are_rows_and_checkpointing_changes_nothing(saved, name):
    gradients = []
    for share, checkpointing in ((True, False), (False, False), (True, True)):
        parts = {"connector": True, "recompute": "full" if checkpointing else "none"}
        tuned = tiny.stir(tiny.tune(name, on=base(saved("llava"), "4bit"), parts=parts))
        tuned.model.train(checkpointing)  # transformers checkpoints only in training; dropout is 0
        losses = tuned.answer_losses(tiny.shared(tuned.family, tiny.samples(tuned.family), share=share))
        losses.mean().backward()
        gradients.append({path: p.grad for path, p in tuned.trainable().items()})
    first = torch.cat([gradient.flatten() for gradient in gradients[0].values()])
    for other in gradients[1:]:
        second = torch.cat([other[path].flatten() for path in gradients[0]])
        assert (second - first).norm() <= 1e-5 * first.norm()


@needs_bitsandbytes
@pytest.mark.parametrize("bits", BITS)
def test_the_released_connector_of_qwen_vl(saved, bits):
    """Embeddings and head are never quantised, so the released meaning of the connector trains, too."""
    family = base(saved("qwen_vl"), bits)
    family.anatomy = family.anatomy.released()
    tuned = tiny.tune("lora", on=family, parts={"connector": True})
    rates = dict.fromkeys(("llm", "connector", "vision"), 1e-4)
    parts = {each.part: each for each in trained_parts(tuned, rates, {"llm", "connector"})}
    assert parts["connector"].parameters == parts["connector"].total
    batch = tiny.padded(family, tiny.samples(family))
    tuned.answer_losses(batch).mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tuned.trainable().values())


@needs_bitsandbytes
@pytest.mark.parametrize("bits", BITS)
def test_a_whole_run(tmp_path, bits):
    """Trained, evaluated and resumed by the spec; the result says what its base was held in."""
    spec = runs.tiny(tmp_path / "run", model={"path": "embedded", "quantization": bits}, connector="tuned")
    result = peft_mllm.train(spec, quiet=True)
    assert result["spec"]["model"]["quantization"] == bits
    assert peft_mllm.evaluate(tmp_path / "run", limit=2, quiet=True)["scenes_at"]["n"] == 2
    assert peft_mllm.train(spec, quiet=True) == result
