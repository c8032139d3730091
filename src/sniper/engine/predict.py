"""Inference: whole images at every level, each level's own sizes kept, all of them merged (SNIPER §4)."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8

from sniper.data.coco import Category
from sniper.data.cutting import resize_to_level
from sniper.engine.build import autocast, build_detector
from sniper.engine.run import Run
from sniper.engine.spec import ExperimentSpec, PredictSpec
from sniper.geometry import Detections
from sniper.geometry.boxes import to_xywh
from sniper.geometry.suppression import soft_nms
from sniper.models.detector import Detector
from sniper.models.weights import fill_module


@dataclass(frozen=True, kw_only=True, eq=False)
class Predictor:
    """A trained detector, ready for images.

    Attributes:
        model: the detector, in evaluation mode.
        spec: levels and merging.
        categories: by label.
        device: where to compute.
    """

    model: Detector
    spec: PredictSpec
    categories: tuple[Category, ...]
    device: torch.device

    @classmethod
    def load(cls, run: Run, spec: ExperimentSpec, *, device: torch.device) -> "Predictor":
        """Take the newest weights of a run.

        Raises:
            RunError: if the run has no checkpoint.
            CheckpointError: if it cannot be read, or belongs to another model.
        """
        tensors, categories, source = run.load_weights()
        model = build_detector(spec, num_classes=len(categories), has_weights=False)
        fill_module(model, tensors, source=source)
        return cls(model=model.to(device).eval(), spec=spec.predict, categories=categories, device=device)

    def __call__(self, image: UInt8[np.ndarray, "h w 3"]) -> Detections:
        """Find objects in one RGB image: merged detections in the image frame, best first."""
        parts = [self._detect_level(image, index) for index in range(len(self.spec.levels))]
        return soft_nms(
            Detections.join(parts),
            sigma=self.spec.soft_nms_sigma,
            floor=self.spec.score_floor,
            limit=self.spec.max_detections,
        )

    def _detect_level(self, image: np.ndarray, index: int) -> Detections:
        level = self.spec.levels[index].at(width=image.shape[1], height=image.shape[0], index=index)
        pixels = torch.from_numpy(resize_to_level(image, level).copy()).permute(2, 0, 1)  # (3, h, w)
        with torch.inference_mode(), autocast(self.spec.precision, self.device):
            (found,) = self.model.detect([pixels.to(self.device)])
        boxes = level.to_image(found.boxes)
        in_image = Detections(boxes=boxes, scores=found.scores, labels=found.labels)
        return in_image.select(level.valid_range.contains(boxes))


def to_coco(
    detections: Detections, *, image_id: int, categories: tuple[Category, ...]
) -> list[dict[str, Any]]:
    """Write the detections of one image as COCO results: boxes as xywh to 0.01 px, categories by their own ids."""
    boxes = np.round(to_xywh(detections.boxes), 2).tolist()
    return [
        {
            "image_id": image_id,
            "category_id": categories[label].category_id,
            "bbox": box,
            "score": round(score, 5),
        }
        for box, score, label in zip(
            boxes, detections.scores.tolist(), detections.labels.tolist(), strict=True
        )
    ]
