"""Searching in windows finds what searching the whole image does, once."""

import threading
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sniper.chips import LevelSpec
from sniper.data.coco import Category
from sniper.data.spec import DataSpec
from sniper.engine.predict import Predictor
from sniper.engine.search import Axis, Search, Tiling, Window
from sniper.errors import ImageError
from sniper.geometry import Detections
from sniper.spec import PredictSpec

CPU = torch.device("cpu")


def find_blobs(images: Sequence[torch.Tensor]) -> list[Detections]:
    """A detector that knows nothing of scale: the bright rectangles of an image, also those that its border cuts."""
    found = []
    for image in images:
        bright = (image[0].numpy() > 128).astype(np.uint8)
        _, _, stats, _ = cv2.connectedComponentsWithStats(bright, connectivity=4)
        x, y, width, height, _ = stats[1:].T.astype(np.float64)
        boxes = np.stack([x, y, x + width, y + height], axis=1)
        scores = 0.5 + 0.4 * np.minimum(width * height / 10_000, 1)
        found.append(Detections(boxes=boxes, scores=scores, labels=np.zeros(len(boxes), dtype=np.int64)))
    return found


def blob_predictor(*levels: LevelSpec, window: int, batch_megapixels: float = 8.0) -> Predictor:
    spec = PredictSpec(
        levels=levels, window=window, batch_megapixels=batch_megapixels, merge="hard", max_detections=10_000
    )
    return Predictor(
        detect=find_blobs, spec=spec, categories=(Category(category_id=1, name="blob"),), device=CPU
    )


def draw_blobs(
    seed: int, *, width: int, height: int, smallest: int, largest: int, count: int = 60
) -> tuple[np.ndarray, np.ndarray]:
    """Draw bright rectangles that do not touch; gives the picture and their boxes."""
    generator = np.random.default_rng(seed)
    image = np.zeros((height, width, 3), dtype=np.uint8)
    boxes: list[tuple[int, int, int, int]] = []
    for _ in range(count):
        size = np.exp(generator.uniform(np.log(smallest), np.log(largest)))
        w, h = (size * 2 ** (np.array([0.5, -0.5]) * generator.uniform(-1, 1))).astype(int).tolist()
        x, y = int(generator.integers(0, width - w)), int(generator.integers(0, height - h))
        if image[max(y - 4, 0) : y + h + 4, max(x - 4, 0) : x + w + 4].any():
            continue
        image[y : y + h, x : x + w] = 255
        boxes.append((x, y, x + w, y + h))
    return image, np.array(boxes, dtype=np.float64)


def in_order(boxes: np.ndarray) -> np.ndarray:
    return boxes[np.lexsort(boxes.T)]


@settings(max_examples=20)
@given(st.integers(0, 1000), st.sampled_from([256, 320, 500]))
def test_in_windows_every_object_is_found_once_and_whole(seed: int, window: int) -> None:
    image, boxes = draw_blobs(seed, width=1100, height=900, smallest=6, largest=60)
    found = blob_predictor(LevelSpec(factor=1.0, below=62), window=window)(image)
    np.testing.assert_array_equal(in_order(found.boxes), in_order(boxes))


def test_what_no_window_sees_whole_is_left_to_the_coarser_level_that_does() -> None:
    image, boxes = draw_blobs(3, width=1500, height=1200, smallest=10, largest=600, count=40)
    levels = (LevelSpec(factor=1.0, below=120), LevelSpec(factor=0.25, at_least=90))
    found = blob_predictor(*levels, window=384)(image)
    assert len(found) == len(boxes)
    distances = np.abs(found.boxes[:, None] - boxes[None]).max(axis=2)  # (n, n)
    assert distances.min(axis=0).max() <= 4  # a pixel of the coarser level
    assert (distances.min(axis=0) == 0).sum() > 10


def test_what_nobody_sees_whole_stays_in_parts() -> None:
    image = np.zeros((400, 1200, 3), dtype=np.uint8)
    image[100:160, 50:1150] = 255
    found = blob_predictor(LevelSpec(factor=1.0), window=512)(image)
    assert len(found) > 1
    assert found.boxes[:, 0].min() == 50
    assert found.boxes[:, 2].max() == 1150


@given(st.integers(1, 5000), st.integers(256, 2048), st.floats(64, 3000))
def test_windows_cover_an_axis_overlap_and_lie_on_the_grid(length: int, limit: int, overlap: float) -> None:
    axis = Axis.of(length, limit=limit, overlap=overlap)
    assert axis.spans[0][0] == 0
    assert axis.spans[-1][1] == length
    assert all(start % 64 == 0 and 0 < stop - start <= limit for start, stop in axis.spans)
    if len(axis.spans) > 1:
        wanted = min(overlap, limit / 2)
        # A step is a grid's width at least, however little that leaves.
        assert all(
            one[1] - other[0] >= min(wanted, limit - 64)
            for one, other in zip(axis.spans, axis.spans[1:], strict=False)
        )


