"""COCO results files: in the order of the images, whole or absent, the same after a search that was stopped."""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sniper.chips import LevelSpec
from sniper.config.experiment import PredictSpec
from sniper.data.datasets import Category
from sniper.data.datasets.categories import match_categories
from sniper.data.spec import DataSpec
from sniper.errors import DetectionsError, ImageError
from sniper.inference.detector import Detector, to_coco
from sniper.inference.results import (
    ImageToSearch,
    SearchReport,
    StoredResults,
    find_results,
    search_to_file,
)
from tests.data.tiny import write_image
from tests.inference.blobs import blob_detector, draw_blobs

DETECTOR = blob_detector(LevelSpec(factor=1.0), window=256, batch_megapixels=0.001)


@pytest.fixture
def images(tmp_path: Path) -> list[ImageToSearch]:
    images = []
    for number in range(40):
        path = tmp_path / "images" / f"{number}.png"
        write_image(path, width=60, height=50, seed=number)
        images.append(ImageToSearch(image_id=100 + number, path=path, file_name=f"é{number}.png"))
    return images


def ignore(*_: object) -> None:
    pass


def search(
    images: list[ImageToSearch],
    target: Path,
    *,
    resume: bool = False,
    weights: str = "a",
    detector: Detector = DETECTOR,
    min_score: float = 0.3,
    on_progress: Callable[[float, int], None] = ignore,
) -> SearchReport:
    return search_to_file(
        detector,
        images,
        target,
        source={"weights": weights},
        existing="resume" if resume else "replace",
        min_score=min_score,
        on_progress=on_progress,
    )


def kill_after(number: int) -> Callable[[float, int], None]:
    def kill(num_done: float, num_images: int) -> None:
        if num_done == number:
            raise KeyboardInterrupt

    return kill


def entries_of(image: ImageToSearch) -> list[dict[str, Any]]:
    detections = DETECTOR.predict(image.path)
    entries = to_coco(detections, image_id=image.image_id, categories=DETECTOR.categories)
    names = {category.category_id: category.name for category in DETECTOR.categories}
    return [
        {**entry, "category_name": names[entry["category_id"]], "file_name": image.file_name}
        for entry in entries
    ]


def test_results_are_in_the_order_of_the_images(images: list[ImageToSearch], tmp_path: Path) -> None:
    target = tmp_path / "found.json"
    report = search(images, target)
    expected = [entry for image in images for entry in entries_of(image)]
    # One entry a line, as json.dumps writes it.
    lines = ",\n".join(json.dumps(entry) for entry in expected)
    assert target.read_text() == f"[\n{lines}\n]\n"
    assert report == SearchReport(num_results=len(expected), num_shown=len(expected), num_cut=0, skipped=[])
    assert {path.name for path in tmp_path.iterdir()} == {"images", "found.json", ".found.json.source"}


