"""Axes of a study: each level is a label with the keys of a run's spec that it sets.

A value goes to the key that the axis is named after (`connector: [frozen, tuned]`), or is a mapping of several keys
(`model: {Qwen: {model: Qwen/Qwen-VL-Chat, train.weight_decay: 0.1}}`). An axis `by: method` differs by method.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import PurePath
from typing import Any

from peft_mllm.document import SHORT_FORMS, Key
from peft_mllm.methods import METHODS
from peft_mllm.shelf import did_you_mean
from peft_mllm.spec import Spec
from peft_mllm.study.definition import UnfitError
from peft_mllm.study.outcomes import FULL, NOT_VARIED

SHORT_NAMES = {
    "location": "method.location",
    "data_size": "data.max_train_samples",
    "learning_rate": "train.learning_rate",
}
"""What studies vary most, by the name that a reader knows it by."""
BY = "by"


@dataclass(frozen=True)
class Level:
    """One value of an axis.

    Attributes:
        label: as tables show it.
        values: value by dotted key of a run's spec.
        at: key of the study that says it.
    """

    label: str
    values: Mapping[str, Any]
    at: Key = field(default=(), compare=False)

    def said_at(self, key: Key) -> list[Key]:
        """Where the study may have said a key of a run's spec; nothing if it is none of this level's."""
        return [at for name in self.values for at in said_at(self.at, name, key)]


NOT_HERE = Level(NOT_VARIED, {})


@dataclass(frozen=True)
class Axis:
    """One axis.

    Attributes:
        levels: of an axis that is the same for all methods.
        by_method: levels by the method's label, of one that is not.
    """

    name: str
    levels: tuple[Level, ...] = ()
    by_method: Mapping[str, tuple[Level, ...]] | None = None

    def levels_for(self, method: Level) -> tuple[Level, ...]:
        """The levels that this axis has for a method; one without a label where it has none to vary."""
        if self.by_method is not None:
            return self.by_method.get(method.label, (NOT_HERE,))
        if self.name == "location" and not _has_location(method):
            return (NOT_HERE,)
        return self.levels

    def labels(self) -> tuple[str, ...]:
        """All labels in order."""
        groups = [self.levels] if self.by_method is None else list(self.by_method.values())
        return tuple(dict.fromkeys(level.label for group in groups for level in group))


def axes_of(said: Mapping[str, Any]) -> dict[str, Axis]:
    """The axes as the file says them, with full fine-tuning among the methods.

    Raises:
        UnfitError: an axis is not understood; names it.
    """
    axes = {name: _axis(name, value) for name, value in said.items()}
    methods = axes["method"]
    if methods.by_method is not None:
        raise UnfitError(("axes", "method"), "the methods cannot differ by method.")
    for level in methods.levels:
        if (unknown := method_name(level)) not in METHODS:
            known = did_you_mean(unknown, list(METHODS))
            raise UnfitError(level.at, f"there is no method '{unknown}'. {known}")
    if not any(method_name(level) == "full" for level in methods.levels):
        axes["method"] = Axis("method", (*methods.levels, Level(FULL, {"method": {"name": "full"}})))
    labels = list(axes["method"].labels())
    for name, axis in axes.items():
        for label in axis.by_method or ():
            if label not in labels:
                known = did_you_mean(label, labels)
                raise UnfitError(("axes", name, label), f"'{label}' is no method of this study. {known}")
    return axes


def method_name(level: Level) -> str:
    """The name on the shelf of a level of the axis `method`."""
    method = level.values["method"]
    return str(method["name"] if isinstance(method, Mapping) else method)


def levels_of_method(said: Any, at: Key) -> tuple[Level, ...]:
    """What a method varies: a mapping of keys to lists (all combinations) or a list of mappings.

    Keys are the method's options, short names, or keys of a run's spec; `at` is the key of the study that says it.
    """
    if isinstance(said, Mapping):
        columns = {key: values if isinstance(values, list) else [values] for key, values in said.items()}
        rows = [dict(zip(columns, combination, strict=True)) for combination in product(*columns.values())]
        shown = [key for key in columns if len(columns[key]) > 1] or list(columns)
        return tuple(_level(row, shown, at) for row in rows)
    if isinstance(said, list) and all(isinstance(row, Mapping) and row for row in said):
        return tuple(_level(row, list(row)[:1], (*at, place)) for place, row in enumerate(said))
    raise UnfitError(at, "write keys with lists of values, such as rank: [8, 16], or a list of mappings.")


def _of_method(axis: str, said: Any, at: Key) -> tuple[Level, ...]:
    """What a method varies on an axis: plain values go to the key that the axis is named after."""
    if isinstance(said, list) and _is_key(axis) and not any(isinstance(value, Mapping) for value in said):
        return tuple(_labelled(axis, _label(value), value, (*at, place)) for place, value in enumerate(said))
    return levels_of_method(said, at)


def _level(row: Mapping[str, Any], shown: Sequence[str], at: Key) -> Level:
    label = ", ".join(f"{key.rpartition('.')[2].replace('_', ' ')} {_plain(row[key])}" for key in shown)
    return Level(label, {_method_key(key): value for key, value in row.items()}, at)


def _method_key(key: str) -> str:
    if key in SHORT_NAMES:
        return SHORT_NAMES[key]
    return key if key.partition(".")[0] in Spec.model_fields else f"method.{key}"


def _axis(name: str, said: Any) -> Axis:
    at = ("axes", name)
    if isinstance(said, Mapping) and said.get(BY) == "method":
        groups = {label: _of_method(name, values, (*at, label)) for label, values in said.items() if label != BY}
        return Axis(name, by_method=groups)
    if isinstance(said, Mapping) and said:
        return Axis(name, tuple(_labelled(name, str(label), value, (*at, label)) for label, value in said.items()))
    if isinstance(said, list) and said:
        levels = tuple(_labelled(name, _label(value), value, (*at, place)) for place, value in enumerate(said))
        twice = sorted({level.label for level in levels if [each.label for each in levels].count(level.label) > 1})
        if twice:
            raise UnfitError(at, f"'{twice[0]}' is there twice; give each value a label of its own (label: value).")
        return Axis(name, levels)
    raise UnfitError(at, "write a list of values, or a mapping of labels to values.")


def _labelled(name: str, label: str, value: Any, at: Key) -> Level:
    """A level of an axis whose values go to its own key, or name the keys that they go to."""
    value = label if value is None else value
    key = SHORT_NAMES.get(name, name)
    several = isinstance(value, Mapping) and value and all(_is_key(each) for each in value)
    if several and (key in value or not _is_key(key)):
        return Level(label, _one_by_one({SHORT_NAMES.get(each, each): inner for each, inner in value.items()}), at)
    if not _is_key(key):
        known = did_you_mean(name, [*Spec.model_fields, *SHORT_NAMES])
        raise UnfitError(
            ("axes", name),
            f"'{name}' is no key of a run's spec, so each label needs the keys that it sets, such as "
            f"{label}: {{train.num_train_epochs: 3}}. {known}",
        )
    if name == "method" and isinstance(value, Mapping) and "name" not in value:
        value = {"name": label, **value}
    return Level(label, _one_by_one({key: value}), at)


def _one_by_one(values: Mapping[str, Any]) -> dict[str, Any]:
    """Sections of a spec key by key, so that a level leaves alone what else is fixed in a section."""
    named = {k: {SHORT_FORMS[k]: v} if k in NESTED and isinstance(v, str) else v for k, v in values.items()}
    return dict(flat(named))


def _is_key(name: str) -> bool:
    return name in SHORT_NAMES or name.partition(".")[0] in Spec.model_fields


def _has_location(method: Level) -> bool:
    return "location" in METHODS[method_name(method)].Options.model_fields


def _label(value: Any) -> str:
    if isinstance(value, Mapping):
        path = value.get("path")
        return str(value.get("name") or (PurePath(str(path)).name if path else value))
    return _plain(value)


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def said_at(at: Key, name: str, key: Key) -> list[Key]:
    """Where a study may have said `key` of a run's spec, below `at`, where it sets the dotted key `name` around it."""
    own = tuple(name.split("."))
    if tuple(map(str, key[: len(own)])) != own:
        return []
    short = [each for each, long in SHORT_NAMES.items() if long == name]
    names: list[Key] = [(each,) for each in (name, name.removeprefix("method."), *short)]
    return [(*at, *each, *key[len(own) :]) for each in (*names, own, ())]


def put(spec: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Set dotted keys in a spec's data; what is put never shares anything with what it came from."""
    for key, value in values.items():
        *around, last = key.split(".")
        inner = spec
        for depth, name in enumerate(around):
            there = inner.get(name)
            if isinstance(there, str) and depth == 0 and name in SHORT_FORMS:
                there = {SHORT_FORMS[name]: there}
            inner[name] = dict(there) if isinstance(there, Mapping) else {}
            inner = inner[name]
        inner[last] = _copied(value)


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copied(inner) for key, inner in value.items()}
    return [_copied(inner) for inner in value] if isinstance(value, list) else value


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings as dotted keys, so that a later value replaces one key and not all beside it."""
    for key, value in values.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, Mapping) and value and dotted in NESTED:
            yield from flat(value, f"{dotted}.")
        else:
            yield dotted, value


NESTED = ("train", "data", "generation", "retention", "curve", "model")
"""Sections of a spec whose keys may be fixed one by one."""
