"""Merging and the nearest LoRA: equal where that can be, as near as can be elsewhere, refused where it is no update."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import convert_to_lora
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForImageTextToText, AutoTokenizer

import peft_mllm
from exports import apart, heard, left_in, quick_seals, trained
from peft_mllm.errors import MethodError
from peft_mllm.exporting import convert
from peft_mllm.exporting.probe import Heard, answer_loss, hear, probe_records
from peft_mllm.tuned import Tuned, load_adapter, untouched
from runs import command, read
from tiny import family, stir, tune

MERGEABLE: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {}),
    "rslora": ("lora", {"rslora": True}),
    "dora": ("lora", {"dora": True}),
    "pissa": ("lora", {"init": "pissa"}),
    "ia3": ("ia3", {}),
    "layernorm": ("layernorm", {}),
    "oft": ("peft", {"type": "OFT", "config": {"oft_block_size": 8}}),
    "boft": ("peft", {"type": "BOFT", "config": {"boft_block_size": 8}}),
    "loha": ("peft", {"type": "LOHA", "config": {"r": 4}}),
    "lokr": ("peft", {"type": "LOKR", "config": {"r": 4}}),
    "vera": ("peft", {"type": "VERA", "config": {"r": 8}}),
}
LINEAR = [name for name in MERGEABLE if name != "layernorm"]
EXACT_AT = {"lora": 4, "rslora": 4, "pissa": 8, "vera": 8}
"""The rank that such an update really has, on the tiny model with its small options."""
PROBE = probe_records()


def saved(case: str, directory: Path, *, connector: bool) -> tuple[Path, Heard]:
    """A tiny adapter that is stirred, as a directory, and what it makes of the probe."""
    name, options = MERGEABLE[case]
    tuned = stir(tune(name, parts={"connector": connector}, **options), spread=0.05)
    tuned.save(directory)
    reloaded = load_adapter(family(), directory)
    return directory, hear(reloaded, PROBE)


def as_lora(adapter: Path, directory: Path, rank: int) -> tuple[convert.Approximation, Tuned]:
    fam = family()
    before = convert.linears_of(fam.model, adapter)
    directory.mkdir()
    found = convert.write_as_lora(
        load_adapter(fam, adapter), adapter, directory, rank=rank, before=before, base="tiny:llava"
    )
    return found, load_adapter(family(), directory)


def updates(adapter: Path) -> dict[str, torch.Tensor]:
    """Each linear's update, found by comparing a merged model with its base."""
    merged, base = family(), dict(family().model.named_modules())
    convert.merge(load_adapter(merged, adapter))
    changed = {
        name: (module.weight - base[name].weight).detach()
        for name, module in merged.model.named_modules()
        if isinstance(module, nn.Linear) and ".multi_modal_projector" not in name
    }
    return {name: update for name, update in changed.items() if update.any()}


# --- merging ---


@pytest.mark.parametrize("case", MERGEABLE)
@pytest.mark.parametrize("connector", [False, True], ids=["frozen", "tuned"])
def test_merged_logits_are_the_unmerged(tmp_path, case, connector):
    adapter, unmerged = saved(case, tmp_path / "adapter", connector=connector)
    fam = family()
    convert.merge(load_adapter(fam, adapter))
    assert apart(hear(untouched(fam), PROBE), unmerged) <= 5e-5
    assert apart(unmerged, hear(untouched(family()), PROBE)) > 1e-3
    names = {name for name, _ in fam.model.named_parameters()}
    assert names == {name for name, _ in family().model.named_parameters()}, "a part is still wrapped"


def test_a_merged_run_is_a_model_of_transformers(tmp_path):
    run = trained(tmp_path / "run", "lora", connector="tuned")
    with quick_seals():
        seal = peft_mllm.export(run, merge=True, quiet=True)
    directory = Path(seal["directory"])
    assert seal["merged"]["difference"] <= seal["merged"]["tolerance"] == 5e-5
    assert AutoTokenizer.from_pretrained(directory).is_fast
    _, told = AutoModelForImageTextToText.from_pretrained(directory, output_loading_info=True)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not (directory / "adapter_config.json").exists()
    assert apart(heard(directory), heard("embedded", run / "adapter")) <= 5e-5
    assert f"{seal['merged']['difference']:.1e} of the largest" in (directory / "README.md").read_text()


