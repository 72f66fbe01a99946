"""Which model it is that answers: fingerprints of base and adapter, and of a base to its last bit."""

from __future__ import annotations

import hashlib

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn
from transformers import PreTrainedModel

from peft_mllm.attention import backend_of
from peft_mllm.files import canonical_json
from peft_mllm.provenance import tensors_fingerprint, weights_fingerprint
from peft_mllm.tuned import Tuned

NO_MATTER = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "encoder_hidden_size",
        "inference_mode",
        "peft_version",
        "prefix_projection",
        "revision",
        "task_type",
    }
)
"""Fields of a PEFT configuration that change no answer: they differ between an adapter and its saved form."""
CHUNK = 1 << 24
"""64-bit words that are summed at once: 128 MB."""


def identity_of(tuned: Tuned, base: str) -> str:
    """A hash of what answers: the base, what the adapter holds, and its configuration.

    Args:
        tuned: the model.
        base: `weights_fingerprint` of the base before the adapter came.
    """
    if not isinstance(tuned.model, PeftModel):
        return weights_fingerprint(tuned.model)
    held = tensors_fingerprint(get_peft_model_state_dict(tuned.model, save_embedding_layers=False))
    config = {
        name: sorted(map(str, value)) if isinstance(value, (set, list, tuple)) else str(value)
        for name, value in tuned.model.active_peft_config.to_dict().items()
        if name not in NO_MATTER
    }
    return hashlib.sha256(canonical_json([base, held, config])).hexdigest()


def state_of(model: PreTrainedModel, decoder: PreTrainedModel) -> str:
    """A hash of every bit of a model's weights and buffers, and of its modules, hooks and configuration.

    Args:
        model: the model.
        decoder: its language model's decoder stack, whose attention backend counts.
    """
    total = hashlib.sha256()
    for name, module in model.named_modules():
        total.update(f"{name} {type(module).__qualname__} {_hooks(module)}".encode())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {_checksums(tensor)}".encode())
    total.update(canonical_json([model.config.to_dict(), backend_of(decoder)]))
    return total.hexdigest()


def _hooks(module: nn.Module) -> int:
    """How many hooks a module has; those that transformers adds by itself when it is first asked do not count."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return sum(not str(getattr(hook, "__module__", "")).startswith("transformers.") for hook in hooks)


@torch.no_grad()
def _checksums(tensor: Tensor) -> list[int]:
    """Two sums over a tensor's bits, plain and weighted by place, modulo 2**64; computed where the tensor is."""
    flat = tensor.detach().contiguous().view(-1)
    bits = flat.view(torch.int64 if flat.nbytes % 8 == 0 else torch.uint8)
    places = torch.arange(1, 1 + min(CHUNK, bits.numel()), device=bits.device)
    sums = torch.zeros(2, dtype=torch.int64, device=bits.device)
    for number, some in enumerate(bits.split(CHUNK), start=1):
        weighted = (some.long() * places[: len(some)]).sum()
        sums += torch.stack([some.sum(dtype=torch.int64), (2 * number + 1) * weighted])
    return sums.tolist()
