"""Pictures: chips with what they teach, images with what was found."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from sniper.chips import Standing
from sniper.data.coco import Category
from sniper.data.dataset import ChipDataset, ChipSample
from sniper.geometry import Detections
from sniper.report.palette import PALETTE

_STANDING = {
    Standing.VALID: ("#56B4E9", "valid"),
    Standing.INVALID: ("#E69F00", "invalid"),
    Standing.IGNORED: ("#BBBBBB", "ignored"),
    Standing.ASIDE: ("#CC79A7", "aside"),
}
_SHEET_BACKGROUND = "#202020"
_LEAST_SIDE = 1200  # pixels; of the longer side of a picture, so that names beside small boxes can be read


def draw_chips(chips: ChipDataset, path: Path, *, count: int = 12, side: int = 384) -> None:
    """Write one picture of the first few chips of a plan, their boxes coloured by standing.

    Args:
        chips: of an epoch.
        path: of the picture.
        count: how many chips; fewer if there are not so many.
        side: of each chip in the picture, pixels.
    """
    shown = [_draw_chip(chips[i], side=side) for i in range(min(count, len(chips)))]
    columns = min(math.ceil(math.sqrt(len(shown) * 4 / 3)), len(shown))
    rows = math.ceil(len(shown) / columns)
    gap, legend = 8, 40
    sheet = Image.new(
        "RGB", (columns * (side + gap) + gap, rows * (side + gap) + gap + legend), _SHEET_BACKGROUND
    )
    for i, picture in enumerate(shown):
        sheet.paste(picture, (gap + i % columns * (side + gap), gap + i // columns * (side + gap)))
    draw = ImageDraw.Draw(sheet)
    x = gap
    for color, word in _STANDING.values():
        y = sheet.height - legend + 8
        draw.rectangle((x, y, x + 22, y + 22), outline=color, width=3)
        draw.text((x + 30, y), word, fill="white", font=_font(18))
        x += 140
    sheet.save(path)


def draw_detections(
    image: UInt8[np.ndarray, "h w 3"],
    detections: Detections,
    path: Path,
    *,
    categories: Sequence[Category],
    at_least: float = 0.3,
) -> None:
    """Write a picture of an image with what was found in it, a colour for each class; small images are enlarged.

    Args:
        image: RGB.
        detections: in the image frame.
        path: of the picture.
        categories: by label.
        at_least: detections below this score are not drawn.
    """
    height, width = image.shape[:2]
    zoom = max(1.0, _LEAST_SIDE / max(width, height))
    picture = Image.fromarray(image).resize((round(width * zoom), round(height * zoom)))
    draw = ImageDraw.Draw(picture)
    unit = max(picture.size) / _LEAST_SIDE
    font = _font(round(13 * unit))
    shown = detections.select(detections.scores >= at_least)
    for box, score, label in zip(shown.boxes * zoom, shown.scores, shown.labels, strict=True):
        color = PALETTE[int(label) % len(PALETTE)]
        draw.rectangle(tuple(box.tolist()), outline=color, width=round(2 * unit))
        _write(draw, f"{categories[int(label)].name} {score:.2f}", box, color=color, font=font)
    picture.save(path)


def _draw_chip(sample: ChipSample, *, side: int) -> Image.Image:
    zoom = side / sample.pixels.shape[0]
    picture = Image.fromarray(np.ascontiguousarray(sample.pixels)).resize((side, side))
    draw = ImageDraw.Draw(picture)
    order = np.argsort(-sample.target.standing, kind="stable")  # the valid ones on top
    for i in order:
        color, _ = _STANDING[Standing(int(sample.target.standing[i]))]
        draw.rectangle(tuple((sample.target.boxes[i] * zoom).tolist()), outline=color, width=2)
    return picture


def _write(
    draw: ImageDraw.ImageDraw,
    text: str,
    box: np.ndarray,
    *,
    color: str,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    """Put a line of text on a ground of one colour, above a box or, where there is no room, inside it."""
    left, _, right, bottom = draw.textbbox((0, 0), text, font=font)
    height = bottom + 2
    y = box[1] - height if box[1] >= height else box[1]
    draw.rectangle((box[0], y, box[0] + right - left + 4, y + height), fill=color)
    draw.text((box[0] + 2, y), text, fill="black", font=font)


def _font(height: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(height)
