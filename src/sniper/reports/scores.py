"""Show scores as text and tables for the terminal."""

import math
from collections.abc import Iterator

from rich.table import Table
from rich.text import Text

from sniper.errors import printable
from sniper.evaluation.coco import Scores
from sniper.evaluation.diagnosis import Diagnosis
from sniper.evaluation.operating_point import MatchCounts, OperatingPoint

UNDEFINED = "–"
"""Stands for a number that is not defined, such as the recall of a class without objects."""


def describe_scores(scores: Scores) -> Iterator[str]:
    """Iterate over lines with the COCO numbers under their names."""
    limit = scores.max_detections
    numbers = {
        "AP": scores.ap,
        "AP50": scores.ap50,
        "AP75": scores.ap75,
        "AP small": scores.ap_small,
        "AP medium": scores.ap_medium,
        "AP large": scores.ap_large,
        "AR, 1 detection": scores.ar_1,
        "AR, 10 detections": scores.ar_10,
        f"AR, {limit} detections": scores.ar,
        "AR small": scores.ar_small,
        "AR medium": scores.ar_medium,
        "AR large": scores.ar_large,
    }
    width = max(map(len, numbers))
    for name, number in numbers.items():
        yield f"{name:<{width}}  {format_score(number):>5}"
    images = "image" if scores.num_images == 1 else "images"
    detections = "detection" if scores.num_detections == 1 else "detections"
    yield f"{scores.num_images:,} {images}, {scores.num_detections:,} {detections}"


def show_classes(scores: Scores, point: OperatingPoint, *, details: bool) -> Table:
    """Return the table of the classes: AP, and precision, recall and F1 at one score.

    Classes with neither objects nor detections are left out.

    Args:
        scores: with the classes.
        point: of the same classes.
        details: also show the number of all detections and AR.
    """
    table = Table("class", title="by class", title_justify="left")
    columns = ["objects", "AP", "AP50", "precision", "recall", "F1"]
    if details:
        columns[1:1] = ["detections"]
        columns[4:4] = [f"AR {scores.max_detections}"]
    for column in columns:
        table.add_column(column, justify="right")

    def add(
        name: str, counts: MatchCounts, *, num_detections: int, ap: float, ap50: float, ar: float
    ) -> None:
        cells = [f"{counts.num_objects:,}", format_score(ap), format_score(ap50)]
        if details:
            cells[1:1] = [f"{num_detections:,}"]
            cells.append(format_score(ar))
        table.add_row(
            Text(printable(name)),
            *cells,
            *map(format_score, (counts.precision, counts.recall, counts.f1)),
        )

    for row, counts in zip(scores.classes, point.classes, strict=True):
        if row.num_objects or row.num_detections:
            add(row.name, counts, num_detections=row.num_detections, ap=row.ap, ap50=row.ap50, ar=row.ar)
    table.add_section()
    add("all", point, num_detections=scores.num_detections, ap=scores.ap, ap50=scores.ap50, ar=scores.ar)
    return table


def show_diagnosis(diagnosis: Diagnosis) -> Iterator[Table]:
    """Iterate over the tables: by size, and false positives."""
    by_size = Table("size, px", title="by size of the object", title_justify="left")
    for column in ("AP", "recall", "recall, any class"):
        by_size.add_column(column, justify="right")
    for bin_ in diagnosis.sizes:
        end = "" if bin_.below == math.inf else f"{bin_.below:g}"
        numbers = (bin_.ap, bin_.recall, bin_.any_class_recall)
        by_size.add_row(f"{bin_.at_least:g}–{end}", *map(format_score, numbers))
    yield by_size
    false_positives = Table("recall", title="false positives (IoU 0.5)", title_justify="left")
    false_positives.add_column("per image", justify="right")
    for recall, count in diagnosis.false_positives.items():
        false_positives.add_row(f"{recall:.0%}", "not reached" if count is None else f"{count:.2f}")
    yield false_positives


def format_score(score: float) -> str:
    """Return a score with three digits; a dash for NaN, and for COCO's -1."""
    return UNDEFINED if math.isnan(score) or score < 0 else f"{score:.3f}"
