"""The page of a plan: what the chips of a data set cost and show, as one self-contained HTML file."""

import math
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int

from sniper.chips import ChipTable, PyramidSpec
from sniper.chips.pyramid import Level, LevelSpec
from sniper.chips.targets import is_learnable
from sniper.config.experiment import ExperimentSpec
from sniper.data.datasets import Dataset, ImageRecord
from sniper.data.reader import open_record
from sniper.data.spec import ReadSpec
from sniper.errors import ImageError, counted
from sniper.files import atomic_write
from sniper.geometry.boxes import size
from sniper.planning.cluster import ClusterPlan
from sniper.planning.cost import CostPlan
from sniper.planning.suggest import Suggestion
from sniper.reports.crops import Crop, Picture, read_thumbnail
from sniper.reports.page import render, resize_rule, sizes_text, write_page
from sniper.reports.palette import PALETTE
from sniper.runs.default import default_run

if TYPE_CHECKING:
    from sniper.planning.measure import Measurement

_QUANTILES = (0.1, 0.5, 0.9, 1.0)  # of chips per image: the images that are shown
_OBJECT_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)  # of the sizes at a level: the objects that are shown
_THUMBNAIL_SIDE = 900  # pixels; of the longer side
_MAX_OUTLINES = 2000  # of chips in an image; browsers are slow with more
_MAX_BARS = 40  # of a histogram
_BOX_COLOR = "#d0021b"


