"""Bases whose decoder is held in 8 or 4 bits, by bitsandbytes: adapters train on them in full precision.

8 bits is LLM.int8 (Dettmers et al. 2022, arXiv 2208.07339); 4 bits is NF4 with its scales quantised again, as in
QLoRA (Dettmers et al. 2023, arXiv 2305.14314). Only the linears in the decoder's layers are quantised: connector,
vision tower, embeddings, norms and head stay as they are, and that is checked on the loaded model.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from peft_mllm.anatomy import Anatomy
from peft_mllm.errors import MethodError, ModelError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import BitsAndBytesConfig, PreTrainedModel

Bits = Literal["8bit", "4bit"]

INSTALL = "pip install 'peft-mllm[quant]'"
_CLASSES = {"8bit": "Linear8bitLt", "4bit": "Linear4bit"}


def config_for(bits: Bits, *, dtype: str, anatomy: Anatomy | None = None) -> BitsAndBytesConfig:
    """The transformers configuration that quantises the decoder's linears while a model is loaded.

    Args:
        bits: 8bit or 4bit.
        dtype: torch's name of the base's type, in which a 4-bit linear computes; `auto` as the device has it.
        anatomy: names what stays; None where it is only known of a loaded model, for `quantise`.

    Raises:
        ModelError: bitsandbytes is not installed, or does not run on this machine.
    """
    from transformers import BitsAndBytesConfig

    _check_installed()
    keep = None if anatomy is None else [*anatomy.connector, *anatomy.vision, anatomy.lm_head]
    if bits == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=keep)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=_computes_in(dtype),
        llm_int8_skip_modules=keep,
    )


def _computes_in(dtype: str) -> torch.dtype:
    if dtype == "auto":
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return getattr(torch, dtype)


def _check_installed() -> None:
    from transformers.utils import is_bitsandbytes_available

    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(f"8-bit and 4-bit bases need bitsandbytes, which is not installed: {INSTALL}")
    if not is_bitsandbytes_available():
        raise ModelError(f"The installed bitsandbytes is too old for this transformers: {INSTALL} --upgrade")
    # it says at each call of each linear that 8 bits are computed with float16
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    from transformers.integrations import validate_bnb_backend_availability

    try:
        validate_bnb_backend_availability(raise_exception=True)
    except (RuntimeError, ImportError, OSError, AttributeError) as error:
        raise ModelError(
            f"bitsandbytes does not run on this machine ({str(error).splitlines()[0]}). Use quantization: none."
        ) from error


def settle(model: PreTrainedModel, anatomy: Anatomy, config: BitsAndBytesConfig) -> None:
    """Quantise what loading has not, and check that it is the decoder's linears and no others.

    A model that is not in transformers' own layout, or whose parts are only known once it is loaded, arrives in
    full precision: it is then quantised here, linear by linear.

    Raises:
        ModelError: other modules are quantised, as in a checkpoint that was quantised by somebody else.
    """
    bits: Bits = "8bit" if config.load_in_8bit else "4bit"
    wanted = decoder_linears(model, anatomy)
    found = {path for path, module in model.named_modules() if is_quantised(module)}
    if not found:
        quantise(model, wanted, config)
        found = {path for path, module in model.named_modules() if is_quantised(module)}
    other = {path for path in wanted & found if type(model.get_submodule(path)).__name__ != _CLASSES[bits]}
    wrong = sorted((wanted ^ found) | other)
    if wrong:
        raise ModelError(
            f"Of this model the decoder's linears, and no others, should be held in {bits}: {len(wrong)} differ, "
            f"{wrong[0]} among them. Give a checkpoint that is not quantised, or leave quantization at none."
        )
    for path in found:
        linear = model.get_submodule(path)
        if hasattr(linear, "support_avx512bf16_for_cpu"):
            # in evaluation it would repack 4-bit weights in place, with rounder scales: training then goes on from
            # another base, and a base that is saved is not the one that was loaded
            linear.support_avx512bf16_for_cpu = False


def decoder_linears(model: nn.Module, anatomy: Anatomy) -> set[str]:
    """The paths of the linears in the decoder's layers."""
    return {
        path
        for path, module in model.named_modules()
        if path.startswith(f"{anatomy.layers}.") and isinstance(module, nn.Linear)
    }


def quantise(model: PreTrainedModel, linears: Iterable[str], config: BitsAndBytesConfig) -> None:
    """Replace linears of a loaded model by quantised ones, on the accelerator where there is one.

    It takes the memory of the full model first, but no more than one linear of it on the accelerator.
    """
    from transformers.quantizers import AutoHfQuantizer

    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    for path in sorted(linears):
        linear = model.get_submodule(path)
        assert isinstance(linear, nn.Linear), "only these are asked for"
        model.set_submodule(path, _quantised(linear, config).to(device))
    # what transformers and peft ask a model that transformers itself has quantised
    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
    model.hf_quantizer = quantizer
    model.quantization_method = config.quant_method
    model.is_quantized = True
    quantizer.postprocess_model(model)


