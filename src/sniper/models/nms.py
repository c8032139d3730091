"""Suppression of proposals, image by image, with results of one shape for all images."""

import torch
from jaxtyping import Bool, Float, Int
from torchvision.ops import nms

_MOST_PAIRS = 2**25  # of boxes, compared at a time
_NUM_ROUNDS = 65  # odd


def batched_nms(
    boxes: Float[torch.Tensor, "b n 4"],
    scores: Float[torch.Tensor, "b n"],
    *,
    iou: float,
    limit: int,
    waits: bool,
) -> tuple[Int[torch.Tensor, "b p"], Bool[torch.Tensor, "b p"]]:
    """Find the boxes of each image that overlap no better one that stays.

    torchvision's `nms` does it, image by image. On a GPU that makes the processor wait, for nobody knows before how
    many stay; where it must not wait, all pairs are compared at once (`fixed_point_nms`).

    Args:
        boxes: (B, n, 4) xyxy, best first.
        scores: (B, n), falling; minus infinity where there is no box.
        iou: of two boxes that overlap more, the worse goes.
        limit: keep at most this many of each image.
        waits: whether the processor may wait for the device; on a CPU it need not be asked.

    Returns:
        (B, p) indices of those kept, best first, and whether each place holds one; p is the smaller of limit and n.
    """
    is_there = scores > -torch.inf
    if waits or boxes.device.type == "cpu":
        is_kept = _suppress_each(boxes, scores, is_there, iou=iou)
    else:
        is_kept = fixed_point_nms(boxes, is_there, iou=iou)
    num_boxes = boxes.shape[1]
    places = torch.arange(num_boxes, device=boxes.device).expand_as(is_kept)
    order = torch.where(is_kept, places, num_boxes).topk(
        min(limit, num_boxes), dim=1, largest=False, sorted=True
    )
    is_real = order.values < num_boxes
    return order.indices, is_real


def fixed_point_nms(
    boxes: Float[torch.Tensor, "b n 4"], is_there: Bool[torch.Tensor, "b n"], *, iou: float
) -> Bool[torch.Tensor, "b n"]:
    """Suppress without a loop over boxes: judge all at once, again and again, until the judgement stands.

    A box stays if none that is better and stays overlaps it. A round settles every box at the end of one more overlap
    from better to worse; 65 rounds settle chains that long, more than are found where scores differ. Beyond that, boxes
    may be dropped that should stay, never the reverse: so it is after every odd round.

    Args:
        boxes: (B, n, 4) xyxy, best first.
        is_there: (B, n) whether there is a box.
        iou: of two boxes that overlap more, the worse goes.

    Returns:
        (B, n) whether each stays.
    """
    num_boxes = boxes.shape[1]
    step = max(1, _MOST_PAIRS // max(num_boxes**2, 1))
    kept = []
    for own, is_own in zip(torch.split(boxes, step), torch.split(is_there, step), strict=True):
        hides = (_overlaps(own) > iou) & is_own[:, :, None]
        hides = hides.triu(diagonal=1).to(
            torch.float16 if boxes.is_cuda else torch.float32
        )  # better hides worse
        stays = is_own
        with torch.autocast(boxes.device.type, enabled=False):
            for _ in range(_NUM_ROUNDS):
                stays = is_own & ((stays.to(hides.dtype)[:, None] @ hides)[:, 0] == 0)
        kept.append(stays)
    return torch.cat(kept)


def _suppress_each(
    boxes: Float[torch.Tensor, "b n 4"],
    scores: Float[torch.Tensor, "b n"],
    is_there: Bool[torch.Tensor, "b n"],
    *,
    iou: float,
) -> Bool[torch.Tensor, "b n"]:
    is_kept = torch.zeros_like(is_there)
    for own, own_scores, flags, count in zip(
        boxes, scores, is_kept, is_there.sum(dim=1).tolist(), strict=True
    ):
        flags[nms(own[:count], own_scores[:count], iou)] = True
    return is_kept


def _overlaps(boxes: Float[torch.Tensor, "b n 4"]) -> Float[torch.Tensor, "b n n"]:
    """Give the intersection over union of each pair of boxes of an image."""
    low, high = boxes[..., :2], boxes[..., 2:]
    areas = (high - low).prod(dim=2)  # (b, n)
    sides = [
        (
            torch.minimum(high[:, :, None, axis], high[:, None, :, axis])
            - torch.maximum(low[:, :, None, axis], low[:, None, :, axis])
        ).clamp_(min=0)
        for axis in (0, 1)
    ]
    shared = sides[0] * sides[1]
    return shared / (areas[:, :, None] + areas[:, None] - shared).clamp_(min=1e-9)
