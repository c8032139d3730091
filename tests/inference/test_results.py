"""Results are kept as they come, and put together whole, in order, whoever found them."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest

from sniper.chips import LevelSpec
from sniper.config.experiment import PredictSpec
from sniper.errors import DetectionsError, ImageError
from sniper.inference.results import ImageToSearch, ResultParts, SearchReport, search_to_file
from sniper.runs.processes import Processes
from tests.data.tiny import write_image
from tests.inference.test_search import blob_predictor


def entries_of(index: int) -> list[dict[str, Any]]:
    return [{"image_id": index, "score": 0.5 + 0.01 * k} for k in range(index % 3)]


def parts_of(
    target: Path,
    *,
    resume: bool = False,
    num_images: int = 7,
    weights: str = "a",
    ranks: Processes | None = None,
) -> ResultParts:
    return ResultParts(
        target, made_of={"weights": weights}, num_images=num_images, resume=resume, ranks=ranks or Processes()
    )


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def test_results_stand_in_the_order_of_the_images(tmp_path: Path) -> None:
    target = tmp_path / "found.json"
    with parts_of(target) as parts:
        for index in (3, 1, 0, 2, 6, 5, 4):
            parts.keep(index, None if index == 4 else entries_of(index))
        assert parts.finish() == (sum(len(entries_of(i)) for i in range(7) if i != 4), [4])
    wanted = [entry for index in range(7) if index != 4 for entry in entries_of(index)]
    assert json.loads(target.read_text()) == wanted
    assert hidden(tmp_path) == []


def test_a_search_without_results_writes_an_empty_list(tmp_path: Path) -> None:
    with parts_of(tmp_path / "found.json", num_images=0) as parts:
        assert parts.finish() == (0, [])
    assert json.loads((tmp_path / "found.json").read_text()) == []


def test_a_stopped_search_goes_on_with_what_is_left_however_it_was_stopped(tmp_path: Path) -> None:
    target = tmp_path / "found.json"
    with parts_of(target) as parts:
        for index in (0, 1, 2):
            parts.keep(index, entries_of(index))
    (part,) = tmp_path.glob(".found.json.part*")
    with part.open("a") as file:
        file.write('[3, [{"image_id')  # killed while it wrote
    with parts_of(target, resume=True) as parts:
        assert parts.left == [3, 4, 5, 6]
        for index in parts.left[:2]:
            parts.keep(index, entries_of(index))
    with parts_of(target, resume=True) as parts:
        assert parts.own_share == [5, 6]
        for index in parts.own_share:
            parts.keep(index, entries_of(index))
        parts.finish()
    assert json.loads(target.read_text()) == [entry for index in range(7) for entry in entries_of(index)]
    assert hidden(tmp_path) == []


def test_without_resume_it_is_begun_anew(tmp_path: Path) -> None:
    with parts_of(tmp_path / "found.json") as parts:
        parts.keep(0, entries_of(0))
    with parts_of(tmp_path / "found.json") as parts:
        assert parts.left == list(range(7))


def test_other_weights_or_images_are_not_gone_on_with(tmp_path: Path) -> None:
    with parts_of(tmp_path / "found.json") as parts:
        parts.keep(0, entries_of(0))
    with pytest.raises(DetectionsError, match=r"part000: is of another search"):
        parts_of(tmp_path / "found.json", resume=True, weights="b")


def test_a_part_that_is_gone_is_told_and_not_taken_for_images_without_results(tmp_path: Path) -> None:
    with parts_of(tmp_path / "found.json") as parts:
        for index in range(6):
            parts.keep(index, entries_of(index))
        with pytest.raises(DetectionsError, match="the results of 1 images are in no part"):
            parts.finish()


def test_a_gap_in_the_parts_costs_none_of_them(tmp_path: Path) -> None:
    target = tmp_path / "found[1].json"
    for index in range(3):
        with parts_of(target, resume=index > 0) as parts:
            parts.keep(index, entries_of(index))
    (tmp_path / ".found[1].json.part001").unlink()  # of a process that had found nothing
    with parts_of(target, resume=True) as parts:
        assert parts.left == [1, 3, 4, 5, 6]
        for index in parts.left:
            parts.keep(index, entries_of(index))
        parts.finish()
    assert json.loads(target.read_text()) == [entry for index in range(7) for entry in entries_of(index)]


def test_an_image_that_cannot_be_read_ends_the_search_and_loses_nothing(tmp_path: Path) -> None:
    images = []
    for number in range(40):
        write_image(tmp_path / f"{number}.png", width=60, height=50, seed=number)
        images.append(
            ImageToSearch(image_id=number, path=tmp_path / f"{number}.png", file_name=f"{number}.png")
        )
    predictor = blob_predictor(LevelSpec(factor=1.0), window=256, batch_megapixels=0.001)
    target = tmp_path / "found.json"
    seen: list[tuple[int, int]] = []

    def search(*, resume: bool, weights: str = "a") -> SearchReport:
        return search_to_file(
            predictor,
            images,
            target,
            made_of={"weights": weights},
            resume=resume,
            ranks=Processes(),
            watch=lambda done, total: seen.append((done, total)),
        )

    search(resume=False)
    whole = target.read_bytes()
    target.unlink()
    bad = tmp_path / "39.png"
    content, stat = bad.read_bytes(), bad.stat()
    bad.write_bytes(content[:100].ljust(len(content), b"\0"))
    os.utime(bad, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(ImageError, match=r"39\.png"):
        search(resume=False)
    assert not target.exists()
    with pytest.raises(DetectionsError, match="is of another search"):
        search(resume=True, weights="b")
    bad.write_bytes(content)
    os.utime(bad, ns=(1, 1))
    with pytest.raises(DetectionsError, match="is of another search"):
        search(resume=True)  # one of the images has changed
    os.utime(bad, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    seen.clear()
    report = search(resume=True)
    assert seen[-1][1] < 40
    assert report.skipped == []
    assert report.num_results == len(json.loads(target.read_text())) > 0
    assert target.read_bytes() == whole
    assert hidden(tmp_path) == []


def test_images_in_which_as_many_were_found_as_may_be_are_counted(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", width=300, height=200)
    spec = PredictSpec(levels=(LevelSpec(factor=1.0),), max_detections=2)
    predictor = dataclasses.replace(blob_predictor(LevelSpec(factor=1.0), window=256), spec=spec)
    report = search_to_file(
        predictor,
        [ImageToSearch(image_id=1, path=tmp_path / "a.png")],
        tmp_path / "found.json",
        made_of={},
        resume=False,
        ranks=Processes(),
        watch=lambda done, total: None,
    )
    assert (report.num_results, report.num_full) == (2, 1)
