"""What a method put on one frozen linear y = Wx, as two small formulas with their gradients written out.

    low rank   t + s act(t Down^T) Up^T     LoRA (no act) beside W; bottleneck adapter before, after or beside it
    scaling    t * l                        IA3, on a linear's output or input

The parameters are the method's own: they are read in peft's modules whenever they are needed, and
stay there to be saved and optimised.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft.tuners.ia3 import Linear as IA3Linear
from peft.tuners.lora import Linear as LoRALinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from peft_mllm.lean.generator import generator_state, set_generator_state
from peft_mllm.methods.bottleneck import BottleneckLayer

Place = Literal["input", "output", "beside"]
"""What a tuner reads: W's input or output, which it changes; or the input, adding to the output."""
Kept = tuple[Tensor | None, Tensor | None]
"""What a tuner's backward pass needs beside t."""
POSITIONS: dict[str, Place] = {"before": "input", "after": "output", "parallel": "beside"}


@dataclass(frozen=True)
class Scaling:
    """t * l.

    Attributes:
        place: what is scaled.
        holder, name: where l is, as wide as t.
    """

    place: Place
    holder: nn.ParameterDict
    name: str

    @property
    def parameters(self) -> list[Tensor]:
        """The vector l."""
        return [self.holder[self.name]]

    def change(self, t: Tensor) -> tuple[Tensor, Kept]:
        """The scaled t (N, D); nothing is kept for the backward pass but t itself."""
        return t * self.parameters[0].flatten().to(t.dtype), (None, None)

    def back(self, grad: Tensor, t: Tensor, kept: Kept) -> tuple[Tensor, list[Tensor]]:
        """Gradients of t and of l."""
        (scale,) = self.parameters
        gradient = (grad * t).sum(0, dtype=torch.float32)
        return grad * scale.flatten().to(grad.dtype), [gradient.view_as(scale)]


