"""Bottleneck adapters (Houlsby et al. 2019, arXiv 1902.00751): h + s * Up(act(Down(dropout(h)))).

Serial before or after a linear, or parallel to it (He et al. 2022, arXiv 2110.04366). The layers themselves are
a PEFT tuner of ours, in bottleneck.py; the preset `paper` is what the ACL 2024 study's released code places.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from peft_mllm.anatomy import Anatomy, Location
from peft_mllm.errors import MethodError
from peft_mllm.methods.base import Method, MethodOptions

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PretrainedConfig

Position = Literal["before", "after", "parallel"]
Role = Literal["q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down"]

# position -> roles; a role that a family does not have is passed over (fused and split families share a preset)
PRESETS: dict[str, dict[Position, tuple[str, ...]]] = {
    "paper": {"before": ("q", "k", "v", "qkv", "gate", "up", "gate_up"), "after": ("o", "down")},
    "houlsby": {"after": ("o", "down")},
    "pfeiffer": {"after": ("down",)},
    "parallel": {"parallel": ("q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down")},
}
DEFAULT_LOCATION: dict[str, Location] = {
    "paper": "mlp",
    "houlsby": "both",
    "pfeiffer": "mlp",
    "parallel": "mlp",
}


class AdapterOptions(MethodOptions):
    """Options of `adapter`; the defaults are the paper's and its released code's, but for the start."""

    preset: Literal["paper", "houlsby", "pfeiffer", "parallel"] = "paper"
    """paper: before gate and up, after down; houlsby: after attention output and MLP; pfeiffer: after MLP;
    parallel: beside each linear."""
    location: Location | None = None
    """attention, mlp, or both; None is the preset's own (paper, pfeiffer, parallel: mlp; houlsby: both)."""
    before: tuple[Role, ...] = ()
    """Instead of a preset: roles (q, k, v, o, gate, up, down) with an adapter on their input."""
    after: tuple[Role, ...] = ()
    """Instead of a preset: roles with an adapter on their output."""
    parallel: tuple[Role, ...] = ()
    """Instead of a preset: roles with an adapter from their input to their output."""
    bottleneck: int = Field(default=256, ge=1)
    """Inner width."""
    non_linearity: str = "tanh"
    """A name of transformers' activations."""
    dropout: float = Field(default=0.05, ge=0, lt=1)
    """On the adapter's input, in training."""
    scaling: float | Literal["learned"] = 1.0
    """s, a number other than 0, or a trained scalar that starts at 1."""
    bias: Literal["none", "all", "adapter_only"] = "none"
    """Which biases of the base train too: none, all, or those of the linears with an adapter."""
    init: Literal["identity", "normal"] = "identity"
    """identity: Up starts at zero; normal: both matrices N(0, 0.02), as in the released code."""


class Adapter(Method[AdapterOptions]):
    """Bottlenecks at the linears of a preset, or at roles of one's own."""

    Options = AdapterOptions
    learning_rate = 5e-5
    size = "bottleneck"

    def peft_config(self, anatomy: Anatomy, config: PretrainedConfig) -> PeftConfig:
        """Our BottleneckConfig with one pattern for each position."""
        from peft_mllm.methods.bottleneck import BottleneckConfig

        if self.options.scaling == 0:
            raise MethodError("adapter: with scaling 0 nothing it learns has an effect.")
        patterns = {position: anatomy.pattern(roles) for position, roles in self._placement(anatomy).items()}
        return BottleneckConfig(
            task_type="CAUSAL_LM",
            before_modules=patterns.get("before"),
            after_modules=patterns.get("after"),
            parallel_modules=patterns.get("parallel"),
            bottleneck_size=self.options.bottleneck,
            non_linearity=self.options.non_linearity,
            adapter_dropout=self.options.dropout,
            scaling=self.options.scaling,
            bias=self.options.bias,
            init_weights=self.options.init,
        )

    def initialise(self, model: PeftModel, anatomy: Anatomy) -> None:
        """Keep the bias switch to the language model, and refuse it where that has none."""
        if self.options.bias == "none":
            return
        biases = {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and name.endswith(".bias") and ".modules_to_save." not in name
        }
        for name, parameter in biases.items():
            parameter.requires_grad_(anatomy.part_of(name) == "llm")
        if not any(parameter.requires_grad for parameter in biases.values()):
            raise MethodError(f"adapter: bias: {self.options.bias} has no effect; these linears have no bias.")

    def _placement(self, anatomy: Anatomy) -> dict[Position, tuple[str, ...]]:
        own: dict[Position, tuple[str, ...]] = {
            "before": self.options.before, "after": self.options.after, "parallel": self.options.parallel,
        }  # fmt: skip
        own = {position: roles for position, roles in own.items() if roles}
        if own:
            return self._checked_own(own, anatomy)
        location = self.options.location or DEFAULT_LOCATION[self.options.preset]
        here = anatomy.roles(location)
        chosen = {
            position: tuple(role for role in roles if role in here)
            for position, roles in PRESETS[self.options.preset].items()
        }
        if not any(chosen.values()):
            raise MethodError(
                f"adapter preset '{self.options.preset}' has no place at {location}. "
                f"Use location {DEFAULT_LOCATION[self.options.preset]}, or another preset."
            )
        return {position: roles for position, roles in chosen.items() if roles}

    def _checked_own(self, own: dict[Position, tuple[str, ...]], anatomy: Anatomy) -> dict[Position, tuple[str, ...]]:
        if self.options.location is not None or self.options.preset != "paper":
            raise MethodError(
                "adapter: before, after and parallel take the place of preset and location; leave those out."
            )
        named = [role for roles in own.values() for role in roles]
        missing = [role for role in named if role not in anatomy.roles("both")]
        twice = sorted({role for role in named if named.count(role) > 1})
        if missing:
            known = ", ".join(anatomy.roles("both"))
            raise MethodError(f"adapter: this model has no linear {', '.join(missing)}; it has {known}.")
        if twice:
            raise MethodError(f"adapter: {', '.join(twice)} is named at two positions; choose one.")
        return own
