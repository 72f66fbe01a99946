"""A model without its weights, on the meta device: what would a method train of it, and how much?"""

from __future__ import annotations

import copy
from typing import Any

import torch

from peft_mllm.loading import load_family
from peft_mllm.methods.base import Method
from peft_mllm.models import Family
from peft_mllm.parts import sizes_of
from peft_mllm.spec import ModelSpec
from peft_mllm.tuned import Tuned, attach


class BareModel:
    """Methods are attached to copies, so one look at a config answers for all of them."""

    def __init__(self, family: Family):
        self.family = copy.copy(family)
        self.family.model = copy.deepcopy(family.model).to("meta")

    @classmethod
    def of(cls, spec: ModelSpec) -> BareModel:
        """Of a directory or hub id; only its config and tokenizer are read.

        Raises:
            ModelError: there is no such model, or its parts are not clear.
        """
        return cls(load_family(spec, dtype="float32", weights=False))

    def sizes(self) -> dict[str, Any]:
        """Parameters by part and what else the formulas for FLOPs need: `parts.sizes_of`."""
        return sizes_of(self.family.model, self.family.anatomy)

    def attached(
        self, method: Method[Any], *, connector: bool = False, vision: bool = False, bf16: bool = False
    ) -> Tuned:
        """A method on a copy, on meta.

        Raises:
            MethodError: the method cannot work on this model.
        """
        fresh = copy.copy(self.family)
        fresh.model = copy.deepcopy(self.family.model)
        with torch.device("meta"):
            return attach(fresh, method, connector=connector, vision=vision, bf16=bf16)

    def trained(self, method: Method[Any], *, connector: bool = False, vision: bool = False) -> dict[str, int]:
        """Trainable parameters by part.

        Raises:
            MethodError: the method cannot work on this model.
        """
        tuned = self.attached(method, connector=connector, vision=vision)
        counted: dict[str, int] = {}
        for name, parameter in tuned.trainable().items():
            part = tuned.family.anatomy.part_of(name)
            counted[part] = counted.get(part, 0) + parameter.numel()
        return counted