@dataclass(frozen=True, kw_only=True)
class PlanPage:
    """The content of the page.

    Attributes:
        dataset: the data set.
        experiment: that the plan is of.
        table: its chips, ordered by image.
        cost: the cost of these chips.
        suggestion: the pyramid that suits the data set; None if no object is to be covered.
        test_megapixels: of the whole images at the experiment's test levels, per image.
        crowded_above: a chip that shows more boxes than this is counted as crowded.
        suggested_yaml: the experiment with the suggested pyramid; empty if there is none.
        source: the data set as it was named, if `sniper train` derives the same settings from it; None if options of
            the plan decide something, so that the suggested experiment has to be trained.
        measurement: of a few training steps of the experiment, if they were measured.
        cluster: what the training takes on a cluster, if that was asked for.
    """

    dataset: Dataset
    experiment: ExperimentSpec
    table: ChipTable
    cost: CostPlan
    suggestion: Suggestion | None
    test_megapixels: float
    crowded_above: int
    suggested_yaml: str
    source: Path | None = None
    measurement: "Measurement | None" = None
    cluster: ClusterPlan | None = None

    @property
    def batch_size(self) -> int:
        """Chips in a step."""
        return self.experiment.train.batch_size

    @property
    def num_steps(self) -> int:
        """Steps in an epoch."""
        return self.cost.num_steps(self.batch_size)

    @property
    def is_suggested(self) -> bool:
        """Whether the plan is of the suggested pyramid."""
        return self.suggestion is not None and self.cost.pyramid == self.suggestion.pyramid

    @cached_property
    def classes(self) -> list["ClassFacts"]:
        """The classes and their boxes to cover, most boxes first."""
        dataset = self.dataset
        is_required = ~dataset.is_crowd & is_learnable(dataset.boxes)
        image_of_box = np.repeat(np.arange(len(dataset)), np.diff(dataset.offsets))
        sizes = size(dataset.boxes)
        facts = []
        required = np.flatnonzero(is_required)
        by_label = required[np.argsort(dataset.labels[required], kind="stable")]
        edges = np.searchsorted(dataset.labels[by_label], np.arange(len(dataset.categories) + 1))
        for label, category in enumerate(dataset.categories):
            rows = by_label[edges[label] : edges[label + 1]]
            facts.append(
                ClassFacts(
                    name=category.name,
                    num_boxes=len(rows),
                    num_images=len(np.unique(image_of_box[rows])),
                    median_size=float(np.median(sizes[rows])) if len(rows) else None,
                    share_useful=float(self.cost.is_useful[rows].mean()) if len(rows) else None,
                )
            )
        return sorted(facts, key=lambda fact: -fact.num_boxes)

    @property
    def num_crowded(self) -> int:
        """The number of chips that show more boxes than `crowded_above`."""
        return int((self.cost.boxes_per_chip > self.crowded_above).sum())

    def train_command(self, folder: Path) -> tuple[str, str]:
        """Return the command that trains as planned, and the folder of its run.

        Args:
            folder: that the plan is saved in.
        """
        if self.source is not None:
            return f"sniper train {shlex.quote(str(self.source))}", str(default_run(self.source))
        run = f"runs/{folder.name}"
        return f"sniper train {shlex.quote(str(folder / 'suggested.yaml'))} --run {shlex.quote(run)}", run

    def save(self, folder: Path) -> None:
        """Write plan.html and, if there is a suggestion, suggested.yaml; existing files are replaced atomically.

        The page needs no image file. One that is absent is left blank; one that cannot be read is reported in its
        caption.

        Args:
            folder: created if absent.
        """
        train, run = self.train_command(folder)
        html = render(
            "plan.html.j2",
            package="sniper.planning",
            page=self,
            cost=self.cost,
            name="/".join(self.dataset.path.absolute().parts[-2:]),
            train=train,
            run=shlex.quote(run),
            suggested=str(folder / "suggested.yaml"),
            level_colors=[PALETTE[index % len(PALETTE)] for index in range(len(self.cost.levels))],
            box_color=_BOX_COLOR,
            examples=self._examples(),
            objects=list(self._objects()),
            histograms=self._histograms(),
            pixel_rows=pixel_rows(self.cost),
            pyramid_rows=pyramid_rows(self),
        )
        folder.mkdir(parents=True, exist_ok=True)
        write_page(html, folder / "plan.html")
        suggested = folder / "suggested.yaml"
        if not self.suggested_yaml:
            suggested.unlink(missing_ok=True)  # of an earlier plan
            return
        with atomic_write(suggested) as file:
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
            "steps_per_epoch": self.num_steps,
            "crowded_chips": self.num_crowded,
            "classes": [
                {"name": fact.name, "boxes": fact.num_boxes, "images": fact.num_images}
                for fact in self.classes
            ],
            "suggestions": [
                {
                    "goal": row.goal,
                    "chip_size": row.pyramid.chip_size,
                    "levels": [f"{resize_rule(spec)}: {sizes_text(spec)}" for spec in row.pyramid.levels],
                    "share_useful": round(row.share_useful, 4),
                    "chips_per_image": round(row.chips_per_image, 4),
                    "megapixels_per_image": round(row.megapixels, 4),
                    "megapixels_pyramid": round(row.test_megapixels, 4),
                }
                for row in pyramid_rows(self)
                if row.goal is not None
            ],
            "reason": self.suggestion.reason if self.suggestion else None,
            **({"measured": self._measured()} if self.measurement else {}),
            **({"cluster": self.cluster.as_dict()} if self.cluster else {}),
        }

    def _measured(self) -> dict[str, Any]:
        assert self.measurement is not None
        return {
            "device": self.measurement.device,
            "seconds_per_step": round(self.measurement.seconds_per_step, 4),
            "peak_memory_gb": round(self.measurement.peak_memory / 1e9, 3),
            "minutes_per_epoch": round(self.measurement.minutes_per_epoch, 2),
            "minutes": round(self.measurement.minutes, 1),
        }

    def _histograms(self) -> list["Histogram"]:
        """Return the histograms of box sizes in the images and in the chips, and of two counts."""
        cost, useful = self.cost, self.cost.useful_sizes
        sizes = size(self.dataset.boxes[~self.dataset.is_crowd])
        in_chips = np.concatenate([level.sizes for level in cost.levels])
        return [
            Histogram.of_sizes(sizes, "Objects by size in the images", unit="image pixels"),
            Histogram.of_sizes(
                in_chips,
                "Objects by size in the chips",
                unit="chip pixels; green: detectors do well",
                band=useful,
            ),
            Histogram.of_counts(cost.chips_per_image, "Images by number of chips", unit="chips"),
            Histogram.of_counts(cost.boxes_per_chip, "Chips by number of objects", unit="objects"),
        ]

    def _objects(self) -> Iterator["_LevelObjects"]:
        """Choose objects of each level from small to large, and cut them at the scale that they are trained at."""
        dataset, read = self.dataset, self.experiment.data.read
        sizes, is_required = size(dataset.boxes), ~dataset.is_crowd & is_learnable(dataset.boxes)
        longest = np.max(dataset.boxes[:, 2:] - dataset.boxes[:, :2], axis=1, initial=0)
        image_of_box = np.repeat(np.arange(len(dataset)), np.diff(dataset.offsets))
        for index, spec in enumerate(self.cost.pyramid.levels):
            rows = np.flatnonzero(is_required & (sizes >= spec.at_least) & (sizes < spec.below))
            rows = rows[np.argsort(sizes[rows], kind="stable")]
            ranks = [round(quantile * (len(rows) - 1)) for quantile in _OBJECT_QUANTILES]
            objects = []
            for row in rows[list(dict.fromkeys(ranks))].tolist() if len(rows) else ():
                record = dataset[int(image_of_box[row])]
                level = spec.at(width=record.width, height=record.height, index=index)
                if longest[row] * level.scale <= self.cost.pyramid.chip_size:
                    label = dataset.categories[int(dataset.labels[row])].name
                    objects.append(
                        _cut_object(record, dataset.boxes[row], level=level, label=label, read=read)
                    )
            shown = [shown for shown in objects if shown is not None]
            if shown:
                yield _LevelObjects(spec=spec, index=index, objects=shown)

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
        chips = range(*self.table.offsets[image_index : image_index + 2].tolist())
        for index in chips[:: -(-len(chips) // _MAX_OUTLINES)]:
            chip = self.table.chip(index)
            visible = np.array([[0, 0, *chip.visible]], dtype=np.float64)
            is_negative = bool(self.table.is_negative[index])
            outlines.append(
                _Outline(level=chip.level.index, is_negative=is_negative, corners=chip.to_image(visible)[0])
            )
        record = self.dataset[image_index]
        try:
            picture = read_thumbnail(record, self.experiment.data.read, max_side=_THUMBNAIL_SIDE)
            problem = ""
        except ImageError as error:
            picture, problem = None, str(error)
        return _Example(
            record=record, picture=picture, problem=problem, num_chips=len(chips), outlines=outlines
        )


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
        picture: a thumbnail; None if there is no image file, or it cannot be read.
        problem: why the file cannot be read; empty if it can, or is absent.
        num_chips: its chips.
        outlines: those that are drawn.
    """

    record: ImageRecord
    picture: Picture | None
    problem: str
    num_chips: int
    outlines: list[_Outline]


@dataclass(frozen=True, kw_only=True)
class PyramidRow:
    """A pyramid in the table of pyramids to choose from; costs are per image with boxes.

    Attributes:
        name: what it is.
        goal: the share of the boxes that it must bring to a useful size; None for the experiment's.
        pyramid: its levels.
        share_useful: the share that it brings.
        chips_per_image: positive chips.
        megapixels: to train on.
        test_megapixels: to search in prediction.
    """

    name: str
    goal: float | None
    pyramid: PyramidSpec
    share_useful: float
    chips_per_image: float
    megapixels: float
    test_megapixels: float


def pyramid_rows(page: PlanPage) -> list[PyramidRow]:
    """Return the suggested pyramid, its alternatives and, if it is another, that of the experiment."""
    rows = []
    if page.suggestion is not None:
        goal = page.suggestion.goal
        rows.append(_row("suggested", goal, page.suggestion.cost, page.suggestion.cost.megapixels.pyramid))
        for other in page.suggestion.alternatives:
            name = counted(len(other.pyramid.levels), "level")
            if other.goal != goal:
                name = f"{'more' if other.goal > goal else 'fewer'} small objects: {100 * other.goal:g} %"
            rows.append(
                PyramidRow(
                    name=name,
                    goal=other.goal,
                    pyramid=other.pyramid,
                    share_useful=other.share_useful,
                    chips_per_image=other.chips_per_image,
                    megapixels=other.megapixels,
                    test_megapixels=other.test_megapixels,
                )
            )
    if not page.is_suggested:
        rows.append(_row("in the experiment", None, page.cost, page.test_megapixels))
    return rows


def _row(name: str, goal: float | None, cost: CostPlan, test_megapixels: float) -> PyramidRow:
    return PyramidRow(
        name=name,
        goal=goal,
        pyramid=cost.pyramid,
        share_useful=cost.share_useful,
        chips_per_image=cost.mean_chips_per_image,
        megapixels=cost.megapixels.chips,
        test_megapixels=test_megapixels,
    )


def pixel_rows(cost: CostPlan) -> list[tuple[str, float]]:
    """Return the megapixels per image of the chips and of the alternatives, by name."""
    return [
        ("these chips", cost.megapixels.chips),
        ("the whole image, one pass at 800×1333", cost.megapixels.single),
        (f"tiles of {cost.pyramid.chip_size} px at ×1", cost.megapixels.grid),
        ("the whole image at every level", cost.megapixels.pyramid),
    ]


@dataclass(frozen=True, kw_only=True)
class ClassFacts:
    """A class of a data set.

    Attributes:
        name: of the class.
        num_boxes: boxes to cover.
        num_images: images with such a box.
        median_size: of these boxes, image pixels; None if there are none.
        share_useful: share of these boxes at a useful size in some chip; None if there are none.
    """

    name: str
    num_boxes: int
    num_images: int
    median_size: float | None
    share_useful: float | None


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """A histogram for the page.

    Attributes:
        title: what is counted.
        unit: of the horizontal axis.
        bars: the height of each bar, 0 to 100.
        labels: the range of each bar and its count, as text.
        ticks: positions along the axis, 0 to 100, and their labels.
        band: a part of the axis to highlight, from and to, 0 to 100.
    """

    title: str
    unit: str
    bars: list[float]
    labels: list[str]
    ticks: list[tuple[float, str]]
    band: tuple[float, float] | None = None

    @classmethod
    def of_sizes(
        cls,
        sizes: Float[np.ndarray, " n"],
        title: str,
        *,
        unit: str,
        band: tuple[float, float] | None = None,
    ) -> "Histogram":
        """Count sizes in bins of equal ratio, four for each factor of 2."""
        logs = np.log2(np.maximum(sizes, 1.0))
        low, high = math.floor(logs.min(initial=4.0)), math.ceil(logs.max(initial=5.0) + 1e-9)
        counts, edges = np.histogram(logs, bins=4 * (high - low), range=(low, high))

        def position(value: float) -> float:
            return 100 * (min(max(math.log2(value), low), high) - low) / (high - low)

        return cls(
            title=title,
            unit=unit,
            bars=_heights(counts),
            labels=[
                f"{2**start:.3g} to {2**stop:.3g} px: {count:,}"
                for start, stop, count in zip(edges, edges[1:], counts.tolist(), strict=False)
            ],
            ticks=[(position(2.0**power), f"{2**power}") for power in range(low, high + 1)],
            band=(position(band[0]), position(band[1])) if band else None,
        )

    @classmethod
    def of_counts(cls, values: Int[np.ndarray, " n"], title: str, *, unit: str) -> "Histogram":
        """Count whole numbers in bins of equal width."""
        most = int(values.max(initial=1))
        step = -(-(most + 1) // _MAX_BARS)
        num_bins = -(-(most + 1) // step)
        counts = np.bincount(values // step, minlength=num_bins)
        every = -(-num_bins // 8)
        return cls(
            title=title,
            unit=unit,
            bars=_heights(counts),
            labels=[
                f"{start}{f' to {start + step - 1}' if step > 1 else ''}: {count:,}"
                for start, count in zip(range(0, num_bins * step, step), counts.tolist(), strict=True)
            ],
            ticks=[
                (100 * (index + 0.5) / num_bins, str(index * step)) for index in range(0, num_bins, every)
            ],
        )


@dataclass(frozen=True, kw_only=True)
class _Object:
    """An object as it is trained on.

    Attributes:
        picture: the crop, chip pixels.
        box: xyxy, crop pixels.
        text: class, and size in the image and in the chip.
    """

    picture: Picture
    box: list[float]
    text: str


@dataclass(frozen=True, kw_only=True)
class _LevelObjects:
    """Objects of one level, small to large."""

    spec: LevelSpec
    index: int
    objects: list[_Object]


def _cut_object(
    record: ImageRecord, box: Float[np.ndarray, "4"], *, level: Level, label: str, read: ReadSpec
) -> _Object | None:
    """Cut an object with its surroundings at the scale of a level; None if the image cannot be read."""
    crop = Crop.around(box, level, max_side=None)
    try:
        picture = crop.read(open_record(record, read))
    except ImageError:
        return None  # reported in the caption of an example image, or by `sniper check`
    before, after = size(np.stack([box, level.to_level(box[None])[0]])).tolist()
    (marked,) = crop.to_picture(box[None])
    return _Object(picture=picture, box=marked, text=f"{label}: {before:.0f} px, in the chip {after:.0f} px")


def _heights(counts: Int[np.ndarray, " k"]) -> list[float]:
    return [round(height, 1) for height in (100 * counts / max(int(counts.max(initial=1)), 1)).tolist()]
