"""Non-maximum suppression of proposals, image by image, with an output of fixed size."""

import torch
from jaxtyping import Bool, Float, Int
from torchvision.ops import box_iou, nms

_BLOCK = 512  # boxes that are suppressed among each other at once
_MAX_PAIRS = 2**24  # pairs of boxes compared at once, which bounds memory
_NUM_ROUNDS = 33  # see `fixed_point_nms`


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
        return _nms_per_image(boxes, scores, is_real, iou=iou, limit=limit)
    return fixed_point_nms(boxes, is_real, iou=iou, limit=limit)


def fixed_point_nms(
    boxes: Float[torch.Tensor, "b n 4"], is_real: Bool[torch.Tensor, "b n"], *, iou: float, limit: int
) -> tuple[Int[torch.Tensor, "b p"], Bool[torch.Tensor, "b p"]]:
    """Suppress the boxes of all images in parallel, in blocks of descending score, without a sync.

    The boxes of a block are first suppressed by those kept so far, at most `limit`. Of the others a box is kept if no
    better one of the block that is kept overlaps it. Each round applies this rule to the whole block at once
    (Cluster-NMS, Zheng et al. 2020). After k rounds it is exact for every box at the end of chains of at most k
    overlaps, each from a better box to a worse one. The number of rounds is fixed, to avoid a sync: the result equals
    torchvision's unless a block of 512 boxes has a chain of more than 33 overlaps. The paper's anchors with equal
    scores everywhere have chains of 25 to 33; small anchors at a small stride, as in a feature pyramid, can have longer
    ones where neighbours score alike. Boxes after the end of such a chain may be dropped or kept wrongly.

    Args:
        boxes: (B, n, 4) xyxy, best first.
        is_real: (B, n) False for padding.
        iou: of two boxes with a larger IoU, the worse is suppressed.
        limit: maximum number of boxes to keep in each image.

    Returns:
        As `padded_nms`.
    """
    num_images = max(1, _MAX_PAIRS // (_BLOCK * (limit + _BLOCK)))
    results = [
        _suppress_by_blocks(*images, iou=iou, limit=min(limit, boxes.shape[1]))
        for images in zip(torch.split(boxes, num_images), torch.split(is_real, num_images), strict=True)
    ]
    indices, is_kept = (torch.cat(parts) for parts in zip(*results, strict=True))
    return indices, is_kept


def _suppress_by_blocks(
    boxes: Float[torch.Tensor, "b n 4"], is_real: Bool[torch.Tensor, "b n"], *, iou: float, limit: int
) -> tuple[Int[torch.Tensor, "b p"], Bool[torch.Tensor, "b p"]]:
    num_images, num_boxes = is_real.shape
    # The last row takes all boxes that are not kept. Rows still free have no area, and so overlap nothing.
    kept_boxes = boxes.new_zeros(num_images, limit + 1, 4)
    kept_indices = torch.full((num_images, limit + 1), num_boxes, device=boxes.device)
    num_kept = torch.zeros(num_images, 1, dtype=torch.int64, device=boxes.device)
    for start in range(0, num_boxes, _BLOCK):
        block = boxes[:, start : start + _BLOCK]
        better = torch.cat([kept_boxes[:, :limit], block], dim=1)
        is_overlapping = box_iou(better, block) > iou  # (b, limit + k, k)
        is_candidate = is_real[:, start : start + _BLOCK] & ~is_overlapping[:, :limit].any(dim=1)
        is_kept = _iterate(is_candidate, is_overlapping[:, limit:].triu(diagonal=1))
        rows = (num_kept + is_kept.cumsum(dim=1) - 1).clamp(max=limit).masked_fill(~is_kept, limit)
        indices = torch.arange(start, start + block.shape[1], device=boxes.device).expand_as(rows)
        kept_indices.scatter_(1, rows, indices)
        kept_boxes.scatter_(1, rows[..., None].expand_as(block), block)
        num_kept = num_kept + is_kept.sum(dim=1, keepdim=True)
    indices = kept_indices[:, :limit]
    return indices.clamp(max=max(num_boxes - 1, 0)), indices < num_boxes


def _iterate(
    is_candidate: Bool[torch.Tensor, "b k"], is_overlapping: Bool[torch.Tensor, "b k k"]
) -> Bool[torch.Tensor, "b k"]:
    """Apply the rule of suppression to all candidates at once, round by round.

    Args:
        is_candidate: (B, k) False for boxes that are suppressed already, or padding.
        is_overlapping: (B, k, k) whether a better box, the row, suppresses a worse one, the column, if it is kept.
    """
    dtype = torch.float16 if is_candidate.is_cuda else torch.float32
    candidates, minus_overlapping = is_candidate.to(dtype)[:, None], -is_overlapping.to(dtype)
    kept = candidates
    with torch.autocast(is_candidate.device.type, enabled=False):
        for _ in range(_NUM_ROUNDS):
            # 0 where a box that is kept overlaps, else the candidate itself; two kernels on a GPU.
            kept = torch.heaviside(kept @ minus_overlapping, candidates)
    return kept[:, 0] > 0


def _nms_per_image(
    boxes: Float[torch.Tensor, "b n 4"],
    scores: Float[torch.Tensor, "b n"],
    is_real: Bool[torch.Tensor, "b n"],
    *,
    iou: float,
    limit: int,
) -> tuple[Int[torch.Tensor, "b p"], Bool[torch.Tensor, "b p"]]:
    num_images, num_boxes = is_real.shape
    shape = (num_images, min(limit, num_boxes))
    indices = torch.zeros(shape, dtype=torch.int64, device=boxes.device)
    is_kept = torch.zeros(shape, dtype=torch.bool, device=boxes.device)
    for i, count in enumerate(is_real.sum(dim=1).tolist()):
        kept = nms(boxes[i, :count], scores[i, :count], iou)[: shape[1]]
        indices[i, : len(kept)] = kept
        is_kept[i, : len(kept)] = True
    return indices, is_kept
