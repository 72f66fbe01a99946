"""The table of names that lets any method meet any family: M methods + N families, not M x N.

A family says what its parts are called; a method says which roles it works on. Neither knows the other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from peft_mllm.errors import MethodError

if TYPE_CHECKING:
    from torch import nn

Location = Literal["attention", "mlp", "both"]
Part = Literal["llm", "connector", "vision"]
PARTS: tuple[Part, ...] = ("llm", "connector", "vision")

# The roles that a linear layer of a decoder can have. A family with fused products names them so.
ATTENTION_ROLES = ("q", "k", "v", "qkv", "o")
MLP_ROLES = ("gate", "up", "gate_up", "down")


@dataclass(frozen=True)
class Anatomy:
    """Where the parts of a model are: dotted module paths from the model's root.

    Attributes:
        llm: the language model's decoder stack (it takes embeddings and positions, and gives hidden states).
        layers: its list of decoder layers; layer i is `{layers}.{i}`.
        self_attention: the attention module's path inside a layer.
        attention: role -> path inside a layer, of the attention's linears.
        mlp: role -> path inside a layer, of the MLP's linears.
        norms: "attention" and "mlp" -> path inside a layer of the normalisation before it.
        final_norm: path of the normalisation after the last layer.
        connector: the modules between vision tower and language model.
        vision: the modules of the vision tower, the connector not among them.
        lm_head: the linear from hidden states to logits.
        released_connector: what the study's released code tunes as the connector, where that is something else.
    """

    llm: str
    layers: str
    self_attention: str
    attention: Mapping[str, str]
    mlp: Mapping[str, str]
    norms: Mapping[str, str]
    final_norm: str
    connector: tuple[str, ...]
    vision: tuple[str, ...]
    lm_head: str
    released_connector: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        unknown = (set(self.attention) - set(ATTENTION_ROLES)) | (set(self.mlp) - set(MLP_ROLES))
        if unknown:
            raise ValueError(f"unknown roles in an anatomy: {sorted(unknown)}")

    def roles(self, location: Location) -> dict[str, str]:
        """Role -> path inside a layer, for the linears at a location."""
        attention = dict(self.attention) if location in ("attention", "both") else {}
        return attention | (dict(self.mlp) if location in ("mlp", "both") else {})

    def pattern(self, roles: Iterable[str]) -> str | None:
        """A regular expression that matches in full the paths of these roles in every layer, and nothing else.

        None when the family has none of the roles. Bare suffixes such as `q_proj` are never used: they also
        match the vision tower.
        """
        linears = self.roles("both")
        wanted = [linears[role] for role in roles if role in linears]
        return self._in_every_layer(wanted) if wanted else None

    def norm_pattern(self, location: Location) -> str:
        """Likewise of the normalisations at a location; the one after the last layer counts to its MLP."""
        inside = self._in_every_layer(path for name, path in self.norms.items() if location in (name, "both"))
        return inside if location == "attention" else f"{inside}|{re.escape(self.final_norm)}"

    def _in_every_layer(self, paths: Iterable[str]) -> str:
        inside = "|".join(re.escape(path) for path in paths)
        return rf"{re.escape(self.layers)}\.\d+\.({inside})"

    def part_of(self, parameter: str) -> Part:
        """The part a parameter belongs to; a wrapper's prefix such as `base_model.model.` is allowed."""
        if _within(self.connector, parameter):
            return "connector"
        return "vision" if _within(self.vision, parameter) else "llm"

    def released(self) -> Anatomy:
        """The same model with the connector of the study's released code; ours then counts to the vision part."""
        if not self.released_connector:
            return self
        return replace(self, connector=self.released_connector, vision=(*self.vision, *self.connector))

    def check(self, model: nn.Module) -> None:
        """Raise `MethodError` when a name of this anatomy is not in the model."""
        modules = dict(model.named_modules())
        first_layer = [f"{self.layers}.0.{path}" for path in self.roles("both").values()]
        named = [
            self.llm,
            self.layers,
            *self.connector,
            *self.vision,
            *self.released_connector,
            self.lm_head,
            self.final_norm,
            *first_layer,
        ]
        missing = [name for name in named if name not in modules]
        if missing:
            raise MethodError(f"This model has no module {', '.join(missing)}: its family's anatomy is wrong.")


def _within(modules: Iterable[str], parameter: str) -> bool:
    return any(re.search(rf"(^|\.){re.escape(module)}\.", parameter) for module in modules)
