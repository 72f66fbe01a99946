"""Switching an adapter off and on again, so that what is left meanwhile is the base to the bit.

peft's own switch leaves modules that were opened as a whole (a tuned connector) as they are where the adapter is a
learned prompt, does not know our prefix port, and makes an adapter trainable that was loaded only to be asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peft import PeftModel
from peft.utils.other import AuxiliaryTrainingWrapper
from transformers import PreTrainedModel

from peft_mllm.attention import prefix_off
from peft_mllm.errors import MethodError

MOVING_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways of LoRA to start that take from the base's weights what the adapter begins with."""


@contextmanager
def switched_off(model: PeftModel | PreTrainedModel, decoder: PreTrainedModel) -> Iterator[None]:
    """Switch a model's adapter off until the context ends.

    Args:
        model: with its adapter.
        decoder: its language model's decoder stack.

    Raises:
        MethodError: there is no adapter, or the base's own weights were changed with it.
    """
    if not isinstance(model, PeftModel):
        raise MethodError("There is no adapter to switch off: this is a base, or a model whose own weights trained.")
    if moved := _moved_base(model):
        raise MethodError(f"The adapter cannot be switched off: {moved}, so what is left is not the base.")
    trains = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter(), _whole_parts_off(model), prefix_off(decoder):
            yield
    finally:
        for parameter, trained in trains:
            parameter.requires_grad_(trained)


def _moved_base(model: PeftModel) -> str:
    """How an adapter changed the base's own weights, in words; empty where it did not."""
    config = model.active_peft_config
    start = getattr(config, "init_lora_weights", True)
    if isinstance(start, str) and start.startswith(MOVING_STARTS):
        return f"its start '{start}' moved the base's weights"
    if getattr(config, "bias", "none") != "none":
        return f"biases of the base were trained with it (bias: {config.bias})"
    return ""


@contextmanager
def _whole_parts_off(model: PeftModel) -> Iterator[None]:
    """Use the frozen copies of what peft opened as a whole."""
    wrappers = [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    for wrapper in wrappers:
        wrapper.enable_adapters(False)
    try:
        yield
    finally:
        for wrapper in wrappers:
            wrapper.enable_adapters(True)
