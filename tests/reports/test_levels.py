"""The picture of which level detects which object."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sniper.chips import Level, LevelSpec
from sniper.data.images.files import ArrayImageReader
from sniper.geometry import Detections
from sniper.reports.levels import draw_levels

VERMILION, YELLOW = (0xD5, 0x5E, 0x00), (0xF0, 0xE4, 0x42)
LEVELS = (LevelSpec(factor=2.0, below=48), LevelSpec(long_side=256, at_least=40))
SMALL = [[100.0, 100.0, 112.0, 112.0], [130.0, 110.0, 140.0, 125.0]]
LARGE = [[300.0, 200.0, 500.0, 420.0]]


def levels_of(width: int, height: int) -> list[Level]:
    return [level.at(width=width, height=height, index=index) for index, level in enumerate(LEVELS)]


def draw(path: Path, boxes: list[list[float]], level_of: list[int]) -> np.ndarray:
    """Draw the levels of a grey image of 800x600 pixels, and return the picture."""
    detections = Detections(
        boxes=np.array(boxes).reshape(-1, 4),
        scores=np.ones(len(boxes)),
        labels=np.zeros(len(boxes), dtype=int),
    )
    draw_levels(
        ArrayImageReader(np.full((600, 800, 3), 128, dtype=np.uint8)),
        detections,
        path / "levels.png",
        levels=levels_of(800, 600),
        level_of=np.array(level_of, dtype=int),
        title="title",
    )
    with Image.open(path / "levels.png") as picture:
        return np.asarray(picture)


def num_pixels(picture: np.ndarray, color: tuple[int, int, int]) -> int:
    return int((picture == color).all(axis=2).sum())


def test_detections_have_the_color_of_their_level(tmp_path: Path) -> None:
    both = draw(tmp_path, [*SMALL, *LARGE], [0, 0, 1])
    only_small = draw(tmp_path, SMALL, [0, 0])
    assert num_pixels(both, VERMILION) == num_pixels(only_small, VERMILION)
    assert num_pixels(both, YELLOW) > num_pixels(only_small, YELLOW) + 1000


def test_the_window_of_a_level_shows_objects_at_its_scale(tmp_path: Path) -> None:
    """A box of 12 px is 24 px at ×2, in a window that is enlarged by 1.25: 30 px, with its outline 33."""
    picture = draw(tmp_path, [SMALL[0]], [0])
    window = picture[112:428, -334:-18]  # without its frame
    rows = np.flatnonzero((window == VERMILION).all(axis=2).any(axis=1))
    assert rows.max() - rows.min() == pytest.approx(32, abs=2)


def test_an_image_without_detections_is_drawn(tmp_path: Path) -> None:
    picture = draw(tmp_path, [], [])
    assert num_pixels(picture, (128, 128, 128)) > 100_000
