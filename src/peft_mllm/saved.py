"""Scoring what was saved: runs, base models, and PEFT directories, with one load of each base."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft_mllm.data.supply import measure_with
from peft_mllm.errors import SpecError
from peft_mllm.files import disk_errors, read_json, write_json
from peft_mllm.identity import identity_of
from peft_mllm.interrupt import stop_requests
from peft_mllm.loading import dtype_for, load_family, source_of
from peft_mllm.models.base import Family
from peft_mllm.mount import Mount
from peft_mllm.rundir import ADAPTER, PREDICTIONS
from peft_mllm.scored import score
from peft_mllm.screen import Screen
from peft_mllm.spec import ModelSpec, NamedSpec, Spec
from peft_mllm.specfile import build, parse_spec
from peft_mllm.splits import Opened, open_split
from peft_mllm.tasks import TASKS
from peft_mllm.tuned import Tuned, load_adapter, untouched
from peft_mllm.world import World

PEFT_CONFIG = "adapter_config.json"
SCORES = "scores.json"


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

    @property
    def held(self) -> str:
        """Equal for targets that one loaded base can serve."""
        source = source_of(self.model.path)
        place = str(Path(source).resolve()) if Path(source).exists() else source
        return json.dumps({**self.model.model_dump(mode="json"), "path": place}, sort_keys=True)


@dataclass(frozen=True)
class Job:
    """One target with what it is asked.

    Attributes:
        name: as the user wrote it.
        target: what it is.
        spec: its tasks, generation, batch size and seed.
        directory: for predictions and scores, where they are to be kept.
    """

    name: str
    target: Target
    spec: Spec
    directory: Path | None

    @property
    def tasks(self) -> tuple[NamedSpec, ...]:
        """What is scored."""
        return (self.spec.task, *self.spec.evaluate)


def evaluate_saved(
    targets: Sequence[str],
    tasks: Sequence[str | Mapping[str, Any]],
    *,
    base: str | None = None,
    vision_tower: str | None = None,
    output_dir: str | Path | None = None,
    limit: int | None = None,
    choices: str | None = None,
    quiet: bool = False,
) -> dict[str, dict[str, Any]]:
    """Score targets on tasks, and give target -> task -> scores; see `peft_mllm.evaluate`."""
    jobs = _jobs(targets, tasks, base=base, vision_tower=vision_tower, output_dir=output_dir, choices=choices)
    world = World()
    screen = Screen(quiet=quiet or not world.is_main)
    groups: dict[str, list[Job]] = {}
    for job in jobs:
        groups.setdefault(job.target.held, []).append(job)
    scores: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        stop = stack.enter_context(stop_requests())
        for together in groups.values():
            scores |= _Group(together, limit=limit, world=world, screen=screen, stop=stop).scores()
    return {job.name: scores[job.name] for job in jobs}


@dataclass
class _Group:
    """Targets of one base, which is loaded once."""

    jobs: Sequence[Job]
    limit: int | None
    world: World
    screen: Screen
    stop: Callable[[], bool]
    opened: dict[str, Opened] = field(default_factory=dict)

    def scores(self) -> dict[str, dict[str, Any]]:
        model = self.jobs[0].target.model
        mount = Mount(lambda: load_on_device(model, self.world), note=self.screen.note)
        found = {}
        for job in self.jobs:
            if len(self.jobs) > 1:
                self.screen.note(job.name)
            last = job is self.jobs[-1]
            bf16 = _bf16(job.target, self.world)
            with mount.wearing(job.target.adapter, bf16=bf16, last=last) as tuned:
                found[job.name] = self._ask(job, tuned, mount.fingerprint)
        return found

    def _ask(self, job: Job, tuned: Tuned, fingerprint: str) -> dict[str, Any]:
        asked = [self._open(job, named, tuned.family) for named in job.tasks]
        if job.directory is not None:
            with disk_errors(job.directory, "the scores into"):
                (job.directory / PREDICTIONS).mkdir(parents=True, exist_ok=True)
        identity = identity_of(tuned, fingerprint)
        scores = {
            each.name: score(
                each,
                tuned,
                job.spec,
                world=self.world,
                screen=self.screen,
                stop=self.stop,
                directory=job.directory,
                identity=identity,
            )
            for each in asked
        }
        if job.directory is not None and self.world.is_main:
            said = {"target": job.name, "tasks": [task.model_dump(mode="json") for task in job.tasks]}
            model = {"source": job.target.base, "fingerprint": fingerprint}
            write_json(job.directory / SCORES, {**said, "model": model, "scores": scores}, what="the scores")
        return scores

    def _open(self, job: Job, named: NamedSpec, family: Family) -> Opened:
        """A task's questions; read and checked once for all targets that are asked the same."""
        key = json.dumps([named.model_dump(mode="json"), job.spec.data.max_length], sort_keys=True)
        if key not in self.opened:
            measure = measure_with(family.encode, job.spec.data.max_length)
            self.opened[key] = open_split(
                build(TASKS, named), named.name, "test", measure=measure, limit=self.limit, screen=self.screen
            )
        return self.opened[key]


