"""What an adapter can be turned into: weights of its base, or the nearest LoRA.

Both rest on the method's own merge. The nearest LoRA of an update D (in the Frobenius norm) is its truncated
singular value decomposition (Eckart and Young 1936): B A = U_r S_r V_r. peft's converter does the same for the
methods that report an update, but not for those that rotate or scale, nor for modules in a tuned connector.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peft_mllm.errors import MethodError
from peft_mllm.methods.bottleneck import NAME as BOTTLENECK
from peft_mllm.tuned import SAFE_WEIGHTS, Tuned

INSTEAD = "Export it without this option: the adapter then works through peft."
EXACT_BELOW = 1024
"""Narrower matrices are decomposed in full; wider ones by a randomised method that finds the leading part."""
PREFIX = "base_model.model."
"""What peft puts in front of a module's path."""


@dataclass(frozen=True)
class Approximation:
    """How near a LoRA comes to the updates that it stands for.

    Attributes:
        rank: of the LoRA.
        linears: how many it updates.
        error: Frobenius norm of what is missing, relative to that of all updates together.
        worst: path of the linear with the largest relative error of its own.
        worst_error: that error.
        lora_bias: whether it has biases, where the method moved those of the linears.
    """

    rank: int
    linears: int
    error: float
    worst: str
    worst_error: float
    lora_bias: bool


def refuse_unmergeable(config: PeftConfig, wanted: str) -> None:
    """Raise for a method that is known to be no change of weights, before anything is loaded.

    Args:
        config: of the adapter.
        wanted: the option that asked, for the message.

    Raises:
        MethodError: says why, and what to do instead.
    """
    kind = config.peft_type.value
    if config.is_prompt_learning:
        why = "what it learned stands beside the tokens, and in no weight of the base"
    elif kind == BOTTLENECK:
        why = "its layers have a non-linearity of their own, which no weight of the base can hold"
    else:
        return
    raise MethodError(f"{wanted} cannot be done for {kind}: {why}. {INSTEAD}")


def merge(tuned: Tuned) -> None:
    """Put the method into the weights of the family's model, which is then a plain one.

    Raises:
        MethodError: the method has no merge.
    """
    model = tuned.model
    assert isinstance(model, PeftModel)
    for name, layer in tuner_layers(model):
        if type(layer).merge is BaseTunerLayer.merge:
            raise _no_merge(model, "--merge", f"peft has no merge for its layer at {name}")
    _unwrap_opened(model)
    try:
        model.merge_and_unload(safe_merge=True)
    except (NotImplementedError, AttributeError, ValueError, TypeError, RuntimeError) as error:
        raise _no_merge(model, "--merge", str(error)) from error


def _unwrap_opened(model: PeftModel) -> None:
    """Put modules that were opened as a whole in their places: some of peft's merges leave them wrapped, or fail."""
    base = model.get_base_model()
    for name, module in list(base.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            base.set_submodule(name, module.modules_to_save[model.active_adapter])


def linears_of(model: nn.Module, adapter: Path) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Weight and bias of each linear that an adapter's file names, before the adapter is put on: copies on the CPU."""
    if not (adapter / SAFE_WEIGHTS).is_file():
        return {}  # loading it will say so
    keys = [key.removeprefix(PREFIX) for key in load_file(adapter / SAFE_WEIGHTS)]
    named = {key[:end] for key in keys for end in (i for i, letter in enumerate(key) if letter == ".")}
    return {
        name: (
            module.weight.detach().cpu().clone(),
            None if module.bias is None else module.bias.detach().cpu().clone(),
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name in named
    }


def write_as_lora(
    tuned: Tuned,
    adapter: Path,
    directory: Path,
    *,
    rank: int,
    before: Mapping[str, tuple[Tensor, Tensor | None]],
    base: str,
) -> Approximation:
    """Write the nearest LoRA of an adapter as a PEFT directory; the tuned model is spent by it.

    Args:
        tuned: the adapter on its base.
        adapter: its PEFT directory.
        directory: to write into.
        rank: of the LoRA; a linear with fewer rows or columns has zeros in the rest.
        before: the base's linears, of `linears_of`.
        base: what the LoRA's configuration calls its base.

    Raises:
        MethodError: the adapter is not an update of linears.
    """
    model = tuned.model
    assert isinstance(model, PeftModel)
    config = model.active_peft_config
    if getattr(config, "bias", "none") not in ("none", False):
        raise _no_merge(model, "--as-lora", f"with bias: {config.bias} it also trains biases")
    tensors: dict[str, Tensor] = {}
    squares: dict[str, tuple[float, float]] = {}  # of what is missing, and of the whole
    shifts: dict[str, Tensor] = {}
    for name, layer in tuner_layers(model):
        weight, shift = _update(model, name, layer, before)
        a, b = nearest(weight, rank)
        squares[name] = ((weight - b @ a).square().sum().item(), weight.square().sum().item())
        tensors |= {f"{PREFIX}{name}.lora_A.weight": a.cpu(), f"{PREFIX}{name}.lora_B.weight": b.cpu()}
        shifts[f"{PREFIX}{name}.lora_B.bias"] = weight.new_zeros(len(weight)).cpu() if shift is None else shift.cpu()
    biased = any(bool(shift.any()) for shift in shifts.values())
    tensors |= shifts if biased else {}  # all or none: peft has one switch for the whole adapter
    opened = tuple(getattr(config, "modules_to_save", None) or ())
    tensors |= {key: tensor for key, tensor in load_file(adapter / SAFE_WEIGHTS).items() if _is_in(opened, key)}
    LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=rank,
        lora_bias=biased,
        target_modules=list(squares),
        modules_to_save=list(opened) or None,
        base_model_name_or_path=base,
        inference_mode=True,
    ).save_pretrained(str(directory))
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, directory / SAFE_WEIGHTS)
    return _approximation(squares, rank, biased)


