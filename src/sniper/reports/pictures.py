"""Draw pictures: chips with their boxes, and images with their detections."""

import io
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float, Int
from PIL import Image, ImageDraw

from sniper.chips import BoxStatus
from sniper.data.datasets import Category, ImageRecord
from sniper.data.images.files import ImageReader
from sniper.errors import counted
from sniper.evaluation.matching import match_detections
from sniper.files import write_bytes
from sniper.geometry import Detections
from sniper.geometry.boxes import size
from sniper.geometry.detection_masks import DetectionMasks
from sniper.reports.fonts import load_font, picture_names
from sniper.reports.labels import place_labels
from sniper.reports.palette import CLASS_COLORS, GREY, ORANGE, PURPLE, SKY_BLUE, text_color

if TYPE_CHECKING:
    from sniper.data.batches import ChipDataset, ChipSample

_STATUS = {
    BoxStatus.VALID: (SKY_BLUE, "valid"),
    BoxStatus.OUT_OF_RANGE: (ORANGE, "out of range"),
    BoxStatus.IGNORE: (GREY, "ignore"),
}
FOCUS_KINDS = ((PURPLE, "missed where searched"), (ORANGE, "missed where not searched"), (SKY_BLUE, "found"))
"""The objects in pictures of a focus: whether they are found, and whether their level was searched where they are."""

_BACKGROUND = "#202020"
_GAP = 8  # pixels between the chips of a sheet
_MATCHES = {
    "true positive": SKY_BLUE,
    "false positive": ORANGE,
    "false negative": PURPLE,
    "ignored": GREY,
}
_MIN_LONG_SIDE = 1200  # pixels of a picture, so that labels beside small boxes can be read
_MAX_LONG_SIDE = 6000  # pixels of a picture, so that it can be opened
_LETTERS, _MIN_LETTERS, _MAX_LETTERS = (
    0.3,
    12,
    1 / 50,
)  # of the objects' size; pixels; of the picture's long side
_LINE, _MAX_LINE = 1 / 30, 1 / 300  # of the objects' size; of the picture's long side
_LEGEND_LETTERS = 1 / 70  # of the picture's long side
_MAX_LEGEND_CLASSES = 20
_QUALITY = 90  # of JPEG
_SHADE = 0.35  # brightness of what was not searched


