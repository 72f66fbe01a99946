"""Checkpoints of old in the Hugging Face format: original LLaVA-1.5, ShareGPT4V and Qwen-VL, for plain transformers.

    done = convert("checkpoints/llava-v1.5-7b", "llava-1.5-7b-hf", vision_tower="openai/clip-vit-large-patch14-336")

Tensors keep the types that they are stored in, so nothing is rounded. The directory is written beside its place, is
loaded again and compared, and only then gets its name. The weights are in memory once: what was read is let go before
what was written is loaded, and the two are compared by checksums.
"""

from __future__ import annotations

import errno
import gc
import hashlib
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_mllm.errors import ModelError
from peft_mllm.files import disk_errors, new_directory, read_json, size_in_words
from peft_mllm.loading import load_family, recognise
from peft_mllm.models.base import Loading
from peft_mllm.record import Record, Turn
from peft_mllm.screen import Screen
from peft_mllm.spec import ModelSpec
from peft_mllm.weights import SAFE, SAFE_INDEX, local_directory, weight_files

if TYPE_CHECKING:
    from peft_mllm.models.base import Family

__all__ = ["Converted", "convert"]

# Its tokens are compared, too: spaces, two turns and what is in few vocabularies.
PROBE = Record(
    id="probe",
    turns=(
        Turn("user", "What is it?"),
        Turn("assistant", "  A cat.\n"),
        Turn("user", "Und nun, schöne Größe?"),
        Turn("assistant", "No."),
    ),
)


@dataclass(frozen=True)
class Converted:
    """What a conversion did.

    Attributes:
        source: as it was given.
        directory: what was written.
        read: weight file -> bytes.
        written: file -> bytes.
        tensors: how many the model has.
        parameters: how many numbers they hold.
        notes: what a user should know: the vision tower that was used, and doubts about it.
    """

    source: str
    directory: str
    read: dict[str, int]
    written: dict[str, int]
    tensors: int
    parameters: int
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        """The same as JSON data."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The same for people."""
        return [
            *(f"read     {name}: {size_in_words(size)}" for name, size in self.read.items()),
            *(f"note     {note}" for note in self.notes),
            *(f"written  {name}: {size_in_words(size)}" for name, size in self.written.items()),
            f"{self.directory}: {self.tensors} tensors, {self.parameters:,} numbers; loaded again and found equal",
        ]


def convert(
    source: str,
    directory: str | Path,
    *,
    vision_tower: str | None = None,
    dtype: str = "auto",
    quiet: bool = False,
) -> Converted:
    """Write a checkpoint of an older format as a directory that plain transformers loads.

    Args:
        source: directory or hub id.
        directory: the new one; it may be there, if it is empty.
        vision_tower: directory or hub id of the tower, for a checkpoint that comes without its own.
        dtype: torch's name of the type of all weights; `auto` leaves each as it is stored.
        quiet: show no progress.

    Raises:
        ModelError: the source cannot be read, or has nothing to convert; or what was written is not what was read.
        DiskError: the directory cannot be written. It is whole or it is not there.
    """
    screen, target = Screen(quiet=quiet), Path(directory)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ModelError(f"{target} is there already: name a new directory, or empty this one.")
    kind = recognise(source)
    place = _to_convert(kind, source)
    read = {path.name: path.stat().st_size for path in weight_files(place)}
    size = sum(read.values())
    _make_room(target, size)
    screen.note(f"Reading {source}: {size_in_words(size)}")
    stored = dtype == "auto" and kind.original(read_json(place / "config.json"))
    spec = ModelSpec(path=source, vision_tower=vision_tower)
    family = load_family(spec, dtype="stored" if stored else dtype)
    parameters = sum(parameter.numel() for parameter in family.model.parameters())
    screen.note(f"Writing {target}")
    with new_directory(target) as aside:
        family.save(aside)
        run_in = read_json(aside / "config.json")["dtype"]
        expected = _checksums(family, run_in, screen)
        ids, notes = family.encode(PROBE).ids, list(family.notes)
        del family  # let go before the next one comes
        gc.collect()
        screen.note("Loading what was written")
        again = kind.load(aside, loading=Loading(run_in))
        if _checksums(again, run_in, screen) != expected or again.encode(PROBE).ids != ids:
            raise ModelError(f"What was written is not what was read from {source}; it was removed. Try again.")
        written = {path.name: path.stat().st_size for path in sorted(aside.iterdir())}
    return Converted(source, str(target), read, written, len(expected), parameters, notes)


def _to_convert(kind: type[Family], source: str) -> Path:
    """Where the source lies, once it is known that there is something to convert."""
    for weights in (False, True):  # first without them: they need not be fetched to be refused
        place = local_directory(source, weights=weights)
        safe = any((place / name).is_file() for name in (SAFE, SAFE_INDEX))
        if safe and (place / "tokenizer.json").is_file() and not kind.original(read_json(place / "config.json")):
            raise ModelError(f"{source} is in the Hugging Face format already: use it as it is.")
    return place


def _make_room(target: Path, needed: int) -> None:
    """Make the directory around the target, and say now what would fail after minutes of reading."""
    with disk_errors(target, "the directory", needed=needed):
        target.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(target.parent).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _checksums(family: Family, dtype: str, screen: Screen) -> dict[str, str]:
    """Name -> type, shape and sha256 of each tensor in the type in which the model is run."""
    import torch

    state = family.model.state_dict()
    sums = {}
    with screen.bar("checking", len(state)) as bar:
        for name, tensor in state.items():
            run = tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor
            content = run.contiguous().reshape(-1).view(torch.uint8).numpy()
            sums[name] = f"{run.dtype} {tuple(run.shape)} {hashlib.sha256(content).hexdigest()}"
            bar.advance()
    return sums
