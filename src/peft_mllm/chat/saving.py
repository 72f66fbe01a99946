"""A conversation as a line of a file that can be trained on (docs/own-data.md: JSON lines with messages)."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

from peft_mllm.chat.conversation import Conversation, SeenImage
from peft_mllm.errors import DataError
from peft_mllm.files import atomic_write, canonical_json, disk_errors


def save(conversation: Conversation, file: str | Path) -> Path:
    """Add a conversation to a file of JSON lines, and its images beside it.

    Images are written as the model saw them, into `FILE_images/`, since data may only name images below its own
    folder. A conversation that is in the file already is not added again.

    Returns:
        the file.

    Raises:
        DataError: there is nothing to save, or the file is of another kind.
        DiskError: it cannot be written.
    """
    path = Path(file).expanduser()
    record = conversation.record()
    images = [image for image in record.images if isinstance(image, SeenImage)]
    folder = path.with_name(f"{path.stem}_images")
    fields: dict[str, Any] = {"messages": [{"role": turn.role, "content": turn.text} for turn in record.turns]}
    if images:
        fields["images"] = [f"{folder.name}/{_name(image)}" for image in images]
    fields = {"id": f"chat-{hashlib.sha256(canonical_json(fields)).hexdigest()[:16]}", **fields}
    before = _lines(path)
    if fields["id"] in {line.get("id") for line in before.values()}:
        return path
    with disk_errors(folder, "the images into"):
        path.parent.mkdir(parents=True, exist_ok=True)
        if images:
            folder.mkdir(exist_ok=True)
    for image in images:
        atomic_write(folder / _name(image), _png(image), what="an image")
    lines = [*before, json.dumps(fields, ensure_ascii=False)]
    atomic_write(path, "".join(f"{line}\n" for line in lines), what="the conversation")
    return path


def _name(image: SeenImage) -> str:
    return f"{image.digest[:16]}.png"


def _png(image: SeenImage) -> bytes:
    """The decoded pixels, without loss and without what else the file may have held (place, time, camera)."""
    written = io.BytesIO()
    image.picture.save(written, format="PNG")
    return written.getvalue()


def _lines(path: Path) -> dict[str, dict[str, Any]]:
    """The lines of the file, as they stand there and as records; none if it is absent."""
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        found = {line: json.loads(line) for line in text.split("\n") if line.strip()}
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is there already and cannot be added to: {error}. Choose another name.") from None
    if not all(isinstance(value, dict) and "messages" in value for value in found.values()):
        raise DataError(f"{path} is there already and holds no records with messages. Choose another name.")
    return found
