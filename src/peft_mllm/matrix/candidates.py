"""What is tried: every method of the shelf with its variants, and every type that the installed peft has.

Sizes are small and dropout is off, so that a computation done twice is the same. A candidate's `marks` are the
options that make it what it is; a run's own options are matched against them (known.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from peft_mllm.methods import METHODS
from peft_mllm.methods.base import Method

SMALL: dict[str, Any] = {"rank": 4, "alpha": 8, "bottleneck": 8, "virtual_tokens": 4, "dropout": 0.0}
"""By the name of the option; used where a method has it."""

VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "lora": {
        "rslora": {"rslora": True},
        "dora": {"dora": True},
        "pissa": {"init": "pissa"},
    },
    "adapter": {
        "houlsby": {"preset": "houlsby"},
        "pfeiffer": {"preset": "pfeiffer"},
        "parallel": {"preset": "parallel"},
    },
    "prefix": {"projection": {"projection": True}},
}
"""Variants that compute otherwise, by method: name -> the options that mark them."""

PEFT_TYPES: dict[str, dict[str, Any]] = {
    "ADALORA": {"init_r": 4, "target_r": 2, "total_step": 100},
    "ADAMSS": {"r": 4, "num_subspaces": 2},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 2},
    "BOFT": {"boft_block_size": 8},
    "C3A": {"block_size": 8},
    "CARTRIDGE": {"num_virtual_tokens": 4},
    "CPT": {"cpt_token_ids": [5, 6, 7, 8], "cpt_mask": [1, 1, 1, 1], "cpt_tokens_type_mask": [1, 2, 3, 4]},
    "DEFT": {"r": 4},
    "DELORA": {"r": 4},
    "FOURIERFT": {"n_frequency": 16, "scaling": 8.0},
    "FROD": {"progressbar": False},
    "GLORA": {"r": 4},
    "GRALORA": {"r": 4, "alpha": 8},
    "HIRA": {"r": 4},
    "HRA": {"r": 4},
    "IA3": {"feedforward_modules": []},
    "LILY": {"r": 4},
    "LOHA": {"r": 4},
    "LOKR": {"r": 4},
    "LORA": {"r": 4},
    "MISS": {"r": 4},
    "MULTITASK_PROMPT_TUNING": {"num_virtual_tokens": 4},
    "OFT": {"oft_block_size": 8},
    "OSF": {"effective_rank": 4},
    "P_TUNING": {"num_virtual_tokens": 4, "encoder_hidden_size": 16},
    "PEANUT": {"r": 4},
    "POLY": {"r": 4},
    "PREFIX_TUNING": {"num_virtual_tokens": 4},
    "PROMPT_TUNING": {"num_virtual_tokens": 4},
    "PSOFT": {"r": 4, "psoft_alpha": 4},
    "PVERA": {"r": 8},
    "RANDLORA": {"r": 4, "randlora_alpha": 8},
    "ROAD": {"group_size": 8},
    "SHADOW": {"r": 4, "shadow_dropout": 0.0},
    "SHIRA": {"r": 2},
    "SUPERTUNING": {"sparsity": 0.9},
    "TINYLORA": {"u": 8},
    "TRAINABLE_TOKENS": {"token_indices": [1, 2, 3]},
    "UNILORA": {"theta_d_length": 32},
    "VBLORA": {"num_vectors": 8, "vector_length": 8},
    "VERA": {"r": 8},
    "WAVEFT": {"n_frequency": 16},
    "XLORA": {"adapters": {}, "xlora_dropout_p": 0.0},
}
"""Fields that make a type valid and tiny; a type that is not here is tried with its defaults.

XLORA mixes saved adapters; the bench makes those.
"""

OURS = "BOTTLENECK"
"""The type that we register with peft: the method `adapter`."""


@dataclass(frozen=True)
class Candidate:
    """A method as it is tried.

    Attributes:
        name: of the row: `lora`, `lora dora`, `peft VERA`.
        method: name on the shelf.
        options: all that is set.
        marks: the options that make it this variant; none for a method's default.
    """

    name: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    marks: Mapping[str, Any] = field(default_factory=dict)

    def build(self) -> Method[Any]:
        """The method with these options."""
        made = METHODS[self.method]
        return made(made.Options(**self.options))


def candidates() -> dict[str, Candidate]:
    """All candidates by name, the shelf's own first."""
    found = [candidate for name in METHODS for candidate in _of_method(name)]
    return {candidate.name: candidate for candidate in found}


def _of_method(name: str) -> list[Candidate]:
    fields = METHODS[name].Options.model_fields
    small = {option: value for option, value in SMALL.items() if option in fields}
    if "type" in fields:
        return [_of_type(name, kind) for kind in peft_types()]
    variants = VARIANTS.get(name, {})
    return [
        Candidate(name, name, small),
        *(Candidate(f"{name} {label}", name, small | marks, marks) for label, marks in variants.items()),
    ]


def _of_type(method: str, kind: str) -> Candidate:
    marks = {"type": kind}
    return Candidate(f"{method} {kind}", method, marks | {"config": PEFT_TYPES.get(kind, {})}, marks)


def peft_types() -> list[str]:
    """The names of all types of the installed peft, but the one that we have registered."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    import peft_mllm.methods.bottleneck  # noqa: F401 - whether it is registered must not depend on who came before

    return sorted(kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING if kind.value != OURS)