def test_a_network_finds_in_windows_what_it_finds_in_the_whole() -> None:
    image = np.random.default_rng(0).integers(0, 256, (330, 520, 3), dtype=np.uint8)
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        *(torch.nn.Conv2d(inner, 8, 3, stride=2, padding=1) for inner in (3, 8, 8, 8))
    )

    def objectness(images: Sequence[torch.Tensor]) -> list[np.ndarray]:
        with torch.no_grad():
            return [network(one[None].float())[0].numpy() for one in images]

    (whole,) = objectness([torch.from_numpy(image).permute(2, 0, 1)])
    search = Search(
        compute=objectness,
        levels=(LevelSpec(factor=1.0, below=40),),
        window=256,
        batch_megapixels=1,
        device=CPU,
        data=DataSpec(),
    )
    (searched,) = search([image])
    assert searched is not None
    assert len(searched.parts) > 2
    cells_seen = 0
    for window, features in searched.parts:
        x1, y1, x2, y2 = (corner // 16 for corner in window.corners)
        # Away from inner borders by more than what a cell looks at.
        left, top = (0 if x1 == 0 else 1), (0 if y1 == 0 else 1)
        right = features.shape[2] if x2 >= 520 // 16 else features.shape[2] - 1
        bottom = features.shape[1] if y2 >= 330 // 16 else features.shape[1] - 1
        own = features[:, top:bottom, left:right]
        np.testing.assert_allclose(own, whole[:, y1 + top : y1 + bottom, x1 + left : x1 + right], atol=1e-4)
        cells_seen += own[0].size
    assert cells_seen >= whole[0].size / 2


def test_images_come_back_in_order_whatever_their_shapes() -> None:
    images, wanted = [], []
    for seed, (width, height) in enumerate([(400, 300), (90, 700), (300, 300), (120, 110), (400, 300)] * 9):
        image, boxes = draw_blobs(seed, width=width, height=height, smallest=4, largest=30, count=8)
        images.append(image)
        wanted.append(boxes)
    predictor = blob_predictor(LevelSpec(factor=1.0), window=2048, batch_megapixels=0.3)
    for found, boxes in zip(predictor.search(images), wanted, strict=True):
        assert found is not None
        np.testing.assert_array_equal(in_order(found.boxes), in_order(boxes))


def test_batches_hold_like_shapes_and_keep_to_their_limit() -> None:
    shapes: list[list[tuple[int, ...]]] = []

    def note(images: Sequence[torch.Tensor]) -> list[int]:
        shapes.append([tuple(image.shape[1:]) for image in images])
        return [0] * len(images)

    images = [np.zeros((100 + 50 * (i % 3), 200, 3), dtype=np.uint8) for i in range(20)]
    search = Search(
        compute=note,
        levels=(LevelSpec(factor=1.0), LevelSpec(factor=0.5)),
        window=2048,
        batch_megapixels=0.1,
        device=CPU,
        data=DataSpec(),
    )
    assert len(list(search(images))) == 20
    assert sum(map(len, shapes)) == 40
    for batch in shapes:
        tallest, widest = (max(sides) for sides in zip(*batch, strict=True))
        assert len(batch) * tallest * widest <= 100_000
    padding = 1 - sum(h * w for batch in shapes for h, w in batch) / sum(
        len(batch) * max(h for h, _ in batch) * max(w for _, w in batch) for batch in shapes
    )
    assert padding < 0.06


def test_what_does_not_fit_is_computed_in_halves() -> None:
    tried: list[int] = []

    def compute(images: Sequence[torch.Tensor]) -> list[int]:
        tried.append(len(images))
        if len(images) > 3:
            raise torch.OutOfMemoryError("no room")
        return [int(image.sum()) for image in images]

    images = [np.full((32, 32, 3), value, dtype=np.uint8) for value in range(10)]
    search = Search(
        compute=compute,
        levels=(LevelSpec(factor=1.0),),
        window=2048,
        batch_megapixels=1,
        device=CPU,
        data=DataSpec(),
    )
    found = [searched.parts[0][1] for searched in search(images) if searched is not None]
    assert found == [value * 3 * 32 * 32 for value in range(10)]
    assert tried == [10, 5, 2, 3, 5, 2, 3]


def test_a_bad_file_ends_the_search_or_is_skipped(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.png" for i in range(4)]
    for path in paths:
        Image.fromarray(draw_blobs(0, width=100, height=80, smallest=5, largest=20)[0]).save(path)
    paths[1].write_bytes(paths[1].read_bytes()[:150])  # its header is whole
    paths[2].write_text("no image")
    predictor = blob_predictor(LevelSpec(factor=1.0), LevelSpec(factor=0.5), window=2048)
    with pytest.raises(ImageError, match=r"[12]\.png: cannot be read as an image"):
        list(predictor.search(paths))
    skipping = Predictor(
        detect=find_blobs,
        spec=predictor.spec,
        categories=predictor.categories,
        device=CPU,
        data=DataSpec(on_bad_image="skip"),
    )
    with pytest.warns(UserWarning, match="skipped") as told:
        found = list(skipping.search(paths))
    assert [one is None for one in found] == [False, True, True, False]
    assert len(told) == 2


def test_no_reader_is_left_behind_when_the_answers_are_not_wanted(tmp_path: Path) -> None:
    images = [np.zeros((50, 50, 3), dtype=np.uint8)] * 100
    before = threading.active_count()
    answers = blob_predictor(LevelSpec(factor=1.0), window=2048, batch_megapixels=0.01).search(images)
    next(answers)
    answers.close()
    assert threading.active_count() == before


def test_a_window_knows_where_it_is() -> None:
    level = LevelSpec(factor=2.0, below=30).at(width=400, height=300)
    tiling = Tiling.of(level, limit=256)
    windows = list(tiling.windows())
    assert isinstance(windows[0], Window)
    assert len({window.corners for window in windows}) == len(windows) > 4
    last = windows[-1]
    assert last.corners[2:] == (800, 600)
    box = np.array([[0.0, 0.0, 10.0, 20.0]])
    np.testing.assert_allclose(
        last.to_image(box)[0] * 2, box[0] + np.array([*last.corners[:2], *last.corners[:2]])
    )
