"""The status of boxes in a chip, and the targets of a batch of chips."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sniper.chips import BoxStatus, Chip, ChipTarget, ChipTargets, LevelSpec, assign_targets
from sniper.chips.targets import stack_targets

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
        ([60, 60, 69, 69], False, False, BoxStatus.OUT_OF_RANGE),  # too small, in image pixels
        ([60, 60, 110, 110], False, False, BoxStatus.OUT_OF_RANGE),  # exactly the upper end of the range
        ([60, 60, 110, 110], False, True, BoxStatus.VALID),  # moved here from a finer level
        ([60, 60, 80, 80], True, False, BoxStatus.IGNORE),  # a crowd
        ([60, 60, 80, 80], True, True, BoxStatus.IGNORE),
        ([40, 60, 70, 90], False, False, BoxStatus.VALID),  # cut, but 40 chip pixels are left
        ([40, 60, 54, 90], False, False, BoxStatus.IGNORE),  # cut to a sliver of 8 chip pixels
        ([145, 145, 165, 165], False, False, BoxStatus.VALID),  # cut at the corner to 10 x 10: just enough
        ([60, 60, 90, 60.9], False, True, BoxStatus.IGNORE),  # less than one image pixel high
    ],
)
def test_the_status_of_a_box(
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


def test_a_negative_chip_has_no_valid_boxes_and_ignores_crowds() -> None:
    target = assign_targets(
        CHIP,
        boxes=np.array([[60.0, 60, 80, 80], [60, 60, 69, 69], [60, 60, 80, 80]]),
        labels=np.array([0, 0, 0]),
        is_crowd=np.array([False, False, True]),
        is_moved_here=np.array([False, True, False]),
        is_negative=True,
    )
    assert target.status.tolist() == [
        BoxStatus.OUT_OF_RANGE,
        BoxStatus.OUT_OF_RANGE,
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


def test_boxes_are_brought_into_the_chip_and_those_outside_left_out() -> None:
    boxes = np.array([[40.0, 60.0, 70.0, 90.0], [0.0, 0.0, 50.0, 50.0], [150.0, 150.0, 160.0, 160.0]])
    none = np.zeros(3, dtype=bool)
    target = assign_targets(CHIP, boxes=boxes, labels=np.arange(3), is_crowd=none, is_moved_here=none)
    assert target.boxes.tolist() == [[0.0, 20.0, 40.0, 80.0]]
    assert target.labels.tolist() == [0]


def test_an_image_without_boxes_has_an_empty_target() -> None:
    none = np.zeros(0, dtype=bool)
    labels = np.zeros(0, dtype=np.int64)
    target = assign_targets(CHIP, boxes=np.zeros((0, 4)), labels=labels, is_crowd=none, is_moved_here=none)
    assert target.boxes.shape == (0, 4)


def stack_random(counts: list[int], *, seed: int) -> tuple[list[ChipTarget], ChipTargets[np.ndarray]]:
    generator = np.random.default_rng(seed)
    targets = [
        ChipTarget(
            boxes=generator.integers(0, 99, (count, 4)).astype(np.float64),
            labels=generator.integers(0, 9, count),
            status=generator.integers(0, BoxStatus.PADDING, count),
        )
        for count in counts
    ]
    valid_sizes = [(0.0, np.inf)] * len(counts)
    return targets, stack_targets(targets, valid_sizes=valid_sizes, seeds=range(len(counts)))


COUNTS = st.lists(st.integers(0, 6), min_size=1, max_size=4)


@given(counts=COUNTS, seed=st.integers(0, 100))
def test_stacked_targets_start_with_the_valid_boxes_and_end_with_padding(
    counts: list[int], seed: int
) -> None:
    _, stacked = stack_random(counts, seed=seed)
    assert stacked.boxes.shape == (len(counts), 8, 4)
    for status, num_boxes, num_valid in zip(
        stacked.status, stacked.num_boxes, stacked.num_valid, strict=True
    ):
        assert (status[:num_valid] == BoxStatus.VALID).all()
        assert not (status[num_valid:] == BoxStatus.VALID).any()
        assert not (status[:num_boxes] == BoxStatus.PADDING).any()
        assert (status[num_boxes:] == BoxStatus.PADDING).all()


def test_a_part_of_the_targets_contains_the_chips_of_its_range() -> None:
    _, stacked = stack_random([2, 0, 3, 1], seed=0)
    part = stacked.part(1, 3)
    assert len(part) == 2
    assert (part.num_boxes, part.num_valid, part.seeds) == ((0, 3), stacked.num_valid[1:3], (1, 2))
    for name in ("boxes", "labels", "status", "valid_sizes"):
        np.testing.assert_array_equal(getattr(part, name), getattr(stacked, name)[1:3])


def test_mapping_changes_every_array_and_nothing_else() -> None:
    _, stacked = stack_random([2, 1], seed=0)
    mapped = stacked.map(lambda array: array + 1)
    for name in ("boxes", "labels", "status", "valid_sizes"):
        np.testing.assert_array_equal(getattr(mapped, name), getattr(stacked, name) + 1)
    assert (mapped.num_boxes, mapped.num_valid, mapped.seeds) == (
        stacked.num_boxes,
        stacked.num_valid,
        stacked.seeds,
    )
