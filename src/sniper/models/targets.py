"""What anchors and proposals must learn: valid, invalid and ignored boxes matched to them (SNIPER §3.3)."""

from dataclasses import dataclass
from enum import IntEnum

import torch
from jaxtyping import Bool, Float, Int
from torchvision.ops import box_area, box_iou

from sniper.chips import Standing


class Match(IntEnum):
    """What becomes of an anchor or a proposal."""

    NEGATIVE = 0
    POSITIVE = 1
    IGNORED = 2


@dataclass(frozen=True, kw_only=True, eq=False)
class Matches:
    """The matching of one chip.

    Attributes:
        state: (n,) values of `Match`, for each anchor or proposal.
        box_index: (n,) the box that each positive one matches; meaningless for the others.
    """

    state: Int[torch.Tensor, " n"]
    box_index: Int[torch.Tensor, " n"]


def match_anchors(
    anchors: Float[torch.Tensor, "n 4"],
    *,
    boxes: Float[torch.Tensor, "m 4"],
    standing: Int[torch.Tensor, " m"],
    positive_iou: float,
    negative_iou: float,
    ignored_iou: float,
) -> Matches:
    """Match the anchors of one chip to its valid boxes, and set those near other boxes aside.

    An anchor is positive if it overlaps a valid box by `positive_iou`, or if no anchor overlaps that box more; negative
    if it overlaps each valid box by less than `negative_iou`. Whatever it was, it is then ignored if it overlaps an
    invalid or ignored box by more than `ignored_iou`; a negative one also if it lies half inside an ignored box.

    Args:
        anchors: (n, 4) xyxy, chip frame.
        boxes: (m, 4) xyxy, chip frame. May be empty.
        standing: (m,) values of `Standing`.
        positive_iou: see above.
        negative_iou: see above.
        ignored_iou: see above.

    Returns:
        A state for each anchor; indices point into `boxes`.
    """
    state = torch.full((len(anchors),), Match.NEGATIVE, device=anchors.device)
    box_index = torch.zeros(len(anchors), dtype=torch.int64, device=anchors.device)
    valid = torch.where(standing == Standing.VALID)[0]
    if len(valid):
        overlaps = box_iou(anchors, boxes[valid])  # (n, v)
        best, nearest = overlaps.max(dim=1)
        state[best >= negative_iou] = Match.IGNORED
        state[best >= positive_iou] = Match.POSITIVE
        best_of_box = overlaps.max(dim=0).values  # (v,)
        is_best = (overlaps == best_of_box) & (best_of_box > 0)
        is_forced = is_best.any(dim=1)
        state[is_forced] = Match.POSITIVE
        nearest = torch.where(is_forced & (best < positive_iou), is_best.int().argmax(dim=1), nearest)
        box_index = valid[nearest]
    others = boxes[standing != Standing.VALID]
    if len(others):
        state[box_iou(anchors, others).max(dim=1).values > ignored_iou] = Match.IGNORED
    is_within = is_within_ignored(anchors, boxes=boxes, standing=standing)
    state[is_within & (state == Match.NEGATIVE)] = Match.IGNORED
    return Matches(state=state, box_index=box_index)


def match_proposals(
    proposals: Float[torch.Tensor, "n 4"],
    *,
    boxes: Float[torch.Tensor, "m 4"],
    standing: Int[torch.Tensor, " m"],
    positive_iou: float,
) -> Matches:
    """Match the proposals of one chip to its objects, valid or not.

    A proposal is positive if it overlaps an object by `positive_iou`, so that a part of a large object can still teach.
    It is ignored if it so overlaps an object of a negative chip, or lies half inside an ignored box; else negative.

    Args:
        proposals: (n, 4) xyxy, chip frame. May be empty.
        boxes: (m, 4) xyxy, chip frame. May be empty.
        standing: (m,) values of `Standing`.
        positive_iou: see above.

    Returns:
        A state for each proposal; indices point into `boxes`.
    """
    state = torch.full((len(proposals),), Match.NEGATIVE, device=proposals.device)
    box_index = torch.zeros(len(proposals), dtype=torch.int64, device=proposals.device)
    state[is_within_ignored(proposals, boxes=boxes, standing=standing)] = Match.IGNORED
    objects = torch.where(standing != Standing.IGNORED)[0]
    if len(objects):
        best, nearest = box_iou(proposals, boxes[objects]).max(dim=1)
        box_index = objects[nearest]
        is_match = best >= positive_iou
        is_aside = standing[box_index] == Standing.ASIDE
        state[is_match & ~is_aside] = Match.POSITIVE
        state[is_match & is_aside] = Match.IGNORED
    return Matches(state=state, box_index=box_index)


def is_within_ignored(
    candidates: Float[torch.Tensor, "n 4"],
    *,
    boxes: Float[torch.Tensor, "m 4"],
    standing: Int[torch.Tensor, " m"],
) -> Bool[torch.Tensor, " n"]:
    """Tell which (n, 4) candidates lie with at least half of their area inside one ignored box."""
    ignored = boxes[standing == Standing.IGNORED]
    if not len(ignored):
        return torch.zeros(len(candidates), dtype=torch.bool, device=candidates.device)
    low = torch.maximum(candidates[:, None, :2], ignored[None, :, :2])  # (n, i, 2)
    high = torch.minimum(candidates[:, None, 2:], ignored[None, :, 2:])  # (n, i, 2)
    shared = (high - low).clamp(min=0).prod(dim=2)  # (n, i)
    return (shared >= 0.5 * box_area(candidates)[:, None]).any(dim=1)


def draw_sample(
    state: Int[torch.Tensor, " n"], *, count: int, positive_share: float, generator: torch.Generator
) -> Bool[torch.Tensor, " n"]:
    """Draw the anchors that enter the losses: at most a share of positives, the rest negatives.

    Args:
        state: (n,) values of `Match`.
        count: how many to draw; fewer if there are not so many.
        positive_share: at most this share of `count` is positive.
        generator: draws them; on the device of `state`.

    Returns:
        (n,) one flag for each anchor.
    """
    rank = torch.rand(len(state), device=state.device, generator=generator)
    is_drawn = torch.zeros(len(state), dtype=torch.bool, device=state.device)
    positives = torch.where(state == Match.POSITIVE)[0]
    positives = positives[rank[positives].argsort()][: int(count * positive_share)]
    negatives = torch.where(state == Match.NEGATIVE)[0]
    negatives = negatives[rank[negatives].argsort()][: count - len(positives)]
    is_drawn[positives] = True
    is_drawn[negatives] = True
    return is_drawn
