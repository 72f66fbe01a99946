"""Everything that can be wrong with a user's data: one table of codes, each with its reason and its remedy.

Reader, image loader and checker all take their sentences from here, so they never disagree; docs/own-data.md
shows the same table, and a test keeps the two equal. A code is stable: scripts may look for it.
"""

from __future__ import annotations

import difflib
import functools
import os
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from peft_mllm.errors import DataError

Severity = Literal["error", "warning"]


class Kind(NamedTuple):
    """One row of the table; `reason` is a `str.format` template, `remedy` may be one."""

    severity: Severity
    reason: str
    remedy: str


KINDS: Mapping[str, Kind] = {
    # The file as a whole: nothing can be used until it is mended.
    "file-missing": Kind("error", "There is no file {path}", "Check the path.{hint}"),
    "file-unreadable": Kind("error", "{path} cannot be read: {why}", "Give a file that this user may read."),
    "file-format": Kind(
        "error",
        "{path} is {what}, not a JSON list or JSON lines",
        "Save the data as a JSON list of records, or as one JSON object per line, in UTF-8.",
    ),
    "file-broken": Kind(
        "error",
        "The JSON list breaks at column {column}: {why}; nothing after it can be read",
        "Mend the list there.",
    ),
    "file-empty": Kind("error", "The file has no records", "Check that its export has finished."),
    "file-changed": Kind("error", "{path} has changed since it was opened", "Start again with the file at rest."),
    "root-missing": Kind("error", "The image folder {path} is not there", "Check `image_root`.{hint}"),
    "table-library": Kind(
        "error",
        "{path} is a table, and the library that reads it is not installed",
        "Install it with `pip install 'peft-mllm[hub]'`.",
    ),
    "table-broken": Kind(
        "error",
        "{path} cannot be read as a table: {why}",
        "Give a Parquet file, a folder of them, or a directory that `save_to_disk` has written.",
    ),
    "table-splits": Kind("error", "{path} holds more than one split: {names}", "Give one of them, such as {one}."),
    "table-columns": Kind(
        "error",
        "{path} has {what}, and a record needs `messages` or `conversations`, with its images in `image` or `images`",
        "Rename the columns, or make such ones with the library `datasets`.",
    ),
    # One record as text.
    "json-broken": Kind("error", "The JSON breaks at column {column}: {why}", "Mend or remove the record."),
    "not-utf8": Kind("error", "Byte {byte} at column {column} is not UTF-8", "Save the file as UTF-8."),
    "bad-unicode": Kind(
        "error",
        "The text holds half of a surrogate pair ({what})",
        "Write the whole character, or remove it.",
    ),
    "record-too-large": Kind(
        "error",
        "The record is {size} bytes; {limit} are allowed",
        "Name images by path; do not put them inside.",
    ),
    "not-an-object": Kind("error", "The record is {what}, not an object", 'Write it as {{"messages": [...]}}.'),
    "duplicate-key": Kind("error", "The key '{key}' stands twice in one object", "Keep one of the two."),
    # One record as a conversation.
    "misspelt-key": Kind("error", "The key '{key}' is not known", "Did you mean '{near}'?"),
    "unknown-key": Kind(
        "warning",
        "The key '{key}' has no meaning in training; it is kept as `meta` (records with it: {count})",
        "Nothing to do, unless it should have been one of id, image, images, conversations, messages.",
    ),
    "conversation-missing": Kind(
        "error", "The record has no conversation: {why}", "Give a list under `conversations` or `messages`."
    ),
    "conflicting-keys": Kind("error", "The record has both '{one}' and '{other}'", "Keep one of the two."),
    "id-invalid": Kind("error", "The id is {what}", "Give text or a whole number, or leave the id out."),
    "duplicate-id": Kind(
        "error",
        "The id '{id}' was used before, in {where}; a sample's randomness comes from its id",
        "Make it unique, or leave the ids out.",
    ),
    "duplicate-record": Kind(
        "warning", "The same images and the same text stand in {where}", "Remove one, unless it is meant."
    ),
    "leaked-question": Kind(
        "error",
        "Turn {turn} asks about the same image contents in the same words as {where}",
        "Leave it out of one of the two; `--quarantine` leaves it out here.",
    ),
    "unbalanced-answers": Kind(
        "warning",
        "'{answer}' is {count} of {total} answers ({share}): always saying it would score as much",
        "Add or draw others, or compare scores with that share.",
    ),
    "turn-invalid": Kind(
        "error",
        "Turn {turn} is wrong: {why}",
        'Write a turn as {{"from", "value"}} or {{"role", "content"}}, both text.',
    ),
    "role-unknown": Kind("error", "Turn {turn} is by '{role}'", "Use user (or human), assistant (or gpt), and system."),
    "system-not-first": Kind("error", "Turn {turn} is the system's", "Put the system turn first, or remove it."),
    "first-turn-not-user": Kind("error", "The assistant speaks first", "Remove the turns before the first question."),
    "same-role-twice": Kind("error", "Turns {before} and {turn} are both by the {role}", "Join the two turns."),
    "last-turn-not-assistant": Kind(
        "error", "The last turn is not the assistant's: there is no answer to learn", "Add the answer."
    ),
    "empty-answer": Kind("error", "The answer in turn {turn} is empty", "Write the answer, or remove the record."),
    "empty-question": Kind(
        "error", "The question in turn {turn} has neither text nor image", "Write it, or remove the record."
    ),
    "image-mark-count": Kind(
        "error",
        "The text has {marks} `<image>` marks, and the record names {images} images",
        "Write one mark for each image, in their order.",
    ),
    "image-mark-place": Kind(
        "error", "The {role}'s turn {turn} holds an `<image>` mark", "Put images into the user's turns."
    ),
    "image-inline": Kind(
        "error",
        "Turn {turn} names an image inside its text (`<img>...</img>`), and it is no question's, or the record names "
        "images otherwise, too",
        "Name images in one way: inside the user's text, or by `<image>` there and the path under `images`.",
    ),
    "grounding-odd": Kind(
        "warning",
        "Turn {turn} has '{what}', which is not how Qwen-VL writes a place",
        "Write <ref>words</ref>, <box>(x1,y1),(x2,y2)</box> or <quad> with four points, in whole numbers below 1000.",
    ),
    "special-token": Kind(
        "warning",
        "Turn {turn} holds '{token}', which a model may read as a control token",
        "Remove it, unless it is meant.",
    ),
    "special-token-read": Kind(
        "warning",
        "Turn {turn} holds '{token}', which this model reads as a control token and not as text",
        "Remove it, unless it is meant.",
    ),
    "odd-character": Kind("warning", "Turn {turn} holds {what}", "Look at the text: it was probably decoded wrongly."),
    "format-cannot-hold": Kind(
        "error", "The format {format} cannot hold this record: {why}", "Change the record, or choose another format."
    ),
    # An image as a path.
    "image-path-invalid": Kind("error", "The image is {what}, not a path", "Give its path below the image root."),
    "image-url": Kind(
        "error", "The image {path} is a URL; nothing is fetched from data", "Download it and give its path."
    ),
    "image-outside-root": Kind(
        "error",
        "The image {path} lies outside the image root {root}",
        "Move it below the root, or set `image_root`.",
    ),
    "image-missing": Kind("error", "The image {path} is not there", "Add the file or correct the path.{hint}"),
    "image-unreadable": Kind("error", "The image {path} cannot be read: {why}", "Give a file that can be read."),
    # An image as a file.
    "image-empty": Kind("error", "The image {path} is an empty file", "Copy or download it again."),
    "image-lfs-pointer": Kind("error", "The image {path} is a git-LFS pointer", "Run `git lfs pull`."),
    "image-html": Kind(
        "error", "The image {path} is an HTML page, saved in place of an image", "Download the image again."
    ),
    "image-svg": Kind("error", "The image {path} is an SVG drawing", "Render it to PNG."),
    "image-format": Kind("error", "The image {path} is {what}", "Convert it to JPEG, PNG, WebP, BMP, TIFF or GIF."),
    "image-truncated": Kind("error", "The image {path} is cut off: {why}", "Copy or download it again."),
    "image-broken": Kind("error", "The image {path} cannot be decoded: {why}", "Copy or download it again."),
    "image-too-large": Kind("error", "The image {path} is too large: {size}; {limit} are allowed", "Scale it down."),
    "image-animated": Kind(
        "error",
        "The image {path} has {frames} frames",
        "Extract one: `Image.open(path).convert('RGB').save('frame.png')` takes the first.",
    ),
    "image-float": Kind(
        "error",
        "The image {path} holds {what}, whose range is not known",
        "Scale its values to 0..255 and save it as 8-bit PNG.",
    ),
    "image-changed": Kind("error", "The image {path} has changed since it was checked", "Check the data again."),
    "image-mislabelled": Kind(
        "warning",
        "The image {path} is a {format} file by its content",
        "Rename it; it is read by its content.",
    ),
    "image-no-end": Kind(
        "warning", "The image {path} lacks its end mark; all pixels are there", "Copy it again, to be sure."
    ),
    "image-rotated": Kind(
        "warning",
        "The image {path} is stored turned (EXIF orientation {value})",
        "Nothing to do: it is read upright.",
    ),
    "image-16-bit": Kind(
        "warning",
        "The image {path} has 16 bits per pixel",
        "Nothing to do, if 0..65535 is its range: it is scaled to 8.",
    ),
    "image-exif": Kind("warning", "The EXIF data of {path} cannot be read: {why}", "Check that the image is upright."),
    "image-shape": Kind("warning", "The image {path} is {size} pixels", "Check that it shows something."),
    "duplicate-image": Kind(
        "warning",
        "The image {path} has the same content as {other}",
        "Name one file in both places, unless it is meant.",
    ),
    "leaked-image": Kind(
        "warning",
        "The image {path} also stands in {where}, with other questions",
        "Split by images if the test is to show new ones.",
    ),
    # A record as tokens.
    "too-long": Kind(
        "error",
        "The sample is {total} tokens long; {limit} fit",
        "Shorten or split it, or raise the limit (`data.max_length`; `--max-length`) if the model allows.",
    ),
    "no-answer-tokens": Kind("error", "No token of the answer is learnt", "Write an answer the tokenizer knows."),
    "not-encodable": Kind("error", "The model cannot read the record: {why}", "Change or remove the record."),
}


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, without its place.

    Attributes:
        line: lines below the record's first line, for a record written over several lines.
    """

    code: str
    reason: str
    remedy: str
    line: int = 0

    @property
    def severity(self) -> Severity:
        """Of the code; an error keeps the record out, a warning does not."""
        return KINDS[self.code].severity

    def __str__(self) -> str:
        return f"{self.reason}. {self.remedy}"


def problem(code: str, **values: object) -> Problem:
    """Fill a row of the table; the values come from data and are made safe to print."""
    kind = KINDS[code]
    safe = {"hint": ""} | {name: shown(value) for name, value in values.items()}
    return Problem(code, kind.reason.format(**safe), kind.remedy.format(**safe))


class BadDataError(DataError):
    """One or more problems at one place; carries the code, reason and remedy of the first.

    Attributes:
        problems: all of them, errors first.
        where: `train.jsonl:12`, or empty where the reasons name the file themselves.
    """

    def __init__(self, problems: Sequence[Problem], where: str = ""):
        self.problems = tuple(problems)
        self.where = where
        prefix = f"{where}: " if where else ""
        super().__init__("\n".join(f"{prefix}{each}" for each in self.problems))

    def __reduce__(self) -> tuple[type[BadDataError], tuple[tuple[Problem, ...], str]]:
        # An exception is unpickled from its message alone unless told otherwise; workers send these home.
        return type(self), (self.problems, self.where)

    @property
    def code(self) -> str:
        """The first problem's code, a key of `KINDS`."""
        return self.problems[0].code

    @property
    def reason(self) -> str:
        """What is wrong, as a sentence without its full stop."""
        return self.problems[0].reason

    @property
    def remedy(self) -> str:
        """What to do about it."""
        return self.problems[0].remedy


