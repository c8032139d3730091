"""Matching: valid, invalid and ignored boxes, and the drawing of anchors."""

import pytest
import torch
from torchvision.ops import box_iou

from sniper.chips import Standing
from sniper.models.targets import Match, draw_sample, match_anchors, match_proposals

ANCHORS = torch.tensor(
    [
        [0.0, 0.0, 10.0, 10.0],
        [0.0, 0.0, 10.0, 6.0],
        [0.0, 0.0, 10.0, 4.5],
        [0.0, 0.0, 10.0, 3.0],
        [50.0, 50.0, 60.0, 60.0],
    ]
)
BOX = torch.tensor([[0.0, 0.0, 10.0, 10.0]])


def matched(boxes: torch.Tensor, standing: list[Standing], anchors: torch.Tensor = ANCHORS) -> list[int]:
    matches = match_anchors(
        anchors,
        boxes=boxes,
        standing=torch.tensor(standing, dtype=torch.int64),
        positive_iou=0.5,
        negative_iou=0.4,
        ignored_iou=0.3,
    )
    return matches.state.tolist()


P, N, I = Match.POSITIVE, Match.NEGATIVE, Match.IGNORED  # noqa: E741


def test_anchors_match_a_valid_box_by_overlap() -> None:
    assert matched(BOX, [Standing.VALID]) == [P, P, I, N, N]


def test_anchors_near_an_invalid_box_are_ignored_and_none_is_positive() -> None:
    assert matched(BOX, [Standing.INVALID]) == [I, I, I, N, N]


def test_anchors_near_or_within_an_ignored_box_are_ignored() -> None:
    assert matched(BOX, [Standing.IGNORED]) == [I, I, I, I, N]


def test_an_object_in_a_crowd_keeps_its_anchors() -> None:
    boxes = torch.cat([BOX, torch.tensor([[0.0, 0.0, 60.0, 60.0]])])
    assert matched(boxes, [Standing.VALID, Standing.IGNORED]) == [P, P, I, I, I]


def test_an_anchor_near_an_invalid_box_is_ignored_though_a_valid_one_wants_it() -> None:
    twice = BOX.repeat(2, 1)
    assert matched(twice, [Standing.VALID, Standing.INVALID]) == [I, I, I, N, N]


def test_a_box_that_no_anchor_fits_takes_the_best_there_is() -> None:
    tiny = torch.tensor([[52.0, 52.0, 54.0, 54.0]])
    assert matched(tiny, [Standing.VALID]) == [N, N, N, N, P]


def test_a_box_that_touches_no_anchor_takes_none() -> None:
    far = torch.tensor([[90.0, 90.0, 95.0, 95.0]])
    assert matched(far, [Standing.VALID]) == [N, N, N, N, N]


def test_without_boxes_every_anchor_is_negative() -> None:
    assert matched(torch.zeros(0, 4), []) == [N, N, N, N, N]


def test_the_best_anchor_of_a_box_learns_that_box() -> None:
    # The second anchor is the best for the second box though it overlaps the first box more.
    boxes = torch.tensor([[0.0, 0.0, 10.0, 11.0], [0.0, 0.0, 2.0, 3.0]])
    matches = match_anchors(
        ANCHORS[2:4],
        boxes=boxes,
        standing=torch.tensor([Standing.VALID, Standing.VALID]),
        positive_iou=0.9,
        negative_iou=0.8,
        ignored_iou=0.3,
    )
    overlaps = box_iou(boxes, ANCHORS[2:4])
    best_of_second = int(overlaps[1].argmax())
    assert matches.state[best_of_second] == Match.POSITIVE
    assert matches.box_index[best_of_second] == 1


def test_the_order_of_boxes_does_not_matter() -> None:
    generator = torch.Generator().manual_seed(0)
    low = torch.rand(40, 2, generator=generator) * 50
    anchors = torch.cat([low, low + 1 + torch.rand(40, 2, generator=generator) * 30], dim=1)
    boxes, standing = anchors[:6] + 0.7, [Standing(i % 3) for i in range(6)]
    order = [5, 2, 0, 4, 1, 3]
    assert matched(boxes, standing, anchors) == matched(boxes[order], [standing[i] for i in order], anchors)


@pytest.mark.parametrize(
    ("standing", "states"),
    [
        (Standing.VALID, [P, P, N, N, N]),
        (Standing.INVALID, [P, P, N, N, N]),
        (Standing.IGNORED, [I, I, I, I, N]),
    ],
)
def test_proposals_match_every_object_valid_or_not(standing: Standing, states: list[int]) -> None:
    matches = match_proposals(ANCHORS, boxes=BOX, standing=torch.tensor([standing]), positive_iou=0.5)
    assert matches.state.tolist() == states


def test_a_proposal_on_an_object_counts_though_it_lies_in_a_crowd() -> None:
    boxes = torch.tensor([[0.0, 0.0, 30.0, 30.0], [0.0, 0.0, 10.0, 10.0]])
    standing = torch.tensor([Standing.IGNORED, Standing.VALID])
    matches = match_proposals(ANCHORS, boxes=boxes, standing=standing, positive_iou=0.5)
    assert matches.state.tolist() == [P, P, I, I, N]
    assert matches.box_index[:2].tolist() == [1, 1]


def test_no_proposals_match_nothing() -> None:
    matches = match_proposals(
        torch.zeros(0, 4), boxes=BOX, standing=torch.tensor([Standing.VALID]), positive_iou=0.5
    )
    assert matches.state.shape == (0,)


@pytest.mark.parametrize(
    ("num_positive", "num_negative", "drawn_positive", "drawn_negative"),
    [(100, 100, 10, 10), (3, 100, 3, 17), (100, 3, 10, 3), (0, 100, 0, 20), (0, 0, 0, 0)],
)
def test_the_sample_has_at_most_half_positives(
    num_positive: int, num_negative: int, drawn_positive: int, drawn_negative: int
) -> None:
    state = torch.tensor([P] * num_positive + [N] * num_negative + [I] * 50)
    generator = torch.Generator().manual_seed(0)
    drawn = draw_sample(state, count=20, positive_share=0.5, generator=generator)
    assert int((drawn & (state == P)).sum()) == drawn_positive
    assert int((drawn & (state == N)).sum()) == drawn_negative
    assert not (drawn & (state == I)).any()
