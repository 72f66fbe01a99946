"""Data for the page's script: compact, and nothing in it can end the element it stands in."""

from __future__ import annotations

import json
from typing import Any

from markupsafe import Markup

_ESCAPES = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"})


class Strings:
    """Texts that are said often, each kept once and called by its number."""

    def __init__(self) -> None:
        self._places: dict[str, int] = {}

    def __call__(self, text: str) -> int:
        """The number of a text."""
        return self._places.setdefault(text, len(self._places))

    def all(self) -> list[str]:
        """By number."""
        return list(self._places)


def embedded(value: Any) -> Markup:
    """JSON to stand inside a script element that is data."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    text = text.encode("utf-8", "backslashreplace").decode()
    return Markup(text.translate(_ESCAPES))