def _quantised(linear: nn.Linear, config: BitsAndBytesConfig) -> nn.Module:
    import bitsandbytes as bnb

    sizes, bias = (linear.in_features, linear.out_features), linear.bias is not None
    new: Any
    if config.load_in_8bit:
        new = bnb.nn.Linear8bitLt(
            *sizes, bias, has_fp16_weights=False, threshold=config.llm_int8_threshold, device="meta"
        )
        new.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
    else:
        new = bnb.nn.Linear4bit(
            *sizes,
            bias,
            compute_dtype=config.bnb_4bit_compute_dtype,
            compress_statistics=config.bnb_4bit_use_double_quant,
            quant_type=config.bnb_4bit_quant_type,
            device="meta",
        )
        new.weight = bnb.nn.Params4bit(
            linear.weight.data,
            requires_grad=False,
            compress_statistics=config.bnb_4bit_use_double_quant,
            quant_type=config.bnb_4bit_quant_type,
            module=new,
        )
    new.bias = linear.bias
    new.source_cls = type(linear)
    return new.requires_grad_(False)


def is_quantised(module: nn.Module) -> bool:
    """Whether a module is a linear that bitsandbytes holds in 8 or 4 bits."""
    return type(module).__name__ in _CLASSES.values() and type(module).__module__.startswith("bitsandbytes.")


def size_of(parameter: nn.Parameter) -> int:
    """How many numbers a parameter stands for: a 4-bit one holds two in a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


def check_trains(base: nn.Module, modules: Iterable[str]) -> None:
    """Raise `MethodError` when quantised weights are to train: they are numbers of a table, and have no gradient."""
    for path in modules:
        inside = [name for name, module in base.get_submodule(path).named_modules() if is_quantised(module)]
        if inside:
            raise MethodError(
                f"{path} is to train, but its linears are quantised ({inside[0]} and {len(inside) - 1} more), and "
                "quantised weights do not train. Use quantization: none, or a method that adds weights of its own."
            )


def check_attached(model: PeftModel) -> None:
    """Raise `MethodError` when a method does not work over quantised linears; one layer of each kind is tried.

    A method that reads their weights as if they were plain numbers must not: with 8 bits it would go unnoticed, since
    the codes have the weights' shape. peft's tuners that read them rightly have layers of their own for it; any other
    must do with calling the linear.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    tried = set()
    for path, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer) or type(module) in tried:
            continue
        linear = module.get_base_layer()
        if is_quantised(linear):
            tried.add(type(module))
            reads_rightly = type(module).__module__.endswith(".bnb")
            reason = _why_not(module, linear if reads_rightly else _Guarded(linear))
            if reason:
                raise MethodError(
                    f"{model.active_peft_config.peft_type.value} cannot work on a linear that is held in 8 or 4 bits "
                    f"(at {path}): {reason}. Use quantization: none, or lora, ia3, adapter or prefix."
                )


def _why_not(layer: Any, linear: Any) -> str | None:
    """What goes wrong when a tuner's layer is called, in evaluation and in training, with this as its linear."""
    inner, modes = layer.base_layer, {module: module.training for module in layer.modules()}
    layer.base_layer = linear
    try:
        for training in (False, True):  # once is not enough: DoRA on 8 bits on a CPU fails from the second call on
            x = torch.ones(1, 2, linear.in_features, device=inner.weight.device, requires_grad=training)
            y = layer.train(training)(x)
            if training:  # what changes the linear's output in place fails here
                torch.autograd.grad(y.float().sum(), x, allow_unused=True)
    except Exception as error:  # whatever it is, the method does not work
        return (str(error) or type(error).__name__).splitlines()[0]
    finally:
        layer.base_layer = inner
        for module, mode in modes.items():
            module.training = mode
    return None


class _Weight:
    """What may be known of quantised weights."""

    def __init__(self, linear: Any):
        self.dtype, self.device, self.shape = linear.weight.dtype, linear.weight.device, linear.weight.shape

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"it reads the linear's weights (.{name})")


class _Guarded(nn.Linear):
    """A linear that can be called, and whose weights cannot be read."""

    def __init__(self, linear: Any):
        nn.Module.__init__(self)
        self._call = linear.forward
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self._weight = _Weight(linear)

    @property
    def weight(self) -> Any:  # type: ignore[override]
        return self._weight

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            raise TypeError(f"it casts its input to {x.dtype}, the type of the codes")
        return self._call(x)
