"""Pictures: chips with what they teach, images with what was found."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int
from PIL import Image, ImageDraw, ImageFont

from sniper.chips import BoxStatus
from sniper.data.batches import ChipDataset, ChipSample
from sniper.data.datasets import Category
from sniper.data.images.files import ImageReader
from sniper.evaluation.diagnosis import match
from sniper.geometry import Detections
from sniper.reports.palette import PALETTE

_STATUS = {
    BoxStatus.VALID: ("#56B4E9", "valid"),
    BoxStatus.OUT_OF_RANGE: ("#E69F00", "invalid"),
    BoxStatus.IGNORE: ("#BBBBBB", "ignored"),
    BoxStatus.IN_NEGATIVE_CHIP: ("#CC79A7", "aside"),
}
_SHEET_BACKGROUND = "#202020"
_VERDICTS = {"hit": "#56B4E9", "false alarm": "#E69F00", "miss": "#CC79A7", "crowd": "#BBBBBB"}
_LEAST_SIDE = 1200  # pixels; of the longer side of a picture, so that names beside small boxes can be read
_MOST_SIDE = 6000  # pixels; of the longer side, so that it can be opened


def draw_chips(chips: ChipDataset, path: Path, *, count: int = 12, side: int = 384) -> None:
    """Write one picture of the first few chips of a plan, their boxes coloured by status.

    Args:
        chips: of an epoch.
        path: of the picture.
        count: how many chips; fewer if there are not so many.
        side: of each chip in the picture, the longer one, pixels.
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
    for color, word in _STATUS.values():
        y = sheet.height - legend + 8
        draw.rectangle((x, y, x + 22, y + 22), outline=color, width=3)
        draw.text((x + 30, y), word, fill="white", font=_font(18))
        x += 140
    sheet.save(path)


@dataclass(frozen=True, kw_only=True, eq=False)
class Truth:
    """The objects of an image.

    Attributes:
        boxes: (n, 4) xyxy, image frame. May be empty.
        labels: (n,) 0..C-1.
        is_crowd: (n,) whether each is a crowd.
    """

    boxes: Float[np.ndarray, "n 4"]
    labels: Int[np.ndarray, " n"]
    is_crowd: Bool[np.ndarray, " n"]


def draw_detections(
    picture: ImageReader,
    detections: Detections,
    path: Path,
    *,
    categories: Sequence[Category],
    truth: Truth | None = None,
    at_least: float = 0.3,
) -> None:
    """Write a picture of an image with what was found in it; small images are enlarged, very large ones reduced.

    Without the truth, each class has a colour. With it, hits, false alarms and misses have one each, as a legend tells.

    Args:
        picture: the image.
        detections: in the image frame, best first.
        path: of the picture.
        categories: by label.
        truth: the objects that are there.
        at_least: detections below this score are not drawn, nor counted as hits.
    """
    sheet, zoom = _canvas(picture)
    draw = ImageDraw.Draw(sheet)
    unit = max(max(sheet.size) / _LEAST_SIDE, 1.0)
    font = _font(round(13 * unit))
    shown = detections.select(detections.scores >= at_least)
    colors = [PALETTE[label % len(PALETTE)] for label in shown.labels.tolist()]
    if truth is not None:
        is_hit, is_excused, is_found = match(shown, truth.boxes, truth.labels, truth.is_crowd)
        verdicts = np.where(is_hit, "hit", np.where(is_excused, "crowd", "false alarm")).tolist()
        colors = [_VERDICTS[verdict] for verdict in verdicts]
        for box, label in zip(truth.boxes[truth.is_crowd] * zoom, truth.labels[truth.is_crowd], strict=True):
            _outline(draw, box, color=_VERDICTS["crowd"], unit=unit)
            _write(draw, f"crowd: {categories[label].name}", box, color=_VERDICTS["crowd"], font=font)
        is_missed = ~is_found & ~truth.is_crowd
        for box, label in zip(truth.boxes[is_missed] * zoom, truth.labels[is_missed], strict=True):
            _outline(draw, box, color=_VERDICTS["miss"], unit=unit)
            _write(draw, categories[label].name, box, color=_VERDICTS["miss"], font=font)
    ranked = list(zip(shown.boxes * zoom, shown.scores.tolist(), shown.labels.tolist(), colors, strict=True))
    for box, score, label, color in reversed(ranked):  # the best on top
        _outline(draw, box, color=color, unit=unit)
        _write(draw, f"{categories[label].name} {score:.2f}", box, color=color, font=font)
    if truth is not None:
        counts = {"hit": verdicts.count("hit"), "false alarm": verdicts.count("false alarm")}
        _write_legend(draw, counts | {"miss": int(is_missed.sum())}, unit=unit)
    sheet.save(path)


def _canvas(picture: ImageReader) -> tuple[Image.Image, float]:
    """Give the image in a size that can be looked at, and by how much that is larger than the image."""
    longest = max(picture.width, picture.height)
    zoom = min(max(1.0, _LEAST_SIDE / longest), _MOST_SIDE / longest)
    reduction = picture.largest_reduction(1 << max(int(1 / zoom).bit_length() - 1, 0)) if zoom < 1 else 1
    pixels = picture.read((0, 0, picture.width, picture.height), reduction=reduction)
    sides = (max(round(picture.width * zoom), 1), max(round(picture.height * zoom), 1))
    return Image.fromarray(pixels).resize(sides), zoom


def _outline(draw: ImageDraw.ImageDraw, box: np.ndarray, *, color: str, unit: float) -> None:
    draw.rectangle(tuple(box.tolist()), outline=color, width=round(2 * unit))


def _write_legend(draw: ImageDraw.ImageDraw, counts: Mapping[str, int], *, unit: float) -> None:
    """Tell in the corner what the colours mean, and how many there are of each."""
    font, x, y = _font(round(18 * unit)), round(6 * unit), round(6 * unit)
    plurals = {"hit": "hits", "false alarm": "false alarms", "miss": "misses"}
    for verdict, count in counts.items():
        text = f"{count} {verdict if count == 1 else plurals[verdict]}"
        _, _, right, bottom = draw.textbbox((0, 0), text, font=font)
        draw.rectangle((x, y, x + right + 8 * unit, y + bottom + 6 * unit), fill=_VERDICTS[verdict])
        draw.text((x + 4 * unit, y + 2 * unit), text, fill="black", font=font)
        x += round(right + 14 * unit)


def _draw_chip(sample: ChipSample, *, side: int) -> Image.Image:
    height, width = sample.pixels.shape[:2]
    zoom = side / max(height, width)
    picture = Image.new("RGB", (side, side), _SHEET_BACKGROUND)
    pixels = Image.fromarray(np.ascontiguousarray(sample.pixels))
    picture.paste(pixels.resize((max(round(width * zoom), 1), max(round(height * zoom), 1))))
    draw = ImageDraw.Draw(picture)
    order = np.argsort(-sample.target.status, kind="stable")  # the valid ones on top
    for i in order:
        color, _ = _STATUS[BoxStatus(int(sample.target.status[i]))]
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
