"""Show scores as text and tables for the terminal."""

import math
from collections.abc import Iterator, Mapping

from rich.table import Table
from rich.text import Text

from sniper.errors import counted, printable
from sniper.evaluation.coco import CocoScores, Scores
from sniper.evaluation.comparison import Difference
from sniper.evaluation.confusion import BACKGROUND, ConfusionMatrix
from sniper.evaluation.diagnosis import Diagnosis
from sniper.evaluation.false_positives import RECALLS, name_of
from sniper.evaluation.numbers import NUMBERS, CocoNumbers
from sniper.evaluation.operating_point import MatchCounts, OperatingPoint
from sniper.evaluation.proposals import ProposalScores

UNDEFINED = "–"
"""Stands for a number that is not defined, such as the recall of a class without objects."""

MAX_CLASSES_IN_TABLE = 10
"""A confusion matrix of more classes is too wide for a table."""

_NUM_LISTED = 10


def defined(value: float | None) -> float | None:
    """Return a score, or None for one that is not defined (-1 or NaN)."""
    return None if value is None or math.isnan(value) or value < 0 else value


def describe_scores(scores: Scores) -> Iterator[str]:
    """Iterate over lines with the COCO numbers, also of masks, and the numbers of images and detections."""
    limit = counted(scores.max_detections, "detection")
    titles = (
        *("AP", "AP50", "AP75", "AP small", "AP medium", "AP large"),
        *("AR, 1 detection", "AR, 10 detections", f"AR, {limit}", "AR small", "AR medium", "AR large"),
    )
    kinds: list[CocoNumbers] = [scores] if scores.masks is None else [scores, scores.masks]
    columns = [[getattr(kind, name) for name in NUMBERS] for kind in kinds]
    width = max(map(len, titles))
    if len(columns) > 1:
        yield f"{'':<{width}}  boxes  masks"
    for title, *numbers in zip(titles, *columns, strict=True):
        yield "  ".join([f"{title:<{width}}", *(f"{format_score(number):>5}" for number in numbers)])
    yield f"{counted(scores.num_images, 'image')}, {counted(scores.num_detections, 'detection')}"


def show_false_positives(scores: Scores) -> Table:
    """Return the table of false positives per image at each recall."""
    counts, limit = scores.false_positives, scores.max_detections
    num_clean = counts.num_clean_images
    columns = ["from score", counted(scores.num_images, "image")]
    if num_clean:
        columns.append(counted(num_clean, "clean image"))
    title = f"false positives per image (IoU 0.5, best {limit:,} of each class)"
    table = _table("recall", *columns, title=title)
    for point in counts.points:
        score = UNDEFINED if point.score is None else f"{point.score:.5g}"
        numbers = [_format_count(point.per_image), _format_count(point.per_clean_image)]
        table.add_row(f"{point.recall:.0%}", score, *numbers[: 1 + bool(num_clean)])
    return table


def describe_ap_differences(differences: Mapping[str, Difference]) -> Iterator[str]:
    """Iterate over lines with the difference in AP, of masks, too, if it is there.

    Args:
        differences: by name; those of masks begin with `segm_`.
    """
    for name, title in (("ap", "AP"), ("segm_ap", "AP of masks")):
        if name in differences:
            low, high = (_format_signed(bound) for bound in (differences[name].low, differences[name].high))
            difference = _format_signed(differences[name].difference)
            yield f"{title} minus that of --against: {difference}, 95 % interval {low} to {high}"


def show_false_positive_differences(differences: Mapping[str, Difference]) -> Iterator[Table]:
    """Iterate over the tables of differences in false positives per image, with their intervals.

    Args:
        differences: by name, see `sniper.evaluation.false_positives.name_of`; those of masks begin with `segm_`.
    """
    prefixes = ("", "segm_") if "segm_ap" in differences else ("",)
    for prefix in prefixes:
        kind = " of masks" if prefix else ""
        title = f"false positives{kind} per image minus those of --against, 95 % interval"
        table = _table("recall", "images", "clean images", title=title)
        for recall in RECALLS:
            names = [prefix + name_of(recall, on_clean=on_clean) for on_clean in (False, True)]
            table.add_row(f"{recall:.0%}", *(_format_difference(differences[name]) for name in names))
        yield table


