"""Whether a run's weights are cut, and by whom: what its spec says, or what `accelerate launch` was told."""

from __future__ import annotations

import os
from typing import Any

from peft_mllm.anatomy import Anatomy
from peft_mllm.errors import SpecError
from peft_mllm.sharding.shards import Shard, Shards
from peft_mllm.spec import SpeedSpec
from peft_mllm.world import World


def asked_for(speed: SpeedSpec, world: World, *, quantization: str) -> Shard:
    """How a run's weights are cut; `none` for a process alone.

    Args:
        speed: with `shard: auto`, what the launcher says in the environment.
        world: the processes.
        quantization: of the base.

    Raises:
        SpecError: it cannot be cut so.
    """
    shard = _of_launcher() if speed.shard == "auto" else speed.shard
    if shard == "none" or world.size == 1:
        return "none"
    if quantization != "none":
        raise SpecError(
            f"speed.shard: {shard} cannot cut a quantised base. Leave model.quantization out: over {world.size} "
            "processes the weights take as much less."
        )
    if speed.recompute == "offload":
        raise SpecError(
            f"speed.recompute: offload cannot tell weights that speed.shard: {shard} puts together from what waits in "
            "main memory. Use full."
        )
    return shard


def _of_launcher() -> Shard:
    """By accelerate's variables: FSDP of any version is FSDP2 here; of DeepSpeed only stage 3 cuts weights."""
    if _is_true("ACCELERATE_USE_FSDP"):
        return "fsdp"
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "")
    return "zero3" if _is_true("ACCELERATE_USE_DEEPSPEED") and stage in ("", "3") else "none"


def _is_true(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes", "on")


def shards_of(base: Any, anatomy: Anatomy, world: World, shard: Shard, *, own: bool) -> Shards:
    """Cut a model in place; its pieces are then on their device, and what stays whole where it was.

    Args:
        base: the model with a method's layers in it, on any device.
        anatomy: of its family.
        world: the processes.
        shard: how.
        own: whether the trained weights are the base's own; else they are a method's.
    """
    # imported here: each takes seconds
    if shard == "zero3":
        from peft_mllm.sharding.zero3 import Zero3

        return Zero3(base, anatomy, world, own=own)
    from peft_mllm.sharding.fsdp import FullyShards

    return FullyShards(base, anatomy, world, own=own)
