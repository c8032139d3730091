"""Show what a focus costs and finds: a table, AP over the time of a search, and a page of them with pictures."""

import base64
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from sniper.files import atomic_write
from sniper.inference.focus_curve import CUES, FocusPoint
from sniper.reports.crops import shrink
from sniper.reports.page import render, write_page
from sniper.reports.palette import BLUE, ORANGE
from sniper.reports.pictures import FOCUS_KINDS

COLUMNS = ("cues", "window", "min_score", "time", "s", "MP", "AP", "AP50", "AP small")
"""Of the table of settings: time is the share of that of a whole search, s and MP are per image."""

_PICTURE_SIDE = 900  # pixels; of the longer side, on the page

_COLORS = {"detections": BLUE, "head": ORANGE}
_NAMES = {"detections": "by detections", "head": "by the focus head"}


def describe_point(point: FocusPoint) -> tuple[str, ...]:
    """Return the row of a setting in the table, as text: a value for each of `COLUMNS`."""
    setting = (
        ("all", "", "")
        if point.focus is None
        else (point.focus.cues, str(point.focus.window), f"{point.focus.min_score:g}")
    )
    scores = (f"{value:.3f}" if value >= 0 else "–" for value in (point.ap, point.ap50, point.ap_small))
    return *setting, f"{point.time_share:.0%}", f"{point.seconds:.3f}", f"{point.megapixels:.2f}", *scores


def describe_choice(points: Sequence[FocusPoint], chosen: FocusPoint) -> str:
    """Return what the chosen setting saves and loses, as text."""
    if chosen.focus is None:
        return "no setting does; every level is searched as a whole"
    return f"{1 / chosen.time_share:.1f} times as fast, AP {chosen.ap:.3f} instead of {points[0].ap:.3f}"


def write_focus_page(
    points: Sequence[FocusPoint],
    chosen: FocusPoint,
    path: Path,
    *,
    run: Path,
    num_images: int,
    curve: Path,
    pictures: Sequence[Path],
) -> None:
    """Write the page of a focus: the choice, the curve, the settings, and what was searched, found and missed.

    Args:
        points: the whole search first.
        chosen: one of them.
        path: of the page.
        run: folder of the run.
        num_images: that were searched.
        curve: see `draw_curve`.
        pictures: see `draw_focus`.
    """
    shown = []
    for picture in pictures:
        with Image.open(picture) as image:
            shown.append((picture.name, shrink(np.asarray(image), max_side=_PICTURE_SIDE)))
    html = render(
        "focus.html.j2",
        run=str(run),
        num_images=num_images,
        choice=describe_choice(points, chosen),
        is_chosen=chosen.focus is not None,
        columns=COLUMNS,
        rows=[(point is chosen, describe_point(point)) for point in points],
        curve=base64.b64encode(curve.read_bytes()).decode(),
        pictures=shown,
        kinds=FOCUS_KINDS,
    )
    write_page(html, path)


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
