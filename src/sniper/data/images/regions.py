"""Windows of level images, and chips among them: only the region that they show is read and resized.

The sampling grid is that of the whole image resized to its level, so a window has the pixels of the fully resized
image: to 1 grey level where the level enlarges (OpenCV, linear) and, with the same filter, where it shrinks (Pillow).
A level that shrinks by 4 or more starts from an image averaged down to at least twice the size wanted.
"""

import math
from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from sniper.chips import Chip, Level
from sniper.data.images.files import ImageReader

_FILTER = Image.Resampling.BILINEAR
_LEAST_LEFT = (
    2.0  # by how much an image read smaller is still to be shrunk, so that the filter decides, not the reader
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Region:
    """What a window of a level needs of its image.

    Attributes:
        window: xyxy, image frame, whole pixels: what must be read.
        box: xyxy inside the window, in pixels of what is read: what the window shows.
        reduction: by how much what is read is smaller than the image.
        sides: width and height of the window, level pixels.
        enlarges: whether the level has at least as many pixels as the image, in both axes.
    """

    window: tuple[int, int, int, int]
    box: tuple[float, float, float, float]
    reduction: int
    sides: tuple[int, int]
    enlarges: bool


def region_of(level: Level, window: tuple[int, int, int, int], *, largest_reduction: int = 1) -> Region:
    """Find the part of the image that a window of a level shows, with the surroundings that the filter looks at.

    Args:
        level: which level.
        window: xyxy, level frame, inside the level image.
        largest_reduction: power of two by which the image can be read smaller at the most.
    """
    ratios = (level.image_width / level.width, level.image_height / level.height)
    reduction = min(wanted_reduction(level), largest_reduction)
    starts, stops, lows, highs = [], [], [], []
    for start, stop, ratio, side in zip(
        window[:2], window[2:], ratios, (level.image_width, level.image_height), strict=True
    ):
        first, last = start * ratio, min(stop * ratio, side)
        margin = max(ratio, 1.0) + reduction  # half the filter, and what reading smaller rounds away
        low = max(math.floor((first - margin) / reduction), 0) * reduction
        high = min(math.ceil((last + margin) / reduction) * reduction, side)
        lows.append(low)
        highs.append(high)
        starts.append((first - low) / reduction)
        stops.append((last - low) / reduction)
    return Region(
        window=(lows[0], lows[1], highs[0], highs[1]),
        box=(starts[0], starts[1], stops[0], stops[1]),
        reduction=reduction,
        sides=(window[2] - window[0], window[3] - window[1]),
        enlarges=max(ratios) <= 1,
    )


def wanted_reduction(level: Level) -> int:
    """Give the largest power of two by which an image may be read smaller for a level."""
    ratio = min(level.image_width / level.width, level.image_height / level.height)
    return 1 << max(math.floor(math.log2(ratio / _LEAST_LEFT)), 0) if ratio >= _LEAST_LEFT else 1


def cut_window(
    picture: ImageReader, level: Level, window: tuple[int, int, int, int], *, reads_smaller: bool = True
) -> UInt8[np.ndarray, "m n 3"]:
    """Give the pixels of a window of a level image.

    Args:
        picture: the image.
        level: how far to resize it.
        window: xyxy, level frame, inside the level image.
        reads_smaller: whether the image may be decoded smaller for a level that shrinks it far; of no use where it is
            decoded anyway.

    Raises:
        ImageError: if the image cannot be read.
    """
    largest = picture.largest_reduction(wanted_reduction(level)) if reads_smaller else 1
    region = region_of(level, window, largest_reduction=largest)
    return _resampled(picture.read(region.window, reduction=region.reduction), region)


def cut_chip(picture: ImageReader, chip: Chip) -> UInt8[np.ndarray, "m n 3"]:
    """Give the pixels of a chip; what reaches beyond the image is black.

    Args:
        picture: the image.
        chip: where to cut.

    Raises:
        ImageError: if the image cannot be read.
    """
    return finished(read_source_pixels(picture, chip), chip)


def read_source_pixels(picture: ImageReader, chip: Chip) -> UInt8[np.ndarray, "h w 3"]:
    """Give the fewest pixels that a chip can be made of by `finished`.

    Those are the image's own where the level enlarges, and what the chip shows where it shrinks.
    """
    largest = picture.largest_reduction(wanted_reduction(chip.level))
    region = region_of(chip.level, _shown(chip), largest_reduction=largest)
    read = picture.read(region.window, reduction=region.reduction)
    return read if region.enlarges else _resampled(read, region)


def finished(essence: UInt8[np.ndarray, "h w 3"], chip: Chip) -> UInt8[np.ndarray, "m n 3"]:
    """Make a chip of what `read_source_pixels` gave."""
    region = region_of(chip.level, _shown(chip))
    shown = _resampled(essence, region) if region.enlarges else essence
    height, width = shown.shape[:2]
    if (height, width) == (chip.height, chip.width):
        return shown
    pixels = np.zeros((chip.height, chip.width, 3), dtype=np.uint8)
    pixels[:height, :width] = shown
    return pixels


def _shown(chip: Chip) -> tuple[int, int, int, int]:
    """Give the part of a chip's window that lies in its level image."""
    width, height = chip.visible
    return chip.x, chip.y, chip.x + width, chip.y + height


def _resampled(read: UInt8[np.ndarray, "h w 3"], region: Region) -> UInt8[np.ndarray, "m n 3"]:
    """Resize what was read of a region to what its window shows."""
    width, height = region.sides
    x1, y1, x2, y2 = region.box
    if not region.enlarges:
        # Rounding must not put the box over the border of what there is.
        box = (x1, y1, min(x2, read.shape[1]), min(y2, read.shape[0]))
        return np.asarray(Image.fromarray(read).resize((width, height), _FILTER, box=box))
    factor = round(width / (x2 - x1))
    if _is_near(width, factor * (x2 - x1)) and _is_near(height, factor * (y2 - y1)):
        # A whole number of pixels for each: OpenCV's resize has the same grid, in half the time.
        enlarged = cv2.resize(read, None, fx=factor, fy=factor, interpolation=cv2.INTER_LINEAR)
        left, top = round(x1 * factor), round(y1 * factor)
        return enlarged[top : top + height, left : left + width]
    step_x, step_y = (x2 - x1) / width, (y2 - y1) / height
    to_read = np.array([[step_x, 0, x1 + step_x / 2 - 0.5], [0, step_y, y1 + step_y / 2 - 0.5]])
    four = cv2.cvtColor(read, cv2.COLOR_RGB2RGBA)  # OpenCV warps four channels twice as fast as three
    warped = cv2.warpAffine(
        four,
        to_read,
        region.sides,
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_REPLICATE,
    )
    return cv2.cvtColor(warped, cv2.COLOR_RGBA2RGB)


def _is_near(one: float, other: float) -> bool:
    return abs(one - other) < 1e-6  # pixels; what floating point loses on the way