def test_a_merge_that_changes_logits_is_refused(tmp_path, monkeypatch):
    run = trained(tmp_path / "run", "lora")
    real = convert.merge

    def careless(tuned: Tuned) -> None:
        real(tuned)
        tuned.family.model.get_submodule("model.language_model.norm").weight.data.mul_(1.01)

    monkeypatch.setattr(peft_mllm.exporting.export, "merge", careless)
    with quick_seals(), pytest.raises(MethodError, match="is rounding"):
        peft_mllm.export(run, merge=True, quiet=True)
    assert left_in(run / "export") == []


# --- the nearest LoRA ---


@pytest.mark.parametrize("case", LINEAR)
def test_it_is_as_near_as_can_be(tmp_path, case):
    adapter, before = saved(case, tmp_path / "adapter", connector=True)
    rank = EXACT_AT.get(case, 3)
    found, lora = as_lora(adapter, tmp_path / "lora", rank)
    spectra = [torch.linalg.svdvals(update) ** 2 for update in updates(adapter).values()]
    best = (sum(s[rank:].sum() for s in spectra) / sum(s.sum() for s in spectra)) ** 0.5
    assert found.linears == len(spectra)
    assert found.error == pytest.approx(best.item(), rel=1e-3, abs=2e-5)
    moved = apart(hear(lora, PROBE), before)
    if case in EXACT_AT:
        assert found.error <= 2e-5
        assert moved <= 5e-5
    else:
        assert 1e-3 < found.error <= found.worst_error < 1
        assert moved > 1e-4


@pytest.mark.parametrize("case", ["ia3", "oft", "dora"])
def test_full_rank_is_exact(tmp_path, case):
    adapter, before = saved(case, tmp_path / "adapter", connector=True)
    found, lora = as_lora(adapter, tmp_path / "lora", 64)  # wider than any side: the rest is zeros
    assert found.error <= 2e-5
    assert apart(hear(lora, PROBE), before) <= 5e-5


