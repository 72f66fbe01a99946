"""Reading the files that predictions and references come in: JSON or JSON lines, checked entry by entry.

What is wrong is one `DataError` that names the file and the line or entry. Extra keys are nobody's business.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from peft_mllm.errors import DataError
from peft_mllm.metrics.base import Prediction

ID_KEYS = ("question_id", "questionId", "id", "qid", "pid", "image_id", "image")
"""What the id of an entry is called, the most specific first."""

TEXT_KEYS = ("prediction", "pred_answer", "model_answer", "answer", "text", "caption", "response", "output")
"""What an answer is called. `text` beside `prompt` is LLaVA's and comes first."""

_CUT = "Is the file cut off? Copy or download it again."


@dataclass(frozen=True)
class Row:
    """One object of a file, and where it stands."""

    value: Mapping[str, Any]
    place: str

    def fail(self, what: str) -> NoReturn:
        """Raise the error that names this place."""
        raise DataError(f"{self.place}: {what}")

    def find(self, keys: Sequence[str], what: str) -> Any:
        """The value of the first of some keys that is there."""
        there = next((key for key in keys if key in self.value), None)
        if there is None:
            self.fail(f"has no {what}: none of the keys {', '.join(keys)}. It has {', '.join(self.value) or 'none'}.")
        return self.value[there]

    def text(self, keys: Sequence[str], what: str = "answer") -> str:
        """A string under one of some keys."""
        found = self.find(keys, what)
        if not isinstance(found, str):
            self.fail(f"the {what} is {found!r}, {in_words(found)}, and must be text.")
        return found

    def key(self, keys: Sequence[str] = ID_KEYS) -> str:
        """The id, as text: a file may write it as a number."""
        found = self.find(keys, "id")
        if isinstance(found, bool) or not isinstance(found, (str, int)) or found == "":
            self.fail(f"the id is {found!r}, {in_words(found)}, and must be a whole number or text.")
        return str(found)

    def get(self, key: str, kind: type | tuple[type, ...], default: Any) -> Any:
        """An optional value of a type; None counts as absent."""
        found = self.value.get(key)
        if found is None:
            return default
        if not isinstance(found, kind) or isinstance(found, bool):
            self.fail(f"'{key}' is {found!r}, {in_words(found)}.")
        return found


@dataclass(frozen=True)
class Document:
    """A file's content.

    Attributes:
        path: the file.
        value: a JSON value; of JSON lines, the list of them.
        lines: the line of each element of JSON lines; None of one JSON value.
    """

    path: Path
    value: Any
    lines: tuple[int, ...] | None = None

    def rows(self, *containers: str) -> list[Row]:
        """The objects of a list, or of the list that an object holds under one of some names.

        Raises:
            DataError: there is no such list, it is empty, or holds something else than objects.
        """
        found = self.value
        if isinstance(found, dict):
            name = next((name for name in containers if isinstance(found.get(name), list)), None)
            if name is None and any(key in found for key in (*ID_KEYS, *TEXT_KEYS, "question", "prompt")):
                return [Row(found, f"{self.path}:1")]  # JSON lines of one line
            if name is None:
                expected = " or ".join(["a list", *(f"an object with a list '{name}'" for name in containers)])
                held = ", ".join(list(found)[:8]) or "nothing"
                raise DataError(f"{self.path}: expected {expected}, found an object with {held}.")
            found = found[name]
        if not isinstance(found, list):
            raise DataError(f"{self.path}: expected a list of objects, found {in_words(found)}.")
        if not found:
            raise DataError(f"{self.path}: the list is empty; there is nothing to score.")
        return [self._row(number, value) for number, value in enumerate(found)]

    def mapping(self, what: str) -> dict[str, Any]:
        """The object that the file is.

        Raises:
            DataError: it is none, or empty.
        """
        if not isinstance(self.value, dict):
            raise DataError(f"{self.path}: expected an object {{{what}}}, found {in_words(self.value)}.")
        if not self.value:
            raise DataError(f"{self.path}: the object is empty; there is nothing to score.")
        return self.value

    def has(self, name: str, kind: type) -> bool:
        """Whether the file is an object with something of a type under a name."""
        return isinstance(self.value, dict) and isinstance(self.value.get(name), kind)

    def _row(self, number: int, value: Any) -> Row:
        place = f"{self.path}:{self.lines[number]}" if self.lines else f"{self.path}, entry {number + 1}"
        if not isinstance(value, dict):
            raise DataError(f"{place}: expected an object, found {in_words(value)}.")
        return Row(value, place)


