"""Settings of other tools that suit a data set: sizes of tiles, overlap, size of images, and what they miss.

Every tool shows a detector parts of images at one scale. A box is missed if no part contains it whole, or if it is not
of a useful size in any that does.
"""

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from jaxtyping import Bool, Float, Int

from sniper.chips.image_boxes import ImageBoxes
from sniper.geometry.boxes import size

_Choice = TypeVar("_Choice")

ToolName = Literal["ultralytics", "sahi", "supervision", "rfdetr"]

_INPUT = (
    640  # pixels a side: what detectors under SAHI and supervision see of a tile, by default of Ultralytics
)
_STEP = 32  # pixels; multiples of it are sizes of images in Ultralytics, and in RF-DETR from Nano to Large
_MIN_SIZE, _MAX_SIZE = 320, 1536  # of images, pixels
_TILE_SHARES = (0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0, 1.25, 1.5, 2.0)  # of the side that the detector sees
_OVERLAPS = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)
_GOAL = 0.95  # share of the boxes, as of the suggested pyramid
_DEFAULT_DETECTIONS = 300  # of an image, in Ultralytics and RF-DETR
_SIZES = (("small", 0.0, 32.0), ("medium", 32.0, 96.0), ("large", 96.0, math.inf))  # COCO's, pixels


@dataclass(frozen=True, kw_only=True)
class MissedBoxes:
    """The boxes of some sizes that a tool misses.

    Attributes:
        name: of the sizes.
        at_least: size from which they are, image pixels.
        below: size up to which they are, image pixels.
        num_boxes: all of these sizes.
        num_cut: those that no tile contains whole.
        num_too_small: others that are below the useful sizes where the detector sees them.
        num_too_large: others that are above.
    """

    name: str
    at_least: float
    below: float
    num_boxes: int
    num_cut: int
    num_too_small: int
    num_too_large: int

    @property
    def num_missed(self) -> int:
        """All that are missed."""
        return self.num_cut + self.num_too_small + self.num_too_large


