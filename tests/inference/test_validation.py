"""Validation: one search, from which the scores, the way to merge and the score to show detections from are taken."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sniper.chips import LevelSpec
from sniper.config.experiment import PredictSpec
from sniper.data.datasets import Dataset, load_dataset
from sniper.data.datasets.categories import match_categories
from sniper.evaluation.coco import evaluate, score
from sniper.evaluation.pair import GroundTruth
from sniper.geometry import Detections
from sniper.inference import validation
from sniper.inference.calibration import MergeCandidate
from sniper.inference.detector import Detector, to_coco
from sniper.inference.validation import Validation, choose, spread, validate
from tests.data.tiny import write_dataset
from tests.inference.blobs import blob_detector, draw_blobs

NUM_IMAGES, NUM_WAYS = 4, 11


class Guesses:
    """Detects boxes beside the objects of an image, which it recognises by its sides.

    Args:
        dataset: the images.
        boxes: of each guess the offset from the object, as a fraction of its side, and the score.
    """

    def __init__(self, dataset: Dataset, boxes: Sequence[tuple[float, float]]) -> None:
        self.num_images = 0
        self._truth = {(record.height, record.width): record for record in dataset}
        self._boxes = boxes

    def __call__(self, images: Sequence[torch.Tensor]) -> list[Detections]:
        return [self._detect(image) for image in images]

    def _detect(self, image: torch.Tensor) -> Detections:
        self.num_images += 1
        record = self._truth[image.shape[1], image.shape[2]]
        side = record.boxes[:, 2:] - record.boxes[:, :2]
        count = len(record.boxes)
        return Detections(
            boxes=np.concatenate(
                [np.empty((0, 4)), *(record.boxes + offset * np.tile(side, 2) for offset, _ in self._boxes)]
            ),
            scores=np.repeat([score for _, score in self._boxes], count),
            labels=np.tile(record.labels, len(self._boxes)),
        )


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return load_dataset(write_dataset(tmp_path, boxes_per_image=1))


def detector_of(dataset: Dataset, guesses: Guesses, **fields: object) -> Detector:
    spec = PredictSpec(levels=(LevelSpec(factor=1.0),), merge="auto")
    return Detector(
        detect=guesses,
        spec=dataclasses.replace(spec, **fields),  # type: ignore[arg-type]
        categories=dataset.categories,
        device=torch.device("cpu"),
    )


def run(dataset: Dataset, detector: Detector) -> Validation:
    return validate(
        detector,
        dataset,
        truth=GroundTruth.of(dataset),
        match=match_categories(detector.categories, dataset.categories),
        step=7,
    )


def scores_of(dataset: Dataset, detector: Detector) -> dict[str, float]:
    """Score a detector by the results that prediction writes."""
    results = []
    for record, detections in zip(dataset, detector.predict_many(dataset), strict=True):
        assert detections is not None
        results += to_coco(detections, image_id=record.image_id, categories=dataset.categories)
    return evaluate(results, dataset).as_dict()


BESIDE = [(0.08, 0.81234567), (-0.08, 0.8)]  # an IoU of 0.73 with the object and of 0.54 with each other


def test_the_way_to_merge_with_the_best_ap_is_chosen_from_one_search(dataset: Dataset) -> None:
    guesses = Guesses(dataset, BESIDE)
    detector = detector_of(dataset, guesses)
    validated = run(dataset, detector)
    assert guesses.num_images == NUM_IMAGES
    calibration = validated.calibration
    assert (calibration.merge, calibration.merge_iou) == ("fusion", 0.45)  # the mean of both is the object
    assert (calibration.step, calibration.num_images, calibration.num_compared) == (7, NUM_IMAGES, NUM_IMAGES)
    assert len(calibration.candidates) == NUM_WAYS
    assert calibration.scale == 1.0
    default = calibration.candidates[0]
    assert (default.merge, default.soft_nms_sigma, round(default.ap, 6)) == ("gaussian", 0.55, 0.5)
    assert max(candidate.ap for candidate in calibration.candidates) == 1.0
    for candidate in calibration.candidates:
        fields = {name: getattr(candidate, name) for name in ("merge", "soft_nms_sigma", "merge_iou")}
        assert candidate.ap == scores_of(dataset, detector_of(dataset, guesses, **fields))["ap"]
    assert score(validated.pair).as_dict() == scores_of(dataset, detector.calibrated(calibration))


@pytest.mark.parametrize("merge", ["gaussian", "linear", "hard", "fusion"])
def test_a_method_that_was_set_is_kept(dataset: Dataset, merge: str) -> None:
    guesses = Guesses(dataset, BESIDE)
    detector = detector_of(dataset, guesses, merge=merge)
    validated = run(dataset, detector)
    assert guesses.num_images == NUM_IMAGES
    assert (validated.calibration.merge, validated.calibration.candidates) == (merge, ())
    assert score(validated.pair).as_dict() == scores_of(dataset, detector)


def test_ways_to_merge_are_compared_on_a_part_of_many_images(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validation, "MAX_COMPARED", 2)
    guesses = Guesses(dataset, BESIDE)
    detector = detector_of(dataset, guesses)
    validated = run(dataset, detector)
    assert guesses.num_images == NUM_IMAGES
    assert (validated.calibration.num_images, validated.calibration.num_compared) == (NUM_IMAGES, 2)
    assert max(candidate.ap for candidate in validated.calibration.candidates) == 1.0
    assert score(validated.pair).as_dict() == scores_of(dataset, detector.calibrated(validated.calibration))


@pytest.mark.parametrize("merge", ["auto", "fusion"])
@pytest.mark.parametrize("compared", [1, 500])
def test_masks_are_scored_as_those_of_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, merge: Literal["auto", "fusion"], compared: int
) -> None:
    monkeypatch.setattr(validation, "MAX_COMPARED", compared)
    dataset = load_dataset(write_blobs(tmp_path, num_images=3))
    levels = (LevelSpec(factor=2.0), LevelSpec(factor=1.0))  # each object is found twice
    detector = blob_detector(*levels, window=256, has_masks=True)
    detector = dataclasses.replace(detector, spec=dataclasses.replace(detector.spec, merge=merge))
    validated = run(dataset, detector)
    found = detector.calibrated(validated.calibration).predict_many(dataset)
    results = [
        entry
        for record, detections in zip(dataset, found, strict=True)
        if detections is not None
        for entry in to_coco(detections, image_id=record.image_id, categories=dataset.categories)
    ]
    scores = score(validated.pair)
    assert scores == evaluate(results, dataset)
    assert scores.masks is not None
    assert scores.masks.ap < scores.ap - 0.3  # half of each rectangle is in the mask of the object


def write_blobs(folder: Path, *, num_images: int) -> Path:
    """Write images of bright rectangles, whose objects are the triangles above a diagonal; return the annotations."""
    images: list[dict[str, object]] = []
    annotations: list[dict[str, object]] = []
    for index in range(num_images):
        pixels, boxes = draw_blobs(index, width=200, height=150, smallest=16, largest=60, count=12)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        images.append({"id": index, "file_name": f"{index}.png", "width": 200, "height": 150})
        for x1, y1, x2, y2 in boxes.tolist():
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index,
                    "category_id": 1,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "segmentation": [[x1, y1, x2, y1, x1, y2]],
                }
            )
    path = folder / "blobs.json"
    categories = [{"id": 1, "name": "blob"}]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


@pytest.mark.parametrize(
    ("boxes", "lower", "upper", "f1"),
    [
        ([(0.0, 0.9)], 0.9, 0.9, 1.0),
        ([(0.0, 0.9), (3.0, 0.4)], 0.4, 0.9, 1.0),  # a false positive
        ([(0.0, 0.9), (0.1, 0.8), (3.0, 0.4)], 0.4, 0.9, 1.0),  # and a second box on the object
        ([(0.0, 0.4), (3.0, 0.9)], 0.0, 0.4, 2 / 3),
    ],
)
def test_detections_are_shown_from_the_score_of_the_best_f1(
    dataset: Dataset, boxes: list[tuple[float, float]], lower: float, upper: float, f1: float
) -> None:
    calibration = run(dataset, detector_of(dataset, Guesses(dataset, boxes))).calibration
    assert calibration.min_score is not None
    assert lower <= calibration.min_score <= upper
    assert round(calibration.f1, 6) == round(f1, 6)


@pytest.mark.parametrize("boxes", [[], [(3.0, 0.9)]])
def test_no_score_is_chosen_where_no_object_is_detected(
    dataset: Dataset, boxes: list[tuple[float, float]]
) -> None:
    calibration = run(dataset, detector_of(dataset, Guesses(dataset, boxes))).calibration
    assert (calibration.min_score, calibration.f1, calibration.recall) == (None, 0.0, 0.0)
    assert calibration.merge == "gaussian"


@given(st.integers(0, 1000), st.integers(1, 300))
def test_spread_images_are_distinct_and_reach_both_ends(num_images: int, count: int) -> None:
    indices = spread(num_images, count=count)
    assert len(indices) == min(num_images, count)
    assert indices == sorted(set(indices))
    assert indices[:1] == [0][:num_images]
    if count > 1:
        assert indices[-1:] == [num_images - 1][:num_images]


@pytest.mark.parametrize(
    ("scores", "chosen"),
    [([0.4, 0.4009, 0.3], 0), ([0.4, 0.4011], 1), ([0.1, 0.5, 0.5005], 1), ([-1, -1], 0)],
)
def test_the_first_of_nearly_equal_ways_is_chosen(scores: list[float], chosen: int) -> None:
    candidates = [
        MergeCandidate(merge="hard", soft_nms_sigma=0.55, merge_iou=0.5, ap=ap, ap50=0.5) for ap in scores
    ]
    assert choose(candidates) == chosen
