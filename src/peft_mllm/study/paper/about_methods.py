"""Claims on which method, and which model, is best."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from peft_mllm.study.inference.differences import holm
from peft_mllm.study.paper.evidence import (
    FAILS,
    HOLDS,
    OPEN,
    Contrast,
    Finding,
    Tasks,
    all_above,
    contrast,
    listed,
    nothing,
    sign,
)
from peft_mllm.study.paper.groups import Group
from peft_mllm.study.paper.matching import (
    Evidence,
    between_methods,
    methods_of,
    minus,
    pairs,
    seen_by,
    trained_task,
    unseen_by,
    versus,
)
from peft_mllm.study.paper.names import canonical_task

_NAMED = ("okvqa", "vqav2")
"""The seen tasks that the claim names; OCRVQA is not among them."""


def adapter_first(study: Evidence) -> Finding:
    """Claim 1: adapter above every other method, LoRA above all the rest."""
    names = methods_of(study.groups)
    if "adapter" not in names:
        return nothing()
    order = [
        (first, other)
        for first, above in (("adapter", ("adapter",)), ("lora", ("adapter", "lora")))
        for other in names
        if first in names and other not in above
    ]
    return all_above([contrast(f"{a} minus {b}", versus(study.groups, a, b), trained_task) for a, b in order])


def best_on_unseen(study: Evidence) -> Finding:
    """Claim 2: LoRA and adapter above every other method on each unseen task."""
    return _two_best(study, ("adapter", "lora"), unseen_by(study.seen))


def best_on_seen(study: Evidence) -> Finding:
    """Claim 3: IA3 and prefix above every other method on OKVQA and VQAv2; on each seen task of another study."""
    if not study.seen:
        return nothing()
    tasks, _ = seen_by(study.seen, study.groups)
    there = {canonical_task(task) for group in study.groups for task in tasks(group)}
    named = there & set(_NAMED)
    return _two_best(study, ("ia3", "prefix"), lambda group: [t for t in tasks(group) if _among(t, named or there)])


def best_of_all(study: Evidence) -> Finding:
    """Claim 16: LLaVA-1.5-13B with IA3 and a tuned connector above every other combination, over all tasks."""
    combinations = _by_combination(study.groups)
    best = combinations.pop(("LLaVA-1.5-13B", "ia3", "tuned"), None)
    if best is None or len({model for model, _, _ in combinations}) < 2:
        return nothing()
    return all_above(
        [
            contrast(f"minus {' '.join(names)}", minus([(best[t], of[t]) for t in best if t in of]), trained_task)
            for names, of in combinations.items()
        ]
    )


def larger_is_better(study: Evidence) -> Finding:
    """Claim 17: 13B above 7B in every setting, and ShareGPT4V above 7B but for IA3 with a frozen connector."""
    settings = dict.fromkeys((group.method, group.setting.connector) for group in study.groups)
    found: list[Contrast | None] = []
    for method, connector in settings:
        groups = [g for g in study.groups if (g.method, g.setting.connector) == (method, connector)]
        for model in ("LLaVA-1.5-13B", "ShareGPT4V-7B"):
            if (model, method, connector) != ("ShareGPT4V-7B", "ia3", "frozen"):
                cells = minus(pairs(groups, "model", (model,), "LLaVA-1.5-7B"))
                found.append(contrast(f"{model} minus 7B, {method}, connector {connector}", cells, trained_task))
    return all_above(found)


def _two_best(study: Evidence, best: tuple[str, str], tasks: Tasks) -> Finding:
    """Two methods above each other one on each task; it fails where another is above both of them on a task."""
    others = [name for name in methods_of(study.groups) if name not in best]
    names = dict.fromkeys(task for group in study.groups for task in tasks(group))
    if not others or not set(best) <= set(methods_of(study.groups)):
        return nothing()
    found: dict[tuple[str, str], list[Contrast]] = {}
    for task in names:
        for other in others:
            each = [
                contrast(f"{task}: {name} minus {other}", versus(study.groups, name, other), _only(task, tasks))
                for name in best
            ]
            if known := [one for one in each if one is not None]:
                found[task, other] = known
    flat = [one for known in found.values() for one in known]
    if not flat:
        return nothing()
    adjusted = iter(holm([one.p for one in flat]))
    signs = [[sign(one, next(adjusted)) for one in known] for known in found.values()]
    beaten = any(each == [-1, -1] for each in signs)
    clear = all(each == [1, 1] for each in signs)
    return Finding(FAILS if beaten else HOLDS if clear else OPEN, listed(flat))


def _only(task: str, tasks: Tasks) -> Tasks:
    return lambda group: [each for each in tasks(group) if each == task]


def _among(task: str, names: set[str]) -> bool:
    return canonical_task(task) in names


def _by_combination(groups: Sequence[Group]) -> dict[tuple[str, str, str], dict[Hashable, Group]]:
    """Groups of the paper's models by model, method and connector, and then by all else (the task, in most studies)."""
    found: dict[tuple[str, str, str], dict[Hashable, Group]] = {}
    own = ("model", "method", "connector", "size", "location", "learning_rate")
    for methods in between_methods([group for group in groups if group.setting.model]):
        for group in methods.values():
            rest = tuple(sorted((axis, label) for axis, label in group.factors.items() if axis not in own))
            key = (group.setting.model, group.method, group.setting.connector)
            found.setdefault(key, {}).setdefault(rest, group)
    return found
