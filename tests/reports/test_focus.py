"""The curve of a focus: which settings the line joins, and a picture of all."""

from pathlib import Path

import pytest
from PIL import Image

from sniper.reports.focus import best_points, draw_curve
from tests.inference.focus_points import point


@pytest.mark.parametrize(
    ("points", "best"),
    [
        ([], []),
        ([(0.5, 0.3), (0.2, 0.2), (0.4, 0.1)], [(0.2, 0.2), (0.5, 0.3)]),
        ([(0.2, 0.2), (0.2, 0.3), (0.6, 0.3)], [(0.2, 0.3)]),
    ],
)
def test_a_line_joins_the_settings_that_no_other_beats(
    points: list[tuple[float, float]], best: list[tuple[float, float]]
) -> None:
    chosen = best_points([point(*each) for each in points])
    assert [(each.time_share, each.ap) for each in chosen] == best


def test_the_curve_is_a_picture_with_a_colour_for_each_source_of_cues(tmp_path: Path) -> None:
    points = [point(1, 0.4), point(0.5, 0.39), point(0.2, 0.3), point(0.4, 0.39, "head")]
    draw_curve(points, points[3], tmp_path / "curve.png")
    with Image.open(tmp_path / "curve.png") as picture:
        colors = {color for _, color in picture.convert("RGB").getcolors(1 << 24) or []}
    assert {(0x00, 0x72, 0xB2), (0xE6, 0x9F, 0x00)} <= colors
