"""From the bytes of one record to a `Record`, with everything that is wrong with it.

Three shapes are read, and may be mixed in a file: `{"id", "image", "conversations": [{"from", "value"}]}` as
LLaVA has it, the same with `<img>path</img>` inside the text as Qwen-VL has it, and `{"id", "images", "messages":
[{"role", "content"}]}`. Content is text with `<image>` marks, or a list of parts. Other keys are kept in the
record's `meta`.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from peft_mllm.data.held import DataImage, HeldImage, RemoteImage
from peft_mllm.data.images import FileImage
from peft_mllm.data.inline import AS_WRITTEN, CAPTIONS, has_images, odd_grounding, unpack
from peft_mllm.data.json_text import kind_of, read_object
from peft_mllm.data.problems import BadDataError, Problem, problem, refuse
from peft_mllm.record import IMAGE_MARK, Record, Role, Turn

ROLES: Mapping[str, Role] = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "system": "system",
}
_KEYS = ("id", "image", "images", "conversations", "messages")
_TURN_KEYS = ("from", "value", "role", "content")
_TWINS = {"image": "images", "conversations": "messages", "from": "role", "value": "content"}
_TWINS |= {twin: key for key, twin in _TWINS.items()}
_ALIASES = {
    "img": "image",
    "picture": "image",
    "image_path": "image",
    "image_file": "image",
    "dialog": "messages",
}
_CONTROL_TOKEN = re.compile(r"</?s>|<unk>|<pad>|<\|[\w ]{1,40}\|>|\[/?INST\]")
_ODD = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufffd]")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")  # two letters at least: `C:` is a drive


@dataclass(frozen=True)
class Root:
    """The folder below which all images lie.

    Attributes:
        path: resolved.
        seals: sha256 of images that were checked, by resolved path; see `FileImage`.
        addresses: whether an address is kept as an image that cannot be loaded, instead of refused.
    """

    path: Path
    seals: Mapping[str, str]
    addresses: bool = False


@dataclass(frozen=True)
class Parsed:
    """One record as far as it could be read.

    Attributes:
        record: None if any problem is an error.
        problems: all that the text alone shows; no image has been opened.
        id: the record's id, or the one made from its place.
        images: those whose paths may be opened, whatever else is wrong.
        extra: keys without a meaning here.
    """

    record: Record | None
    problems: tuple[Problem, ...]
    id: str
    images: tuple[DataImage, ...] = ()
    extra: tuple[str, ...] = ()


def parse(raw: bytes, *, source: str, default_id: str, root: Root) -> Parsed:
    """Read one record.

    Args:
        raw: its JSON text.
        source: its place, for messages: `train.jsonl:12`.
        default_id: its id if it names none.
        root: where its images are.
    """
    try:
        fields = read_object(raw)
    except BadDataError as error:
        return Parsed(None, error.problems, default_id)
    return read_fields(fields, source=source, default_id=default_id, root=root)


def read_fields(fields: Mapping[str, Any], *, source: str, default_id: str, root: Root) -> Parsed:
    """Read one record from its keys and values; an image may be named by a path, or be there already."""
    reader = _Reader(fields, root)
    turns, images = reader.turns(), reader.images()
    turns = reader.place_marks(turns, images)
    reader.check_questions(turns)
    name = reader.id(default_id)
    files = tuple(image for image in images if image is not None)
    extra = {key: value for key, value in fields.items() if key not in (*_KEYS, CAPTIONS)}
    meta = extra | ({CAPTIONS: reader.captions} if reader.captions is not None else {})
    record = None
    if not any(each.severity == "error" for each in reader.found):
        record = Record(name, tuple(turns), files, MappingProxyType(meta), source)
    return Parsed(record, tuple(reader.found), name, files, tuple(extra))


class _Reader:
    """Reads the parts of one record and collects what is wrong with them."""

    def __init__(self, fields: Mapping[str, Any], root: Root):
        self.fields = fields
        self.root = root
        self.found: list[Problem] = []
        self.marked: list[Any] = []
        """For each mark in the text: the path its part names, or None where the record names it."""
        self.captions = fields.get(CAPTIONS)
        self.unclear = self._misspelt(fields, _KEYS)
        """Something could not be read, so marks and images cannot be counted."""
        self._conflict("image", "images")
        self._conflict("conversations", "messages")

    def find(self, code: str, **values: object) -> None:
        self.found.append(problem(code, **values))

    def id(self, default: str) -> str:
        value = self.fields.get("id")
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
            self.find("id-invalid", what=kind_of(value))
            return default
        return str(value)

    def turns(self) -> list[Turn]:
        """The conversation; its order of roles is checked only where every turn could be read."""
        written = self.fields.get("conversations", self.fields.get("messages"))
        if not isinstance(written, list) or not written:
            if not self.unclear:
                why = "both keys are missing" if written is None else f"it is {kind_of(written)}"
                self.find("conversation-missing", why=why)
            self.unclear = True
            return []
        turns = [self._turn(number, turn) for number, turn in enumerate(written, start=1)]
        whole = self._take_out_images([turn for turn in turns if turn is not None])
        if len(whole) == len(turns):
            self._check_order(whole)
        else:
            self.unclear = True
        return whole

    def _take_out_images(self, turns: list[Turn]) -> list[Turn]:
        """Marks in the place of the images that stand in the text, where the record names none otherwise."""
        inline = [number for number, turn in enumerate(turns, start=1) if has_images(turn.text)]
        if not inline:
            return turns
        if self.marked or self._named() is not None or any(turns[n - 1].role != "user" for n in inline):
            for number in inline:
                self.find("image-inline", turn=number)
            return turns
        texts, self.marked, as_written = unpack([turn.text for turn in turns if turn.role == "user"])
        self.captions = AS_WRITTEN if as_written else self.captions
        rest = iter(texts)
        return [Turn(turn.role, next(rest)) if turn.role == "user" else turn for turn in turns]

    def _named(self) -> Any:
        return self.fields.get("images", self.fields.get("image"))

    def images(self) -> list[DataImage | None]:
        """The images in the order of their marks; None for one that cannot be used."""
        named = self._named()
        paths = [] if named is None else list(named) if isinstance(named, list) else [named]
        bare = sum(path is None for path in self.marked)
        in_front = len(paths) == 1 and not self.marked
        if len(paths) != bare and not in_front:
            if not self.unclear:
                self.find("image-mark-count", marks=bare, images=len(paths))
            return [self._image(path) for path in paths]
        if in_front:
            return [self._image(paths[0])]
        rest = iter(paths)
        return [self._image(next(rest) if path is None else path) for path in self.marked]

    def place_marks(self, turns: list[Turn], images: list[DataImage | None]) -> list[Turn]:
        """One image without a mark goes in front of the first question, as LLaVA puts it."""
        if not images or self.marked:
            return turns
        first = next((n for n, turn in enumerate(turns) if turn.role == "user"), None)
        if first is None:
            return turns
        marked = Turn("user", f"{IMAGE_MARK}\n{turns[first].text}")
        return [*turns[:first], marked, *turns[first + 1 :]]

    def check_questions(self, turns: list[Turn]) -> None:
        """Once the marks are in place: an image alone is a question, nothing at all is none."""
        for number, turn in enumerate(turns, start=1):
            if turn.role == "user" and not turn.text.strip():
                self.find("empty-question", turn=number)

    def _turn(self, number: int, turn: Any) -> Turn | None:
        if not isinstance(turn, dict):
            self._invalid(number, f"it is {kind_of(turn)}, not an object")
            return None
        if self._misspelt(turn, _TURN_KEYS):
            return None
        name = turn.get("from", turn.get("role"))
        content = turn.get("value", turn.get("content"))
        if not isinstance(name, str):
            self._invalid(number, f"its role is {kind_of(name)}")
            return None
        if (role := ROLES.get(name.lower())) is None:
            self.find("role-unknown", turn=number, role=name)
            return None
        before = len(self.marked)
        text = self._text(number, content)
        if text is None:
            return None
        if len(self.marked) > before and role != "user":
            self.find("image-mark-place", role=role, turn=number)
        self._check_text(number, role, text)
        return Turn(role, text)

    def _invalid(self, number: int, why: str) -> None:
        self.find("turn-invalid", turn=number, why=why)

    def _text(self, number: int, content: Any) -> str | None:
        """Content as one text; notes its marks. A line break parts an image from what stands beside it."""
        if isinstance(content, str):
            self.marked += [None] * content.count(IMAGE_MARK)
            return content
        if not isinstance(content, list):
            self._invalid(number, f"its text is {kind_of(content)}")
            return None
        text, after_image = "", False
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "image":
                self.marked.append(part.get("image", part.get("path", part.get("url"))))
                piece = IMAGE_MARK
            elif kind == "text" and isinstance(part.get("text"), str):
                piece = part["text"]
                self.marked += [None] * piece.count(IMAGE_MARK)
            else:
                self._invalid(number, "a part is neither {'type': 'text', 'text'} nor {'type': 'image'}")
                return None
            parted = text.endswith("\n") or piece.startswith("\n")
            text += "\n" + piece if text and not parted and (after_image or kind == "image") else piece
            after_image = kind == "image"
        return text

    def _check_text(self, number: int, role: Role, text: str) -> None:
        if role == "assistant" and not text.replace(IMAGE_MARK, "").strip():
            self.find("empty-answer", turn=number)
        if odd := odd_grounding(text):
            self.find("grounding-odd", turn=number, what=odd)
        if token := _CONTROL_TOKEN.search(text):
            self.find("special-token", turn=number, token=token[0])
        if strange := _ODD.search(text):
            replaced = strange[0] == "\ufffd"
            mark = "the replacement character" if replaced else "a control character"
            self.find("odd-character", turn=number, what=f"{mark} (U+{ord(strange[0]):04X})")

    def _check_order(self, turns: list[Turn]) -> None:
        """A system turn at most first; then user and assistant by turns, from question to answer."""
        for number, turn in enumerate(turns[1:], start=2):
            if turn.role == "system":
                self.find("system-not-first", turn=number)
            elif turn.role == turns[number - 2].role:
                self.find("same-role-twice", before=number - 1, turn=number, role=turn.role)
        spoken = [turn.role for turn in turns if turn.role != "system"]
        if not spoken:
            self.find("conversation-missing", why="it has only a system turn")
        elif spoken[0] != "user":
            self.find("first-turn-not-user")
        if spoken and spoken[-1] != "assistant":
            self.find("last-turn-not-assistant")

    def _image(self, path: Any) -> DataImage | None:
        try:
            return resolve(self.root, path)
        except BadDataError as error:
            self.found += error.problems
            return None

    def _misspelt(self, fields: Mapping[str, Any], known: tuple[str, ...]) -> bool:
        """Report keys that were surely meant as known ones; True if there are any."""
        wrong = {key: near for key in fields if key not in known and (near := _meant(key, known, fields))}
        for key, near in wrong.items():
            self.find("misspelt-key", key=key, near=near)
        return bool(wrong)

    def _conflict(self, one: str, other: str) -> None:
        if one in self.fields and other in self.fields:
            self.find("conflicting-keys", one=one, other=other)


def resolve(root: Root, path: Any) -> DataImage:
    """The image that a record names.

    Raises:
        BadDataError: it is a URL, not a path, or lies outside the root once links are followed.
    """
    if isinstance(path, HeldImage):
        return path
    if not isinstance(path, str) or not path.strip():
        raise refuse("image-path-invalid", what=kind_of(path))
    if _SCHEME.match(path):
        if root.addresses:
            return RemoteImage(path)
        raise refuse("image-url", path=path)
    try:
        real = os.path.realpath(root.path / path)
    except (OSError, ValueError):
        raise refuse("image-path-invalid", what="text that no file name can be") from None
    if not Path(real).is_relative_to(root.path):
        raise refuse("image-outside-root", path=path, root=root.path)
    return FileImage(real, name=path, seal=root.seals.get(real))


def _meant(key: str, known: tuple[str, ...], present: Mapping[str, Any]) -> str | None:
    """The known key that an unknown one was surely meant to be, unless the object has that or its twin."""
    folded = key.strip().lower()
    if known is _KEYS:
        # 0.8 finds two letters exchanged in `image`, and leaves `image_id` and `idx` alone.
        near = _ALIASES.get(folded) or ("id" if folded == "id" else _near(folded, known[1:], 0.8))
    else:
        near = _near(folded, known, 0.7)  # a turn has no keys of the user's own
    return near if near and near not in present and _TWINS.get(near) not in present else None


def _near(key: str, known: tuple[str, ...], cutoff: float) -> str | None:
    return next(iter(difflib.get_close_matches(key, known, n=1, cutoff=cutoff)), None)