@dataclass(frozen=True)
class LowRank:
    """t + s act(t Down^T) Up^T, or only the second term added to something beside t; dropout is on its t.

    A dropout's mask is not kept: it is drawn again from the same state of the generator, and the forward pass draws
    as the module would.

    Attributes:
        place: what t is.
        down, up: linears without bias that hold Down (r, D) and Up (D', r).
        scale: s; where it is trained, a dictionary with it and its name there.
        dropout: its module.
        activation: act; None is the identity.
    """

    place: Place
    down: nn.Linear
    up: nn.Linear
    scale: float | tuple[nn.ParameterDict, str]
    dropout: nn.Module
    activation: Callable[[Tensor], Tensor] | None = None

    @property
    def parameters(self) -> list[Tensor]:
        """Down, Up, and s where it is trained."""
        return [self.down.weight, self.up.weight, *self._trained_scale]

    @property
    def _trained_scale(self) -> list[Tensor]:
        return [self.scale[0][self.scale[1]]] if isinstance(self.scale, tuple) else []

    def change(self, t: Tensor) -> tuple[Tensor, Kept]:
        """The sum of t and the term, and what the backward pass needs beside t."""
        result = t.clone()
        return result, self.add(result, t)

    def add(self, result: Tensor, t: Tensor) -> Kept:
        """Add the term to `result` in place; gives t Down^T (N, r), and the generator's state before dropout."""
        state = generator_state(t.device) if self.drops else None
        inner = self.dropout(t) @ self.down.weight.to(t.dtype).T  # (N, r)
        result.addmm_(self._outer(inner), self.up.weight.to(t.dtype).T)
        return inner, state

    def back(self, grad: Tensor, t: Tensor, kept: Kept) -> tuple[Tensor, list[Tensor]]:
        """Gradients of t and of the parameters, for `change`."""
        result = grad.clone()
        return result, self.back_into(result, grad, t, kept)

    def back_into(self, result: Tensor | None, grad: Tensor, t: Tensor, kept: Kept) -> list[Tensor]:
        """Add the term's gradient of t to `result` where one is wanted, and give those of the parameters."""
        inner, state = kept
        assert inner is not None, "add has kept it"
        grad_outer = grad @ self.up.weight.to(grad.dtype)  # (N, r)
        outer, grad_inner, of_scale = self._between(inner, grad_outer)
        down = self.down.weight.to(grad.dtype)
        if state is not None:
            mask = self._mask(t, state)
            t = t * mask
            if result is not None:
                result.addcmul_(grad_inner @ down, mask)
        elif result is not None:
            result.addmm_(grad_inner, down)
        return [grad_inner.T @ t, grad.T @ outer, *of_scale]

    def _between(self, inner: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """S act(inner) (N, r), and from its gradient those of inner and of s, where s is trained."""
        if self.activation is None and not isinstance(self.scale, tuple):
            return inner * self.scale, grad * self.scale, []
        with torch.enable_grad():  # it is small: autograd knows every activation
            inner = inner.detach().requires_grad_()
            outer = self._outer(inner)
            grad_inner, *of_scale = torch.autograd.grad(outer, (inner, *self._trained_scale), grad)
        return outer.detach(), grad_inner, of_scale

    @property
    def drops(self) -> bool:
        """Whether its dropout acts now."""
        return isinstance(self.dropout, nn.Dropout) and self.dropout.training and self.dropout.p > 0

    def _mask(self, t: Tensor, state: Tensor) -> Tensor:
        """What the forward pass multiplied t by."""
        devices = [t.device] if t.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            set_generator_state(state, t.device)
            return self.dropout(torch.ones_like(t))

    def _outer(self, inner: Tensor) -> Tensor:
        scale = self._trained_scale[0].to(inner.dtype) if isinstance(self.scale, tuple) else self.scale
        return (inner if self.activation is None else self.activation(inner)) * scale


Tuner = Scaling | LowRank


def understood(module: nn.Module) -> tuple[nn.Linear, Tuner | None] | None:
    """The frozen linear in a module and what a method put on it; None where that is not one of our formulas."""
    linear: Any = module.base_layer if isinstance(module, BaseTunerLayer) else module
    if not _is_frozen_linear(linear):
        return None
    if not isinstance(module, BaseTunerLayer):
        return linear, None
    names: list[str] = module.active_adapters
    if len(names) != 1 or module.merged:
        return None
    tuner = _tuner(module, names[0])
    return None if tuner is None else (linear, tuner)


def _is_frozen_linear(module: nn.Module) -> bool:
    """Whether it is a plain linear that nobody watches; quantised ones and subclasses compute otherwise."""
    hooked = module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook")
    trains = any(parameter.requires_grad for parameter in module.parameters())
    return type(module) is nn.Linear and not hooked and not trains


def _tuner(module: Any, name: str) -> Tuner | None:
    """Read a peft layer's adapter; None for variants such as DoRA."""
    if type(module) is LoRALinear:
        if name not in module.lora_A:
            return None
        down, up = module.lora_A[name], module.lora_B[name]
        if module.lora_variant or module.fan_in_fan_out or up.bias is not None:
            return None
        return LowRank("beside", down, up, module.scaling[name], module.lora_dropout[name])
    if type(module) is IA3Linear:
        if name not in module.ia3_l or module.fan_in_fan_out:
            return None
        return Scaling("input" if module.is_feedforward else "output", module.ia3_l, name)
    if type(module) is BottleneckLayer:
        return _bottleneck(module, name)
    return None


def _bottleneck(module: Any, name: str) -> Tuner | None:
    if name not in module.adapter_down:
        return None
    scale = (module.adapter_scaling, name) if name in module.adapter_scaling else module._scale[name]
    down, up = module.adapter_down[name], module.adapter_up[name]
    return LowRank(POSITIONS[module.position], down, up, scale, module.adapter_dropout[name], module._activation[name])
