"""The page of a plan: one file with all figures, with the images or without."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest

from sniper.chips import ChipTable, LevelSpec, PyramidSpec
from sniper.data.datasets import load_dataset
from sniper.data.epoch import choose_positive_chips, to_image_boxes
from sniper.planning.cost import compute_cost
from sniper.planning.page import PlanPage, resize_rule
from sniper.planning.suggest import suggest_pyramids
from tests.chips.worlds import SMALL_PYRAMID
from tests.data.tiny import write_dataset


def build_page(path: Path, *, num_levels: tuple[int, ...] = (2,)) -> PlanPage:
    dataset = load_dataset(path, has_images=False)
    boxes = to_image_boxes(dataset)
    table = choose_positive_chips(dataset, SMALL_PYRAMID, generator=np.random.default_rng(0))
    return PlanPage(
        dataset=dataset,
        table=table,
        cost=compute_cost(table, boxes, pyramid=SMALL_PYRAMID),
        suggestions=suggest_pyramids(boxes, base=PyramidSpec(), num_levels=num_levels, share=0.5),
        test_megapixels=0.5,
        batch_size=4,
        crowded_above=1,
        suggested_yaml="pyramid: <this & that>",
    )


def html_of(page: PlanPage, folder: Path) -> str:
    page.save(folder)
    return (folder / "plan.html").read_text()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> PlanPage:
    return build_page(write_dataset(tmp_path_factory.mktemp("world")))


@pytest.fixture(scope="module")
def html(page: PlanPage, tmp_path_factory: pytest.TempPathFactory) -> str:
    return html_of(page, tmp_path_factory.mktemp("page"))


@pytest.fixture
def other_folder(page: PlanPage, tmp_path: Path) -> tuple[PlanPage, Path]:
    """The page of the same data set in a folder of its own, and that folder."""
    dataset = load_dataset(write_dataset(tmp_path), has_images=False)
    return dataclasses.replace(page, dataset=dataset), tmp_path


def test_the_page_needs_no_other_file(html: str) -> None:
    links = re.findall(r"""(?:src|href)=["']([^"'#]+)""", html)
    assert all(link.startswith("data:image/jpeg;base64,") for link in links)
    assert len(links) == html.count("<figure>") >= 3
    assert "http://" not in re.sub(r"http://(www\.w3\.org|purl\.org|creativecommons\.org)", "", html)


def test_the_page_shows_images_steps_and_suggestions(html: str, page: PlanPage) -> None:
    assert "train_0.png, 160 × 120 px" in html
    assert f"<b>{-(-len(page.table) // 4)}</b>steps per epoch of 4 chips" in html
    assert 'class="chosen"' in html
    assert "50 % useful" in html
    assert "pyramid: &lt;this &amp; that&gt;" in html


def test_negative_chips_are_dashed_and_counted(page: PlanPage, html: str, tmp_path: Path) -> None:
    assert "dasharray" not in re.sub(r"<svg xmlns.*?</svg>|style=\"[^\"]*\"", "", html, flags=re.DOTALL)
    boxes = to_image_boxes(page.dataset)
    table: ChipTable = dataclasses.replace(page.table, is_negative=np.arange(len(page.table)) % 2 == 1)
    cost = compute_cost(table, boxes, pyramid=SMALL_PYRAMID, negatives_per_image=1)
    text = html_of(dataclasses.replace(page, table=table, cost=cost), tmp_path)
    assert f"plus {cost.num_negatives_per_epoch} negative chips per epoch, of {cost.num_negatives}" in text
    assert re.search(r"<rect[^>]*stroke-dasharray", text)


def test_missing_images_are_blank(other_folder: tuple[PlanPage, Path]) -> None:
    page, folder = other_folder
    for image in (folder / "images").iterdir():
        image.unlink()
    text = html_of(page, folder)
    assert "Blank where the image file is missing" in text
    assert "data:image/jpeg" not in text


def test_an_unreadable_image_is_reported_in_its_caption(other_folder: tuple[PlanPage, Path]) -> None:
    page, folder = other_folder
    for image in (folder / "images").iterdir():
        image.write_bytes(b"no image")
    assert "cannot be read as an image" in html_of(page, folder)


def test_equal_plans_give_equal_pages(page: PlanPage, html: str, tmp_path: Path) -> None:
    again = build_page(page.dataset.path)
    assert html_of(again, tmp_path) == html


def test_a_data_set_without_boxes_has_a_page(tmp_path: Path) -> None:
    page = build_page(write_dataset(tmp_path, boxes_per_image=0))
    text = html_of(page, tmp_path)
    assert "<b>0</b>steps per epoch" in text
    assert "No pyramid brings enough boxes to a useful size" in text
    assert page.as_dict()["levels"][0]["median_size"] is None


def test_names_of_files_are_text_on_the_page(tmp_path: Path) -> None:
    path = write_dataset(tmp_path, name="<b>&\udcb2")
    text = html_of(build_page(path), tmp_path)
    assert r"Plan of &lt;b&gt;&amp;\xb2.json" in text
    assert r"&lt;b&gt;&amp;\xb2_0.png" in text
    assert "<b>&amp;" not in text


def test_the_figures_agree_with_the_table(page: PlanPage) -> None:
    figures = page.as_dict()
    assert figures["num_chips"] == sum(level["chips"] for level in figures["levels"]) == len(page.table)
    assert figures["steps_per_epoch"] == -(-len(page.table) // 4)
    assert figures["crowded_chips"] == int((page.cost.boxes_per_chip > 1).sum())
    assert figures["uncovered_boxes"] == 0
    assert [entry["goal"] for entry in figures["suggestions"]] == [0.5]


@pytest.mark.parametrize(
    ("level", "text"),
    [
        (LevelSpec(factor=1.667), "×1.667"),
        (LevelSpec(long_side=512), "long side 512"),
        (LevelSpec(short_side=800), "short side 800"),
        (LevelSpec(short_side=800, max_long_side=1333), "short side 800, long at most 1333"),
    ],
)
def test_a_resize_rule_has_a_text(level: LevelSpec, text: str) -> None:
    assert resize_rule(level) == text
