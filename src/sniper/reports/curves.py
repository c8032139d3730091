"""Show a diagnosis: tables for the terminal, and curves of precision over recall."""

import math
from collections.abc import Iterator
from pathlib import Path

from matplotlib.figure import Figure
from rich.table import Table
from rich.text import Text

from sniper.errors import printable
from sniper.evaluation.diagnosis import Diagnosis
from sniper.reports.palette import GREEN, SKY_BLUE, VERMILION

CURVE_SUFFIXES = (".png", ".svg", ".pdf")
"""The file formats of curves."""

_CURVES = (("IoU 0.50", SKY_BLUE), ("IoU 0.75", GREEN), ("IoU 0.95", VERMILION))


def show_diagnosis(diagnosis: Diagnosis) -> Iterator[Table]:
    """Iterate over the tables: by class, by size, and false positives."""
    by_class = Table("class", title="by class")
    for column in ("objects", "detections", "AP", "AP50", "recall"):
        by_class.add_column(column, justify="right")
    for scores in diagnosis.classes:
        numbers = (scores.ap, scores.ap50, scores.recall)
        by_class.add_row(
            Text(printable(scores.name)),
            f"{scores.num_objects:,}",
            f"{scores.num_detections:,}",
            *map(_format, numbers),
        )
    yield by_class
    by_size = Table("size, px", title="by size of the object")
    for column in ("AP", "recall", "recall, any class"):
        by_size.add_column(column, justify="right")
    for bin_ in diagnosis.sizes:
        end = "" if bin_.below == math.inf else f"{bin_.below:g}"
        numbers = (bin_.ap, bin_.recall, bin_.any_class_recall)
        by_size.add_row(f"{bin_.at_least:g}–{end}", *map(_format, numbers))
    yield by_size
    false_positives = Table("recall", title="false positives (IoU 0.5)")
    false_positives.add_column("per image", justify="right")
    for recall, count in diagnosis.false_positives.items():
        false_positives.add_row(f"{recall:.0%}", "not reached" if count is None else f"{count:.2f}")
    yield false_positives


def draw_precision(diagnosis: Diagnosis, path: Path) -> None:
    """Write a picture of precision over recall, the mean over classes.

    Args:
        diagnosis: with the curves.
        path: of the picture; its suffix decides the format, see `CURVE_SUFFIXES`.
    """
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    for (name, color), precision in zip(_CURVES, diagnosis.precisions, strict=True):
        axes.plot(diagnosis.recalls, precision, color=color, label=f"{name}: AP {precision.mean():.3f}")
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel="precision, mean over classes")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def _format(score: float) -> str:
    """Return a score with three digits, or a dash for -1, which stands for no objects."""
    return "–" if score < 0 else f"{score:.3f}"
