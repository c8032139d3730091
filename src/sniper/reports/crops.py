"""Cut pictures for pages: an object with its surroundings at the scale of a level, or a whole image made small."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from PIL import Image

from sniper.chips import Chip, LevelSpec
from sniper.chips.pyramid import Level
from sniper.data.datasets import ImageRecord
from sniper.data.images.files import ImageReader
from sniper.data.images.regions import cut_chip
from sniper.data.reader import open_record
from sniper.data.spec import ReadSpec
from sniper.files import is_there
from sniper.geometry.boxes import size
from sniper.reports.page import to_jpeg

_MARGIN, _MIN_CROP = 1.6, 96  # side of a crop over that of its box; smallest side, level pixels
_MAX_CROP = 288  # pixels of the longer side of a picture; larger crops are reduced


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture of a page.

    Attributes:
        jpeg: as base64.
        width: pixels.
        height: pixels.
    """

    jpeg: str
    width: int
    height: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Crop:
    """A window of a level around a box.

    Attributes:
        chip: the window.
        zoom: pixels of the picture over those of the level; below 1 where the window is large.
    """

    chip: Chip
    zoom: float

    @classmethod
    def around(cls, box: Float[np.ndarray, "4"], level: Level, *, max_side: int | None = _MAX_CROP) -> "Crop":
        """Choose a window with some surroundings.

        Args:
            box: xyxy, image frame.
            level: bound to the image.
            max_side: longest side of the picture, pixels; None for no limit.
        """
        level_box = level.to_level(box[None])[0]
        center = (level_box[:2] + level_box[2:]) / 2
        side = max(_MIN_CROP, round(_MARGIN * float((level_box[2:] - level_box[:2]).max())))
        width, height = min(side, level.width), min(side, level.height)
        x = int(np.clip(round(center[0] - width / 2), 0, level.width - width))
        y = int(np.clip(round(center[1] - height / 2), 0, level.height - height))
        zoom = 1.0 if max_side is None else min(1.0, max_side / max(width, height))
        return cls(chip=Chip(level=level, x=x, y=y, width=width, height=height), zoom=zoom)

    def read(self, image: ImageReader) -> Picture:
        """Read the picture.

        Raises:
            ImageError: if the image cannot be read.
        """
        longest = max(self.chip.width, self.chip.height)
        return shrink(cut_chip(image, self.chip), max_side=max(round(longest * self.zoom), 1))

    def to_picture(self, boxes: Float[np.ndarray, "n 4"]) -> list[list[float]]:
        """Transform (n, 4) xyxy boxes from the image frame to the picture, and clip them to it."""
        return (self.chip.clip(self.chip.to_chip(boxes)) * self.zoom).round(1).tolist()


def shrink(pixels: np.ndarray, *, max_side: int) -> Picture:
    """Return (h, w, 3) RGB values as a picture whose sides are at most `max_side`."""
    height, width = pixels.shape[:2]
    zoom = min(1.0, max_side / max(height, width))
    if zoom < 1:
        sides = max(round(width * zoom), 1), max(round(height * zoom), 1)
        pixels = np.asarray(Image.fromarray(pixels).resize(sides, Image.Resampling.BOX))
    return Picture(jpeg=to_jpeg(pixels), width=pixels.shape[1], height=pixels.shape[0])


def read_thumbnail(record: ImageRecord, spec: ReadSpec, *, max_side: int) -> Picture | None:
    """Read an image whose sides are at most `max_side`; None if there is no file.

    Raises:
        ImageError: if it cannot be read.
    """
    if not is_there(record.path):
        return None
    return read_reduced(open_record(record, spec), max_side=max_side)


def read_reduced(reader: ImageReader, *, max_side: int) -> Picture:
    """Read an open image whose sides are at most `max_side`.

    Raises:
        ImageError: if it cannot be read.
    """
    most = 1 << max(max(reader.width, reader.height) // (2 * max_side), 1).bit_length() - 1
    reduction = reader.largest_reduction(most)
    pixels = reader.read((0, 0, reader.width, reader.height), reduction=reduction)
    return shrink(pixels, max_side=max_side)


def level_for(levels: Sequence[LevelSpec], box: Float[np.ndarray, "4"], *, width: int, height: int) -> Level:
    """Return the level that suits a box best: of those with its size in their range, where it is most central.

    Args:
        levels: of a pyramid, finest first.
        box: xyxy, image frame.
        width: of the image, pixels.
        height: of the image, pixels.
    """
    (box_size,) = size(box[None])
    distances = [
        abs(np.log(max(box_size, 1.0)) - np.log(_middle(spec))) + (0 if _contains(spec, box_size) else 1e9)
        for spec in levels
    ]
    index = int(np.argmin(distances))
    return levels[index].at(width=width, height=height, index=index)


def _contains(spec: LevelSpec, box_size: float) -> bool:
    return bool(spec.at_least <= box_size < spec.below)


def _middle(spec: LevelSpec) -> float:
    """Return the geometric middle of a valid range; one without an end spans a factor of 4, as most do."""
    low = max(spec.at_least, spec.below / 4 if np.isfinite(spec.below) else 1.0)
    high = spec.below if np.isfinite(spec.below) else 4 * low
    return float(np.sqrt(max(low, 1.0) * high))