def show_proposals(scores: ProposalScores) -> Table:
    """Return the table of the recall of proposals, by size of the objects."""
    limits = [recall.max_proposals for recall in scores.sizes[0].recalls]
    table = _table(
        "objects",
        "count",
        *(f"AR {limit}" for limit in limits),
        *(f"R50 {limit}" for limit in limits),
        title="recall of the best proposals of each image, whatever the class",
    )
    for size in scores.sizes:
        numbers = [*(row.ar for row in size.recalls), *(row.recall_50 for row in size.recalls)]
        table.add_row(size.size, f"{size.num_objects:,}", *map(format_score, numbers))
    return table


def show_classes(scores: Scores, point: OperatingPoint) -> Table:
    """Return the table of the classes: AP, and precision, recall and F1 at one score.

    Classes with neither objects nor detections are left out.
    """
    table = _table("class", *("objects", "AP", "AP50", "precision", "recall", "F1"), title="by class")

    def add(name: str, counts: MatchCounts, *, ap: float, ap50: float) -> None:
        numbers = (ap, ap50, counts.precision, counts.recall, counts.f1)
        table.add_row(Text(printable(name)), f"{counts.num_objects:,}", *map(format_score, numbers))

    for row, counts in zip(scores.classes, point.classes, strict=True):
        if row.num_objects or row.num_detections:
            add(row.name, counts, ap=row.ap, ap50=row.ap50)
    table.add_section()
    add("all", point, ap=scores.ap, ap50=scores.ap50)
    return table


def show_details(scores: CocoScores, diagnosis: Diagnosis, *, kind: str = "") -> Iterator[Table]:
    """Iterate over the tables: detections and AR by class, and scores by size.

    Args:
        scores: of boxes or of masks.
        diagnosis: of the same.
        kind: what is scored, for the titles.
    """
    kind = f", {kind}" if kind else ""
    title = f"all detections by class, AR of the best {scores.max_detections}{kind}"
    by_class = _table("class", "detections", "AR", title=title)
    for row in scores.classes:
        by_class.add_row(Text(printable(row.name)), f"{row.num_detections:,}", format_score(row.ar))
    yield by_class
    by_size = _table("size, px", "AP", "recall", "recall, any class", title=f"by size of the object{kind}")
    for bin_ in diagnosis.sizes:
        end = "" if bin_.below == math.inf else f"{bin_.below:g}"
        numbers = (bin_.ap, bin_.recall, bin_.any_class_recall)
        by_size.add_row(f"{bin_.at_least:g}–{end}", *map(format_score, numbers))
    yield by_size


def show_confusion(matrix: ConfusionMatrix, *, is_numbered: bool = False) -> Table:
    """Return the matrix as a table.

    Args:
        matrix: of few classes.
        is_numbered: head the columns by numbers, which precede the names of the rows, to make them narrow.
    """
    names = [*(printable(category.name) for category in matrix.categories), BACKGROUND]
    title = f"confusion matrix: objects in rows, detections in columns (IoU {matrix.iou:g})"
    headers = [str(number) if is_numbered else name for number, name in enumerate(names, start=1)]
    table = _table("", *headers, title=title)
    for number, (name, counts) in enumerate(zip(names, matrix.counts.tolist(), strict=True), start=1):
        is_background = number == len(names)
        cells = [f"{count:,}" if count else "·" for count in counts]
        if is_background:
            table.add_section()
            cells[-1] = ""
        table.add_row(Text(f"{number} {name}" if is_numbered else name), *cells)
    return table


def describe_confusions(matrix: ConfusionMatrix) -> Iterator[str]:
    """Iterate over lines with the most frequent confusions of two classes."""
    for confusion in matrix.find_largest(_NUM_LISTED):
        share = confusion.count / confusion.num_objects
        yield (
            f"{confusion.count:,} of {confusion.num_objects:,} ({share:.0%}) {printable(confusion.object)} detected as "
            f"{printable(confusion.detected_as)}"
        )


def _table(first: str, *columns: str, title: str) -> Table:
    table = Table(first, title=title, title_justify="left", min_width=len(title))
    for column in columns:
        table.add_column(Text(column), justify="right")
    return table


def _format_difference(difference: Difference) -> str:
    if math.isnan(difference.difference):
        return UNDEFINED
    low, high = map(_format_signed, (difference.low, difference.high))
    return f"{_format_signed(difference.difference)} ({low} to {high})"


def _format_signed(difference: float) -> str:
    return UNDEFINED if math.isnan(difference) else f"{difference:+,.3f}"


def _format_count(count: float | None) -> str:
    return UNDEFINED if count is None else f"{count:,.3f}"


def format_score(score: float) -> str:
    """Return a score with three digits; a dash for NaN, and for COCO's -1."""
    return UNDEFINED if math.isnan(score) or score < 0 else f"{score:.3f}"
