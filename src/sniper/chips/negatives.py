"""Negative chips: windows with false alarms of the detector, or with many proposals of an RPN (SNIPER §3.3)."""

from dataclasses import replace
from typing import Annotated, Literal

import numpy as np
from annotated_types import Ge, Le, MinLen
from jaxtyping import Bool, Float, Int
from pydantic import NonNegativeInt, PositiveInt

from sniper.chips.cover import cover_dense
from sniper.chips.image_boxes import ImageBoxes, ScoredBoxes
from sniper.chips.pyramid import PyramidSpec
from sniper.chips.table import ChipTable
from sniper.chips.visibility import Visibility, chip_visibility
from sniper.specs import Fraction, spec_dataclass

MAX_DOSE = 0.5
"""The most negative chips of an epoch with the dose `auto`, as a share of the positive chips."""
_DRAWN_PER_CHIP, _MAX_DRAWS = 4, 8  # windows drawn for each that is wanted, and times that they are
_FULL_DOSE_RATIO = (
    0.25  # of the classification losses of negative and positive chips, from which the dose is the largest
)


@spec_dataclass
class NegativeSpec:
    """Which negative chips to train on, in addition to all positive chips.

    Attributes:
        source: `self` searches the training images with the detector while it is trained, and cuts chips around its
            false alarms; `rpn` trains an RPN first, and cuts them where its proposals are dense (the paper's way);
            `none` mines nothing. A chip table that has negative chips needs no mining.
        dose: the most negative chips of an epoch, as a share of the positive chips. With `auto` it is a half, and falls
            when the classification loss of the negative chips is less than a quarter of that of the positive ones.
            null does not limit it.
        per_image: the most negative chips of an image in an epoch; null does not limit it.
        place_positives: with `self`, choose positive chips with many false alarms among equally good ones; they are
            not more.
        min_score: score from which a false alarm or a proposal counts.
        min_proposals: with `rpn`, proposals that a negative chip must newly cover, for each level from the finest; the
            last number applies to all coarser levels.
        rule: which false alarms and proposals the positive chips of their level exclude: those wholly inside one
            (`cover`, the paper's), or all that overlap one (`overlap`, the authors' code).
    """

    source: Literal["none", "self", "rpn"] = "none"
    dose: Literal["auto"] | Annotated[float, Ge(0), Le(10)] | None = "auto"
    per_image: NonNegativeInt | None = None
    place_positives: bool = True
    min_score: Fraction = 0.05
    min_proposals: Annotated[tuple[PositiveInt, ...], MinLen(1)] = (26, 11)
    rule: Literal["cover", "overlap"] = "cover"

    @property
    def first_dose(self) -> float | None:
        """The dose of the first epoch with negative chips, before their losses are known."""
        return MAX_DOSE if self.dose == "auto" else self.dose


def auto_dose(negative_loss: float, positive_loss: float) -> float:
    """Return the dose of an epoch from the mean classification losses of the chips of the epoch before.

    Example:
        >>> [auto_dose(loss, 0.4) for loss in (0.0, 0.05, 0.1, 0.8)]
        [0.0, 0.25, 0.5, 0.5]
    """
    if positive_loss <= 0:
        return 0.0
    return MAX_DOSE * min(negative_loss / positive_loss / _FULL_DOSE_RATIO, 1.0)


def is_uncovered(
    proposals: ImageBoxes, positives: ChipTable, *, rule: Literal["cover", "overlap"]
) -> Bool[np.ndarray, "n l"]:
    """Check which proposals the positive chips of each level do not exclude.

    Args:
        proposals: the proposals.
        positives: the positive chips of the same images, ordered by image.
        rule: see `NegativeSpec`.

    Returns:
        (n, l) one flag for each proposal and level.
    """
    visibility, _ = chip_visibility(positives, proposals)
    return visibility < (Visibility.WHOLE if rule == "cover" else Visibility.PARTIAL)


def choose_negatives(
    positives: ChipTable,
    proposals: ImageBoxes,
    spec: NegativeSpec,
    *,
    pyramid: PyramidSpec,
    generator: np.random.Generator,
) -> ChipTable:
    """Choose the windows with enough uncovered proposals, at all levels; also in images without objects.

    Args:
        positives: the positive chips, ordered by image.
        proposals: of the same images; each counts at the levels in whose range its size is.
        spec: how many are enough, and which count as uncovered.
        pyramid: the pyramid that the positive chips are cut from.
        generator: breaks ties.

    Returns:
        The negative chips, ordered by image.
    """
    num_levels = len(pyramid.levels)
    min_boxes = (spec.min_proposals + spec.min_proposals[-1:] * num_levels)[:num_levels]
    windows, _ = cover_dense(
        pyramid,
        proposals,
        is_excluded=~is_uncovered(proposals, positives, rule=spec.rule),
        min_boxes=np.array(min_boxes, dtype=np.int64),
        generator=generator,
    )
    return replace(windows, is_negative=np.ones(len(windows), dtype=np.bool_))


