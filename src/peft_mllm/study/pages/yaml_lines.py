"""A spec as lines of YAML, thousands of times faster than a general writer, so that each run's can be in the page."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

_PLAIN = re.compile(r"[A-Za-z][\w./-]*(?: [\w./-]+)*")
_TAKEN = frozenset({"true", "false", "null", "yes", "no", "on", "off", "y", "n", "nan", "inf"})
"""Words that YAML reads as something else than text."""


def yaml_lines(value: Mapping[str, Any], *, depth: int = 0) -> Iterator[str]:
    """Mappings in lines, and lists of mappings; all else in YAML's form for within a line."""
    indent = "  " * depth
    for key, item in value.items():
        name = _text(str(key))
        if isinstance(item, Mapping) and item:
            yield f"{indent}{name}:"
            yield from yaml_lines(item, depth=depth + 1)
        elif isinstance(item, (list, tuple)) and item and all(isinstance(each, Mapping) and each for each in item):
            yield f"{indent}{name}:"
            yield from _items(item, depth)
        else:
            yield f"{indent}{name}: {_scalar(item)}"


def _items(items: list[Mapping[str, Any]] | tuple[Mapping[str, Any], ...], depth: int) -> Iterator[str]:
    indent = "  " * depth
    for each in items:
        for place, line in enumerate(yaml_lines(each, depth=depth + 1)):
            yield f"{indent}- {line[2 * depth + 2 :]}" if place == 0 else line


def _scalar(value: Any) -> str:
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, float):
        # YAML 1.1 reads 1e-08 as text: it wants a point before the exponent.
        text = repr(value)
        return re.sub(r"^(-?\d+)e", r"\1.0e", text)
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_text(str(key))}: {_scalar(item)}' for key, item in value.items())}}}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_scalar, value))}]"
    return json.dumps(value, default=str)


@lru_cache(maxsize=4096)
def _text(value: str) -> str:
    plain = _PLAIN.fullmatch(value) and value.lower() not in _TAKEN
    return value if plain else f'"{"".join(map(_sign, value))}"'


def _sign(sign: str) -> str:
    """As it stands between double quotes."""
    if sign in '"\\':
        return f"\\{sign}"
    return sign if sign.isprintable() else f"\\U{ord(sign):08X}"
