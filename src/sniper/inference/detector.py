"""Inference: images at every level, each level's own sizes kept, all of them merged (SNIPER §4)."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from sniper.config.experiment import ExperimentSpec, PredictSpec
from sniper.config.loading import load_experiment
from sniper.data.datasets import Category
from sniper.data.spec import DataSpec
from sniper.errors import ConfigError, ImageError
from sniper.geometry import Detections
from sniper.geometry.boxes import to_xywh
from sniper.geometry.nms import soft_nms, weighted_box_fusion
from sniper.inference.search import Search, Source
from sniper.models.build import autocast, build_detector, build_inference_model
from sniper.models.spec import Precision
from sniper.models.two_stage import TwoStageDetector
from sniper.models.weights import fill_module
from sniper.runs.run import Run

Detect = Callable[[Sequence[torch.Tensor]], Sequence[Detections]]
"""Finds objects in some (3, H, W) uint8 images on a device, whose sides may differ: each one's in its own frame."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Detector:
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
        cls,
        run: Run | str | os.PathLike[str],
        spec: ExperimentSpec | None = None,
        *,
        device: torch.device | None = None,
    ) -> "Detector":
        """Take the newest weights of a run.

        Args:
            run: the run, or its folder.
            spec: the experiment; as the run was begun with otherwise.
            device: where to compute; on a GPU if there is one otherwise.

        Raises:
            RunError: if there is no such run, or it has no checkpoint.
            ConfigError: if its experiment cannot be read, or it has trained its proposals only.
            CheckpointError: if its weights cannot be read, or belong to another model.
        """
        opened = run if isinstance(run, Run) else Run.open(Path(run))
        if spec is None:
            spec = load_experiment(opened.config_path)
        if spec.train.rpn_only:
            raise ConfigError(
                f"{opened.folder}: has trained its proposals only (train.rpn_only); it can be mined with"
            )
        if device is None:
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        tensors, categories, source = opened.load_weights()
        model = build_detector(spec.model, seed=spec.seed, num_classes=len(categories), has_weights=False)
        fill_module(model, tensors, source=source)
        return cls.of(model.to(device).eval(), spec=spec, categories=categories, device=device)

    @classmethod
    def of(
        cls,
        model: TwoStageDetector,
        *,
        spec: ExperimentSpec,
        categories: tuple[Category, ...],
        device: torch.device,
    ) -> "Detector":
        """Take a detector of ours, in evaluation mode and on its device."""
        return cls(
            detect=partial(
                _detect, build_inference_model(model), precision=spec.predict.precision, device=device
            ),
            spec=spec.predict,
            categories=categories,
            device=device,
            data=spec.data,
        )

    def __call__(self, image: str | os.PathLike[str] | Image.Image | np.ndarray) -> Detections:
        """Find objects in one image: merged detections in the image frame, best first.

        Args:
            image: a file; or a picture as Pillow has it; or an array (h, w, 3) uint8, RGB.

        Raises:
            ImageError: if it cannot be read.
            OutOfMemory: if a window of it does not fit into the device's memory.
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
            Merged detections of each in its image frame, best first, in the order given; those of up to 32 images come
            together. None for a file that cannot be read, if such are to be skipped. What is found in an image does not
            depend on the others.

        Raises:
            ImageError: if a file cannot be read, and is not to be skipped.
            OutOfMemory: if a window does not fit into the device's memory.
        """
        search = Search(
            detect=self.detect,
            levels=self.spec.levels,
            keeps_range=True,
            window=self.spec.window,
            batch_megapixels=self.spec.batch_megapixels,
            device=self.device,
            data=self.data,
        )
        for searched in search(sources):
            yield None if searched is None else merge(searched.detections, self.spec)


def _detect(
    model: TwoStageDetector, images: Sequence[torch.Tensor], *, precision: Precision, device: torch.device
) -> Sequence[Detections]:
    with torch.inference_mode(), autocast(precision, device):
        return model.detect(images)


def merge(detections: Detections, spec: PredictSpec) -> Detections:
    """Make one of detections that overlap, as an experiment says; best first."""
    if spec.merge == "fusion":
        return weighted_box_fusion(
            detections, iou=spec.merge_iou, floor=spec.score_threshold, limit=spec.max_detections
        )
    return soft_nms(
        detections,
        decay=spec.merge,
        sigma=spec.soft_nms_sigma,
        iou=spec.merge_iou,
        floor=spec.score_threshold,
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