def read(path: Path) -> Document:
    """Read a file of JSON or JSON lines; which of them is seen from its content, not from its name.

    Raises:
        DataError: it is absent, empty, not UTF-8, not JSON, or has a key twice in one object.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, byte {error.start}: not UTF-8 text. {_CUT}") from error
    if not text.strip():
        raise DataError(f"{path}: the file is empty.")
    try:
        return Document(path, _parse(text, path))
    except json.JSONDecodeError as error:
        if _is_lines(text):
            return _read_lines(path, text)
        if error.msg == "Extra data":
            return _read_stream(path, text)
        raise DataError(f"{path}, line {error.lineno}, column {error.colno}: not JSON ({error.msg}). {_CUT}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON that can be read ({error}).") from error


def in_words(value: Any) -> str:
    """A JSON value's type, as a person calls it."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def predictions_of(document: Document, *, containers: Sequence[str] = ("predictions", "results")) -> list[Prediction]:
    """The predictions of a list of `{id, answer}` in any of the names that official files use."""
    return [prediction_of(row) for row in document.rows(*containers)]


def prediction_of(row: Row, *, keys: Sequence[str] = ID_KEYS) -> Prediction:
    """One entry's id and answer."""
    return Prediction(row.key(keys), answer_of(row), row.place)


def answer_of(row: Row) -> str:
    """One entry's answer."""
    return row.text(("text", *TEXT_KEYS) if "prompt" in row.value else TEXT_KEYS)


def image_key(image: Any) -> str:
    """The id in a COCO file name: `COCO_val2014_000000001290.jpg` is 1290; any other text is itself."""
    text = str(image)
    tail = Path(text).stem.rsplit("_", 1)[-1]
    return str(int(tail)) if tail.isdecimal() and (text.startswith("COCO_") or "." in text or len(text) == 12) else text


def one_file(paths: Sequence[Path], option: str) -> Path:
    """The only file of an option that takes one.

    Raises:
        DataError: there are none, or several.
    """
    if len(paths) != 1:
        raise DataError(f"This metric takes one file as {option}, not {len(paths)}.")
    return paths[0]


def _parse(text: str, path: Path) -> Any:
    return json.loads(text, object_pairs_hook=partial(_unique, path=path))


def _unique(pairs: list[tuple[str, Any]], path: Path) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1}) if len(names) < 1000 else _twice(names)
        raise DataError(f"{path}: duplicate keys in one object: {', '.join(twice[:10])}.")
    return value


def _twice(names: Sequence[str]) -> list[str]:
    seen: set[str] = set()
    return [name for name in names if name in seen or seen.add(name)]  # type: ignore[func-returns-value]


def _is_lines(text: str) -> bool:
    """Whether the first line that is not empty is an object of its own."""
    first = next(line for line in text.split("\n") if line.strip())
    try:
        return isinstance(json.loads(first), dict)
    except ValueError:
        return False


def _read_stream(path: Path, text: str) -> Document:
    """Objects one after the other, each over several lines, as POPE publishes some of its captions."""
    decoder = json.JSONDecoder(object_pairs_hook=partial(_unique, path=path))
    values: list[Any] = []
    lines: list[int] = []
    at = number = 0
    while found := re.compile(r"\S").search(text, at):
        number += text.count("\n", at, found.start())
        try:
            value, end = decoder.raw_decode(text, found.start())
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}, line {error.lineno}, column {error.colno}: not JSON ({error.msg}). {_CUT}"
            ) from error
        if not isinstance(value, dict):
            raise DataError(f"{path}, line {number + 1}: not JSON (more than one value that is no object). {_CUT}")
        values.append(value)
        lines.append(number + 1)
        number += text.count("\n", found.start(), end)
        at = end
    return Document(path, values, tuple(lines))


def _read_lines(path: Path, text: str) -> Document:
    values, lines = [], []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            values.append(_parse(line, path))
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{number}: not JSON ({error.msg} at column {error.colno}). {_CUT}") from error
        lines.append(number)
    return Document(path, values, tuple(lines))
