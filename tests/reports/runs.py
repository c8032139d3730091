"""A run without weights, whose detections are the objects of a tiny data set with errors put in."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sniper.config.derived import DerivedSetting
from sniper.config.experiment import ExperimentSpec
from sniper.config.loading import dump_experiment
from sniper.data.datasets import Dataset, load_dataset
from sniper.evaluation.pair import EvaluationPair
from sniper.geometry.boxes import to_xywh
from sniper.reports.reporter import RunReporter
from sniper.reports.scored import Subject
from sniper.runs.run import Run
from sniper.training.epochs import order_epoch
from tests.training.experiments import tiny_experiment

SETTINGS = [
    DerivedSetting(name="epochs", value="12", reason="4 images <of few objects>", option="--epochs"),
]
ALARM = [140.0, 100.0, 20.0, 20.0]
"""A box where nothing is annotated, x, y, width and height."""

_OBJECTS = ([10, 10, 40, 40], [100, 20, 30, 30], [40, 90, 50, 50])


def write_world(folder: Path, *, has_masks: bool = False) -> Dataset:
    """Write three images of three objects, which lie apart, of two classes; their masks are triangles."""
    rng = np.random.default_rng(0)
    annotations: list[dict[str, Any]] = []
    (folder / "images").mkdir()
    for image in range(3):
        pixels = rng.integers(100, 140, (160, 200, 3), dtype=np.uint8)
        for row, (x, y, width, height) in enumerate(_OBJECTS):
            label = (image + row) % 2
            pixels[y : y + height, x : x + width] = 250 * label
            masks = {"segmentation": triangle_in([x, y, width, height])} if has_masks else {}
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image + 1,
                    "category_id": 10 + label,
                    "bbox": [x, y, width, height],
                    "area": width * height,
                    "iscrowd": 0,
                    **masks,
                }
            )
        Image.fromarray(pixels).save(folder / "images" / f"{image}.png")
    images = [
        {"id": image + 1, "file_name": f"{image}.png", "width": 200, "height": 160} for image in range(3)
    ]
    categories = [{"id": 10, "name": "dark"}, {"id": 11, "name": "bright"}]
    path = folder / "train.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return load_dataset(path)


def triangle_in(box: Sequence[float]) -> list[list[float]]:
    """Return the lower left half of a box, x, y, width and height, as a polygon."""
    x, y, width, height = box
    return [[x, y, x + width, y + height, x, y + height]]


def erroneous_results(dataset: Dataset, *, shift: float = 0.0) -> list[dict[str, Any]]:
    """Return the objects as detections, but with one false alarm, one missed, one of a wrong class, one loose.

    Args:
        dataset: with three images of three objects.
        shift: pixels by which all other boxes are moved, which lowers AP.
    """
    ids = [category.category_id for category in dataset.categories]
    results: list[dict[str, Any]] = []

    def add(image_id: int | str, label: int, box: list[float], score: float) -> None:
        masks = {"segmentation": triangle_in(box)} if dataset.masks is not None else {}
        results.append(
            {"image_id": image_id, "category_id": ids[label], "bbox": box, "score": score, **masks}
        )

    for index, record in enumerate(dataset):
        for row, (x, y, width, height) in enumerate(to_xywh(record.boxes).tolist()):
            label, score = int(record.labels[row]), 0.9 - 0.03 * index - 0.01 * row
            match (index, row):
                case (1, 0):
                    continue
                case (1, 1):
                    add(record.image_id, 1 - label, [x + shift, y, width, height], score)
                case (2, 0):
                    add(record.image_id, label, [x, y, width, 0.4 * height], score)
                case _:
                    add(record.image_id, label, [x + shift, y, width, height], score)
    add(dataset[0].image_id, 0, ALARM, 0.95)
    return results


def subject_of(
    dataset: Dataset, spec: ExperimentSpec, *, min_score: float | None = 0.5, shift: float = 0.0
) -> Subject:
    return Subject(
        pair=EvaluationPair.of(erroneous_results(dataset, shift=shift), dataset),
        dataset=dataset,
        levels=spec.predict.levels,
        read=spec.data.read,
        min_score=min_score,
        title="the 3 validation images",
        step=20,
    )


def write_run(folder: Path, dataset: Dataset, *, shift: float = 0.0, seed: int = 0) -> Run:
    """Write a run with metrics, scores, chips and its page."""
    spec = replace(tiny_experiment(dataset.path), seed=seed)
    run = Run.create(folder, config=dump_experiment(spec))
    rng = np.random.default_rng(seed)
    for step in range(1, 21):
        run.log(
            {
                "stage": "train",
                "step": step,
                "epoch": step / 10,
                "loss": 2 / step + 0.1 * rng.random(),
                "rpn_box": 0.1,
                "head_class": 1 / step,
                "gradient_norm": 1.0,
                "learning_rate": 0.01,
                "seconds": 1.5,
                "chips_per_second": 4.0,
                "megapixels": 0.25,
                "data_wait": 0.05,
                "peak_memory_gb": 1.5,
                "positives": 4,
                "positive_accuracy": step / 20,
            }
        )
        if step % 10 == 0:
            run.log(
                {
                    "stage": "evaluate",
                    "step": step,
                    "epoch": step / 10,
                    "ap": step / 40,
                    "ap50": step / 25,
                    "num_images": 3,
                }
            )
            (run.folder / "checkpoints" / f"{step:08d}").mkdir()
    failures: list[str] = []
    reporter = RunReporter(run=run, on_warning=failures.append)
    reporter.save_settings(SETTINGS)
    reporter.save_scored(subject_of(dataset, spec, shift=shift))
    reporter.save_chips(order_epoch(spec, dataset, epoch=0), spec.data, epoch=0)
    assert not failures, failures
    return run


def page_of(run: Run) -> str:
    return run.report_path.read_text()


def part_of(run: Run, name: str) -> Any:
    return json.loads((run.report_folder / f"{name}.json").read_text())
