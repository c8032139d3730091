"""Negative chips: windows with many proposals that the positive chips do not cover (SNIPER §3.2)."""

from dataclasses import replace
from typing import Annotated, Literal

import numpy as np
from annotated_types import MinLen
from jaxtyping import Bool, Int
from pydantic import NonNegativeInt, PositiveInt

from sniper.chips.cover import cover_dense
from sniper.chips.image_boxes import ImageBoxes
from sniper.chips.pyramid import PyramidSpec
from sniper.chips.table import ChipTable
from sniper.chips.visibility import Visibility, chip_visibility
from sniper.specs import spec_dataclass


@spec_dataclass
class NegativeSpec:
    """Which negative chips to train on.

    Attributes:
        source: `mined` trains an RPN first and chooses negative chips from its proposals; `none` mines nothing. A chip
            table that has negative chips needs no mining.
        min_proposals: proposals that a negative chip must newly cover, for each level from the finest; the last number
            applies to all coarser levels.
        rule: which proposals the positive chips of their level exclude: those wholly inside one (`cover`, the paper's),
            or all that overlap one (`overlap`, the authors' code).
        per_image: draw at most this many negative chips of each image for an epoch.
    """

    source: Literal["none", "mined"] = "none"
    min_proposals: Annotated[tuple[PositiveInt, ...], MinLen(1)] = (26, 11)
    rule: Literal["cover", "overlap"] = "cover"
    per_image: NonNegativeInt = 2


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
    windows = cover_dense(
        pyramid,
        proposals,
        is_excluded=~is_uncovered(proposals, positives, rule=spec.rule),
        min_boxes=np.array(min_boxes, dtype=np.int64),
        generator=generator,
    )
    return replace(windows, is_negative=np.ones(len(windows), dtype=np.bool_))


def draw_negatives(
    table: ChipTable, *, per_image: int, generator: np.random.Generator
) -> Int[np.ndarray, " k"]:
    """Draw the chips of an epoch: all positive chips, and a limited number of negative chips of each image.

    Args:
        table: all chips.
        per_image: the most negative chips of an image.
        generator: draws the negative chips.

    Returns:
        (k,) indices of the chips, in the order of the table.
    """
    pool = np.flatnonzero(table.is_negative)
    pool = pool[np.lexsort((generator.random(len(pool)), table.image_indices[pool]))]
    images = table.image_indices[pool]
    first_of_image = np.searchsorted(images, images)  # (p,)
    drawn = pool[np.arange(len(pool)) - first_of_image < per_image]
    return np.sort(np.concatenate([np.flatnonzero(~table.is_negative), drawn]))
