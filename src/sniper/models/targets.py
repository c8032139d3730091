"""What anchors and proposals must learn: valid, invalid and ignored boxes matched to them (SNIPER §3.3).

Whole batches are matched at once, on their device and without waiting for it; a batch with many boxes is taken in parts
of bounded memory.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from jaxtyping import Bool, Float, Int

from sniper.chips import BoxStatus

_MOST_PAIRS = 2**25  # of candidates and boxes, compared at a time


class Match(IntEnum):
    """What becomes of an anchor or a proposal."""

    NEGATIVE = 0
    POSITIVE = 1
    IGNORED = 2


@dataclass(frozen=True, kw_only=True, eq=False)
class Matches:
    """What became of candidates.

    Attributes:
        state: values of `Match`, for each anchor or proposal.
        box_index: the box of its chip that each positive one matches; meaningless for the others.
    """

    state: Int[torch.Tensor, "*n"]
    box_index: Int[torch.Tensor, "*n"]


def match_anchors(
    anchors: Float[torch.Tensor, "n 4"],
    *,
    boxes: Float[torch.Tensor, "b m 4"],
    status: Int[torch.Tensor, "b m"],
    num_boxes: Sequence[int],
    positive_iou: float,
    negative_iou: float,
    ignored_iou: float,
) -> Matches:
    """Match the anchors of each chip to its valid boxes, and set those near other boxes aside.

    An anchor is positive if it overlaps a valid box by `positive_iou`, or if no anchor overlaps that box more; negative
    if it overlaps each valid box by less than `negative_iou`. Whatever it was, it is then ignored if it overlaps an
    invalid or ignored box by more than `ignored_iou`; a negative one also if it lies half inside an ignored box.

    Args:
        anchors: (n, 4) xyxy, chip frame, the same for all chips.
        boxes: (B, M, 4) xyxy, chip frame; M at least 1.
        status: (B, M) values of `BoxStatus`.
        num_boxes: how many boxes each chip has; those after are absent.
        positive_iou: see above.
        negative_iou: see above.
        ignored_iou: see above.

    Returns:
        (B, n) states and indices.
    """

    def match(part: slice) -> Matches:
        most = max(1, *num_boxes[part])
        own = status[part, :most]
        shared, overlaps = _compare(anchors, boxes[part, :most])  # (b, n, m)
        is_valid = (own == BoxStatus.VALID)[:, None]  # (b, 1, m)
        is_other = ~is_valid & (own != BoxStatus.PADDING)[:, None]
        valid = overlaps.masked_fill(~is_valid, 0)
        best, nearest = valid.max(dim=2)
        best_of_box = valid.amax(dim=1, keepdim=True)  # (b, 1, m)
        is_best = (valid == best_of_box) & (best_of_box > 0)
        is_forced = is_best.any(dim=2)
        state = torch.full_like(nearest, Match.NEGATIVE)
        state[best >= negative_iou] = Match.IGNORED
        state[(best >= positive_iou) | is_forced] = Match.POSITIVE
        box_index = torch.where(is_forced & (best < positive_iou), is_best.int().argmax(dim=2), nearest)
        is_near = overlaps.masked_fill(~is_other, 0).amax(dim=2) > ignored_iou
        is_within = _is_within_ignored(anchors, shared, own) & (state == Match.NEGATIVE)
        state[is_near | is_within] = Match.IGNORED
        return Matches(state=state, box_index=box_index)

    if boxes.device.type == "cpu":  # where calls cost little, no chip is made to wait for one with more boxes
        return _joined([match(slice(i, i + 1)) for i in range(len(boxes))])
    return _joined([match(part) for part in _parts(len(boxes), size=len(anchors) * max(1, *num_boxes))])


def match_proposals(
    proposals: Float[torch.Tensor, "n 4"],
    *,
    chips: Int[torch.Tensor, " n"],
    boxes: Float[torch.Tensor, "b m 4"],
    status: Int[torch.Tensor, "b m"],
    positive_iou: float,
) -> Matches:
    """Match proposals to the objects of their chips, valid or not.

    A proposal is positive if it overlaps an object by `positive_iou`, so that a part of a large object can still teach.
    It is ignored if it so overlaps an object of a negative chip, or lies half inside an ignored box; else negative.

    Args:
        proposals: (n, 4) xyxy, chip frame. May be empty.
        chips: (n,) the chip of each, 0..B-1.
        boxes: (B, M, 4) xyxy, chip frame; M at least 1.
        status: (B, M) values of `BoxStatus`.
        positive_iou: see above.

    Returns:
        (n,) states and indices.
    """

    def match(part: slice) -> Matches:
        candidates, own = proposals[part, None], status[chips[part]]  # (n, 1, 4), (n, m)
        shared, overlaps = _compare(candidates, boxes[chips[part]])  # (n, 1, m)
        is_object = (own != BoxStatus.IGNORE) & (own != BoxStatus.PADDING)
        best, nearest = overlaps[:, 0].masked_fill(~is_object, 0).max(dim=1)
        is_match = best >= positive_iou
        is_aside = own.gather(1, nearest[:, None])[:, 0] == BoxStatus.IN_NEGATIVE_CHIP
        state = torch.full_like(nearest, Match.NEGATIVE)
        state[_is_within_ignored(candidates, shared, own)[:, 0]] = Match.IGNORED
        state[is_match] = Match.POSITIVE
        state[is_match & is_aside] = Match.IGNORED
        return Matches(state=state, box_index=nearest)

    return _joined([match(part) for part in _parts(len(proposals), size=boxes.shape[1])])


def sample_anchors(
    state: Int[torch.Tensor, "b n"], *, count: int, positive_fraction: float, seeds: Sequence[int]
) -> Bool[torch.Tensor, "b n"]:
    """Draw the anchors that enter the losses: of each chip at most a share of positives, the rest negatives.

    Args:
        state: (B, n) values of `Match`.
        count: how many to draw of each chip; fewer if there are not so many.
        positive_fraction: at most this share of `count` is positive.
        seeds: of the B chips; what is drawn for a chip depends on its own alone.

    Returns:
        (B, n) one flag for each anchor.
    """
    device, num_anchors = state.device, state.shape[1]
    rank = torch.stack(
        [
            torch.rand(num_anchors, device=device, generator=torch.Generator(device).manual_seed(seed))
            for seed in seeds
        ]
    )
    is_drawn = torch.zeros_like(state, dtype=torch.bool)
    room = torch.full((len(state), 1), count, device=device)
    limits = {Match.POSITIVE: int(count * positive_fraction), Match.NEGATIVE: count}
    for wanted, limit in limits.items():
        ranks, first = rank.masked_fill(state != wanted, 2.0).topk(
            min(limit, num_anchors), dim=1, largest=False, sorted=True
        )  # (b, limit)
        is_taken = (ranks < 2.0) & (torch.arange(ranks.shape[1], device=device) < room)
        is_drawn |= torch.zeros_like(is_drawn).scatter(1, first, is_taken)
        room = room - is_taken.sum(dim=1, keepdim=True)
    return is_drawn


def _compare(
    candidates: Float[torch.Tensor, "*b n 4"], boxes: Float[torch.Tensor, "b m 4"]
) -> tuple[Float[torch.Tensor, "b n m"], Float[torch.Tensor, "b n m"]]:
    """Give the areas that candidates share with the boxes of their chips, and the intersections over unions."""
    x1, y1, x2, y2 = (side[..., None] for side in candidates.unbind(-1))  # (..., n, 1)
    u1, v1, u2, v2 = (side[..., None, :] for side in boxes.unbind(-1))  # (b, 1, m)
    width = (torch.minimum(x2, u2) - torch.maximum(x1, u1)).clamp_(min=0)
    height = (torch.minimum(y2, v2) - torch.maximum(y1, v1)).clamp_(min=0)
    shared = width * height
    union = (x2 - x1) * (y2 - y1) + (u2 - u1) * (v2 - v1) - shared
    return shared, shared / union.clamp_(min=1e-9)


def _is_within_ignored(
    candidates: Float[torch.Tensor, "*b n 4"],
    shared: Float[torch.Tensor, "b n m"],
    status: Int[torch.Tensor, "b m"],
) -> Bool[torch.Tensor, "b n"]:
    """Tell which candidates lie with at least half of their area inside one ignored box."""
    areas = (candidates[..., 2:] - candidates[..., :2]).prod(dim=-1)  # (..., n)
    is_ignored = (status == BoxStatus.IGNORE)[:, None]  # (b, 1, m)
    return (is_ignored & (shared >= 0.5 * areas[..., None])).any(dim=2)


def _parts(count: int, *, size: int) -> Iterator[slice]:
    """Cut a range of things of a size into parts of bounded size; at least one part, which may be empty."""
    step = max(1, _MOST_PAIRS // max(size, 1))
    return (slice(start, start + step) for start in range(0, max(count, 1), step))


def _joined(parts: Sequence[Matches]) -> Matches:
    return Matches(
        state=torch.cat([part.state for part in parts]),
        box_index=torch.cat([part.box_index for part in parts]),
    )
