"""What chips show: every chip held against every box of its image."""

from enum import IntEnum

import numba
import numpy as np
from jaxtyping import Int

from sniper.chips.image_boxes import ImageBoxes
from sniper.chips.table import ChipTable

_TOUCH = 2e-6  # pixels by which rounding may move an edge


class Sight(IntEnum):
    """How the chips of one level show a box: not at all, only cut, or at least one of them whole."""

    NOT = 0
    CUT = 1
    WHOLE = 2


_CUT, _WHOLE = int(Sight.CUT), int(Sight.WHOLE)  # as compiled code takes them


def look(table: ChipTable, images: ImageBoxes) -> tuple[Int[np.ndarray, "n l"], Int[np.ndarray, " c"]]:
    """Look at every chip: which boxes it shows.

    Args:
        table: the chips.
        images: the same images with any boxes.

    Returns:
        (n, l) values of `Sight`, for each box and level; and (c,) how many boxes each chip shows.
    """
    resized = [level.resized(images.widths, images.heights) for level in table.levels]
    scales = np.stack([np.stack([w / images.widths, h / images.heights]) for w, h in resized])  # (l, 2, m)
    seen = np.zeros((len(images.boxes), len(resized)), dtype=np.int8)
    shown = np.zeros(len(table), dtype=np.int32)
    _look_at_all(
        table.offsets, table.level, table.x, table.y, table.widths, table.heights, scales, images.offsets,
        np.ascontiguousarray(images.boxes, dtype=np.float64), seen, shown,
    )  # fmt: skip
    return seen, shown


@numba.njit(cache=True, parallel=True)
def _look_at_all(
    chip_offsets: np.ndarray,
    levels: np.ndarray,
    lefts: np.ndarray,
    tops: np.ndarray,
    widths: np.ndarray,
    heights: np.ndarray,
    scales: np.ndarray,
    offsets: np.ndarray,
    boxes: np.ndarray,
    seen: np.ndarray,
    shown: np.ndarray,
) -> None:
    """Fill `seen` and `shown`, see `look`."""
    for image in numba.prange(len(offsets) - 1):
        for chip in range(chip_offsets[image], chip_offsets[image + 1]):
            level = levels[chip]
            scale_x, scale_y = scales[level, 0, image], scales[level, 1, image]
            for b in range(offsets[image], offsets[image + 1]):
                x1, x2 = boxes[b, 0] * scale_x - lefts[chip], boxes[b, 2] * scale_x - lefts[chip]
                y1, y2 = boxes[b, 1] * scale_y - tops[chip], boxes[b, 3] * scale_y - tops[chip]
                width, height = widths[chip], heights[chip]
                if min(x2, y2) <= 0 or x1 >= width or y1 >= height:
                    continue
                shown[chip] += 1
                is_whole = min(x1, y1) >= -_TOUCH and x2 <= width + _TOUCH and y2 <= height + _TOUCH
                seen[b, level] = max(seen[b, level], _WHOLE if is_whole else _CUT)
