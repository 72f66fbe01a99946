"""Our side: the stages of `peft-mllm train` on a spec, from the check of the data to the loop."""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.case import FOREVER, RATE, SEED, Case
from benchmarks.seen import Seen, watching
from benchmarks.turns import Side, Stepped
from peft_mllm.common import Common
from peft_mllm.data.supply import measure_with
from peft_mllm.files import read_lines
from peft_mllm.fitting import Fitted, Fitting
from peft_mllm.methods import METHODS
from peft_mllm.optimizer import learning_rates
from peft_mllm.rundir import RunDir
from peft_mllm.screen import Screen
from peft_mllm.spec import Spec
from peft_mllm.specfile import build, parse_spec
from peft_mllm.splits import Splits
from peft_mllm.tasks import TASKS
from peft_mllm.world import World


def spec_of(case: Case, *overrides: str, steps: int = FOREVER, micro: int | None = None) -> Spec:
    """The spec of a case; overrides as on the command line."""
    micro = micro or case.step
    data: dict[str, Any] = {
        "model": "embedded",  # takes no part: the case has made its model
        "method": case.options,
        "task": {"name": "custom", "train": str(case.data)},
        "data": {"max_length": 8192},
        "train": {
            "max_steps": steps,
            "per_device_train_batch_size": micro,
            "gradient_accumulation_steps": math.ceil(case.step / micro),
            "learning_rate": RATE,
            "lr_scheduler_type": "constant",
            "warmup_ratio": 0.0,
            "optim_args": {"fused": True},
            "bf16": case.bf16,
            "eval_strategy": "no",
            "save_strategy": "no",
        },
        "seed": SEED,
        "output_dir": str(case.folder / f"ours-{uuid.uuid4().hex[:8]}"),
    }
    return parse_spec(data, overrides)


def fit(case: Case, spec: Spec, stop: Callable[[], bool] = lambda: False) -> Fitted:
    """Train as a run does; `stop` is asked after each step."""
    tuned, screen = case.attach(), Screen(quiet=True)
    splits = Splits(
        tasks={"custom": build(TASKS, spec.task)},
        data=spec.data,
        seed=spec.seed,
        measure=measure_with(tuned.family.encode, spec.data.max_length),
        screen=screen,
    )
    train = splits.training()
    with RunDir.open(Path(spec.output_dir), spec.outcome()) as run:
        stage = Fitting(
            spec=spec,
            train=train,
            validation=None,
            encode=tuned.family.encode,
            run=run,
            world=World(),
            screen=screen,
            stop=stop,
            common=Common(),
        )
        return stage.fit(tuned, learning_rates(spec.train, METHODS[spec.method.name].learning_rate))


def ours(case: Case, *overrides: str, name: str = "ours", micro: int | None = None) -> Side:
    """Our trainer, to take turns."""

    def train(stepped: Stepped) -> None:
        def stop() -> bool:
            stepped()
            return False

        fit(case, spec_of(case, *overrides, micro=micro), stop)

    return Side(name, train)


def rehearse(case: Case, *overrides: str, steps: int) -> tuple[Seen, list[list[int]]]:
    """Train some steps: what was seen, and the samples of each step, which the others are then given."""
    spec = spec_of(case, "train.logging_steps=1", *overrides, steps=steps)
    with watching(Seen()) as seen:
        fitted = fit(case, spec)
    lines = read_lines(Path(spec.output_dir) / "metrics.jsonl")
    seen.losses = [line["loss"] for line in lines if "loss" in line]
    seen.gradients = seen.gradients[-steps:]  # planning memory may try an optimizer out before the first step
    order = [[sample for micro in fitted.plan.step(step) for sample in micro] for step in range(steps)]
    return seen, order