def choose_on_alarms(
    positives: ChipTable,
    alarms: ScoredBoxes,
    spec: NegativeSpec,
    *,
    pyramid: PyramidSpec,
    generator: np.random.Generator,
) -> tuple[ChipTable, Float[np.ndarray, " c"]]:
    """Choose windows that cover the false alarms which the positive chips do not exclude, as few as `cover` would.

    Args:
        positives: the positive chips, ordered by image.
        alarms: of the same images; each counts at the levels in whose range its size is.
        spec: which false alarms the positive chips exclude.
        pyramid: the pyramid that the positive chips are cut from.
        generator: breaks ties.

    Returns:
        The negative chips, ordered by image, and the mass of each: the sum of the scores of the false alarms that it
        covers and earlier ones do not.
    """
    windows, masses = cover_dense(
        pyramid,
        alarms.images,
        is_excluded=~is_uncovered(alarms.images, positives, rule=spec.rule),
        min_boxes=np.ones(len(pyramid.levels), dtype=np.int64),
        generator=generator,
        scores=alarms.scores,
    )
    return replace(windows, is_negative=np.ones(len(windows), dtype=np.bool_)), masses


def choose_background(
    positives: ChipTable,
    images: ImageBoxes,
    *,
    pyramid: PyramidSpec,
    count: int,
    generator: np.random.Generator,
) -> ChipTable:
    """Choose windows at random that show no box, not even in part, where no detector has found false alarms.

    Levels are drawn in proportion to the positive chips of each, images in proportion to their area, and places
    uniformly. No window is drawn twice.

    Args:
        positives: the positive chips, ordered by image.
        images: the same images with all their boxes, crowds and regions to ignore included.
        pyramid: the pyramid that the positive chips are cut from.
        count: number of windows; there are fewer where not so many of those that are drawn show no box.
        generator: draws.

    Returns:
        The negative chips, ordered by image.
    """
    chosen = positives.select(np.zeros(0, dtype=np.int64))
    shares = positives.chips_per_level / max(len(positives), 1)
    if not len(images) or not len(positives):
        return chosen
    for _ in range(_MAX_DRAWS):
        missing = count - len(chosen)
        if missing <= 0:
            break
        levels = generator.choice(len(shares), size=_DRAWN_PER_CHIP * missing, p=shares)
        drawn = _draw_windows(levels, images, pyramid, like=positives, generator=generator)
        _, num_boxes = chip_visibility(drawn, images)
        merged = chosen.merge(drawn.select(np.flatnonzero(num_boxes == 0)))
        columns = np.stack([merged.image_indices, merged.level, merged.x, merged.y])  # (4, c)
        _, first = np.unique(columns, axis=1, return_index=True)
        kept = generator.permutation(first)[:count]
        chosen = merged.select(np.sort(kept))
    return chosen


def _draw_windows(
    levels: Int[np.ndarray, " k"],
    images: ImageBoxes,
    pyramid: PyramidSpec,
    *,
    like: ChipTable,
    generator: np.random.Generator,
) -> ChipTable:
    """Draw a window at each of some levels; the table is ordered by image."""
    side = pyramid.chip_size
    areas = images.widths * images.heights.astype(np.float64)
    image_indices = np.sort(generator.choice(len(images), size=len(levels), p=areas / areas.sum()))
    sides = np.array([level.resized(images.widths, images.heights) for level in pyramid.levels])  # (l, 2, m)
    last = np.maximum(sides[levels, :, image_indices] - side, 0)  # (k, 2)
    x, y = np.floor(generator.random((len(levels), 2)) * (last + 1)).astype(np.int64).T
    return replace(
        like,
        image_indices=image_indices,
        level=levels,
        x=x,
        y=y,
        widths=np.full(len(levels), side),
        heights=np.full(len(levels), side),
        is_negative=np.ones(len(levels), dtype=np.bool_),
    )


def draw_negatives(
    table: ChipTable,
    *,
    per_image: int | None,
    generator: np.random.Generator,
    dose: float | None = None,
    masses: Float[np.ndarray, " c"] | None = None,
) -> Int[np.ndarray, " k"]:
    """Draw the chips of an epoch: all positive chips, and a limited number of negative chips.

    Args:
        table: all chips.
        per_image: the most negative chips of an image; None does not limit it.
        generator: draws the negative chips.
        dose: the most negative chips as a share of the positive chips; None does not limit it.
        masses: (c,) of the negative chips. A chip is drawn with a probability in proportion to its mass,
            without replacement (Efraimidis & Spirakis 2006); by default all have the same.

    Returns:
        (k,) indices of the chips, in the order of the table.
    """
    pool = np.flatnonzero(table.is_negative)
    times = -np.log1p(-generator.random(len(pool)))  # exponential; the first ones are drawn
    if masses is not None:
        times /= np.maximum(masses[pool], np.finfo(np.float64).tiny)
    order = np.lexsort((times, table.image_indices[pool]))
    pool, times = pool[order], times[order]
    if per_image is not None:
        images = table.image_indices[pool]
        first_of_image = np.searchsorted(images, images)  # (p,)
        is_kept = np.arange(len(pool)) - first_of_image < per_image
        pool, times = pool[is_kept], times[is_kept]
    positives = np.flatnonzero(~table.is_negative)
    if dose is not None:
        pool = pool[np.argsort(times, kind="stable")[: int(dose * len(positives))]]
    return np.sort(np.concatenate([positives, pool]))
