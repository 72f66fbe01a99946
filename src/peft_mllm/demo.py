"""The demo: methods side by side on the embedded base, on a task it has not seen, in minutes on two cores.

Every figure comes from the runs in the output directory; the same command again resumes, or only shows them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rich.console import Console

from peft_mllm.errors import SpecError
from peft_mllm.methods import METHODS
from peft_mllm.run import run
from peft_mllm.shelf import did_you_mean
from peft_mllm.specfile import parse_spec
from peft_mllm.study.compare import compare
from peft_mllm.study.conclude import conclusion
from peft_mllm.study.render import terminal_table
from peft_mllm.study.report import write_report
from peft_mllm.study.results import read_results
from peft_mllm.tasks.scenes import SEEN, UNSEEN

TASK = "scenes_next"
STUDIED = ("lora", "ia3", "adapter", "prefix")
SCENES = 1
"""Seed of the demo's scenes. The learning rates below were found on those of seed 0."""

# What a base of a million parameters needs, which is not what one of seven billion needs: the paper's sizes
# are wider than this whole model, and its learning rates suit weights trained a thousand times longer.
TUNED: Mapping[str, tuple[Mapping[str, Any], float]] = MappingProxyType(
    {
        "lora": ({"rank": 16, "alpha": 32, "dropout": 0.0}, 3e-3),
        "ia3": ({}, 3e-2),
        "adapter": ({"bottleneck": 32, "dropout": 0.0}, 3e-3),
        "prefix": ({"virtual_tokens": 20, "init_std": 0.5}, 2e-1),
        "full": ({}, 1e-3),
    }
)
USUAL_FACTOR = 50
"""A method that is not above trains at this many times its own default rate: what the four above need, roughly."""
TRAIN = MappingProxyType(
    {
        "num_train_epochs": 3,
        "per_device_train_batch_size": 64,
        "per_device_eval_batch_size": 128,
        "warmup_ratio": 0.1,
        "save_strategy": "no",
        "logging_steps": 2,
    }
)


def run_demo(output: Path, *, methods: Sequence[str] | None = None, task: str | None = None) -> Path:
    """Run zero-shot, the methods and full fine-tuning; show the table and write the page.

    Args:
        output: directory of the runs and of the page.
        methods: names on the methods shelf; the four of the study when left out.
        task: a generated task that the base has not seen.

    Returns:
        the page.

    Raises:
        UserError: a name is unknown, or a run failed.
    """
    task = task or TASK
    if task not in UNSEEN:
        raise SpecError(f"'{task}' is no generated task that is new to the base. {did_you_mean(task, list(UNSEEN))}")
    chosen = list(dict.fromkeys(["none", *(methods or STUDIED), "full"]))
    directories = [output / task / method for method in chosen]
    specs = [parse_spec(demo_spec(method, task, at)) for method, at in zip(chosen, directories, strict=True)]
    console = Console(highlight=False)
    for number, spec in enumerate(specs, start=1):
        console.print(f"[bold]{number} of {len(specs)}: {spec.title}[/]")
        run(spec)
    results = read_results(directories)
    comparison = compare(results, task=task, seen=SEEN)
    console.print()
    console.print(terminal_table(comparison))
    console.print(f"\n{conclusion(comparison)}")
    page = output / f"{task}.html"
    write_report(results, page, title="Which method for a new task?", task=task, seen=SEEN)
    return page.resolve()


def title_of(method: str) -> str:
    """What tables call a run of the demo."""
    return {"none": "zero-shot", "full": "full fine-tuning"}.get(method, method)


def demo_spec(method: str, task: str, directory: Path) -> dict[str, Any]:
    """The spec of one run: the same data, steps and order for every method."""
    options, rate = TUNED.get(method, ({}, None))
    if rate is None and method in METHODS and METHODS[method].tunes_llm:
        rate = USUAL_FACTOR * METHODS[method].learning_rate
    small = {"train": 2048, "validation": 256, "test": 320}
    seen = {"train": 0, "validation": 0, "test": 160}
    return {
        "model": "embedded",
        "name": title_of(method),
        "method": {"name": method, **options},
        "task": {"name": task, "size": small, "seed": SCENES},
        "evaluate": [{"name": name, "size": seen, "seed": SCENES} for name in SEEN],
        "data": {"group_by_image": True},
        "train": {**TRAIN, "learning_rate": rate},
        "output_dir": str(directory),
    }
