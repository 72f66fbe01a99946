"""Archives as lists of members to read: nothing in one can name a place outside, or is unpacked to a path of its own.

Members are read one by one into memory and written by us under names of ours. A path that leads out of its
archive, or a link that does, is no accident in a data set: such an archive is refused as a whole.
"""

from __future__ import annotations

import re
import stat
import tarfile
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_mllm.errors import DataError

SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
MAX_MEMBER_BYTES = 8 << 30
"""The largest table of questions has less than 1 GB; more is a bomb or another file."""

_DRIVE = re.compile(r"[A-Za-z]:")
_NOISE = ("__MACOSX", ".DS_Store")


@dataclass(frozen=True)
class Member:
    """A file in an archive: its path as it stands there, cleaned, and what the archive calls it."""

    path: str
    size: int
    handle: Any


class Archive(ABC):
    """One archive file; it is open only while it is read."""

    def __init__(self, path: Path):
        self.path = path

    @abstractmethod
    def members(self) -> list[Member]:
        """All files.

        Raises:
            DataError: the archive is damaged or dangerous.
        """

    @abstractmethod
    def contents(self, wanted: Mapping[str, Member]) -> Iterator[tuple[str, bytes]]:
        """The bytes of members by path, in the order in which they lie, which is the fast one."""

    def content(self, member: Member) -> bytes:
        """One member's bytes."""
        return next(data for _, data in self.contents({member.path: member}))


class ZipArchive(Archive):
    """A zip file."""

    def members(self) -> list[Member]:
        """From the directory at the end of the file."""
        with damaged(self.path), zipfile.ZipFile(self.path) as archive:
            found = []
            for info in archive.infolist():
                path = inner_path(info.filename, self.path)
                mode = info.external_attr >> 16
                if stat.S_ISLNK(mode):
                    self._refuse_link(archive, info, path)
                elif not info.is_dir() and not _is_noise(path):
                    found.append(Member(path, info.file_size, info.header_offset))
            return found

    def contents(self, wanted: Mapping[str, Member]) -> Iterator[tuple[str, bytes]]:
        """In the order of the file; each is checked against its checksum."""
        with damaged(self.path), zipfile.ZipFile(self.path) as archive:
            by_place = {info.header_offset: info for info in archive.infolist()}
            for path, member in sorted(wanted.items(), key=lambda pair: pair[1].handle):
                _refuse_large(self.path, member)
                try:
                    data = archive.read(by_place[member.handle])
                except (zipfile.BadZipFile, zlib.error, EOFError) as error:
                    raise _damage(self.path, f"{path}: {error}") from None
                yield path, data

    def _refuse_link(self, archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: str) -> None:
        if info.file_size < 4096:
            _check_link(path, archive.read(info).decode("utf-8", "replace"), self.path)


class TarArchive(Archive):
    """A tar file, compressed or not; it has no directory, so each pass reads all of it."""

    def members(self) -> list[Member]:
        """In one pass."""
        with damaged(self.path), tarfile.open(self.path, "r:*") as archive:
            found = []
            for info in archive:
                path = inner_path(info.name, self.path)
                if info.issym() or info.islnk():
                    _check_link(path if info.issym() else "", info.linkname, self.path)
                elif info.isreg() and not _is_noise(path):
                    found.append(Member(path, info.size, None))
            return found

    def contents(self, wanted: Mapping[str, Member]) -> Iterator[tuple[str, bytes]]:
        """In one pass, which ends at the last one wanted."""
        left = dict(wanted)
        with damaged(self.path), tarfile.open(self.path, "r:*") as archive:
            for info in archive:
                member = left.pop(inner_path(info.name, self.path), None) if info.isreg() else None
                if member is not None:
                    _refuse_large(self.path, member)
                    file = archive.extractfile(info)
                    assert file is not None, "a regular member has content"
                    yield member.path, file.read()
                if not left:
                    return


def open_archive(path: Path) -> Archive:
    """The reader of an archive, by its name."""
    return ZipArchive(path) if path.name.lower().endswith(".zip") else TarArchive(path)


def is_archive(name: str) -> bool:
    """Whether a file name is an archive's."""
    return name.lower().endswith(SUFFIXES)


def inner_path(name: str, archive: Path) -> str:
    """A member's path: relative, with slashes.

    Raises:
        DataError: it leads out of the archive.
    """
    path = name.replace("\\", "/")
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if path.startswith("/") or _DRIVE.match(path) or ".." in parts or "\0" in path:
        raise _danger(archive, f"the path {name!r}, which leads out of it")
    return "/".join(parts)


@contextmanager
def damaged(path: Path) -> Iterator[None]:
    """Turn what the libraries say of a broken archive into one sentence."""
    try:
        yield
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error) as error:
        raise _damage(path, _words(error)) from None
    except NotImplementedError as error:
        raise DataError(f"{path}: is packed in a way that Python cannot read ({error}). Unpack it by hand.") from None
    except RuntimeError as error:  # zipfile's word for a password
        raise DataError(f"{path}: cannot be read ({error}). Unpack it by hand.") from None
    except OSError as error:
        if error.errno is not None:
            raise DataError(f"{path}: cannot be read ({error.strerror}).") from None
        raise _damage(path, str(error)) from None  # gzip's word for a broken file


def _damage(path: Path, why: str) -> DataError:
    return DataError(f"{path}: the archive is damaged or cut off ({why}). Download it again.")


def _danger(path: Path, what: str) -> DataError:
    return DataError(f"{path}: holds {what}; nothing of it is used. Download it from the data set's own page.")


def _words(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return "its directory, at the end, is missing" if text == "File is not a zip file" else text


def _refuse_large(path: Path, member: Member) -> None:
    if member.size > MAX_MEMBER_BYTES:
        raise _danger(path, f"{member.path} of {member.size:,} bytes, which no file of a data set has")


def _check_link(path: str, target: str, archive: Path) -> None:
    """A link within the archive is passed over; one that leads out is refused."""
    steps = [*path.split("/")[:-1], *target.replace("\\", "/").split("/")]
    depth = 0
    for step in steps:
        depth += {"": 0, ".": 0, "..": -1}.get(step, 1)
        if depth < 0:
            break
    if depth < 0 or target.startswith(("/", "\\")) or _DRIVE.match(target):
        raise _danger(archive, f"the link {path or target!r} to {target!r}, which leads out of it")


def _is_noise(path: str) -> bool:
    parts = path.split("/")
    return any(part in _NOISE for part in parts) or parts[-1].startswith("._")
