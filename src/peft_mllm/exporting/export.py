"""The stages of an export: verify, load, convert, write aside, prove in a fresh process, and only then appear."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from peft import PeftConfig

from peft_mllm.card import Card, Loader
from peft_mllm.errors import DiskError, MethodError, SpecError
from peft_mllm.exporting.check import Checker
from peft_mllm.exporting.convert import Approximation, linears_of, merge, refuse_unmergeable, write_as_lora
from peft_mllm.exporting.probe import Heard, hear, largest_difference, probe_records
from peft_mllm.exporting.seal import Reload, Sealed, prove, write_seal
from peft_mllm.exporting.source import Source, open_source
from peft_mllm.files import new_directory, read_json, write_json
from peft_mllm.loading import source_of
from peft_mllm.models import Family
from peft_mllm.provenance import environment, weights_fingerprint
from peft_mllm.rundir.commits import MANIFEST
from peft_mllm.saved import PEFT_CONFIG, load_on_device
from peft_mllm.screen import Screen
from peft_mllm.spec import ModelSpec
from peft_mllm.tuned import SAFE_WEIGHTS, load_adapter, untouched
from peft_mllm.world import World

Form = Literal["as it is", "merged", "lora"]
MERGE_TOLERANCE = {"float32": 5e-5, "bfloat16": 5e-2}
"""Of the largest logit, by the weights' type: what merging may change. In bfloat16 the merged weights are rounded."""


@dataclass(frozen=True)
class Made:
    """What was written, as the process that wrote it knows it; the model itself is gone.

    Attributes:
        heard: what it makes of the probe.
        effect: the largest difference to the base's logits, relative to the largest.
        kind: peft's type name, or the method whose model it is.
        adapter: whether it is an adapter.
        in_peft_model: whether the method acts in PeftModel's forward.
        prompt: whether it learned tokens or a prefix.
        dtype: of the weights.
        merged: what merging changed, relative to the largest logit.
        approximation: how near the LoRA is, for the seal.
    """

    heard: Heard
    effect: float
    kind: str
    adapter: bool
    in_peft_model: bool
    dtype: str
    prompt: bool = False
    merged: float | None = None
    approximation: dict[str, Any] | None = None


