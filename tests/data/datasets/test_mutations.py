"""Damaged and odd annotation files: each is read, or refused with an error that names it."""

import copy
import json
import random
import resource
import time
from pathlib import Path
from typing import Any

import pytest

from sniper.data.datasets import Dataset, load_dataset
from sniper.data.spec import DataSpec
from sniper.errors import AnnotationError
from tests.data.datasets.small import COCO

NUM_FILES = 500
MAX_SECONDS = 5
MAX_KILOBYTES = 4_000_000  # of the whole process
ODD_VALUES: list[Any] = [
    None,
    True,
    "",
    "x",
    "7",
    "\ud800",
    "\x1b[2J",
    "a\0b",
    "../../etc/passwd",
    "/dev/zero",
    "a" * 200_000,
    0,
    -1,
    2**31,
    2**63,
    2**64,
    10**400,
    0.5,
    7.0,
    1e308,
    float("nan"),
    float("inf"),
    [],
    {},
    [1],
    [1, 2, 3, 4],
    [[1, 2, 3, 4, 5, 6]],
    [[]],
    ["1", "2", "3", "4"],
    {"counts": [5, 3, 12], "size": [4, 5]},
    {"counts": "x", "size": [2**40, -1]},
]
KEYS = ["id", "image_id", "category_id", "bbox", "segmentation", "area", "iscrowd", "width", "height", "name"]


def mutate_content(generator: random.Random) -> bytes:
    """Return COCO with one to four values replaced, removed or repeated."""
    content = copy.deepcopy(COCO)
    for _ in range(generator.randint(1, 4)):
        key = generator.choice(["images", "annotations", "categories"])
        entries = content.get(key)
        kind = generator.random()
        if kind < 0.1:
            content[key] = generator.choice(ODD_VALUES)
        elif isinstance(entries, list) and entries:
            index = generator.randrange(len(entries))
            if kind < 0.2:
                entries[index] = generator.choice(ODD_VALUES)
            elif kind < 0.3:
                entries.append(entries[index])
            elif isinstance(entries[index], dict):
                field = generator.choice([*KEYS, *entries[index]])
                entries[index][field] = generator.choice(ODD_VALUES)
                if kind > 0.9:
                    del entries[index][field]
    return json.dumps(content).encode()


def mutate_bytes(generator: random.Random) -> bytes:
    """Return COCO with bytes replaced, removed or repeated, or cut short."""
    content = bytearray(json.dumps(COCO).encode())
    for _ in range(generator.randint(1, 5)):
        start = generator.randrange(len(content) + 1)
        end = min(start + generator.randint(0, 20), len(content))
        content[start:end] = generator.choice(
            [
                b"",
                generator.randbytes(3),
                content[start:end] * 3,
                b"[" * 2000,
                b"1e999",
                b"\\ud800",
                b"NaN",
                b"-0",
            ]
        )
    return bytes(content[: generator.randrange(len(content) + 1)] if generator.random() < 0.2 else content)


@pytest.mark.slow
@pytest.mark.parametrize("has_images", [True, False])
@pytest.mark.parametrize("mutate", [mutate_content, mutate_bytes])
def test_a_mutated_file_is_read_or_refused(folder: Path, mutate: Any, has_images: bool) -> None:
    path = folder / "train.json"
    num_read = 0
    for seed in range(NUM_FILES):
        generator = random.Random(seed)
        path.write_bytes(mutate(generator))
        data = DataSpec(
            on_bad_box=generator.choice(["drop", "refuse"]), crowds=generator.choice(["ignore", "objects"])
        )
        started = time.monotonic()
        result = read(path, has_images=has_images, data=data)
        assert time.monotonic() - started < MAX_SECONDS, seed
        if isinstance(result, AnnotationError):
            assert str(result).startswith(str(path)), seed
            assert len(str(result)) < 20_000, seed
            continue
        num_read += 1
        assert result.offsets[-1] == len(result.boxes), seed
        assert all(len(warning) < 5_000 for warning in result.warnings), seed
        again = folder / "again.json"
        again.write_text(json.dumps(result.to_coco()))
        assert load_dataset(again, has_images=False).digest == result.digest, seed
    assert 0 < num_read < NUM_FILES
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < MAX_KILOBYTES


def read(path: Path, **options: Any) -> Dataset | AnnotationError:
    try:
        return load_dataset(path, **options)
    except AnnotationError as error:
        return error
