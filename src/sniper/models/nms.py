"""Non-maximum suppression of proposals, image by image, with an output of fixed size."""

import torch
from jaxtyping import Bool, Float, Int
from torchvision.ops import box_iou, nms

_MAX_PAIRS = 2**24  # pairs of boxes compared at once, which bounds memory
_NUM_ROUNDS = 65  # must be odd, see `fixed_point_nms`


def padded_nms(
    boxes: Float[torch.Tensor, "b n 4"],
    scores: Float[torch.Tensor, "b n"],
    *,
    iou: float,
    limit: int,
    may_sync: bool,
) -> tuple[Int[torch.Tensor, "b p"], Bool[torch.Tensor, "b p"]]:
    """Suppress the boxes of each image that overlap a better one, and pad the result to one size.

    torchvision's `nms` has an output of data-dependent size, so on a GPU it forces a sync. Where that is not allowed,
    `fixed_point_nms` is used.

    Args:
        boxes: (B, n, 4) xyxy, best first.
        scores: (B, n), descending; minus infinity for padding.
        iou: of two boxes with a larger IoU, the worse is suppressed.
        limit: maximum number of boxes to keep in each image.
        may_sync: whether to allow a sync with the GPU; ignored on a CPU.

    Returns:
        (B, p) indices of the boxes kept, best first, and (B, p) False where an index is padding; p is the smaller of
        `limit` and n.
    """
    is_real = scores > -torch.inf
    if may_sync or boxes.device.type == "cpu":
        is_kept = _nms_per_image(boxes, scores, is_real, iou=iou)
    else:
        is_kept = fixed_point_nms(boxes, is_real, iou=iou)
    num_boxes = boxes.shape[1]
    indices = torch.arange(num_boxes, device=boxes.device).expand_as(is_kept)
    kept = torch.where(is_kept, indices, num_boxes).topk(
        min(limit, num_boxes), dim=1, largest=False, sorted=True
    )
    return kept.indices, kept.values < num_boxes


def fixed_point_nms(
    boxes: Float[torch.Tensor, "b n 4"], is_real: Bool[torch.Tensor, "b n"], *, iou: float
) -> Bool[torch.Tensor, "b n"]:
    """Suppress all boxes in parallel, iterating to a fixed point (Cluster-NMS, Zheng et al. 2020).

    A box is kept if no better box that is kept overlaps it. Each round applies this rule to all boxes at once. After k
    rounds the result is exact for every box at the end of chains of at most k overlaps, each from a better box to a
    worse one. The number of rounds is fixed, to avoid a sync; longer chains hardly occur where scores differ. As the
    number is odd, a box at the end of a longer chain may be suppressed wrongly, but is never kept wrongly.

    Args:
        boxes: (B, n, 4) xyxy, best first.
        is_real: (B, n) False for padding.
        iou: of two boxes with a larger IoU, the worse is suppressed.

    Returns:
        (B, n) whether each box is kept.
    """
    num_boxes = boxes.shape[1]
    num_images = max(1, _MAX_PAIRS // max(num_boxes**2, 1))
    results = [
        _fixed_point(*images, iou=iou)
        for images in zip(torch.split(boxes, num_images), torch.split(is_real, num_images), strict=True)
    ]
    return torch.cat(results)


def _fixed_point(
    boxes: Float[torch.Tensor, "b n 4"], is_real: Bool[torch.Tensor, "b n"], *, iou: float
) -> Bool[torch.Tensor, "b n"]:
    num_rows = max(1, _MAX_PAIRS // max(is_real.numel(), 1))
    is_overlapping = torch.cat(
        [box_iou(rows, boxes) > iou for rows in torch.split(boxes, num_rows, dim=1)], dim=1
    )
    suppresses = (is_overlapping & is_real[:, :, None]).triu(diagonal=1)  # (b, better, worse)
    dtype = torch.float16 if boxes.is_cuda else torch.float32
    suppresses = suppresses.to(dtype)
    is_kept = is_real
    with torch.autocast(boxes.device.type, enabled=False):
        for _ in range(_NUM_ROUNDS):
            is_kept = is_real & ((is_kept.to(dtype)[:, None] @ suppresses)[:, 0] == 0)
    return is_kept


def _nms_per_image(
    boxes: Float[torch.Tensor, "b n 4"],
    scores: Float[torch.Tensor, "b n"],
    is_real: Bool[torch.Tensor, "b n"],
    *,
    iou: float,
) -> Bool[torch.Tensor, "b n"]:
    is_kept = torch.zeros_like(is_real)
    for i, count in enumerate(is_real.sum(dim=1).tolist()):
        is_kept[i, nms(boxes[i, :count], scores[i, :count], iou)] = True
    return is_kept