def nearest(update: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank) with B A the nearest to an update (out, in) of this rank."""
    kept = min(rank, *update.shape)
    if min(update.shape) <= max(EXACT_BELOW, 2 * rank):
        left, values, right = torch.linalg.svd(update, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[update.device] if update.device.type == "cuda" else []):
            torch.manual_seed(0)
            left, values, rows = torch.svd_lowrank(update, q=kept + max(16, kept // 2), niter=6)
            right = rows.mT
    roots = values[:kept].sqrt()
    a, b = update.new_zeros(rank, update.shape[1]), update.new_zeros(update.shape[0], rank)
    a[:kept], b[:, :kept] = roots[:, None] * right[:kept], left[:, :kept] * roots
    return a, b


def tuner_layers(model: PeftModel) -> Iterator[tuple[str, BaseTunerLayer]]:
    """The method's layers with the paths of what they wrap, those inside of others left out."""
    inside: tuple[str, ...] = ()
    for name, module in list(model.get_base_model().named_modules()):
        if isinstance(module, BaseTunerLayer) and not name.startswith(inside or "\0"):
            inside += (f"{name}.",)
            yield name, module


def _update(
    model: PeftModel, name: str, layer: BaseTunerLayer, before: Mapping[str, tuple[Tensor, Tensor | None]]
) -> tuple[Tensor, Tensor | None]:
    """What a layer adds to weight (out, in) and bias (out,) of its linear, in float32."""
    linear = layer.get_base_layer()
    if not isinstance(linear, nn.Linear) or name not in before:
        raise _no_merge(model, "--as-lora", f"it changes {name}, a {type(linear).__name__}, and LoRA updates linears")
    if type(layer).merge is BaseTunerLayer.merge:
        raise _no_merge(model, "--as-lora", f"peft has no merge for its layer at {name}")
    linear.float()  # an update is small: beside a weight in bfloat16 it would be rounding
    try:
        layer.merge(safe_merge=True)
    except (NotImplementedError, AttributeError, ValueError, TypeError, RuntimeError) as error:
        raise _no_merge(model, "--as-lora", str(error)) from error
    merged = layer.get_base_layer()
    weight, bias = before[name]
    change = merged.weight.detach().float() - weight.to(merged.weight.device).float()
    shift = None if bias is None else merged.bias.detach().float() - bias.to(merged.bias.device).float()
    layer.base_layer = nn.Identity()  # it is not needed again, and would stay in memory in float32
    return change, shift


def _approximation(squares: Mapping[str, tuple[float, float]], rank: int, biased: bool) -> Approximation:
    errors = {name: (missing / whole) ** 0.5 if whole else 0.0 for name, (missing, whole) in squares.items()}
    worst = max(errors, key=errors.__getitem__)
    missing, whole = (sum(each) for each in zip(*squares.values(), strict=True))
    return Approximation(
        rank=rank,
        linears=len(squares),
        error=(missing / whole) ** 0.5 if whole else 0.0,
        worst=worst,
        worst_error=errors[worst],
        lora_bias=biased,
    )


def _is_in(modules: tuple[str, ...], key: str) -> bool:
    """Whether a tensor of an adapter's file is of one of the modules that were opened as a whole."""
    return any(f".{module}." in f".{key}" for module in modules)


def _no_merge(model: PeftModel, wanted: str, why: str) -> MethodError:
    kind: Any = model.active_peft_config.peft_type.value
    return MethodError(f"{wanted} cannot be done for {kind}: {why}. {INSTEAD}")