def test_a_higher_rank_is_nearer(tmp_path):
    adapter, _ = saved("oft", tmp_path / "adapter", connector=False)
    errors = [as_lora(adapter, tmp_path / f"lora-{rank}", rank)[0].error for rank in (1, 4, 16)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > errors[2] + 0.1


def test_the_connector_comes_along_unchanged(tmp_path):
    adapter, _ = saved("ia3", tmp_path / "adapter", connector=True)
    as_lora(adapter, tmp_path / "lora", 2)
    name, other = (load_file(each / "adapter_model.safetensors") for each in (adapter, tmp_path / "lora"))
    connector = [key for key in name if "multi_modal_projector" in key]
    assert len(connector) == 4
    assert all(torch.equal(name[key], other[key]) for key in connector)


def test_it_is_what_pefts_converter_makes(tmp_path):
    adapter, _ = saved("loha", tmp_path / "adapter", connector=False)
    _, theirs = convert_to_lora(load_adapter(family(), adapter).model, rank=3)
    as_lora(adapter, tmp_path / "lora", 3)
    ours = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert theirs.keys() == ours.keys()
    for key in (key for key in ours if key.endswith("lora_A.weight")):
        b = key.replace("lora_A", "lora_B")
        product = theirs[b] @ theirs[key]
        assert torch.allclose(ours[b] @ ours[key], product, atol=1e-5 * product.abs().max())


def test_scaled_biases_become_biases(tmp_path):
    def biased() -> Any:
        fam = family()
        torch.manual_seed(3)
        for layer in fam.model.model.language_model.layers:
            for linear in (layer.self_attn.k_proj, layer.self_attn.v_proj):
                linear.bias = nn.Parameter(torch.randn(linear.out_features))
        return fam

    stir(tune("ia3", on=biased()), spread=0.3).save(tmp_path / "adapter")
    fam = biased()
    before = convert.linears_of(fam.model, tmp_path / "adapter")
    tuned = load_adapter(fam, tmp_path / "adapter")
    unconverted = hear(tuned, PROBE)
    (tmp_path / "lora").mkdir()
    found = convert.write_as_lora(
        tuned, tmp_path / "adapter", tmp_path / "lora", rank=64, before=before, base="tiny:llava"
    )
    assert found.lora_bias
    assert apart(hear(load_adapter(biased(), tmp_path / "lora"), PROBE), unconverted) <= 5e-5


def test_in_bfloat16_an_update_is_not_lost_in_rounding(tmp_path):
    fam = family()
    stir(tune("lora", on=fam), spread=0.01).save(tmp_path / "adapter")  # far below the weights' last bit
    exact, _ = as_lora(tmp_path / "adapter", tmp_path / "in float32", 4)
    half = family()
    half.model.to(torch.bfloat16)
    before = convert.linears_of(half.model, tmp_path / "adapter")
    (tmp_path / "lora").mkdir()
    found = convert.write_as_lora(
        load_adapter(half, tmp_path / "adapter", bf16=True),
        tmp_path / "adapter", tmp_path / "lora", rank=4, before=before, base="tiny:llava",
    )  # fmt: skip
    assert found.error < 1e-3
    assert exact.error < 1e-3


def test_wide_matrices_are_decomposed_by_their_leading_part(monkeypatch):
    torch.manual_seed(0)
    update = torch.randn(96, 40) @ torch.diag(0.7 ** torch.arange(40.0)) @ torch.randn(40, 80)
    a, b = convert.nearest(update, 6)
    monkeypatch.setattr(convert, "EXACT_BELOW", 8)
    fast_a, fast_b = convert.nearest(update, 6)
    exact, fast = ((update - each).norm() / update.norm() for each in (b @ a, fast_b @ fast_a))
    assert 0.01 < exact <= fast * (1 + 1e-6) < exact * 1.001
    assert torch.equal(convert.nearest(update, 6)[0], fast_a), "the same every time"


def test_a_run_as_lora_says_what_is_lost(tmp_path):
    run = trained(tmp_path / "run", "ia3", connector="tuned")
    with quick_seals():
        seal = peft_mllm.export(run, as_lora=8, check=3, quiet=True)
    directory, found = Path(seal["directory"]), seal["approximation"]
    assert directory == run / "export" / "lora-8"
    assert read(directory / "adapter_config.json")["peft_type"] == "LORA"
    assert 0.1 < found["error"] < 1
    before, after = heard("embedded", run / "adapter"), heard("embedded", directory)
    assert found["logits"] == pytest.approx(apart(after, before), rel=1e-3)
    assert found["probe_loss"] == {"before": pytest.approx(before.loss), "after": pytest.approx(after.loss)}
    check = found["checks"]["scenes_next"]
    assert check["n"] == 3
    assert check["figure"] == "accuracy"
    assert check["loss"][0] != check["loss"][1]
    text = (directory / "README.md").read_text()
    assert f"{found['error']:.2e}" in text
    assert "answer loss on 3 of scenes_next" in text


def test_the_losses_are_the_models(tmp_path):
    fam = family()
    tuned = untouched(fam)
    rows = [fam.encode(record) for record in PROBE]
    losses = []
    for sample in rows:
        inputs = fam.pixels([[image.load() for image in sample.images]], torch.tensor([sample.ids]))
        labels = torch.tensor([sample.labels])
        with torch.no_grad():
            out = fam.model(input_ids=torch.tensor([sample.ids]), labels=labels, **inputs)
        losses.append((out.loss.item(), int((labels != -100).sum())))
    mean = sum(loss * count for loss, count in losses) / sum(count for _, count in losses)
    assert answer_loss(tuned, PROBE) == pytest.approx(mean, rel=1e-5)
    assert hear(tuned, PROBE).loss == pytest.approx(mean, rel=1e-5)


# --- what is no update ---


@pytest.mark.parametrize(("method", "option", "why"), [
    ("adapter", "--merge", "non-linearity"), ("adapter", "--as-lora", "non-linearity"),
    ("prefix", "--merge", "beside the tokens"), ("prefix", "--as-lora", "beside the tokens"),
    ("prompt", "--merge", "beside the tokens"), ("prompt", "--as-lora", "beside the tokens"),
    ("layernorm", "--as-lora", "LoRA updates linears"), ("full", "--as-lora", "more than the weights of linears"),
    ("none", "--as-lora", "more than the weights of linears"),
])  # fmt: skip
def test_it_is_refused_with_the_reason(tmp_path_factory, method, option, why):
    run = refused_run(tmp_path_factory, method)
    said = command("export", run, option, *(["4"] if option == "--as-lora" else []))
    assert said.code == 2
    assert why in said.err
    assert "without this option" in said.err
    assert not list((run / "export").glob("*")), "something was left"


_RUNS: dict[str, Path] = {}


def refused_run(factory: pytest.TempPathFactory, method: str) -> Path:
    if method not in _RUNS:
        _RUNS[method] = trained(factory.mktemp(method) / "run", method)
    return _RUNS[method]


def test_biases_that_train_are_no_update_of_weights(tmp_path):
    fam = family()
    tuned = stir(tune("adapter", on=fam))  # for its directory alone
    tuned.save(tmp_path / "other")
    lora = tune("lora", on=family())
    lora.model.active_peft_config.bias = "all"
    with pytest.raises(MethodError, match="also trains biases"):
        convert.write_as_lora(lora, tmp_path / "other", tmp_path / "lora", rank=2, before={}, base="tiny:llava")
