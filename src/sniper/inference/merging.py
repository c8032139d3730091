"""Merge the detections of all levels of an image."""

from typing import Literal

from sniper.config.experiment import PredictSpec
from sniper.geometry import Detections
from sniper.geometry.nms import soft_nms, weighted_box_fusion

MergeMethod = Literal["gaussian", "linear", "hard", "fusion"]


def merge_method(spec: PredictSpec) -> MergeMethod:
    """Return the configured method; `auto` that was not resolved is Gaussian soft-NMS."""
    return "gaussian" if spec.merge == "auto" else spec.merge


def merge(detections: Detections, spec: PredictSpec) -> Detections:
    """Merge overlapping detections as configured; best first."""
    method = merge_method(spec)
    if method == "fusion":
        return weighted_box_fusion(
            detections,
            iou_threshold=spec.merge_iou,
            score_threshold=spec.score_threshold,
            max_detections=spec.max_detections,
        )
    return soft_nms(
        detections,
        decay=method,
        sigma=spec.soft_nms_sigma,
        iou_threshold=spec.merge_iou,
        score_threshold=spec.score_threshold,
        max_detections=spec.max_detections,
    )
