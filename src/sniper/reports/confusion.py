"""Write a confusion matrix as a CSV file and a picture."""

import csv
import io
from pathlib import Path

import numpy as np

from sniper.errors import printable
from sniper.evaluation.confusion import BACKGROUND, ConfusionMatrix
from sniper.files import atomic_write
from sniper.reports.fonts import font_file, picture_names

MAX_CLASSES_IN_PICTURE = 80
_MAX_CLASSES_WITH_ALL_NUMBERS = 30  # in pictures of more, shares below 1 % have no number
_MAX_LENGTH = 30  # characters of a name


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
    from matplotlib.figure import Figure  # half a second, which only pictures need
    from matplotlib.font_manager import FontProperties

    drawn = choose_classes(matrix)
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
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    longest = max(len(f"{count:,}") for count in counts.flat)
    text_size = min(10.0, side * 72 / (longest + 1) * 1.6)
    least = 0.0 if num <= _MAX_CLASSES_WITH_ALL_NUMBERS else 0.01
    for row, column in np.argwhere((counts > 0) & (shares >= least)).tolist():
        is_dark = shares[row, column] > 0.55
        axes.text(
            column,
            row,
            f"{counts[row, column]:,}",
            ha="center",
            va="center",
            fontsize=text_size,
            color="white" if is_dark else "black",
            in_layout=False,  # which saves measuring it
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
        figure.savefig(
            file,
            format="png",
            dpi=150 if num <= _MAX_CLASSES_WITH_ALL_NUMBERS else 110,
            bbox_inches="tight",
            pad_inches=0.15,
        )


def choose_classes(matrix: ConfusionMatrix, *, count: int = MAX_CLASSES_IN_PICTURE) -> list[int]:
    """Return the labels of the classes that are confused most, with others or with the background, rising."""
    counts = matrix.counts
    errors = counts.sum(axis=0) + counts.sum(axis=1) - 2 * np.diag(counts)
    order = np.argsort(-errors[:-1], kind="stable")[:count]
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
