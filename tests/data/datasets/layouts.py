"""Small data sets on disk in various formats: files by name, and the boxes that are read from them."""

from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from sniper.data.datasets import Dataset

SIDES = (100, 50)


def write_files(folder: Path, files: Mapping[str, str | bytes | None]) -> Path:
    """Write files by name: text, bytes, or an image of 100x50 pixels where there is None."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            Image.new("RGB", SIDES).save(path)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def boxes_by_file(dataset: Dataset) -> dict[str, list[tuple[str, list[float], bool]]]:
    """Return name of category, box rounded to 0.001 pixels, and whether it is a crowd, by name of the image file."""
    return {
        record.file_name: [
            (dataset.categories[label].name, [round(value, 3) for value in box], is_crowd)
            for box, label, is_crowd in zip(
                record.boxes.tolist(), record.labels.tolist(), record.is_crowd.tolist(), strict=True
            )
        ]
        for record in dataset
    }


def only_boxes(dataset: Dataset) -> list[list[float]]:
    """Return all boxes, rounded to 0.001 pixels."""
    return [[round(value, 3) for value in box] for box in dataset.boxes.tolist()]
