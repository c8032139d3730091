"""Matching: valid, invalid and ignored boxes, and the drawing of anchors."""

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou

from sniper.chips import BoxStatus, Chip, LevelSpec, assign_targets
from sniper.models.targets import Match, Matches, match_anchors, match_proposals, sample_anchors

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


def matched(boxes: torch.Tensor, status: list[BoxStatus], anchors: torch.Tensor = ANCHORS) -> list[int]:
    """Match beside a chip that has more boxes and one that has none; neither may matter."""
    absent = torch.zeros(2, 4)
    others = torch.tensor([[0.0, 0.0, 10.0, 10.0], [50.0, 50.0, 60.0, 60.0]])
    least = max(len(boxes), 2)
    rows = [torch.cat([one, torch.zeros(least - len(one), 4)]) for one in (others, boxes, absent)]
    flags = [[BoxStatus.VALID, BoxStatus.IGNORE], status, []]
    padded = [[*one, *([BoxStatus.PADDING] * (least - len(one)))] for one in flags]
    matches = match_anchors(
        anchors,
        boxes=torch.stack(rows),
        status=torch.tensor(padded, dtype=torch.int64),
        num_boxes=[2, len(boxes), 0],
        positive_iou=0.5,
        negative_iou=0.4,
        ignored_iou=0.3,
    )
    assert matches.state[2].tolist() == [Match.NEGATIVE] * len(anchors)
    return matches.state[1].tolist()


def matched_proposals(proposals: torch.Tensor, boxes: torch.Tensor, status: list[BoxStatus]) -> Matches:
    return match_proposals(
        proposals,
        chips=torch.ones(len(proposals), dtype=torch.int64),
        boxes=torch.stack([torch.zeros_like(boxes), boxes]),
        status=torch.tensor([[BoxStatus.PADDING] * len(boxes), status]),
        positive_iou=0.5,
    )


P, N, I = Match.POSITIVE, Match.NEGATIVE, Match.IGNORED  # noqa: E741


def test_anchors_match_a_valid_box_by_overlap() -> None:
    assert matched(BOX, [BoxStatus.VALID]) == [P, P, I, N, N]


def test_anchors_near_an_invalid_box_are_ignored_and_none_is_positive() -> None:
    assert matched(BOX, [BoxStatus.OUT_OF_RANGE]) == [I, I, I, N, N]


def test_anchors_near_or_within_an_ignored_box_are_ignored() -> None:
    assert matched(BOX, [BoxStatus.IGNORE]) == [I, I, I, I, N]


def test_an_object_in_a_crowd_keeps_its_anchors() -> None:
    boxes = torch.cat([BOX, torch.tensor([[0.0, 0.0, 60.0, 60.0]])])
    assert matched(boxes, [BoxStatus.VALID, BoxStatus.IGNORE]) == [P, P, I, I, I]


def test_an_anchor_near_an_invalid_box_is_ignored_though_a_valid_one_wants_it() -> None:
    twice = BOX.repeat(2, 1)
    assert matched(twice, [BoxStatus.VALID, BoxStatus.OUT_OF_RANGE]) == [I, I, I, N, N]


def test_a_box_that_no_anchor_fits_takes_the_best_there_is() -> None:
    tiny = torch.tensor([[52.0, 52.0, 54.0, 54.0]])
    assert matched(tiny, [BoxStatus.VALID]) == [N, N, N, N, P]


def test_a_box_that_touches_no_anchor_takes_none() -> None:
    far = torch.tensor([[90.0, 90.0, 95.0, 95.0]])
    assert matched(far, [BoxStatus.VALID]) == [N, N, N, N, N]


def test_without_boxes_every_anchor_is_negative() -> None:
    assert matched(torch.zeros(0, 4), []) == [N, N, N, N, N]


def test_the_best_anchor_of_a_box_learns_that_box() -> None:
    # The second anchor is the best for the second box though it overlaps the first box more.
    boxes = torch.tensor([[0.0, 0.0, 10.0, 11.0], [0.0, 0.0, 2.0, 3.0]])
    matches = match_anchors(
        ANCHORS[2:4],
        boxes=boxes[None],
        status=torch.tensor([[BoxStatus.VALID, BoxStatus.VALID]]),
        num_boxes=[2],
        positive_iou=0.9,
        negative_iou=0.8,
        ignored_iou=0.3,
    )
    overlaps = box_iou(boxes, ANCHORS[2:4])
    best_of_second = int(overlaps[1].argmax())
    assert matches.state[0, best_of_second] == Match.POSITIVE
    assert matches.box_index[0, best_of_second] == 1


def test_the_order_of_boxes_does_not_matter() -> None:
    generator = torch.Generator().manual_seed(0)
    low = torch.rand(40, 2, generator=generator) * 50
    anchors = torch.cat([low, low + 1 + torch.rand(40, 2, generator=generator) * 30], dim=1)
    boxes, status = anchors[:6] + 0.7, [BoxStatus(i % 3) for i in range(6)]
    order = [5, 2, 0, 4, 1, 3]
    assert matched(boxes, status, anchors) == matched(boxes[order], [status[i] for i in order], anchors)


