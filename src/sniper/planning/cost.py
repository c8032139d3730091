"""What a pyramid costs on a data set, before anyone trains: chips, pixels, and what becomes of the boxes."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from sniper.chips.baselines import TileSpec, WholeSpec, num_tiles
from sniper.chips.image_boxes import ImageBoxes
from sniper.chips.pyramid import LevelSpec, PyramidSpec
from sniper.chips.table import ChipTable
from sniper.chips.visibility import Sight, look
from sniper.geometry.boxes import size

USEFUL_SIZES = (32.0, 480.0)
"""Sizes, in chip pixels, at which a detector does well: from, to (rule of thumb of the authors' code)."""

(_SINGLE_PASS,) = WholeSpec().levels


@dataclass(frozen=True, kw_only=True, eq=False)
class LevelCost:
    """What happens at one level.

    Attributes:
        num_chips: chips cut there.
        num_valid: boxes whose size lies in its range.
        num_moved_here: boxes it took over because no window of their own levels could hold them.
        num_covered: boxes it learns from, valid or moved, that at least one of its chips holds whole.
        num_cropped: boxes that its chips show, but none of them whole.
        sizes: (k,) of the covered boxes, chip pixels.
    """

    num_chips: int
    num_valid: int
    num_moved_here: int
    num_covered: int
    num_cropped: int
    sizes: Float[np.ndarray, " k"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Megapixels:
    """Pixels to compute on, in millions per image that has boxes; padding counts, since it is computed on too.

    Attributes:
        chips: of the positive chips.
        single: of one pass over the whole image, short side 800, long side at most 1333.
        pyramid: of the whole image at each level.
        grid: of tiles as large as a chip at the scale of the image, overlapping by a fifth.
    """

    chips: float
    single: float
    pyramid: float
    grid: float

    @property
    def ratio_800x1333(self) -> float:
        """The chips' pixels over those of a single pass; 0 if there are none."""
        return self.chips / self.single if self.single else 0.0


@dataclass(frozen=True, kw_only=True, eq=False)
class CostPlan:
    """What the chips of a data set cost, and what they show.

    Attributes:
        pyramid: what they are cut from.
        num_images: in the data set.
        num_pooled: negative chips there are to draw from.
        num_negatives: of these, drawn for an epoch.
        num_images_with_boxes: those with a box to be covered.
        num_boxes: of all kinds.
        num_wanted: boxes to be covered: no crowds, none under 1 px a side.
        num_uncovered: of these, the boxes that no chip holds whole.
        share_useful: of these, the share that some chip holds at a useful size and learns from; 1 if there are none.
        levels: finest first.
        megapixels: of the chips and of other ways.
        chips_per_image: (i,) for the images that have boxes.
        boxes_per_chip: (c,) boxes of any kind that each chip shows, whole or cut.
    """

    pyramid: PyramidSpec
    num_images: int
    num_pooled: int
    num_negatives: int
    num_images_with_boxes: int
    num_boxes: int
    num_wanted: int
    num_uncovered: int
    share_useful: float
    levels: tuple[LevelCost, ...]
    megapixels: Megapixels
    chips_per_image: Int[np.ndarray, " i"]
    boxes_per_chip: Int[np.ndarray, " c"]

    @property
    def num_chips(self) -> int:
        """All positive chips."""
        return len(self.boxes_per_chip)

    @property
    def num_moved(self) -> int:
        """The boxes that some coarser level took over."""
        return sum(level.num_moved_here for level in self.levels)

    @cached_property
    def mean_chips_per_image(self) -> float:
        """Chips per image that has boxes; 0 if none has."""
        return float(self.chips_per_image.mean()) if len(self.chips_per_image) else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Give the figures under the names that the command line answers with."""
        return {
            "num_images": self.num_images,
            "num_images_with_boxes": self.num_images_with_boxes,
            "num_boxes": self.num_boxes,
            "boxes_to_cover": self.num_wanted,
            "uncovered_boxes": self.num_uncovered,
            "moved_boxes": self.num_moved,
            "num_chips": self.num_chips,
            "negative_chips_pool": self.num_pooled,
            "negative_chips_per_epoch": self.num_negatives,
            "chips_per_image": round(self.mean_chips_per_image, 4),
            "chips_per_level": [level.num_chips for level in self.levels],
            "megapixels_per_image": round(self.megapixels.chips, 4),
            "pixel_ratio_800x1333": round(self.megapixels.ratio_800x1333, 4),
        }

    def num_steps(self, batch_size: int) -> int:
        """Count the steps of an epoch, for batches of this many chips, negative ones included."""
        return -(-(self.num_chips + self.num_negatives) // batch_size)


def measure(
    table: ChipTable, images: ImageBoxes, *, pyramid: PyramidSpec, negatives_per_image: int = 0
) -> CostPlan:
    """Tell what the chips of a data set cost, by looking at each chip and each box.

    Args:
        table: the chips.
        images: what they were chosen for.
        pyramid: what they are cut from.
        negatives_per_image: at most this many negative chips of each image are drawn for an epoch. What is told of
            chips otherwise is of the positive ones.

    Example:
        >>> from sniper.chips.cover import cover
        >>> images = ImageBoxes(
        ...     widths=np.array([640]),
        ...     heights=np.array([480]),
        ...     offsets=np.array([0, 1]),
        ...     boxes=np.array([[10.0, 10.0, 40.0, 40.0]]),
        ...     is_wanted=np.array([True]),
        ... )
        >>> table = cover(PyramidSpec(), images, generator=np.random.default_rng(0))
        >>> measure(table, images, pyramid=PyramidSpec()).num_chips
        1
    """
    pool = np.bincount(table.image_indices[table.is_negative], minlength=len(images))
    table = table.select(np.flatnonzero(~table.is_negative))
    seen, boxes_per_chip = look(table, images)
    is_valid, sizes = learnt_sizes(pyramid, images, np.full(len(images.boxes), -1))
    is_learnt, _ = learnt_sizes(pyramid, images, table.moved_to)
    is_whole, is_wanted = seen == Sight.WHOLE, images.is_wanted
    levels = tuple(
        LevelCost(
            num_chips=int(table.chips_per_level[index]),
            num_valid=int(is_valid[:, index].sum()),
            num_moved_here=int((table.moved_to == index).sum()),
            num_covered=int((is_learnt & is_whole)[:, index].sum()),
            num_cropped=int(((seen[:, index] == Sight.CUT) & is_wanted).sum()),
            sizes=sizes[(is_learnt & is_whole)[:, index], index],
        )
        for index in range(len(pyramid.levels))
    )
    has_boxes = images.has_wanted
    return CostPlan(
        pyramid=pyramid,
        num_images=len(images),
        num_pooled=int(pool.sum()),
        num_negatives=int(np.minimum(pool, negatives_per_image).sum()),
        num_images_with_boxes=int(has_boxes.sum()),
        num_boxes=len(images.boxes),
        num_wanted=int(is_wanted.sum()),
        num_uncovered=int((is_wanted & ~is_whole.any(axis=1)).sum()),
        share_useful=share_useful(is_learnt & is_whole, sizes, is_wanted),
        levels=levels,
        megapixels=_megapixels(pyramid, images.select(np.flatnonzero(has_boxes)), num_chips=len(table)),
        chips_per_image=np.diff(table.offsets)[has_boxes],
        boxes_per_chip=boxes_per_chip,
    )


def learnt_sizes(
    pyramid: PyramidSpec, images: ImageBoxes, moved_to: Int[np.ndarray, " n"]
) -> tuple[Bool[np.ndarray, "n l"], Float[np.ndarray, "n l"]]:
    """Tell which boxes each level learns from, and how large they are there.

    Args:
        pyramid: the levels.
        images: with their boxes.
        moved_to: (n,) the level that each box moved to; -1 for those that stayed.

    Returns:
        (n, l) whether a level learns from a box to be covered: one that moved, where it moved to alone; and (n, l) its
        size, level pixels.
    """
    image_sizes = size(images.boxes)
    scales = scales_of(pyramid, images)[:, images.image_of_box]  # (l, n)
    levels = range(len(pyramid.levels))
    has_stayed = moved_to < 0
    is_learnt = [
        (pyramid.levels[index].valid_range.contains(images.boxes) & has_stayed) | (moved_to == index)
        for index in levels
    ]
    return np.stack(is_learnt, axis=1) & images.is_wanted[:, None], (scales * image_sizes).T


def scales_of(pyramid: PyramidSpec, images: ImageBoxes) -> Float[np.ndarray, "l m"]:
    """Give the factor from box sizes in each image to those at each level."""
    sides = images.widths * images.heights.astype(np.float64)
    resized = [level.resized(images.widths, images.heights) for level in pyramid.levels]
    return np.stack([np.sqrt(widths.astype(np.float64) * heights / sides) for widths, heights in resized])


def share_useful(
    is_learnt: Bool[np.ndarray, "n l"], sizes: Float[np.ndarray, "n l"], is_wanted: Bool[np.ndarray, " n"]
) -> float:
    """Give the share of the wanted boxes that some level learns from at a useful size; 1 if none is wanted."""
    is_useful = (sizes >= USEFUL_SIZES[0]) & (sizes <= USEFUL_SIZES[1]) & is_learnt
    return float(is_useful.any(axis=1)[is_wanted].mean()) if is_wanted.any() else 1.0


def chips_megapixels(pyramid: PyramidSpec, num_chips: int) -> float:
    """Give the pixels of this many chips, in millions."""
    return num_chips * pyramid.chip_size**2 / 1e6


def levels_megapixels(levels: Sequence[LevelSpec], images: ImageBoxes) -> float:
    """Give the pixels of the whole images at all levels, in millions."""
    return sum(_level_megapixels(level, images) for level in levels)


def _level_megapixels(level: LevelSpec, images: ImageBoxes) -> float:
    widths, heights = level.resized(images.widths, images.heights)
    return float((widths.astype(np.float64) * heights).sum()) / 1e6


def _megapixels(pyramid: PyramidSpec, images: ImageBoxes, *, num_chips: int) -> Megapixels:
    count = max(len(images), 1)
    num_grid = int(num_tiles(TileSpec(side=pyramid.chip_size), images).sum())
    return Megapixels(
        chips=chips_megapixels(pyramid, num_chips) / count,
        single=_level_megapixels(_SINGLE_PASS, images) / count,
        pyramid=levels_megapixels(pyramid.levels, images) / count,
        grid=chips_megapixels(pyramid, num_grid) / count,
    )