def draw_chips(chips: "ChipDataset", path: Path, *, count: int = 12, side: int = 384) -> None:
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
    pitch = side + _GAP
    sheet = Image.new("RGB", (columns * pitch + _GAP, rows * pitch + _GAP), _BACKGROUND)
    for index, cell in enumerate(cells):
        sheet.paste(cell, (_GAP + index % columns * pitch, _GAP + index // columns * pitch))
    save_picture(_with_legend(sheet, list(_STATUS.values()), letters=18), path)


def draw_detections(
    image: ImageReader,
    detections: Detections,
    path: Path,
    *,
    categories: Sequence[Category],
    ground_truth: ImageRecord | None = None,
    min_score: float | None = None,
) -> None:
    """Write a picture of an image with its detections; small images are enlarged, very large ones reduced.

    Detections and objects with a mask are outlined; the others have their box. Lines and letters suit the median size
    of the objects. A label that would cover another box or label is shortened to its score, or left out. Without ground
    truth, each class has a colour. With ground truth, true positives, false positives and false negatives (IoU 0.5)
    have one each. A legend below explains the colours.

    Args:
        image: opened, see `open_image`.
        detections: image frame; `Detections.confident` selects those that are drawn and matched.
        path: of the picture, as its suffix says; JPEG is a tenth of PNG.
        categories: by label.
        ground_truth: of the image.
        min_score: see `Detections.confident`.
    """
    sheet, zoom = _resize_for_viewing(image)
    shown = detections.confident(min_score)
    names = picture_names(categories)
    marks = _mark_classes(shown, names)
    if ground_truth is not None:
        marks = _mark_matches(shown, names, ground_truth)
    sizes = size(marks.boxes) * zoom
    letters, line = _suit(sizes, long_side=max(sheet.size))
    _draw_marks(sheet, marks, zoom=zoom, letters=letters, line=line)
    legend_letters = max(round(max(sheet.size) * _LEGEND_LETTERS), _MIN_LETTERS)
    save_picture(_with_legend(sheet, marks.legend, letters=legend_letters), path)


def draw_focus(
    image: ImageReader,
    detections: Detections,
    path: Path,
    *,
    ground_truth: ImageRecord,
    searched: Float[np.ndarray, "w 4"],
    is_shown: Bool[np.ndarray, " n"],
    min_score: float | None = None,
) -> None:
    """Write a picture of what a search with a focus has shown, found and missed; the rest of the image is darker.

    Args:
        image: opened, see `open_image`.
        detections: image frame; those of `Detections.confident` are matched (IoU 0.5).
        path: of the picture.
        ground_truth: of the image.
        searched: (w, 4) xyxy, image frame, the windows of the levels that have a focus.
        is_shown: (n,) for each object, whether a level that answers for it has shown it in a window.
        min_score: see `Detections.confident`.
    """
    sheet, zoom = _resize_for_viewing(image)
    windows = [tuple(window) for window in np.round(searched * zoom).astype(int).tolist()]
    is_searched = Image.new("L", sheet.size, 0)
    for window in windows:
        ImageDraw.Draw(is_searched).rectangle(window, fill=255)
    sheet = Image.composite(sheet, sheet.point(lambda value: value * _SHADE), is_searched)
    for window in windows:
        ImageDraw.Draw(sheet).rectangle(window, outline=GREY)
    matches = match_detections(detections.confident(min_score), ground_truth)
    is_missed = matches.is_missed
    is_of_kind = (is_missed & is_shown, is_missed & ~is_shown, ~is_missed & ~ground_truth.is_crowd)
    rows = [np.flatnonzero(is_of_one) for is_of_one in is_of_kind]
    order = np.concatenate(rows)
    marks = _Marks(
        boxes=ground_truth.boxes[order],
        colors=[color for (color, _), of_kind in zip(FOCUS_KINDS, rows, strict=True) for _ in of_kind],
        texts=[()] * len(order),
        outlines=_outlines_of_objects(ground_truth, order),
        legend=[
            (color, f"{len(of_kind)} {name}")
            for (color, name), of_kind in zip(FOCUS_KINDS, rows, strict=True)
        ],
    )
    letters, line = _suit(size(marks.boxes) * zoom, long_side=max(sheet.size))
    _draw_marks(sheet, marks, zoom=zoom, letters=letters, line=line)
    legend_letters = max(round(max(sheet.size) * _LEGEND_LETTERS), _MIN_LETTERS)
    save_picture(_with_legend(sheet, marks.legend, letters=legend_letters), path)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Marks:
    """What is drawn on an image: boxes with colours and labels, those on top first.

    Attributes:
        boxes: (n, 4) xyxy, image frame.
        colors: of each box.
        texts: of each label: whole, and shortened.
        outlines: of the mask of each box: rings of (p, 2) xy, image frame; a box without rings is drawn itself.
        legend: colours and what they mean.
    """

    boxes: Float[np.ndarray, "n 4"]
    colors: Sequence[str]
    texts: Sequence[Sequence[str]]
    outlines: Sequence[Sequence[Float[np.ndarray, "_ 2"]]]
    legend: Sequence[tuple[str, str]]


def _mark_classes(shown: Detections, names: Sequence[str]) -> _Marks:
    """Mark detections with a colour for each class."""
    labels, counts = np.unique(shown.labels, return_counts=True)
    by_count = sorted(zip((-counts).tolist(), labels.tolist(), strict=True))
    legend = [(_color(label), f"{-count} {names[label]}") for count, label in by_count[:_MAX_LEGEND_CLASSES]]
    if len(by_count) > _MAX_LEGEND_CLASSES:
        legend.append(
            (_BACKGROUND, f"and {counted(len(by_count) - _MAX_LEGEND_CLASSES, 'more class', 'more classes')}")
        )
    colors = [_color(label) for label in shown.labels.tolist()]
    num_classes = Counter(_color(label) for label in labels.tolist())  # of each colour
    texts = [
        [score] if len(labels) == 1 else [whole, score][: 1 if num_classes[color] > 1 else 2]
        for (whole, score), color in zip(_label_texts(shown, names), colors, strict=True)
    ]
    return _Marks(
        boxes=shown.boxes,
        colors=colors,
        texts=texts,
        outlines=_outlines_of(shown.masks, count=len(shown)),
        legend=legend or [(_BACKGROUND, "no detections")],
    )


def _mark_matches(shown: Detections, names: Sequence[str], truth: ImageRecord) -> _Marks:
    """Mark detections, missed objects and crowds with a colour for each kind of match."""
    matches = match_detections(shown, truth)
    kinds = np.where(matches.is_ignored, "ignored", "false positive")
    kinds = np.where(matches.is_true_positive, "true positive", kinds)
    counts = {kind: int((kinds == kind).sum()) for kind in ("true positive", "false positive")}
    counts["false negative"] = int(matches.is_missed.sum())
    legend = [(_MATCHES[kind], counted(count, kind)) for kind, count in counts.items()]
    if matches.is_ignored.any() or truth.is_crowd.any():
        legend.append((_MATCHES["ignored"], "crowds, and detections in them"))
    missed, crowds = np.flatnonzero(matches.is_missed), np.flatnonzero(truth.is_crowd)
    of_objects = [names[label] for label in truth.labels.tolist()]
    has_one_class = len({*shown.labels.tolist(), *truth.labels.tolist()}) == 1
    return _Marks(
        boxes=np.concatenate([shown.boxes, truth.boxes[missed], truth.boxes[crowds]]),
        colors=[
            *(_MATCHES[kind] for kind in kinds.tolist()),
            *[_MATCHES["false negative"]] * len(missed),
            *[_MATCHES["ignored"]] * len(crowds),
        ],
        texts=[
            *(texts[has_one_class:] for texts in _label_texts(shown, names)),
            *([of_objects[index]] * (not has_one_class) for index in missed.tolist()),
            *([f"crowd: {of_objects[index]}", "crowd"] for index in crowds.tolist()),
        ],
        outlines=[
            *_outlines_of(shown.masks, count=len(shown)),
            *_outlines_of_objects(truth, np.concatenate([missed, crowds])),
        ],
        legend=legend,
    )


def _outlines_of(masks: DetectionMasks | None, *, count: int) -> list[list[Float[np.ndarray, "_ 2"]]]:
    """Return the rings of each mask, holes among them; none for each of `count` boxes without masks."""
    if masks is None:
        return [[] for _ in range(count)]
    return [[ring for part in masks.outlines(row) for ring in part] for row in range(len(masks))]


def _outlines_of_objects(
    truth: ImageRecord, rows: Int[np.ndarray, " k"]
) -> list[list[Float[np.ndarray, "_ 2"]]]:
    """Return the rings of the mask of some annotated objects; none for those without a mask."""
    masks = None if truth.masks is None else DetectionMasks.from_arrays(truth.masks.select(rows))
    return _outlines_of(masks, count=len(rows))


def _label_texts(shown: Detections, names: Sequence[str]) -> list[list[str]]:
    """Return the texts of each label: with the name of the class, and the score alone."""
    return [
        [f"{names[label]} {score:.2f}", f"{score:.2f}"]
        for label, score in zip(shown.labels.tolist(), shown.scores.tolist(), strict=True)
    ]


def _color(label: int) -> str:
    return CLASS_COLORS[label % len(CLASS_COLORS)]


def _suit(sizes: Float[np.ndarray, " n"], *, long_side: int) -> tuple[int, int]:
    """Return the height of letters and the width of lines that suit objects, all in pixels of the picture."""
    median = float(np.median(sizes)) if len(sizes) else 0.0
    letters = min(max(_LETTERS * median, _MIN_LETTERS), max(_MAX_LETTERS * long_side, _MIN_LETTERS))
    line = min(max(_LINE * median, 1.0), max(_MAX_LINE * long_side, 1.0))
    return round(letters), round(line)


def _draw_marks(sheet: Image.Image, marks: _Marks, *, zoom: float, letters: int, line: int) -> None:
    """Draw boxes around the objects or outlines of them, and labels where they cover nothing else."""
    draw = ImageDraw.Draw(sheet)
    outlines = np.round(marks.boxes * zoom) + np.array([-line, -line, line, line])
    outlines = np.clip(outlines, 0, [sheet.width - 1, sheet.height - 1] * 2)  # seen at the border, too
    marked = zip(outlines, marks.colors, marks.outlines, strict=True)
    for outline, color, rings in reversed(list(marked)):  # the first on top
        for ring in rings:
            draw.line(
                [tuple(point) for point in (ring * zoom).tolist()], fill=color, width=line, joint="curve"
            )
        if not rings:
            draw.rectangle(tuple(outline.tolist()), outline=color, width=line)
    padding = max(letters // 6, 1)

    def measure(text: str) -> tuple[int, int]:
        left, _, right, bottom = draw.textbbox((0, 0), text, font=load_font(letters, text))
        return math.ceil(right - left) + 2 * padding, math.ceil(bottom) + padding

    width, height = sheet.size
    boxes = outlines + np.array([0, 0, 1, 1])  # the outlines include their last pixel
    for label in place_labels(boxes, marks.texts, measure=measure, width=width, height=height):
        x1, y1, x2, y2 = label.box.tolist()
        color = marks.colors[label.index]
        draw.rectangle((x1, y1, x2 - 1, y2 - 1), fill=color)
        font = load_font(letters, label.text)
        draw.text((x1 + padding, y1), label.text, fill=text_color(color), font=font)


def _with_legend(sheet: Image.Image, entries: Sequence[tuple[str, str]], *, letters: int) -> Image.Image:
    """Add a strip below a picture, with a swatch and a text for each entry, in as many lines as it takes."""
    swatch, gap = letters, letters // 2
    fonts = [load_font(letters, text) for _, text in entries]
    widths = [
        swatch + gap + math.ceil(font.getlength(text)) for font, (_, text) in zip(fonts, entries, strict=True)
    ]
    width = max(sheet.width, max(widths) + 2 * gap)
    line_height = 2 * letters
    places, x, y = [], gap, sheet.height + gap
    for entry_width in widths:
        if x > gap and x + entry_width > width - gap:
            x, y = gap, y + line_height
        places.append((x, y))
        x += entry_width + 3 * gap
    picture = Image.new("RGB", (width, y + line_height), _BACKGROUND)
    picture.paste(sheet)
    draw = ImageDraw.Draw(picture)
    for (x, y), (color, text), font in zip(places, entries, fonts, strict=True):
        draw.rectangle((x, y + 2, x + swatch, y + 2 + swatch), fill=color)
        draw.text((x + swatch + gap, y), text, fill="white", font=font)
    return picture


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a picture as JPEG or PNG, by its suffix; JPEG with colours in full resolution, for sharp lines.

    Raises:
        OSError: if it cannot be written; names the file.
    """
    content = io.BytesIO()  # Pillow does not notice when an open file takes only a part of what it writes
    if path.suffix.lower() in (".jpg", ".jpeg"):
        picture.save(content, "JPEG", quality=_QUALITY, subsampling=0)
    else:
        picture.save(content, "PNG")
    write_bytes(path, content.getvalue())


def _resize_for_viewing(image: ImageReader) -> tuple[Image.Image, float]:
    """Return the image in a size that can be viewed, and the zoom from the image to it."""
    longest = max(image.width, image.height)
    zoom = min(max(1.0, _MIN_LONG_SIDE / longest), _MAX_LONG_SIDE / longest)
    reduction = image.largest_reduction(1 << max(int(1 / zoom).bit_length() - 1, 0)) if zoom < 1 else 1
    pixels = image.read((0, 0, image.width, image.height), reduction=reduction)
    sides = (max(round(image.width * zoom), 1), max(round(image.height * zoom), 1))
    return Image.fromarray(pixels).resize(sides), zoom


def _draw_chip(sample: "ChipSample", *, side: int) -> Image.Image:
    height, width = sample.pixels.shape[:2]
    zoom = side / max(height, width)
    cell = Image.new("RGB", (side, side), _BACKGROUND)
    pixels = Image.fromarray(np.ascontiguousarray(sample.pixels))
    cell.paste(pixels.resize((max(round(width * zoom), 1), max(round(height * zoom), 1))))
    draw = ImageDraw.Draw(cell)
    for index in np.argsort(-sample.target.status, kind="stable"):  # valid boxes on top
        color, _ = _STATUS[BoxStatus(int(sample.target.status[index]))]
        draw.rectangle(tuple((sample.target.boxes[index] * zoom).tolist()), outline=color, width=2)
    return cell
