"""A run's memory plan is kept with it: a resumed run computes its steps as it did before, where that still fits.

Another split of a micro-batch draws other masks of dropout, so a plan that was made anew from what is free at that
moment could change the result.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from peft_mllm.memory.plan import MemoryPlan, said_of
from peft_mllm.spec import SpeedSpec

NO_LONGER = (
    "WARNING: this run computed its steps with {tokens} tokens at once and {policy}. That does not fit into the memory "
    "that is free now, so they are computed otherwise from here on. Without dropout the result changes by rounding "
    "alone."
)


def to_keep(plan: MemoryPlan, speed: SpeedSpec) -> dict[str, Any]:
    """What is kept of a plan, with the settings that it was made for."""
    return {
        "recompute": speed.recompute,
        "micro_batch_tokens": speed.tokens_at_once,
        "planned": {"policy": plan.policy, "tokens": plan.micro_batch_tokens},
    }


def plan_again(
    kept: Mapping[str, Any] | None,
    speed: SpeedSpec,
    make: Callable[[SpeedSpec], MemoryPlan],
    *,
    note: Callable[[str], None],
) -> MemoryPlan:
    """The plan of a run that may have been planned before.

    Args:
        kept: of an earlier call; None for a run that starts.
        speed: the settings now; other ones than those of the kept plan ask for a new one.
        make: plans with some settings.
        note: told that the kept plan does not fit any more.
    """
    asked = {"recompute": speed.recompute, "micro_batch_tokens": speed.tokens_at_once}
    if kept is None or {name: kept.get(name) for name in asked} != asked:
        return make(speed)
    policy, tokens = kept["planned"]["policy"], kept["planned"]["tokens"]
    fixed = {"recompute": policy, "micro_batch_tokens": sys.maxsize if tokens is None else tokens}
    plan = make(speed.model_copy(update=fixed))
    if all(row.fits for row in plan.table):
        return replace(plan, policy=policy, micro_batch_tokens=tokens)
    plan = make(speed)
    if (plan.policy, plan.micro_batch_tokens) != (policy, tokens):
        note(NO_LONGER.format(tokens="all" if tokens is None else f"{tokens:,}", policy=said_of(policy)))
    return plan