def export_saved(
    target: str,
    *,
    base: str | None = None,
    vision_tower: str | None = None,
    output_dir: str | Path | None = None,
    merged: bool = False,
    as_lora: int | None = None,
    check: int | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Export a run or a PEFT directory; see `peft_mllm.export`."""
    form: Form = "merged" if merged else "as it is" if as_lora is None else "lora"
    if merged and as_lora is not None:
        raise SpecError("A merged model is no LoRA: give merge or as_lora, not both.")
    if check is not None and as_lora is None:
        raise SpecError("check compares before and after an approximation: give as_lora with it.")
    if as_lora is not None and as_lora < 1:
        raise SpecError(f"as_lora is the rank of the LoRA, at least 1, and not {as_lora}.")
    source = open_source(target, base, vision_tower)
    output = _free(Path(output_dir) if output_dir else _default(source, target, form, as_lora))
    screen = Screen(quiet=quiet)
    _refuse_early(source, form)
    with new_directory(output, what="the export") as aside:
        checker = Checker(source.target, check, screen) if check else None
        made = _make(source, form, aside, rank=as_lora or 0, checker=checker, screen=screen)
        _forget_models()
        screen.note("Proving it in a fresh process.")
        _set_base(aside, source.base.path)
        sealed = prove(_reload(source, made, aside), made.heard)
        seal = _seal(source, made, sealed, form)
        card = _card(source, made, sealed, seal)
        (aside / "README.md").write_text(card.text(), encoding="utf-8")
        write_seal(aside, seal)
    return {"directory": str(output), "load": card.loader.code(), **seal}


def _default(source: Source, target: str, form: Form, rank: int | None) -> Path:
    if source.run is None:
        raise SpecError(f"{target} is not a run: say where the export goes (--output).")
    name = {"as it is": "as-it-is" if source.whole else "adapter", "merged": "merged", "lora": f"lora-{rank}"}[form]
    return source.run / "export" / name


def _free(output: Path) -> Path:
    if output.exists():
        raise SpecError(
            f"{output} is there already, and nothing was changed in it. Choose another output, or delete it."
        )
    return output


def _refuse_early(source: Source, form: Form) -> None:
    """What can be known before a model is loaded."""
    if form == "as it is":
        return
    wanted = "--merge" if form == "merged" else "--as-lora"
    if source.target.adapter is not None:
        refuse_unmergeable(PeftConfig.from_pretrained(str(source.target.adapter)), wanted)
    elif form == "lora":
        raise MethodError(
            f"--as-lora cannot be done for {source.method}: it trained more than the weights of linears, and is a "
            "whole model already. Export it without this option."
        )


def _make(source: Source, form: Form, directory: Path, *, rank: int, checker: Checker | None, screen: Screen) -> Made:
    """Load, listen, convert and write; every model is out of scope when this returns."""
    records = probe_records()
    # merged weights do not lie on a quantised base's grid: the adapter is put on the full base
    unquantised = {} if form == "as it is" else {"quantization": "none"}
    screen.note("Loading the base.")
    family = load_on_device(source.base.model_copy(update=unquantised), World())
    _check_base(source, family)
    dtype = str(family.model.dtype).removeprefix("torch.")
    bf16 = dtype == "bfloat16"
    before = hear(untouched(family, bf16=bf16), records)
    if source.target.adapter is None:
        return _whole_model(source, directory, before, family, bf16=bf16, dtype=dtype)
    linears = linears_of(family.model, source.target.adapter) if form == "lora" else {}
    tuned = load_adapter(family, source.target.adapter, bf16=bf16)
    heard = hear(tuned, records)
    effect = _effect(source, heard, before)
    config = tuned.model.active_peft_config
    kind = config.peft_type.value
    in_peft_model = not tuned.takes_padding
    if form == "as it is":
        for name in (PEFT_CONFIG, SAFE_WEIGHTS):
            shutil.copyfile(source.target.adapter / name, directory / name)
        return Made(heard, effect, kind, True, in_peft_model, dtype, prompt=config.is_prompt_learning)
    if form == "merged":
        merge(tuned)
        after = hear(untouched(family, bf16=bf16), records)
        moved = _merged_difference(after, heard, dtype, kind)
        family.save(directory)
        return Made(after, effect, kind, False, False, dtype, merged=moved)
    checks = checker.before(tuned) if checker else {}
    found = write_as_lora(tuned, source.target.adapter, directory, rank=rank, before=linears, base=source.base.path)
    del tuned, family
    _forget_models()
    screen.note("Loading the base again, for the LoRA.")
    again = load_on_device(source.base.model_copy(update=unquantised), World())
    lora = load_adapter(again, directory, bf16=bf16)
    after = hear(lora, records)
    approximation = _approximation(found, kind, heard, after, checker.after(lora, checks) if checker else {})
    return Made(after, _effect(source, after, before), "LORA", True, False, dtype, approximation=approximation)


def _whole_model(source: Source, directory: Path, before: Heard, base: Family, *, bf16: bool, dtype: str) -> Made:
    """The run's own model, or, where nothing was trained, the base."""
    if not source.whole:
        base.save(directory)
        return Made(before, 0.0, source.method, False, False, dtype)
    heard = hear(untouched(load_on_device(source.target.model, World()), bf16=bf16), probe_records())
    shutil.copytree(
        source.target.model.path, directory, ignore=shutil.ignore_patterns(MANIFEST, "README.md"), dirs_exist_ok=True
    )
    return Made(heard, _effect(source, heard, before), source.method, False, False, dtype)


def _check_base(source: Source, base: Family) -> None:
    """Raise where the base has changed since the run; weights of another type or device cannot be compared."""
    result = source.result
    if result is None or source.base.quantization != "none":
        return
    device = environment(World().device)["device"]
    if result["environment"]["device"] == device and result["model"]["fingerprint"] != weights_fingerprint(base.model):
        raise DiskError(f"{source.base.path} is not the base that {source.run} was trained on: its weights differ.")


def _effect(source: Source, heard: Heard, before: Heard) -> float:
    """How far the base's logits move; not at all is no adapter."""
    effect = largest_difference(heard.logits, before.logits)
    if not effect > 0:  # NaN too
        what = "changes nothing: on the probe its logits are those of the base" if effect == 0 else "gives NaN"
        raise MethodError(f"{source.run or source.target.adapter} {what}. It is not exported.")
    return effect


def _merged_difference(after: Heard, heard: Heard, dtype: str, kind: str) -> float:
    moved = largest_difference(after.logits, heard.logits)
    if not moved <= MERGE_TOLERANCE[dtype]:
        raise MethodError(
            f"--merge cannot be done for {kind} here: merged, its logits differ by {moved:.1e} of the largest, and "
            f"{MERGE_TOLERANCE[dtype]:.0e} is rounding. Export it without this option."
        )
    return moved


def _approximation(
    found: Approximation, kind: str, heard: Heard, after: Heard, checks: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "method": kind,
        "rank": found.rank,
        "linears": found.linears,
        "lora_bias": found.lora_bias,
        "error": found.error,
        "worst": {"linear": found.worst, "error": found.worst_error},
        "logits": largest_difference(after.logits, heard.logits),
        "probe_loss": {"before": heard.loss, "after": after.loss},
        "checks": dict(checks),
    }


def _reload(source: Source, made: Made, directory: Path) -> Reload:
    model = source.base if made.adapter else _as_model(source.base, str(directory))
    adapter = directory if made.adapter else None
    return Reload(model, adapter, made.dtype, World().device.type, made.in_peft_model)


def _as_model(base: ModelSpec, path: str) -> ModelSpec:
    """A whole model as it is loaded: with its own tower, and unquantised."""
    return ModelSpec(path=path, family=base.family, attn_implementation=base.attn_implementation)


def _seal(source: Source, made: Made, sealed: Sealed, form: Form) -> dict[str, Any]:
    device = World().device
    merged = None
    if made.merged is not None:
        merged = {"difference": made.merged, "tolerance": MERGE_TOLERANCE[made.dtype]}
    return {
        "schema": 1,
        "form": "adapter" if made.adapter and form == "as it is" else "model" if form == "as it is" else form,
        "kind": made.kind,
        "base": source.base.path,
        "spec_id": source.result["spec_id"] if source.result else None,
        "probe": {
            "conversations": len(made.heard.inputs),
            "positions": made.heard.positions,
            "sha256": made.heard.digest,
        },
        "reloaded": {
            "by": sealed.by,
            "dtype": made.dtype,
            "device": device.type,
            "difference": sealed.difference,
            "tolerance": sealed.tolerance,
        },
        "effect": made.effect,
        "merged": merged,
        "approximation": made.approximation,
        "versions": environment(device),
    }


def _card(source: Source, made: Made, sealed: Sealed, seal: Mapping[str, Any]) -> Card:
    model = source.base if made.adapter else _as_model(source.base, source.base.path)
    fields = model.model_dump(exclude_defaults=True, exclude={"dtype"}) | {"path": source.base.path}
    loader = Loader(
        level=sealed.by,
        model=fields,
        adapter=made.adapter,
        dtype=made.dtype,
        in_peft_model=made.in_peft_model,
        prompt=made.prompt,
    )
    return Card(made.kind, loader, source.result, seal, licence_of(source.base.path), tuple(_notes(made, source)))


def _notes(made: Made, source: Source) -> Iterator[str]:
    if made.approximation:
        yield f"It is the nearest LoRA of rank {made.approximation['rank']} to {made.approximation['method']} weights;"
        yield "the scores below are those of the original, and what was lost is under Seal."
        if made.approximation["lora_bias"]:
            yield "It has biases (lora_bias), which peft loads and some serving engines do not."
    elif made.merged is not None:
        yield f"It is the base with {made.kind} weights merged in: a plain transformers model."
    elif made.adapter:
        yield "It is a standard PEFT directory; what was trained of the connector lies inside."
    elif source.whole:
        yield "It is a whole model: what was trained are weights of the base itself."
    else:
        yield "It is the base as it was: nothing was trained."


def licence_of(base: str) -> str | None:
    """The licence that a base's own card names; None where it has no card, or the card names none."""
    from transformers.utils import cached_file

    try:
        card = cached_file(
            source_of(base),
            "README.md",
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        header = Path(card).read_text(encoding="utf-8").split("---")[1] if card else ""
        named = yaml.safe_load(header)
    except (OSError, ValueError, IndexError, yaml.YAMLError):
        return None
    licence = named.get("license") if isinstance(named, dict) else None
    return str(licence) if licence else None


def _set_base(directory: Path, base: str) -> None:
    """An adapter's configuration names the base that it was proven on."""
    if (directory / PEFT_CONFIG).is_file():
        write_json(directory / PEFT_CONFIG, read_json(directory / PEFT_CONFIG) | {"base_model_name_or_path": base})


def _forget_models() -> None:
    """Give a model's memory back before the next one, or another process, asks for as much."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
