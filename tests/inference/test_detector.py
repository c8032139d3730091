"""Prediction: each level's sizes, merged in the image frame, on images of any sides and in any form."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sniper.chips import LevelSpec
from sniper.config.experiment import ExperimentSpec, PredictSpec
from sniper.config.loading import dump_experiment
from sniper.data.datasets import Category, Dataset, load_dataset
from sniper.data.spec import DataSpec
from sniper.errors import ConfigError, ImageError, RunError
from sniper.geometry import Detections
from sniper.geometry.boxes import size
from sniper.inference.calibration import Calibration, save_calibration
from sniper.inference.detector import Detector, to_coco
from sniper.pipeline import run_stages
from sniper.runs.run import Run
from tests.data.tiny import write_dataset
from tests.inference.blobs import blob_detector, draw_blobs
from tests.models.batches import build_tiny
from tests.training.experiments import tiny_experiment

CPU = torch.device("cpu")
CATEGORIES = tuple(Category(category_id=i, name=f"class {i}") for i in (7, 9, 30))


def tiny_detector(*levels: LevelSpec, max_detections: int = 200) -> Detector:
    spec = PredictSpec(levels=levels, precision="fp32", max_detections=max_detections)
    return Detector(detect=build_tiny().eval().detect, spec=spec, categories=CATEGORIES, device=CPU)


def noise(width: int, height: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("width", "height"), [(1, 1), (1, 90), (90, 1), (50, 40), (400, 20), (20, 400), (200, 150)]
)
def test_images_of_any_sides_are_searched(width: int, height: int) -> None:
    levels = (LevelSpec(factor=2.0, below=40), LevelSpec(long_side=64, at_least=20))
    detections = tiny_detector(*levels).predict(noise(width, height))
    assert (detections.boxes >= -1e-6).all()
    assert (detections.boxes <= np.array([width, height, width, height]) + 1e-6).all()
    assert (np.diff(detections.scores) <= 0).all()


def test_a_level_reports_only_sizes_in_its_range() -> None:
    detections = tiny_detector(LevelSpec(factor=1.0, at_least=20, below=40)).predict(noise(200, 150))
    sizes = size(detections.boxes)
    assert len(sizes) > 0
    assert ((sizes >= 20) & (sizes < 40)).all()


def test_boxes_come_back_in_the_image_frame() -> None:
    # The same level image, of an image half as large: boxes half as large.
    small = Image.fromarray(noise(128, 96)).resize((64, 48))
    pixels = torch.from_numpy(np.asarray(small.resize((128, 96), Image.Resampling.BILINEAR)).copy())
    (expected,) = build_tiny().eval().detect([pixels.permute(2, 0, 1)])
    detections = tiny_detector(LevelSpec(factor=2.0), max_detections=10_000).predict(small)
    best = expected.boxes[expected.scores.argmax()] / 2
    np.testing.assert_allclose(detections.boxes[0], best, atol=1e-3)


def test_an_image_that_is_shown_much_smaller_than_validation_images_is_warned_of() -> None:
    # Images of 128 pixels were validated; one that is put together from 25 of them has the same objects.
    detector = dataclasses.replace(tiny_detector(LevelSpec(long_side=64)), scale=0.5)
    detector.predict(noise(250, 100))
    with pytest.warns(
        UserWarning, match=r"640x640 pixels is searched at 0\.1 of its size.* 0\.5 or more.*factor: 0\.5"
    ):
        detector.predict(noise(640, 640))
    chosen = dataclasses.replace(
        detector, spec=PredictSpec(levels=(LevelSpec(factor=0.1),), precision="fp32")
    )
    chosen.predict(noise(640, 640))


def test_no_more_than_the_maximum_is_reported() -> None:
    detector = tiny_detector(LevelSpec(factor=1.0), max_detections=3)
    assert len(detector.predict(noise(100, 100))) == 3


def test_a_minimum_score_selects_confident_detections() -> None:
    detector = dataclasses.replace(tiny_detector(LevelSpec(factor=1.0)), min_score=0.25)
    everything = detector.predict(noise(100, 100))
    assert everything.min_score == 0.25
    least = float(np.median(everything.scores))
    best = detector.predict(noise(100, 100), min_score=least)
    np.testing.assert_array_equal(best.boxes, everything.confident(least).boxes)
    assert 0 < len(best) < len(everything)
    (searched,) = detector.predict_many([noise(100, 100)], min_score=least)
    for wrong in (5, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"min_score: expected a score from 0 to 1, not"):
            detector.predict(noise(100, 100), min_score=wrong)
    assert searched is not None
    assert len(searched) == len(best)


def test_detections_have_class_names() -> None:
    detections = tiny_detector(LevelSpec(factor=1.0)).predict(noise(100, 100))
    assert detections.class_names == ("class 7", "class 9", "class 30")
    assert set(detections.names) <= set(detections.class_names)


def test_an_unreadable_file_is_an_error_even_where_such_files_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_text("no image")
    detector = blob_detector(LevelSpec(factor=1.0))
    skipping = dataclasses.replace(detector, data=DataSpec(on_bad_image="skip"))
    with pytest.raises(ImageError, match=r"bad\.png: cannot be read as an image"):
        skipping.predict(tmp_path / "bad.png")


def test_every_form_of_an_image_is_searched_alike(tmp_path: Path) -> None:
    pixels, _ = draw_blobs(0, width=100, height=80, smallest=5, largest=20)
    path = tmp_path / "image.png"
    Image.fromarray(pixels).save(path)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    detector = blob_detector(LevelSpec(factor=1.0))
    expected = detector.predict(pixels)
    assert len(expected) > 0
    for source in (path, str(path), path.read_bytes(), Image.fromarray(pixels), tensor):
        np.testing.assert_array_equal(detector.predict(source).boxes, expected.boxes)


def test_results_have_the_ids_of_the_categories() -> None:
    detections = Detections(
        boxes=np.array([[1.0, 2.0, 4.0, 8.0]]), scores=np.array([0.123456]), labels=np.array([2])
    )
    assert to_coco(detections, image_id=5, categories=CATEGORIES) == [
        {"image_id": 5, "category_id": 30, "bbox": [1.0, 2.0, 3.0, 6.0], "score": 0.12346}
    ]


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return load_dataset(write_dataset(tmp_path))


@pytest.fixture
def spec(dataset: Dataset) -> ExperimentSpec:
    spec = tiny_experiment(dataset.path)
    return dataclasses.replace(spec, train=dataclasses.replace(spec.train, epochs=0.2))


def test_a_run_is_loaded_with_its_weights_and_classes(
    dataset: Dataset, spec: ExperimentSpec, tmp_path: Path
) -> None:
    run = Run.create(tmp_path / "run", config=dump_experiment(spec))
    model = run_stages(run, spec, dataset, device=CPU)
    image = noise(150, 120)
    expected = Detector.from_model(
        model.eval(), spec=spec, categories=dataset.categories, device=CPU
    ).predict(image)
    assert len(expected) > 0
    for detector in (
        Detector.load(run, CPU),
        Detector.load(str(run.folder), "cpu"),
        Detector.load(run.folder, device="cpu", spec=spec),
    ):
        detections = detector.predict(image)
        assert detections.class_names == ("dark", "bright")
        np.testing.assert_array_equal(detections.boxes, expected.boxes)
        np.testing.assert_array_equal(detections.scores, expected.scores)


def calibration(step: int, **fields: Any) -> Calibration:
    values: dict[str, Any] = {
        "step": step,
        "num_images": 4,
        "num_compared": 4,
        "merge": "linear",
        "soft_nms_sigma": 0.3,
        "merge_iou": 0.4,
        "min_score": 0.35,
        "f1": 0.5,
        "precision": 0.5,
        "recall": 0.5,
    }
    return Calibration(**(values | fields))


def test_a_run_is_loaded_with_what_it_has_chosen(
    dataset: Dataset, spec: ExperimentSpec, tmp_path: Path
) -> None:
    auto = dataclasses.replace(spec, predict=dataclasses.replace(spec.predict, merge="auto"))
    run = Run.create(tmp_path / "run", config=dump_experiment(auto))
    run_stages(run, auto, dataset, device=CPU)
    detector = Detector.load(run, CPU)
    assert (detector.spec.merge, detector.min_score) == ("auto", None)
    gaussian = Detector.load(run, CPU, predict={"merge": "gaussian"})
    np.testing.assert_array_equal(
        detector.predict(noise(150, 120)).scores, gaussian.predict(noise(150, 120)).scores
    )
    save_calibration(run, calibration(int(run.checkpoints[-1].name)))
    chosen = Detector.load(run, CPU)
    assert (chosen.spec.merge, chosen.spec.soft_nms_sigma, chosen.spec.merge_iou) == ("linear", 0.3, 0.4)
    assert chosen.min_score == 0.35
    explicit = Detector.load(run, CPU, spec=spec)
    assert (explicit.spec, explicit.min_score) == (spec.predict, 0.35)


def test_fields_of_prediction_are_overridden(dataset: Dataset, spec: ExperimentSpec, tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", config=dump_experiment(spec))
    run_stages(run, spec, dataset, device=CPU)
    level = LevelSpec(factor=2.0, below=30)
    changed = Detector.load(run, CPU, predict={"merge": "hard", "levels": [level], "max_detections": "7"})
    assert changed.spec == dataclasses.replace(spec.predict, merge="hard", levels=(level,), max_detections=7)
    assert Detector.load(run, CPU, predict={"levels": "[{factor: 2, below: 30}]"}).spec.levels == (level,)
    with pytest.raises(ConfigError, match=r"predict\.merg is not known; did you mean predict\.merge"):
        Detector.load(run, CPU, predict={"merg": "hard"})


def test_a_run_without_weights_or_of_the_rpn_alone_is_not_loaded(
    spec: ExperimentSpec, tmp_path: Path
) -> None:
    with pytest.raises(RunError, match="there is no run"):
        Detector.load(tmp_path / "none")
    run = Run.create(tmp_path / "run", config=dump_experiment(spec))
    with pytest.raises(RunError, match="no checkpoint yet"):
        Detector.load(run)
    rpn_only = dataclasses.replace(spec, train=dataclasses.replace(spec.train, rpn_only=True))
    with pytest.raises(ConfigError, match="has trained the RPN only"):
        Detector.load(run, spec=rpn_only)
