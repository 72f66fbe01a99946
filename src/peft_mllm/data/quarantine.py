"""Setting the bad records of a file aside: one file with them and the reasons, one with the rest."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from peft_mllm.data.check import Report
from peft_mllm.data.formats import RecordFile
from peft_mllm.files import atomic_write_pieces, disk_errors


class Quarantined(NamedTuple):
    """The two files that were written.

    Attributes:
        clean: the records that are used, byte for byte and in the same format.
        quarantine: JSON lines with `file`, `line`, `id`, `findings` and the record itself under `raw` (or
            `raw_base64` where it is not UTF-8).
    """

    clean: Path
    quarantine: Path


def quarantine(report: Report, file: RecordFile, directory: str | Path) -> Quarantined:
    """Write `<stem>.clean.jsonl` (or `.json`, as the file is) and `<stem>.quarantine.jsonl`.

    Each appears whole or not at all. Image paths are copied as they are: where `directory` is not the file's
    own folder, use the clean file with `image_root=file.image_root`.

    Raises:
        DataError: the file as a whole is broken, so that its records cannot be told apart; or it has changed.
        DiskError: a file cannot be written.
    """
    if report.broken:
        raise report.error()
    folder = Path(directory)
    with disk_errors(folder, "the folder"):
        folder.mkdir(parents=True, exist_ok=True)
    done = Quarantined(
        folder / f"{file.path.stem}.clean{'.json' if file.is_list else '.jsonl'}",
        folder / f"{file.path.stem}.quarantine.jsonl",
    )
    atomic_write_pieces(done.quarantine, _set_aside(report, file))
    atomic_write_pieces(done.clean, _clean(report, file))
    return done


def _clean(report: Report, file: RecordFile) -> Iterator[bytes]:
    if not file.is_list:
        yield from (file.raw(number) + b"\n" for number in report.good())
        return
    yield b"[\n"
    for count, number in enumerate(report.good()):
        yield (b",\n" if count else b"") + file.raw(number)
    yield b"\n]\n"


def _set_aside(report: Report, file: RecordFile) -> Iterator[bytes]:
    findings: dict[int, list[Mapping[str, Any]]] = {number: [] for number in report.bad}
    for finding in report.findings:
        if finding.record is not None and finding.record - 1 in findings:
            findings[finding.record - 1].append(asdict(finding))
    for number, found in findings.items():
        value = {"file": report.file, "line": file.line(number), "id": found[0]["id"], "findings": found}
        yield json.dumps(value | _original(file.raw(number)), ensure_ascii=True).encode() + b"\n"


def _original(raw: bytes) -> dict[str, str]:
    try:
        return {"raw": raw.decode()}
    except UnicodeDecodeError:
        return {"raw_base64": base64.b64encode(raw).decode()}
