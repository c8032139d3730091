"""The synthetic data set: its bytes, sizes, kinds and boxes."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sniper.data.datasets import load_dataset
from sniper.demo.shapes import (
    CLASSES,
    DISTRACTORS,
    Shape,
    ShapesSpec,
    draw_shapes,
    paint_background,
    paint_shapes,
    place_shapes,
    rasterize,
)
from sniper.geometry.boxes import Sides, area, intersections, size

SMALL = ShapesSpec(num_images=3, min_side=200, max_side=300, max_size=90.0)
KINDS = {**CLASSES, **DISTRACTORS}
SIDES = Sides(width=300, height=300)


def place_in_images(num_images: int = 60) -> list[tuple[Shape, ...]]:
    """Return the shapes of many images of 1200x900 pixels."""
    generators = (np.random.default_rng([5, index]) for index in range(num_images))
    return [place_shapes(ShapesSpec(), Sides(1200, 900), generator=generator) for generator in generators]


def boxes_of(shapes: tuple[Shape, ...] | list[Shape]) -> np.ndarray:
    return np.array([shape.box for shape in shapes]).reshape(-1, 4)


def single_shape(kind: str, *, side: float) -> Shape:
    """Return a shape of about this size in the middle of an image of 300x300 pixels, a little off the grid."""
    rings = KINDS[kind](np.random.default_rng(0))
    return Shape(kind=kind, rings=tuple(ring * (side / 2) + np.array([150.3, 149.6]) for ring in rings))


def test_equal_seeds_give_equal_bytes(tmp_path: Path) -> None:
    paths = [draw_shapes(tmp_path / folder, spec=SMALL, seed=4) for folder in "ab"]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    for index in range(SMALL.num_images):
        first, second = (path.parent / "images" / f"train_{index:03d}.jpg" for path in paths)
        assert first.read_bytes() == second.read_bytes()


def test_another_seed_gives_other_images(tmp_path: Path) -> None:
    first, second = (draw_shapes(tmp_path / str(seed), spec=SMALL, seed=seed) for seed in (1, 2))
    assert first.read_bytes() != second.read_bytes()


def test_the_first_images_do_not_depend_on_their_number(tmp_path: Path) -> None:
    few, many = (
        draw_shapes(
            tmp_path / str(count), spec=ShapesSpec(num_images=count, max_size=100, min_side=200), seed=1
        )
        for count in (1, 2)
    )
    images = [path.parent / "images" / "train_000.jpg" for path in (few, many)]
    assert images[0].read_bytes() == images[1].read_bytes()


def test_the_data_set_loads_without_warnings(tmp_path: Path) -> None:
    path = draw_shapes(tmp_path, spec=SMALL, seed=4, name="test")
    assert path == tmp_path / "test.json"
    dataset = load_dataset(path)
    assert dataset.warnings == ()
    assert [category.name for category in dataset.categories] == list(CLASSES)
    assert dataset[0].path == tmp_path / "images" / "test_000.jpg"
    assert (dataset.areas <= area(dataset.boxes) + 1).all()


def test_two_splits_share_a_folder(tmp_path: Path) -> None:
    for seed, name in enumerate(("train", "test")):
        draw_shapes(tmp_path, spec=SMALL, seed=seed, name=name)
    assert len(list((tmp_path / "images").iterdir())) == 2 * SMALL.num_images


def test_distractors_have_no_annotations(tmp_path: Path) -> None:
    spec = ShapesSpec(
        num_images=2, min_side=200, max_size=90, min_objects=0, max_objects=0, min_distractors=5
    )
    content = json.loads(draw_shapes(tmp_path, spec=spec, seed=0).read_text())
    assert len(content["images"]) == 2
    assert content["annotations"] == []


def test_a_data_set_may_be_empty(tmp_path: Path) -> None:
    assert len(load_dataset(draw_shapes(tmp_path, spec=ShapesSpec(num_images=0), seed=0))) == 0


@pytest.mark.parametrize("kinds", [CLASSES, DISTRACTORS], ids=["objects", "distractors"])
def test_sizes_are_spread_evenly_in_their_logarithm(kinds: dict[str, object]) -> None:
    shapes = [shape for image in place_in_images() for shape in image if shape.kind in kinds]
    sizes = size(boxes_of(shapes))
    assert sizes.min() >= 8.0 - 1e-6
    assert sizes.max() <= 400.0 + 1e-6
    counts, _ = np.histogram(np.log(sizes), bins=6, range=(np.log(8), np.log(400)))
    assert counts.min() > 0.8 * counts.mean()
    assert counts.max() < 1.2 * counts.mean()


def test_classes_and_distractors_are_equally_frequent() -> None:
    counts = Counter(shape.kind for image in place_in_images() for shape in image)
    assert counts.keys() == KINDS.keys()
    for kinds in (CLASSES, DISTRACTORS):
        numbers = [counts[kind] for kind in kinds]
        assert min(numbers) > 0.5 * max(numbers)


@given(st.integers(0, 2**32), st.floats(8, 60))
@settings(max_examples=20)
def test_shapes_hardly_overlap(seed: int, max_size: float) -> None:
    spec = ShapesSpec(min_side=120, max_size=max_size, min_objects=20, max_objects=60)
    shapes = place_shapes(spec, Sides(150, 120), generator=np.random.default_rng(seed))
    boxes = boxes_of(shapes)
    shared = intersections(boxes, boxes)
    np.fill_diagonal(shared, 0.0)
    assert (shared <= 0.05 * np.minimum(area(boxes)[:, None], area(boxes)[None, :])).all()


def test_a_few_shapes_extend_over_the_border_by_less_than_half() -> None:
    boxes = boxes_of([shape for image in place_in_images() for shape in image])
    inside = np.clip(boxes, 0, [1200, 900, 1200, 900])
    visibility = area(inside) / area(boxes)
    assert 0.01 < (visibility < 1).mean() < 0.08
    assert visibility.min() > 0.5


def test_the_smaller_shapes_stand_in_groups() -> None:
    spec = ShapesSpec(min_objects=40, max_objects=40, num_groups=2, grouped_below=40.0)
    for seed in range(5):
        boxes = boxes_of(place_shapes(spec, Sides(1500, 1200), generator=np.random.default_rng(seed)))
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2
        grouped = centres[size(boxes) < 40]
        distances = np.linalg.norm(grouped[:, None] - grouped[None], axis=2)
        # Of two groups, each member has about half of the others nearby; scattered shapes have 2 %.
        assert ((distances < 200).mean(axis=1) > 0.3).all()
        scattered = centres[size(boxes) >= 40]
        assert np.ptp(scattered, axis=0).min() > 600


@pytest.mark.parametrize("side", [8, 30, 120])
@pytest.mark.parametrize("kind", KINDS)
def test_the_box_is_tight_around_the_pixels_that_change(kind: str, side: int) -> None:
    shape = single_shape(kind, side=side)
    background = paint_background(SIDES, generator=np.random.default_rng(1))
    picture = paint_shapes(background, [shape], generator=np.random.default_rng(2))
    change = np.abs(np.asarray(picture, dtype=int) - np.asarray(background, dtype=int)).max(axis=2) > 8
    rows, columns = np.flatnonzero(change.any(axis=1)), np.flatnonzero(change.any(axis=0))
    changed = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    box = rasterize(shape).box
    np.testing.assert_allclose(box, changed, atol=1.0)
    overhang = (box - shape.box) * (-1, -1, 1, 1)
    assert (overhang >= 0).all()
    assert (overhang <= 0.25).all()


def test_a_hole_shows_the_background() -> None:
    background = paint_background(SIDES, generator=np.random.default_rng(1))
    picture = paint_shapes(
        background, [single_shape("hollow star", side=80)], generator=np.random.default_rng(2)
    )
    assert picture.getpixel((150, 150)) == background.getpixel((150, 150))


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("seed", range(5))
def test_an_object_contrasts_with_its_background(kind: str, seed: int) -> None:
    generator = np.random.default_rng(seed)
    background = paint_background(SIDES, generator=generator)
    shape = single_shape(kind, side=12)
    picture = paint_shapes(background, [shape], generator=generator)
    raster = rasterize(shape)
    window = (raster.x, raster.y, raster.x + raster.mask.width, raster.y + raster.mask.height)
    is_covered = np.asarray(raster.mask) == 255
    brightness = [
        np.asarray(image.crop(window).convert("L"), dtype=float)[is_covered]
        for image in (picture, background)
    ]
    assert abs(brightness[0].mean() - brightness[1].mean()) > 40


@given(st.integers(1, 400), st.integers(1, 400), st.integers(0, 2**32))
@settings(max_examples=25)
def test_a_background_has_the_given_sides(width: int, height: int, seed: int) -> None:
    background = paint_background(Sides(width, height), generator=np.random.default_rng(seed))
    assert (background.mode, background.size) == ("RGB", (width, height))


def test_backgrounds_of_a_small_range_are_near_grey() -> None:
    means = [
        np.asarray(paint_background(SIDES, generator=np.random.default_rng(seed), colour_range=share)).mean(
            axis=(0, 1)
        )
        for share in (0.0, 1.0)
        for seed in range(8)
    ]
    near, far = np.abs(np.array(means) - 127.5).reshape(2, -1).mean(axis=1)
    assert near < 20 < far


def test_painting_leaves_the_background_unchanged() -> None:
    background = Image.new("RGB", (300, 300), "grey")
    paint_shapes(background, [single_shape("disc", side=50)], generator=np.random.default_rng(0))
    assert background.getcolors() == [(300 * 300, (128, 128, 128))]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_images": -1}, "num_images must not be negative, not -1"),
        ({"min_side": 900, "max_side": 800}, "min_side <= max_side, got 900, 800"),
        ({"min_objects": 5, "max_objects": 4}, "min_objects <= max_objects, got 5, 4"),
        ({"min_distractors": -1}, "min_distractors <= max_distractors, got -1"),
        ({"min_size": 0.0}, r"0 < min_size <= max_size <= min_side / 2, got 0.0, 400.0 and 1000"),
        ({"num_groups": -1}, "num_groups must not be negative, not -1"),
        ({"background_range": 1.5}, "background_range must be from 0 to 1, not 1.5"),
        ({"max_size": 501.0}, r"max_size <= min_side / 2, got 8.0, 501.0 and 1000"),
    ],
)
def test_an_invalid_spec_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShapesSpec(**fields)
