"""A diagnosis to look at: tables for the terminal, and precision over recall as a picture."""

import math
from collections.abc import Iterator
from pathlib import Path

from matplotlib.figure import Figure
from rich.markup import escape
from rich.table import Table

from sniper.evaluation.diagnosis import Diagnosis
from sniper.reports.palette import PALETTE

CURVE_SUFFIXES = (".png", ".svg", ".pdf")
"""What names of pictures of curves end in."""

_NAMES = ("IoU 0.50", "IoU 0.75", "IoU 0.95")


def show_diagnosis(diagnosis: Diagnosis) -> Iterator[Table]:
    """Give tables: by class, by size, and false positives."""
    classes = Table("class", title="by class")
    for column in ("objects", "detections", "AP", "AP50", "recall"):
        classes.add_column(column, justify="right")
    for one in diagnosis.classes:
        numbers = (one.ap, one.ap50, one.recall)
        classes.add_row(
            escape(one.name), f"{one.num_objects:,}", f"{one.num_detections:,}", *map(_share, numbers)
        )
    yield classes
    sizes = Table("size, px", title="by size of the object")
    for column in ("AP", "recall", "recall, any class"):
        sizes.add_column(column, justify="right")
    for bin_ in diagnosis.sizes:
        end = "" if bin_.below == math.inf else f"{bin_.below:g}"
        sizes.add_row(
            f"{bin_.at_least:g}–{end}", _share(bin_.ap), _share(bin_.recall), _share(bin_.any_class_recall)
        )
    yield sizes
    alarms = Table("where this share of objects is found", title="false positives (IoU 0.5)")
    alarms.add_column("per image", justify="right")
    for recall, count in diagnosis.false_positives.items():
        alarms.add_row(f"{recall:.0%}", "never reached" if count is None else f"{count:.2f}")
    yield alarms


def draw_precision(diagnosis: Diagnosis, path: Path) -> None:
    """Write a picture of precision over recall, the mean over classes.

    Args:
        diagnosis: what to draw.
        path: of the picture; its suffix says in which format.
    """
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    colors = (PALETTE[1], PALETTE[2], PALETTE[5])
    for name, curve, color in zip(_NAMES, diagnosis.precisions, colors, strict=True):
        axes.plot(diagnosis.recalls, curve, color=color, label=f"{name}: AP {curve.mean():.3f}")
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel="precision, mean over classes")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def _share(value: float) -> str:
    """Show a share; COCO's -1 stands for nothing to count."""
    return "–" if value < 0 else f"{value:.3f}"
