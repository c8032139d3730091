"""Masks in a search: of windows and levels, in results, in pictures, and in little memory."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hotcoco import mask as coco
from PIL import Image

from sniper.chips import LevelSpec
from sniper.data.images.files import ArrayImageReader
from sniper.geometry import Detections
from sniper.inference.results import ImageToSearch, search_to_file
from sniper.reports.pictures import draw_detections
from tests.inference.blobs import blob_detector, draw_blobs

LEVEL = LevelSpec(factor=1.0)


@pytest.mark.parametrize(
    ("levels", "window"),
    [
        ((LEVEL,), 2048),
        ((LEVEL,), 256),
        ((LevelSpec(factor=2.0, below=60), LevelSpec(factor=1.0, at_least=40)), 256),
    ],
)
def test_masks_of_windows_and_levels_are_those_of_the_image(
    levels: tuple[LevelSpec, ...], window: int
) -> None:
    image, boxes = draw_blobs(3, width=500, height=400, smallest=12, largest=90)
    detector = blob_detector(*levels, window=window, has_masks=True)
    found = detector.predict(image, min_score=0.3)
    assert len(found) == len(boxes)
    assert found.masks is not None
    assert found.masks.sides.tolist() == [[500, 400]] * len(boxes)
    union = found.masks.to_arrays().any(axis=0)
    assert (union == (image[:, :, 0] > 128)).mean() > (0.999 if levels == (LEVEL,) else 0.99)


def test_masks_are_predicted_for_the_window_that_is_responsible_alone() -> None:
    """All others would be dropped before merging."""
    image, boxes = draw_blobs(3, width=500, height=400, smallest=12, largest=60)
    detector = blob_detector(LEVEL, window=256, has_masks=True)
    result = next(iter(detector.search([image])))
    assert result is not None
    assert result.detections.masks is not None
    assert len(boxes) <= len(result.detections) <= 1.2 * len(boxes)


def test_results_have_masks_as_coco_encodes_them(tmp_path: Path) -> None:
    image, boxes = draw_blobs(1, width=200, height=150, smallest=12, largest=60, count=12)
    Image.fromarray(image).save(tmp_path / "image.png")
    images = [ImageToSearch(image_id=7, path=tmp_path / "image.png")]
    target = tmp_path / "results.json"
    search_to_file(
        blob_detector(LEVEL, has_masks=True),
        images,
        target,
        source={},
        existing="replace",
        on_progress=lambda *_: None,
    )
    entries = json.loads(target.read_text())
    assert len(entries) == len(boxes)
    for entry in entries:
        assert entry["segmentation"]["size"] == [150, 200]
        mask = coco.decode({**entry["segmentation"], "counts": entry["segmentation"]["counts"].encode()})
        x, y, width, height = (round(value) for value in entry["bbox"])
        assert mask.sum() == mask[y : y + height, x : x + width].sum() == width * height


def test_an_image_without_objects_has_no_masks(tmp_path: Path) -> None:
    found = blob_detector(LEVEL, has_masks=True).predict(np.zeros((80, 60, 3), np.uint8))
    assert len(found) == 0
    draw_detections(
        ArrayImageReader(np.zeros((80, 60, 3), np.uint8)), found, tmp_path / "none.png", categories=()
    )


def test_supervision_has_masks_of_the_size_of_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "supervision", SimpleNamespace(Detections=SimpleNamespace))
    image, _ = draw_blobs(1, width=200, height=150, smallest=12, largest=60, count=12)
    found = blob_detector(LEVEL, has_masks=True).predict(image)
    converted = found.to_supervision(0.3)
    assert converted.mask.shape == (len(found.confident(0.3)), 150, 200)
    assert converted.mask.dtype == np.bool_
    assert (converted.mask.any(axis=0) == (image[:, :, 0] > 128)).all()
    assert not hasattr(Detections.empty().to_supervision(), "mask")


def test_pictures_have_outlines_in_place_of_boxes(tmp_path: Path) -> None:
    image = np.zeros((120, 160, 3), np.uint8)
    image[20:80, 30:110] = 255
    detector = blob_detector(LEVEL, has_masks=True)
    found = detector.predict(image)
    assert found.masks is not None
    grids = found.masks.grids.copy()
    grids[:, :14, 14:] = 0  # an L
    shaped = found.with_masks(
        type(found.masks)(grids=grids, boxes=found.masks.boxes, sides=found.masks.sides)
    )
    pictures = []
    for name, each in (
        ("l", shaped),
        ("box", Detections(boxes=found.boxes, scores=found.scores, labels=found.labels)),
    ):
        path = tmp_path / f"{name}.png"
        draw_detections(ArrayImageReader(image), each, path, categories=detector.categories)
        pictures.append(np.asarray(Image.open(path)).astype(int))
    zoom = 1200 / 160
    row, column = int(50 * zoom), int(90 * zoom)  # the inner corner of the L is at (70, 50)
    patch = np.s_[row - 6 : row + 7, column - 3 : column + 4]
    assert (np.ptp(pictures[0][patch], axis=2) > 20).any()  # a coloured line
    assert not (np.ptp(pictures[1][patch], axis=2) > 20).any()


_LARGE = """
import resource
import numpy as np
import torch
from sniper.chips import LevelSpec
from sniper.config.experiment import PredictSpec
from sniper.data.datasets import Category
from sniper.geometry import Detections
from sniper.geometry.detection_masks import DetectionMasks
from sniper.inference.detector import Detector, to_coco

def detect(images, select):
    found = []
    for index, image in enumerate(images):
        height, width = image.shape[1:]
        generator = np.random.default_rng(index)
        corners = generator.uniform(0, [width - 60, height - 60], size=(300, 2))
        boxes = np.concatenate([corners, corners + generator.uniform(20, 60, size=(300, 2))], axis=1)
        each = Detections(boxes=boxes, scores=generator.uniform(0.3, 1, 300), labels=np.zeros(300, dtype=np.int64))
        each = select(index, each)
        found.append(each.with_masks(DetectionMasks.of(np.full((len(each), 28, 28), 255, np.uint8), each.boxes)))
    return found

detector = Detector(
    detect=None, detect_masks=detect, mask_side=28, device=torch.device("cpu"),
    spec=PredictSpec(levels=(LevelSpec(factor=1.0),), window=2048, merge="hard", max_detections=5000),
    categories=(Category(category_id=1, name="blob"),),
)
found = detector.predict(np.zeros((9000, 12000, 3), np.uint8))
entries = to_coco(found, image_id=1, categories=detector.categories)
assert len(entries) == 5000, len(entries)
assert all(entry["segmentation"]["size"] == [9000, 12000] for entry in entries)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_five_thousand_objects_of_a_large_image_take_less_than_two_gigabytes() -> None:
    done = subprocess.run([sys.executable, "-c", _LARGE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 2_000_000
