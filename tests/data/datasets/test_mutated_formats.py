"""Mutated files of every format but COCO JSON: they are read, or refused in words, and never with a traceback."""

import random
from collections.abc import Mapping
from pathlib import Path

import pytest

from sniper.data.datasets import load_dataset
from sniper.errors import SniperError
from tests.data.datasets.layouts import write_files
from tests.data.datasets.test_cvat import CAR, export, image
from tests.data.datasets.test_label_folders import COLUMNS, HEADER, PLANE, ROW
from tests.data.datasets.test_voc import DOG, element
from tests.data.datasets.test_yolo import LINE

NUM_MUTATIONS = 120
TOKENS = (
    b"",
    b" ",
    b"\n",
    b",",
    b"-1",
    b"nan",
    b"1e999",
    b"\0",
    b"\xff",
    b"<",
    b">",
    b'"',
    b"&x;",
    b"[",
    b"{",
    b"../",
    b"9" * 30,
)

POLYGON = '<polygon label="bus" points="1,1;9,9;1,9"/>'
SOURCES: Mapping[str, Mapping[str, str | None]] = {
    "yolo": {
        "data.yaml": "path: .\ntrain: images\nval: images\nnc: 2\nnames: {0: cat, 1: dog}\n",
        "labels/a.txt": LINE + "0 0.4 0.3 0.6 0.3 0.6 0.7\n",
        "images/a.jpg": None,
    },
    "voc": {"Annotations/a.xml": element(DOG), "ImageSets/Main/train.txt": "a\n", "JPEGImages/a.jpg": None},
    "cvat": {"annotations.xml": export(image(CAR, POLYGON)), "images/a.jpg": None},
    "dota": {"labelTxt/a.txt": HEADER + PLANE, "images/a.jpg": None},
    "visdrone": {"annotations/a.txt": "10,10,10,20,1,4,0,0\n1,1,5,5,0,0,0,0,\n", "images/a.jpg": None},
    "open_images": {
        "train-annotations-bbox.csv": COLUMNS + ROW.format(0),
        "class-descriptions.csv": "/m/1,Dog\n",
        "a.jpg": None,
    },
    "geojson": {
        "all.geojson": '{"type": "FeatureCollection", "features": [{"type": "Feature", "geometry": null, '
        '"properties": {"image_id": "104.jpg", "bounds_imcoords": "1,2,30,40", "type_id": 73}}]}',
        "images/104.jpg": None,
    },
}  # fmt: skip


def mutate(content: bytes, rng: random.Random) -> bytes:
    """Replace, remove or repeat a few parts of a file."""
    for _ in range(rng.randint(1, 3)):
        start = rng.randrange(len(content) + 1)
        end = min(start + rng.choice((0, 1, 1, 2, 8, 40)), len(content))
        part = rng.choice((*TOKENS, content[start:end] * 2))
        content = content[:start] + part + content[end:]
    return content


@pytest.mark.slow
@pytest.mark.parametrize("name", list(SOURCES))
def test_mutated_files_are_read_or_refused_in_words(tmp_path: Path, name: str) -> None:
    rng = random.Random(name)
    texts = {file: text.encode() for file, text in SOURCES[name].items() if text is not None}
    refusals = []
    write_files(tmp_path, SOURCES[name])
    assert len(load_dataset(tmp_path)) == 1
    for _ in range(NUM_MUTATIONS):
        file = rng.choice(list(texts))
        (tmp_path / file).write_bytes(mutate(texts[file], rng))
        try:
            load_dataset(tmp_path)
        except SniperError as error:
            refusals.append(str(error))
        (tmp_path / file).write_bytes(texts[file])
    assert 0 < len(refusals) < NUM_MUTATIONS
    assert all(0 < len(message) < 3000 for message in refusals)
