"""A YAML text that knows where each key was said, so that an error names file, line and key.

document = read_document("run.yaml", "spec")
document.override("train.learning_rate=1e-4")
spec = validated(document, Spec)
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from peft_mllm.errors import SpecError
from peft_mllm.shelf import did_you_mean

Key = tuple[str | int, ...]
Model = TypeVar("Model", bound=BaseModel)

COMMAND_LINE = "command line"
# `model: DIR` stands for its path, `method: lora` for its name; an override may go inside either
SHORT_FORMS = {"model": "path", "method": "name", "task": "name"}


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


class Document:
    """A YAML text as plain data, and where each key was said."""

    def __init__(self, text: str, name: str, *, what: str = "spec"):
        self.name = name
        self._lines: dict[Key, str] = {}
        self.data = self.read(text, ()) or {}
        if not isinstance(self.data, dict):
            raise SpecError(f"{name}: a {what} is a mapping of keys to values.")

    @classmethod
    def of(cls, data: dict[str, Any], name: str) -> Document:
        """Data that stands in no file; its errors name the key alone."""
        document = cls("", name)
        document.data = data
        return document

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
            raise SpecError(f"{said(assignment)}: this is no override; write key=value, such as train.max_steps=100.")
        inner = self.data
        for depth in range(1, len(keys)):
            inner = self._mapping_at(inner, keys[:depth], assignment)
        origin, self.name = self.name, said(assignment)
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
            raise SpecError(f"{said(assignment)}: {'.'.join(path)} is no mapping, so nothing can be set in it.")
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


def read_document(path: str | Path, what: str) -> Document:
    """Read a YAML file.

    Args:
        path: the file.
        what: what it holds, for the message: "spec", "study".

    Raises:
        SpecError: it is not there, cannot be read, or is not YAML.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SpecError(f"There is no {what} file {file}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{file} cannot be read: {error}.") from error
    return Document(text, str(file), what=what)


def validated(document: Document, model: type[Model]) -> Model:
    """The document as a typed value.

    Raises:
        SpecError: everything that does not fit, each with file, line and key.
    """
    try:
        # JSON mode, strict: a list may be a tuple, but "1e-4" in quotes is not a number
        return model.model_validate_json(json.dumps(document.data), strict=True)
    except ValidationError as error:
        raise SpecError("\n".join(sentences(error, model, document, ()))) from None


def said(words: str) -> str:
    """The place of what was not said in a file."""
    return f"{COMMAND_LINE} ({words})"


def sentences(error: ValidationError, model: type[BaseModel], document: Document, root: Key) -> Iterator[str]:
    """What is wrong, each with file, line and key; `root` is the key that the model's own stand below."""
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
