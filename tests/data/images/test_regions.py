"""A chip has the pixels of the fully resized image."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sniper.chips import Chip, LevelSpec
from sniper.data.images.files import ArrayImageReader, open_image
from sniper.data.images.regions import (
    cut_chip,
    cut_window,
    read_source_pixels,
    region_of,
    render_chip,
    useful_reduction,
)

NOISE = np.random.default_rng(0).integers(0, 256, (131, 203, 3), dtype=np.uint8)
ENLARGING = [LevelSpec(factor=3.0), LevelSpec(factor=1.667), LevelSpec(factor=1.0)]
SHRINKING = [LevelSpec(factor=0.9), LevelSpec(factor=0.4), LevelSpec(long_side=64)]


def resized(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR), np.int64)


def chip_at(rule: LevelSpec, image: np.ndarray, *, x: float, y: float, size: int) -> Chip:
    level = rule.at(width=image.shape[1], height=image.shape[0])
    return Chip(
        level=level,
        x=round(x * max(level.width - size, 0)),
        y=round(y * max(level.height - size, 0)),
        width=size,
        height=size,
    )


@given(st.sampled_from(ENLARGING + SHRINKING), st.floats(0, 1), st.floats(0, 1), st.integers(8, 96))
def test_a_chip_is_a_crop_of_the_resized_image(rule: LevelSpec, x: float, y: float, size: int) -> None:
    chip = chip_at(rule, NOISE, x=x, y=y, size=size)
    crop = resized(NOISE, chip.level.width, chip.level.height)[chip.y : chip.y + size, chip.x : chip.x + size]
    expected = np.zeros((size, size, 3), dtype=np.int64)
    expected[: crop.shape[0], : crop.shape[1]] = crop
    assert np.abs(cut_chip(ArrayImageReader(NOISE), chip).astype(np.int64) - expected).max() <= 1


@given(st.sampled_from(ENLARGING + SHRINKING), st.floats(0, 1), st.floats(0, 1), st.integers(8, 96))
def test_source_pixels_are_few_and_render_the_chip(rule: LevelSpec, x: float, y: float, size: int) -> None:
    chip = chip_at(rule, NOISE, x=x, y=y, size=size)
    source_pixels = read_source_pixels(ArrayImageReader(NOISE), chip)
    margins = 2 * (1 + 2)  # two pixels each side, and one for rounding
    assert max(source_pixels.shape[:2]) <= size + margins
    np.testing.assert_array_equal(render_chip(source_pixels, chip), cut_chip(ArrayImageReader(NOISE), chip))


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 300), (300, 1), (400, 20)])
def test_the_thinnest_images_are_cut_and_padded(width: int, height: int) -> None:
    image = np.full((height, width, 3), (200, 100, 50), dtype=np.uint8)
    for rule in ENLARGING + SHRINKING:
        level = rule.at(width=width, height=height)
        pixels = cut_chip(ArrayImageReader(image), Chip(level=level, x=0, y=0, width=64, height=64))
        shown_width, shown_height = min(64, level.width), min(64, level.height)
        assert (pixels[:shown_height, :shown_width] == (200, 100, 50)).all()
        assert pixels[shown_height:].sum() == 0
        assert pixels[:, shown_width:].sum() == 0


@pytest.mark.parametrize("rule", ENLARGING + SHRINKING)
def test_a_window_is_a_crop_of_the_resized_image(rule: LevelSpec) -> None:
    level = rule.at(width=203, height=131)
    whole = resized(NOISE, level.width, level.height)
    for x1, y1, x2, y2 in ((0, 0, level.width, level.height), (5, 9, level.width // 2, level.height - 3)):
        shown = cut_window(ArrayImageReader(NOISE), level, (x1, y1, x2, y2)).astype(np.int64)
        assert np.abs(shown - whole[y1:y2, x1:x2]).max() <= 1


@pytest.mark.parametrize(
    ("side", "reduction"), [(100, 1), (512, 1), (2047, 1), (2048, 2), (4095, 2), (4096, 4), (30_000, 16)]
)
def test_a_reduction_leaves_the_filter_a_factor_of_two(side: int, reduction: int) -> None:
    level = LevelSpec(long_side=512).at(width=side, height=side)
    assert useful_reduction(level) == reduction


@given(st.integers(1500, 5000), st.floats(0, 1), st.floats(0, 1))
def test_a_reduced_region_starts_on_a_reduced_pixel(side: int, x: float, y: float) -> None:
    level = LevelSpec(factor=0.12).at(width=side, height=side + 7)
    chip = Chip(
        level=level, x=round(x * (level.width - 64)), y=round(y * (level.height - 64)), width=64, height=64
    )
    region = region_of(level, (chip.x, chip.y, chip.x + 64, chip.y + 64), largest_reduction=4)
    assert region.reduction == 4
    assert region.window[0] % 4 == region.window[1] % 4 == 0
    shown = (np.array([*region.box]).reshape(2, 2) * 4 + region.window[:2]).ravel()
    np.testing.assert_allclose(shown, level.to_image(chip.window[None])[0], atol=1e-6)


def draw_photo(width: int, height: int) -> Image.Image:
    """Draw an image like a photograph: areas, edges and a little noise."""
    generator = np.random.default_rng(1)
    coarse = generator.integers(0, 256, (height // 40, width // 40, 3), dtype=np.uint8)
    areas = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), np.int64)
    areas[height // 3 : height // 2, width // 4 : width // 3] = (250, 20, 20)
    noisy = areas + generator.normal(0, 4, areas.shape)
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


@pytest.mark.parametrize(("side", "reduction"), [(2100, 2), (4300, 4)])
def test_a_jpeg_decoded_smaller_is_nearly_the_same(tmp_path: Path, side: int, reduction: int) -> None:
    path = tmp_path / "large.jpg"
    draw_photo(side, side - 301).save(path, quality=92)
    level = LevelSpec(long_side=512).at(width=side, height=side - 301)
    image = open_image(path)
    assert image.largest_reduction(useful_reduction(level)) == reduction
    exact = resized(np.asarray(Image.open(path)), level.width, level.height)
    shown = cut_chip(image, Chip(level=level, x=0, y=0, width=512, height=512))[: level.height]
    difference = np.abs(shown - exact)
    assert difference.mean() < 0.5
    assert np.percentile(difference, 99.9) <= 4
    assert difference.max() <= 16
