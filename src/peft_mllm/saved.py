"""Scoring what was saved: a run, a base model, or any PEFT directory on a base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_mllm.data.supply import measure_with
from peft_mllm.errors import SpecError
from peft_mllm.files import disk_errors, read_json, write_json
from peft_mllm.interrupt import stop_requests
from peft_mllm.loading import dtype_for, load_family
from peft_mllm.run import score
from peft_mllm.rundir import ADAPTER, PREDICTIONS
from peft_mllm.screen import Screen
from peft_mllm.spec import ModelSpec, Spec
from peft_mllm.specfile import build, parse_spec
from peft_mllm.splits import open_split
from peft_mllm.tasks import TASKS
from peft_mllm.tuned import Tuned, load_adapter, untouched
from peft_mllm.world import World

PEFT_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class Target:
    """What is to be scored.

    Attributes:
        model: the base; or the whole model, where a run trained the base's own parameters.
        adapter: PEFT directory to put on it.
        spec: the run's spec, where it is a run.
    """

    model: ModelSpec
    adapter: Path | None
    spec: Mapping[str, Any]

    @property
    def base(self) -> str:
        """The base that it goes back to: of a fully trained run, not the run's own model."""
        return self.spec["model"]["path"] if self.spec else self.model.path


def evaluate_saved(
    target: str,
    tasks: Sequence[str | Mapping[str, Any]],
    *,
    base: str | None = None,
    output_dir: str | Path | None = None,
    limit: int | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Score a target on tasks; see `peft_mllm.evaluate`."""
    found = find_target(target, base)
    spec = _spec(found, tasks, output_dir)
    world = World()
    screen = Screen(quiet=quiet or not world.is_main)
    tuned = open_target(found, world)
    measure = measure_with(tuned.family.encode, spec.data.max_length)
    asked = [
        open_split(build(TASKS, named), named.name, "test", measure=measure, limit=limit, screen=screen)
        for named in (spec.task, *spec.evaluate)
    ]
    directory = Path(output_dir) if output_dir else None
    if directory is not None:
        with disk_errors(directory, "the scores into"):
            (directory / PREDICTIONS).mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        stop = stack.enter_context(stop_requests())
        scores = {
            each.name: score(each, tuned, spec, world=world, screen=screen, stop=stop, directory=directory)
            for each in asked
        }
    if directory is not None and world.is_main:
        write_json(directory / "scores.json", {"target": target, "scores": scores}, what="the scores")
    return scores


def find_target(target: str, base: str | None) -> Target:
    """Tell a run, a PEFT directory and a model apart by what lies in the directory.

    Raises:
        SpecError: a PEFT directory does not name its base, or a run has no adapter yet.
    """
    path = Path(target)
    if (path / "spec.json").is_file():
        if base is not None:
            raise SpecError(f"A base was given, but {target} is a run and knows its own. Leave --base out.")
        return _run_target(path)
    if (path / PEFT_CONFIG).is_file():
        named = base or read_json(path / PEFT_CONFIG).get("base_model_name_or_path")
        if not named:
            raise SpecError(f"{path / PEFT_CONFIG} names no base model; give it as base (--base).")
        return Target(ModelSpec(path=named), path, {})
    if base is not None:
        raise SpecError(f"A base was given, but {target} is no PEFT directory: it has no {PEFT_CONFIG}.")
    return Target(ModelSpec(path=target), None, {})


def _run_target(path: Path) -> Target:
    spec = read_json(path / "spec.json")
    model, adapter = ModelSpec.model_validate(spec["model"]), path / ADAPTER
    if (adapter / PEFT_CONFIG).is_file():
        return Target(model, adapter, spec)
    if (adapter / "config.json").is_file():
        return Target(model.model_copy(update={"path": str(adapter)}), None, spec)
    if (path / "result.json").is_file():  # a run that trained nothing is its base
        return Target(model, None, spec)
    raise SpecError(f"{path} is a run that is not finished: it has no {ADAPTER} yet. Train it first.")


def open_target(target: Target, world: World) -> Tuned:
    """Load the model, and the adapter on it."""
    dtype = dtype_for(target.model.dtype, world.device)
    family = load_family(target.model, dtype=dtype)
    family.anatomy.check(family.model)
    family.model.to(world.device)
    bf16 = dtype == "bfloat16" or bool(target.spec.get("train", {}).get("bf16"))
    if target.adapter is None:
        return untouched(family, bf16=bf16)
    return load_adapter(family, target.adapter, bf16=bf16)


def _spec(target: Target, tasks: Sequence[str | Mapping[str, Any]], output_dir: str | Path | None) -> Spec:
    """The target's own spec with these tasks in it: generation, batch size and seed stay a run's own."""
    own = {**target.spec, "output_dir": str(output_dir or "unused")} if target.spec else {}
    if tasks:
        own |= {"task": tasks[0], "evaluate": list(tasks[1:])}
    if "task" not in own:
        raise SpecError("Say what to score: a task's name. `peft-mllm list tasks` shows them.")
    return parse_spec({"method": "none", "output_dir": "unused"} | own)
