"""Fixtures of the tests of data sets."""

from pathlib import Path

import pytest
from PIL import Image

from tests.data.datasets.small import COCO


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with `images/` and the three image files of COCO in it."""
    for image in COCO["images"]:
        path = tmp_path / "images" / image["file_name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (image["width"], image["height"])).save(path)
    return tmp_path
