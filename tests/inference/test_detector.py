"""Inference: each level's own sizes, merged in the image frame, on images of any sides."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sniper.chips import LevelSpec
from sniper.config.experiment import PredictSpec
from sniper.data.datasets import Category, load_dataset
from sniper.errors import RunError
from sniper.geometry import Detections
from sniper.geometry.boxes import size
from sniper.inference.detector import Detector, to_coco
from sniper.pipeline import run_stages
from sniper.runs.run import Run
from tests.data.tiny import write_dataset
from tests.models.batches import build_tiny
from tests.training.experiments import tiny_experiment

CPU = torch.device("cpu")
CATEGORIES = tuple(Category(category_id=i, name=str(i)) for i in (7, 9, 30))


def predictor_of(*levels: LevelSpec, limit: int = 200) -> Detector:
    spec = PredictSpec(levels=levels, precision="fp32", max_detections=limit)
    return Detector(detect=build_tiny().eval().detect, spec=spec, categories=CATEGORIES, device=CPU)


def noise(width: int, height: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("width", "height"), [(1, 1), (1, 90), (90, 1), (50, 40), (400, 20), (20, 400), (200, 150)]
)
def test_images_of_any_sides_are_searched(width: int, height: int) -> None:
    levels = (LevelSpec(factor=2.0, below=40), LevelSpec(long_side=64, at_least=20))
    found = predictor_of(*levels)(noise(width, height))
    assert (found.boxes >= -1e-6).all()
    assert (found.boxes <= np.array([width, height, width, height]) + 1e-6).all()
    assert (np.diff(found.scores) <= 0).all()


def test_a_level_reports_only_sizes_in_its_range() -> None:
    found = predictor_of(LevelSpec(factor=1.0, at_least=20, below=40))(noise(200, 150))
    sizes = size(found.boxes)
    assert len(sizes) > 0
    assert ((sizes >= 20) & (sizes < 40)).all()


def test_boxes_come_back_in_the_image_frame() -> None:
    # The same pixels at the same level, told to be half as large: boxes half as large.
    small = Image.fromarray(noise(128, 96)).resize((64, 48))
    model = build_tiny().eval()
    pixels = torch.from_numpy(np.asarray(small.resize((128, 96), Image.Resampling.BILINEAR)).copy())
    (expected,) = model.detect([pixels.permute(2, 0, 1)])
    found = predictor_of(LevelSpec(factor=2.0), limit=10_000)(np.asarray(small))
    best = expected.boxes[expected.scores.argmax()] / 2
    np.testing.assert_allclose(found.boxes[0], best, atol=1e-3)


def test_no_more_than_the_limit_is_reported() -> None:
    assert len(predictor_of(LevelSpec(factor=1.0), limit=3)(noise(100, 100))) == 3


def test_results_bear_the_categories_own_ids() -> None:
    one = Detections(
        boxes=np.array([[1.0, 2.0, 4.0, 8.0]]), scores=np.array([0.123456]), labels=np.array([2])
    )
    assert to_coco(one, image_id=5, categories=CATEGORIES) == [
        {"image_id": 5, "category_id": 30, "bbox": [1.0, 2.0, 3.0, 6.0], "score": 0.12346}
    ]


def test_a_run_brings_its_weights_and_categories(tmp_path: Path) -> None:
    annotations = load_dataset(write_dataset(tmp_path))
    spec = tiny_experiment(annotations.path)
    spec = dataclasses.replace(spec, train=dataclasses.replace(spec.train, epochs=0.2))
    run = Run.create(tmp_path / "run", config="")
    with pytest.raises(RunError, match="no checkpoint yet"):
        Detector.load(run, spec, device=CPU)
    model = run_stages(run, spec, annotations, device=CPU)
    predictor = Detector.load(run, spec, device=CPU)
    assert [category.name for category in predictor.categories] == ["dark", "bright"]
    image = noise(150, 120)
    own = Detector.of(model.eval(), spec=spec, categories=predictor.categories, device=CPU)(image)
    found = predictor(image)
    assert len(found) > 0
    np.testing.assert_array_equal(found.boxes, own.boxes)
    np.testing.assert_array_equal(found.scores, own.scores)
