"""The axes of runs that no study planned: whatever differs between their specs.

Model, connector, vision, amount of data are axes where they vary; the location and the learning rate where one
method has several of them (each method has its own usual ones). Options in which runs of one method differ become
part of the method's label. The method and the task are axes always.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePath
from typing import Any

from peft_mllm.study.index import Index, Planned
from peft_mllm.study.outcomes import FULL, NOT_VARIED, ZERO_SHOT
from peft_mllm.study.results import Result
from peft_mllm.study.wording import and_list

_NO_FACTOR = {"method", "task", "model", "connector", "vision", "seed", "name", "output_dir", "evaluate", "scored"}
_NO_MATTER = {
    "data.max_train_samples",
    "train.learning_rate",
    "train.report_to",
    "train.logging_steps",
    "train.dataloader_num_workers",
}
"""Keys that other axes cover, or that do not change a result."""
ROWS: Mapping[str, str] = {"none": ZERO_SHOT, "full": FULL}

Label = Callable[[Result], str]


def infer(directory: Path, found: Mapping[str, Result]) -> tuple[Index, list[str]]:
    """Make the index of a folder of runs.

    Args:
        directory: the folder.
        found: results by the run directory's path below it.

    Returns:
        the index, and notes for the reader: runs that say the same again are left out.
    """
    trained = [result for result in found.values() if not result.is_zero_shot]
    labels = _known_axes(list(found.values()), trained)
    labels |= _further_axes(trained, labels)
    planned: dict[tuple[Any, ...], Planned] = {}
    twice = []
    for name, result in sorted(found.items()):
        factors = {axis: _label(axis, label, result) for axis, label in labels.items()}
        run = Planned(result.spec_id, name, "final", factors, None if result.is_zero_shot else result.seed)
        if planned.setdefault((*factors.values(), run.seed), run) is not run:
            twice.append(name)
    axes = {axis: _levels([run.factors[axis] for run in planned.values()]) for axis in labels}
    index = Index(
        title=directory.resolve().name,
        question="",
        protocol="as they are",
        facts=[("Protocol", "runs as they were made, not planned as a study")],
        contrast="method",
        axes=axes,
        seen=_others(list(found.values())),
        runs=list(planned.values()),
        expected=len(planned),
    )
    return index, [f"Left out, since another run has the same spec: {and_list(twice)}."] if twice else []


def _label(axis: str, label: Label, result: Result) -> str:
    """A model that nothing was trained in has no connector, data or location."""
    return NOT_VARIED if result.is_zero_shot and axis not in ("method", "task", "model") else label(result)


def _known_axes(results: Sequence[Result], trained: Sequence[Result]) -> dict[str, Label]:
    names = _shortest({result.model.source for result in results})
    everywhere: dict[str, Label] = {
        "model": lambda result: names[result.model.source],
        "connector": lambda result: str(result.spec.get("connector", "frozen")),
        "vision": lambda result: str(result.spec.get("vision", "frozen")),
        "data_size": lambda result: str(_section(result, "data").get("max_train_samples") or "all"),
    }
    in_a_method: dict[str, Label] = {
        "location": lambda result: result.method.location or NOT_VARIED,
        "learning_rate": _learning_rate,
    }
    axes: dict[str, Label] = {}
    if len({everywhere["model"](result) for result in results}) > 1:
        axes["model"] = everywhere["model"]
    axes["method"] = _with_options(trained, _name_of_method, lambda result: result.method.options, ROWS)
    axes["task"] = _with_options(results, _name_of_task, lambda result: _section(result, "task").get("options", {}), {})
    for axis, label in list(everywhere.items())[1:]:
        if len(set(map(label, trained))) > 1:
            axes[axis] = label
    for axis, label in in_a_method.items():
        if any(len(set(map(label, group))) > 1 for group in _groups(trained, _name_of_method)):
            axes[axis] = label
    return axes


def _further_axes(trained: Sequence[Result], labels: Mapping[str, Label]) -> dict[str, Label]:
    """Keys of the specs in which runs differ that would be the same otherwise."""
    further: dict[str, Label] = {}
    for group in _groups(trained, lambda result: (result.seed, *(label(result) for label in labels.values()))):
        specs = [_of_spec(result) for result in group]
        keys = sorted({key for spec in specs for key in spec})
        for key in keys:
            if len({_plain(spec.get(key)) for spec in specs}) > 1:
                further[key] = partial(_value_at, key)
    return further


def _value_at(key: str, result: Result) -> str:
    return _plain(_of_spec(result).get(key))


def _with_options(
    results: Sequence[Result], name: Label, options: Callable[[Result], Mapping[str, Any]], rows: Mapping[str, str]
) -> Label:
    """A name, with the options in which those of the name differ: `lora, rank 8`."""
    differing: dict[str, list[str]] = {}
    for group in _groups(results, name):
        flat = [dict(_flat(options(result))) for result in group]
        keys = sorted({key for each in flat for key in each})
        differing[name(group[0])] = [key for key in keys if len({_plain(each.get(key)) for each in flat}) > 1]

    def label(result: Result) -> str:
        chosen = dict(_flat(options(result)))
        said = [
            f"{key.rpartition('.')[2].replace('_', ' ')} {_plain(chosen.get(key))}"
            for key in differing.get(name(result), ())
        ]
        own = name(result)
        row = own if own == "none" and not result.is_zero_shot else rows.get(own, own)
        return ", ".join([row, *said])

    return label


def _name_of_method(result: Result) -> str:
    return result.method.name


def _name_of_task(result: Result) -> str:
    return str(_section(result, "task").get("name") or next(iter(result.scores), ""))


def _learning_rate(result: Result) -> str:
    rates = [part.learning_rate for part in result.trainable.values() if part.learning_rate is not None]
    return f"{rates[0]:g}" if rates else NOT_VARIED


def _others(results: Sequence[Result]) -> list[str]:
    """Tasks that every run was scored on and none was trained on: what tuning may have cost is seen there."""
    trained = {_name_of_task(result) for result in results}
    every = [task for task in results[0].scores if all(task in result.scores for result in results)]
    return [task for task in every if task not in trained]


def _section(result: Result, name: str) -> Mapping[str, Any]:
    section = result.spec.get(name)
    return section if isinstance(section, Mapping) else {"name": section} if isinstance(section, str) else {}


def _of_spec(result: Result) -> dict[str, Any]:
    """What decides the result and is no factor already, by dotted key."""
    spec = {key: value for key, value in result.spec.items() if key not in _NO_FACTOR}
    return {key: value for key, value in _flat(spec) if key not in _NO_MATTER}


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _groups(results: Sequence[Result], key: Callable[[Result], Any]) -> list[list[Result]]:
    groups: dict[Any, list[Result]] = {}
    for result in results:
        groups.setdefault(key(result), []).append(result)
    return list(groups.values())


def _shortest(sources: set[str]) -> dict[str, str]:
    """The last part of a path or hub id, where that tells them apart."""
    names = {source: PurePath(source).name or source for source in sources}
    return names if len(set(names.values())) == len(names) else {source: source for source in sources}


def _levels(labels: Sequence[str]) -> list[str]:
    """Rows that every study has at the ends, numbers by size, other labels by name."""
    ends = {ZERO_SHOT: -1, FULL: 1}
    return sorted(set(labels) - {NOT_VARIED}, key=lambda label: (ends.get(label, 0), _number(label), label))


def _number(label: str) -> float:
    try:
        return float(label)
    except ValueError:
        return float("inf") if label == "all" else 0.0


def _plain(value: Any) -> str:
    return NOT_VARIED if value is None else f"{value:g}" if isinstance(value, float) else str(value)