@pytest.mark.parametrize("count", [0, 1])
def test_a_search_without_results_writes_an_empty_list(count: int, tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", width=60, height=50)
    nothing = dataclasses.replace(DETECTOR, spec=dataclasses.replace(DETECTOR.spec, score_threshold=0.99))
    images = [ImageToSearch(image_id=1, path=tmp_path / "a.png")] * count
    assert search(images, tmp_path / "found.json", detector=nothing).num_results == 0
    assert json.loads((tmp_path / "found.json").read_text()) == []


def test_a_stopped_search_resumes_with_the_images_that_are_left(
    images: list[ImageToSearch], tmp_path: Path
) -> None:
    search(images, tmp_path / "whole.json")
    target = tmp_path / "found[1].json"
    with pytest.raises(KeyboardInterrupt):
        search(images, target, on_progress=kill_after(25))
    assert not target.exists()
    with pytest.raises(KeyboardInterrupt):
        search(images, target, resume=True, on_progress=kill_after(10))
    progress: list[tuple[float, int]] = []
    search(images, target, resume=True, on_progress=lambda *counts: progress.append(counts))
    assert progress == [(number, 5) for number in range(1, 6)]
    assert target.read_bytes() == (tmp_path / "whole.json").read_bytes()
    files = {"whole.json", "found[1].json", ".whole.json.source", ".found[1].json.source"}
    assert {path.name for path in tmp_path.iterdir()} == {"images", *files}


def test_without_resume_a_search_starts_anew(images: list[ImageToSearch], tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        search(images, tmp_path / "found.json", on_progress=kill_after(25))
    totals: list[int] = []
    search(images, tmp_path / "found.json", on_progress=lambda _, total: totals.append(total))
    assert set(totals) == {40}


def test_resume_without_an_earlier_search_starts_one(images: list[ImageToSearch], tmp_path: Path) -> None:
    assert search(images, tmp_path / "found.json", resume=True).num_results > 0


def change(what: str, images: list[ImageToSearch]) -> tuple[list[ImageToSearch], Detector, str]:
    """Return images, detector and weights of which one may differ from those of `search`."""
    detector, weights = DETECTOR, "a"
    if what == "weights":
        weights = "b"
    elif what == "images":
        images = images[:-1]
    elif what == "file":
        os.utime(images[3].path, ns=(1, 1))
    elif what == "settings":
        detector = dataclasses.replace(detector, spec=dataclasses.replace(detector.spec, merge_iou=0.4))
    return images, detector, weights


@pytest.mark.parametrize("changed", ["weights", "images", "file", "settings", "classes"])
def test_a_search_of_something_else_is_not_resumed(
    changed: str, images: list[ImageToSearch], tmp_path: Path
) -> None:
    target = tmp_path / "found.json"
    with pytest.raises(KeyboardInterrupt):
        search(images, target, on_progress=kill_after(25))
    images, detector, weights = change(changed, images)
    if changed == "classes":
        detector = dataclasses.replace(detector, categories=())
    with pytest.raises(DetectionsError, match=r"found\.json\.parts: was written with other .*omit --resume"):
        search(images, target, resume=True, weights=weights, detector=detector)


def test_an_unreadable_image_ends_the_search_and_loses_nothing(
    images: list[ImageToSearch], tmp_path: Path
) -> None:
    search(images, tmp_path / "whole.json")
    target, bad = tmp_path / "found.json", images[39].path
    content, stat = bad.read_bytes(), bad.stat()
    bad.write_bytes(content[:100].ljust(len(content), b"\0"))
    os.utime(bad, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(ImageError, match=r"39\.png"):
        search(images, target)
    assert not target.exists()
    bad.write_bytes(content)
    os.utime(bad, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    totals: list[int] = []
    search(images, target, resume=True, on_progress=lambda _, total: totals.append(total))
    assert totals[-1] < 40
    assert target.read_bytes() == (tmp_path / "whole.json").read_bytes()


def test_a_search_that_an_unreadable_image_ended_resumes_without_it(
    images: list[ImageToSearch], tmp_path: Path
) -> None:
    images[39].path.write_text("no image")
    with pytest.raises(ImageError, match=r"39\.png"):
        search(images, tmp_path / "found.json")
    skipping = dataclasses.replace(DETECTOR, data=DataSpec(on_bad_image="skip"))
    with pytest.warns(UserWarning, match="skipped"):
        report = search(images, tmp_path / "found.json", resume=True, detector=skipping)
    assert report.skipped == [39]


def test_skipped_images_are_reported_and_have_no_results(images: list[ImageToSearch], tmp_path: Path) -> None:
    images[7].path.write_text("no image")
    skipping = dataclasses.replace(DETECTOR, data=DataSpec(on_bad_image="skip"))
    with pytest.warns(UserWarning, match=r"7\.png: cannot be read as an image .*; skipped"):
        report = search(images, tmp_path / "found.json", detector=skipping)
    assert report.skipped == [7]
    match = match_categories(DETECTOR.categories, ())
    stored = find_results(skipping, images, [tmp_path / "found.json"], match=match, source={"weights": "a"})
    assert stored is not None
    assert stored.skipped == (107,)
    results = json.loads((tmp_path / "found.json").read_text())
    assert {entry["image_id"] for entry in results} <= {100 + number for number in range(40)} - {107}


def test_an_earlier_results_file_stays_until_the_search_is_complete(
    images: list[ImageToSearch], tmp_path: Path
) -> None:
    target = tmp_path / "found.json"
    target.write_text("[]")
    with pytest.raises(KeyboardInterrupt):
        search(images, target, on_progress=kill_after(25))
    assert target.read_text() == "[]"


@pytest.mark.parametrize(("min_score", "num_shown", "num_cut"), [(0.3, 2, 1), (0.95, 0, 0)])
def test_images_whose_detections_above_the_score_may_be_cut_are_counted(
    tmp_path: Path, min_score: float, num_shown: int, num_cut: int
) -> None:
    pixels, _ = draw_blobs(0, width=300, height=200, smallest=10, largest=20)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    spec = PredictSpec(levels=(LevelSpec(factor=1.0),), max_detections=2)
    report = search(
        [ImageToSearch(image_id=1, path=tmp_path / "a.png")],
        tmp_path / "found.json",
        detector=dataclasses.replace(DETECTOR, spec=spec),
        min_score=min_score,
    )
    assert report == SearchReport(num_results=2, num_shown=num_shown, num_cut=num_cut, skipped=[])


def test_a_search_with_other_settings_of_prediction_is_not_resumed(
    images: list[ImageToSearch], tmp_path: Path
) -> None:
    target = tmp_path / "found.json"
    with pytest.raises(KeyboardInterrupt):
        search(images, target, on_progress=kill_after(35))
    other = dataclasses.replace(DETECTOR, spec=dataclasses.replace(DETECTOR.spec, merge="hard"))
    with pytest.raises(DetectionsError, match="omit --resume"):
        search(images, target, resume=True, detector=other)


@pytest.mark.parametrize(
    "changed", ["nothing", "weights", "images", "file", "settings", "results", "categories"]
)
def test_results_are_recognised_by_everything_that_they_depend_on(
    changed: str, images: list[ImageToSearch], tmp_path: Path
) -> None:
    target, match = tmp_path / "found.json", match_categories(DETECTOR.categories, ())
    search(images, target)
    images, detector, weights = change(changed, images)
    if changed == "results":
        target.write_text("[]")
    elif changed == "categories":
        match = dataclasses.replace(match, categories=(Category(category_id=9, name="other"),))
    paths = [tmp_path / "absent.json", target]
    stored = find_results(detector, images, paths, match=match, source={"weights": weights})
    assert stored == (StoredResults(path=target, skipped=()) if changed == "nothing" else None)


@pytest.mark.parametrize(
    "change",
    [{"search": 7}, {"results": None}, {"skipped": 7}, {"skipped": [[]]}, {"skipped": [1.5]}, "[" * 100_000],
)
def test_results_beside_a_damaged_source_are_not_found(
    images: list[ImageToSearch], tmp_path: Path, change: dict[str, Any] | str
) -> None:
    target = tmp_path / "detections.json"
    search(images, target)
    match = match_categories(DETECTOR.categories, ())
    options: dict[str, Any] = {"match": match, "source": {"weights": "a"}}
    assert find_results(DETECTOR, images, [target], **options) is not None
    path = tmp_path / ".detections.json.source"
    text = change if isinstance(change, str) else json.dumps(json.loads(path.read_text()) | change)
    path.write_text(text)
    assert find_results(DETECTOR, images, [target], **options) is None
