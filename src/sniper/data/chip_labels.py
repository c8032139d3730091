"""The annotations of a chip for trainers that have no ranges of sizes, and the pixels of what is not annotated."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import cv2
import numpy as np
from annotated_types import Ge, Le
from jaxtyping import Bool, Float, Int, UInt8
from pydantic import NonNegativeFloat

from sniper.chips import BoxStatus, Chip, assign_targets
from sniper.data.datasets import ImageRecord
from sniper.data.datasets.write import FormatName
from sniper.errors import ConfigError
from sniper.geometry.boxes import area
from sniper.specs import Fraction, spec_dataclass

_BLUR_CELLS = 3  # a side: what is left of the contents of a blurred box
_TOLERANCE = 1e-6  # of an area


@spec_dataclass
class ChipFileSpec:
    """How chips are written as images with annotations.

    Attributes:
        to: format of the annotations.
        encoding: of the images: `jpeg`, or `png`, which is lossless, larger and slower.
        quality: of JPEG, from 1 to 100.
        out_of_range: an object whose size the level of a chip does not train on: `label` annotates it as all others;
            `blur` leaves it out and blurs its pixels to grey; `skip` writes no chip that shows one.
        ignored: crowds, regions to ignore, and objects of which a chip shows too little: `crowd` annotates them as
            regions to ignore (COCO's `iscrowd`, VOC's `difficult`); `blur` leaves them out and blurs their pixels;
            `keep` leaves them out alone.
        min_visibility: share of its area that a chip must show of an object to annotate it.
        min_visible_side: chip pixels that it must show of a clipped object along both axes.
        is_padded: whether the part of a chip beyond its image is written, too, in black.
    """

    to: FormatName
    encoding: Literal["jpeg", "png"] = "jpeg"
    quality: Annotated[int, Ge(1), Le(100)] = 95
    out_of_range: Literal["label", "blur", "skip"] = "label"
    ignored: Literal["crowd", "blur", "keep"] = "crowd"
    min_visibility: Fraction = 0.1
    min_visible_side: NonNegativeFloat = 10.0
    is_padded: bool = True

    def check(self) -> None:
        """Check that the format can express what is written.

        Raises:
            ConfigError: if not.
        """
        if self.to == "yolo" and self.ignored == "crowd":
            raise ConfigError("--ignored crowd: YOLO has no regions to ignore; expected blur or keep")

    @property
    def suffix(self) -> str:
        """The suffix of image files."""
        return ".jpg" if self.encoding == "jpeg" else ".png"


@dataclass(frozen=True, kw_only=True, eq=False)
class ChipLabels:
    """The annotations of one chip.

    Attributes:
        boxes: (n, 4) xyxy, chip frame, clipped to the chip. May be empty.
        labels: (n,) 0..C-1.
        is_crowd: (n,) whether each is a region to ignore.
        rows: (n,) their indices among the boxes of the image.
        blurred: (k, 4) xyxy, chip frame, of what is left out and blurred.
        num_out_of_range: annotated objects that the level of the chip does not train on.
        num_blurred_out_of_range: those that are blurred instead.
        num_cut: objects that are no annotations, as the chip shows too little of them.
        num_crowds: crowds and regions to ignore.
        is_skipped: whether the chip is not to be written.
    """

    boxes: Float[np.ndarray, "n 4"]
    labels: Int[np.ndarray, " n"]
    is_crowd: Bool[np.ndarray, " n"]
    rows: Int[np.ndarray, " n"]
    blurred: Float[np.ndarray, "k 4"]
    num_out_of_range: int
    num_blurred_out_of_range: int
    num_cut: int
    num_crowds: int
    is_skipped: bool


def label_chip(
    chip: Chip, record: ImageRecord, spec: ChipFileSpec, *, is_moved_here: Bool[np.ndarray, " n"]
) -> ChipLabels:
    """Compute the annotations of a chip, by the rules of training; see `assign_targets`.

    Args:
        chip: the chip. Negative chips are annotated as others are: a trainer takes what is not for background.
        record: its image with all boxes.
        spec: what becomes of objects out of range, crowds, and objects that are cut.
        is_moved_here: (n,) for each box of the image, whether it moved to the level of the chip.
    """
    whole = chip.to_chip(record.boxes)
    visible = area(chip.clip(whole))
    rows = np.flatnonzero(visible > 0)
    target = assign_targets(
        chip,
        boxes=record.boxes,
        labels=record.labels,
        is_crowd=record.is_crowd,
        is_moved_here=is_moved_here,
        min_visible_side=spec.min_visible_side,
    )
    is_crowd = record.is_crowd[rows]
    is_little = visible[rows] < (spec.min_visibility - _TOLERANCE) * area(whole)[rows]
    is_ignored = (target.status == BoxStatus.IGNORE) | is_little
    is_out = (target.status == BoxStatus.OUT_OF_RANGE) & ~is_ignored
    is_blurred = is_ignored & (spec.ignored == "blur") | is_out & (spec.out_of_range == "blur")
    is_kept = ~is_ignored & (~is_out | (spec.out_of_range == "label"))
    is_kept |= is_ignored & (spec.ignored == "crowd")
    return ChipLabels(
        boxes=target.boxes[is_kept],
        labels=target.labels[is_kept],
        is_crowd=is_ignored[is_kept],
        rows=rows[is_kept],
        blurred=target.boxes[is_blurred],
        num_out_of_range=int((is_out & is_kept).sum()),
        num_blurred_out_of_range=int((is_out & is_blurred).sum()),
        num_cut=int((is_ignored & ~is_crowd).sum()),
        num_crowds=int(is_crowd.sum()),
        is_skipped=spec.out_of_range == "skip" and bool(is_out.any()),
    )


def blur_boxes(
    pixels: UInt8[np.ndarray, "h w 3"],
    blurred: Float[np.ndarray, "k 4"],
    *,
    kept: Float[np.ndarray, "n 4"],
) -> UInt8[np.ndarray, "h w 3"]:
    """Blur the contents of boxes to grey, except where other boxes show what is to be seen.

    Args:
        pixels: of a chip. Not changed.
        blurred: xyxy, chip frame, inside the chip; their edges are rounded outwards.
        kept: xyxy, chip frame, inside the chip; their pixels stay, up to the edges rounded outwards.
    """
    result = pixels.copy()
    for window in map(_pixel_window, blurred.tolist()):
        grey = cv2.cvtColor(np.ascontiguousarray(result[window]), cv2.COLOR_RGB2GRAY)
        height, width = grey.shape
        cells = (min(_BLUR_CELLS, width), min(_BLUR_CELLS, height))
        smooth = cv2.resize(grey, cells, interpolation=cv2.INTER_AREA)
        result[window] = cv2.resize(smooth, (width, height), interpolation=cv2.INTER_LINEAR)[..., None]
    for window in map(_pixel_window, kept.tolist()):
        result[window] = pixels[window]
    return result


def _pixel_window(box: list[float]) -> tuple[slice, slice]:
    """Return the rows and columns of the pixels that a box touches."""
    x1, y1, x2, y2 = box
    return slice(math.floor(y1), math.ceil(y2)), slice(math.floor(x1), math.ceil(x2))
