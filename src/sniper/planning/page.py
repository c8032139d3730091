"""The page of a plan: what the chips of a data set cost and show, as one HTML file that needs no other."""

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from jaxtyping import Float
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from sniper.chips import ChipTable
from sniper.chips.pyramid import LevelSpec
from sniper.data.datasets import Dataset, ImageRecord
from sniper.data.images.files import open_image
from sniper.data.spec import ReadSpec
from sniper.errors import ImageError
from sniper.files import atomic_write
from sniper.geometry.boxes import size
from sniper.planning.cost import USEFUL_SIZES, CostPlan
from sniper.planning.suggest import Suggestion
from sniper.reports.palette import PALETTE

_QUANTILES = (0.1, 0.5, 0.75, 0.9, 0.99, 1.0)  # of chips per image: the images that are drawn
_PICTURE_SIDE = 900  # pixels; of the longer side of an image on the page
_GREY, _BAND = "#8a8f98", "#eef3e6"


@dataclass(frozen=True, kw_only=True)
class PlanPage:
    """What the page shows.

    Attributes:
        annotations: the data set.
        table: its chips.
        budget: of these chips.
        suggest_pyramids: pyramids that would suit the data set, the suggested one first. May be empty.
        test_megapixels: of the whole images at the experiment's test levels, per image.
        batch_size: chips in a step.
        crowd: a chip that shows more boxes than this is counted as crowded.
        suggested: the YAML of the suggestion; empty if there is none.
        read: how image files become pixels.
    """

    annotations: Dataset
    table: ChipTable
    budget: CostPlan
    suggest_pyramids: Sequence[Suggestion]
    test_megapixels: float
    batch_size: int
    crowd: int
    suggested: str
    read: ReadSpec = ReadSpec()

    @property
    def num_crowded(self) -> int:
        """The chips that show more boxes than `crowd`."""
        return int((self.budget.boxes_per_chip > self.crowd).sum())

    def save(self, path: Path) -> None:
        """Write the page; a file already there is replaced whole or not at all."""
        environment = jinja2.Environment(
            loader=jinja2.PackageLoader("sniper.planning", "."),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
        )
        environment.filters["resize"] = resize_rule
        html = environment.get_template("plan.html.j2").render(
            page=self,
            suggest_pyramids=[
                (offer.goal, offer.budget, offer.budget.megapixels.pyramid) for offer in self.suggest_pyramids
            ],
            infinity=math.inf,
            num_crowded=self.num_crowded,
            budget=self.budget,
            colors=PALETTE,
            useful=USEFUL_SIZES,
            pictures=self._pictures(),
            costs=_draw_costs(self.budget),
            sizes=_draw_sizes(self.budget, size(self.annotations.boxes[~self.annotations.is_crowd])),
            counts=_draw_counts(self.budget),
        )
        with atomic_write(path) as file:
            file.write(html.encode())

    def as_dict(self) -> dict[str, Any]:
        """Give the figures under the names that the command line answers with."""
        budget, costs = self.budget, self.budget.megapixels
        return {
            **budget.as_dict(),
            "share_useful": round(budget.share_useful, 4),
            "megapixels_other_ways": {
                "single_800x1333": round(costs.single, 4),
                "grid": round(costs.grid, 4),
                "pyramid": round(costs.pyramid, 4),
            },
            "levels": [
                {
                    "valid_boxes": level.num_valid,
                    "moved_here": level.num_moved_here,
                    "covered_boxes": level.num_covered,
                    "cropped_boxes": level.num_cropped,
                    "chips": level.num_chips,
                    "median_size": round(float(np.median(level.sizes)), 1) if len(level.sizes) else None,
                }
                for level in budget.levels
            ],
            "batch_size": self.batch_size,
            "steps_per_epoch": budget.num_steps(self.batch_size),
            "crowded_chips": self.num_crowded,
            "suggest_pyramids": [
                {
                    "goal": offer.goal,
                    "chip_size": offer.budget.pyramid.chip_size,
                    "levels": [resize_rule(spec) for spec in offer.budget.pyramid.levels],
                    "share_useful": round(offer.budget.share_useful, 4),
                    "chips_per_image": round(offer.budget.mean_chips_per_image, 4),
                    "megapixels_per_image": round(offer.budget.megapixels.chips, 4),
                    "megapixels_pyramid": round(offer.budget.megapixels.pyramid, 4),
                }
                for offer in self.suggest_pyramids
            ],
        }

    def _pictures(self) -> list["_Picture"]:
        """Choose images with few, some and many chips, and draw them."""
        counts = np.diff(self.table.offsets)
        with_chips = np.flatnonzero(counts)
        if not len(with_chips):
            return []
        ranked = with_chips[np.argsort(counts[with_chips], kind="stable")]
        places = [round(quantile * (len(ranked) - 1)) for quantile in _QUANTILES]
        return [self._picture(int(ranked[place])) for place in dict.fromkeys(places)]

    def _picture(self, index: int) -> "_Picture":
        record = self.annotations[index]
        chips = range(*self.table.offsets[index : index + 2].tolist())
        frames = []
        for chip_index in chips:
            chip = self.table.chip(chip_index)
            width, height = chip.visible
            window = np.array([[0, 0, width, height]], dtype=np.float64)
            is_negative = bool(self.table.is_negative[chip_index])
            frames.append(
                _Frame(level=chip.level.index, is_negative=is_negative, corners=chip.to_image(window)[0])
            )
        try:
            pixels, problem = _thumbnail(record, self.read), ""
        except ImageError as error:  # a plan needs no image: one that cannot be shown is told in its place
            pixels, problem = None, str(error)
        return _Picture(record=record, pixels=pixels, problem=problem, frames=frames)


