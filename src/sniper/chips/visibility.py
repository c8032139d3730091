"""Which boxes the chips of each level show, whole or in part."""

from enum import IntEnum

import numpy as np
from jaxtyping import Int

from sniper.chips.image_boxes import ImageBoxes
from sniper.chips.table import ChipTable
from sniper.geometry.kernels import kernel, run_in_threads

_TOLERANCE = 2e-6  # level pixels; rounding errors of a box edge
_MARGIN = 1.0  # image pixels; more than rounding errors of a column


class Visibility(IntEnum):
    """How much of a box the chips of one level show.

    NONE: no chip shows any part of it.
    PARTIAL: chips show parts of it, and none shows it whole.
    WHOLE: at least one chip covers it.
    """

    NONE = 0
    PARTIAL = 1
    WHOLE = 2


_PARTIAL, _WHOLE = int(Visibility.PARTIAL), int(Visibility.WHOLE)  # numba compiles no enum


def chip_visibility(
    table: ChipTable, images: ImageBoxes
) -> tuple[Int[np.ndarray, "n l"], Int[np.ndarray, " c"]]:
    """Compute which boxes the chips show.

    Args:
        table: the chips, ordered by image.
        images: the same images with any boxes.

    Returns:
        (n, l) values of `Visibility` for each box and level; and (c,) the number of boxes that each chip shows, whole
        or in part.
    """
    resized = [level.resized(images.widths, images.heights) for level in table.levels]
    scales = np.stack([np.stack([w / images.widths, h / images.heights]) for w, h in resized])  # (l, 2, m)
    visibility = np.zeros((len(images.boxes), len(resized)), dtype=np.int8)
    num_boxes = np.zeros(len(table), dtype=np.int32)
    boxes = np.ascontiguousarray(images.boxes, dtype=np.float64)

    def fill_slice(first: int, last: int) -> None:
        _fill_visibility(
            first, last, table.offsets, table.level, table.x, table.y, table.widths, table.heights, scales,
            images.offsets, boxes, visibility, num_boxes,
        )  # fmt: skip

    run_in_threads(fill_slice, images.offsets)
    return visibility, num_boxes


@kernel
def _fill_visibility(
    first_image: int,
    last_image: int,
    chip_offsets: np.ndarray,
    levels: np.ndarray,
    lefts: np.ndarray,
    tops: np.ndarray,
    widths: np.ndarray,
    heights: np.ndarray,
    scales: np.ndarray,
    offsets: np.ndarray,
    boxes: np.ndarray,
    visibility: np.ndarray,
    num_boxes: np.ndarray,
) -> None:
    """Fill `visibility` and `num_boxes` of some images, see `chip_visibility`."""
    for image in range(first_image, last_image):
        # Boxes by their left edges, so that a chip is compared only with those near its columns.
        order = offsets[image] + np.argsort(boxes[offsets[image] : offsets[image + 1], 0])
        edges, widest = boxes[order, 0], 0.0
        for b in order:
            widest = max(widest, boxes[b, 2] - boxes[b, 0])
        for chip in range(chip_offsets[image], chip_offsets[image + 1]):
            level, width, height = levels[chip], widths[chip], heights[chip]
            scale_x, scale_y = scales[level, 0, image], scales[level, 1, image]
            near = np.searchsorted(edges, lefts[chip] / scale_x - widest - _MARGIN)
            far = np.searchsorted(edges, (lefts[chip] + width) / scale_x + _MARGIN)
            for b in order[near:far]:
                x1, x2 = boxes[b, 0] * scale_x - lefts[chip], boxes[b, 2] * scale_x - lefts[chip]
                y1, y2 = boxes[b, 1] * scale_y - tops[chip], boxes[b, 3] * scale_y - tops[chip]
                if min(x2, y2) <= 0 or x1 >= width or y1 >= height:
                    continue
                num_boxes[chip] += 1
                is_whole = (
                    min(x1, y1) >= -_TOLERANCE and x2 <= width + _TOLERANCE and y2 <= height + _TOLERANCE
                )
                visibility[b, level] = max(visibility[b, level], _WHOLE if is_whole else _PARTIAL)