def _jobs(
    targets: Sequence[str],
    tasks: Sequence[str | Mapping[str, Any]],
    *,
    base: str | None,
    vision_tower: str | None,
    output_dir: str | Path | None,
    choices: str | None,
) -> list[Job]:
    """What is to be done, checked as far as that goes without a model.

    Raises:
        SpecError: a target is none, is said twice, or has nothing to be asked; or the output is a run's own.
    """
    if not targets:
        raise SpecError("Say what to score: a run, a model or a PEFT directory.")
    twice = sorted({name for name in targets if targets.count(name) > 1})
    if twice:
        raise SpecError(f"{', '.join(twice)} would be scored twice.")
    output = Path(output_dir) if output_dir else None
    if output is not None and (output / "spec.json").is_file():
        raise SpecError(f"{output} is a run, and keeps its own predictions. Choose another directory for the scores.")
    names = _folders(targets)
    return [
        Job(
            name=name,
            target=(found := find_target(name, base, vision_tower)),
            spec=_spec(name, found, tasks, choices),
            directory=output if output is None or len(targets) == 1 else output / names[name],
        )
        for name in targets
    ]


def _folders(targets: Sequence[str]) -> dict[str, str]:
    """A folder's name for each target: its last part, and as many before it as tell them apart."""
    parts = {name: Path(name).parts for name in targets}
    for length in range(1, max(len(each) for each in parts.values()) + 1):
        names = {name: re.sub(r"[^\w.-]+", "-", "-".join(each[-length:])).strip("-") for name, each in parts.items()}
        if len(set(names.values())) == len(names):
            return names
    return {name: f"{i}" for i, name in enumerate(targets, start=1)}


def find_target(target: str, base: str | None, vision_tower: str | None = None) -> Target:
    """Tell a run, a PEFT directory and a model apart by what lies in the directory.

    Args:
        target: one of them.
        base: of a PEFT directory.
        vision_tower: of a model, or a base, that comes without its own.

    Raises:
        SpecError: a PEFT directory does not name its base, or a run has no adapter yet.
    """
    path = Path(target)
    if (path / "spec.json").is_file():
        if base is not None:
            raise SpecError(f"A base was given, but {target} is a run and knows its own. Leave --base out.")
        if vision_tower is not None:
            raise SpecError(f"A vision tower was given, but {target} is a run and knows its own. Leave it out.")
        return _run_target(path)
    if (path / PEFT_CONFIG).is_file():
        named = base or read_json(path / PEFT_CONFIG).get("base_model_name_or_path")
        if not named:
            raise SpecError(f"{path / PEFT_CONFIG} names no base model; give it as base (--base).")
        return Target(ModelSpec(path=named, vision_tower=vision_tower), path, {})
    if base is not None:
        raise SpecError(f"A base was given, but {target} is no PEFT directory: it has no {PEFT_CONFIG}.")
    return Target(ModelSpec(path=target, vision_tower=vision_tower), None, {})


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
    family = load_on_device(target.model, world)
    if target.adapter is None:
        return untouched(family, bf16=_bf16(target, world))
    return load_adapter(family, target.adapter, bf16=_bf16(target, world))


def load_on_device(model: ModelSpec, world: World) -> Family:
    """Load a model on the world's device, in the type that suits it.

    Raises:
        ModelError: it cannot be loaded, or is not as its family says.
    """
    family = load_family(model, dtype=dtype_for(model.dtype, world.device))
    family.anatomy.check(family.model)
    family.model.to(world.device)
    return family


def _bf16(target: Target, world: World) -> bool:
    trained_so = bool(target.spec.get("train", {}).get("bf16"))
    return trained_so or dtype_for(target.model.dtype, world.device) == "bfloat16"


def _spec(name: str, target: Target, tasks: Sequence[str | Mapping[str, Any]], choices: str | None) -> Spec:
    """The target's own spec with these tasks in it: generation, batch size and seed stay a run's own."""
    own = {**target.spec, "output_dir": "unused"} if target.spec else {}
    if tasks:
        own |= {"task": tasks[0], "evaluate": list(tasks[1:])}
    if choices is not None:
        own |= {"generation": {**own.get("generation", {}), "choices": choices}}
    if "task" not in own:
        raise SpecError(f"{name}: say what to score: a task's name. `peft-mllm list tasks` shows them.")
    return parse_spec({"method": "none", "output_dir": "unused"} | own)
