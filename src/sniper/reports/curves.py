"""Draw curves of precision over recall."""

from pathlib import Path

from matplotlib.figure import Figure

from sniper.evaluation.diagnosis import Diagnosis
from sniper.files import atomic_write
from sniper.reports.palette import GREEN, SKY_BLUE, VERMILION

CURVE_SUFFIXES = (".png", ".svg", ".pdf")
"""The file formats of curves."""

_CURVES = (("IoU 0.50", SKY_BLUE), ("IoU 0.75", GREEN), ("IoU 0.95", VERMILION))


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
    with atomic_write(path) as file:
        figure.savefig(file, format=path.suffix.lower().removeprefix("."), dpi=150)
