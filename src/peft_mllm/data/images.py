"""An image file as the pixels a person sees, or the reason why not.

`look` is the only place where a file becomes pixels: the checker keeps its findings, `FileImage.load` raises
its errors, so what passed the check can be loaded. What Pillow does by itself is not enough (measured with
version 13): `verify()` passes truncated JPEGs, `convert("RGB")` turns 16-bit greyscale nearly white and float
images black, shows what transparency hides, and ignores EXIF rotation.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import re
import stat
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from peft_mllm.data.problems import BadDataError, Problem, nearest_file, problem, refuse
from peft_mllm.record import ImageSource

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
"""What is read. Pillow knows many more; each is a decoder that hostile bytes may reach."""

MAX_PIXELS = 89_478_485
"""Refused by the header above this: Pillow's own warning limit, 256 MiB as RGB."""

MAX_FILE_BYTES = 512 << 20
"""A larger file is not read into memory; 89 M pixels at 16 bits in three channels are 512 MiB."""

MIN_SIDE = 4
MAX_ASPECT = 100
"""Outside of these an image is reported: some processors take such a side for the channels, or refuse it."""

_SUFFIXES = {
    ".jpg": "JPEG", ".jpeg": "JPEG", ".jpe": "JPEG", ".jfif": "JPEG", ".png": "PNG", ".webp": "WEBP",
    ".bmp": "BMP", ".dib": "BMP", ".tif": "TIFF", ".tiff": "TIFF", ".gif": "GIF",
}  # fmt: skip
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"BM", b"II*\x00", b"MM\x00*", b"GIF8")  # and RIFF....WEBP
_OTHER_KINDS = (
    (b"%PDF", "a PDF document"),
    (b"%!PS", "a PostScript drawing"),
    (b"PK\x03\x04", "a zip archive"),
    (b"\x1f\x8b", "gzip-compressed"),
    (b"8BPS", "a Photoshop file"),
    (b"\x00\x00\x00\x0cjP", "a JPEG 2000 image"),
    (b"\x00\x00\x01\x00", "an icon file"),
)
_PNG_END = b"IEND\xae\x42\x60\x82"  # the last chunk's name and its checksum
_GIF_END = b"\x3b"
# EXIF orientation -> what turns the stored pixels upright; 1 is upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)
_ORIENTATION = 0x0112
_WARNINGS = threading.Lock()  # warnings.catch_warnings changes the whole process


@dataclass(frozen=True)
class Look:
    """What a look at an image file gave.

    Attributes:
        image: RGB, upright, decoded; None where an error forbids it, or where only `inspect` was asked.
        digest: sha256 of the file's content; empty where it could not be read.
        problems: all findings.
        conversions: what was done to make it RGB, e.g. `alpha`, `cmyk`, `grey`.
    """

    image: Image.Image | None
    digest: str
    problems: tuple[Problem, ...]
    conversions: tuple[str, ...]


class FileImage(ImageSource):
    """An image file.

    Args:
        path: the file.
        name: what to call it in messages; the path if left out.
        seal: sha256 of the content when it was checked: loading anything else is an error, and the key is
            known without reading the file.
    """

    def __init__(self, path: str | Path, *, name: str | None = None, seal: str | None = None):
        self.path = Path(path)
        self.name = str(path) if name is None else name
        self.seal = seal

    @property
    def identity(self) -> str:
        """What tells it from other images without reading it."""
        return str(self.path)

    @property
    def key(self) -> str:
        """The sha256 of the file's content.

        Raises:
            BadDataError: the file cannot be read.
        """
        if self.seal is not None:
            return self.seal
        try:
            status = self.path.stat()
        except (OSError, ValueError):
            return hashlib.sha256(read_file(self.path, self.name)).hexdigest()  # which says why it cannot be read
        return _digest(str(self.path), status.st_size, status.st_mtime_ns)

    def load(self) -> Image.Image:
        """Return the image: RGB, upright, fully decoded, transparency on white.

        Raises:
            BadDataError: for the first error that `inspect` finds; or the content is not what was checked.
        """
        seen = look(self.path, name=self.name)
        if self.seal is not None and seen.digest and seen.digest != self.seal:
            raise refuse("image-changed", path=self.name)
        if seen.image is None:
            raise BadDataError([each for each in seen.problems if each.severity == "error"])
        return seen.image

    @property
    def dimensions(self) -> tuple[int, int]:
        """Width and height of the upright image, from the file's header.

        Raises:
            BadDataError: the file or its header cannot be read.
        """
        try:
            status = self.path.stat()
        except (OSError, ValueError):
            return _Eye(self.path, self.name).measure()  # which says why it cannot be read
        return _dimensions(str(self.path), self.name, status.st_size, status.st_mtime_ns)

    def __repr__(self) -> str:
        return f"FileImage({str(self.path)!r})"


