"""The page of a plan: one file with all figures, with the images or without."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest

from sniper.chips import ChipTable, LevelSpec
from sniper.chips.negatives import NegativeSpec
from sniper.config.experiment import ExperimentSpec, TrainSpec
from sniper.data.datasets import load_dataset
from sniper.data.epoch import choose_positive_chips, to_image_boxes
from sniper.planning.cost import compute_cost
from sniper.planning.measure import Measurement
from sniper.planning.page import Histogram, PlanPage, pyramid_rows
from sniper.planning.suggest import suggest_pyramid
from sniper.reports.page import resize_rule, sizes_text
from tests.chips.worlds import SMALL_PYRAMID
from tests.data.tiny import write_dataset


def build_page(path: Path) -> PlanPage:
    dataset = load_dataset(path, has_images=False)
    boxes = to_image_boxes(dataset)
    table = choose_positive_chips(dataset, SMALL_PYRAMID, generator=np.random.default_rng(0))
    return PlanPage(
        dataset=dataset,
        experiment=ExperimentSpec(pyramid=SMALL_PYRAMID, train=TrainSpec(batch_size=4)),
        table=table,
        cost=compute_cost(table, boxes, pyramid=SMALL_PYRAMID),
        suggestion=suggest_pyramid(boxes, num_levels=2, share=0.5),
        test_megapixels=0.5,
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
    assert len(links) == html.count("<figure>") >= 6
    assert "http://" not in re.sub(r"http://(www\.w3\.org|purl\.org|creativecommons\.org)", "", html)


def test_the_page_shows_images_steps_and_suggestions(html: str, page: PlanPage) -> None:
    assert "train_0.png, 160 × 120 px" in html
    assert f"<b>{-(-len(page.table) // 4)}</b>steps per epoch of 4 chips" in html
    assert 'class="chosen"' in html
    assert page.suggestion is not None
    assert page.suggestion.reason in html
    assert "pyramid: &lt;this &amp; that&gt;" in html


def test_the_page_starts_with_what_to_do_next(html: str) -> None:
    following = html[html.index("What to do next") :]
    assert (
        following.index("sniper train")
        < following.index("sniper predict")
        < following.index("<b>4</b>images")
    )


def test_objects_are_shown_at_the_scale_that_they_are_trained_at(page: PlanPage, html: str) -> None:
    shown = re.findall(r">(\w+): (\d+) px, in the chip (\d+) px<", html)
    assert {name for name, _, _ in shown} <= {"dark", "bright"}
    assert len(shown) >= 5
    ratios = {round(int(after) / int(before), 1) for _, before, after in shown}
    assert {2.0, 1.0} <= ratios  # the factors of the finer levels


def test_classes_are_counted(page: PlanPage, html: str) -> None:
    assert [fact.num_boxes for fact in page.classes] == sorted(
        np.bincount(page.dataset.labels).tolist(), reverse=True
    )
    for fact in page.classes:
        assert f"<td>{fact.name}</td><td>{fact.num_boxes}</td><td>{fact.num_images}</td>" in html


def test_tables_and_rows_of_pictures_scroll_by_themselves(html: str) -> None:
    assert html.count("<table>") == html.count('<div class="wide"><table>') == 3
    assert re.search(r"\.wide \{[^}]*overflow-x: auto", html)
    assert re.search(r"\.objects \{[^}]*overflow-x: auto", html)


def test_measured_minutes_and_memory_are_shown(page: PlanPage, tmp_path: Path) -> None:
    measurement = Measurement(
        device="cpu", seconds_per_step=1.5, peak_memory=2_500_000_000, minutes_per_epoch=3.25, minutes=39.0
    )
    measured = dataclasses.replace(page, measurement=measurement)
    text = html_of(measured, tmp_path)
    assert "About 39 minutes on cpu" in text
    assert "<b>2.5 GB</b>" in text
    assert measured.as_dict()["measured"]["minutes_per_epoch"] == 3.25


def test_negative_chips_are_dashed_and_counted(page: PlanPage, html: str, tmp_path: Path) -> None:
    assert "dasharray" not in html
    boxes = to_image_boxes(page.dataset)
    table: ChipTable = dataclasses.replace(page.table, is_negative=np.arange(len(page.table)) % 2 == 1)
    cost = compute_cost(table, boxes, pyramid=SMALL_PYRAMID, negatives=NegativeSpec(per_image=1, dose=None))
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


def test_images_outside_the_image_root_are_not_opened(
    other_folder: tuple[PlanPage, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    page, folder = other_folder
    outside = tmp_path_factory.mktemp("outside")
    for image in (folder / "images").iterdir():
        image.symlink_to(image.rename(outside / image.name))
    text = html_of(page, folder)
    assert "outside the image root" in text
    assert "data:image/jpeg" not in text
    followed = dataclasses.replace(page, dataset=dataclasses.replace(page.dataset, follow_links=True))
    assert "data:image/jpeg" in html_of(followed, folder)


def test_a_folder_whose_name_is_not_utf8_is_text_on_the_page(page: PlanPage, tmp_path: Path) -> None:
    html = html_of(page, tmp_path / "caf\udce9")
    assert r"caf\xe9/suggested.yaml&#39; --run &#39;runs/caf\xe9&#39;" in html


def test_equal_plans_give_equal_pages(page: PlanPage, tmp_path: Path) -> None:
    again = build_page(page.dataset.path)
    assert html_of(again, tmp_path) == html_of(page, tmp_path)


def test_a_data_set_without_boxes_has_a_page(tmp_path: Path) -> None:
    page = build_page(write_dataset(tmp_path, boxes_per_image=0))
    text = html_of(page, tmp_path)
    assert "<b>0</b>steps per epoch" in text
    assert "has no object to learn from" in text
    assert page.as_dict()["levels"][0]["median_size"] is None


def test_names_of_files_are_text_on_the_page(tmp_path: Path) -> None:
    path = write_dataset(tmp_path, name="<b>&\udcb2")
    text = html_of(build_page(path), tmp_path)
    assert r"/&lt;b&gt;&amp;\xb2.json</h1>" in text
    assert r"&lt;b&gt;&amp;\xb2_0.png" in text
    assert "<b>&amp;" not in text


def test_the_figures_agree_with_the_table(page: PlanPage) -> None:
    figures = page.as_dict()
    assert figures["num_chips"] == sum(level["chips"] for level in figures["levels"]) == len(page.table)
    assert figures["steps_per_epoch"] == -(-len(page.table) // 4)
    assert figures["crowded_chips"] == int((page.cost.boxes_per_chip > 1).sum())
    assert figures["uncovered_boxes"] == 0
    assert figures["suggestions"][0]["goal"] == 0.5
    assert sum(fact["boxes"] for fact in figures["classes"]) == figures["boxes_to_cover"]
    assert [row.name for row in pyramid_rows(page)][:: len(pyramid_rows(page)) - 1] == [
        "suggested",
        "in the experiment",
    ]


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


@pytest.mark.parametrize(
    ("level", "text"),
    [
        (LevelSpec(factor=1.0), "all sizes"),
        (LevelSpec(factor=1.0, below=64), "up to 64 px"),
        (LevelSpec(factor=1.0, at_least=24, below=64), "24 to 64 px"),
        (LevelSpec(factor=1.0, at_least=24), "24 px and more"),
    ],
)
def test_a_valid_range_has_a_text(level: LevelSpec, text: str) -> None:
    assert sizes_text(level) == text


def test_a_histogram_of_sizes_counts_every_size_in_bins_of_equal_ratio() -> None:
    histogram = Histogram.of_sizes(np.array([16.0, 17.0, 32.0, 63.9]), "", unit="px", band=(32.0, 480.0))
    assert histogram.bars == [100.0, 0.0, 0.0, 0.0, 50.0, 0.0, 0.0, 50.0]
    assert histogram.ticks == [(0.0, "16"), (50.0, "32"), (100.0, "64")]
    assert histogram.band == (50.0, 100.0)


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([], ["0: 0", "1: 0"]),
        ([0, 2, 2], ["0: 1", "1: 0", "2: 2"]),
        ([0, 80], ["0 to 2: 1", *(f"{start} to {start + 2}: 0" for start in range(3, 78, 3)), "78 to 80: 1"]),
    ],
)
def test_a_histogram_of_counts_counts_every_number(values: list[int], labels: list[str]) -> None:
    histogram = Histogram.of_counts(np.array(values, dtype=np.int64), "", unit="")
    assert histogram.labels == labels
    assert len(histogram.bars) == len(labels)


def test_of_many_chips_some_are_drawn(
    page: PlanPage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = int(np.diff(page.table.offsets).max())
    assert most > 2
    monkeypatch.setattr("sniper.planning.page._MAX_OUTLINES", 2)
    html = html_of(page, tmp_path)
    assert f"{most} chips, of which " in html
    assert html.count("fill-opacity") <= 2 * len(page.dataset)
