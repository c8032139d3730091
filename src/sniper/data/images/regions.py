"""Cut windows of level images, chips among them, decoding and resizing only the region that each shows.

Windows are sampled on the grid of the whole image resized to its level, so their pixels equal those of the fully
resized image: within 1 grey level where the level enlarges (OpenCV, linear), and with the same filter where it shrinks
(Pillow). A level that shrinks by 4 or more starts from an image reduced by averaging, which is still at least twice the
size of the level.
"""

import math
from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from sniper.chips import Chip, Level
from sniper.data.images.files import ImageReader
from sniper.geometry.boxes import Sides

_FILTER = Image.Resampling.BILINEAR
_MIN_SHRINK = (
    2.0  # factor left to the resize filter after a reduced decode, so that the filter determines the result
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Region:
    """The part of an image that a window of a level is computed from.

    Attributes:
        window: xyxy, image frame, whole pixels: the pixels to read, with a margin for the filter.
        box: xyxy inside `window`, in pixels as read: the part that the level's window shows.
        reduction: factor by which the pixels as read are smaller than the image.
        sides: of the level's window, level pixels.
        is_enlarged: whether the level has at least as many pixels as the image along both axes.
    """

    window: tuple[int, int, int, int]
    box: tuple[float, float, float, float]
    reduction: int
    sides: Sides
    is_enlarged: bool


def region_of(level: Level, window: tuple[int, int, int, int], *, largest_reduction: int = 1) -> Region:
    """Compute the part of the image that a window of a level shows, with a margin for the filter.

    Args:
        level: of the image.
        window: xyxy, level frame, inside the level image.
        largest_reduction: largest power of two by which the image can be read smaller.
    """
    ratios = (level.image_width / level.width, level.image_height / level.height)
    reduction = min(useful_reduction(level), largest_reduction)
    starts, stops, lows, highs = [], [], [], []
    for start, stop, ratio, side in zip(
        window[:2], window[2:], ratios, (level.image_width, level.image_height), strict=True
    ):
        first, last = start * ratio, min(stop * ratio, side)
        margin = max(ratio, 1.0) + reduction  # half the filter, and the rounding to reduced pixels
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
        sides=Sides(window[2] - window[0], window[3] - window[1]),
        is_enlarged=max(ratios) <= 1,
    )


def useful_reduction(level: Level) -> int:
    """Return the largest power of two by which an image may be read smaller for a level."""
    ratio = min(level.image_width / level.width, level.image_height / level.height)
    return 1 << max(math.floor(math.log2(ratio / _MIN_SHRINK)), 0) if ratio >= _MIN_SHRINK else 1


def cut_window(
    image: ImageReader,
    level: Level,
    window: tuple[int, int, int, int],
    *,
    largest_reduction: int | None = None,
) -> UInt8[np.ndarray, "m n 3"]:
    """Cut a window out of a level image.

    Args:
        image: to read from.
        level: how far to resize it.
        window: xyxy, level frame, inside the level image.
        largest_reduction: largest power of two by which the image is decoded smaller for a level that shrinks it far;
            None for all that it can be. Windows of several levels share one decode if it is the same for all.

    Raises:
        ImageError: if the image cannot be read.
    """
    if largest_reduction is None:
        largest_reduction = image.largest_reduction(useful_reduction(level))
    region = region_of(level, window, largest_reduction=largest_reduction)
    return _resample(image.read(region.window, reduction=region.reduction), region)


def cut_chip(image: ImageReader, chip: Chip) -> UInt8[np.ndarray, "m n 3"]:
    """Cut a chip out of an image; padding is black.

    Raises:
        ImageError: if the image cannot be read.
    """
    return render_chip(read_source_pixels(image, chip), chip)


def read_source_pixels(image: ImageReader, chip: Chip) -> UInt8[np.ndarray, "h w 3"]:
    """Read the fewest pixels that `render_chip` can make a chip from.

    These are the image's own pixels where the level enlarges, and the resized ones where it shrinks.

    Raises:
        ImageError: if the image cannot be read.
    """
    largest = image.largest_reduction(useful_reduction(chip.level))
    region = region_of(chip.level, _visible_window(chip), largest_reduction=largest)
    pixels = image.read(region.window, reduction=region.reduction)
    return pixels if region.is_enlarged else _resample(pixels, region)


def render_chip(source_pixels: UInt8[np.ndarray, "h w 3"], chip: Chip) -> UInt8[np.ndarray, "m n 3"]:
    """Make a chip from the pixels that `read_source_pixels` returns for it."""
    region = region_of(chip.level, _visible_window(chip))
    visible = _resample(source_pixels, region) if region.is_enlarged else source_pixels
    height, width = visible.shape[:2]
    if (height, width) == (chip.height, chip.width):
        return visible
    pixels = np.zeros((chip.height, chip.width, 3), dtype=np.uint8)
    pixels[:height, :width] = visible
    return pixels


def _visible_window(chip: Chip) -> tuple[int, int, int, int]:
    """Return the part of a chip's window that is inside the level image, xyxy."""
    width, height = chip.visible
    return chip.x, chip.y, chip.x + width, chip.y + height


def _resample(pixels: UInt8[np.ndarray, "h w 3"], region: Region) -> UInt8[np.ndarray, "m n 3"]:
    """Resize the pixels read for a region to the pixels of its window."""
    width, height = region.sides
    x1, y1, x2, y2 = region.box
    if not region.is_enlarged:
        # Rounding must not move the box beyond the pixels that were read.
        box = (x1, y1, min(x2, pixels.shape[1]), min(y2, pixels.shape[0]))
        return np.asarray(Image.fromarray(pixels).resize((width, height), _FILTER, box=box))
    factor = round(width / (x2 - x1))
    if _is_near(width, factor * (x2 - x1)) and _is_near(height, factor * (y2 - y1)):
        # For an integer factor, OpenCV's resize has the same grid, in half the time.
        enlarged = cv2.resize(pixels, None, fx=factor, fy=factor, interpolation=cv2.INTER_LINEAR)
        left, top = round(x1 * factor), round(y1 * factor)
        return enlarged[top : top + height, left : left + width]
    step_x, step_y = (x2 - x1) / width, (y2 - y1) / height
    to_source = np.array([[step_x, 0, x1 + step_x / 2 - 0.5], [0, step_y, y1 + step_y / 2 - 0.5]])
    rgba = cv2.cvtColor(pixels, cv2.COLOR_RGB2RGBA)  # OpenCV warps four channels twice as fast as three
    warped = cv2.warpAffine(
        rgba,
        to_source,
        region.sides,
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_REPLICATE,
    )
    return cv2.cvtColor(warped, cv2.COLOR_RGBA2RGB)


def _is_near(first: float, second: float) -> bool:
    return abs(first - second) < 1e-6  # pixels; beyond floating-point error
