from __future__ import annotations

import hashlib
import io
import os
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps

from peft_mllm.data import images
from peft_mllm.data.images import FileImage, inspect, look
from peft_mllm.data.problems import BadDataError

PIXELS = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
PHOTO = Image.fromarray(PIXELS)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def saved(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def codes(path: Path) -> list[str]:
    """The findings of a file; the loader agrees with the checker."""
    found = inspect(path).problems
    errors = [each for each in found if each.severity == "error"]
    if errors:
        with pytest.raises(BadDataError) as caught:
            FileImage(path).load()
        assert caught.value.problems == tuple(errors)
        assert str(path)[:40] in caught.value.reason or caught.value.code == "image-path-invalid"
        assert caught.value.remedy
    else:
        loaded = FileImage(path).load()
        assert loaded.mode == "RGB"
        loaded.tobytes()
    return [each.code for each in found]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(FileImage(path).load())


@pytest.mark.parametrize(("kind", "suffix"), [("PNG", "png"), ("WEBP", "webp"), ("BMP", "bmp"), ("TIFF", "tif")])
def test_lossless_formats_keep_their_pixels(tmp_path: Path, kind: str, suffix: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    path = saved(tmp_path / f"a.{suffix}", encoded(PHOTO, kind, **options))
    assert codes(path) == []
    np.testing.assert_array_equal(pixels(path), PIXELS)


def test_jpeg_and_gif(tmp_path: Path) -> None:
    assert codes(saved(tmp_path / "a.JPG", encoded(PHOTO, "JPEG"))) == []
    assert codes(saved(tmp_path / "a.gif", encoded(PHOTO, "GIF"))) == []


def test_a_phones_mpo_is_its_photo(tmp_path: Path) -> None:
    red, blue = (Image.new("RGB", (48, 32), colour) for colour in ("red", "blue"))
    path = saved(tmp_path / "a.jpg", encoded(red, "MPO", save_all=True, append_images=[blue]))
    assert codes(path) == []
    assert pixels(path)[0, 0, 0] > 250


# Orientation.


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_every_orientation_is_read_upright(tmp_path: Path, orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(PHOTO, kind, exif=exif, **options)
    path = saved(tmp_path / f"a.{kind.lower()}", data)
    assert codes(path) == (["image-rotated"] if orientation > 1 else [])
    expected = PIXELS if orientation == 1 else _upright(orientation)
    np.testing.assert_array_equal(pixels(path), expected)


def _upright(orientation: int) -> np.ndarray:
    """Pillow's own transposition of a PNG, as the independent reference."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(encoded(PHOTO, "PNG", exif=exif)))))


def test_orientation_six_is_a_quarter_turn_clockwise(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = saved(tmp_path / "a.png", encoded(PHOTO, "PNG", exif=exif))
    np.testing.assert_array_equal(pixels(path), np.rot90(PIXELS, -1))


# Modes.


@pytest.mark.parametrize(("kind", "order"), [("PNG", "<u2"), ("TIFF", "<u2"), ("TIFF", ">u2")])
def test_sixteen_bits_are_scaled(tmp_path: Path, kind: str, order: str) -> None:
    values = np.linspace(0, 65535, 32 * 48).reshape(32, 48).astype(order)
    path = saved(tmp_path / f"a.{kind.lower()}", encoded(Image.fromarray(values), kind))
    assert codes(path) == ["image-16-bit"]
    expected = np.rint(values.astype(float) / 257).astype(np.uint8)
    np.testing.assert_array_equal(pixels(path), np.repeat(expected[..., None], 3, axis=2))


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_numbers_without_a_range_are_refused(tmp_path: Path, kind: type) -> None:
    path = saved(tmp_path / "a.tiff", encoded(Image.fromarray(np.ones((8, 8), kind)), "TIFF"))
    assert codes(path) == ["image-float"]


def _palette() -> bytes:
    image = Image.new("P", (8, 8), 0)
    image.putpalette([10, 20, 30, 40, 50, 60])
    return encoded(image, "PNG", transparency=0)


@pytest.mark.parametrize(
    "data",
    [
        encoded(Image.new("RGBA", (8, 8), (10, 20, 30, 0)), "PNG"),
        encoded(Image.new("LA", (8, 8), (10, 0)), "PNG"),
        encoded(Image.new("RGB", (8, 8), (1, 2, 3)), "PNG", transparency=(1, 2, 3)),
        encoded(Image.new("RGBA", (8, 8), (10, 20, 30, 0)), "WEBP", lossless=True),
        _palette(),
    ],
    ids=["rgba", "la", "rgb-key", "webp", "palette"],
)
def test_what_is_transparent_is_white(tmp_path: Path, data: bytes) -> None:
    path = saved(tmp_path / "image", data)
    assert codes(path) == []
    assert inspect(path).conversions == ("alpha",)
    assert pixels(path).min() == 255


def test_half_transparent_is_mixed_with_white(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", encoded(Image.new("RGBA", (8, 8), (0, 0, 0, 128)), "PNG"))
    assert pixels(path)[0, 0].tolist() == [127, 127, 127]


@pytest.mark.parametrize(("mode", "conversion"), [("CMYK", "cmyk"), ("L", "grey"), ("1", "black-and-white")])
def test_other_modes_are_converted_and_counted(tmp_path: Path, mode: str, conversion: str) -> None:
    path = saved(tmp_path / "a.tif", encoded(PHOTO.convert(mode), "TIFF"))
    assert codes(path) == []
    assert inspect(path).conversions == (conversion,)
    np.testing.assert_array_equal(pixels(path), np.asarray(PHOTO.convert(mode).convert("RGB")))


# What is refused.


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"])
def test_every_cut_is_found(tmp_path: Path, kind: str) -> None:
    data = encoded(PHOTO, kind)
    path = tmp_path / "image"
    # The last bytes of a PNG and a GIF are only an end mark: all pixels are there.
    for length in [*range(1, len(data), len(data) // 40), len(data) - 2, len(data) - 1]:
        found = codes(saved(path, data[:length]))
        assert len(found) == 1, length
        assert found[0] in ("image-truncated", "image-broken", "image-no-end", "image-format"), length
        if length < len(data) - 20:
            assert found[0] != "image-no-end", length


def test_half_an_image_does_not_pass_when_another_library_allows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    data = encoded(PHOTO, "JPEG")
    assert codes(saved(tmp_path / "a.jpg", data[: len(data) // 2])) == ["image-truncated"]


OTHER_FILES = [
    (b"", "image-empty"),
    (b"<!DOCTYPE html><html>404", "image-html"),
    (b"\n<html>", "image-html"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "image-lfs-pointer"),
    (b"<svg xmlns='x'/>", "image-svg"),
    (b"<?xml version='1.0'?>\n<svg/>", "image-svg"),
    (b"hello", "image-format"),
    (b"%PDF-1.7", "image-format"),
    (encoded(PHOTO, "EPS"), "image-format"),
    (encoded(PHOTO, "PPM"), "image-format"),
    (encoded(PHOTO, "ICO"), "image-format"),
    (encoded(PHOTO, "JPEG2000"), "image-format"),
    (b"\x00\x00\x00\x18ftypheic" + b"\0" * 40, "image-format"),
    (b"\x00\x00\x00\x18ftypisom" + b"\0" * 40, "image-format"),
    (encoded(PHOTO, "GIF", save_all=True, append_images=[PHOTO.rotate(90)]), "image-animated"),
    (encoded(PHOTO, "WEBP", save_all=True, append_images=[PHOTO.rotate(90)]), "image-animated"),
    (encoded(PHOTO, "PNG", save_all=True, append_images=[PHOTO.rotate(90)]), "image-animated"),
    (encoded(PHOTO, "TIFF", save_all=True, append_images=[PHOTO]), "image-animated"),
    (encoded(Image.new("1", (10_000, 10_000)), "PNG"), "image-too-large"),
    (encoded(Image.new("1", (14_000, 14_000)), "PNG"), "image-too-large"),
]


@pytest.mark.parametrize(("data", "code"), OTHER_FILES, ids=lambda value: str(value)[:30])
def test_other_files_are_named_for_what_they_are(tmp_path: Path, data: bytes, code: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert codes(saved(tmp_path / "image", data)) == [code]


def test_own_pixel_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 32 * 48 - 1)
    path = saved(tmp_path / "a.png", encoded(PHOTO, "PNG"))
    assert codes(path) == ["image-too-large"]
    assert "48 x 32 pixels" in inspect(path).problems[0].reason


def test_own_byte_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_FILE_BYTES", 100)
    assert codes(saved(tmp_path / "a.png", encoded(PHOTO, "PNG"))) == ["image-too-large"]


def test_no_regular_file(tmp_path: Path) -> None:
    assert codes(tmp_path) == ["image-unreadable"]
    os.mkfifo(tmp_path / "pipe.png")
    assert codes(tmp_path / "pipe.png") == ["image-unreadable"]
    assert codes(tmp_path / ("x" * 300)) == ["image-unreadable"]
    assert codes(Path("a\0b")) == ["image-path-invalid"]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("Cat.PNG", "'cat.png'"),
        ("cat.jpg", "'cat.png'"),
        ("cta.png", "'cat.png'"),
        ("cafe\u0301.png", "'caf\u00e9.png'"),
        ("sub\\cat.png", "backslashes"),
        ("nowhere/cat.png", "folder"),
    ],
)
def test_a_missing_file_comes_with_a_hint(tmp_path: Path, name: str, hint: str) -> None:
    for other in ("cat.png", "caf\u00e9.png"):
        saved(tmp_path / other, encoded(PHOTO, "PNG"))
    assert codes(tmp_path / name) == ["image-missing"]
    assert hint in inspect(tmp_path / name).problems[0].remedy


# Warnings.


def test_content_counts_not_the_name(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.jpg", encoded(PHOTO, "PNG"))
    assert codes(path) == ["image-mislabelled"]
    assert "is a PNG file" in inspect(path).problems[0].reason


def test_no_end_mark(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", encoded(PHOTO, "PNG")[:-12])
    assert codes(path) == ["image-no-end"]
    np.testing.assert_array_equal(pixels(path), PIXELS)


@pytest.mark.parametrize("size", [(1, 1), (3, 50), (1000, 8)])
def test_odd_shapes(tmp_path: Path, size: tuple[int, int]) -> None:
    assert codes(saved(tmp_path / "a.png", encoded(Image.new("RGB", size), "PNG"))) == ["image-shape"]


def test_data_behind_the_end_is_no_finding(tmp_path: Path) -> None:
    assert codes(saved(tmp_path / "a.png", encoded(PHOTO, "PNG") + b"\0" * 500)) == []
    assert codes(saved(tmp_path / "a.jpg", encoded(PHOTO, "JPEG") + b"trailer")) == []


# Keys and seals.


def test_the_key_is_the_content(tmp_path: Path) -> None:
    data = encoded(PHOTO, "PNG")
    one, two = (saved(tmp_path / name, data) for name in ("a.png", "b.png"))
    assert FileImage(one).key == FileImage(two).key == hashlib.sha256(data).hexdigest()
    saved(one, data + b"\0")
    assert FileImage(one).key != FileImage(two).key
    with pytest.raises(BadDataError, match="is not there"):
        _ = FileImage(tmp_path / "c.png").key


def test_one_flipped_bit_after_the_check_is_found(tmp_path: Path) -> None:
    data = bytearray(encoded(PHOTO, "JPEG"))
    path = saved(tmp_path / "a.jpg", bytes(data))
    seal = inspect(path).digest
    sealed = FileImage(path, seal=seal)
    assert sealed.key == seal
    sealed.load()
    data[-100] ^= 1
    saved(path, bytes(data))
    with pytest.raises(BadDataError) as caught:
        sealed.load()
    assert caught.value.code == "image-changed"
    path.unlink()
    with pytest.raises(BadDataError, match="is not there"):
        sealed.load()


# Anything at all.


@settings(max_examples=120, deadline=None)
@given(seed=st.integers(0, 2**32), kind=st.sampled_from(["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"]))
def test_mutated_images_load_or_have_a_reason(tmp_path_factory: pytest.TempPathFactory, seed: int, kind: str) -> None:
    draw = random.Random(seed)
    data = bytearray(encoded(PHOTO, kind))
    for _ in range(draw.randrange(1, 8)):
        at = draw.randrange(min(len(data), draw.choice([64, 1 << 20])))
        data[at : at + draw.randrange(3)] = draw.randbytes(draw.randrange(3))
    path = saved(tmp_path_factory.getbasetemp() / "mutated.img", bytes(data))
    seen = look(path)
    assert (seen.image is None) == any(each.severity == "error" for each in seen.problems)
    assert seen.image is None or seen.image.mode == "RGB"


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=200))
def test_any_bytes_are_no_image(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    seen = look(saved(tmp_path_factory.getbasetemp() / "any.img", data))
    assert seen.image is not None or seen.problems