def inspect(path: str | Path, *, name: str | None = None) -> Look:
    """Find everything that is wrong with an image file; the pixels are decoded and let go."""
    seen = look(Path(path), name=name)
    return Look(None, seen.digest, seen.problems, seen.conversions)


def look(path: Path, *, name: str | None = None, data: bytes | None = None) -> Look:
    """Read and decode an image file completely; raises nothing for what the file may hold.

    Args:
        path: the file.
        name: what to call it in messages; the path if left out.
        data: its content, where that is at hand and there may be no file.
    """
    eye = _Eye(path, str(path) if name is None else name, data)
    try:
        image: Image.Image | None = eye.see()
    except BadDataError as error:
        image = None
        eye.found = list(error.problems)  # what else is odd about it does not matter then
    return Look(image, eye.digest, tuple(eye.found), tuple(eye.conversions))


@functools.lru_cache(maxsize=1 << 20)
def _digest(path: str, size: int, mtime_ns: int) -> str:
    """The content's sha256; size and time are what tells a changed file from a known one."""
    return hashlib.sha256(read_file(Path(path), path)).hexdigest()


@functools.lru_cache(maxsize=1 << 20)
def _dimensions(path: str, name: str, size: int, mtime_ns: int) -> tuple[int, int]:
    """The upright image's width and height; size and time tell a changed file from a known one."""
    return _Eye(Path(path), name).measure()


