"""Score masks by the COCO rules: the twelve numbers with the overlaps of masks in place of those of boxes."""

import hotcoco
import numpy as np

from sniper.evaluation.matching import AREA_RANGES
from sniper.evaluation.numbers import NUMBERS, CocoNumbers
from sniper.evaluation.pair import EvaluationPair
from sniper.geometry.boxes import from_xywh


def score_masks(pair: EvaluationPair, *, max_detections: int = 100) -> CocoNumbers | None:
    """Score the masks of detections; None unless both the detections and the ground truth have masks.

    An object without a mask is a region to ignore, as large as its box. A detection without a mask is a false positive.

    Areas are those of the objects in the annotations, and of the masks of detections.

    Args:
        pair: detections and ground truth.
        max_detections: how many detections of each image and class count, at least 10.
    """
    if pair.masks is None or pair.truth.masks is None:
        return None
    evaluation = hotcoco.COCOeval(*_to_hotcoco(pair), "segm")
    params = evaluation.params
    params.max_dets = [1, 10, max_detections]
    params.area_rng = [list(bounds) for bounds in AREA_RANGES.values()]
    params.area_rng_lbl = list(AREA_RANGES)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summary_lines()  # fills `stats` as `summarize` does, but prints nothing
    stats = zip(NUMBERS, map(float, evaluation.stats), strict=True)
    return CocoNumbers(**dict(stats), max_detections=max_detections)


def _to_hotcoco(pair: EvaluationPair) -> tuple[hotcoco.COCO, hotcoco.COCO]:
    """Return the ground truth and the detections in hotcoco's form; see `EvaluationPair.hotcoco`."""
    truth, ranks = pair.truth, pair.image_ranks
    assert pair.masks is not None
    assert truth.masks is not None
    assert truth.sides is not None
    by_rank = np.empty_like(truth.sides)
    by_rank[ranks] = truth.sides
    is_bare = ~truth.masks.has_mask
    masks = truth.masks.to_coco()
    x1, y1, x2, y2 = from_xywh(truth.boxes).T
    corners = np.stack([x1, y1, x2, y1, x2, y2, x1, y2], axis=1)
    for row in np.flatnonzero(is_bare).tolist():
        masks[row] = [corners[row].tolist()]
    dataset = hotcoco.COCO.from_arrays(
        [
            {"id": rank, "width": width, "height": height}
            for rank, (width, height) in enumerate(by_rank.tolist())
        ],
        [{"id": label, "name": str(label)} for label in range(len(truth.categories))],
        ranks[truth.image_indices],
        truth.labels,
        truth.boxes,
        area=truth.areas,
        iscrowd=truth.is_crowd | is_bare,
        segmentation=masks,
    )
    return dataset, dataset.load_res(_to_results(pair, by_rank))


def _to_results(pair: EvaluationPair, sides_by_rank: np.ndarray) -> list[dict[str, object]]:
    """Return results without boxes, so that the area of a detection is that of its mask."""
    ranks = pair.image_ranks[pair.image_indices]
    empty = {
        (width, height): {"size": [height, width], "counts": [width * height]}
        for width, height in np.unique(sides_by_rank, axis=0).tolist()
    }
    masks = pair.masks.to_coco() if pair.masks is not None else []
    return [
        {
            "image_id": rank,
            "category_id": label,
            "score": score,
            "segmentation": empty[tuple(sides)] if mask is None else mask,
        }
        for rank, label, score, mask, sides in zip(
            ranks.tolist(),
            pair.labels.tolist(),
            pair.scores.tolist(),
            masks,
            sides_by_rank[ranks].tolist(),
            strict=True,
        )
    ]
