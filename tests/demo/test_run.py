"""The demo trains, scores, and draws pictures."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sniper.chips import LevelSpec
from sniper.data.datasets import ImageRecord
from sniper.demo.run import LEVELS, DemoSpec, demo_experiment, find_levels, quick_look, run_demo
from sniper.demo.shapes import ShapesSpec
from sniper.errors import RunError
from sniper.geometry import Detections
from tests.inference.blobs import blob_detector, draw_blobs

TINY = DemoSpec(
    seed=3,
    num_train=2,
    num_test=1,
    epochs=0.3,
    warmup_steps=0,
    world=ShapesSpec(min_side=300, max_side=400, max_size=120.0, num_groups=1),
)


def run_silently(folder: Path, spec: DemoSpec, lines: list[str] | None = None) -> dict[str, Any]:
    log = (lambda line: None) if lines is None else lines.append
    return run_demo(folder, device=torch.device("cpu"), log=log, spec=spec)


@pytest.mark.slow
def test_the_demo_detects_objects(tmp_path: Path) -> None:
    result = run_silently(tmp_path / "demo", DemoSpec())
    assert result["ap50"] >= 0.8  # five seeds are in docs/benchmarks.md
    assert result["ar_100_any_class"] >= 0.7


def test_a_tiny_demo_scores_and_draws_pictures(tmp_path: Path) -> None:
    folder, lines = tmp_path / "demo", list[str]()
    result = run_silently(folder, TINY, lines)
    assert {"ap", "ap50", "ar_100", "ar_100_any_class", "minutes"} <= result.keys()
    assert 0 <= result["ar_100_any_class"] <= 1
    assert 0 < result["share_of_pyramid"] < 1
    assert result["num_images"] == 1
    pictures = {path.stem for path in Path(result["pictures"]).iterdir()}
    assert pictures == {"chips", "levels", "detections_test_000"}
    assert isinstance(json.loads((folder / "detections.json").read_text()), list)
    assert lines[0].startswith("drawing 2 training and 1 test images of 300 to 400 px")
    assert f"{100 * result['share_of_pyramid']:.0f} % of the pixels" in lines[1]


def test_a_seed_draws_other_images_for_training_and_for_the_test(tmp_path: Path) -> None:
    drawn = set()
    for seed in (0, 1):
        run_silently(tmp_path / str(seed), replace(TINY, seed=seed, num_train=1))
        drawn |= {path.read_bytes() for path in (tmp_path / str(seed) / "data" / "images").iterdir()}
    assert len(drawn) == 4


def test_the_seed_is_that_of_the_weights_and_of_the_order() -> None:
    assert demo_experiment(Path("data"), spec=DemoSpec(seed=7)).seed == 7


def test_a_quick_look_draws_and_trains_less() -> None:
    full, quick = DemoSpec(seed=2), quick_look(2)
    assert quick.seed == 2
    assert quick.world == full.world
    assert quick.num_train * quick.epochs < full.num_train * full.epochs / 2


def test_a_folder_with_a_demo_is_refused_and_left_unchanged(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(RunError, match="already has a demo; remove it"):
        run_silently(tmp_path, TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def blob_record(folder: Path) -> tuple[ImageRecord, np.ndarray]:
    """Write an image of bright rectangles of many sizes; return its record and their boxes."""
    image, boxes = draw_blobs(1, width=800, height=700, smallest=10, largest=250)
    path = folder / "blobs.png"
    Image.fromarray(image).save(path)
    record = ImageRecord(
        image_id=1,
        file_name=path.name,
        path=path,
        image_root=folder,
        width=800,
        height=700,
        boxes=boxes,
        labels=np.zeros(len(boxes), dtype=np.int64),
        is_crowd=np.zeros(len(boxes), dtype=np.bool_),
    )
    return record, boxes


def test_each_detection_is_from_the_level_that_detects_its_size(tmp_path: Path) -> None:
    record, _ = blob_record(tmp_path)
    levels = (LevelSpec(factor=2.0, below=40), LevelSpec(factor=1.0, at_least=40))
    detector = blob_detector(*levels)
    detections = detector.predict(record)
    sizes = np.sqrt(np.prod(detections.boxes[:, 2:] - detections.boxes[:, :2], axis=1))
    assert find_levels(detector, record, detections).tolist() == (sizes >= 40).astype(int).tolist()
    assert {0, 1} == set(find_levels(detector, record, detections).tolist())


def test_an_image_without_detections_has_no_levels(tmp_path: Path) -> None:
    record, _ = blob_record(tmp_path)
    empty = Detections(boxes=np.empty((0, 4)), scores=np.empty(0), labels=np.empty(0, dtype=np.int64))
    assert len(find_levels(blob_detector(*LEVELS), record, empty)) == 0
