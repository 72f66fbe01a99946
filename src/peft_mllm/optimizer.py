"""Any optimizer of torch and any schedule of transformers, by name, with a learning rate for each part."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import SchedulerType, get_scheduler

from peft_mllm.anatomy import PARTS, Anatomy, Part
from peft_mllm.errors import SpecError
from peft_mllm.pieces import cut_like, in_pieces
from peft_mllm.shelf import did_you_mean
from peft_mllm.spec import TrainSpec

OTHER_WAYS = {"fused", "foreach", "capturable", "differentiable"}
"""Arguments by which a user says how an update is computed; without them it is fused, where torch can."""


def learning_rates(spec: TrainSpec, default: float) -> dict[Part, float]:
    """The peak learning rate of each part; `default` is the method's own."""
    return {
        "llm": spec.learning_rate or default,
        "connector": spec.connector_learning_rate,
        "vision": spec.vision_learning_rate,
    }


def check_names(spec: TrainSpec) -> None:
    """Refuse an optimizer or a schedule that does not exist, before anything is loaded.

    Raises:
        SpecError: names it, and the nearest that exists.
    """
    _optimizer_class(spec.optim)
    schedules = [kind.value for kind in SchedulerType]
    if spec.lr_scheduler_type not in schedules:
        known = did_you_mean(spec.lr_scheduler_type, schedules)
        raise SpecError(f"train.lr_scheduler_type: transformers has no '{spec.lr_scheduler_type}'. {known}")


def make_optimizer(
    parameters: Mapping[str, nn.Parameter], anatomy: Anatomy, rates: Mapping[Part, float], spec: TrainSpec
) -> torch.optim.Optimizer:
    """An optimizer of torch with one group for each part, and one for what weight decay would harm.

    Vectors (norms, biases, scales) do not decay, as in HF's and LLaVA's trainers.
    """
    groups: dict[tuple[Part, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        # torch updates the parameters of a group together, and none in pieces beside one that is whole
        groups.setdefault((anatomy.part_of(name), parameter.ndim > 1, in_pieces(parameter)), []).append(parameter)
    named = [
        {"params": members, "lr": rates[part], "weight_decay": spec.weight_decay if decays else 0.0}
        for (part, decays, _), members in sorted(groups.items(), key=lambda group: PARTS.index(group[0][0]))
    ]
    made = _optimizer_class(spec.optim)
    try:
        options = {**_arguments(made, spec), **spec.optim_args}
        if "fused" in inspect.signature(made).parameters and not options.keys() & OTHER_WAYS:
            with suppress(RuntimeError):  # not for these devices
                return made([dict(group) for group in named], **options | {"fused": True})
        return made(named, **options)
    except (TypeError, ValueError) as error:
        raise SpecError(f"train.optim_args: torch.optim.{spec.optim}: {error}") from error


def _arguments(made: type[torch.optim.Optimizer], spec: TrainSpec) -> dict[str, Any]:
    """Adam's options for the optimizers that have them; set for another one they are an error."""
    known = inspect.signature(made).parameters
    betas = "betas" in known
    eps = "eps" in known and isinstance(known["eps"].default, float)  # some have a pair with another meaning
    taken = {"adam_beta1": betas, "adam_beta2": betas, "adam_epsilon": eps}
    idle = [name for name, is_taken in taken.items() if not is_taken and getattr(spec, name) != _default(name)]
    if idle:
        raise SpecError(f"train.{idle[0]} has no effect: torch.optim.{spec.optim} does not take it.")
    arguments: dict[str, Any] = {"betas": (spec.adam_beta1, spec.adam_beta2)} if betas else {}
    arguments |= {"eps": spec.adam_epsilon} if eps else {}
    return {key: value for key, value in arguments.items() if key not in spec.optim_args}


def _default(name: str) -> Any:
    return TrainSpec.model_fields[name].default


def _optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    classes = {
        key: value
        for key, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
    }
    if name not in classes:
        raise SpecError(f"train.optim: torch has no optimizer '{name}'. {did_you_mean(name, sorted(classes))}")
    return classes[name]


def make_schedule(optimizer: torch.optim.Optimizer, spec: TrainSpec, total_steps: int) -> Callable[[int], float]:
    """The schedule as a function: step (from 0) -> factor on every group's peak learning rate.

    A function has no state to save; and it is set before each step, so a resumed run has the same rates.
    """
    warmup = spec.warmup_steps or math.ceil(spec.warmup_ratio * total_steps)
    try:
        schedule = get_scheduler(
            spec.lr_scheduler_type,
            optimizer,
            num_warmup_steps=warmup,
            num_training_steps=total_steps,
            scheduler_specific_kwargs=dict(spec.lr_scheduler_kwargs),
        )
    except (ValueError, TypeError, AttributeError) as error:
        raise SpecError(f"train.lr_scheduler_type: {error}") from error
    if not isinstance(schedule, LambdaLR):
        raise SpecError(f"train.lr_scheduler_type: '{spec.lr_scheduler_type}' is no function of the step.")
    return schedule.lr_lambdas[0]


def flat_state(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The optimizer's state as tensors named `parameter|key`, independent of groups and processes.

    Of weights in pieces so are these: `pieces.whole` puts them together.
    """
    return {
        f"{name}|{key}": torch.as_tensor(value)
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_flat_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], state: Mapping[str, Tensor]
) -> None:
    """Put back what `flat_state` gave."""
    for flat, value in state.items():
        name, key = flat.rsplit("|", 1)
        parameter = parameters[name]
        stays = key == "step" and not optimizer.defaults.get("fused")
        alike = value.shape == parameter.shape
        optimizer.state[parameter][key] = (
            value if stays else cut_like(value, parameter) if alike else value.to(parameter.device)
        )
