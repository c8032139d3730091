"""Images and annotations at the edge of what there is: all of them train and predict."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import torch

from sniper.data.datasets import load_dataset
from sniper.data.images.files import load_image
from sniper.inference.detector import Detector
from sniper.runs.run import Run
from sniper.training.loop import StepReport, train
from tests.data.tiny import write_dataset
from tests.training.experiments import tiny_experiment

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


def test_images_at_the_edge_of_what_there_is_train_and_predict(tmp_path: Path) -> None:
    annotations = load_dataset(write_odd_world(tmp_path))
    spec = tiny_experiment(annotations.path)
    spec = dataclasses.replace(spec, train=dataclasses.replace(spec.train, epochs=2, milestones=()))
    run = Run.create(tmp_path / "run", config="")
    reports: list[StepReport] = []
    train(run, spec, annotations, device=torch.device("cpu"), watch=reports.append)
    assert all(np.isfinite(report.loss) for report in reports)

    predictor = Detector.load(run, spec, device=torch.device("cpu"))
    for record in annotations:
        found = predictor(load_image(record.path))
        assert (found.boxes <= np.array([record.width, record.height] * 2) + 1e-6).all()
        assert np.isfinite(found.boxes).all()