@pytest.mark.parametrize(
    ("status", "states"),
    [
        (BoxStatus.VALID, [P, P, N, N, N]),
        (BoxStatus.OUT_OF_RANGE, [P, P, N, N, N]),
        (BoxStatus.IGNORE, [I, I, I, I, N]),
    ],
)
def test_proposals_match_every_object_valid_or_not(status: BoxStatus, states: list[int]) -> None:
    matches = matched_proposals(ANCHORS, BOX, [status])
    assert matches.state.tolist() == states


def test_a_proposal_on_an_object_counts_though_it_lies_in_a_crowd() -> None:
    boxes = torch.tensor([[0.0, 0.0, 30.0, 30.0], [0.0, 0.0, 10.0, 10.0]])
    matches = matched_proposals(ANCHORS, boxes, [BoxStatus.IGNORE, BoxStatus.VALID])
    assert matches.state.tolist() == [P, P, I, I, N]
    assert matches.box_index[:2].tolist() == [1, 1]


def test_no_proposals_match_nothing() -> None:
    matches = matched_proposals(torch.zeros(0, 4), BOX, [BoxStatus.VALID])
    assert matches.state.shape == (0,)


@pytest.mark.parametrize(
    ("num_positive", "num_negative", "drawn_positive", "drawn_negative"),
    [(100, 100, 10, 10), (3, 100, 3, 17), (100, 3, 10, 3), (0, 100, 0, 20), (0, 0, 0, 0)],
)
def test_the_sample_has_at_most_half_positives(
    num_positive: int, num_negative: int, drawn_positive: int, drawn_negative: int
) -> None:
    other = [P] * 30 + [N] * (num_positive + num_negative + 20)
    state = torch.tensor([[P] * num_positive + [N] * num_negative + [I] * 50, other])
    drawn = sample_anchors(state, count=20, positive_fraction=0.5, seeds=[3, 4])
    assert (drawn & (state == P)).sum(dim=1).tolist() == [drawn_positive, 10]
    assert int((drawn & (state == N))[0].sum()) == drawn_negative
    assert not (drawn & (state == I)).any()


def test_what_is_drawn_for_a_chip_depends_on_its_own_seed_alone() -> None:
    state = torch.tensor([[P] * 30 + [N] * 60]).repeat(3, 1)
    drawn = sample_anchors(state, count=20, positive_fraction=0.5, seeds=[5, 6, 5])
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[1:2], sample_anchors(state[:1], count=20, positive_fraction=0.5, seeds=[6]))


def test_a_batch_taken_in_parts_is_matched_as_one_taken_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    low = torch.rand(5, 60, 2, generator=generator) * 50
    boxes = torch.cat([low, low + 1 + torch.rand(5, 60, 2, generator=generator) * 30], dim=2)
    status = torch.randint(5, (5, 6), generator=generator)

    def both() -> list[torch.Tensor]:
        anchors = match_anchors(
            boxes[0],
            boxes=boxes[:, :6] + 0.7,
            status=status,
            num_boxes=[6] * 5,
            positive_iou=0.5,
            negative_iou=0.4,
            ignored_iou=0.3,
        )
        chips = torch.arange(5).repeat_interleave(60)
        proposals = match_proposals(
            boxes.flatten(0, 1), chips=chips, boxes=boxes[:, :6], status=status, positive_iou=0.5
        )
        return [anchors.state, anchors.box_index, proposals.state, proposals.box_index]

    whole = both()
    monkeypatch.setattr("sniper.models.targets._MOST_PAIRS", 700)
    assert all(torch.equal(one, other) for one, other in zip(whole, both(), strict=True))


def test_a_large_box_cropped_by_a_fine_chip_gives_a_valid_small_positive() -> None:
    level = LevelSpec(factor=2.0, below=60).at(width=400, height=400)
    chip = Chip(level=level, x=0, y=0, width=128, height=128)
    large = np.array([[40.0, 10.0, 190.0, 60.0]])  # 87 px: out of the level's range
    target = assign_targets(
        chip,
        boxes=large,
        labels=np.array([3]),
        is_crowd=np.array([False]),
        is_moved_here=np.array([False]),
    )
    assert target.boxes.tolist() == [[80.0, 20.0, 128.0, 120.0]]
    assert target.status.tolist() == [BoxStatus.OUT_OF_RANGE]
    proposal = torch.tensor([[82.0, 20.0, 128.0, 118.0]])
    size = float((proposal[0, 2:] - proposal[0, :2]).prod().sqrt())
    assert level.valid_sizes[0] <= size < level.valid_sizes[1]
    matches = matched_proposals(proposal, torch.from_numpy(target.boxes).float(), [BoxStatus.OUT_OF_RANGE])
    assert matches.state.tolist() == [P]
    assert matched(torch.from_numpy(target.boxes).float(), [BoxStatus.OUT_OF_RANGE], proposal) == [I]