@dataclass(frozen=True, kw_only=True)
class ToolPlan:
    """Settings of a tool, and what they lead to.

    Attributes:
        tool: its name.
        lines: to paste.
        input_size: side of what the detector sees, pixels.
        tile: side of a tile, image pixels; None where the detector sees whole images.
        overlap: share of a tile that the next one repeats; None without tiles.
        train_megapixels: pixels of an image in an epoch of training, in millions, on average.
        megapixels: pixels of an image in prediction, in millions, on average.
        boxes: that are missed, by size.
        notes: what to keep in mind.
    """

    tool: ToolName
    lines: tuple[str, ...]
    input_size: int
    tile: int | None
    overlap: float | None
    train_megapixels: float
    megapixels: float
    boxes: tuple[MissedBoxes, ...]
    notes: tuple[str, ...]

    @property
    def share_missed(self) -> float:
        """The share of the boxes that are missed; 0 if there are none."""
        num_boxes = sum(each.num_boxes for each in self.boxes)
        return sum(each.num_missed for each in self.boxes) / num_boxes if num_boxes else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as plain data."""
        return {
            "tool": self.tool,
            "lines": list(self.lines),
            "input_size": self.input_size,
            "tile": self.tile,
            "overlap": self.overlap,
            "train_megapixels_per_image": round(self.train_megapixels, 4),
            "predict_megapixels_per_image": round(self.megapixels, 4),
            "share_missed": round(self.share_missed, 4),
            "boxes": [
                {
                    "size": each.name,
                    "at_least": each.at_least,
                    "below": each.below if math.isfinite(each.below) else None,
                    "boxes": each.num_boxes,
                    "cut": each.num_cut,
                    "too_small": each.num_too_small,
                    "too_large": each.num_too_large,
                }
                for each in self.boxes
            ],
            "notes": list(self.notes),
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class _View:
    """How a tool shows images to a detector.

    Attributes:
        scales: (m,) factor from sizes in each image to those that the detector sees.
        megapixels: that it sees of all images.
        is_whole: (n,) which boxes it sees whole.
    """

    scales: Float[np.ndarray, " m"]
    megapixels: float
    is_whole: Bool[np.ndarray, " n"]


def plan_tool(
    tool: ToolName, images: ImageBoxes, *, data: Path, useful_sizes: tuple[float, float]
) -> ToolPlan:
    """Choose settings of a tool: the cheapest that miss at most 5 % of the boxes, or else those that miss the fewest.

    Args:
        tool: Ultralytics and RF-DETR show whole images; SAHI shows tiles and the whole image; supervision's
            `InferenceSlicer` shows tiles.
        images: the images and boxes.
        data: path of the data set, for the lines.
        useful_sizes: sizes, from and to, at which a detector does well, pixels that it sees.
    """
    if tool in ("ultralytics", "rfdetr"):
        return _plan_whole(tool, images, data=data, useful_sizes=useful_sizes)
    return _plan_tiles(tool, images, useful_sizes=useful_sizes)


def _plan_whole(
    tool: ToolName, images: ImageBoxes, *, data: Path, useful_sizes: tuple[float, float]
) -> ToolPlan:
    """Choose the size that whole images are resized to."""
    choices = {
        side: [_view_whole(images, side, is_square=tool == "rfdetr")]
        for side in range(_MIN_SIZE, _MAX_SIZE + 1, _STEP)
    }
    side = _cheapest(choices, images, useful_sizes=useful_sizes)
    views = choices[side]
    most = int(np.diff(images.offsets).max(initial=0))
    lines = {"ultralytics": _ultralytics_lines, "rfdetr": _rfdetr_lines}[tool](side, data, most)
    notes = [
        f"sizes are multiples of {_STEP} up to {_MAX_SIZE}"
        + ("; RF-DETR Base, of earlier versions, takes multiples of 56" if tool == "rfdetr" else "")
    ]
    if tool == "rfdetr":
        notes.append("images are resized to squares, so objects in long images are distorted")
    return ToolPlan(
        tool=tool,
        lines=lines,
        input_size=side,
        tile=None,
        overlap=None,
        train_megapixels=side**2 / 1e6,  # padded to squares
        megapixels=sum(view.megapixels for view in views) / max(len(images), 1),
        boxes=_missed(views, images, useful_sizes=useful_sizes),
        notes=tuple(notes),
    )


def _plan_tiles(tool: ToolName, images: ImageBoxes, *, useful_sizes: tuple[float, float]) -> ToolPlan:
    """Choose the side of tiles, and their overlap."""
    whole = [_view_whole(images, _INPUT)] if tool == "sahi" else []
    choices = {
        (tile, overlap): [_view_tiles(images, tile, overlap), *whole]
        for tile in (round(share * _INPUT) for share in _TILE_SHARES)
        for overlap in _OVERLAPS
    }
    tile, overlap = _cheapest(choices, images, useful_sizes=useful_sizes)
    views = choices[tile, overlap]
    lines = {"sahi": _sahi_lines, "supervision": _supervision_lines}[tool](tile, overlap)
    notes = [
        f"for a detector that sees {_INPUT} pixels a side (imgsz={_INPUT}); train it on tiles of this size, too"
    ]
    if tool == "sahi":
        notes.append("the whole image is seen once more (perform_standard_pred), which finds large objects")
    return ToolPlan(
        tool=tool,
        lines=lines,
        input_size=_INPUT,
        tile=tile,
        overlap=overlap,
        train_megapixels=views[0].megapixels / max(len(images), 1),
        megapixels=sum(view.megapixels for view in views) / max(len(images), 1),
        boxes=_missed(views, images, useful_sizes=useful_sizes),
        notes=tuple(notes),
    )


def _cheapest(
    choices: Mapping[_Choice, Sequence[_View]], images: ImageBoxes, *, useful_sizes: tuple[float, float]
) -> _Choice:
    """Return the choice of the fewest pixels that reaches the goal, or else the one that misses the fewest boxes."""
    num_boxes = max(int(images.is_required.sum()), 1)

    def rank(choice: _Choice) -> tuple[float, float, int]:
        views = choices[choice]
        _, _, is_useful, _ = _judge(views, images, useful_sizes=useful_sizes)
        missed = int((images.is_required & ~is_useful).sum())
        cost = sum(view.megapixels for view in views)
        return (0.0 if missed <= (1 - _GOAL) * num_boxes else missed), cost, missed

    return min(choices, key=rank)


def _view_whole(images: ImageBoxes, side: int, *, is_square: bool = False) -> _View:
    """View whole images, resized so that the longer side has a length, or to a square."""
    longer = np.maximum(images.widths, images.heights).astype(np.float64)
    areas = images.widths * images.heights.astype(np.float64)
    scales = side / np.sqrt(areas) if is_square else side / longer
    pixels = np.full(len(images), side**2) if is_square else areas * scales**2
    return _View(
        scales=scales,
        megapixels=float(pixels.sum()) / 1e6,
        is_whole=np.ones(len(images.boxes), dtype=np.bool_),
    )


def _view_tiles(images: ImageBoxes, tile: int, overlap: float) -> _View:
    """View tiles that are resized to what the detector sees."""
    step = tile - int(tile * overlap)
    sides = np.stack([images.widths, images.heights])  # (2, m)
    num_tiles = (-(-np.maximum(sides - tile, 0) // step) + 1).prod(axis=0)
    scales = _INPUT / np.minimum(sides.max(axis=0), tile)
    pixels = num_tiles * np.minimum(sides, tile).prod(axis=0) * scales**2
    image, boxes = images.image_of_box, images.boxes
    is_whole = _is_whole(boxes[:, 0], boxes[:, 2], images.widths[image], tile=tile, step=step)
    is_whole &= _is_whole(boxes[:, 1], boxes[:, 3], images.heights[image], tile=tile, step=step)
    return _View(scales=scales, megapixels=float(pixels.sum()) / 1e6, is_whole=is_whole)


def _is_whole(
    low: Float[np.ndarray, " n"],
    high: Float[np.ndarray, " n"],
    lengths: Int[np.ndarray, " n"],
    *,
    tile: int,
    step: int,
) -> Bool[np.ndarray, " n"]:
    """Check which intervals a tile contains along one axis. Tiles are a step apart; the last ends at the border."""
    last = np.maximum(lengths - tile, 0)
    start = np.minimum(np.floor(low / step) * step, last)  # the last tile that starts before the interval
    start = np.where(last <= low, np.maximum(start, last), start)
    return high <= start + tile


def _missed(
    views: Sequence[_View], images: ImageBoxes, *, useful_sizes: tuple[float, float]
) -> tuple[MissedBoxes, ...]:
    """Count the required boxes that no view shows well, by size."""
    sizes, is_whole, is_useful, is_large = _judge(views, images, useful_sizes=useful_sizes)
    is_cut, is_found = ~is_whole, images.is_required & is_useful

    def count(flags: Bool[np.ndarray, " n"]) -> int:
        return int((images.is_required & is_of_size & flags).sum())

    counted = []
    for name, at_least, below in _SIZES:
        is_of_size = (sizes >= at_least) & (sizes < below)
        counted.append(
            MissedBoxes(
                name=name,
                at_least=at_least,
                below=below,
                num_boxes=count(is_of_size),
                num_cut=count(is_cut),
                num_too_small=count(is_whole & ~is_found & ~is_large),
                num_too_large=count(is_whole & ~is_found & is_large),
            )
        )
    return tuple(counted)


def _judge(
    views: Sequence[_View], images: ImageBoxes, *, useful_sizes: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return of each box its size, and whether a view shows it whole, at a useful size, and above the useful sizes."""
    low, high = useful_sizes
    image, sizes = images.image_of_box, size(images.boxes)
    seen = np.stack([sizes * view.scales[image] for view in views])  # (v, n)
    is_whole = np.stack([view.is_whole for view in views])
    flags = (is_whole, is_whole & (seen >= low) & (seen <= high), is_whole & (seen > high))
    shown, useful, large = (np.asarray(each.any(axis=0)) for each in flags)
    return sizes, shown, useful, large


