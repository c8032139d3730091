"""What a chip teaches, box by box."""

import numpy as np
import pytest

from sniper.chips import BoxStatus, Chip, LevelSpec, assign_targets

CHIP = Chip(
    level=LevelSpec(factor=2.0, at_least=10, below=50).at(width=400, height=400),
    x=100,
    y=100,
    width=200,
    height=200,
)


@pytest.mark.parametrize(
    ("box", "is_crowd", "is_moved_here", "status"),
    [
        ([60, 60, 80, 80], False, False, BoxStatus.VALID),
        (
            [60, 60, 69, 69],
            False,
            False,
            BoxStatus.OUT_OF_RANGE,
        ),  # smaller than the range, as seen in the image
        ([60, 60, 110, 110], False, False, BoxStatus.OUT_OF_RANGE),  # as large as the first size too large
        ([60, 60, 110, 110], False, True, BoxStatus.VALID),  # passed on from a finer level
        ([60, 60, 80, 80], True, False, BoxStatus.IGNORE),  # a crowd
        ([60, 60, 80, 80], True, True, BoxStatus.IGNORE),
        ([40, 60, 70, 90], False, False, BoxStatus.VALID),  # cut, but 40 chip pixels are left
        ([40, 60, 54, 90], False, False, BoxStatus.IGNORE),  # cut to a sliver of 8 chip pixels
        ([145, 145, 165, 165], False, False, BoxStatus.VALID),  # cut at the corner to 10 x 10: just enough
        ([60, 60, 90, 60.9], False, True, BoxStatus.IGNORE),  # less than one image pixel high
    ],
)
def test_a_box_stands_like_this(
    box: list[float], is_crowd: bool, is_moved_here: bool, status: BoxStatus
) -> None:
    target = assign_targets(
        CHIP,
        boxes=np.array([box], dtype=np.float64),
        labels=np.array([3]),
        is_crowd=np.array([is_crowd]),
        is_moved_here=np.array([is_moved_here]),
    )
    assert target.status.tolist() == [status]
    assert target.labels.tolist() == [3]


def test_a_negative_chip_sets_its_objects_aside_and_ignores_crowds() -> None:
    target = assign_targets(
        CHIP,
        boxes=np.array([[60.0, 60, 80, 80], [60, 60, 69, 69], [60, 60, 80, 80]]),
        labels=np.array([0, 0, 0]),
        is_crowd=np.array([False, False, True]),
        is_moved_here=np.array([False, True, False]),
        is_negative=True,
    )
    assert target.status.tolist() == [
        BoxStatus.IN_NEGATIVE_CHIP,
        BoxStatus.IN_NEGATIVE_CHIP,
        BoxStatus.IGNORE,
    ]


def test_a_whole_box_stays_valid_however_small() -> None:
    chip = Chip(
        level=LevelSpec(factor=1.0, below=50).at(width=400, height=400), x=0, y=0, width=200, height=200
    )
    flag = np.array([False])
    target = assign_targets(
        chip,
        boxes=np.array([[5.0, 5.0, 8.0, 8.0]]),
        labels=np.array([0]),
        is_crowd=flag,
        is_moved_here=flag,
    )
    assert target.status.tolist() == [BoxStatus.VALID]


def test_boxes_are_moved_scaled_and_clipped_and_those_outside_left_out() -> None:
    boxes = np.array([[40.0, 60.0, 70.0, 90.0], [0.0, 0.0, 50.0, 50.0], [150.0, 150.0, 160.0, 160.0]])
    none = np.zeros(3, dtype=bool)
    target = assign_targets(CHIP, boxes=boxes, labels=np.arange(3), is_crowd=none, is_moved_here=none)
    assert target.boxes.tolist() == [[0.0, 20.0, 40.0, 80.0]]
    assert target.labels.tolist() == [0]


def test_a_chip_without_boxes_teaches_none() -> None:
    none = np.zeros(0, dtype=bool)
    labels = np.zeros(0, dtype=np.int64)
    target = assign_targets(CHIP, boxes=np.zeros((0, 4)), labels=labels, is_crowd=none, is_moved_here=none)
    assert target.boxes.shape == (0, 4)
