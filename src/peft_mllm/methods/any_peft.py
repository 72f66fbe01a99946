"""Any method of peft, by its type name: everything peft has is reached, without a file for each.

method: {name: peft, type: VERA, config: {r: 64}, learning_rate: 1e-3}
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from peft_mllm.anatomy import Anatomy, Location
from peft_mllm.errors import MethodError
from peft_mllm.methods.base import Method, MethodOptions, targets
from peft_mllm.shelf import did_you_mean

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PretrainedConfig

NOT_ON_LINEARS = {
    # it trains a copy of what it targets: linears would be full fine-tuning by another name
    "LN_TUNING": "it works on all norms, and the method layernorm has a location",
    # it trains rows of what it targets, and a token is a row of the embedding alone
    "TRAINABLE_TOKENS": "it works on the embedding",
    "SHADOW": "it works on whole layers",
}
"""Types that target something else than linears, and what that is."""


class AnyPeftOptions(MethodOptions):
    """Options of `peft`."""

    type: str
    """peft's type name, such as VERA, OFT, LOHA, PROMPT_TUNING."""
    config: Mapping[str, Any] = Field(default_factory=dict)
    """Fields of that type's configuration class."""
    location: Location | None = None
    """For types with target modules: attention, mlp, or both (the default there)."""


class AnyPeft(Method[AnyPeftOptions]):
    """A PEFT type with its own configuration; targets come from the anatomy unless given."""

    Options = AnyPeftOptions
    learning_rate = 1e-4

    def peft_config(self, anatomy: Anatomy, config: PretrainedConfig) -> PeftConfig:
        """The type's configuration class, filled."""
        fields = self._config_class()
        known = {field.name for field in dataclasses.fields(fields)}
        given = dict(self.options.config)
        unknown = [key for key in given if key not in known]
        if unknown:
            hint = did_you_mean(unknown[0], sorted(known))
            raise MethodError(f"peft {self.options.type} has no field '{unknown[0]}'. {hint}")
        given.setdefault("task_type", "CAUSAL_LM")
        if "target_modules" in known and "target_modules" not in given:
            given["target_modules"] = self._targets(anatomy)
        elif self.options.location is not None:
            raise MethodError(
                f"peft {self.options.type}: location has no effect; its targets are given or it has none."
            )
        try:
            return fields(**given)
        except (TypeError, ValueError) as error:
            raise MethodError(f"peft {self.options.type}: {error}") from error

    def _targets(self, anatomy: Anatomy) -> str | None:
        kind = self.options.type.upper()
        if kind in NOT_ON_LINEARS and self.options.location is not None:
            raise MethodError(f"peft {kind}: location has no effect; {NOT_ON_LINEARS[kind]}.")
        if kind == "LN_TUNING":
            return anatomy.norm_pattern("both")
        if kind == "TRAINABLE_TOKENS":
            return None  # peft then finds the embedding
        if kind == "SHADOW":
            return rf"{re.escape(anatomy.layers)}\.\d+"
        location: Location = self.options.location or "both"
        return targets(anatomy, tuple(anatomy.roles(location)), wanted=f"{self.options.type} at {location}")

    def _config_class(self) -> type[PeftConfig]:
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

        types = {peft_type.value: config for peft_type, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
        if self.options.type.upper() not in types:
            raise MethodError(
                f"peft has no type '{self.options.type}'. {did_you_mean(self.options.type.upper(), sorted(types))}"
            )
        return types[self.options.type.upper()]
