"""A tiny data set of real pixels and masks: dark shapes on grey, whose outlines the annotations have."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as reference

SIDES = ((160, 120), (96, 200))


def write_masked_dataset(folder: Path) -> Path:
    """Write two images of ellipses and triangles, with run lengths for the former; return the path of the JSON."""
    rng = np.random.default_rng(3)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for number, (width, height) in enumerate(SIDES, start=1):
        pixels = np.full((height, width, 3), 128, dtype=np.uint8)
        y, x = np.mgrid[:height, :width] + 0.5
        for index in range(4):
            side = int(rng.integers(20, 40))
            left, top = int(rng.integers(0, width - side)), int(rng.integers(0, height - side))
            if index % 2:
                shape = ((x - left) / side * 2 - 1) ** 2 + ((y - top) / side * 2 - 1) ** 2 < 1
                encoded = reference.encode(np.asfortranarray(shape.astype(np.uint8)))
                segmentation: Any = {"size": [height, width], "counts": encoded["counts"].decode()}
            else:
                shape = (x > left) & (x < left + side) & (y > top) & (y - top < x - left)
                segmentation = [[left, top, left + side, top, left + side, top + side]]
            pixels[shape] = 0
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": 1,
                    "bbox": [left, top, side, side],
                    "area": int(shape.sum()),
                    "iscrowd": 0,
                    "segmentation": segmentation,
                }
            )
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": width, "height": height})
    path = folder / "train.json"
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "shape"}]}
    path.write_text(json.dumps(content))
    return path
