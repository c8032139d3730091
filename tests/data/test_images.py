"""A chip has the pixels of the fully resized image."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sniper.chips import Chip, LevelSpec
from sniper.data.images import cut_chip, load_image, read_sides, resize_to_level
from sniper.errors import ImageError

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (131, 203, 3), dtype=np.uint8))
RULES = [LevelSpec(factor=3.0), LevelSpec(factor=1.667), LevelSpec(factor=0.4), LevelSpec(long_side=64)]


@given(st.sampled_from(RULES), st.floats(0, 1), st.floats(0, 1), st.integers(8, 96))
def test_a_chip_is_the_crop_of_the_resized_image(rule: LevelSpec, x: float, y: float, size: int) -> None:
    level = rule.at(width=NOISE.width, height=NOISE.height)
    chip = Chip(
        level=level,
        x=round(x * max(level.width - size, 0)),
        y=round(y * max(level.height - size, 0)),
        size=size,
    )
    whole = np.asarray(NOISE.resize((level.width, level.height), Image.Resampling.BILINEAR), dtype=np.int64)
    expected = np.zeros((size, size, 3), dtype=np.int64)
    crop = whole[chip.y : chip.y + size, chip.x : chip.x + size]
    expected[: crop.shape[0], : crop.shape[1]] = crop
    assert np.abs(cut_chip(NOISE, chip).astype(np.int64) - expected).max() <= 1


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 300), (300, 1), (400, 20)])
def test_the_thinnest_images_are_cut_and_padded(width: int, height: int) -> None:
    image = Image.new("RGB", (width, height), (200, 100, 50))
    for rule in RULES:
        level = rule.at(width=width, height=height)
        pixels = cut_chip(image, Chip(level=level, x=0, y=0, size=64))
        shown_width, shown_height = min(64, level.width), min(64, level.height)
        assert (pixels[:shown_height, :shown_width] == (200, 100, 50)).all()
        assert pixels[shown_height:].sum() == 0
        assert pixels[:, shown_width:].sum() == 0


def test_a_whole_image_has_the_sides_of_its_level() -> None:
    level = RULES[1].at(width=NOISE.width, height=NOISE.height)
    assert resize_to_level(NOISE, level).shape == (level.height, level.width, 3)


def test_more_than_8_bits_are_refused_rather_than_clipped(tmp_path: Path) -> None:
    path = tmp_path / "deep.png"
    Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20) * 160).save(path)
    with pytest.raises(
        ImageError, match=r"deep\.png: has more than 8 bits a channel \(mode I;16\), wanted 8"
    ):
        load_image(path)


def test_an_image_of_a_hundred_megapixels_is_read_and_one_beyond_measure_is_not(tmp_path: Path) -> None:
    Image.new("1", (12_000, 9_000)).save(tmp_path / "large.png")
    assert read_sides(tmp_path / "large.png") == (12_000, 9_000)
    Image.new("1", (40_000, 30_000)).save(tmp_path / "bomb.png")
    with pytest.raises(ImageError, match=r"bomb\.png: has 40000x30000 pixels, wanted at most 1,000,000,000"):
        read_sides(tmp_path / "bomb.png")


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_every_kind_of_image_is_read_as_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "image.tif"
    NOISE.convert(mode).save(path)
    assert load_image(path).mode == "RGB"


def test_an_image_cut_short_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cut.jpg"
    NOISE.save(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ImageError, match=r"cut\.jpg: cannot be read as an image"):
        load_image(path)


def test_an_image_that_is_absent_is_named(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"none\.jpg: cannot be read"):
        load_image(tmp_path / "none.jpg")
