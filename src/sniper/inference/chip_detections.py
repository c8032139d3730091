"""Bring detections that were made on chips back to the images that the chips are cut from, and merge them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int

from sniper.config.experiment import PredictSpec
from sniper.data.chip_manifest import ChipEntry, ChipManifest
from sniper.data.datasets import Category
from sniper.data.datasets.write import written_ids
from sniper.errors import DetectionsError, count_and_list, counted, describe_os_error
from sniper.evaluation.results import DetectionTable, load_detections
from sniper.files import read_bytes
from sniper.geometry import Detections
from sniper.geometry.boxes import Sides, area, clip, from_xywh, to_xywh
from sniper.geometry.mask_frames import move_masks
from sniper.geometry.masks import MaskArrays
from sniper.inference.merging import merge
from sniper.inference.windows import FreeWindow, Tiling, TilingWindow, Window, WindowDetections, join_windows

CategoryIds = Literal["ids", "from-0", "from-1"]
"""How category ids of detections on chips stand for categories: as in the annotations of the chips, or counted."""

_DECIMALS = 4  # of coordinates in results: 0.0001 pixels
_COLUMNS = 6  # of a line of YOLO's detections: class, centre, sides, confidence
_LARGEST_FRACTION = 2.0  # of a side; a detection may reach beyond its chip, but not by pixels
_LARGEST_OFFSET = 0.125  # of a side, from a chip to the centre of a box: detectors see noise in its padding
_MAX_LISTED = 5


@dataclass(frozen=True, kw_only=True, eq=False)
class ChipDetections:
    """Detections on chips.

    Attributes:
        chips: (n,) index of the chip of each in the manifest.
        detections: all of them, each in the frame of its chip.
        masks: of all of them, in the same frames; None where none has one.
    """

    chips: Int[np.ndarray, " n"]
    detections: Detections
    masks: MaskArrays | None = None


@dataclass(frozen=True, kw_only=True)
class MergedImage:
    """The merged detections of an image.

    Attributes:
        image_id: of the image.
        file_name: of the image.
        detections: image frame, best first.
        masks: of the detections, image frame; None where no detection of any image has one.
    """

    image_id: int | str
    file_name: str
    detections: Detections
    masks: MaskArrays | None = None


def load_chip_detections(
    path: Path, manifest: ChipManifest, *, category_ids: CategoryIds = "ids"
) -> tuple[ChipDetections, tuple[Category, ...]]:
    """Read detections that were made on chips.

    Args:
        path: COCO results (JSON), whose `image_id` is the id of a chip, the name of its file, or that without folder
            or suffix; or a folder of text files with lines of class, x and y of the centre, width, height and
            confidence, as fractions of the sides of the chip, as YOLO writes them.
        manifest: of the chips.
        category_ids: what `category_id` of COCO results means: an id in the annotations of the chips, or the number
            of a class from 0 or from 1.

    Returns:
        The detections, with labels of the categories; and the categories.

    Raises:
        DetectionsError: listing what cannot be used.
    """
    if path.is_dir():
        return _read_text_files(path, manifest), manifest.head.categories
    return _read_results(path, manifest, category_ids=category_ids)


def merge_chips(
    chips: ChipDetections,
    manifest: ChipManifest,
    spec: PredictSpec,
    *,
    in_valid_range: bool = True,
    on_progress: Callable[[int, int], None] = lambda num_done, num_images: None,
) -> Iterator[MergedImage]:
    """Merge the detections of each image as a search does: windows and levels are joined, duplicates merged.

    Args:
        chips: the detections.
        manifest: of the chips.
        spec: how overlapping detections are merged.
        in_valid_range: keep only detections of a size in the range of the level of their chip.
        on_progress: called after each image with the number so far, and of all.

    Returns:
        Of each image that has a chip, in the order of the manifest, whether it has detections or not.
    """
    order = np.argsort(chips.chips, kind="stable")
    starts = np.searchsorted(chips.chips[order], np.arange(len(manifest.chips) + 1))
    of_image: dict[int | str, list[int]] = {}
    for index, entry in enumerate(manifest.chips):
        of_image.setdefault(entry.image_id, []).append(index)
    for num_done, indices in enumerate(of_image.values(), start=1):
        windows = []
        for index in indices:
            rows = order[starts[index] : starts[index + 1]]
            if len(rows):
                on_chip = replace(chips.detections[rows], sources=rows)
                windows.append(_on_image(manifest.chips[index], on_chip, in_valid_range=in_valid_range))
        first = manifest.chips[indices[0]]
        merged = merge(_inside(join_windows(windows), first), spec)
        yield MergedImage(
            image_id=first.image_id,
            file_name=first.image,
            detections=merged,
            masks=None if chips.masks is None else _masks_on_image(chips, manifest, merged.sources),
        )
        on_progress(num_done, len(of_image))


def _masks_on_image(
    chips: ChipDetections, manifest: ChipManifest, rows: Int[np.ndarray, " k"] | None
) -> MaskArrays:
    """Return the masks of some of the detections, all of one image, in its frame."""
    assert chips.masks is not None
    if rows is None or not len(rows):
        return MaskArrays.none()
    moved, order = [], []
    for index in np.unique(chips.chips[rows]).tolist():
        places = np.flatnonzero(chips.chips[rows] == index)
        entry = manifest.chips[index]
        sides = Sides(entry.image_width, entry.image_height)
        moved.append(move_masks(chips.masks.select(rows[places]), entry.chip.to_image, sides=sides))
        order.append(places)
    return MaskArrays.concatenate(moved).select(np.argsort(np.concatenate(order)))


def to_results(image: MergedImage, categories: Sequence[Category]) -> list[dict[str, Any]]:
    """Convert the detections of an image to COCO results: boxes as xywh to 0.0001 px, scores to 5 digits, masks.

    Args:
        image: the image with its detections.
        categories: by label.
    """
    found = image.detections
    boxes = np.round(to_xywh(found.boxes), _DECIMALS).tolist()
    masks = [None] * len(found) if image.masks is None else image.masks.to_coco()
    return [
        {
            "image_id": image.image_id,
            "category_id": categories[label].category_id,
            "bbox": box,
            "score": round(score, 5),
            "category_name": categories[label].name,
            "file_name": image.file_name,
            **({} if mask is None else {"segmentation": mask}),
        }
        for box, score, label, mask in zip(
            boxes, found.scores.tolist(), found.labels.tolist(), masks, strict=True
        )
    ]


def _on_image(entry: ChipEntry, detections: Detections, *, in_valid_range: bool) -> WindowDetections:
    """Return the detections on a chip in the frame of its image."""
    chip = entry.chip
    if entry.window is None:
        sides = chip.visible
        corners = (chip.x, chip.y, chip.x + sides.width, chip.y + sides.height)
        window: Window = FreeWindow(level=chip.level, corners=corners)
        return WindowDetections.of(window, detections, in_valid_range=in_valid_range)
    tiling = Tiling.of(chip.level, limit=entry.window)
    column = [start for start, _ in tiling.x_axis.spans].index(entry.x)
    row = [start for start, _ in tiling.y_axis.spans].index(entry.y)
    window = TilingWindow.of(tiling, column=column, row=row)
    return WindowDetections.of(window, detections, in_valid_range=in_valid_range)


def _inside(detections: Detections, entry: ChipEntry) -> Detections:
    """Clip detections to their image; those that lie in the padding of a chip are dropped."""
    boxes = clip(detections.boxes, width=entry.image_width, height=entry.image_height)
    return replace(detections, boxes=boxes)[np.flatnonzero(area(boxes) > 0)]


def _read_results(
    path: Path, manifest: ChipManifest, *, category_ids: CategoryIds
) -> tuple[ChipDetections, tuple[Category, ...]]:
    table = load_detections(path)
    keys = _chip_keys(manifest)
    ids, inverse = np.unique(table.image_ids, return_inverse=True)
    found = [keys.get(image_id) for image_id in ids.tolist()]
    unknown = [repr(image_id) for image_id, index in zip(ids.tolist(), found, strict=True) if index is None]
    if unknown:
        raise DetectionsError(
            f"{path}: {len(unknown)} values of image_id are no chips of {manifest.path} "
            f"({count_and_list(unknown, limit=_MAX_LISTED)}); expected ids such as {manifest.chips[0].chip_id}, or "
            f"names such as {PurePosixPath(manifest.chips[0].file_name).stem!r}"
            if manifest.chips
            else f"{manifest.path}: has no chips"
        )
    categories = manifest.head.categories or _categories_of(table)
    label_of = _label_of(categories, category_ids)
    given = sorted(set(table.category_ids.tolist()), key=str)
    wrong = [repr(number) for number in given if number not in label_of]
    if wrong:
        raise DetectionsError(
            f"{path}: {len(wrong)} values of category_id are no categories of the chips "
            f"({count_and_list(wrong, limit=_MAX_LISTED)}); expected {_describe_ids(label_of, categories)}. Where "
            "classes are numbered from 0 or from 1 instead, --category-ids from-0 or from-1 reads them"
        )
    labels = np.array([label_of[number] for number in table.category_ids.tolist()], dtype=np.int64)
    chips = (
        np.array(found, dtype=np.int64)[inverse.reshape(-1)] if len(table) else np.zeros(0, dtype=np.int64)
    )
    _check_boxes(table.boxes, chips, manifest, path=path)
    detections = Detections(boxes=from_xywh(table.boxes), scores=table.scores, labels=labels)
    if table.masks is not None:
        _check_masks(table.masks, chips, manifest, path=path)
    return ChipDetections(chips=chips, detections=detections, masks=table.masks), categories


def _check_boxes(
    boxes: Float[np.ndarray, "n 4"], chips: Int[np.ndarray, " n"], manifest: ChipManifest, *, path: Path
) -> None:
    """Check that boxes (xywh, chip frame) are where a detector can see objects of their chip.

    They may reach beyond it: not all detectors clip boxes, and some complete objects that are cut off.

    Raises:
        DetectionsError: if the centre of a box is outside of its chip, or a box has more than twice its sides.
    """
    sides = _sides_of(manifest, chips)
    offsets = np.abs(boxes[:, :2] + boxes[:, 2:] / 2 - sides / 2) - sides / 2
    is_wrong = ((offsets > sides * _LARGEST_OFFSET) | (boxes[:, 2:] > sides * _LARGEST_FRACTION)).any(axis=1)
    if is_wrong.any():
        row = int(is_wrong.argmax())
        width, height = sides[row].tolist()
        raise DetectionsError(
            f"{path}: {counted(int(is_wrong.sum()), 'box lies', 'boxes lie')} outside of the chip; entry {row} on "
            f"{manifest.chips[int(chips[row])].file_name}, which has {width}x{height} pixels: bbox is "
            f"{np.round(boxes[row], 2).tolist()}. Expected x, y, width and height in pixels of the chips of "
            f"{manifest.path}"
        )


def _sides_of(manifest: ChipManifest, chips: Int[np.ndarray, " n"]) -> Int[np.ndarray, "n 2"]:
    """Return the width and height of the files of chips."""
    sides = [(entry.width, entry.height) for entry in manifest.chips]
    return np.array(sides, dtype=np.int64).reshape(-1, 2)[chips]


def _check_masks(
    masks: MaskArrays, chips: Int[np.ndarray, " n"], manifest: ChipManifest, *, path: Path
) -> None:
    """Check that run lengths have the sides of the file of their chip, and fill it.

    Raises:
        DetectionsError: if some do not.
    """
    expected = _sides_of(manifest, chips)
    is_wrong = masks.is_encoded & ((masks.sides != expected).any(axis=1) | masks.measure().is_invalid)
    if is_wrong.any():
        row = int(is_wrong.argmax())
        width, height = expected[row].tolist()
        given_width, given_height = masks.sides[row].tolist()
        raise DetectionsError(
            f"{path}: {counted(int(is_wrong.sum()), 'mask')} with run lengths that do not fill the chip; entry {row} "
            f"on {manifest.chips[int(chips[row])].file_name}: size is [{given_height}, {given_width}], expected "
            f"[{height}, {width}] and counts that add up to its pixels"
        )


def _chip_keys(manifest: ChipManifest) -> dict[int | str, int]:
    """Return the index of each chip by everything that results may name it by."""
    keys: dict[int | str, int] = {}
    for index, entry in enumerate(manifest.chips):
        name = PurePosixPath(entry.file_name)
        for key in (entry.chip_id, str(entry.chip_id), entry.file_name, name.name, name.stem):
            keys.setdefault(key, index)
    return keys


def _categories_of(table: DetectionTable) -> tuple[Category, ...]:
    """Return the categories that results have, where those of the chips are not known."""
    ids = sorted(set(table.category_ids.tolist()), key=lambda number: (isinstance(number, str), number))
    return tuple(
        Category(category_id=number, name=table.class_names.get(number, str(number))) for number in ids
    )


def _label_of(categories: Sequence[Category], category_ids: CategoryIds) -> Mapping[int | str, int]:
    if category_ids == "ids":
        by_id: dict[int | str, int] = {category.category_id: i for i, category in enumerate(categories)}
        by_id.update(zip(written_ids(categories), range(len(categories)), strict=True))
        return by_id
    first = 0 if category_ids == "from-0" else 1
    return {label + first: label for label in range(len(categories))}


def _describe_ids(label_of: Mapping[int | str, int], categories: Sequence[Category]) -> str:
    listed = [f"{number} ({categories[label].name})" for number, label in label_of.items()]
    return count_and_list(listed, limit=_MAX_LISTED, separator=", ")


def _read_text_files(folder: Path, manifest: ChipManifest) -> ChipDetections:
    """Read YOLO's text files of detections; chips without a file have none."""
    index_of = {PurePosixPath(entry.file_name).stem: index for index, entry in enumerate(manifest.chips)}
    files = sorted(folder.glob("*.txt"))
    unknown = [file.name for file in files if file.stem not in index_of]
    problems = []
    if not files:
        problems.append(
            "has no text files (*.txt); expected one for each chip with detections, as save_txt writes"
        )
    elif unknown:
        problems.append(
            f"{len(unknown)} files are of no chip of {manifest.path} ({count_and_list(unknown, limit=_MAX_LISTED)})"
        )
    num_classes = len(manifest.head.categories)
    chips, rows = [], []
    for file in files if not problems else ():
        entry = manifest.chips[index_of[file.stem]]
        for number, line in enumerate(_read_lines(file), start=1):
            values = line.split()
            if not values:
                continue
            problem = _problem_of(values, num_classes=num_classes)
            if problem is not None:
                problems.append(f"{file.name}, line {number}: {problem}")
                continue
            label, x, y, width, height, score = map(float, values)
            sides = (entry.width, entry.height, entry.width, entry.height)
            edges = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
            chips.append(index_of[file.stem])
            rows.append([*(edge * side for edge, side in zip(edges, sides, strict=True)), score, label])
    if problems:
        listed = count_and_list(problems, limit=_MAX_LISTED, separator="\n  ")
        raise DetectionsError(f"{folder}: {listed}")
    columns = np.array(rows, dtype=np.float64).reshape(-1, 6)
    return ChipDetections(
        chips=np.array(chips, dtype=np.int64),
        detections=Detections(
            boxes=columns[:, :4], scores=columns[:, 4], labels=columns[:, 5].astype(np.int64)
        ),
    )


def _read_lines(file: Path) -> list[str]:
    try:
        return read_bytes(file).decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = describe_os_error(error) if isinstance(error, OSError) else "it is no text"
        raise DetectionsError(f"{file}: cannot be read ({reason})") from error


def _problem_of(values: Sequence[str], *, num_classes: int) -> str | None:
    """Describe why a line of YOLO's detections cannot be read; None if it can."""
    expected = "expected class, x, y, width, height, confidence"
    if len(values) != _COLUMNS:
        is_short = len(values) == _COLUMNS - 1
        return f"has {'no confidence' if is_short else f'{len(values)} values'}; {expected} (save_conf=True)"
    try:
        label, *numbers = map(float, values)
    except ValueError:
        return f"{expected}, got {' '.join(values)[:60]!r}"
    if label not in range(num_classes):
        return f"class {values[0]}, expected 0 to {num_classes - 1}"
    if not np.isfinite(numbers).all() or min(numbers[2:4]) < 0 or max(numbers[:4]) > _LARGEST_FRACTION:
        return f"expected fractions of the sides of the chip, and a confidence, got {' '.join(values[1:])}"
    return None
