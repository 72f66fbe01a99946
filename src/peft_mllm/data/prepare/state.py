"""What a folder says before and after it is prepared: begun with which settings, finished, or in need of mending."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft_mllm.data.prepare.images import Carrier
from peft_mllm.data.prepared import MANIFEST, read_manifest
from peft_mllm.errors import DataError
from peft_mllm.files import file_digest, read_json, write_json
from peft_mllm.screen import Screen

STATE = "preparing.json"
"""Is there while the work is not finished: what was asked, and the digests of the files that were read."""


def finished(
    folder: Path, task: str, settings: Mapping[str, Any], identity: Mapping[str, Any], screen: Screen
) -> dict[str, Any] | None:
    """The manifest of a folder that is prepared already; None where something must be brought back.

    Raises:
        DataError: it was prepared with other settings.
    """
    manifest = read_manifest(folder, task)
    before = {key: manifest["asked"].get(key) for key in settings}
    if before != settings:
        was, now = _difference(before, settings)
        raise DataError(f"{folder}: was prepared with {was}, and {now} is asked for. {_OTHERWISE}")
    missing = missing_files(folder, manifest)
    if not missing:
        screen.note(f"{folder} is prepared already. Delete it to prepare it again.")
        return manifest
    screen.note(f"{folder}: {len(missing)} files are gone or changed ({missing[0]}); they are brought back.")
    write_json(folder / STATE, {"asked": {**settings, "source": identity}, "files": {}}, what="the state")
    (folder / MANIFEST).unlink()
    return None


def missing_files(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """What a prepared folder had when it was finished, and has no more; images by their size."""
    gone = []
    for official, split in manifest["splits"].items():
        for name, known in split["files"].items():
            path = folder / name
            if not path.is_file() or file_digest(path) != known["sha256"]:
                gone.append(name)
        carrier = Carrier(folder, official)
        gone += [f"{official}/{name}" for name in carrier.entered().keys() - carrier.placed().keys()]
    return gone


def begin(folder: Path, asked: Mapping[str, Any]) -> dict[str, Any]:
    """What an earlier call left, if it was about the same; else the beginning, which is written.

    Raises:
        DataError: the folder was begun with other settings, or holds something else.
    """
    path = folder / STATE
    state: dict[str, Any] = {"asked": dict(asked), "files": {}}
    if path.is_file():
        try:
            state = read_json(path)
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: {error}. Delete {folder}, and begin again.") from None
        # images stay good whatever else is asked for; those of another source may be other images
        same = {key: asked[key] for key in ("task", "source")}
        if {key: state["asked"].get(key) for key in same} != same:
            was, now = _difference(state["asked"], same)
            raise DataError(f"{folder}: was begun with {was}, and {now} is asked for. {_OTHERWISE}")
        state["asked"] = dict(asked)
        return state
    others = sorted(each.name for each in folder.iterdir() if not each.name.startswith("."))
    if others:
        raise DataError(
            f"{folder}: holds {', '.join(others[:5])}, and was not begun by this command. Give another --output."
        )
    write_json(path, state, what="the state")
    return state


_OTHERWISE = "Delete it, or give another --output."


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, str]:
    """The settings that differ, in words: as they were, and as they are."""
    keys = [key for key in now if before.get(key) != now[key]]
    was, wanted = (", ".join(f"{key} {each.get(key)}" for key in keys) for each in (before, now))
    return was, wanted
