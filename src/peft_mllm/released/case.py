"""An adapter on its way: what was read, where it landed, and the checks that they agree with the base."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from peft_mllm.errors import ModelError
from peft_mllm.released.files import CONFIG, Released, Stored
from peft_mllm.released.landing import Landed, names, shape
from peft_mllm.released.names import Base, plain

_FILE_NAMES = {
    "lora_A": "lora_A.weight",
    "lora_B": "lora_B.weight",
    "ia3_l": "ia3_l",
    "adapter_down": "adapter_down.weight",
    "adapter_up": "adapter_up.weight",
    "adapter_scaling": "adapter_scaling",
}
# Fields that say how training began or ran, or where; none of them changes what the trained adapter computes.
_WITHOUT_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "bias", "inference_mode", "init_ia3_weights", "init_lora_weights",
    "init_weights", "layers_pattern", "loftq_config", "megatron_config", "megatron_core", "modules_to_save",
    "peft_type", "peft_version", "revision", "task_type", "use_adapterp",
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """An adapter on its way: what was read, where it landed, on what, and the scale that only a user may know."""

    released: Released
    landed: Landed
    base: Base
    lora_alpha: float | None

    @property
    def config(self) -> Mapping[str, Any]:
        """The released configuration; empty where there is none."""
        return self.released.config or {}

    def wrong(self, what: str) -> ModelError:
        """An error about this directory."""
        return ModelError(f"{self.released.directory}: {what}")


def fields_of(case: Case, *used: str) -> dict[str, Any]:
    """The fields of the configuration that are used; one that has a value and a meaning beyond them is an error."""
    unknown = [name for name, value in case.config.items() if value and name not in {*used, *_WITHOUT_EFFECT}]
    if unknown:
        raise case.wrong(f"{CONFIG} sets {names(unknown)}, which the released code never did. It cannot be imported.")
    return {name: case.config[name] for name in used if case.config.get(name) is not None}


def check_targets(case: Case, kinds: set[str]) -> None:
    """Every target of the configuration has its tensors, and nothing else has any."""
    linears, originals = case.landed.linears, case.landed.originals
    for path, parts in linears.items():
        if parts.keys() != kinds:
            lacking = ", ".join(sorted(kinds - parts.keys())) or "nothing"
            raise case.wrong(f"{originals[path]} has {', '.join(sorted(parts))}, and lacks {lacking}.")
    if case.released.config is not None and not case.config.get("target_modules"):
        raise case.wrong(f"{CONFIG} names no target_modules.")
    # where it is lost: the released code always took a linear in all layers, or in none
    inside = {original.split(".", 2)[2] for path, original in originals.items() if case.base.role(path)}
    targets = case.config.get("target_modules", inside)
    missing = [
        name
        for path, name in case.base.decoder_linears().items()
        if path not in linears and any(is_named(targets, f"{layers}.{name}") for layers in ("layers", "h"))
    ]
    if missing:
        raise case.wrong(f"the decoder's {names(missing)} should have tensors of the adapter, and has none.")
    beyond = [original for original in originals.values() if not is_named(targets, original)]
    if beyond and case.released.config is not None:
        raise case.wrong(f"there are tensors of {names(beyond)}, which {CONFIG} does not target.")


def is_named(targets: str | Iterable[str], name: str) -> bool:
    """Whether the released code's target modules name a linear: in full, by its end, or by a pattern."""
    if isinstance(targets, str):
        return any(re.fullmatch(targets, f"{wrapper}{name}") for wrapper in ("", "model.", "transformer."))
    return any(f".{name}".endswith(f".{plain(target)}") for target in targets)


def widths(case: Case, path: str) -> tuple[int, int]:
    """The widths in and out of the linear at a native path."""
    linear = case.base.modules[path]
    if not isinstance(linear, nn.Linear):
        raise case.wrong(f"{case.landed.originals[path]} is a {type(linear).__name__} in this base, not a linear.")
    return linear.in_features, linear.out_features


def check_shape(case: Case, stored: Stored, wanted: tuple[int, ...], path: str) -> None:
    """Raise when a tensor has not the shape that the base asks for."""
    if tuple(stored.tensor.shape) != wanted:
        empty = " It is empty: DeepSpeed ZeRO-3 had not gathered it when it was saved." * (stored.tensor.numel() == 0)
        raise case.wrong(
            f"{stored.name} is {shape(stored.tensor)}; on this base's {path} it must be "
            f"{' x '.join(map(str, wanted))}.{empty}"
        )


def check_biases(case: Case) -> None:
    """Biases that trained must be in the files; those that are there are the base's, or landing has refused them."""
    if case.config.get("bias", "none") == "none":
        return
    there = {case.base.parameter(stored.plain) for each in case.landed.unused.values() for stored in each}
    lost = [path for path in case.landed.linears if f"{path}.bias" in case.base.parameters.keys() - there]
    if lost:
        raise case.wrong(f"{CONFIG} says bias: {case.config['bias']}, but the biases of {names(lost)} are not there.")


def adapter_tensors(case: Case) -> dict[str, Tensor]:
    """The tensors at the linears, by PEFT's names."""
    return {
        f"base_model.model.{path}.{_FILE_NAMES[kind]}": stored.tensor
        for path, linear in case.landed.linears.items()
        for kind, stored in linear.items()
    }


def pattern_of(base: Base, paths: Iterable[str]) -> str:
    """A regular expression that matches these modules in full, and no others."""
    layers = f"{base.anatomy.layers}."
    by_place: dict[str, list[str]] = {}
    elsewhere = []
    for path in paths:
        number, _, place = path.removeprefix(layers).partition(".")
        if path.startswith(layers):
            by_place.setdefault(place, []).append(number)
        else:
            elsewhere.append(re.escape(path))
    by_numbers: dict[tuple[str, ...], list[str]] = {}
    for place, numbers in by_place.items():
        by_numbers.setdefault(tuple(sorted(numbers, key=int)), []).append(re.escape(place))
    count = len(list(base.modules[base.anatomy.layers].children()))
    inside: list[str] = []
    for layer_numbers, places in by_numbers.items():
        which = r"\d+" if len(layer_numbers) == count else f"({'|'.join(layer_numbers)})"
        inside.append(rf"{re.escape(layers)}{which}\.({'|'.join(sorted(places))})")
    return "|".join([*inside, *sorted(elsewhere)])


def roles_of(case: Case, paths: Iterable[str] | None = None) -> list[str]:
    """The linears by role, as a method's options name them; those elsewhere by their own name."""
    named = {case.base.role(path) or path for path in (case.landed.linears if paths is None else paths)}
    order = list(case.base.anatomy.roles("both"))
    return sorted(named, key=lambda name: (order.index(name) if name in order else len(order), name))
