"""JSON read strictly: UTF-8, no key twice, no NaN; what is wrong is said with its place."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from typing import Any, NoReturn

from peft_mllm.data.problems import BadDataError, problem, refuse


class _DuplicateKeyError(ValueError):
    pass


def read_object(raw: bytes) -> dict[str, Any]:
    """A record as a JSON object.

    Raises:
        BadDataError: it is no object, or not strictly JSON.
    """
    try:
        text = raw.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant)
        if b"\\u" in raw:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        line, column = _place(raw, error.start)
        bad = problem("not-utf8", column=column, byte=f"0x{raw[error.start]:02x}")
        raise BadDataError([replace(bad, line=line)]) from None
    except UnicodeEncodeError as error:  # JSON can spell half of a character; no tokenizer can hold it
        raise refuse("bad-unicode", what=f"\\u{ord(error.object[error.start]):04x}") from None
    except json.JSONDecodeError as error:
        bad = problem("json-broken", column=error.colno, why=error.msg)
        raise BadDataError([replace(bad, line=error.lineno - 1)]) from None
    except _DuplicateKeyError as error:
        raise refuse("duplicate-key", key=error) from None
    except RecursionError:
        raise refuse("json-broken", column=1, why="it is nested too deeply") from None
    except ValueError as error:  # NaN, or a number of thousands of digits
        raise refuse("json-broken", column=1, why=error) from None
    if not isinstance(value, dict):
        raise refuse("not-an-object", what=kind_of(value))
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise _DuplicateKeyError(Counter(key for key, _ in pairs).most_common(1)[0][0])
    return made


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _place(raw: bytes, at: int) -> tuple[int, int]:
    """Lines below the first, and the column from 1, of a position."""
    return raw.count(b"\n", 0, at), at - raw.rfind(b"\n", 0, at)


_KINDS = {type(None): "missing", bool: "true or false", int: "a number", float: "a number", dict: "an object"}


def kind_of(value: Any) -> str:
    """What a JSON value is, in words."""
    if isinstance(value, str):
        return "text" if value.strip() else "empty"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    return _KINDS.get(type(value), f"a {type(value).__name__}")
