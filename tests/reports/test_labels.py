"""Labels of boxes: beside their boxes, in the picture, and over no other box or label."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sniper.geometry.boxes import area, intersections
from sniper.reports.labels import Label, place_labels

WIDTH, HEIGHT = 300, 200


def measure(text: str) -> tuple[int, int]:
    return 8 * len(text), 12


def place(boxes: np.ndarray, texts: list[list[str]]) -> list[Label]:
    return place_labels(boxes, texts, measure=measure, width=WIDTH, height=HEIGHT)


@given(st.integers(0, 10_000), st.integers(0, 40), st.sampled_from([10, 40, 150]))
def test_labels_stay_inside_and_cover_neither_labels_nor_boxes(seed: int, count: int, side: int) -> None:
    rng = np.random.default_rng(seed)
    low = rng.uniform(-10, [WIDTH - 5, HEIGHT - 5], (count, 2)).round()
    boxes = np.concatenate([low, low + rng.uniform(2, side, (count, 2)).round()], axis=1)
    labels = place(boxes, [["name 0.50", "0.50"]] * count)
    grounds = np.array([label.box for label in labels]).reshape(-1, 4)
    assert (grounds >= 0).all()
    assert (grounds <= [WIDTH, HEIGHT, WIDTH, HEIGHT]).all()
    assert not np.triu(intersections(grounds, grounds), 1).any()
    covered = intersections(grounds, boxes)
    is_inside = covered >= area(grounds)[:, None]
    assert (is_inside | (covered == 0)).all()
    assert (covered <= 0.1 * area(boxes)).all()
    assert len({label.index for label in labels}) == len(labels)


@pytest.mark.parametrize(
    ("box", "ground"),
    [
        ((50, 50, 90, 90), (50, 38, 90, 50)),  # above
        ((270, 50, 290, 70), (250, 38, 290, 50)),  # above, to the left
        ((50, 0, 90, 40), (50, 40, 90, 52)),  # below
        ((0, 0, 300, 200), (0, 0, 40, 12)),  # inside a large box
        ((-20, -9, 300, 210), (0, 0, 40, 12)),  # of a box that leaves the picture
    ],
)
def test_a_label_is_beside_its_box(box: tuple[int, ...], ground: tuple[int, ...]) -> None:
    (label,) = place(np.array([box], dtype=float), [["a 0.5"]])
    assert label.box.tolist() == list(ground)


def test_a_label_without_a_place_is_shortened_or_left_out() -> None:
    row = np.array([[x, 0.0, x + 60.0, 188.0] for x in range(0, 300, 60)])
    labels = place(row, [["longer 0.50", "0.50"]] * 5)  # 88 px and 32 px, below boxes of 60 px
    assert [label.text for label in labels] == ["longer 0.50", "0.50", "longer 0.50", "0.50", "0.50"]
    assert [label.index for label in place(row, [["x" * 30]] * 5)] == [0]
    assert place(row, [["x" * 38]] * 5) == []
    assert place(row[:1], [[]]) == []


def test_the_first_boxes_are_labelled_first() -> None:
    boxes = np.array([[100.0, 100, 120, 120], [100.0, 121, 120, 141], [100.0, 79, 120, 99]])
    assert [label.index for label in place(boxes, [["0.5"]] * 3)] == [1, 2]
    assert place(boxes[[1]], [["0.5"]])[0].index == 0
