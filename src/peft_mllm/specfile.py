"""Reading a spec from YAML and the command line, with errors that name file, line and key.

spec = load_spec("run.yaml", ["train.learning_rate=1e-4", "method.rank=16"])
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from peft_mllm.errors import SpecError
from peft_mllm.methods import METHODS
from peft_mllm.metrics import no_metric
from peft_mllm.models import MODELS
from peft_mllm.shelf import Shelf, did_you_mean
from peft_mllm.spec import NamedSpec, Spec
from peft_mllm.tasks import TASKS

Key = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain scalars: `1e-4` is a number, and `no` and `on` are words."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+)", "-+.0123456789"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


class _Document:
    """A YAML text as plain data, and where each key was said."""

    def __init__(self, text: str, name: str):
        self.name = name
        self._lines: dict[Key, str] = {}
        self.data = self.read(text, ()) or {}
        if not isinstance(self.data, dict):
            raise SpecError(f"{name}: a spec is a mapping of keys to values.")

    def place(self, key: Key) -> str:
        """`file:line` of the key, or of the nearest key around it."""
        for length in range(len(key), -1, -1):
            if key[:length] in self._lines:
                return self._lines[key[:length]]
        return self.name

    def override(self, assignment: str) -> None:
        """Apply `train.learning_rate=1e-4`; the value is YAML."""
        path, found, text = assignment.partition("=")
        keys = path.split(".")
        if not found or not all(key.isidentifier() for key in keys):
            raise SpecError(f"{_said(assignment)}: this is no override; write key=value, such as train.max_steps=100.")
        inner = self.data
        for depth in range(1, len(keys)):
            inner = self._mapping_at(inner, keys[:depth], assignment)
        origin, self.name = self.name, _said(assignment)
        inner[keys[-1]] = self.read(text, tuple(keys))
        self._lines[tuple(keys)] = self.name
        self.name = origin

    def _mapping_at(self, parent: dict[str, Any], path: Sequence[str], assignment: str) -> dict[str, Any]:
        """The mapping at a path, made where there is none."""
        key, value = path[-1], parent.get(path[-1])
        if value is None:
            value = {}
        elif isinstance(value, str) and len(path) == 1 and key in SHORT_FORMS:
            value = {SHORT_FORMS[key]: value}
        if not isinstance(value, dict):
            raise SpecError(f"{_said(assignment)}: {'.'.join(path)} is no mapping, so nothing can be set in it.")
        parent[key] = value
        return value

    def read(self, text: str, key: Key) -> Any:
        """A YAML text as plain data; `key` is where it belongs."""
        try:
            node = yaml.compose(text, Loader=_Loader)
            return self._build(node, key, ()) if node else None
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            raise SpecError(f"{self._at(mark)}: this is not YAML: {error.problem or error.context}.") from error
        except yaml.YAMLError as error:
            raise SpecError(f"{self.name}: this is not YAML: {error}.") from error

    def _build(self, node: yaml.Node, key: Key, around: tuple[yaml.Node, ...]) -> Any:
        """A node as plain data; `around` are the nodes that it lies in."""
        if node in around:
            raise SpecError(f"{self._at(node.start_mark)}: an alias stands inside what it names.")
        self._lines[key] = self._at(node.start_mark)
        if isinstance(node, yaml.SequenceNode):
            return [self._build(item, (*key, i), (*around, node)) for i, item in enumerate(node.value)]
        if not isinstance(node, yaml.MappingNode):
            return _Loader("").construct_object(node)
        mapping: dict[str, Any] = {}
        for name_node, value in node.value:
            name, place = str(name_node.value), self._at(name_node.start_mark)
            if name in mapping:
                raise SpecError(f"{place}: '{name}' is said twice (first at {self._lines[(*key, name)]}).")
            mapping[name] = self._build(value, (*key, name), (*around, node))
            self._lines[(*key, name)] = place
        return mapping

    def _at(self, mark: yaml.Mark | None) -> str:
        """A place in a file; what came from the command line has no lines."""
        return self.name if mark is None or self.name.startswith(COMMAND_LINE) else f"{self.name}:{mark.line + 1}"


def _said(words: str) -> str:
    """The place of what was not said in a file."""
    return f"{COMMAND_LINE} ({words})"


COMMAND_LINE = "command line"
# `model: DIR` stands for its path, `method: lora` for its name; an override may go inside either
SHORT_FORMS = {"model": "path", "method": "name", "task": "name"}


def load_spec(path: str | Path, overrides: Sequence[str] = ()) -> Spec:
    """Read a spec file and apply overrides.

    Raises:
        SpecError: everything that is wrong, each with file, line and key.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SpecError(f"There is no spec file {file}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{file} cannot be read: {error}.") from error
    return _validate(_Document(text, str(file)), overrides)


