"""Small synthetic data sets for the cases: colored rectangles and discs on noise, with COCO JSON."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw


def world(folder: str | Path) -> None:
    """Draw 12 training and 4 test images with 8 to 14 objects of two classes each."""
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for name, seed, count in (("train", 1, 12), ("test", 2, 4)):
        generator = np.random.default_rng(seed)
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for image_id in range(1, count + 1):
            width, height = (int(side) for side in generator.integers(300, 420, 2))
            picture = Image.fromarray(generator.integers(90, 130, (height, width, 3), dtype=np.uint8))
            boxes = draw_objects(picture, generator)
            file_name = f"{name}_{image_id - 1:03d}.jpg"
            picture.save(folder / "images" / file_name, quality=92)
            images.append({"id": image_id, "file_name": file_name, "width": width, "height": height})
            annotations += [
                {
                    "id": len(annotations) + number,
                    "image_id": image_id,
                    "category_id": category_id,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                }
                for number, (category_id, box) in enumerate(boxes, start=1)
            ]
        categories = [{"id": 1, "name": "disc"}, {"id": 2, "name": "square"}]
        write(
            folder / f"{name}.json", {"images": images, "annotations": annotations, "categories": categories}
        )


def draw_objects(picture: Image.Image, generator: np.random.Generator) -> list[tuple[int, list[float]]]:
    """Draw objects of random size, place and color; return the category id and the box, xywh, of each."""
    draw = ImageDraw.Draw(picture)
    boxes = []
    for _ in range(int(generator.integers(8, 15))):
        side = float(np.exp(generator.uniform(np.log(10), np.log(120))))
        width, height = side, side * float(generator.uniform(0.7, 1.4))
        x = float(generator.uniform(0, max(picture.width - width, 1)))
        y = float(generator.uniform(0, max(picture.height - height, 1)))
        category_id = int(generator.integers(1, 3))
        red, green, blue = generator.integers(0, 256, 3).tolist()
        shape = draw.ellipse if category_id == 1 else draw.rectangle
        shape([x, y, x + width, y + height], fill=(red, green, blue))
        width, height = min(width, picture.width - x), min(height, picture.height - y)
        boxes.append((category_id, [round(value, 2) for value in (x, y, width, height)]))
    return boxes


def small(folder: str | Path, *, n: int = 3, name: str = "train") -> dict[str, Any]:
    """Copy the first images of the shared data set to a folder; return its COCO object."""
    shared = Path(os.environ["SHARED"])  # where the data set and the run are that all cases use
    if not (shared / "train.json").exists():
        world(shared)
    coco = json.loads((shared / f"{name}.json").read_text())
    images = coco["images"][:n]
    ids = {image["id"] for image in images}
    target = Path(folder) / "images"
    target.mkdir(parents=True, exist_ok=True)
    for image in images:
        shutil.copy(shared / "images" / image["file_name"], target)
    annotations = [annotation for annotation in coco["annotations"] if annotation["image_id"] in ids]
    return {"images": images, "annotations": annotations, "categories": coco["categories"]}


def write(path: str | Path, coco: object) -> None:
    """Write a JSON file."""
    Path(path).write_text(json.dumps(coco))
