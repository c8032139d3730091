"""Masks of Pascal VOC: images beside the XML files, whose pixels are the numbers of the objects."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int, Integer, UInt8
from PIL import Image

from sniper.data.images.encoded import no_pillow_limit
from sniper.errors import AnnotationError, describe_os_error
from sniper.files import read_bytes
from sniper.geometry.boxes import Sides
from sniper.geometry.mask_frames import rasters_in_boxes
from sniper.geometry.masks import MaskArrays, encode_counts

MASK_FOLDER = "SegmentationObject"
"""Name of the folder of these images, which have the names of the XML files."""

MAX_OBJECTS = 254
"""The most objects of an image that have a number: 0 is the background, and 255 the border between objects."""

_VOID = 255
_MODES = ("P", "L", "I;16", "I")  # of Pillow: one number a pixel


def read_object_masks(
    path: Path, *, sides: Sides | None, max_pixels: int
) -> tuple[Int[np.ndarray, " k"], MaskArrays]:
    """Read the masks of the objects of an image.

    Args:
        path: of the PNG file.
        sides: of the image, pixels; None if they are not known.
        max_pixels: of an image that is read.

    Returns:
        (k,) numbers of the objects that have a pixel, rising from 1, and their masks as run-length encodings.

    Raises:
        AnnotationError: if it cannot be read, or is no image of such numbers; tells what it is.
    """
    try:
        content = read_bytes(path)
        with no_pillow_limit(), Image.open(io.BytesIO(content), formats=("PNG",)) as image:
            if image.mode not in _MODES:
                raise AnnotationError(f"has pixels of the kind {image.mode}, expected numbers of objects")
            if sides is not None and image.size != sides:
                raise AnnotationError(
                    f"is of {image.width}x{image.height} pixels, the image of {sides.width}x{sides.height}"
                )
            if image.width * image.height > max_pixels:
                raise AnnotationError(
                    f"has {image.width * image.height:,} pixels, expected at most {max_pixels:,}"
                )
            numbers = np.asarray(image)
    except (OSError, ValueError, SyntaxError) as error:  # of Pillow, for broken files
        reason = describe_os_error(error) if isinstance(error, OSError) else str(error)
        raise AnnotationError(f"cannot be read ({reason})") from error
    return _to_masks(numbers)


def _to_masks(numbers: Integer[np.ndarray, "h w"]) -> tuple[Int[np.ndarray, " k"], MaskArrays]:
    """Return the numbers of objects, and their masks."""
    height, width = numbers.shape
    pixels = numbers.T.ravel()  # column by column, as encodings have them
    starts = np.append(0, np.flatnonzero(pixels[1:] != pixels[:-1]) + 1)
    stops = np.append(starts[1:], len(pixels))
    values = pixels[starts]
    objects = np.unique(values)
    objects = objects[(objects != 0) & (objects != _VOID)].astype(np.int64)
    counts = [
        np.diff(np.stack([starts[values == each], stops[values == each]], axis=1).ravel(), prepend=0)
        for each in objects
    ]
    ends = [len(pixels) - int(each.sum()) for each in counts]
    filled = [np.append(each, end) if end else each for each, end in zip(counts, ends, strict=True)]
    codes, offsets = encode_counts(
        np.concatenate([np.zeros(0, np.int64), *filled]), np.cumsum([0, *map(len, filled)])
    )
    return objects, MaskArrays.from_codes(codes, offsets, np.tile([width, height], (len(objects), 1)))


def draw_object_masks(masks: MaskArrays, sides: Sides) -> tuple[UInt8[np.ndarray, "h w"], Sequence[int]]:
    """Draw the masks of the objects of an image, each with its number from 1.

    Args:
        masks: of at most `MAX_OBJECTS` objects.
        sides: of the image, pixels.

    Returns:
        (h, w) numbers of the objects, and the rows of those that others cover in part: where masks overlap, the smaller
        one is on top.
    """
    numbers = np.zeros(sides.hw, dtype=np.uint8)
    polygons = masks.to_polygons()
    rasters = list(rasters_in_boxes(polygons, np.tile(np.array(sides), (len(masks), 1))))
    areas = np.array([int(raster.sum()) for raster, _, _ in rasters], dtype=np.int64)
    for row in np.argsort(-areas, kind="stable").tolist():
        raster, x, y = rasters[row]
        window = numbers[y : y + raster.shape[0], x : x + raster.shape[1]]
        window[raster] = row + 1
    left = np.bincount(numbers.ravel(), minlength=len(masks) + 1)[1 : len(masks) + 1]
    return numbers, np.flatnonzero(left < areas).tolist()
