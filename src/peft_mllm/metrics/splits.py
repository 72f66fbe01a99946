"""Which questions of an official release a file of predictions answers: its split, or those of a question file."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from peft_mllm.metrics.reading import ID_KEYS, read


def beside(paths: Sequence[Path], *names: str, of: str) -> list[Path]:
    """The files given, and those of some names that lie beside the one of a release's main name.

    A folder stands for that main file in it.
    """
    found = [path / of if path.is_dir() else path for path in paths]
    for path in list(found):
        if path.name == of:
            found += [path.with_name(name) for name in names if path.with_name(name).is_file()]
    return list(dict.fromkeys(found))


def smallest_split(keys: Collection[str], splits: Mapping[str, Sequence[str]]) -> set[str]:
    """The ids of the smallest split that has all keys; else of all splits that have one of them, or of all."""
    keys = set(keys)
    whole = [set(ids) for ids in splits.values() if keys <= set(ids)]
    if whole:
        return min(whole, key=len)
    touched = [set(ids) for ids in splits.values() if keys & set(ids)]
    return set().union(*touched) if touched else set().union(*map(set, splits.values()))


def asked_ids(paths: Sequence[Path]) -> set[str]:
    """The ids of question files: LLaVA's JSON or JSON lines, or a VQA question file."""
    return {row.key(ID_KEYS) for path in paths for row in read(path).rows("questions", "data")}
