"""Draw what a focus costs and finds: AP over the time of a search."""

from collections.abc import Sequence
from pathlib import Path

from sniper.files import atomic_write
from sniper.inference.focus_curve import CUES, FocusPoint
from sniper.reports.palette import BLUE, ORANGE

_COLORS = {"detections": BLUE, "head": ORANGE}
_NAMES = {"detections": "by detections", "head": "by the focus head"}


def draw_curve(points: Sequence[FocusPoint], chosen: FocusPoint, path: Path) -> None:
    """Write a picture, PNG, of all settings: AP over the share of the time.

    A line joins those of each source of cues that no other of it beats in both.

    Args:
        points: the whole search first.
        chosen: one of them.
        path: of the picture.
    """
    from matplotlib.figure import Figure  # half a second, which only pictures need

    whole, *others = points
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.axhline(whole.ap, color="0.6", linewidth=0.8, label="whole search")
    for cues in CUES:
        of_cues = [point for point in others if point.focus is not None and point.focus.cues == cues]
        if not of_cues:
            continue
        shares, scores = [point.time_share for point in of_cues], [point.ap for point in of_cues]
        axes.scatter(shares, scores, s=10, color=_COLORS[cues], alpha=0.4)
        front = best_points(of_cues)
        axes.plot(
            [point.time_share for point in front],
            [point.ap for point in front],
            "o-",
            markersize=4,
            color=_COLORS[cues],
            label=_NAMES[cues],
        )
    axes.plot(
        [chosen.time_share], [chosen.ap], "o", markersize=11, fillstyle="none", color="black", label="chosen"
    )
    axes.set(xlabel="share of the time of a whole search", ylabel="AP", xlim=(0, 1.02))
    axes.grid(linewidth=0.4)
    axes.legend(loc="lower right")
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=150)


def best_points(points: Sequence[FocusPoint]) -> list[FocusPoint]:
    """Return the points with a better AP than all that are faster, by rising time."""
    best: list[FocusPoint] = []
    for point in sorted(points, key=lambda point: (point.time_share, -point.ap)):
        if not best or point.ap > best[-1].ap:
            best.append(point)
    return best
