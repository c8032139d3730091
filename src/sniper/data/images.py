"""Pixels: images read, chips cut from them, whole images resized.

Pillow resizes a region given in fractions of a pixel on the very grid of the whole image, filter support included. So a
chip has the pixels of the fully resized image, but only its region is computed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from sniper.chips import Chip, Level
from sniper.errors import ImageError

_FILTER = Image.Resampling.BILINEAR
_MOST_PIXELS = 1_000_000_000  # 30,000 x 30,000 and a little; more is taken for a file made to exhaust memory
_DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")

Image.MAX_IMAGE_PIXELS = None  # our own limit holds: Pillow's warns of images that are meant to be that large


def load_image(path: Path) -> Image.Image:
    """Read an image as RGB, in its stored orientation.

    Raises:
        ImageError: if the file is absent, truncated or no image, has more than 8 bits a channel, or is beyond all
            measure.
    """
    with _opened(path) as image:
        return image.convert("RGB")


def read_sides(path: Path) -> tuple[int, int]:
    """Read width and height of an image from its header, pixels as stored.

    Raises:
        ImageError: as `load_image`, but for what only the pixels tell.
    """
    with _opened(path) as image:
        return image.size


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            if image.mode in _DEEP_MODES:
                raise ImageError(f"{path}: has more than 8 bits a channel (mode {image.mode}), wanted 8")
            if image.width * image.height > _MOST_PIXELS:
                raise ImageError(
                    f"{path}: has {image.width}x{image.height} pixels, wanted at most {_MOST_PIXELS:,} in all"
                )
            yield image
    except (OSError, ValueError, SyntaxError) as error:
        raise ImageError(f"{path}: cannot be read as an image ({error})") from error


def cut_chip(image: Image.Image, chip: Chip) -> UInt8[np.ndarray, "k k 3"]:
    """Give the pixels of a chip; what reaches beyond the image is black.

    Args:
        image: the whole image, RGB, image frame.
        chip: where to cut.

    Returns:
        (size, size, 3) grey levels of the chip.
    """
    width, height = chip.visible
    level = chip.level
    scale_x, scale_y = level.image_width / level.width, level.image_height / level.height
    region = (chip.x * scale_x, chip.y * scale_y, (chip.x + width) * scale_x, (chip.y + height) * scale_y)
    right, bottom = min(region[2], level.image_width), min(region[3], level.image_height)
    shown = image.resize((width, height), _FILTER, box=(region[0], region[1], right, bottom))
    pixels = np.zeros((chip.size, chip.size, 3), dtype=np.uint8)
    pixels[:height, :width] = np.asarray(shown)
    return pixels


def resize_to_level(image: Image.Image, level: Level) -> UInt8[np.ndarray, "h w 3"]:
    """Give the pixels of the whole image at a level.

    Args:
        image: the whole image, RGB, image frame.
        level: how far to resize.

    Returns:
        (level.height, level.width, 3) grey levels.
    """
    return np.asarray(image.resize((level.width, level.height), _FILTER))
