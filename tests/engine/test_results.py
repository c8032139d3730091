"""Results are kept as they come, and put together whole, in order, whoever found them."""

import json
from pathlib import Path
from typing import Any

import pytest

from sniper.chips import LevelSpec
from sniper.engine.ranks import Ranks
from sniper.engine.results import ResultParts, ToSearch, search_to_file
from sniper.errors import DetectionsError, ImageError
from tests.data.tiny import write_image
from tests.engine.test_search import blob_predictor


def entries_of(index: int) -> list[dict[str, Any]]:
    return [{"image_id": index, "score": 0.5 + 0.01 * k} for k in range(index % 3)]


def parts_of(
    target: Path, *, resume: bool = False, num_images: int = 7, weights: str = "a", ranks: Ranks | None = None
) -> ResultParts:
    return ResultParts(
        target, made_of={"weights": weights}, num_images=num_images, resume=resume, ranks=ranks or Ranks()
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


def test_an_image_that_cannot_be_read_ends_the_search_and_loses_nothing(tmp_path: Path) -> None:
    images = []
    for number in range(4):
        write_image(tmp_path / f"{number}.png", width=60, height=50, seed=number)
        images.append(ToSearch(image_id=number, path=tmp_path / f"{number}.png", file_name=f"{number}.png"))
    whole = (tmp_path / "3.png").read_bytes()
    (tmp_path / "3.png").write_bytes(whole[:100])
    predictor = blob_predictor(LevelSpec(factor=1.0), window=256, batch_megapixels=0.001)
    target = tmp_path / "found.json"
    seen: list[tuple[int, int]] = []

    def search(*, resume: bool) -> tuple[int, list[int]]:
        return search_to_file(
            predictor,
            images,
            target,
            weights="a",
            resume=resume,
            ranks=Ranks(),
            watch=lambda done, total: seen.append((done, total)),
        )

    with pytest.raises(ImageError, match=r"3\.png"):
        search(resume=False)
    assert not target.exists()
    (tmp_path / "3.png").write_bytes(whole)
    count, skipped = search(resume=True)
    assert skipped == []
    assert count == len(json.loads(target.read_text())) > 0
    assert {entry["file_name"] for entry in json.loads(target.read_text())} <= {f"{i}.png" for i in range(4)}
    again = target.read_bytes()
    target.unlink()
    search(resume=False)
    assert target.read_bytes() == again
    assert hidden(tmp_path) == []
