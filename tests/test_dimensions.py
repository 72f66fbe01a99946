"""An image's width and height from its header are those of the loaded image."""

from __future__ import annotations

import pytest
from PIL import Image

import tiny
from peft_mllm.data.images import FileImage
from peft_mllm.data.problems import BadDataError


@pytest.mark.parametrize("orientation", range(9))
@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tiff"])
def test_they_are_the_upright_images(tmp_path, kind, orientation):
    path = tmp_path / f"a.{kind}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (40, 20), "red").save(path, exif=exif)
    image = FileImage(path)
    assert image.dimensions == image.load().size
    assert image.dimensions == ((20, 40) if orientation in (5, 6, 7, 8) else (40, 20))


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "I;16", "CMYK"])
def test_the_mode_does_not_matter(tmp_path, mode):
    path = tmp_path / ("a.tiff" if mode == "CMYK" else "a.png")
    Image.new(mode, (9, 31)).save(path)
    assert FileImage(path).dimensions == (9, 31) == FileImage(path).load().size


def test_nothing_is_decoded(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    Image.new("RGB", (40, 20)).save(path)
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("decoded"))
    assert FileImage(path).dimensions == (40, 20)


def test_a_changed_file_is_measured_again(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (40, 20)).save(path)
    image = FileImage(path)
    assert image.dimensions == (40, 20)
    Image.new("RGB", (50, 25)).save(path)
    assert image.dimensions == (50, 25)


def test_what_cannot_be_opened_says_why(tmp_path):
    with pytest.raises(BadDataError, match=r"a\.png"):
        _ = FileImage(tmp_path / "a.png").dimensions
    (tmp_path / "b.png").write_text("not a picture")
    with pytest.raises(BadDataError, match=r"b\.png"):
        _ = FileImage(tmp_path / "b.png").dimensions


def test_any_other_source_says_what_it_loads():
    assert tiny.Picture(1, (31, 17)).dimensions == (31, 17)
