"""The page of a plan: what the chips of a data set cost and show, as one self-contained HTML file."""

import base64
import io
import math
import os
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
from sniper.data.reader import open_record
from sniper.data.spec import ReadSpec
from sniper.errors import ImageError, printable
from sniper.files import atomic_write
from sniper.geometry.boxes import size
from sniper.planning.cost import USEFUL_SIZES, CostPlan
from sniper.planning.suggest import Suggestion
from sniper.reports.palette import PALETTE

_QUANTILES = (0.1, 0.5, 0.75, 0.9, 0.99, 1.0)  # of chips per image: the images that are shown
_THUMBNAIL_SIDE = 900  # pixels; of the longer side
_GREY, _BAND, _BOX_COLOR = "#8a8f98", "#eef3e6", "#d0021b"


@dataclass(frozen=True, kw_only=True)
class PlanPage:
    """The content of the page.

    Attributes:
        dataset: the data set.
        table: its chips, ordered by image.
        cost: the cost of these chips.
        suggestions: pyramids that suit the data set, the suggested one first. May be empty.
        test_megapixels: of the whole images at the experiment's test levels, per image.
        batch_size: chips in a step.
        crowded_above: a chip that shows more boxes than this is counted as crowded.
        suggested_yaml: the experiment with the suggested pyramid; empty if there is none.
        read: how image files are read.
    """

    dataset: Dataset
    table: ChipTable
    cost: CostPlan
    suggestions: Sequence[Suggestion]
    test_megapixels: float
    batch_size: int
    crowded_above: int
    suggested_yaml: str
    read: ReadSpec = ReadSpec()

    @property
    def num_crowded(self) -> int:
        """The number of chips that show more boxes than `crowded_above`."""
        return int((self.cost.boxes_per_chip > self.crowded_above).sum())

    def save(self, folder: Path) -> None:
        """Write plan.html and, if there is a suggestion, suggested.yaml; existing files are replaced atomically.

        The page needs no image file. One that is absent is left blank; one that cannot be read is reported in its
        caption.

        Args:
            folder: created if absent.
        """
        environment = jinja2.Environment(
            loader=jinja2.PackageLoader("sniper.planning", "."),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            finalize=lambda value: printable(value) if type(value) is str else value,  # names of files
        )
        environment.filters["resize"] = resize_rule
        html = environment.get_template("plan.html.j2").render(
            page=self,
            cost=self.cost,
            infinity=math.inf,
            level_colors=PALETTE,
            box_color=_BOX_COLOR,
            useful=USEFUL_SIZES,
            examples=self._examples(),
            pixel_chart=_draw_pixels(self.cost),
            size_chart=_draw_sizes(self.cost, size(self.dataset.boxes[~self.dataset.is_crowd])),
            count_chart=_draw_counts(self.cost),
        )
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / "plan.html") as file:
            file.write(html.encode())
        (folder / "suggested.yaml").unlink(missing_ok=True)  # of an earlier plan
        if self.suggested_yaml:
            with atomic_write(folder / "suggested.yaml") as file:
                file.write(self.suggested_yaml.encode())

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as plain data, under the keys of the command line."""
        cost, megapixels = self.cost, self.cost.megapixels
        return {
            **cost.as_dict(),
            "share_useful": round(cost.share_useful, 4),
            "megapixels_other_ways": {
                "single_800x1333": round(megapixels.single, 4),
                "grid": round(megapixels.grid, 4),
                "pyramid": round(megapixels.pyramid, 4),
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
                for level in cost.levels
            ],
            "batch_size": self.batch_size,
            "steps_per_epoch": cost.num_steps(self.batch_size),
            "crowded_chips": self.num_crowded,
            "suggestions": [
                {
                    "goal": suggestion.goal,
                    "chip_size": suggestion.cost.pyramid.chip_size,
                    "levels": [resize_rule(spec) for spec in suggestion.cost.pyramid.levels],
                    "share_useful": round(suggestion.cost.share_useful, 4),
                    "chips_per_image": round(suggestion.cost.mean_chips_per_image, 4),
                    "megapixels_per_image": round(suggestion.cost.megapixels.chips, 4),
                    "megapixels_pyramid": round(suggestion.cost.megapixels.pyramid, 4),
                }
                for suggestion in self.suggestions
            ],
        }

    def _examples(self) -> list["_Example"]:
        """Choose images with few, some and many chips."""
        counts = np.diff(self.table.offsets)
        with_chips = np.flatnonzero(counts)
        if not len(with_chips):
            return []
        ranked = with_chips[np.argsort(counts[with_chips], kind="stable")]
        ranks = [round(quantile * (len(ranked) - 1)) for quantile in _QUANTILES]
        return [self._example(int(ranked[rank])) for rank in dict.fromkeys(ranks)]

    def _example(self, image_index: int) -> "_Example":
        outlines = []
        for index in range(*self.table.offsets[image_index : image_index + 2].tolist()):
            chip = self.table.chip(index)
            visible = np.array([[0, 0, *chip.visible]], dtype=np.float64)
            is_negative = bool(self.table.is_negative[index])
            outlines.append(
                _Outline(level=chip.level.index, is_negative=is_negative, corners=chip.to_image(visible)[0])
            )
        record = self.dataset[image_index]
        try:
            jpeg, problem = _thumbnail(record, self.read), ""
        except ImageError as error:
            jpeg, problem = None, str(error)
        return _Example(record=record, jpeg=jpeg, problem=problem, outlines=outlines)


@dataclass(frozen=True, kw_only=True)
class _Outline:
    """The outline of a chip, xyxy, image frame."""

    level: int
    is_negative: bool
    corners: Float[np.ndarray, "4"]


@dataclass(frozen=True, kw_only=True)
class _Example:
    """An image with its chips.

    Attributes:
        record: the image and its boxes.
        jpeg: a thumbnail as base64 JPEG; None if there is no image file, or it cannot be read.
        problem: why the file cannot be read; empty if it can, or is absent.
        outlines: its chips.
    """

    record: ImageRecord
    jpeg: str | None
    problem: str
    outlines: list[_Outline]


def resize_rule(level: LevelSpec) -> str:
    """Return the resize rule of a level as text."""
    if level.factor is not None:
        return f"×{level.factor:g}"
    if level.long_side is not None:
        return f"long side {level.long_side}"
    limit = f", long at most {level.max_long_side}" if level.max_long_side else ""
    return f"short side {level.short_side}{limit}"


def _thumbnail(record: ImageRecord, read: ReadSpec) -> str | None:
    """Read an image as a base64 JPEG thumbnail; None if there is no file."""
    if not os.path.lexists(record.path):
        return None
    reader = open_record(record, read)
    most = 1 << max(max(record.width, record.height) // (2 * _THUMBNAIL_SIDE), 1).bit_length() - 1
    reduction = reader.largest_reduction(most)
    image = Image.fromarray(reader.read((0, 0, reader.width, reader.height), reduction=reduction))
    image.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    return base64.b64encode(file.getvalue()).decode()


def _to_svg(figure: Figure, *, name: str) -> str:
    file = io.StringIO()
    with rc_context({"svg.hashsalt": name}):  # deterministic ids, distinct between charts
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :]


def _hide_frame(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def _draw_pixels(cost: CostPlan) -> str:
    """Draw bars: the megapixels of the chips and of the alternatives."""
    megapixels = cost.megapixels
    names = (
        "chips of this pyramid",
        "one pass at 800 × 1333",
        f"tiles of {cost.pyramid.chip_size} px at × 1",
        "the whole image at every level",
    )
    values = (megapixels.chips, megapixels.single, megapixels.grid, megapixels.pyramid)
    figure = Figure(figsize=(8, 2.1), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(names, values, color=[PALETTE[0], _GREY, _GREY, _GREY])
    axes.bar_label(bars, labels=[f"{value:.2f}" for value in values], padding=4)
    axes.invert_yaxis()
    axes.set_xlabel("megapixels per image with boxes")
    axes.margins(x=0.1)
    _hide_frame(axes)
    return _to_svg(figure, name="pixels")


def _draw_sizes(cost: CostPlan, image_sizes: Float[np.ndarray, " n"]) -> str:
    """Draw histograms of box sizes: in the images with the valid ranges, and in the chips of each level."""
    levels = cost.pyramid.levels
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
    top.set_title("in the images (image pixels); lines: the valid range of each level", loc="left")
    _size_axis(top)
    for index, (axes, level, level_cost) in enumerate(zip(rest, levels, cost.levels, strict=True)):
        axes.axvspan(*USEFUL_SIZES, color=_BAND, zorder=0)
        axes.hist(
            level_cost.sizes,
            bins=_log_bins(min(4.0, level_cost.sizes.min(initial=4.0)), cost.pyramid.chip_size),
            color=PALETTE[index % len(PALETTE)],
        )
        axes.set_title(f"in the chips of level {index + 1}: {resize_rule(level)} (chip pixels)", loc="left")
        _size_axis(axes)
    return _to_svg(figure, name="sizes")


def _log_bins(low: float, high: float) -> Float[np.ndarray, " k"]:
    return np.geomspace(low, max(high, 2 * low), 61)


def _size_axis(axes: Axes) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda size, _: f"{size:g}")
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.set_ylabel("boxes")
    _hide_frame(axes)


def _draw_counts(cost: CostPlan) -> str:
    """Draw two histograms: chips per image, and boxes per chip."""
    figure = Figure(figsize=(8, 2.5), layout="constrained")
    pairs = (
        (cost.chips_per_image, "chips per image", "images"),
        (cost.boxes_per_chip, "boxes per chip", "chips"),
    )
    for axes, (counts, x_label, y_label) in zip(figure.subplots(1, 2), pairs, strict=True):
        most = int(counts.max(initial=1))
        step = -(-most // 60)
        axes.hist(counts, bins=np.arange(0.5, most + step + 0.5, step), color=_GREY)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        _hide_frame(axes)
    return _to_svg(figure, name="counts")
