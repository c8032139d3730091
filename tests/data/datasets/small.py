"""A small COCO data set, and ways to change and load it."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sniper.data.datasets import Dataset, load_dataset

COCO: dict[str, Any] = {
    "images": [
        {"id": 30, "file_name": "c.png", "width": 40, "height": 30},
        {"id": 10, "file_name": "sub/a.png", "width": 20, "height": 50},
        {"id": 20, "file_name": "b.png", "width": 8, "height": 6},
    ],
    "annotations": [
        {"id": 1, "image_id": 10, "category_id": 7, "bbox": [1, 2, 10, 20], "iscrowd": 0, "area": 150.5},
        {"id": 2, "image_id": 30, "category_id": 3, "bbox": [0.5, 0, 39.5, 30], "iscrowd": 1},
        {"id": 3, "image_id": 10, "category_id": 3, "bbox": [0, 0, 20, 50]},
    ],
    "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}, {"id": 90, "name": "unseen"}],
}

Change = Callable[[dict[str, Any]], object]


def changed(change: Change) -> dict[str, Any]:
    """Return a changed copy of COCO."""
    content = copy.deepcopy(COCO)
    change(content)
    return content


def image(**values: Any) -> Change:
    """Change the last image, of id 20."""
    return lambda coco: coco["images"][2].update(values)


def box(**values: Any) -> Change:
    """Change the first annotation, of an image of 20x50 pixels."""
    return lambda coco: coco["annotations"][0].update(values)


def category(**values: Any) -> Change:
    """Change the last category, of id 90."""
    return lambda coco: coco["categories"][2].update(values)


def load(folder: Path, content: Any = COCO, **options: Any) -> Dataset:
    """Write a file and load it."""
    path = folder / "train.json"
    path.write_text(json.dumps(content))
    return load_dataset(path, **options)
