"""One step of training as a trace: what lives at its peak, in bytes, without computing it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from peft_mllm.data.trees import Batch
from peft_mllm.memory.ghost import Ghosts, Ledger, without_numbers
from peft_mllm.recompute import Recompute, recompute_of, set_recompute
from peft_mllm.tuned import Tuned

PARTS = ("weights", "gradients", "optimizer", "activations", "backward", "logits", "vision")


@dataclass(frozen=True)
class Trace:
    """What one micro-batch's forward and backward hold at their peak.

    Attributes:
        tokens: of the batch, padding included.
        parts: bytes by part: gradients; activations, of the decoder's forward; backward, what it makes on its way;
            logits and losses; vision, with embeddings and masks.
    """

    tokens: int
    parts: Mapping[str, int]

    @property
    def peak(self) -> int:
        """Their sum."""
        return sum(self.parts.values())


def trace(
    tuned: Tuned,
    batch: Batch,
    *,
    policy: Recompute,
    device: torch.device,
    dtype: torch.dtype | None,
    accumulating: bool,
) -> Trace:
    """Follow a batch through forward and backward.

    Args:
        tuned: the model; its numbers are not touched, and may be missing (meta).
        batch: on the CPU.
        policy: what is computed again.
        device: on which it would be computed.
        dtype: of the frozen weights.
        accumulating: whether gradients of an earlier micro-batch are there.

    Raises:
        Exception: whatever a model raises that cannot be followed.
    """
    ledger = Ledger(device)
    model, training = tuned.model, tuned.model.training
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.callback(model.train, training)
        model.train()
        stack.callback(set_recompute, tuned.base, tuned.family.anatomy, recompute_of(tuned.decoder))
        set_recompute(tuned.base, tuned.family.anatomy, policy)
        fake = stack.enter_context(without_numbers(model, device, dtype))
        stack.enter_context(_labelled(tuned, ledger))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for tensor in (*model.parameters(), *model.buffers()):
            ledger.leave_out(tensor)
        trainable = list(tuned.trainable().values())
        with Ghosts(fake, ledger.born):
            ledger.label = "gradients"
            if accumulating:
                for parameter in trainable:
                    parameter.grad = torch.zeros_like(parameter)
            ledger.label = "vision"
            losses = tuned.answer_losses(_ghost_of(batch, fake, ledger))
            loss = losses.sum()
            ledger.label = "backward"
            loss.backward()
        peak = dict(ledger.peak)
        del losses, loss
    return Trace(tokens=batch.input_ids.numel(), parts={part: peak.get(part, 0) for part in PARTS if peak.get(part)})


def _ghost_of(batch: Batch, fake: Any, ledger: Ledger) -> Batch:
    """A batch whose floats are fake; all of it is counted."""

    def moved(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: moved(each) for name, each in value.items()}
        if not isinstance(value, Tensor):
            return value
        made = fake.from_tensor(value) if value.is_floating_point() else value
        ledger.born(made)
        return made

    return replace(batch, **{name: moved(value) for name, value in vars(batch).items()})


@contextmanager
def _labelled(tuned: Tuned, ledger: Ledger) -> Iterator[None]:
    """Tell the ledger what the tensors are for, by where they are made."""

    def before(module: nn.Module, args: Any) -> None:
        ledger.label = "activations"

    def after(module: nn.Module, args: Any, output: Any) -> None:
        ledger.label = "logits"

    hooks = [tuned.decoder.register_forward_pre_hook(before), tuned.decoder.register_forward_hook(after)]
    for parameter in tuned.trainable().values():
        hooks.append(parameter.register_post_accumulate_grad_hook(lambda p: ledger.is_for(p.grad, "gradients")))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
