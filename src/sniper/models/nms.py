"""Non-maximum suppression of proposals, image by image, with an output of fixed size."""

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torchvision.ops import nms

from sniper.geometry.nms import first_boxes

_FIRST = 2000  # candidates that a GPU suppresses first; most images need no more


def padded_nms(
    boxes: Float[torch.Tensor, "b n 4"],
    scores: Float[torch.Tensor, "b n"],
    *,
    iou: float,
    limit: int,
) -> tuple[Int[torch.Tensor, "b p"], Bool[torch.Tensor, "b p"]]:
    """Suppress the boxes of each image that overlap a better one, and pad the result to one size.

    The result is that of torchvision's `nms`, which a GPU uses; it forces a sync for each image. On a CPU a kernel
    stops at the limit.

    Args:
        boxes: (B, n, 4) xyxy, best first.
        scores: (B, n), descending; minus infinity for padding.
        iou: of two boxes with a larger IoU, the worse is suppressed.
        limit: maximum number of boxes to keep in each image.

    Returns:
        (B, p) indices of the boxes kept, best first, and (B, p) False where an index is padding; p is the smaller of
        `limit` and n.
    """
    counts = (scores > -torch.inf).sum(dim=1).tolist()
    shape = (len(boxes), min(limit, boxes.shape[1]))
    indices = torch.zeros(shape, dtype=torch.int64, device=boxes.device)
    is_kept = torch.zeros(shape, dtype=torch.bool, device=boxes.device)
    suppress = _suppress_on_cpu if boxes.device.type == "cpu" else _suppress_on_gpu
    for i, count in enumerate(counts):
        kept = suppress(boxes[i, :count], scores[i, :count], iou=iou, limit=limit)
        indices[i, : len(kept)] = kept
        is_kept[i, : len(kept)] = True
    return indices, is_kept


def _suppress_on_cpu(
    boxes: Float[torch.Tensor, "n 4"], scores: Float[torch.Tensor, " n"], *, iou: float, limit: int
) -> Int[torch.Tensor, " k"]:
    return torch.from_numpy(first_boxes(np.ascontiguousarray(boxes.numpy()), iou, limit))


def _suppress_on_gpu(
    boxes: Float[torch.Tensor, "n 4"], scores: Float[torch.Tensor, " n"], *, iou: float, limit: int
) -> Int[torch.Tensor, " k"]:
    """Suppress the best candidates, and all only where too few of them stay: no box depends on a worse one."""
    kept = nms(boxes[:_FIRST], scores[:_FIRST], iou)[:limit]
    if len(kept) < limit and len(boxes) > _FIRST:
        kept = nms(boxes, scores, iou)[:limit]
    return kept
