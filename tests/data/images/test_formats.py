"""Image files are recognized by suffix, and by content where they have none."""

from pathlib import Path

import pytest
from PIL import Image

from sniper.data.images.encoded import has_image_content
from sniper.data.images.files import load_image
from sniper.data.images.formats import image_suffixes


def test_suffixes_are_those_of_formats_that_are_decoded() -> None:
    suffixes = image_suffixes()
    assert {".jpg", ".jfif", ".jpe", ".mpo", ".png", ".tif", ".jp2", ".webp", ".ppm", ".tga"} <= suffixes
    assert not {".pdf", ".eps", ".ps", ".mpg", ".flc", ".h5", ".grib", ".wmf", ".txt", ".json"} & suffixes


@pytest.mark.parametrize(
    "suffix", [".jfif", ".mpo", ".png", ".tif", ".webp", ".bmp", ".gif", ".ppm", ".tga", ".jp2"]
)
def test_an_image_of_any_such_suffix_is_read(tmp_path: Path, suffix: str) -> None:
    Image.new("RGB", (12, 8), "red").save(tmp_path / f"a{suffix}")
    assert load_image(tmp_path / f"a{suffix}").shape == (8, 12, 3)


@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "TIFF", "WEBP", "BMP", "GIF", "PPM", "JPEG2000"])
def test_the_content_of_an_image_is_recognized(tmp_path: Path, format_name: str) -> None:
    Image.new("RGB", (12, 8)).save(tmp_path / "a", format_name)
    assert has_image_content(tmp_path / "a")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"P",
        b"Python is a language",
        b"#define A 1\n",
        b"%!PS-Adobe-3.0 EPSF-3.0\n",
        b"\x89PNG\r\n",
        b"\0" * 600,
    ],
)
def test_the_content_of_other_files_is_not(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a").write_bytes(content)
    assert not has_image_content(tmp_path / "a")