@dataclass(frozen=True, kw_only=True)
class _Frame:
    """The outline of a chip, xyxy, image frame."""

    level: int
    is_negative: bool
    corners: Float[np.ndarray, "4"]


@dataclass(frozen=True, kw_only=True)
class _Picture:
    """An image with its chips; without pixels, a blank canvas, and why if the image is there."""

    record: ImageRecord
    pixels: str | None
    problem: str
    frames: list[_Frame]


def resize_rule(level: LevelSpec) -> str:
    """Say in words how a level resizes."""
    if level.factor is not None:
        return f"×{level.factor:g}"
    if level.long_side is not None:
        return f"long side {level.long_side}"
    limit = f", long at most {level.max_long_side}" if level.max_long_side else ""
    return f"short side {level.short_side}{limit}"


def _thumbnail(record: ImageRecord, read: ReadSpec) -> str | None:
    """Give an image, small, as base64 JPEG; None where its file is not there."""
    if not record.path.is_file():
        return None
    picture = open_image(record.path, read, sides=record.sides)
    wanted = 1 << max(max(record.width, record.height) // (2 * _PICTURE_SIDE), 1).bit_length() - 1
    reduction = picture.largest_reduction(wanted)
    image = Image.fromarray(picture.read((0, 0, picture.width, picture.height), reduction=reduction))
    image.thumbnail((_PICTURE_SIDE, _PICTURE_SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    return base64.b64encode(file.getvalue()).decode()


def _to_svg(figure: Figure, *, name: str) -> str:
    file = io.StringIO()
    with rc_context({"svg.hashsalt": name}):  # equal figures have equal names inside, others other ones
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :]


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def _draw_costs(budget: CostPlan) -> str:
    """Draw bars: megapixels of the chips, and of other ways."""
    costs = budget.megapixels
    names = (
        "chips of this pyramid",
        "one pass at 800 × 1333",
        f"tiles of {budget.pyramid.chip_size} px at × 1",
        "the whole image at every level",
    )
    values = (costs.chips, costs.single, costs.grid, costs.pyramid)
    figure = Figure(figsize=(8, 2.1), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(names, values, color=[PALETTE[0], _GREY, _GREY, _GREY])
    axes.bar_label(bars, labels=[f"{value:.2f}" for value in values], padding=4)
    axes.invert_yaxis()
    axes.set_xlabel("megapixels per image that has boxes")
    axes.margins(x=0.1)
    _tidy(axes)
    return _to_svg(figure, name="costs")


def _draw_sizes(budget: CostPlan, image_sizes: Float[np.ndarray, " n"]) -> str:
    """Draw histograms of box sizes: in the images, with the valid ranges; and in the chips of each level."""
    levels = budget.pyramid.levels
    figure = Figure(figsize=(8, 1.9 * (len(levels) + 1)), layout="constrained")
    top, *rest = figure.subplots(len(levels) + 1, 1)
    largest = max(image_sizes.max(initial=1.0), 1.0)
    top.hist(
        image_sizes, bins=_log_bins(max(min(1.0, image_sizes.min(initial=1.0)), 1e-3), largest), color=_GREY
    )
    height = top.get_ylim()[1]
    for index, level in enumerate(levels):
        right = min(level.below, largest)
        y = height * (1.06 + 0.1 * (len(levels) - 1 - index))
        top.plot([max(level.at_least, 1), max(right, 1)], [y, y], lw=4, color=PALETTE[index % len(PALETTE)])
    top.set_title(
        "in the images (pixels of the image); lines: the range that each level learns from", loc="left"
    )
    _size_axis(top)
    for index, (axes, level, cost) in enumerate(zip(rest, levels, budget.levels, strict=True)):
        axes.axvspan(*USEFUL_SIZES, color=_BAND, zorder=0)
        axes.hist(
            cost.sizes,
            bins=_log_bins(min(4.0, cost.sizes.min(initial=4.0)), budget.pyramid.chip_size),
            color=PALETTE[index % len(PALETTE)],
        )
        axes.set_title(
            f"in the chips of level {index + 1}: {resize_rule(level)} (pixels of the chip)", loc="left"
        )
        _size_axis(axes)
    return _to_svg(figure, name="sizes")


def _log_bins(low: float, high: float) -> Float[np.ndarray, " k"]:
    return np.geomspace(low, max(high, 2 * low), 61)


def _size_axis(axes: Axes) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda size, _: f"{size:g}")
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.set_ylabel("boxes")
    _tidy(axes)


def _draw_counts(budget: CostPlan) -> str:
    """Draw two histograms: chips per image, and boxes per chip."""
    figure = Figure(figsize=(8, 2.5), layout="constrained")
    pairs = (
        (budget.chips_per_image, "chips of an image", "images"),
        (budget.boxes_per_chip, "boxes that a chip shows", "chips"),
    )
    for axes, (counts, across, up) in zip(figure.subplots(1, 2), pairs, strict=True):
        most = int(counts.max(initial=1))
        step = -(-most // 60)
        axes.hist(counts, bins=np.arange(0.5, most + step + 0.5, step), color=_GREY)
        axes.set_xlabel(across)
        axes.set_ylabel(up)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        _tidy(axes)
    return _to_svg(figure, name="counts")