def parse_value(text: str, place: str) -> Any:
    """A value that was written as YAML outside a file, such as `--task '{name: custom, test: my.jsonl}'`."""
    return _Document("", _said(f"{place} {text}")).read(text, ())


def parse_spec(data: Mapping[str, Any] | Spec, overrides: Sequence[str] = ()) -> Spec:
    """A spec from Python data, checked like a file's; for notebooks."""
    if isinstance(data, Spec):
        data = data.model_dump(mode="json")
    try:
        text = json.dumps(data, default=os.fspath)
    except (TypeError, ValueError) as error:
        raise SpecError(f"The spec holds something that YAML cannot say: {error}.") from error
    return _validate(_Document(text, "spec"), overrides)


def _validate(document: _Document, overrides: Sequence[str]) -> Spec:
    for assignment in overrides:
        document.override(assignment)
    try:
        # JSON mode, strict: a list may be a tuple, but "1e-4" in quotes is not a number
        spec = Spec.model_validate_json(json.dumps(document.data), strict=True)
    except ValidationError as error:
        raise SpecError("\n".join(_sentences(error, Spec, document, ()))) from None
    if spec.model.family is not None and spec.model.family not in MODELS:
        known = did_you_mean(spec.model.family, list(MODELS))
        place = document.place(("model", "family"))
        raise SpecError(f"{place}: there is no model family '{spec.model.family}'. {known}")
    problems = [problem for key, named, shelf in _named(spec) for problem in _problems(key, named, shelf, document)]
    if problems:
        raise SpecError("\n".join(problems))
    return spec.model_copy(
        update={
            "method": _complete(METHODS, spec.method),
            "task": _complete(TASKS, spec.task),
            "evaluate": tuple(_complete(TASKS, task) for task in spec.evaluate),
        }
    )


def _complete(shelf: Shelf[Any], named: NamedSpec) -> NamedSpec:
    """With every option said, so that options given as their defaults are the same run."""
    return NamedSpec(name=named.name, options=validated_options(shelf, named).model_dump(mode="json"))


def _named(spec: Spec) -> Iterator[tuple[Key, NamedSpec, Shelf[Any]]]:
    yield ("method",), spec.method, METHODS
    yield ("task",), spec.task, TASKS
    for i, task in enumerate(spec.evaluate):
        yield ("evaluate", i), task, TASKS


def _problems(key: Key, named: NamedSpec, shelf: Shelf[Any], document: _Document) -> list[str]:
    """What is wrong with a name and its options, in sentences."""
    if named.name not in shelf:
        known = did_you_mean(named.name, list(shelf))
        return [f"{document.place((*key, 'name'))}: there is no {shelf.kind} '{named.name}'. {known}"]
    try:
        options = validated_options(shelf, named)
    except ValidationError as error:
        return list(_sentences(error, shelf[named.name].Options, document, key))
    metric = getattr(options, "metric", None)  # some tasks let the user choose
    problem = no_metric(metric) if metric is not None else None
    if problem:
        return [f"{document.place((*key, 'metric'))}: {problem[0].lower()}{problem[1:]}"]
    return []


def validated_options(shelf: Shelf[Any], named: NamedSpec) -> Any:
    """The options of a named thing, as its class's typed `Options`."""
    return shelf[named.name].Options.model_validate_json(json.dumps(dict(named.options)), strict=True)


def build(shelf: Shelf[Any], named: NamedSpec) -> Any:
    """The instance that a spec's name and options stand for."""
    try:
        return shelf[named.name](validated_options(shelf, named))
    except ValidationError as error:
        document = _Document("", f"{shelf.kind} {named.name}")
        raise SpecError("\n".join(_sentences(error, shelf[named.name].Options, document, ()))) from None


def _sentences(error: ValidationError, model: type[BaseModel], document: _Document, root: Key) -> Iterator[str]:
    for problem in error.errors():
        key = (*root, *(part for part in problem["loc"] if part != "options"))
        dotted = ".".join(map(str, key)) or "the spec"
        if problem["type"] == "extra_forbidden":
            known = _known_keys(model, problem["loc"][:-1])
            yield f"{document.place(key)}: unknown key '{dotted}'. {did_you_mean(str(key[-1]), known)}"
        elif problem["type"] == "missing":
            yield f"{document.place(key)}: '{dotted}' is missing."
        elif problem["type"] == "value_error":  # one of ours, which says it all
            yield f"{document.place(key)}: {dotted}: {problem['msg'].removeprefix('Value error, ')}."
        else:
            yield f"{document.place(key)}: {dotted}: {problem['msg']}, not {problem['input']!r}."


def _known_keys(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    for part in loc:
        field = model.model_fields.get(str(part))
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            return []
        model = field.annotation
    return list(model.model_fields)
