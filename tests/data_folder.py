"""Real images, annotations and weights for tests, in the folder that `SNIPER_TEST_DATA` names."""

import os
from pathlib import Path

import pytest

VARIABLE = "SNIPER_TEST_DATA"


def find_data(name: str) -> Path:
    """Return a file or folder of the test data; skip the test if there is none.

    Args:
        name: below the folder, such as `data/coco_mini/train.json` or `weights/mobilenetv2_100.safetensors`.
    """
    folder = os.environ.get(VARIABLE)
    if not folder:
        pytest.skip(f"{VARIABLE} is not set: the test needs {name} below the folder that it names")
    path = Path(folder).absolute() / name
    if not path.exists():
        pytest.skip(f"{VARIABLE}: {path} does not exist")
    return path
