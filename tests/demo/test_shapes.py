"""The made-up world: its bytes, sizes, kinds and boxes."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sniper.data.datasets import load_dataset
from sniper.demo.shapes import (
    CLASSES,
    CLUTTER,
    Figure,
    ShapesSpec,
    draw_shapes,
    lay_out,
    paint,
    paint_background,
    to_ink,
)
from sniper.geometry.boxes import area, intersections, size

SMALL = ShapesSpec(num_images=3, shortest_side=200, longest_side=300, largest=90.0)
KINDS = {**CLASSES, **CLUTTER}


def laid_out(num_images: int = 60) -> list[tuple[Figure, ...]]:
    """The figures of many images of 1200x900 pixels."""
    generators = (np.random.default_rng([5, index]) for index in range(num_images))
    return [lay_out(ShapesSpec(), width=1200, height=900, generator=generator) for generator in generators]


def boxes_of(figures: tuple[Figure, ...] | list[Figure]) -> np.ndarray:
    return np.array([figure.box for figure in figures]).reshape(-1, 4)


def lone_figure(kind: str, *, side: float) -> Figure:
    """A figure of about this size in the middle of an image of 300x300 pixels, a little off the grid."""
    rings = KINDS[kind](np.random.default_rng(0))
    return Figure(kind=kind, rings=tuple(ring * (side / 2) + np.array([150.3, 149.6]) for ring in rings))


def test_equal_seeds_give_equal_bytes(tmp_path: Path) -> None:
    paths = [draw_shapes(tmp_path / folder, spec=SMALL, seed=4) for folder in "ab"]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    for index in range(SMALL.num_images):
        first, second = (path.parent / "images" / f"train_{index:03d}.jpg" for path in paths)
        assert first.read_bytes() == second.read_bytes()


def test_another_seed_gives_another_world(tmp_path: Path) -> None:
    first, second = (draw_shapes(tmp_path / str(seed), spec=SMALL, seed=seed) for seed in (1, 2))
    assert first.read_bytes() != second.read_bytes()


def test_more_images_leave_the_first_as_they_are(tmp_path: Path) -> None:
    few, many = (
        draw_shapes(
            tmp_path / str(count), spec=ShapesSpec(num_images=count, largest=100, shortest_side=200), seed=1
        )
        for count in (1, 2)
    )
    images = [path.parent / "images" / "train_000.jpg" for path in (few, many)]
    assert images[0].read_bytes() == images[1].read_bytes()


def test_the_world_is_a_data_set_without_a_fault(tmp_path: Path) -> None:
    path = draw_shapes(tmp_path, spec=SMALL, seed=4, name="test")
    assert path == tmp_path / "test.json"
    annotations = load_dataset(path)
    assert annotations.warnings == ()
    assert [category.name for category in annotations.categories] == list(CLASSES)
    assert annotations[0].path == tmp_path / "images" / "test_000.jpg"
    assert (annotations.areas <= area(annotations.boxes) + 1).all()


def test_two_parts_of_a_world_share_a_folder(tmp_path: Path) -> None:
    for seed, name in enumerate(("train", "test")):
        draw_shapes(tmp_path, spec=SMALL, seed=seed, name=name)
    assert len(list((tmp_path / "images").iterdir())) == 2 * SMALL.num_images


def test_a_world_of_clutter_has_no_annotation(tmp_path: Path) -> None:
    spec = ShapesSpec(
        num_images=2, shortest_side=200, largest=90, fewest_objects=0, most_objects=0, fewest_clutter=5
    )
    content = json.loads(draw_shapes(tmp_path, spec=spec, seed=0).read_text())
    assert len(content["images"]) == 2
    assert content["annotations"] == []


def test_a_world_may_be_empty(tmp_path: Path) -> None:
    assert len(load_dataset(draw_shapes(tmp_path, spec=ShapesSpec(num_images=0), seed=0))) == 0


@pytest.mark.parametrize("kinds", [CLASSES, CLUTTER], ids=["objects", "clutter"])
def test_sizes_are_spread_evenly_in_their_logarithm(kinds: dict[str, object]) -> None:
    figures = [figure for image in laid_out() for figure in image if figure.kind in kinds]
    sizes = size(boxes_of(figures))
    assert sizes.min() >= 8.0 - 1e-6
    assert sizes.max() <= 400.0 + 1e-6
    counts, _ = np.histogram(np.log(sizes), bins=6, range=(np.log(8), np.log(400)))
    assert counts.min() > 0.8 * counts.mean()
    assert counts.max() < 1.2 * counts.mean()


def test_every_class_and_every_clutter_appears_about_equally_often() -> None:
    counts = Counter(figure.kind for image in laid_out() for figure in image)
    assert counts.keys() == KINDS.keys()
    for kinds in (CLASSES, CLUTTER):
        numbers = [counts[kind] for kind in kinds]
        assert min(numbers) > 0.5 * max(numbers)


@given(st.integers(0, 2**32), st.floats(8, 60))
@settings(max_examples=20)
def test_figures_share_next_to_nothing(seed: int, largest: float) -> None:
    spec = ShapesSpec(shortest_side=120, largest=largest, fewest_objects=20, most_objects=60)
    figures = lay_out(spec, width=150, height=120, generator=np.random.default_rng(seed))
    boxes = boxes_of(figures)
    shared = intersections(boxes, boxes)
    np.fill_diagonal(shared, 0.0)
    assert (shared <= 0.05 * np.minimum(area(boxes)[:, None], area(boxes)[None, :])).all()


def test_a_few_figures_reach_over_the_border_but_not_by_half() -> None:
    boxes = boxes_of([figure for image in laid_out() for figure in image])
    inside = np.clip(boxes, 0, [1200, 900, 1200, 900])
    share = area(inside) / area(boxes)
    assert 0.01 < (share < 1).mean() < 0.08
    assert share.min() > 0.5


@pytest.mark.parametrize("side", [8, 30, 120])
@pytest.mark.parametrize("kind", KINDS)
def test_the_box_is_tight_around_the_pixels_that_change(kind: str, side: int) -> None:
    figure = lone_figure(kind, side=side)
    background = paint_background(300, 300, generator=np.random.default_rng(1))
    picture = paint(background, [figure], generator=np.random.default_rng(2))
    change = np.abs(np.asarray(picture, dtype=int) - np.asarray(background, dtype=int)).max(axis=2) > 8
    rows, columns = np.flatnonzero(change.any(axis=1)), np.flatnonzero(change.any(axis=0))
    seen = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    box = to_ink(figure).box
    np.testing.assert_allclose(box, seen, atol=1.0)
    overhang = (box - figure.box) * (-1, -1, 1, 1)
    assert (overhang >= 0).all()
    assert (overhang <= 0.25).all()


@pytest.mark.parametrize("kind", ["ring", "hollow square", "hollow star", "hollow triangle"])
def test_a_hole_shows_the_background(kind: str) -> None:
    background = paint_background(300, 300, generator=np.random.default_rng(1))
    picture = paint(background, [lone_figure(kind, side=80)], generator=np.random.default_rng(2))
    assert picture.getpixel((150, 150)) == background.getpixel((150, 150))


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("seed", range(5))
def test_an_object_stands_out(kind: str, seed: int) -> None:
    generator = np.random.default_rng(seed)
    background = paint_background(300, 300, generator=generator)
    figure = lone_figure(kind, side=12)
    picture = paint(background, [figure], generator=generator)
    ink = to_ink(figure)
    place = (ink.x, ink.y, ink.x + ink.mask.width, ink.y + ink.mask.height)
    is_covered = np.asarray(ink.mask) == 255
    bright = [
        np.asarray(image.crop(place).convert("L"), dtype=float)[is_covered] for image in (picture, background)
    ]
    assert abs(bright[0].mean() - bright[1].mean()) > 40


@given(st.integers(1, 400), st.integers(1, 400), st.integers(0, 2**32))
@settings(max_examples=25)
def test_a_background_has_the_size_asked_for(width: int, height: int, seed: int) -> None:
    background = paint_background(width, height, generator=np.random.default_rng(seed))
    assert (background.mode, background.size) == ("RGB", (width, height))


def test_an_image_is_not_changed_by_painting_on_it() -> None:
    background = Image.new("RGB", (300, 300), "grey")
    paint(background, [lone_figure("disc", side=50)], generator=np.random.default_rng(0))
    assert background.getcolors() == [(300 * 300, (128, 128, 128))]


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"num_images": -1}, "num_images must not be negative, not -1"),
        ({"shortest_side": 900, "longest_side": 800}, "shortest_side <= longest_side, got 900, 800"),
        ({"fewest_objects": 5, "most_objects": 4}, "fewest_objects <= most_objects, got 5, 4"),
        ({"fewest_clutter": -1}, "fewest_clutter <= most_clutter, got -1"),
        ({"smallest": 0.0}, r"0 < smallest <= largest <= shortest_side / 2, got 0.0, 400.0 and 1000"),
        ({"largest": 501.0}, r"largest <= shortest_side / 2, got 8.0, 501.0 and 1000"),
    ],
)
def test_a_spec_that_cannot_be_drawn_is_refused(fields: dict[str, float], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        ShapesSpec(**fields)
