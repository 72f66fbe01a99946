"""What a memory plan is made from: a run's own first micro-batches, or a spec alone, without any weights."""

from __future__ import annotations

from dataclasses import replace

import torch

from peft_mllm.data.plan import Plan
from peft_mllm.data.supply import Supply
from peft_mllm.data.trees import plant
from peft_mllm.memory.free import free_bytes
from peft_mllm.memory.plan import MemoryPlan, Wanted, computed, plan_memory
from peft_mllm.pieces import held
from peft_mllm.spec import Spec
from peft_mllm.tuned import Tuned

LOOKED_AT = 3
"""Micro-batches whose samples stand for all."""


def plan_run(
    tuned: Tuned, supply: Supply, order: Plan, spec: Spec, *, device: torch.device, dtype: torch.dtype | None,
    available: int | None, whole: bool = False, quantization: str = "none",
) -> MemoryPlan:  # fmt: skip
    """How the steps of a run are computed.

    Args:
        tuned: the model, with weights or on meta.
        supply: of the training data, in the layout that is used.
        order: of the training.
        spec: of the run.
        device: where it is computed.
        dtype: of the frozen weights; None leaves them as they are.
        available: bytes for everything, weights too; None where that is not known.
        whole: look at every way, for a table.
        quantization: in which the decoder's linears will be held, where the model does not hold them so.
    """
    first = [micro for step in range(min(LOOKED_AT, order.steps_per_epoch)) for micro in order.step(step)[:1]]
    share = supply.share and supply.layout != "padded"
    planted = [plant([supply.encode(supply.records[i]) for i in micro], share=share) for micro in first]
    wanted = Wanted(
        device=device,
        dtype=dtype,
        train=spec.train,
        tokens=max(computed(trees, supply) for trees in planted),
        several=order.micro_batches > 1,
        recompute=spec.speed.recompute,
        micro_batch_tokens=spec.speed.tokens_at_once,
        available=available,
        quantization=quantization,
    )
    trees = [tree for some in planted for tree in some]
    # a plain function gives pixels themselves: no vision cache is asked, and none may keep what a trace computes
    seen = replace(supply, pixels=lambda images, input_ids: supply.pixels(images, input_ids))
    return plan_memory(tuned, trees, seen, wanted, whole=whole)


def available_to(tuned: Tuned, device: torch.device, *, processes: int = 1) -> int | None:
    """Bytes for everything: what is free, and what the loaded model has taken already.

    Processes without devices of their own share what is free.
    """
    free = free_bytes(device)
    if free is None:
        return None
    storages = [held(p).untyped_storage() for p in tuned.model.parameters() if p.device.type == device.type]
    taken = {storage._cdata: storage.nbytes() for storage in storages}
    hidden = tuned.shards.hidden if tuned.shards else 0
    return (free // processes if device.type == "cpu" else free) + sum(taken.values()) + hidden
