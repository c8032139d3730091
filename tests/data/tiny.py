"""A tiny synthetic data set on disk."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def write_image(path: Path, *, width: int, height: int, seed: int = 0) -> None:
    """Write an image of smooth noise, drawn from the seed."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (max(height // 8, 1), max(width // 8, 1), 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(path)


def write_dataset(
    folder: Path,
    *,
    sides: Sequence[tuple[int, int]] = ((160, 120), (96, 200), (200, 200), (150, 90)),
    boxes_per_image: int = 3,
    name: str = "train",
) -> Path:
    """Write images with squares of two classes, bright and dark, and their COCO JSON; return its path."""
    rng = np.random.default_rng(0)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for i, (width, height) in enumerate(sides):
        pixels = np.full((height, width, 3), 128, dtype=np.uint8)
        pixels += rng.integers(0, 20, pixels.shape, dtype=np.uint8)
        for _ in range(boxes_per_image):
            side = min(int(rng.integers(12, 60)), width, height)
            x, y = int(rng.integers(0, width - side + 1)), int(rng.integers(0, height - side + 1))
            label = int(rng.integers(0, 2))
            pixels[y : y + side, x : x + side] = 250 * label
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i + 1,
                    "category_id": 10 + label,
                    "bbox": [x, y, side, side],
                    "area": side * side,
                    "iscrowd": 0,
                }
            )
        file_name = f"{name}_{i}.png"
        (folder / "images").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / "images" / file_name)
        images.append({"id": i + 1, "file_name": file_name, "width": width, "height": height})
    categories = [{"id": 10, "name": "dark"}, {"id": 11, "name": "bright"}]
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path