def refuse(code: str, **values: object) -> BadDataError:
    """The error for one problem, to be raised."""
    return BadDataError([problem(code, **values)])


SHOWN_LIMIT = 200  # characters of a value from the data: longer ones hide the sentence around them


def shown(value: object) -> str:
    """A value as text for one line of a terminal: no control characters, not too long."""
    text = str(value)
    if len(text) > SHOWN_LIMIT:
        text = f"{text[: SHOWN_LIMIT // 2]}...{text[-SHOWN_LIMIT // 2 :]}"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def nearest_file(path: Path) -> str:
    """A sentence that names the file of the folder which was probably meant, or nothing."""
    try:
        names = _listing(str(path.parent), path.parent.stat().st_mtime_ns)
    except (OSError, ValueError):
        return f" The folder {shown(path.parent)} is not there either." if path.parent != path else ""
    if "\\" in path.name:
        return " It is written with backslashes: use `/`."
    if found := names.get(_folded(path.name)) or names.get(_folded(path.stem)):
        return f" Did you mean '{shown(found)}'?"
    # Comparing with every name of a large folder takes seconds, for each missing file.
    near = difflib.get_close_matches(path.name, names.values(), n=1) if len(names) <= 1000 else []
    return f" Did you mean '{shown(near[0])}'?" if near else ""


@functools.lru_cache(maxsize=64)
def _listing(folder: str, mtime_ns: int) -> dict[str, str]:
    """The names of a folder, by name and by stem, without case and Unicode form; cached until it changes."""
    names = sorted(os.listdir(folder))  # noqa: PTH208 - the names alone
    return {_folded(Path(name).stem): name for name in names} | {_folded(name): name for name in names}


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()