def read_file(path: Path, name: str) -> bytes:
    """A regular file's bytes; never waits on a pipe.

    Raises:
        BadDataError: it is not there, no regular file, or too large.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        raise refuse("image-missing", path=name, hint=nearest_file(path)) from None
    except OSError as error:
        raise refuse("image-unreadable", path=name, why=error.strerror) from None
    except ValueError:  # a NUL or half a surrogate pair in the name
        raise refuse("image-path-invalid", what="text that no file name can be") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            what = "it is a folder" if stat.S_ISDIR(status.st_mode) else "it is not a regular file"
            raise refuse("image-unreadable", path=name, why=what)
        if status.st_size > MAX_FILE_BYTES:
            size, limit = (f"{n / 1e6:,.0f} MB" for n in (status.st_size, MAX_FILE_BYTES))
            raise refuse("image-too-large", path=name, size=size, limit=limit)
        with open(descriptor, "rb", closefd=False) as file:
            return file.read()
    except OSError as error:
        raise refuse("image-unreadable", path=name, why=error.strerror) from None
    finally:
        os.close(descriptor)


class _Eye:
    """One look: what was found on the way, beside the image or the error."""

    def __init__(self, path: Path, name: str, data: bytes | None = None):
        self.path = path
        self.name = name
        self.data = data
        self.digest = ""
        self.found: list[Problem] = []
        self.conversions: list[str] = []

    def measure(self) -> tuple[int, int]:
        """Width and height of the upright image; nothing is decoded."""
        data = read_file(self.path, self.name) if self.data is None else self.data
        self._refuse_other_kinds(data)
        with self._open(data) as image:
            self._judge_header(image)
            width, height = image.size
            # Pillow gives a TIFF's size as it will be turned
            sideways = image.format != "TIFF" and self._orientation(image) in _SIDEWAYS
            return (height, width) if sideways else (width, height)

    def see(self) -> Image.Image:
        data = read_file(self.path, self.name) if self.data is None else self.data
        self.digest = hashlib.sha256(data).hexdigest()
        self._refuse_other_kinds(data)
        with self._open(data) as image:
            self._judge_header(image)
            orientation = self._orientation(image)
            self._attempt(image.load)
            self._judge_end(data, image.format)
            if image.format != "TIFF":  # Pillow turns a TIFF itself when it loads it
                image = self._attempt(lambda: _turned(image, orientation))
            return self._attempt(lambda: self._rgb(image))

    def _refuse_other_kinds(self, data: bytes) -> None:
        """Name what is often found in the place of an image."""
        head = data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
        if not data:
            raise refuse("image-empty", path=self.name)
        if head.startswith(b"version https://git-lfs"):
            raise refuse("image-lfs-pointer", path=self.name)
        if head.startswith(b"<svg") or (head.startswith((b"<?xml", b"<!--")) and b"<svg" in head):
            raise refuse("image-svg", path=self.name)
        if head.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
            raise refuse("image-html", path=self.name)

    def _open(self, data: bytes) -> ImageFile.ImageFile:
        # Some other library may have set this for the whole process; half an image must never pass as one.
        ImageFile.LOAD_TRUNCATED_IMAGES = False
        with _WARNINGS, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            try:
                return Image.open(io.BytesIO(data), formats=FORMATS)
            except (Image.DecompressionBombWarning, Image.DecompressionBombError) as bomb:
                count = re.search(r"\d+", str(bomb))
                raise self._too_large(f"{int(count[0]):,} pixels" if count else "too many pixels") from None
            except Exception as error:
                raise self._unopened(data, error) from None

    def _unopened(self, data: bytes, error: Exception) -> BadDataError:
        if data.startswith(_MAGIC) or (data[:4] == b"RIFF" and data[8:12] == b"WEBP"):
            return refuse("image-truncated", path=self.name, why="its header is not whole")
        if not isinstance(error, UnidentifiedImageError):
            return refuse("image-broken", path=self.name, why=_why(error))
        return refuse("image-format", path=self.name, what=_other_kind(data))

    def _judge_header(self, image: ImageFile.ImageFile) -> None:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise self._too_large(f"{width} x {height} pixels")
        # A phone's MPO file is a JPEG with a preview or a depth map behind it: the first frame is the photo.
        # Asking for the frames reads the whole of a GIF or WebP, so it may fail like a decoder.
        frames = 1 if image.format == "MPO" else self._attempt(lambda: getattr(image, "n_frames", 1))
        if frames > 1:
            raise refuse("image-animated", path=self.name, frames=frames)
        if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):
            what = "floating-point numbers" if image.mode == "F" else "32-bit numbers"
            raise refuse("image-float", path=self.name, what=what)
        kind = "JPEG" if image.format == "MPO" else image.format
        if _SUFFIXES.get(self.path.suffix.lower(), kind) != kind:
            self._find("image-mislabelled", format=kind)
        if min(width, height) < MIN_SIDE or max(width, height) > MAX_ASPECT * min(width, height):
            self._find("image-shape", size=f"{width} x {height}")

    def _orientation(self, image: ImageFile.ImageFile) -> int:
        """The EXIF orientation, before loading."""
        with _WARNINGS, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                value = image.getexif().get(_ORIENTATION, 1)
            except Exception as error:
                self._find("image-exif", why=_why(error))
                return 1
        if value in _UPRIGHT:
            self._find("image-rotated", value=value)
        return value if value in _UPRIGHT else 1

    def _judge_end(self, data: bytes, kind: str | None) -> None:
        """Pillow loads these two without their end marks; cut any earlier, they fail to load."""
        png_ends = kind != "PNG" or _PNG_END in data
        gif_ends = kind != "GIF" or data.rstrip(b"\x00").endswith(_GIF_END)
        if not (png_ends and gif_ends):
            self._find("image-no-end")

    def _rgb(self, image: Image.Image) -> Image.Image:
        if image.mode.startswith("I"):
            self._find("image-16-bit")
            # 65535 / 257 = 255: white stays white, black black.
            grey = (np.asarray(image).astype(np.uint32) + 128) // 257
            return Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB")
        if image.has_transparency_data:
            self.conversions.append("alpha")
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
        if image.mode != "RGB":
            self.conversions.append(
                {"L": "grey", "1": "black-and-white", "P": "palette"}.get(image.mode, image.mode.lower())
            )
        return image.convert("RGB")

    def _attempt(self, step: Callable[[], Any]) -> Any:
        """Run a step of Pillow; its decoders raise nearly anything on broken bytes."""
        try:
            return step()
        except BadDataError:
            raise
        except (Image.DecompressionBombError, MemoryError):
            raise self._too_large("more than fits into memory") from None
        except Exception as error:
            cut = isinstance(error, EOFError) or "truncated" in str(error).lower()
            raise refuse("image-truncated" if cut else "image-broken", path=self.name, why=_why(error)) from None

    def _too_large(self, size: str) -> BadDataError:
        return refuse("image-too-large", path=self.name, size=size, limit=f"{MAX_PIXELS:,} pixels")

    def _find(self, code: str, **values: object) -> None:
        self.found.append(problem(code, path=self.name, **values))


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _other_kind(data: bytes) -> str:
    """What a file that is no image of ours seems to be."""
    brand = data[8:12] if data[4:8] == b"ftyp" else b""
    if brand in (b"heic", b"heix", b"mif1", b"hevc", b"msf1"):
        return "an HEIC photo"
    if brand:
        return "an AVIF image" if brand in (b"avif", b"avis") else "a video (MP4 or QuickTime)"
    for magic, what in _OTHER_KINDS:
        if data.startswith(magic):
            return what
    try:
        data[:1024].decode("ascii")
    except UnicodeDecodeError:
        return "not an image of a known kind"
    return "a text file"


def _why(error: Exception) -> str:
    """A decoder's own words, in one line."""
    return " ".join(str(error).split()) or type(error).__name__
