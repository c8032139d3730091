"""Extreme image shapes and numbers of boxes train and predict."""

import json
from pathlib import Path

import numpy as np
import torch

from sniper.data.datasets import load_dataset
from sniper.data.images.files import load_image
from sniper.inference.detector import Detector
from sniper.runs.run import Run
from sniper.training.callbacks import Callbacks, StepReport
from tests.data.tiny import write_dataset
from tests.training.experiments import tiny_experiment, train_run, with_train

SIDES = {
    "a chip full of boxes": (64, 64),
    "smaller than a chip": (20, 15),
    "one pixel wide": (1, 90),
    "one pixel high": (90, 1),
    "a single pixel": (1, 1),
    "a panorama of 20:1": (600, 30),
    "no box at all": (100, 80),
}


def write_odd_world(folder: Path) -> Path:
    """Write one image of each kind; the first has 900 boxes, the last none, the others one each."""
    path = write_dataset(folder, sides=list(SIDES.values()), boxes_per_image=1)
    content = json.loads(path.read_text())
    content["annotations"] = content["annotations"][1:-1]
    rng = np.random.default_rng(0)
    for number in range(900):
        x, y = rng.integers(0, 50, 2).tolist()
        content["annotations"].append(
            {"id": 1000 + number, "image_id": 1, "category_id": 10, "bbox": [x, y, 12, 12], "iscrowd": 0}
        )
    path.write_text(json.dumps(content))
    return path


def test_extreme_images_train_and_predict(tmp_path: Path) -> None:
    dataset = load_dataset(write_odd_world(tmp_path))
    spec = with_train(tiny_experiment(dataset.path), epochs=2, milestones=())
    run = Run.create(tmp_path / "run", config="")
    reports: list[StepReport] = []
    train_run(run, spec, dataset, callbacks=Callbacks(on_step=reports.append))
    assert all(np.isfinite(report.loss) for report in reports)

    detector = Detector.load(run, torch.device("cpu"), spec=spec)
    for record in dataset:
        detections = detector.predict(load_image(record.path))
        assert (detections.boxes <= np.array([record.width, record.height] * 2) + 1e-6).all()
        assert np.isfinite(detections.boxes).all()
