"""To whom a directory belongs: to nobody yet, to the run of one spec, or to a stranger."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from peft_mllm.errors import DiskError, SpecError
from peft_mllm.files import TEMPORARY, canonical_json, json_digest, read_json
from peft_mllm.rundir.lock import LOCK, recorded_holder

SPEC = "spec.json"
START_AGAIN = "Delete it and give the same command again."


def refuse_what_is_not_ours(path: Path, spec: Mapping[str, Any], ignore: Collection[str]) -> None:
    """Raise unless `path` is absent, empty, or a run of this spec. Touches nothing.

    Raises:
        SpecError: it belongs to another spec (lists the keys that differ), or is not a run.
    """
    stored = read_if_there(path / SPEC, read_json)
    if stored is not None and has_work(path):
        _refuse_other_spec(path, stored, spec, ignore)
    elif stored is None and path.is_dir():
        _refuse_stranger(path)


def spec_digest(path: Path) -> str:
    """What ties checkpoints and result to a run, so that another run's copy does not pass for its own."""
    stored = read_if_there(path / SPEC, read_json)
    if stored is None:
        raise DiskError(f"{path} is not a run: it has no {SPEC}.")
    return json_digest(stored)


def read_if_there(path: Path, read: Callable[[Path], Any]) -> Any:
    """What `read` makes of a file; None if there is none.

    Raises:
        DiskError: it is there and cannot be used.
    """
    try:
        return read(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise DiskError(f"{path} cannot be used: {error}. {START_AGAIN}") from error


def has_work(path: Path) -> bool:
    """Whether anything was made that another spec would spoil; an attempt that failed before has nothing."""
    made = (path / "checkpoints", path / "predictions")
    return any(folder.is_dir() and any(folder.iterdir()) for folder in made) or any(
        (path / name).exists() for name in ("result.json", "adapter", "metrics.jsonl")
    )


def _refuse_other_spec(path: Path, stored: Any, spec: Mapping[str, Any], ignore: Collection[str]) -> None:
    there, here = dict(_flat(stored)), dict(_flat(json.loads(canonical_json(spec))))
    differing = [
        f"  {key}: {there.get(key, 'absent')} there, {here.get(key, 'absent')} here"
        for key in sorted(there.keys() | here.keys())
        if there.get(key) != here.get(key) and not _is_below(key, ignore)
    ]
    if differing:
        head, remedy = f"{path} belongs to another spec:", f"Choose another output_dir, or delete {path}."
        raise SpecError("\n".join([head, *differing, remedy]))


def _refuse_stranger(path: Path) -> None:
    strangers = sorted(entry.name for entry in path.iterdir() if _is_strange(entry))
    if strangers:
        raise SpecError(
            f"{path} is not a run: it has no {SPEC}, but {strangers[0]}. "
            "Nothing was changed in it. Choose another output_dir."
        )


def _is_strange(entry: Path) -> bool:
    """Whether it is none of the things that a writer makes before the spec is there."""
    if entry.name == LOCK:
        return not entry.is_file() or (entry.stat().st_size > 0 and recorded_holder(entry) is None)
    return not entry.name.startswith((f"{TEMPORARY}{SPEC}-", f"{TEMPORARY}{LOCK}-"))


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys of nested objects and lists, each with its value as JSON."""
    inner = dict(enumerate(value)) if isinstance(value, list) else value
    if isinstance(inner, dict) and inner:
        for key, item in inner.items():
            yield from _flat(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, json.dumps(value, ensure_ascii=False)


def _is_below(key: str, prefixes: Collection[str]) -> bool:
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)
