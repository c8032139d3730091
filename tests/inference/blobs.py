"""A detector whose every answer is known: the bright rectangles of an image."""

from collections.abc import Sequence
from typing import Literal

import cv2
import numpy as np
import torch

from sniper.chips import LevelSpec
from sniper.config.experiment import PredictSpec
from sniper.data.datasets import Category
from sniper.geometry import Detections, SelectDetections
from sniper.geometry.detection_masks import DetectionMasks
from sniper.geometry.focus_cells import FocusCells
from sniper.inference.detector import Detector

Merge = Literal["gaussian", "linear", "hard", "fusion"]


def find_blobs(images: Sequence[torch.Tensor]) -> list[Detections]:
    """Detect bright rectangles whatever their scale, truncated ones too."""
    results = []
    for image in images:
        bright = (image[0].numpy() > 128).astype(np.uint8)
        _, _, stats, _ = cv2.connectedComponentsWithStats(bright, connectivity=4)
        x, y, width, height, _ = stats[1:].T.astype(np.float64)
        boxes = np.stack([x, y, x + width, y + height], axis=1)
        scores = 0.5 + 0.4 * np.minimum(width * height / 10_000, 1)
        results.append(Detections(boxes=boxes, scores=scores, labels=np.zeros(len(boxes), dtype=np.int64)))
    return results


def find_blob_masks(images: Sequence[torch.Tensor], select: SelectDetections) -> list[Detections]:
    """Detect bright rectangles, all of whose pixels are in the mask."""
    selected = [select(index, each) for index, each in enumerate(find_blobs(images))]
    return [
        each.with_masks(DetectionMasks.of(np.full((len(each), 28, 28), 255, np.uint8), each.boxes))
        for each in selected
    ]


def find_blob_cells(
    images: Sequence[torch.Tensor], select: SelectDetections | None
) -> tuple[list[Detections], list[FocusCells]]:
    """Detect bright rectangles, and the cells of 16 pixels with any bright pixel."""
    cells = []
    for image in images:
        height, width = image.shape[1:]
        bright = np.pad((image[0].numpy() > 128), ((0, -height % 16), (0, -width % 16)))
        blocks = bright.reshape(bright.shape[0] // 16, 16, bright.shape[1] // 16, 16)
        probabilities: np.ndarray = np.where(blocks.any(axis=(1, 3)), 0.8, 0.0).astype(np.float32)
        cells.append(FocusCells(probabilities=probabilities, stride=16))
    return find_blobs(images) if select is None else find_blob_masks(images, select), cells


def blob_detector(
    *levels: LevelSpec,
    window: int = 2048,
    batch_megapixels: float = 8.0,
    merge: Merge = "gaussian",
    has_masks: bool = False,
    has_head: bool = False,
) -> Detector:
    """Build a detector of blobs."""
    spec = PredictSpec(
        levels=levels, window=window, batch_megapixels=batch_megapixels, merge=merge, max_detections=10_000
    )
    return Detector(
        detect=find_blobs,
        spec=spec,
        categories=(Category(category_id=1, name="blob"),),
        device=torch.device("cpu"),
        detect_masks=find_blob_masks if has_masks else None,
        mask_side=28 if has_masks else None,
        detect_focused=find_blob_cells if has_head else None,
    )


def draw_blobs(
    seed: int, *, width: int, height: int, smallest: int, largest: int, count: int = 60
) -> tuple[np.ndarray, np.ndarray]:
    """Draw bright rectangles that do not touch; return the image and their boxes."""
    generator = np.random.default_rng(seed)
    image = np.zeros((height, width, 3), dtype=np.uint8)
    boxes: list[tuple[int, int, int, int]] = []
    for _ in range(count):
        size = np.exp(generator.uniform(np.log(smallest), np.log(largest)))
        w, h = (size * 2 ** (np.array([0.5, -0.5]) * generator.uniform(-1, 1))).astype(int).tolist()
        x, y = int(generator.integers(0, width - w)), int(generator.integers(0, height - h))
        if image[max(y - 4, 0) : y + h + 4, max(x - 4, 0) : x + w + 4].any():
            continue
        image[y : y + h, x : x + w] = 255
        boxes.append((x, y, x + w, y + h))
    return image, np.array(boxes, dtype=np.float64)
