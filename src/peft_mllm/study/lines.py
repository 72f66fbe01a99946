"""JSON as dataclasses, checked by pydantic: what does not fit is refused with file, line and field."""

from __future__ import annotations

import json
from collections.abc import Hashable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

from peft_mllm.errors import DataError

Kind = TypeVar("Kind")


def read_objects(file: Path, kind: type[Kind]) -> list[Kind]:
    """The objects of a file of JSON lines; a last line without an end is no line.

    Raises:
        DataError: a line is not JSON, or does not fit.
    """
    lines = file.read_bytes().split(b"\n")[:-1]
    try:
        # one call for all is many times faster than one for each
        found: list[Kind] = _adapter(_list_of(kind)).validate_json(b"[" + b",".join(lines) + b"]")
        if len(found) == len(lines):
            return found
    except ValidationError:
        pass  # which line it is, is found one by one
    return [_object(kind, line, f"{file}:{number}") for number, line in enumerate(lines, start=1)]


def checked(kind: type[Kind], value: Any, place: Path | str) -> Kind:
    """Plain data as a dataclass.

    Raises:
        DataError: it does not fit; begins with the place.
    """
    try:
        return cast(Kind, _adapter(cast(Hashable, kind)).validate_python(value))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{place}: {where}: {first['msg']}.") from error


def _object(kind: type[Kind], line: bytes, place: str) -> Kind:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise DataError(f"{place}: is not JSON ({error})") from error
    return checked(kind, value, place)


@cache  # making one takes longer than reading a run
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _list_of(kind: type[Kind]) -> Any:
    return list[kind]  # type: ignore[valid-type]
