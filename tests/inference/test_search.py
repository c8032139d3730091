"""Search at all levels: every object once and whole, whatever the windows, batches and images beside it."""

import dataclasses
import gc
import io
import threading
import weakref
from collections.abc import Generator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sniper.chips import LevelSpec
from sniper.config.experiment import PredictSpec
from sniper.data.images.files import load_image
from sniper.data.spec import DataSpec, ReadSpec
from sniper.errors import ImageError, OutOfMemory
from sniper.geometry import Detections
from sniper.geometry.boxes import Sides
from sniper.inference.detector import Detector
from sniper.inference.search import Detect, Search
from sniper.inference.sources import ImageSource
from tests.inference.blobs import Merge, blob_detector, draw_blobs, find_blobs
from tests.models.batches import build_tiny

CPU = torch.device("cpu")
MERGES: tuple[Merge, ...] = ("gaussian", "linear", "hard", "fusion")


def in_order(boxes: np.ndarray) -> np.ndarray:
    return boxes[np.lexsort(boxes.T)]


@settings(max_examples=20)
@given(st.integers(0, 1000), st.sampled_from([256, 320, 500]), st.sampled_from(MERGES))
def test_in_windows_every_object_is_found_once_and_whole(seed: int, window: int, merge: Merge) -> None:
    image, boxes = draw_blobs(seed, width=1100, height=900, smallest=6, largest=60)
    detector = blob_detector(LevelSpec(factor=1.0, below=62), window=window, merge=merge)
    np.testing.assert_array_equal(in_order(detector.predict(image).boxes), in_order(boxes))


def test_progress_is_reported_within_a_large_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sniper.inference.search._LARGE_PIXELS", 1_000_000)
    small, _ = draw_blobs(0, width=300, height=300, smallest=6, largest=60)
    large = Image.fromarray(draw_blobs(0, width=1200, height=1200, smallest=6, largest=60)[0])
    content = io.BytesIO()
    large.save(content, "PNG")
    detector = blob_detector(LevelSpec(factor=1.0), LevelSpec(long_side=256), window=400)
    spec = dataclasses.replace(detector.spec, batch_megapixels=0.2)
    detector = dataclasses.replace(detector, spec=spec)
    reported: list[float] = []
    sources: list[ImageSource] = [small, small, content.getvalue(), small, content.getvalue()]
    found = detector.predict_many(sources, on_progress=reported.append)
    assert sum(detections is not None for detections in found) == 5
    for first in (2, 4):
        of_large = [number for number in reported if first < number <= first + 1]
        assert len(of_large) > 5
        assert np.diff([first, *of_large, first + 1]).max() < 0.2
    assert reported == sorted(reported)
    assert min(reported) > 2


def test_an_object_larger_than_windows_is_found_whole_at_a_coarser_level() -> None:
    image, boxes = draw_blobs(3, width=1500, height=1200, smallest=10, largest=600, count=40)
    levels = (LevelSpec(factor=1.0, below=120), LevelSpec(factor=0.25, at_least=90))
    detections = blob_detector(*levels, window=384, merge="hard").predict(image)
    assert len(detections) == len(boxes)
    distances = np.abs(detections.boxes[:, None] - boxes[None]).max(axis=2)  # (n, n)
    assert distances.min(axis=0).max() <= 4  # a pixel of the coarser level
    assert (distances.min(axis=0) == 0).sum() > 10


def test_an_object_that_no_window_contains_is_found_in_parts() -> None:
    image = np.zeros((400, 1200, 3), dtype=np.uint8)
    image[100:160, 50:1150] = 255
    detections = blob_detector(LevelSpec(factor=1.0), window=512).predict(image)
    assert len(detections) > 1
    assert detections.boxes[:, 0].min() == 50
    assert detections.boxes[:, 2].max() == 1150


def test_detections_of_an_image_do_not_depend_on_other_images() -> None:
    rng = np.random.default_rng(0)
    sides = [(90, 70), (128, 128), (100, 65), (127, 120), (64, 300), (90, 70)]
    images = [rng.integers(0, 256, (height, width, 3), dtype=np.uint8) for width, height in sides]
    levels = (LevelSpec(factor=1.5), LevelSpec(long_side=64))
    detector = Detector(
        detect=build_tiny().eval().detect,
        spec=PredictSpec(levels=levels, precision="fp32"),
        categories=(),
        device=CPU,
    )
    for image, together in zip(images, detector.predict_many(images), strict=True):
        alone = detector.predict(image)
        assert together is not None
        assert len(alone) > 0
        np.testing.assert_allclose(together.boxes, alone.boxes, atol=1e-3)
        np.testing.assert_allclose(together.scores, alone.scores, atol=1e-5)


def test_images_come_back_in_order_whatever_their_shapes() -> None:
    images, expected = [], []
    for seed, (width, height) in enumerate([(400, 300), (90, 700), (300, 300), (120, 110), (400, 300)] * 9):
        image, boxes = draw_blobs(seed, width=width, height=height, smallest=4, largest=30, count=8)
        images.append(image)
        expected.append(boxes)
    detector = blob_detector(LevelSpec(factor=1.0), batch_megapixels=0.3)
    for detections, boxes in zip(detector.predict_many(images), expected, strict=True):
        assert detections is not None
        np.testing.assert_array_equal(in_order(detections.boxes), in_order(boxes))


def search_of(detect: Detect, *levels: LevelSpec, batch_megapixels: float = 1.0) -> Search:
    return Search(
        detect=detect,
        levels=levels,
        in_valid_range=True,
        window=2048,
        batch_megapixels=batch_megapixels,
        device=CPU,
        data=DataSpec(),
    )


