"""Chips where proposals gather and no object is: what the detector is wrong about (SNIPER §3.2)."""

from dataclasses import replace
from typing import Annotated, Literal

import numpy as np
from annotated_types import MinLen
from jaxtyping import Bool, Int
from pydantic import NonNegativeInt, PositiveInt

from sniper.chips.cover import gather
from sniper.chips.image_boxes import ImageBoxes
from sniper.chips.pyramid import PyramidSpec
from sniper.chips.table import ChipTable
from sniper.chips.visibility import Sight, look
from sniper.specs import spec_dataclass


@spec_dataclass
class NegativeSpec:
    """Which chips without objects to learn from.

    Attributes:
        source: `mined` trains an RPN first and looks with it where it is wrong; `none` mines nothing. A chip table that
            has negative chips brings its own.
        min_proposals: proposals that a window must add, for each level from the finest; the last number holds for all
            coarser levels.
        rule: proposals that positive chips of their level have taken: those wholly inside one (`cover`, the paper's),
            or all that touch one (`overlap`, the authors' code).
        per_image: at most this many negative chips of each image are drawn for an epoch.
    """

    source: Literal["none", "mined"] = "none"
    min_proposals: Annotated[tuple[PositiveInt, ...], MinLen(1)] = (11, 26)
    rule: Literal["cover", "overlap"] = "cover"
    per_image: NonNegativeInt = 2


def leftovers(
    positives: ChipTable, proposals: ImageBoxes, *, rule: Literal["cover", "overlap"]
) -> Bool[np.ndarray, "n l"]:
    """Tell which proposals no positive chip of a level has taken.

    Args:
        positives: the positive chips.
        proposals: of the same images.
        rule: see `NegativeSpec`.

    Returns:
        (n, l) one flag for each proposal and level.
    """
    seen, _ = look(positives, proposals)
    return seen < (Sight.WHOLE if rule == "cover" else Sight.CUT)


def choose_negatives(
    positives: ChipTable,
    proposals: ImageBoxes,
    spec: NegativeSpec,
    *,
    pyramid: PyramidSpec,
    generator: np.random.Generator,
) -> ChipTable:
    """Choose the windows in which enough leftover proposals gather, at all levels, in images without objects too.

    Args:
        positives: the positive chips.
        proposals: of the same images; each counts at the levels in whose range its size lies.
        spec: how many are enough, and which are left over.
        pyramid: what the positive chips were cut from.
        generator: draws among equally good windows.
    """
    num_levels = len(pyramid.levels)
    least = (spec.min_proposals + spec.min_proposals[-1:] * num_levels)[:num_levels]
    windows = gather(
        pyramid,
        proposals,
        is_taken=~leftovers(positives, proposals, rule=spec.rule),
        least=np.array(least, dtype=np.int64),
        generator=generator,
    )
    return replace(windows, is_negative=np.ones(len(windows), dtype=np.bool_))


def draw_negatives(
    table: ChipTable, *, per_image: int, generator: np.random.Generator
) -> Int[np.ndarray, " k"]:
    """Draw the chips of an epoch: all positive ones, and at most so many negative ones of each image.

    Args:
        table: all chips.
        per_image: negative chips of an image.
        generator: draws them.

    Returns:
        (k,) indices of the chips, in the order of the table.
    """
    pool = np.flatnonzero(table.is_negative)
    pool = pool[np.lexsort((generator.random(len(pool)), table.image_indices[pool]))]
    images = table.image_indices[pool]
    first_of_image = np.searchsorted(images, images)  # (p,)
    drawn = pool[np.arange(len(pool)) - first_of_image < per_image]
    return np.sort(np.concatenate([np.flatnonzero(~table.is_negative), drawn]))
