"""The bottleneck adapter as a PEFT tuner, so that `PeftModel.from_pretrained` loads what we save.

peft has no bottleneck adapter. `register()` adds ours under the type BOTTLENECK; `import peft_mllm` calls it as
soon as peft is imported. The layer holds the linear it wraps and calls it, so it works over quantised linears.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.peft_types import PeftType, register_peft_method
from torch import Tensor, nn
from transformers.activations import ACT2FN

NAME = "BOTTLENECK"


@dataclass
class BottleneckConfig(PeftConfig):
    """Configuration of bottleneck adapters; patterns are matched in full against module paths.

    Attributes:
        before_modules: linears with an adapter on their input, y = W(x + s Up(act(Down(x)))).
        after_modules: linears with an adapter on their output, h = Wx, y = h + s Up(act(Down(h))).
        parallel_modules: linears with an adapter beside them, y = Wx + s Up(act(Down(x))).
        bottleneck_size: inner width r; Down and Up have no bias.
        non_linearity: name in transformers' ACT2FN.
        adapter_dropout: on the adapter's input.
        scaling: s, a number or "learned".
        bias: biases of the base that train too: none, all, adapter_only.
        init_weights: "identity" (Up = 0) or "normal" (both N(0, 0.02)).
        target_modules: the union of the three patterns.
    """

    before_modules: str | None = None
    after_modules: str | None = None
    parallel_modules: str | None = None
    bottleneck_size: int = 256
    non_linearity: str = "tanh"
    adapter_dropout: float = 0.0
    scaling: float | str = 1.0
    bias: str = "none"
    init_weights: str = "identity"
    target_modules: str | None = None
    exclude_modules: list[str] | str | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = getattr(PeftType, NAME)
        patterns = [self.before_modules, self.after_modules, self.parallel_modules]
        self.target_modules = "|".join(f"(?:{pattern})" for pattern in patterns if pattern)
        if self.non_linearity not in ACT2FN:
            raise ValueError(f"There is no activation '{self.non_linearity}'. Known: {', '.join(sorted(ACT2FN))}.")

    def position(self, module: str) -> Literal["before", "after", "parallel"]:
        """Where the adapter of a targeted module goes."""
        if self.before_modules and re.fullmatch(self.before_modules, module):
            return "before"
        if self.after_modules and re.fullmatch(self.after_modules, module):
            return "after"
        return "parallel"


class BottleneckLayer(nn.Module, BaseTunerLayer):
    """A linear with a bottleneck before, after or beside it."""

    # peft is untyped, and nn.Module's __getattr__ would make these tensors
    base_layer: nn.Module
    get_base_layer: Any
    set_adapter: Any
    active_adapters: Any
    _active_adapter: Any
    _move_adapter_to_device_of_base_layer: Any

    adapter_layer_names = ("adapter_down", "adapter_up", "adapter_scaling")
    other_param_names = ("adapter_dropout",)

    def __init__(self, base_layer: nn.Module, position: Literal["before", "after", "parallel"]):
        super().__init__()
        self.base_layer = base_layer
        self.position = position
        self.adapter_down = nn.ModuleDict()
        self.adapter_up = nn.ModuleDict()
        self.adapter_scaling = nn.ParameterDict()
        self.adapter_dropout = nn.ModuleDict()
        self._activation: dict[str, nn.Module] = {}
        self._scale: dict[str, float] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    def update_layer(self, adapter_name: str, config: BottleneckConfig) -> None:
        """Add an adapter's weights: Down (r, in), Up (out, r), where in and out are widths at its position."""
        linear = self.get_base_layer()
        width_in = linear.out_features if self.position == "after" else linear.in_features
        width_out = linear.in_features if self.position == "before" else linear.out_features
        down = nn.Linear(width_in, config.bottleneck_size, bias=False)
        up = nn.Linear(config.bottleneck_size, width_out, bias=False)
        if config.init_weights == "normal":
            nn.init.normal_(down.weight, std=0.02)
            nn.init.normal_(up.weight, std=0.02)
        else:
            nn.init.zeros_(up.weight)
        self.adapter_down[adapter_name] = down
        self.adapter_up[adapter_name] = up
        if config.scaling == "learned":
            self.adapter_scaling[adapter_name] = nn.Parameter(torch.ones(1))
        else:
            self._scale[adapter_name] = float(config.scaling)
        self.adapter_dropout[adapter_name] = nn.Dropout(config.adapter_dropout)
        self._activation[adapter_name] = ACT2FN[config.non_linearity]
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The wrapped linear's output with the adapter's; x is (..., in_features)."""
        names = [] if self.disable_adapters else [n for n in self.active_adapters if n in self.adapter_down]
        if self.position == "before":
            for name in names:
                x = x + self._bottleneck(name, x)
            return self.base_layer(x, *args, **kwargs)
        result = self.base_layer(x, *args, **kwargs)
        for name in names:
            result = result + self._bottleneck(name, result if self.position == "after" else x)
        return result

    def _bottleneck(self, name: str, h: Tensor) -> Tensor:
        down, up = cast(nn.Linear, self.adapter_down[name]), self.adapter_up[name]
        # adapters may be float32 over a bfloat16 base; the sum stays in the base's type
        inner = self.adapter_dropout[name](h.to(down.weight.dtype))
        scale = self.adapter_scaling[name] if name in self.adapter_scaling else self._scale[name]
        return (up(self._activation[name](down(inner))) * scale).to(h.dtype)


class BottleneckModel(BaseTuner):
    """Wraps the linears that the config's patterns name."""

    prefix = "adapter_"
    tuner_layer_cls = BottleneckLayer
    target_module_mapping: dict[str, list[str]] = {}

    def _create_and_replace(
        self,
        peft_config: BottleneckConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, BottleneckLayer):
            target.update_layer(adapter_name, peft_config)
            return
        if not hasattr(target, "in_features"):
            raise ValueError(f"{current_key} is a {type(target).__name__}; a bottleneck adapter needs a linear.")
        layer = BottleneckLayer(target, peft_config.position(current_key))
        layer._active_adapter = adapter_name
        layer.update_layer(adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)


def register() -> None:
    """Make the type BOTTLENECK known to peft; does nothing the second time."""
    if NAME in PeftType.__members__:
        return
    # peft's types are an Enum, which cannot be extended by its public interface
    member = str.__new__(PeftType, NAME)
    member._name_, member._value_ = NAME, NAME
    PeftType._member_map_[NAME] = member
    PeftType._value2member_map_[NAME] = member
    PeftType._member_names_.append(NAME)
    type.__setattr__(PeftType, NAME, member)
    register_peft_method(
        name=NAME.lower(),
        config_cls=BottleneckConfig,
        model_cls=BottleneckModel,
        prefix=BottleneckModel.prefix,
    )


register()
