"""The cost of a pyramid on a data set before training: chips, pixels, and the sizes of the boxes in the chips."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from sniper.chips.baselines import TileSpec, WholeSpec, num_tiles
from sniper.chips.image_boxes import ImageBoxes
from sniper.chips.negatives import NegativeSpec, draw_negatives
from sniper.chips.pyramid import LevelSpec, PyramidSpec
from sniper.chips.table import ChipTable
from sniper.chips.visibility import Visibility, chip_visibility
from sniper.geometry.boxes import size

USEFUL_SIZES: Mapping[str, tuple[float, float]] = {"fpn": (16.0, 480.0), "concat": (32.0, 480.0)}
"""The sizes in chip pixels, from and to, at which detectors do well, by their neck.

With one feature map at stride 16 they are a rule of thumb of the authors' code. The lower one with a feature pyramid is
measured (`docs/benchmarks.md`).
"""

(_SINGLE_PASS,) = WholeSpec().levels


@dataclass(frozen=True, kw_only=True, eq=False)
class LevelCost:
    """The chips and boxes of one level.

    Attributes:
        num_chips: positive chips of the level.
        num_valid: required boxes whose size is in the level's range.
        num_moved_here: boxes that moved here because no window of their own levels can contain them.
        num_covered: boxes that the level learns from, valid or moved, and that at least one of its chips covers.
        num_cropped: required boxes that its chips show only in part.
        sizes: (k,) sizes of the covered boxes, chip pixels.
    """

    num_chips: int
    num_valid: int
    num_moved_here: int
    num_covered: int
    num_cropped: int
    sizes: Float[np.ndarray, " k"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Megapixels:
    """Pixels that a network processes, padding included, in millions per image with boxes.

    Attributes:
        chips: the positive chips.
        single: one pass over the whole image, short side 800, long side at most 1333.
        pyramid: the whole image at each level.
        grid: tiles as large as a chip at the scale of the image, overlapping by a fifth.
    """

    chips: float
    single: float
    pyramid: float
    grid: float

    @property
    def ratio_800x1333(self) -> float:
        """The pixels of the chips divided by those of a single pass; 0 if there are none."""
        return self.chips / self.single if self.single else 0.0


@dataclass(frozen=True, kw_only=True, eq=False)
class CostPlan:
    """What the chips of a data set cost, and what they show.

    Attributes:
        pyramid: the pyramid that the chips are cut from.
        num_images: images in the data set.
        num_images_with_boxes: images with a required box.
        num_boxes: all boxes.
        num_required: boxes to cover: no crowds, and no boxes under 1 px a side.
        num_uncovered: required boxes that no chip covers.
        useful_sizes: the sizes, from and to, that count as useful, chip pixels.
        is_useful: (n,) required boxes that have a useful size in a chip of a level that learns from them.
        num_negatives: negative chips to draw from.
        num_negatives_per_epoch: negative chips drawn for an epoch.
        levels: the levels, finest first.
        megapixels: of the chips and of the alternatives.
        chips_per_image: (i,) positive chips of each image with boxes.
        boxes_per_chip: (c,) boxes of any kind that each positive chip shows, whole or in part.
    """

    pyramid: PyramidSpec
    num_images: int
    num_images_with_boxes: int
    num_boxes: int
    num_required: int
    num_uncovered: int
    useful_sizes: tuple[float, float]
    is_useful: Bool[np.ndarray, " n"]
    num_negatives: int
    num_negatives_per_epoch: int
    levels: tuple[LevelCost, ...]
    megapixels: Megapixels
    chips_per_image: Int[np.ndarray, " i"]
    boxes_per_chip: Int[np.ndarray, " c"]

    @property
    def num_chips(self) -> int:
        """The number of positive chips."""
        return len(self.boxes_per_chip)

    @property
    def num_moved(self) -> int:
        """The number of boxes that moved to a coarser level."""
        return sum(level.num_moved_here for level in self.levels)

    @property
    def share_useful(self) -> float:
        """The share of the required boxes that have a useful size in some chip; 1 if there are none."""
        return int(self.is_useful.sum()) / self.num_required if self.num_required else 1.0

    @cached_property
    def mean_chips_per_image(self) -> float:
        """Positive chips per image with boxes; 0 if there are none."""
        return float(self.chips_per_image.mean()) if len(self.chips_per_image) else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as plain data, under the keys of the command line."""
        return {
            "num_images": self.num_images,
            "num_images_with_boxes": self.num_images_with_boxes,
            "num_boxes": self.num_boxes,
            "boxes_to_cover": self.num_required,
            "uncovered_boxes": self.num_uncovered,
            "moved_boxes": self.num_moved,
            "num_chips": self.num_chips,
            "negative_chips_pool": self.num_negatives,
            "negative_chips_per_epoch": self.num_negatives_per_epoch,
            "chips_per_image": round(self.mean_chips_per_image, 4),
            "chips_per_level": [level.num_chips for level in self.levels],
            "megapixels_per_image": round(self.megapixels.chips, 4),
            "pixel_ratio_800x1333": round(self.megapixels.ratio_800x1333, 4),
        }

    def num_steps(self, batch_size: int) -> int:
        """Count the steps of an epoch in batches of `batch_size` chips, negative chips included."""
        return -(-(self.num_chips + self.num_negatives_per_epoch) // batch_size)


def compute_cost(
    table: ChipTable,
    images: ImageBoxes,
    *,
    pyramid: PyramidSpec,
    negatives: NegativeSpec = NegativeSpec(),
    useful_sizes: tuple[float, float] = USEFUL_SIZES["fpn"],
) -> CostPlan:
    """Compute what the chips of a data set cost, from every chip and every box.

    Args:
        table: the chips, ordered by image. Except for the numbers of negative chips, only positive chips count.
        images: the images and boxes that the chips were chosen for.
        pyramid: the pyramid that the chips are cut from.
        negatives: how many of the negative chips are drawn for an epoch.
        useful_sizes: the sizes, from and to, that count as useful, chip pixels.

    Example:
        >>> from sniper.chips.cover import cover
        >>> images = ImageBoxes(
        ...     widths=np.array([640]),
        ...     heights=np.array([480]),
        ...     offsets=np.array([0, 1]),
        ...     boxes=np.array([[10.0, 10.0, 40.0, 40.0]]),
        ...     is_required=np.array([True]),
        ... )
        >>> table = cover(PyramidSpec(), images, generator=np.random.default_rng(0))
        >>> compute_cost(table, images, pyramid=PyramidSpec()).num_chips
        1
    """
    num_negatives = int(table.is_negative.sum())
    drawn = draw_negatives(
        table,
        per_image=negatives.per_image,
        dose=negatives.first_dose,
        generator=np.random.default_rng(0),
    )
    num_drawn = len(drawn) - (len(table) - num_negatives)
    table = table.select(np.flatnonzero(~table.is_negative))
    visibility, boxes_per_chip = chip_visibility(table, images)
    is_whole, is_required = visibility == Visibility.WHOLE, images.is_required
    is_partial = (visibility == Visibility.PARTIAL) & is_required[:, None]
    is_valid, sizes = _learned_boxes(pyramid, images, np.full(len(images.boxes), -1))
    is_learned, _ = _learned_boxes(pyramid, images, table.moved_to)
    is_covered = is_learned & is_whole  # (n, l)
    levels = tuple(
        LevelCost(
            num_chips=int(table.chips_per_level[index]),
            num_valid=int(is_valid[:, index].sum()),
            num_moved_here=int((table.moved_to == index).sum()),
            num_covered=int(is_covered[:, index].sum()),
            num_cropped=int(is_partial[:, index].sum()),
            sizes=sizes[is_covered[:, index], index],
        )
        for index in range(len(pyramid.levels))
    )
    has_boxes = images.has_required
    return CostPlan(
        pyramid=pyramid,
        num_images=len(images),
        num_images_with_boxes=int(has_boxes.sum()),
        num_boxes=len(images.boxes),
        num_required=int(is_required.sum()),
        num_uncovered=int((is_required & ~is_whole.any(axis=1)).sum()),
        useful_sizes=useful_sizes,
        is_useful=((sizes >= useful_sizes[0]) & (sizes <= useful_sizes[1]) & is_covered).any(axis=1),
        num_negatives=num_negatives,
        num_negatives_per_epoch=num_drawn,
        levels=levels,
        megapixels=_megapixels(pyramid, images.select(np.flatnonzero(has_boxes)), num_chips=len(table)),
        chips_per_image=np.diff(table.offsets)[has_boxes],
        boxes_per_chip=boxes_per_chip,
    )


def _learned_boxes(
    pyramid: PyramidSpec, images: ImageBoxes, moved_to: Int[np.ndarray, " n"]
) -> tuple[Bool[np.ndarray, "n l"], Float[np.ndarray, "n l"]]:
    """Compute which boxes each level learns from, and their sizes there.

    Args:
        pyramid: the levels.
        images: the images and their boxes.
        moved_to: (n,) the level that each box moved to; -1 for boxes that did not move.

    Returns:
        (n, l) whether a level learns from a required box: if its size is valid there or, for a box that moved, only
        where it moved to; and (n, l) sizes, level pixels.
    """
    image_sizes = size(images.boxes)
    scales = _level_scales(pyramid, images)[:, images.image_of_box]  # (l, n)
    has_moved = moved_to >= 0
    is_learned = [
        (level.valid_range.contains(images.boxes) & ~has_moved) | (moved_to == index)
        for index, level in enumerate(pyramid.levels)
    ]
    return np.stack(is_learned, axis=1) & images.is_required[:, None], (scales * image_sizes).T


def chips_megapixels(pyramid: PyramidSpec, num_chips: int) -> float:
    """Compute the pixels of some chips, in millions."""
    return num_chips * pyramid.chip_size**2 / 1e6


def levels_megapixels(levels: Sequence[LevelSpec], images: ImageBoxes) -> float:
    """Compute the pixels of the whole images at all levels, in millions."""
    return sum(_level_megapixels(level, images) for level in levels)


def _level_megapixels(level: LevelSpec, images: ImageBoxes) -> float:
    widths, heights = level.resized(images.widths, images.heights)
    return float((widths.astype(np.float64) * heights).sum()) / 1e6


def _level_scales(pyramid: PyramidSpec, images: ImageBoxes) -> Float[np.ndarray, "l m"]:
    """Compute the factor from box sizes in each image to those at each level."""
    areas = images.widths * images.heights.astype(np.float64)
    resized = [level.resized(images.widths, images.heights) for level in pyramid.levels]
    return np.stack([np.sqrt(widths.astype(np.float64) * heights / areas) for widths, heights in resized])


def _megapixels(pyramid: PyramidSpec, images: ImageBoxes, *, num_chips: int) -> Megapixels:
    count = max(len(images), 1)
    num_grid = int(num_tiles(TileSpec(side=pyramid.chip_size), images).sum())
    return Megapixels(
        chips=chips_megapixels(pyramid, num_chips) / count,
        single=_level_megapixels(_SINGLE_PASS, images) / count,
        pyramid=levels_megapixels(pyramid.levels, images) / count,
        grid=chips_megapixels(pyramid, num_grid) / count,
    )
