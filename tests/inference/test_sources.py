"""An image is the same in whatever form it is given."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from sniper.data.images.files import load_image
from sniper.data.spec import ReadSpec
from sniper.errors import ImageError
from sniper.inference.sources import ImageSource, open_source

PIXELS = np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)


def pixels_of(source: ImageSource, spec: ReadSpec = ReadSpec()) -> np.ndarray:
    reader = open_source(source, spec)
    return reader.read((0, 0, reader.width, reader.height))


def content_of(image: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


FORMS: dict[str, Callable[[Path], ImageSource]] = {
    "path": lambda path: path,
    "name": str,
    "bytes": lambda path: path.read_bytes(),
    "pillow": Image.open,
    "array": lambda path: PIXELS,
    "tensor": lambda path: torch.from_numpy(PIXELS).permute(2, 0, 1),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_an_image_has_the_same_pixels(form: str, tmp_path: Path) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "image.png")
    source = FORMS[form](tmp_path / "image.png")
    np.testing.assert_array_equal(pixels_of(source), PIXELS)
    if isinstance(source, Image.Image):
        source.close()


def test_a_grey_pillow_image_becomes_rgb() -> None:
    grey = Image.fromarray(PIXELS[..., 0])
    np.testing.assert_array_equal(pixels_of(grey), np.repeat(PIXELS[..., :1], 3, axis=2))


@pytest.mark.parametrize("form", ["PNG", "TIFF", "JPEG", "BMP", "WEBP"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_bytes_are_decoded_as_the_file_is(form: str, orientation: int, tmp_path: Path) -> None:
    image = Image.fromarray(PIXELS)
    exif = image.getexif()
    exif[ExifTags.Base.Orientation] = orientation
    content = content_of(image, form, exif=exif)
    path = tmp_path / f"image.{form.lower()}"
    path.write_bytes(content)
    np.testing.assert_array_equal(pixels_of(content), load_image(path))


def test_deep_bytes_are_mapped_to_8_bits_as_the_file_is() -> None:
    deep = Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257)
    content = content_of(deep, "PNG")
    with pytest.raises(ImageError, match="image bytes: has more than 8 bits a channel"):
        open_source(content, ReadSpec())
    levels = pixels_of(content, ReadSpec(intensity_range=(0, 65_535)))
    np.testing.assert_array_equal(levels[..., 0], PIXELS[..., 0])


def test_damaged_bytes_are_refused() -> None:
    content = content_of(Image.fromarray(PIXELS), "PNG")
    damaged = content[:200] + bytes([content[200] ^ 1]) + content[201:]
    for bad in (damaged, content[:300], b"no image", b""):
        with pytest.raises(ImageError, match=r"^image bytes: cannot be read as an image"):
            open_source(bad, ReadSpec())


@pytest.mark.parametrize("bad", [PIXELS / 255, PIXELS[..., 0], PIXELS[..., :1], PIXELS.astype(np.int64)])
def test_arrays_of_another_type_or_shape_are_refused(bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"array must be uint8 of \(height, width, 3\), not .* of \(30, 50"):
        open_source(bad, ReadSpec())


@pytest.mark.parametrize("bad", [PIXELS[:0], PIXELS[:, :0], torch.zeros(3, 0, 5, dtype=torch.uint8)])
def test_images_without_pixels_are_refused(bad: np.ndarray | torch.Tensor) -> None:
    with pytest.raises(ValueError, match="an image must have pixels"):
        open_source(bad, ReadSpec())


@pytest.mark.parametrize("bad", [torch.zeros(3, 4, 5), torch.zeros(4, 5, 3, dtype=torch.uint8)])
def test_tensors_of_another_type_or_shape_are_refused(bad: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"tensor must be uint8 of \(3, height, width\), not torch\."):
        open_source(bad, ReadSpec())


@pytest.mark.parametrize("mode", ["I", "F", "I;16"])
def test_deep_pillow_images_are_refused(mode: str) -> None:
    with pytest.raises(ValueError, match="must have 8 bits a channel, not mode"):
        open_source(Image.new(mode, (4, 5)), ReadSpec())
