"""What is on the shelves, as data: summaries, and options with type, default and meaning. Imports no torch."""

from __future__ import annotations

import ast
import inspect
import textwrap
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from peft_mllm.errors import SpecError
from peft_mllm.methods import METHODS
from peft_mllm.metrics import METRICS
from peft_mllm.models import MODELS
from peft_mllm.shelf import Shelf, did_you_mean
from peft_mllm.tasks import TASKS

SHELVES: dict[str, Shelf[Any]] = {"methods": METHODS, "models": MODELS, "tasks": TASKS, "metrics": METRICS}


def shelf_of(kind: str) -> Shelf[Any]:
    """The shelf of a kind, such as `methods`."""
    if kind not in SHELVES:
        raise SpecError(f"There is no list of '{kind}'. {did_you_mean(kind, list(SHELVES))}")
    return SHELVES[kind]


def describe(shelf: Shelf[Any], name: str) -> dict[str, Any]:
    """Summary, further facts, and options of one thing."""
    described: dict[str, Any] = {"summary": shelf.summary(name)}
    options = getattr(shelf[name], "Options", None)
    described["options"] = options_of(options) if options else []
    rate = getattr(shelf[name], "learning_rate", None)
    if rate is not None:
        described["learning_rate"] = rate
    return described


def options_of(model: type[BaseModel]) -> list[dict[str, str]]:
    """Name, type, default and meaning of each option; the meaning is the docstring under the field."""
    meanings = _docstrings(model)
    return [
        {
            "name": name,
            "type": type_in_words(field.annotation),
            "default": "required" if field.is_required() else str(field.get_default(call_default_factory=True)),
            "meaning": meanings.get(name) or field.description or "",
        }
        for name, field in model.model_fields.items()
    ]


def type_in_words(annotation: Any) -> str:
    """A type as a person writes it: `a | b | none`, `number`."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(map(str, inner))
    if origin in (Union, UnionType):
        return " | ".join(type_in_words(each) for each in inner)
    if origin is Annotated:
        return type_in_words(inner[0])
    if origin is tuple:
        return f"list of {type_in_words(inner[0])}"
    names = {float: "number", int: "whole number", bool: "true | false", str: "text", Path: "path", NoneType: "none"}
    return names.get(origin or annotation, "mapping")


def _docstrings(model: type[BaseModel]) -> dict[str, str]:
    """The string under each field, of the class and those it derives from."""
    found: dict[str, str] = {}
    for cls in reversed([each for each in model.__mro__ if issubclass(each, BaseModel) and each is not BaseModel]):
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
        assert isinstance(node, ast.ClassDef)
        for field, after in zip(node.body, node.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr):
                name, value = field.target, after.value
                if isinstance(name, ast.Name) and isinstance(value, ast.Constant):
                    found[name.id] = " ".join(str(value.value).split())
    return found
