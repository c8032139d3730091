"""Searching in windows finds what searching the whole image does, once."""

import gc
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sniper.chips import LevelSpec
from sniper.config.experiment import PredictSpec
from sniper.data.datasets import Category
from sniper.data.images.files import ArrayImageReader
from sniper.data.images.regions import cut_window
from sniper.data.spec import DataSpec
from sniper.errors import ImageError, OutOfMemory
from sniper.geometry import Detections
from sniper.inference.detector import Detect, Detector
from sniper.inference.search import Axis, Search, Tiling, Window
from tests.models.batches import build_tiny

CPU = torch.device("cpu")
Merge = Literal["gaussian", "linear", "hard", "fusion"]


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


def blob_predictor(
    *levels: LevelSpec, window: int, batch_megapixels: float = 8.0, merge: Merge = "gaussian"
) -> Detector:
    spec = PredictSpec(
        levels=levels, window=window, batch_megapixels=batch_megapixels, merge=merge, max_detections=10_000
    )
    return Detector(
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


MERGES: tuple[Merge, ...] = ("gaussian", "linear", "hard", "fusion")


@settings(max_examples=20)
@given(st.integers(0, 1000), st.sampled_from([256, 320, 500]), st.sampled_from(MERGES))
def test_in_windows_every_object_is_found_once_and_whole(seed: int, window: int, merge: Merge) -> None:
    image, boxes = draw_blobs(seed, width=1100, height=900, smallest=6, largest=60)
    found = blob_predictor(LevelSpec(factor=1.0, below=62), window=window, merge=merge)(image)
    np.testing.assert_array_equal(in_order(found.boxes), in_order(boxes))


def test_what_no_window_sees_whole_is_left_to_the_coarser_level_that_does() -> None:
    image, boxes = draw_blobs(3, width=1500, height=1200, smallest=10, largest=600, count=40)
    levels = (LevelSpec(factor=1.0, below=120), LevelSpec(factor=0.25, at_least=90))
    found = blob_predictor(*levels, window=384, merge="hard")(image)
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


def test_a_network_computes_in_windows_what_it_computes_in_the_whole() -> None:
    image = np.random.default_rng(0).integers(0, 256, (330, 520, 3), dtype=np.uint8)
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        *(torch.nn.Conv2d(inner, 8, 3, stride=2, padding=1) for inner in (3, 8, 8, 8))
    )

    def features_of(pixels: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            features: np.ndarray = network(
                torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float()
            ).numpy()[0]
        return features

    whole = features_of(image)
    tiling = Tiling.of(LevelSpec(factor=1.0, below=40).at(width=520, height=330), limit=256)
    windows = list(tiling.windows())
    assert len(windows) > 2
    cells_seen = 0
    for window in windows:
        features = features_of(cut_window(ArrayImageReader(image), window.level, window.corners))
        x1, y1, x2, y2 = (corner // 16 for corner in window.corners)
        # Away from inner borders by more than what a cell looks at.
        left, top = (0 if x1 == 0 else 1), (0 if y1 == 0 else 1)
        right = features.shape[2] if x2 >= 520 // 16 else features.shape[2] - 1
        bottom = features.shape[1] if y2 >= 330 // 16 else features.shape[1] - 1
        own = features[:, top:bottom, left:right]
        np.testing.assert_allclose(own, whole[:, y1 + top : y1 + bottom, x1 + left : x1 + right], atol=1e-4)
        cells_seen += own[0].size
    assert cells_seen >= whole[0].size


def test_what_is_found_in_an_image_does_not_depend_on_the_others() -> None:
    rng = np.random.default_rng(0)
    sides = [(90, 70), (128, 128), (100, 65), (127, 120), (64, 300), (90, 70)]
    images = [rng.integers(0, 256, (height, width, 3), dtype=np.uint8) for width, height in sides]
    levels = (LevelSpec(factor=1.5), LevelSpec(long_side=64))
    predictor = Detector(
        detect=build_tiny().eval().detect,
        spec=PredictSpec(levels=levels, precision="fp32"),
        categories=(),
        device=CPU,
    )
    for image, together in zip(images, predictor.search(images), strict=True):
        alone = predictor(image)
        assert together is not None
        assert len(alone) > 0
        np.testing.assert_allclose(together.boxes, alone.boxes, atol=1e-3)
        np.testing.assert_allclose(together.scores, alone.scores, atol=1e-5)


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


def search_of(detect: Detect, *levels: LevelSpec, batch_megapixels: float = 1.0) -> Search:
    return Search(
        detect=detect,
        levels=levels,
        keeps_range=True,
        window=2048,
        batch_megapixels=batch_megapixels,
        device=CPU,
        data=DataSpec(),
    )


def test_batches_hold_like_shapes_and_keep_to_their_limit() -> None:
    shapes: list[list[tuple[int, ...]]] = []

    def note(images: Sequence[torch.Tensor]) -> list[Detections]:
        shapes.append([tuple(image.shape[1:]) for image in images])
        return [Detections.empty()] * len(images)

    images = [np.zeros((100 + 50 * (i % 3), 200, 3), dtype=np.uint8) for i in range(20)]
    search = search_of(note, LevelSpec(factor=1.0), LevelSpec(factor=0.5), batch_megapixels=0.2)
    assert len(list(search(images))) == 20
    assert sum(map(len, shapes)) == 40
    assert max(map(len, shapes)) > 3
    for batch in shapes:
        filled_up = {(-(-height // 64), -(-width // 64)) for height, width in batch}
        ((rows, columns),) = filled_up
        assert len(batch) * rows * columns * 64 * 64 <= 200_000


def test_what_does_not_fit_is_computed_in_halves_and_that_is_remembered() -> None:
    tried: list[int] = []

    def detect(images: Sequence[torch.Tensor]) -> list[Detections]:
        tried.append(len(images))
        if len(images) > 3:
            raise torch.OutOfMemoryError("no room")
        return find_blobs(images)

    images = [np.full((64, 64, 3), 255 * (i % 2), dtype=np.uint8) for i in range(90)]
    found = list(search_of(detect, LevelSpec(factor=1.0), batch_megapixels=0.0411)(images))
    assert [len(one.detections) for one in found if one is not None] == [i % 2 for i in range(90)]
    assert tried[:7] == [10, 5, 2, 3, 5, 2, 3]
    assert max(tried[-9:]) <= 5  # those that were not being read already


def test_a_window_that_does_not_fit_is_told() -> None:
    def detect(images: Sequence[torch.Tensor]) -> list[Detections]:
        raise torch.OutOfMemoryError("no room")

    search = search_of(detect, LevelSpec(factor=1.0))
    with pytest.raises(
        OutOfMemory, match=r"a window of 60x50 pixels does not fit.*predict\.window than 2048"
    ):
        list(search([np.zeros((50, 60, 3), dtype=np.uint8)]))


def test_a_detector_that_answers_too_little_and_images_of_another_kind_are_refused() -> None:
    image = np.zeros((50, 60, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match="gave 0 answers for 1 images"):
        list(search_of(lambda images: [], LevelSpec(factor=1.0))([image]))
    for wrong in (image / 255, image[..., 0], image[..., :1]):
        with pytest.raises(ValueError, match=r"an image is uint8 of \(height, width, 3\), not"):
            list(search_of(find_blobs, LevelSpec(factor=1.0))([wrong]))


def test_pixels_are_let_go_as_soon_as_they_are_searched() -> None:
    alive: list[int] = []
    watched: list[weakref.ref[torch.Tensor]] = []

    def detect(images: Sequence[torch.Tensor]) -> list[Detections]:
        gc.collect()
        alive.append(sum(one() is not None for one in watched))
        watched.extend(weakref.ref(image) for image in images)
        return [Detections.empty()] * len(images)

    levels = [LevelSpec(factor=1.0 + 0.5 * k) for k in range(12)]
    list(search_of(detect, *levels, batch_megapixels=0.001)([np.zeros((70, 70, 3), dtype=np.uint8)]))
    assert len(alive) == 12
    assert max(alive) <= 2


def test_a_bad_file_ends_the_search_or_is_skipped(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.png" for i in range(4)]
    for path in paths:
        Image.fromarray(draw_blobs(0, width=100, height=80, smallest=5, largest=20)[0]).save(path)
    paths[1].write_bytes(paths[1].read_bytes()[:150])  # its header is whole
    paths[2].write_text("no image")
    predictor = blob_predictor(LevelSpec(factor=1.0), LevelSpec(factor=0.5), window=2048)
    with pytest.raises(ImageError, match=r"[12]\.png: cannot be read as an image"):
        list(predictor.search(paths))
    assert len(predictor(str(paths[0]))) > 0
    skipping = Detector(
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
