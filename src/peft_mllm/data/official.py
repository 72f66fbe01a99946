"""Reading the files that a data set's authors released: JSON with problems, and images in folders.

Everything that is wrong is found when a split is opened, all of it at once, and said with file, place and
remedy: nobody wants to learn of a missing image at the 4,000th training step.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from peft_mllm.errors import DataError

Checked = TypeVar("Checked", bound=BaseModel)

SHOWN = 5
"""How many findings of one kind a message lists before it counts the rest."""

_SAFE_NAME = re.compile(r"\w[\w.-]*")


def read_object(path: Path, *, remedy: str) -> dict[str, Any]:
    """Read a JSON file whose top level is an object.

    Args:
        path: the file.
        remedy: what to do when it is not there: one sentence.

    Raises:
        DataError: it is missing, not UTF-8 JSON (with line and column), or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). {remedy}") from error
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise DataError(f"{path}, {place}: not valid JSON ({error.msg}). Download it again.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, byte {error.start}: not UTF-8 text. Download it again.") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: holds a {type(value).__name__} not an object {{...}}. {remedy}")
    return value


def read_split(file: Path, key: str, *, known: Container[str], remedy: str) -> list[str]:
    """Read one list of problem ids from a file of splits.

    Args:
        file: JSON, `{"train": [id, ...], ...}`.
        key: the split's name there.
        known: the ids that there are problems for.
        remedy: what to do when something is missing: one sentence.

    Raises:
        DataError: no such split, an id twice, an id without a problem, or an id that is no folder's name.
    """
    return pick_split(read_object(file, remedy=remedy), key, known=known, file=file, remedy=remedy)


def pick_split(splits: Mapping[str, Any], key: str, *, known: Container[str], file: Path, remedy: str) -> list[str]:
    """Likewise of splits that were read already; `file` is what to call them.

    Raises:
        DataError: as `read_split`.
    """
    ids = splits.get(key)
    if not isinstance(ids, list):
        raise DataError(f"{file}: no list '{key}' among {', '.join(splits) or 'nothing'}. {remedy}")
    ids = [str(identity) for identity in ids]
    twice = [identity for identity, count in Counter(ids).items() if count > 1]
    refuse(twice, file, f"ids stand more than once in '{key}'", remedy=remedy)
    lost = [identity for identity in ids if identity not in known]
    refuse(lost, file, f"ids of '{key}' have no problem", remedy=remedy)
    unsafe = [identity for identity in ids if not is_safe_name(identity)]
    refuse(unsafe, file, f"ids of '{key}' cannot name a folder", remedy=remedy)
    return ids


def check_each(values: Iterable[tuple[str, Any]], model: type[Checked], *, file: Path) -> dict[str, Checked]:
    """Check each `(id, object)` against a pydantic model.

    Raises:
        DataError: names the ids that do not fit, each with its field and reason.
    """
    checked, findings = {}, []
    for key, value in values:
        try:
            checked[key] = model.model_validate(value)
        except ValidationError as error:
            findings.append(f"'{key}': {_first_reason(error)}")
    refuse(findings, file, "problems cannot be used", remedy="Correct or remove them.")
    return checked


def check_images(images: Sequence[Path], *, root: Path, remedy: str) -> None:
    """Require that every image is a file.

    Raises:
        DataError: names the missing ones, relative to the root, and how many there are.
    """
    missing = [str(path.relative_to(root)) for path in images if not path.is_file()]
    refuse(missing, root, f"of {len(images)} images are missing", remedy=remedy)


def refuse(findings: Sequence[str], where: Path, what: str, *, remedy: str) -> None:
    """Raise one `DataError` for all findings, if there are any.

    Args:
        findings: one line each.
        where: the file or folder that they are in.
        what: what they have in common; their number goes before it.
        remedy: one sentence.
    """
    if not findings:
        return
    rest = len(findings) - SHOWN
    lines = [f"  {finding}" for finding in findings[:SHOWN]] + ([f"  and {rest} more"] if rest > 0 else [])
    raise DataError("\n".join([f"{where}: {len(findings)} {what}:", *lines, remedy]))


def check_index(answer: int, choices: Sequence[str]) -> None:
    """Require that an answer is the index of a choice.

    Raises:
        ValueError: it is not; pydantic turns it into a finding.
    """
    if not 0 <= answer < len(choices):
        raise ValueError(f"answer {answer} is not the index of one of its {len(choices)} choices")


def is_safe_name(name: str) -> bool:
    """Whether a name from a data file stays in the folder it is looked up in: no separators, no `..`."""
    return bool(_SAFE_NAME.fullmatch(name))


def _first_reason(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in first["loc"])
    reason = first["msg"].removeprefix("Value error, ")
    return f"{field}: {reason}" if field else reason
