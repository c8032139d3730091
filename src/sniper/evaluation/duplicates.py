"""Leave out second boxes on an object, which people who look at detections do not see."""

import numpy as np

from sniper.evaluation.pair import EvaluationPair
from sniper.geometry import Detections
from sniper.geometry.boxes import from_xywh
from sniper.geometry.nms import find_first_boxes


def without_duplicates(pair: EvaluationPair) -> EvaluationPair:
    """Return a pair without the detections that `sniper.geometry.nms.drop_duplicates` drops, image by image."""
    order = np.argsort(pair.image_indices, kind="stable")
    edges = np.flatnonzero(np.diff(pair.image_indices[order])) + 1
    boxes = from_xywh(pair.boxes)
    is_kept = np.zeros(len(pair), dtype=np.bool_)
    for rows in np.split(order, edges):
        detections = Detections(boxes=boxes[rows], scores=pair.scores[rows], labels=pair.labels[rows])
        is_kept[rows[find_first_boxes(detections)]] = True
    return pair.select(is_kept)
