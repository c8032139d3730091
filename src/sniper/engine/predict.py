"""Inference: images at every level, each level's own sizes kept, all of them merged (SNIPER §4)."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image

from sniper.config import load_experiment
from sniper.data.coco import Category
from sniper.data.spec import DataSpec
from sniper.engine.build import autocast, build_detector, build_searcher
from sniper.engine.run import Run
from sniper.engine.search import Search, Searched, Source, is_mere_part
from sniper.errors import ImageError
from sniper.geometry import Detections
from sniper.geometry.boxes import to_xywh
from sniper.geometry.suppression import fuse_boxes, soft_nms
from sniper.models.detector import Detector
from sniper.models.weights import fill_module
from sniper.spec import ExperimentSpec, PredictSpec

Detect = Callable[[Sequence[torch.Tensor]], Sequence[Detections]]
"""Finds objects in some (3, H, W) uint8 images on a device, whose sides may differ: each one's in its own frame."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Predictor:
    """A detector, ready for images of any size: a trained one of ours, or any other that can be called.

    Attributes:
        detect: the detector.
        spec: levels and merging.
        categories: by label.
        device: where its images are to be.
        data: how image files are read, and what becomes of those that cannot be.
    """

    detect: Detect
    spec: PredictSpec
    categories: tuple[Category, ...]
    device: torch.device
    data: DataSpec = field(default_factory=DataSpec)

    @classmethod
    def load(
        cls, run: Run | Path, spec: ExperimentSpec | None = None, *, device: torch.device | None = None
    ) -> "Predictor":
        """Take the newest weights of a run.

        Args:
            run: the run, or its folder.
            spec: the experiment; as the run was begun with otherwise.
            device: where to compute; on a GPU if there is one otherwise.

        Raises:
            RunError: if there is no such run, or it has no checkpoint.
            ConfigError: if its experiment cannot be read.
            CheckpointError: if its weights cannot be read, or belong to another model.
        """
        opened = Run.open(run) if isinstance(run, Path) else run
        if spec is None:
            spec = load_experiment(opened.config_path)
        if device is None:
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        tensors, categories, source = opened.load_weights()
        model = build_detector(spec, num_classes=len(categories), has_weights=False)
        fill_module(model, tensors, source=source)
        return cls.of(model.to(device).eval(), spec=spec, categories=categories, device=device)

    @classmethod
    def of(
        cls,
        model: Detector,
        *,
        spec: ExperimentSpec,
        categories: tuple[Category, ...],
        device: torch.device,
    ) -> "Predictor":
        """Take a detector of ours, in evaluation mode and on its device."""
        return cls(
            detect=partial(_detect, build_searcher(model), precision=spec.predict.precision, device=device),
            spec=spec.predict,
            categories=categories,
            device=device,
            data=spec.data,
        )

    def __call__(self, image: Path | Image.Image | UInt8[np.ndarray, "h w 3"]) -> Detections:
        """Find objects in one image: merged detections in the image frame, best first.

        Args:
            image: a file; or a picture, RGB, as Pillow or NumPy has it.

        Raises:
            ImageError: if it cannot be read.
        """
        source = np.asarray(image.convert("RGB")) if isinstance(image, Image.Image) else image
        (found,) = self.search([source])
        if found is None:
            raise ImageError(f"{image}: cannot be read")
        return found

    def search(self, sources: Iterable[Source]) -> Iterator[Detections | None]:
        """Find objects in many images, several at once and the next ones read meanwhile.

        Args:
            sources: files, or arrays (h, w, 3) of RGB grey levels.

        Returns:
            Merged detections of each in its image frame, best first, in the order given, as they come; None for a file
            that cannot be read, if such are to be skipped.

        Raises:
            ImageError: if a file cannot be read, and is not to be skipped.
        """
        search = Search(
            compute=self.detect,
            levels=self.spec.levels,
            window=self.spec.window,
            batch_megapixels=self.spec.batch_megapixels,
            device=self.device,
            data=self.data,
        )
        for searched in search(sources):
            yield None if searched is None else self._merged(searched)

    def _merged(self, searched: Searched[Detections]) -> Detections:
        """Keep what each window is asked for, and merge it."""
        parts, is_cut = [], []
        for window, found in searched.parts:
            boxes = window.to_image(found.boxes)
            is_meant = window.level.valid_range.contains(boxes)
            in_image = Detections(boxes=boxes, scores=found.scores, labels=found.labels)
            parts.append(in_image.select(is_meant))
            is_cut.append(window.is_cut(found.boxes)[is_meant])
        joined = Detections.join(parts)
        return merge(joined.select(~is_mere_part(joined, np.concatenate(is_cut))), self.spec)


def _detect(
    model: Detector, images: Sequence[torch.Tensor], *, precision: Any, device: torch.device
) -> Sequence[Detections]:
    with torch.inference_mode(), autocast(precision, device):
        return model.detect(images)


def merge(detections: Detections, spec: PredictSpec) -> Detections:
    """Make one of detections that overlap, as an experiment says; best first."""
    if spec.merge == "fusion":
        return fuse_boxes(detections, iou=spec.merge_iou, floor=spec.score_floor, limit=spec.max_detections)
    return soft_nms(
        detections,
        decay=spec.merge,
        sigma=spec.soft_nms_sigma,
        iou=spec.merge_iou,
        floor=spec.score_floor,
        limit=spec.max_detections,
    )


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
