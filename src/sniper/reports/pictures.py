"""Draw pictures: chips with their boxes, and images with their detections."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from sniper.chips import BoxStatus
from sniper.data.batches import ChipDataset, ChipSample
from sniper.data.datasets import Category, ImageRecord
from sniper.data.images.files import ImageReader
from sniper.evaluation.matching import match_detections
from sniper.geometry import Detections
from sniper.reports.fonts import load_font, picture_names
from sniper.reports.palette import GREY, ORANGE, PALETTE, PURPLE, SKY_BLUE

_STATUS = {
    BoxStatus.VALID: (SKY_BLUE, "valid"),
    BoxStatus.OUT_OF_RANGE: (ORANGE, "out of range"),
    BoxStatus.IGNORE: (GREY, "ignore"),
    BoxStatus.IN_NEGATIVE_CHIP: (PURPLE, "in negative chip"),
}
_SHEET_BACKGROUND = "#202020"
_GAP, _LEGEND_HEIGHT, _SWATCH = 8, 40, 22  # pixels of a sheet of chips
_MATCHES = {
    "true positive": SKY_BLUE,
    "false positive": ORANGE,
    "false negative": PURPLE,
    "ignored": GREY,
}
_MIN_LONG_SIDE = 1200  # pixels of a picture, so that names beside small boxes can be read
_MAX_LONG_SIDE = 6000  # pixels of a picture, so that it can be opened


def draw_chips(chips: ChipDataset, path: Path, *, count: int = 12, side: int = 384) -> None:
    """Write one picture of the first chips of an epoch, with boxes coloured by status.

    Args:
        chips: of an epoch.
        path: of the picture.
        count: number of chips; all of them if there are fewer.
        side: longer side of each chip in the picture, pixels.
    """
    cells = [_draw_chip(chips[index], side=side) for index in range(min(count, len(chips)))]
    columns = min(math.ceil(math.sqrt(len(cells) * 4 / 3)), len(cells))
    rows = math.ceil(len(cells) / columns)
    pitch, font = side + _GAP, load_font(18)
    legend_widths = [_SWATCH + 8 + round(font.getlength(name)) + 3 * _GAP for _, name in _STATUS.values()]
    size = (max(columns * pitch, sum(legend_widths)) + _GAP, rows * pitch + _GAP + _LEGEND_HEIGHT)
    sheet = Image.new("RGB", size, _SHEET_BACKGROUND)
    for index, cell in enumerate(cells):
        sheet.paste(cell, (_GAP + index % columns * pitch, _GAP + index // columns * pitch))
    draw = ImageDraw.Draw(sheet)
    x, y = _GAP, sheet.height - _LEGEND_HEIGHT + _GAP
    for (color, name), width in zip(_STATUS.values(), legend_widths, strict=True):
        draw.rectangle((x, y, x + _SWATCH, y + _SWATCH), outline=color, width=3)
        draw.text((x + _SWATCH + 8, y), name, fill="white", font=font)
        x += width
    sheet.save(path)


def draw_detections(
    image: ImageReader,
    detections: Detections,
    path: Path,
    *,
    categories: Sequence[Category],
    ground_truth: ImageRecord | None = None,
    min_score: float = 0.3,
) -> None:
    """Write a picture of an image with its detections; small images are enlarged, very large ones reduced.

    Without ground truth, each class has a colour. With ground truth, true positives, false positives and false
    negatives (IoU 0.5) have one each, with a legend.

    Args:
        image: opened, see `open_image`.
        detections: image frame, highest score first.
        path: of the picture.
        categories: by label.
        ground_truth: of the image.
        min_score: detections below this score are neither drawn nor matched.
    """
    sheet, zoom = _resize_for_viewing(image)
    draw = ImageDraw.Draw(sheet)
    unit = max(max(sheet.size) / _MIN_LONG_SIDE, 1.0)
    shown = detections[detections.scores >= min_score]
    names = picture_names(categories)

    def draw_box(box: np.ndarray, text: str, color: str) -> None:
        scaled = box * zoom
        draw.rectangle(tuple(scaled.tolist()), outline=color, width=round(2 * unit))
        _write_name(draw, text, scaled, color=color, height=round(13 * unit))

    colors = [PALETTE[label % len(PALETTE)] for label in shown.labels.tolist()]
    counts: dict[str, int] = {}
    if ground_truth is not None:
        matches = match_detections(shown, ground_truth)
        kinds = np.where(matches.is_ignored, "ignored", "false positive")
        kinds = np.where(matches.is_true_positive, "true positive", kinds)
        colors = [_MATCHES[kind] for kind in kinds.tolist()]
        counts = {kind: int((kinds == kind).sum()) for kind in ("true positive", "false positive")}
        counts["false negative"] = int(matches.is_missed.sum())
        of_objects = [names[label] for label in ground_truth.labels.tolist()]
        for index in np.flatnonzero(ground_truth.is_crowd).tolist():
            draw_box(ground_truth.boxes[index], f"crowd: {of_objects[index]}", _MATCHES["ignored"])
        for index in np.flatnonzero(matches.is_missed).tolist():
            draw_box(ground_truth.boxes[index], of_objects[index], _MATCHES["false negative"])
    for index in reversed(range(len(shown))):  # the highest score on top
        name = names[int(shown.labels[index])]
        draw_box(shown.boxes[index], f"{name} {shown.scores[index]:.2f}", colors[index])
    _write_legend(draw, counts, unit=unit)
    sheet.save(path)


def _resize_for_viewing(image: ImageReader) -> tuple[Image.Image, float]:
    """Return the image in a size that can be viewed, and the zoom from the image to it."""
    longest = max(image.width, image.height)
    zoom = min(max(1.0, _MIN_LONG_SIDE / longest), _MAX_LONG_SIDE / longest)
    reduction = image.largest_reduction(1 << max(int(1 / zoom).bit_length() - 1, 0)) if zoom < 1 else 1
    pixels = image.read((0, 0, image.width, image.height), reduction=reduction)
    sides = (max(round(image.width * zoom), 1), max(round(image.height * zoom), 1))
    return Image.fromarray(pixels).resize(sides), zoom


def _write_legend(draw: ImageDraw.ImageDraw, counts: Mapping[str, int], *, unit: float) -> None:
    """Write the number of each kind of match on its colour, in the upper left corner."""
    font, x, y = load_font(round(18 * unit)), round(6 * unit), round(6 * unit)
    for kind, count in counts.items():
        text = f"{count} {kind}" if count == 1 else f"{count} {kind}s"
        _, _, right, bottom = draw.textbbox((0, 0), text, font=font)
        draw.rectangle((x, y, x + right + 8 * unit, y + bottom + 6 * unit), fill=_MATCHES[kind])
        draw.text((x + 4 * unit, y + 2 * unit), text, fill="black", font=font)
        x += round(right + 14 * unit)


def _draw_chip(sample: ChipSample, *, side: int) -> Image.Image:
    height, width = sample.pixels.shape[:2]
    zoom = side / max(height, width)
    cell = Image.new("RGB", (side, side), _SHEET_BACKGROUND)
    pixels = Image.fromarray(np.ascontiguousarray(sample.pixels))
    cell.paste(pixels.resize((max(round(width * zoom), 1), max(round(height * zoom), 1))))
    draw = ImageDraw.Draw(cell)
    for index in np.argsort(-sample.target.status, kind="stable"):  # valid boxes on top
        color, _ = _STATUS[BoxStatus(int(sample.target.status[index]))]
        draw.rectangle(tuple((sample.target.boxes[index] * zoom).tolist()), outline=color, width=2)
    return cell


def _write_name(
    draw: ImageDraw.ImageDraw,
    text: str,
    box: np.ndarray,
    *,
    color: str,
    height: int,
) -> None:
    """Write a line of text on a coloured ground above a box or, at the upper border of the picture, inside it."""
    font = load_font(height, text)
    left, _, right, bottom = draw.textbbox((0, 0), text, font=font)
    ground = bottom + 2
    y = box[1] - ground if box[1] >= ground else box[1]
    draw.rectangle((box[0], y, box[0] + right - left + 4, y + ground), fill=color)
    draw.text((box[0] + 2, y), text, fill="black", font=font)
