"""Show a confusion matrix: as a table for the terminal, a CSV file and a picture."""

import csv
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from rich.table import Table
from rich.text import Text

from sniper.errors import printable
from sniper.evaluation.confusion import ConfusionMatrix
from sniper.files import atomic_write
from sniper.reports.fonts import font_file, picture_names

BACKGROUND = "background"
"""Names the row of detections that match no object, and the column of objects that no detection matches."""

MAX_CLASSES_IN_TABLE = 10
MAX_CLASSES_IN_PICTURE = 80
_NUM_LISTED = 10
_MAX_LENGTH = 30  # characters of a name
_DPI = 150


def show_confusion(matrix: ConfusionMatrix, *, is_numbered: bool = False) -> Table:
    """Return the matrix as a table.

    Args:
        matrix: of few classes.
        is_numbered: head the columns by numbers, which precede the names of the rows, to make them narrow.
    """
    names = [*(printable(category.name) for category in matrix.categories), BACKGROUND]
    title = f"confusion matrix: objects in rows, detections in columns (IoU {matrix.iou:g})"
    table = Table("", title=title, title_justify="left", min_width=len(title))
    for number, name in enumerate(names, start=1):
        table.add_column(Text(str(number) if is_numbered else name), justify="right")
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


def write_confusion(matrix: ConfusionMatrix, path: Path) -> None:
    """Write the matrix as CSV in UTF-8: a row for each class of objects, then the background."""
    names = [*(printable(category.name) for category in matrix.categories), BACKGROUND]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["object", *names])
    writer.writerows([name, *counts] for name, counts in zip(names, matrix.counts.tolist(), strict=True))
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())


def draw_confusion(matrix: ConfusionMatrix, path: Path) -> None:
    """Write a picture of the matrix as PNG.

    Of more than 80 classes those are drawn that are confused most, with others or with the background.
    """
    drawn = _choose_classes(matrix)
    last = len(matrix.categories)
    names = [_shorten(name) for name in picture_names([matrix.categories[label] for label in drawn])]
    names.append(BACKGROUND)
    counts = matrix.counts[np.ix_([*drawn, last], [*drawn, last])]
    shares = _shares(matrix)[np.ix_([*drawn, last], [*drawn, last])]
    num = len(names)
    side = 0.62 if num <= 12 else 0.42 if num <= 30 else 0.26  # inches of a cell
    figure = Figure(figsize=(num * side, num * side))
    axes = figure.add_axes(
        (0.0, 0.0, 1.0, 1.0)
    )  # labels extend the picture, instead of making the cells smaller
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    longest = max(len(f"{count:,}") for count in counts.flat)
    text_size = min(10.0, side * 72 / (longest + 1) * 1.6)
    for row, column in np.argwhere(counts > 0).tolist():
        is_dark = shares[row, column] > 0.55
        axes.text(
            column,
            row,
            f"{counts[row, column]:,}",
            ha="center",
            va="center",
            fontsize=text_size,
            color="white" if is_dark else "black",
        )
    label_size = 10 if num <= 30 else 7
    axes.set_xticks(range(num), names, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(num), names)
    for label in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        label.set_fontproperties(FontProperties(fname=font_file(label.get_text()), size=label_size))
        label.set_parse_math(False)
    axes.axhline(num - 1.5, color="0.5", linewidth=0.8)
    axes.axvline(num - 1.5, color="0.5", linewidth=0.8)
    axes.tick_params(length=0)
    axes.set(xlabel="detected as", ylabel="object")
    axes.set_title(_title(matrix, num_drawn=len(drawn)), loc="left", fontsize=10)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=_DPI, bbox_inches="tight", pad_inches=0.15)


def _choose_classes(matrix: ConfusionMatrix) -> list[int]:
    """Return the labels of the classes to draw, rising."""
    counts = matrix.counts
    errors = counts.sum(axis=0) + counts.sum(axis=1) - 2 * np.diag(counts)
    order = np.argsort(-errors[:-1], kind="stable")[:MAX_CLASSES_IN_PICTURE]
    return sorted(order.tolist())


def _shares(matrix: ConfusionMatrix) -> np.ndarray:
    """Return shares of the objects of a row, or, in the row of the background, of the detections of a column."""
    counts = matrix.counts
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    shares[-1] = counts[-1] / np.maximum(counts.sum(axis=0), 1)
    return shares


def _shorten(name: str) -> str:
    return name if len(name) <= _MAX_LENGTH else f"{name[: _MAX_LENGTH - 1]}…"


def _title(matrix: ConfusionMatrix, *, num_drawn: int) -> str:
    lines = [
        f"detections with a score of at least {matrix.score:g}, IoU {matrix.iou:g}",
        "last column: missed objects; last row: false positives",
        "colour: share of a row; in the last row, of a column",
    ]
    if num_drawn < len(matrix.categories):
        lines.insert(1, f"{num_drawn} of {len(matrix.categories):,} classes, with the most errors")
    return "\n".join(lines)
