"""Matching of anchors and proposals to valid, out-of-range and ignored boxes; sampling of anchors."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.ops import box_iou

from sniper.chips import BoxStatus, Chip, ChipTargets, LevelSpec, assign_targets
from sniper.models.matching import Match, Matches, match_anchors, match_proposals, sample_anchors
from tests.models.batches import build_sample, build_targets

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

V, OUT, IGN = BoxStatus.VALID, BoxStatus.OUT_OF_RANGE, BoxStatus.IGNORE
P, N, I = Match.POSITIVE, Match.NEGATIVE, Match.IGNORED  # noqa: E741


def anchor_states(
    boxes: torch.Tensor, status: Sequence[BoxStatus], anchors: torch.Tensor = ANCHORS
) -> list[int]:
    """Match the anchors of a chip that shares its batch with one of two boxes and one without boxes."""
    targets = build_targets(
        build_sample([[0.0, 0.0, 10.0, 10.0], [50.0, 50.0, 60.0, 60.0]], [V, IGN]),
        build_sample(boxes, status),
        build_sample([], []),
    )
    matches = match_anchors(anchors, targets, positive_iou=0.5, negative_iou=0.4, ignored_iou=0.3)
    assert matches.state[2].tolist() == [N] * len(anchors)
    return matches.state[1].tolist()


def match_of_second_chip(
    proposals: torch.Tensor, boxes: torch.Tensor, status: Sequence[BoxStatus]
) -> tuple[Matches, ChipTargets[torch.Tensor]]:
    targets = build_targets(build_sample([], []), build_sample(boxes, status))
    chips = torch.ones(len(proposals), dtype=torch.int64)
    return match_proposals(proposals, targets, chips=chips, positive_iou=0.5), targets


def random_boxes(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(*shape, 2, generator=generator) * 50
    return torch.cat([low, low + 1 + torch.rand(*shape, 2, generator=generator) * 30], dim=-1)


@given(seed=st.integers(0, 1000))
def test_torchvision_computes_iou_by_the_plain_formula_bit_for_bit(seed: int) -> None:
    candidates, boxes = random_boxes(3, 40, seed=seed), random_boxes(3, 7, seed=seed + 1)
    x1, y1, x2, y2 = candidates[:, :, None].unbind(-1)  # (3, 40, 1)
    u1, v1, u2, v2 = boxes[:, None].unbind(-1)  # (3, 1, 7)
    width = (torch.minimum(x2, u2) - torch.maximum(x1, u1)).clamp(min=0)
    height = (torch.minimum(y2, v2) - torch.maximum(y1, v1)).clamp(min=0)
    union = (x2 - x1) * (y2 - y1) + (u2 - u1) * (v2 - v1) - width * height
    assert torch.equal(box_iou(candidates, boxes), width * height / union)


INSIDE = torch.tensor([[0.0, 0.0, 60.0, 60.0]])  # all anchors lie inside
INSIDE_LAST = torch.tensor([[52.0, 52.0, 54.0, 54.0]])
FAR = torch.tensor([[90.0, 90.0, 95.0, 95.0]])


@pytest.mark.parametrize(
    ("boxes", "status", "states"),
    [
        (torch.zeros(0, 4), [], [N, N, N, N, N]),
        (BOX, [V], [P, P, I, N, N]),
        (BOX, [OUT], [I, I, I, N, N]),
        (BOX, [IGN], [I, I, I, I, N]),  # the fourth lies inside
        (torch.cat([BOX, INSIDE]), [V, IGN], [P, P, I, I, I]),  # an object in a crowd keeps its anchors
        (BOX.repeat(2, 1), [V, OUT], [I, I, I, N, N]),  # the same overlap with a valid box does not help
        (INSIDE_LAST, [V], [N, N, N, N, P]),  # the best anchor, however low its IoU
        (FAR, [V], [N, N, N, N, N]),  # overlaps no anchor
    ],
)
def test_anchors_match_by_iou_and_status(
    boxes: torch.Tensor, status: list[BoxStatus], states: list[Match]
) -> None:
    assert anchor_states(boxes, status) == states


def test_the_best_anchor_of_a_box_matches_that_box() -> None:
    # The second anchor is the best for the second box though its IoU with the first box is higher.
    boxes = torch.tensor([[0.0, 0.0, 10.0, 11.0], [0.0, 0.0, 2.0, 3.0]])
    targets = build_targets(build_sample(boxes, [V, V]))
    matches = match_anchors(ANCHORS[2:4], targets, positive_iou=0.9, negative_iou=0.8, ignored_iou=0.3)
    best_of_second = int(box_iou(boxes, ANCHORS[2:4])[1].argmax())
    assert matches.state[0, best_of_second] == P
    assert matches.box_index[0, best_of_second] == 1


def test_the_order_of_boxes_does_not_matter() -> None:
    anchors = random_boxes(40, seed=0)
    boxes, status = anchors[:6] + 0.7, [BoxStatus(i % 3) for i in range(6)]
    order = [5, 2, 0, 4, 1, 3]
    expected = anchor_states(boxes, status, anchors)
    assert anchor_states(boxes[order], [status[i] for i in order], anchors) == expected


@pytest.mark.parametrize(
    ("status", "states"),
    [
        (V, [P, P, N, N, N]),
        (OUT, [P, P, N, N, N]),
        (IGN, [I, I, I, I, N]),
    ],
)
def test_proposals_match_objects_in_range_or_not(status: BoxStatus, states: list[Match]) -> None:
    matches, _ = match_of_second_chip(ANCHORS, BOX, [status])
    assert matches.state.tolist() == states


def test_a_proposal_on_an_object_in_a_crowd_is_positive() -> None:
    crowd = torch.tensor([[0.0, 0.0, 30.0, 30.0]])
    matches, targets = match_of_second_chip(ANCHORS, torch.cat([crowd, BOX]), [IGN, V])
    assert matches.state.tolist() == [P, P, I, I, N]
    assert torch.equal(targets.boxes[1, matches.box_index[:2]], BOX.repeat(2, 1))


def test_no_proposals_have_no_matches() -> None:
    matches, _ = match_of_second_chip(torch.zeros(0, 4), BOX, [V])
    assert matches.state.shape == (0,)


@pytest.mark.parametrize(("status", "state"), [([V], N), ([IGN], I), ([], N)])
def test_a_proposal_that_is_padding_is_never_positive(status: list[BoxStatus], state: Match) -> None:
    matches, _ = match_of_second_chip(torch.zeros(1, 4), BOX[: len(status)], status)
    assert matches.state.tolist() == [state]


@pytest.mark.parametrize(
    ("num_positive", "num_negative", "sampled_positive", "sampled_negative"),
    [(100, 100, 10, 10), (3, 100, 3, 17), (100, 3, 10, 3), (0, 100, 0, 20), (0, 0, 0, 0)],
)
def test_at_most_half_of_the_sampled_anchors_are_positive(
    num_positive: int, num_negative: int, sampled_positive: int, sampled_negative: int
) -> None:
    other = [P] * 30 + [N] * (num_positive + num_negative + 20)
    state = torch.tensor([[P] * num_positive + [N] * num_negative + [I] * 50, other])
    is_sampled = sample_anchors(state, count=20, positive_fraction=0.5, seeds=[3, 4])
    assert (is_sampled & (state == P)).sum(dim=1).tolist() == [sampled_positive, 10]
    assert int((is_sampled & (state == N))[0].sum()) == sampled_negative
    assert not (is_sampled & (state == I)).any()


def test_the_sample_of_a_chip_depends_on_its_seed_alone() -> None:
    state = torch.tensor([[P] * 30 + [N] * 60]).repeat(3, 1)
    is_sampled = sample_anchors(state, count=20, positive_fraction=0.5, seeds=[5, 6, 5])
    assert torch.equal(is_sampled[0], is_sampled[2])
    assert not torch.equal(is_sampled[0], is_sampled[1])
    alone = sample_anchors(state[:1], count=20, positive_fraction=0.5, seeds=[6])
    assert torch.equal(is_sampled[1:2], alone)


def test_matching_in_parts_equals_matching_the_whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    candidates = random_boxes(5, 60, seed=0)
    status = torch.randint(5, (5, 6), generator=torch.Generator().manual_seed(0))
    targets = ChipTargets(
        boxes=candidates[:, :6] + 0.7,
        labels=torch.zeros_like(status),
        status=status,
        valid_sizes=torch.zeros(5, 2),
        num_boxes=(6,) * 5,
        num_valid=tuple((status == V).sum(dim=1).tolist()),
        seeds=(0,) * 5,
    )

    def match_both() -> list[torch.Tensor]:
        anchors = match_anchors(candidates[0], targets, positive_iou=0.5, negative_iou=0.4, ignored_iou=0.3)
        chips = torch.arange(5).repeat_interleave(60)
        proposals = match_proposals(candidates.flatten(0, 1), targets, chips=chips, positive_iou=0.5)
        return [anchors.state, anchors.box_index, proposals.state, proposals.box_index]

    whole = match_both()
    monkeypatch.setattr("sniper.models.matching._MAX_PAIRS", 700)
    for expected, in_parts in zip(whole, match_both(), strict=True):
        assert torch.equal(in_parts, expected)


def test_a_large_object_cut_to_a_small_box_is_positive_for_proposals() -> None:
    level = LevelSpec(factor=2.0, below=60).at(width=400, height=400)
    chip = Chip(level=level, x=0, y=0, width=128, height=128)
    target = assign_targets(
        chip,
        boxes=np.array([[40.0, 10.0, 190.0, 60.0]]),  # 87 px: out of the level's range
        labels=np.array([3]),
        is_crowd=np.array([False]),
        is_moved_here=np.array([False]),
    )
    assert target.boxes.tolist() == [[80.0, 20.0, 128.0, 120.0]]
    assert target.status.tolist() == [OUT]
    proposal = torch.tensor([[82.0, 20.0, 128.0, 118.0]])
    size = float((proposal[0, 2:] - proposal[0, :2]).prod().sqrt())
    assert level.valid_sizes[0] <= size < level.valid_sizes[1]
    cut_box = torch.from_numpy(target.boxes).float()
    matches, _ = match_of_second_chip(proposal, cut_box, [OUT])
    assert matches.state.tolist() == [P]
    assert anchor_states(cut_box, [OUT], proposal) == [I]
