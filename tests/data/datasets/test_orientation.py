"""Sides of a file as stored, beside boxes of the oriented image, are corrected; nothing is guessed."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image

from sniper.data.datasets import load_dataset
from sniper.data.images.files import load_image
from sniper.data.spec import DataSpec, ReadSpec
from sniper.errors import AnnotationError

UPRIGHT = [
    (40, 60, 60, 80),
    (200, 150, 50, 60),
    (120, 320, 40, 60),
]  # xywh in 300x400; the last only fits upright
FITTING = UPRIGHT[:2]
STORED = (320, 120, 60, 40)  # fits only 400x300


def write(folder: Path, boxes: list[list[tuple[int, int, int, int]]]) -> Path:
    """Write portraits of a phone with red objects, and annotations with the sides of the files as stored."""
    (folder / "images").mkdir()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    for index, image_boxes in enumerate(boxes):
        upright = np.full((400, 300, 3), 90, np.uint8)
        for x, y, width, height in UPRIGHT:
            upright[y : y + height, x : x + width] = (250, 40, 40)
        name = f"{index}.jpg"
        Image.fromarray(np.rot90(upright, 1)).save(folder / "images" / name, exif=exif, quality=95)
        images.append({"id": index, "file_name": name, "width": 400, "height": 300})
        for box in image_boxes:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index,
                    "category_id": 1,
                    "bbox": list(box),
                    "iscrowd": 0,
                }
            )
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "red"}]}
    (folder / "train.json").write_text(json.dumps(content))
    return folder / "train.json"


def test_sides_as_stored_are_exchanged_where_boxes_fit_only_the_oriented_image(tmp_path: Path) -> None:
    dataset = load_dataset(write(tmp_path, [FITTING, UPRIGHT, UPRIGHT]))
    assert [record.sides for record in dataset] == [(300, 400)] * 3
    (warning,) = [line for line in dataset.warnings if "as stored" in line]
    assert (
        "3 images with the width and height of the file as stored, exchanged, since 2 boxes are inside"
        in warning
    )
    for record in dataset:
        pixels = load_image(record.path)
        for x1, y1, x2, y2 in record.boxes.astype(int):
            assert np.abs(pixels[y1:y2, x1:x2].mean(axis=(0, 1)) - [250, 40, 40]).max() < 8


def test_sides_as_stored_are_refused_where_the_boxes_fit_both_frames(tmp_path: Path) -> None:
    path = write(tmp_path, [FITTING, FITTING])
    with pytest.raises(AnnotationError) as raised:
        load_dataset(path)
    message = str(raised.value)
    assert (
        message.count("has 300x400 pixels, but the annotations say 400x300, which are its sides as stored")
        == 2
    )
    assert (
        "inside both as the files are stored and in the EXIF orientation: look at one in a viewer" in message
    )
    assert (
        "exchange width and height in the annotations, otherwise set data.read.exif_orientation: ignore"
        in message
    )


def test_boxes_that_fit_only_the_file_as_stored_name_the_setting(tmp_path: Path) -> None:
    path = write(tmp_path, [FITTING, [STORED]])
    with pytest.raises(
        AnnotationError, match="1 boxes of these images are inside only as their files are stored"
    ):
        load_dataset(path)
    ignoring = load_dataset(path, data=DataSpec(read=ReadSpec(exif_orientation="ignore")))
    assert [record.sides for record in ignoring] == [(400, 300)] * 2


def test_boxes_in_both_frames_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        AnnotationError, match=r"1 boxes .* and 1 only in the EXIF orientation, expected one frame"
    ):
        load_dataset(write(tmp_path, [UPRIGHT, [STORED]]))


def test_images_to_skip_are_skipped_with_the_explanation(tmp_path: Path) -> None:
    dataset = load_dataset(write(tmp_path, [FITTING]), data=DataSpec(on_bad_image="skip"))
    assert any("look at one in a viewer" in line for line in dataset.warnings)
