"""Draw which level of the pyramid detects which object, and how that level shows it to the detector."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from PIL import Image, ImageDraw

from sniper.chips import Level
from sniper.data.images.files import ImageReader
from sniper.data.images.regions import cut_window
from sniper.errors import counted
from sniper.geometry import Detections
from sniper.geometry.boxes import size
from sniper.reports.fonts import load_font
from sniper.reports.palette import PALETTE, SKY_BLUE, VERMILION, YELLOW
from sniper.reports.pictures import save_picture

_COLORS = (VERMILION, YELLOW, SKY_BLUE, *PALETTE)
_BACKGROUND = "#202020"
_WINDOW = 256  # level pixels, longest side of the window of a level that is shown
_ENLARGED = 1.25  # pictures of windows over level pixels
_GAP, _LETTERS, _LINE = 16, 20, 26  # pixels of the picture


def draw_levels(
    image: ImageReader,
    detections: Detections,
    path: Path,
    *,
    levels: Sequence[Level],
    level_of: Int[np.ndarray, " n"],
    title: str,
) -> None:
    """Write a picture of an image with the detections coloured by level, and a window of each level beside it.

    The window is as the detector sees it, in level pixels, where the level has most detections. It is white in the
    image.

    Args:
        image: opened, see `open_image`.
        detections: image frame. May be empty.
        path: of the picture.
        levels: of the image, finest first.
        level_of: (n,) index of the level that each detection is from.
        title: one line above the picture.
    """
    side = round(_WINDOW * _ENLARGED)
    cell_height = side + 2 * _LINE + _GAP
    height = max(len(levels) * cell_height - _GAP, side)
    zoom = min(height / image.height, 1.6 * height / image.width)
    sheet = Image.new("RGB", (round(image.width * zoom), round(image.height * zoom)))
    sheet.paste(_read(image).resize(sheet.size, Image.Resampling.LANCZOS))
    boxes_of = [detections.boxes[level_of == level.index] for level in levels]
    windows = [_window(level, boxes) for level, boxes in zip(levels, boxes_of, strict=True)]
    draw = ImageDraw.Draw(sheet)
    for level, window in zip(levels, windows, strict=True):
        corners = level.to_image(np.array([window], dtype=np.float64))[0] * zoom
        draw.rectangle(tuple(corners.tolist()), outline="white", width=2)
    _draw_boxes(sheet, detections.boxes * zoom, [_color(index) for index in level_of.tolist()])

    size_of_picture = (sheet.width + side + 3 * _GAP, height + _LINE + 3 * _GAP)
    picture = Image.new("RGB", size_of_picture, _BACKGROUND)
    draw, top = ImageDraw.Draw(picture), _GAP + _LINE + _GAP
    draw.text((_GAP, _GAP), title, fill="white", font=load_font(_LETTERS, title))
    picture.paste(sheet, (_GAP, top))
    for level, window, boxes in zip(levels, windows, boxes_of, strict=True):
        left, y = sheet.width + 2 * _GAP, top + level.index * cell_height
        for text in _describe(level, image_sizes=size(boxes)):
            draw.text((left, y), text, fill=_color(level.index), font=load_font(_LETTERS - 3, text))
            y += _LINE
        picture.paste(_draw_window(image, level, window, boxes), (left, y))
    save_picture(picture, path)


def _describe(level: Level, *, image_sizes: Float[np.ndarray, " n"]) -> tuple[str, str]:
    """Return two lines about a level: its scale and range, and its detections."""
    sizes = f" of {image_sizes.min():.0f} to {image_sizes.max():.0f} px" if len(image_sizes) else ""
    return (
        f"level {level.index + 1} (×{level.scale:.2g}): {level.valid_range.describe()}",
        f"detects {counted(len(image_sizes), 'object')}{sizes}",
    )


def _window(level: Level, boxes: Float[np.ndarray, "n 4"]) -> tuple[int, int, int, int]:
    """Return the window of a level around the detection that has most others near it, xyxy, level pixels."""
    centres = level.to_level(boxes).reshape(-1, 2, 2).mean(axis=1)  # (n, 2)
    centre = np.array([level.width, level.height]) / 2
    if len(boxes):
        is_near = (np.abs(centres[:, None] - centres[None]) < _WINDOW / 2).all(axis=2)  # (n, n)
        centre = centres[is_near[is_near.sum(axis=1).argmax()]].mean(axis=0)
    sides = np.minimum(_WINDOW, [level.width, level.height])
    low = np.clip(np.rint(centre - sides / 2), 0, [level.width, level.height] - sides).astype(int)
    x1, y1, x2, y2 = np.concatenate([low, low + sides]).tolist()
    return x1, y1, x2, y2


def _draw_window(
    image: ImageReader,
    level: Level,
    corners: tuple[int, int, int, int],
    boxes: Float[np.ndarray, "n 4"],
) -> Image.Image:
    """Return a window of a level, enlarged, with the detections in it."""
    pixels = Image.fromarray(np.ascontiguousarray(cut_window(image, level, corners)))
    cell = pixels.resize((round(pixels.width * _ENLARGED), round(pixels.height * _ENLARGED)))
    shown = (level.to_level(boxes) - np.tile(corners[:2], 2)) * _ENLARGED
    _draw_boxes(cell, shown, [_color(level.index)] * len(shown))
    ImageDraw.Draw(cell).rectangle(
        (0, 0, cell.width - 1, cell.height - 1), outline=_color(level.index), width=2
    )
    return cell


def _draw_boxes(sheet: Image.Image, boxes: Float[np.ndarray, "n 4"], colors: Sequence[str]) -> None:
    """Draw boxes, large ones first."""
    draw = ImageDraw.Draw(sheet)
    for index in np.argsort(-size(boxes), kind="stable").tolist():
        x1, y1, x2, y2 = boxes[index].tolist()
        draw.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline="black", width=5)  # visible on every ground
        draw.rectangle((x1, y1, x2, y2), outline=colors[index], width=3)


def _color(index: int) -> str:
    return _COLORS[index % len(_COLORS)]


def _read(image: ImageReader) -> Image.Image:
    return Image.fromarray(image.read((0, 0, image.width, image.height), reduction=1))
