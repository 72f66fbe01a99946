"""`peft-mllm data prepare`: a task's data set, from its release to the folder that the task's `root` takes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from peft_mllm.data.prepare.release import Release
from peft_mllm.data.prepare.source import Source
from peft_mllm.data.prepare.tables import Tables, is_tables
from peft_mllm.data.prepare.work import Wish, prepare
from peft_mllm.errors import SpecError
from peft_mllm.interrupt import stop_requests
from peft_mllm.screen import Screen
from peft_mllm.shelf import did_you_mean
from peft_mllm.tasks import SPLITS, TASKS, Split, Task


def prepare_task(
    task: str,
    source: str | Path | None,
    *,
    output: str | Path = "datasets",
    hub: bool = False,
    splits: Sequence[str] = (),
    limit: int | None = None,
    partial: bool = False,
    prompt: str | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Prepare a task's data set; the same call goes on where an earlier one stopped.

    Args:
        task: a name on the tasks shelf.
        source: the folder with the release; may be None with `hub`.
        output: the folder of all data sets; the task's own goes into it.
        hub: read through the `datasets` library: `source` as a saved data set or parquet files, or the hub.
        splits: which of train, validation, test; all that there are if empty.
        limit: only the first questions of each split.
        partial: go on with what is there where the release is not whole.
        prompt: of the conversations that are written for other programs; the task's default if left out.
        quiet: say nothing.

    Returns:
        the manifest, with `folder`.

    Raises:
        SpecError: the task has no release, or a name is unknown.
        DataError: the release is not what it must be.
    """
    cls, release = preparable(task)
    for name in splits:
        if name not in release.splits:
            raise SpecError(f"{release.title} has no split '{name}'. {did_you_mean(name, list(release.splits))}")
    wanted: tuple[Split, ...] = tuple(each for each in SPLITS if each in (splits or release.splits))
    wanted = tuple(each for each in wanted if each in release.splits)
    words = prompt or next(iter(cls.prompts))
    if words not in cls.prompts:
        raise SpecError(f"{release.title} has no prompt '{words}'. {did_you_mean(words, list(cls.prompts))}")
    folder = Path(output) / release.folder
    # the draw is a task's: what is prepared is whole
    sizes = {"train_size": None, "test_size": None}
    asker = cls(cls.Options.model_validate({"root": folder, "prompt": words, **sizes}))
    wish = Wish(
        task=task,
        release=release,
        folder=folder,
        splits=wanted,
        limit=limit,
        partial=partial,
        prompt=words,
        record=asker.record_of,
    )
    with ExitStack() as stack:
        stop = stack.enter_context(stop_requests())
        manifest = prepare(wish, _source(release, source, hub=hub), screen=Screen(quiet=quiet), stop=stop)
    return {"folder": str(folder), **manifest}


def preparable(task: str) -> tuple[type[Task], Release]:
    """A task whose data set can be prepared.

    Raises:
        SpecError: it has none; names those that have.
    """
    if task not in TASKS:
        raise SpecError(f"There is no task '{task}'. {did_you_mean(task, released())}")
    cls = TASKS[task]
    if cls.release is None:
        raise SpecError(f"The task '{task}' has no release to prepare. Those that have: {', '.join(released())}.")
    return cls, cls.release


def released() -> list[str]:
    """The tasks whose data sets can be prepared."""
    return [name for name in TASKS if TASKS[name].release is not None]


def catalogue() -> list[dict[str, Any]]:
    """Each of them: where to get it, how large it is, its licence."""
    found = []
    for name in released():
        cls, release = preparable(name)
        found.append(
            {
                "task": name,
                "title": release.title,
                "paper": release.paper,
                "home": release.home,
                "licence": release.licence,
                "size": release.size,
                "splits": {
                    split: {"official": part.official, "number": part.questions, "unit": part.unit, "note": part.note}
                    for split, part in release.splits.items()
                },
                "downloads": [{"file": each.file, "url": each.url} for each in release.downloads],
                "hub": release.hub.path if release.hub else None,
                "folder": release.folder,
                "metric": cls.metric,
                "prompts": list(cls.prompts),
                "seen": dict(release.seen),
            }
        )
    return found


def _source(release: Release, source: str | Path | None, *, hub: bool) -> Source | Tables:
    root = None if source is None else Path(source)
    if hub or (root is not None and root.is_dir() and is_tables(root)):
        return Tables(release, root)
    if root is None:
        raise SpecError(f"Say where {release.title} lies: --source FOLDER. {release.where()}")
    return Source(root, release)
