"""The page of a plan: one file, every figure in it, with the images or without."""

import re
from pathlib import Path

import numpy as np
import pytest

from sniper.chips import LevelSpec, PyramidSpec
from sniper.data.datasets import load_dataset
from sniper.data.epoch import build_table, to_image_boxes
from sniper.planning.cost import measure
from sniper.planning.page import PlanPage, resize_rule
from sniper.planning.suggest import suggest_pyramids
from tests.chips.worlds import SMALL_PYRAMID
from tests.data.tiny import write_dataset


def page_of(path: Path, *, pyramid: PyramidSpec = SMALL_PYRAMID) -> PlanPage:
    annotations = load_dataset(path, has_images=False)
    boxes = to_image_boxes(annotations)
    table = build_table(annotations, pyramid, generator=np.random.default_rng(0))
    return PlanPage(
        annotations=annotations,
        table=table,
        budget=measure(table, boxes, pyramid=pyramid),
        suggest_pyramids=suggest_pyramids(boxes, like=PyramidSpec(), num_levels=[1, 2], share=0.5),
        test_megapixels=0.5,
        batch_size=4,
        crowd=1,
        suggested="pyramid: <this & that>",
    )


def html_of(page: PlanPage, folder: Path) -> str:
    page.save(folder / "plan.html")
    return (folder / "plan.html").read_text()


def test_the_page_needs_no_other_file_and_shows_images_with_their_chips(tmp_path: Path) -> None:
    page = page_of(write_dataset(tmp_path))
    html = html_of(page, tmp_path)
    links = re.findall(r"""(?:src|href)=["']([^"'#]+)""", html)
    assert all(link.startswith("data:image/jpeg;base64,") for link in links)
    assert "http://" not in re.sub(r"http://(www\.w3\.org|purl\.org|creativecommons\.org)", "", html)
    assert len(links) == html.count("<figure>") >= 3
    assert "train_0.png, 160 × 120 px" in html
    assert "pyramid: &lt;this &amp; that&gt;" in html
    assert f"<b>{len(page.table) // 4 + (len(page.table) % 4 > 0)}</b>steps an epoch, 4 chips each" in html
    assert 'class="chosen"' in html


def test_images_that_are_not_there_are_blank(tmp_path: Path) -> None:
    path = write_dataset(tmp_path)
    for image in (tmp_path / "images").iterdir():
        image.unlink()
    html = html_of(page_of(path), tmp_path)
    assert "Blank where the image file is not at hand" in html
    assert "data:image/jpeg" not in html


def test_an_image_that_cannot_be_read_is_told_in_its_place(tmp_path: Path) -> None:
    path = write_dataset(tmp_path)
    for image in (tmp_path / "images").iterdir():
        image.write_bytes(b"no image")
    html = html_of(page_of(path), tmp_path)
    assert "cannot be read as an image" in html


def test_equal_plans_give_equal_pages(tmp_path: Path) -> None:
    path = write_dataset(tmp_path)
    assert html_of(page_of(path), tmp_path) == html_of(page_of(path), tmp_path)


def test_a_data_set_without_boxes_has_a_page(tmp_path: Path) -> None:
    page = page_of(write_dataset(tmp_path, boxes_per_image=0))
    html = html_of(page, tmp_path)
    assert "<b>0</b>steps an epoch" in html
    assert "No pyramid was found" in html
    assert page.as_dict()["levels"][0]["median_size"] is None


def test_the_figures_agree_with_the_table(tmp_path: Path) -> None:
    page = page_of(write_dataset(tmp_path))
    told = page.as_dict()
    assert told["num_chips"] == sum(level["chips"] for level in told["levels"]) == len(page.table)
    assert told["steps_per_epoch"] == -(-len(page.table) // 4)
    assert told["crowded_chips"] == int((page.budget.boxes_per_chip > 1).sum())
    assert told["uncovered_boxes"] == 0


@pytest.mark.parametrize(
    ("level", "words"),
    [
        (LevelSpec(factor=1.667), "×1.667"),
        (LevelSpec(long_side=512), "long side 512"),
        (LevelSpec(short_side=800), "short side 800"),
        (LevelSpec(short_side=800, max_long_side=1333), "short side 800, long at most 1333"),
    ],
)
def test_a_level_says_how_it_resizes(level: LevelSpec, words: str) -> None:
    assert resize_rule(level) == words