def _ultralytics_lines(side: int, data: Path, most: int) -> tuple[str, ...]:
    limit = f" max_det={_round_up(most)}" if most > _DEFAULT_DETECTIONS else ""
    file = shlex.quote(str(data) if data.suffix in (".yaml", ".yml") else "yolo/data.yaml")
    convert = (
        () if file == shlex.quote(str(data)) else (f"sniper convert {shlex.quote(str(data))} yolo --to yolo",)
    )
    return (
        *convert,
        f"yolo detect train data={file} model=MODEL.pt imgsz={side}",
        f"yolo detect predict model=best.pt source=IMAGES imgsz={side}{limit}",
    )


def _rfdetr_lines(side: int, data: Path, most: int) -> tuple[str, ...]:
    queries = (
        f", num_queries={_round_up(most)}, num_select={_round_up(most)}" if most > _DEFAULT_DETECTIONS else ""
    )
    return (
        f"model = RFDETRMedium(resolution={side}{queries})",
        f"model.train(dataset_dir={str(data if data.suffix == '' else data.parent)!r})",
    )


def _sahi_lines(tile: int, overlap: float) -> tuple[str, ...]:
    return (
        f"get_sliced_prediction(image, detection_model, slice_height={tile}, slice_width={tile}, "
        f"overlap_height_ratio={overlap}, overlap_width_ratio={overlap})",
        f"sahi predict --model_path best.pt --source IMAGES --image_size {_INPUT} --slice_height {tile} "
        f"--slice_width {tile} --overlap_height_ratio {overlap} --overlap_width_ratio {overlap}",
        f"sahi coco slice --image_dir IMAGES --dataset_json_path FILE --slice_size {tile} --overlap_ratio {overlap}",
    )


def _supervision_lines(tile: int, overlap: float) -> tuple[str, ...]:
    pixels = int(tile * overlap)
    return (
        f"sv.InferenceSlicer(callback=callback, slice_wh=({tile}, {tile}), overlap_wh=({pixels}, {pixels}))",
    )


def _round_up(number: int) -> int:
    return -(-number // 100) * 100
