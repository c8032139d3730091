"""Scores and confusion matrices: as text, as tables, as CSV, and as pictures."""

import csv
import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from rich.table import Table

from sniper.data.datasets import Category
from sniper.evaluation.coco import ClassScores, Scores
from sniper.evaluation.comparison import Difference
from sniper.evaluation.confusion import ConfusionMatrix
from sniper.evaluation.false_positives import RECALLS, FalsePositives, FalsePositivesAtRecall, name_of
from sniper.evaluation.operating_point import ClassCounts, OperatingPoint
from sniper.reports.confusion import draw_confusion, write_confusion
from sniper.reports.scores import (
    describe_confusions,
    describe_scores,
    format_score,
    show_classes,
    show_confusion,
    show_false_positive_differences,
    show_false_positives,
)


def matrix_of(*names: str, seed: int = 0) -> ConfusionMatrix:
    counts = np.random.default_rng(seed).integers(0, 3, (len(names) + 1, len(names) + 1))
    counts[np.diag_indices(len(names))] = 1234
    counts[-1, -1] = 0
    categories = tuple(Category(category_id=i, name=name) for i, name in enumerate(names))
    return ConfusionMatrix(categories=categories, counts=counts, score=0.42, iou=0.5)


def scores_of(*classes: ClassScores) -> Scores:
    numbers = ("ap", "ap50", "ap75", "ap_medium", "ap_large", "ar_1", "ar_10", "ar", "ar_small")
    values: dict[str, Any] = {name: 0.1 * i for i, name in enumerate(numbers)}
    return Scores(
        **values,
        ap_small=-1.0,
        ar_medium=0.5,
        ar_large=0.5,
        num_images=1,
        num_detections=1200,
        num_cut=0,
        false_positives=FalsePositives(num_clean_images=0, points=()),
        max_detections=300,
        classes=classes,
    )


def text_of(table: Table) -> str:
    text = io.StringIO()
    Console(file=text, width=200, markup=False).print(table)
    return text.getvalue()


@pytest.mark.parametrize(
    ("score", "text"), [(0.12345, "0.123"), (0.0, "0.000"), (-1.0, "–"), (math.nan, "–")]
)
def test_undefined_scores_are_dashes(score: float, text: str) -> None:
    assert format_score(score) == text


def test_each_number_has_its_name_in_the_field() -> None:
    lines = [line.split("  ") for line in describe_scores(scores_of())]
    assert [line[0] for line in lines[:3]] == ["AP", "AP50", "AP75"]
    assert ["AR, 300 detections", "0.700"] in lines
    assert lines[3][0] == "AP small"
    assert lines[3][-1].strip() == "–"
    assert lines[-1] == ["1 image, 1,200 detections"]


def cells_of(table: Table) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in text_of(table).splitlines()
        if "│" in line
    ]


def test_undefined_false_positives_and_bounds_are_dashes() -> None:
    counts = FalsePositives(
        num_clean_images=1,
        points=(
            FalsePositivesAtRecall(recall=0.5, score=0.99995, per_image=1234.5),
            FalsePositivesAtRecall(recall=0.9),
        ),
    )
    table = show_false_positives(replace(scores_of(), false_positives=counts))
    assert cells_of(table) == [["50%", "0.99995", "1,234.500", "–"], ["90%", "–", "–", "–"]]
    assert "best 300 of each class" in text_of(table)
    assert "1 clean image " in text_of(table)
    without = replace(scores_of(), false_positives=replace(counts, num_clean_images=0))
    assert cells_of(show_false_positives(without)) == [["50%", "0.99995", "1,234.500"], ["90%", "–", "–"]]
    undefined = Difference(difference=math.nan, low=math.nan, high=math.nan)
    differences = {
        name_of(recall, on_clean=clean): undefined for recall in RECALLS for clean in (False, True)
    }
    differences["fp_per_image_at_50"] = Difference(difference=-1.0, low=-2.0, high=0.25)
    differences["fp_per_clean_image_at_80"] = Difference(difference=0.5, low=math.nan, high=math.nan)
    (table,) = show_false_positive_differences(differences)
    assert cells_of(table) == [
        ["50%", "-1.000 (-2.000 to +0.250)", "–"],
        ["80%", "–", "+0.500 (– to –)"],
        ["90%", "–", "–"],
    ]


def test_classes_that_nothing_is_known_of_are_left_out() -> None:
    rows = [
        ClassScores(name=name, num_objects=objects, num_detections=detections, ap=ap, ap50=ap, ar=ap)
        for name, objects, detections, ap in (
            ("car", 8, 5, 0.5),
            ("van", 0, 3, -1.0),
            ("bus", 0, 0, -1.0),
        )
    ]
    counts = tuple(
        ClassCounts(
            name=row.name, num_objects=row.num_objects, num_true_positives=true, num_false_positives=2
        )
        for row, true in zip(rows, (2, 0, 0), strict=True)
    )
    point = OperatingPoint(
        num_objects=8, num_true_positives=2, num_false_positives=6, score=0.4, iou=0.5, classes=counts
    )
    assert cells_of(show_classes(scores_of(*rows), point)) == [
        ["car", "8", "0.500", "0.500", "0.500", "0.250", "0.333"],
        ["van", "0", "–", "–", "0.000", "–", "–"],
        ["all", "8", "0.000", "0.100", "0.250", "0.250", "0.250"],
    ]


def test_columns_of_a_confusion_table_can_be_numbered() -> None:
    matrix = matrix_of("[b]car[/b]", "a very long name of a class")
    assert "[b]car[/b]" in text_of(show_confusion(matrix))
    numbered = text_of(show_confusion(matrix, is_numbered=True))
    assert "2 a very long name of a class" in numbered
    assert numbered.count("a very long name") == 1


def test_frequent_confusions_are_lines() -> None:
    matrix = matrix_of("car", "van")
    matrix.counts[0, 1] = 25
    objects = int(matrix.counts[0].sum())
    line = next(describe_confusions(matrix))
    assert line == f"25 of {objects:,} (2%) car detected as van"


def test_a_csv_file_has_names_that_need_quotes(tmp_path: Path) -> None:
    matrix = matrix_of('car, "red"', "汽车\udcb2")
    write_confusion(matrix, tmp_path / "c.csv")
    with (tmp_path / "c.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["object", 'car, "red"', r"汽车\xb2", "background"]
    assert [row[0] for row in rows[1:]] == rows[0][1:]
    assert [list(map(int, row[1:])) for row in rows[1:]] == matrix.counts.tolist()


@pytest.mark.parametrize(
    "names",
    [
        ("ship",),
        ("$x_2$ copper", "a very long class name of a vehicle with trailer and crane", "Автобус"),
        tuple(f"class {i}" for i in range(100)),
    ],
)
def test_a_picture_is_square_cells_with_labels(names: tuple[str, ...], tmp_path: Path) -> None:
    draw_confusion(matrix_of(*names), tmp_path / "c.png")
    with Image.open(tmp_path / "c.png") as picture:
        assert picture.width > 250
        assert picture.height > 250
        assert max(picture.size) < 5000
        assert len(picture.convert("L").resize((300, 300)).getcolors() or ()) > 20
    assert [path.name for path in tmp_path.iterdir()] == ["c.png"]