def test_batches_contain_like_shapes_within_their_limit() -> None:
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
        padded = {(-(-height // 64), -(-width // 64)) for height, width in batch}
        ((rows, columns),) = padded
        assert len(batch) * rows * columns * 64 * 64 <= 200_000


def test_a_batch_that_does_not_fit_is_halved_as_later_ones_are() -> None:
    tried: list[int] = []

    def detect(images: Sequence[torch.Tensor]) -> list[Detections]:
        tried.append(len(images))
        if len(images) > 3:
            raise torch.OutOfMemoryError("no room")
        return find_blobs(images)

    images = [np.full((64, 64, 3), 255 * (i % 2), dtype=np.uint8) for i in range(90)]
    results = list(search_of(detect, LevelSpec(factor=1.0), batch_megapixels=0.0411)(images))
    assert [len(result.detections) for result in results if result is not None] == [i % 2 for i in range(90)]
    assert tried[:7] == [10, 5, 2, 3, 5, 2, 3]
    assert max(tried[-9:]) <= 5  # those that were not being read already


def test_a_window_that_does_not_fit_into_memory_is_an_error() -> None:
    def detect(images: Sequence[torch.Tensor]) -> list[Detections]:
        raise torch.OutOfMemoryError("no room")

    search = search_of(detect, LevelSpec(factor=1.0))
    with pytest.raises(
        OutOfMemory, match=r"a window of 60x50 pixels does not fit.*predict\.window than 2048"
    ):
        list(search([np.zeros((50, 60, 3), dtype=np.uint8)]))


def test_a_detector_that_returns_too_little_is_refused() -> None:
    search = search_of(lambda images: [], LevelSpec(factor=1.0))
    with pytest.raises(ValueError, match="returned detections of 0 images, expected 1"):
        list(search([np.zeros((50, 60, 3), dtype=np.uint8)]))


def test_pixels_are_freed_as_soon_as_they_are_searched() -> None:
    num_alive: list[int] = []
    seen: list[weakref.ref[torch.Tensor]] = []

    def detect(images: Sequence[torch.Tensor]) -> list[Detections]:
        gc.collect()
        num_alive.append(sum(reference() is not None for reference in seen))
        seen.extend(weakref.ref(image) for image in images)
        return [Detections.empty()] * len(images)

    levels = [LevelSpec(factor=1.0 + 0.5 * k) for k in range(12)]
    list(search_of(detect, *levels, batch_megapixels=0.001)([np.zeros((70, 70, 3), dtype=np.uint8)]))
    assert len(num_alive) == 12
    assert max(num_alive) <= 2


@pytest.mark.parametrize(
    ("levels", "reductions"),
    [
        ((LevelSpec(long_side=512), LevelSpec(long_side=256)), [4]),
        ((LevelSpec(factor=0.5), LevelSpec(long_side=256)), [1]),
        ((LevelSpec(long_side=1024), LevelSpec(long_side=256)), [2]),
    ],
)
def test_a_jpeg_is_decoded_once_and_only_as_large_as_its_finest_level_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, levels: tuple[LevelSpec, ...], reductions: list[int]
) -> None:
    image, boxes = draw_blobs(5, width=4200, height=3000, smallest=300, largest=600, count=8)
    Image.fromarray(image).save(tmp_path / "photo.jpg", quality=92)
    decoded = []

    def load(data: Path, spec: ReadSpec, *, reduction: int, sides: Sides) -> np.ndarray:
        decoded.append(reduction)
        return load_image(data, spec, reduction=reduction, sides=sides)

    monkeypatch.setattr("sniper.data.images.files.load_image", load)
    found = blob_detector(*levels, window=512, merge="hard").predict(tmp_path / "photo.jpg")
    assert decoded == reductions
    assert len(found) == len(boxes)
    distances = np.abs(found.boxes[:, None] - boxes[None]).max(axis=2)  # (n, n)
    assert distances.min(axis=0).max() <= 4200 / 256 + 1  # a pixel of the coarsest level


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    """Four image files, of which the second is cut short and the third is none."""
    paths = [tmp_path / f"{i}.png" for i in range(4)]
    for path in paths:
        Image.fromarray(draw_blobs(0, width=100, height=80, smallest=5, largest=20)[0]).save(path)
    paths[1].write_bytes(paths[1].read_bytes()[:150])  # its header is whole
    paths[2].write_text("no image")
    return paths


def test_an_unreadable_file_ends_the_search(paths: list[Path]) -> None:
    detector = blob_detector(LevelSpec(factor=1.0), LevelSpec(factor=0.5))
    with pytest.raises(ImageError, match=r"[12]\.png: cannot be read as an image"):
        list(detector.predict_many(paths))


def test_unreadable_files_are_skipped_where_configured(paths: list[Path]) -> None:
    detector = blob_detector(LevelSpec(factor=1.0), LevelSpec(factor=0.5))
    skipping = dataclasses.replace(detector, data=DataSpec(on_bad_image="skip"))
    with pytest.warns(UserWarning, match="skipped") as warnings:
        results = list(skipping.predict_many(paths))
    assert [result is None for result in results] == [False, True, True, False]
    assert len(warnings) == 2


def test_threads_end_with_a_search_that_is_abandoned() -> None:
    images = [np.zeros((50, 50, 3), dtype=np.uint8)] * 100
    before = threading.active_count()
    results = blob_detector(LevelSpec(factor=1.0), batch_megapixels=0.01).predict_many(images)
    next(results)
    assert isinstance(results, Generator)
    results.close()
    assert threading.active_count() == before
