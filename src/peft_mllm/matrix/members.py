"""The tiny models to try methods on: whatever the shelf of families offers."""

from __future__ import annotations

from peft_mllm.loading import load_family
from peft_mllm.models import MODELS, Family
from peft_mllm.spec import ModelSpec


def members() -> list[str]:
    """Their names, as they stand after `tiny:` in a model's path."""
    return [
        f"{name}/{member}" if member else name for name in MODELS for member in MODELS[name].tiny_members() or ("",)
    ]


def open_member(name: str) -> Family:
    """Make one.

    Raises:
        ModelError: there is none of that name.
    """
    family = load_family(ModelSpec(path=f"tiny:{name}"), dtype="float32")
    family.anatomy.check(family.model)
    return family
