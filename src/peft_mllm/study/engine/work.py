"""The work of a study's processes. Importing this module imports torch: it is for the process that forks them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from peft_mllm.methods import METHODS
from peft_mllm.metrics import METRICS
from peft_mllm.models import MODELS
from peft_mllm.run import run
from peft_mllm.specfile import parse_spec
from peft_mllm.tasks import TASKS
from peft_mllm.together import outcomes_of


def train(spec: Mapping[str, Any]) -> None:
    """Run a spec, as `peft-mllm train` does.

    Raises:
        UserError: what `run` and `parse_spec` raise.
    """
    run(parse_spec(spec), quiet=True)


def train_together(specs: Sequence[Mapping[str, Any]]) -> list[BaseException | None]:
    """Run specs of one base, as `peft-mllm train` does with several; the error that ended each, or None."""
    outcomes = outcomes_of([parse_spec(spec) for spec in specs], quiet=True)
    return [outcome if isinstance(outcome, BaseException) else None for outcome in outcomes]


def preload() -> None:
    """Import what runs import when they need it, once for all of them; what cannot be is the affair of its run."""
    for shelf in (METHODS, METRICS, MODELS, TASKS):
        for name in shelf:
            with suppress(Exception):
                shelf[name]


preload()
