"""Match anchors and proposals to the ground truth of their chips, and sample anchors (SNIPER §3.4).

Whole batches are matched at once, without a sync with the device; large batches in parts, which bounds memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from jaxtyping import Bool, Float, Int
from torchvision.ops import box_area, box_iou

from sniper.chips import BoxStatus, ChipTargets
from sniper.chips.targets import padded_count

_MAX_PAIRS = 2**24  # pairs of candidate and box compared at once


class Match(IntEnum):
    """How the losses treat an anchor or a proposal."""

    NEGATIVE = 0
    POSITIVE = 1
    IGNORED = 2


@dataclass(frozen=True, kw_only=True, eq=False)
class Matches:
    """The result of matching anchors or proposals.

    Attributes:
        state: values of `Match`.
        box_index: for each positive, the index of its box in its chip; undefined for the others.
    """

    state: Int[torch.Tensor, "*n"]
    box_index: Int[torch.Tensor, "*n"]


def match_anchors(
    anchors: Float[torch.Tensor, "n 4"],
    targets: ChipTargets[torch.Tensor],
    *,
    positive_iou: float,
    negative_iou: float,
    ignored_iou: float,
) -> Matches:
    """Match the anchors of each chip to its valid boxes, and ignore those that overlap other boxes.

    An anchor is positive if its IoU with a valid box is at least `positive_iou`, or the highest of all anchors with
    that box. It is negative if its IoU with every valid box is below `negative_iou`, and ignored in between. In any
    case it is ignored if its IoU with a box that is not valid exceeds `ignored_iou`; a negative is also ignored if at
    least half of it lies inside a box of status `IGNORE`.

    Args:
        anchors: (n, 4) xyxy, chip frame, the same for all chips, with a positive area.
        targets: the ground truth of the B chips.
        positive_iou: see above.
        negative_iou: see above.
        ignored_iou: see above.

    Returns:
        (B, n) states and indices.
    """

    def match(chips: ChipTargets[torch.Tensor]) -> Matches:
        num_boxes = max(1, *chips.num_boxes) if len(chips) == 1 else padded_count(max(chips.num_boxes))
        boxes, status = chips.boxes[:, :num_boxes], chips.status[:, :num_boxes]
        iou = box_iou(anchors, boxes)  # (b, n, m)
        is_valid = (status == BoxStatus.VALID)[:, None]  # (b, 1, m)
        is_other = ~is_valid & (status != BoxStatus.PADDING)[:, None]
        valid_iou = iou.masked_fill(~is_valid, 0)
        best_iou, best_box = valid_iou.max(dim=2)
        best_of_box = valid_iou.amax(dim=1, keepdim=True)  # (b, 1, m)
        is_best_anchor = (valid_iou == best_of_box) & (best_of_box > 0)
        is_forced = is_best_anchor.any(dim=2)
        state = torch.full_like(best_box, Match.NEGATIVE)
        state[best_iou >= negative_iou] = Match.IGNORED
        state[(best_iou >= positive_iou) | is_forced] = Match.POSITIVE
        forced_box = is_best_anchor.int().argmax(dim=2)
        box_index = torch.where(is_forced & (best_iou < positive_iou), forced_box, best_box)
        is_near_other = iou.masked_fill(~is_other, 0).amax(dim=2) > ignored_iou
        is_in_ignored = is_half_in_ignored(anchors, boxes, status) & (state == Match.NEGATIVE)
        state[is_near_other | is_in_ignored] = Match.IGNORED
        return Matches(state=state, box_index=box_index)

    num_chips = max(1, _MAX_PAIRS // max(1, len(anchors) * max(targets.num_boxes)))
    if targets.boxes.device.type == "cpu":  # calls are cheap, and a chip alone needs no padding
        num_chips = 1
    starts = range(0, len(targets), num_chips)
    return _concatenate([match(targets.part(start, start + num_chips)) for start in starts])


def match_proposals(
    proposals: Float[torch.Tensor, "n 4"],
    targets: ChipTargets[torch.Tensor],
    *,
    chips: Int[torch.Tensor, " n"],
    positive_iou: float,
) -> Matches:
    """Match proposals to the objects of their chips, in range or not.

    A proposal is positive if its IoU with an object is at least `positive_iou`, whatever the size of the object: a fine
    chip may show only a part of a large one. Of the other proposals, those that lie at least half inside a box of
    status `IGNORE` are ignored, the rest are negative.

    Args:
        proposals: (n, 4) xyxy, chip frame. May be empty.
        targets: the ground truth of the B chips.
        chips: (n,) the chip of each proposal, 0..B-1.
        positive_iou: see above.

    Returns:
        (n,) states and indices.
    """

    def match(part: slice) -> Matches:
        candidates = proposals[part, None]  # (n, 1, 4)
        boxes, status = targets.boxes[chips[part]], targets.status[chips[part]]  # (n, m, 4), (n, m)
        is_object = (status != BoxStatus.IGNORE) & (status != BoxStatus.PADDING)
        iou = box_iou(candidates, boxes)[:, 0]  # (n, m); NaN between padding of both
        best_iou, best_box = iou.masked_fill(~is_object, 0).max(dim=1)
        state = torch.full_like(best_box, Match.NEGATIVE)
        state[is_half_in_ignored(candidates, boxes, status)[:, 0]] = Match.IGNORED
        state[best_iou >= positive_iou] = Match.POSITIVE
        return Matches(state=state, box_index=best_box)

    step = max(1, _MAX_PAIRS // targets.boxes.shape[1])
    starts = range(0, max(1, len(proposals)), step)
    return _concatenate([match(slice(start, start + step)) for start in starts])


def sample_anchors(
    state: Int[torch.Tensor, "b n"], *, count: int, positive_fraction: float, seeds: Sequence[int]
) -> Bool[torch.Tensor, "b n"]:
    """Sample the anchors of each chip that enter the losses: at most a share of positives, and negatives for the rest.

    Args:
        state: (B, n) values of `Match`.
        count: number of anchors to sample in each chip; fewer if there are not enough.
        positive_fraction: maximum share of positives in `count`.
        seeds: one for each chip; the sample of a chip depends on its seed alone.

    Returns:
        (B, n) whether each anchor is sampled.
    """
    device, num_anchors = state.device, state.shape[1]
    priority = torch.stack(
        [
            torch.rand(num_anchors, device=device, generator=torch.Generator(device).manual_seed(seed))
            for seed in seeds
        ]
    )  # (b, n) in [0, 1); lowest first
    is_sampled = torch.zeros_like(state, dtype=torch.bool)
    remaining = torch.full((len(state), 1), count, device=device)
    limits = {Match.POSITIVE: int(count * positive_fraction), Match.NEGATIVE: count}
    for kind, limit in limits.items():
        first, indices = priority.masked_fill(state != kind, 2.0).topk(
            min(limit, num_anchors), dim=1, largest=False, sorted=True
        )  # (b, limit)
        is_selected = (first < 2.0) & (torch.arange(first.shape[1], device=device) < remaining)
        is_sampled |= torch.zeros_like(is_sampled).scatter(1, indices, is_selected)
        remaining = remaining - is_selected.sum(dim=1, keepdim=True)
    return is_sampled


def is_half_in_ignored(
    candidates: Float[torch.Tensor, "*b n 4"],
    boxes: Float[torch.Tensor, "b m 4"],
    status: Int[torch.Tensor, "b m"],
) -> Bool[torch.Tensor, "b n"]:
    """Check which candidates have at least half of their area inside one box of status `IGNORE`."""
    low = torch.maximum(candidates[..., None, :2], boxes[..., None, :, :2])
    high = torch.minimum(candidates[..., None, 2:], boxes[..., None, :, 2:])
    width, height = (high - low).clamp(min=0).unbind(dim=-1)  # (b, n, m)
    is_half_inside = width * height >= 0.5 * box_area(candidates)[..., None]
    return (is_half_inside & (status == BoxStatus.IGNORE)[:, None]).any(dim=2)


def _concatenate(parts: Sequence[Matches]) -> Matches:
    return Matches(
        state=torch.cat([part.state for part in parts]),
        box_index=torch.cat([part.box_index for part in parts]),
    )
