"""Read COCO JSON and check every entry, so that later code can trust the data set.

`docs/annotations.md` lists what is accepted, corrected and refused.
"""

import os
import reprlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from sniper.chips.targets import is_learnable
from sniper.data.datasets.dataset import Category, Dataset
from sniper.data.datasets.image_files import check_image_file, find_image_root, leaves_root
from sniper.data.spec import DataSpec, ReadSpec
from sniper.errors import AnnotationError, count_and_list
from sniper.files import read_json
from sniper.geometry.boxes import Sides, area, from_xywh

_MAX_PROBLEMS = 20  # listed in an error; the rest are counted
_MAX_EXAMPLES = 3  # listed in a warning
_TOLERANCE = 1e-3  # pixels by which rounded decimals may reach beyond the border of an image


def load_dataset(
    path: str | os.PathLike[str],
    *,
    image_root: str | os.PathLike[str] | None = None,
    has_images: bool = True,
    data: DataSpec = DataSpec(),
) -> Dataset:
    """Load a COCO JSON file and check it; see `docs/annotations.md`.

    Args:
        path: of the file.
        image_root: folder that file names are relative to; by default `images` beside the file if there is such a
            folder, the file's own folder otherwise.
        has_images: whether the image files are available; their headers are compared with the annotations.
        data: how images are read (`read`), and whether problems of image files are warnings instead of errors
            (`on_bad_image`); the data sets that it names are not used.

    Returns:
        The data set; its `warnings` list what was corrected or cannot be used.

    Raises:
        AnnotationError: listing the problems of the file, one a line; the first 20 in words, the rest as a count.
    """
    path = Path(path)
    root = find_image_root(path) if image_root is None else Path(image_root)
    tables = _read_tables(path)
    categories = _check_categories(tables["categories"])
    images = _check_images(tables["images"])
    bad_files = _find_bad_files(images, root, data.read) if has_images else []
    if data.on_bad_image == "refuse":
        images.table.problems += bad_files
        bad_files = []
    boxes = _check_boxes(tables["annotations"], images, categories)
    _raise_for(path, [*categories.table.problems, *images.table.problems, *boxes.table.problems])
    return _assemble(path, root, categories, images, boxes, bad_files=bad_files)


# Each of these packs the values of a key into an array, or raises if one of them has the wrong type or value.


def _pack_integers(values: list[Any]) -> np.ndarray:
    _check_types(values, {int})
    return np.array(values, dtype=np.int64)


def _pack_sides(values: list[Any]) -> np.ndarray:
    sides = _pack_integers(values)
    if ((sides < 1) | (sides > np.iinfo(np.int32).max)).any():
        raise ValueError
    return sides


def _pack_flags(values: list[Any]) -> np.ndarray:
    flags = _pack_integers(values)
    if ((flags != 0) & (flags != 1)).any():
        raise ValueError
    return flags.astype(np.bool_)


def _pack_strings(values: list[Any]) -> np.ndarray:
    _check_types(values, {str})
    return np.array(values, dtype=object)


def _pack_file_names(values: list[Any]) -> np.ndarray:
    _check_types(values, {str})
    if not all(values) or b"\0" in os.fsencode("".join(values)):
        raise ValueError
    return np.array(values, dtype=np.str_)


def _pack_areas(values: list[Any]) -> np.ndarray:
    _check_types(values, {int, float})
    areas = np.array(values, dtype=np.float64)
    if not (np.isfinite(areas) & (areas >= 0)).all():
        raise ValueError
    return areas


def _pack_boxes(values: list[Any]) -> np.ndarray:
    _check_types(values, {list})
    if not set(map(len, values)) <= {4}:
        raise ValueError
    numbers = list(chain.from_iterable(values))
    _check_types(numbers, {int, float})
    return np.array(numbers, dtype=np.float64).reshape(-1, 4)


def _check_types(values: list[Any], types: set[type]) -> None:
    """Refuse values of other types; a bool is not an int here."""
    if not set(map(type, values)) <= types:
        raise TypeError


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """The kind of value that a key of an entry must have.

    Attributes:
        expected: description for the error, "expected ...".
        pack: turns a list of values into an array, or raises.
        blank: replaces a missing or wrong value.
    """

    expected: str
    pack: Callable[[list[Any]], np.ndarray]
    blank: Any

    def fits(self, values: list[Any]) -> bool:
        """Check whether all of these values can be packed."""
        try:
            self.pack(values)
        except (TypeError, ValueError, OverflowError):
            return False
        return True


_ID = _Kind(expected="an integer of at most 64 bits", pack=_pack_integers, blank=0)
_SIDE = _Kind(expected="an integer above 0, in pixels", pack=_pack_sides, blank=1)
_FLAG = _Kind(expected="0 or 1", pack=_pack_flags, blank=0)
_NAME = _Kind(expected="a string", pack=_pack_strings, blank="")
_FILE_NAME = _Kind(expected="the name of a file", pack=_pack_file_names, blank="?")
_AREA = _Kind(expected="a finite number of at least 0", pack=_pack_areas, blank=0.0)
_BOX = _Kind(
    expected="a list of 4 numbers: x, y, width, height", pack=_pack_boxes, blank=[0.0, 0.0, 1.0, 1.0]
)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Column:
    """The values of one key in all entries of a list.

    Attributes:
        values: one for each entry; a blank where the entry has no usable value.
        is_good: (n,) whether the entry has a usable value.
    """

    values: np.ndarray
    is_good: Bool[np.ndarray, " n"]


class _Table:
    """One of the file's three lists, which collects the problems of its entries.

    Args:
        noun: for one entry, in errors.
        key: of the list in the file.
        entries: as read.
    """

    def __init__(self, noun: str, key: str, entries: list[Any]) -> None:
        self.problems: list[str] = []
        self._noun, self._key = noun, key
        self._entries: list[dict[str, Any]] = [entry if isinstance(entry, dict) else {} for entry in entries]
        self._is_object = np.array([isinstance(entry, dict) for entry in entries], dtype=np.bool_)
        self.refuse(~self._is_object, lambda i: f"is {reprlib.repr(entries[i])}, expected an object")

    def __len__(self) -> int:
        return len(self._entries)

    def name(self, index: int) -> str:
        """Return the name of an entry for messages: its id, or its index if it has none."""
        entry = self._entries[index]
        entry_id, image_id = entry.get("id"), entry.get("image_id")
        name = f"{self._noun} {entry_id}" if type(entry_id) is int else f"{self._key}[{index}]"
        return f"{name} of image {image_id}" if type(image_id) is int else name

    def refuse(self, is_wrong: Bool[np.ndarray, " n"], describe: Callable[[int], str]) -> None:
        """Add one problem for each wrong entry, described by its index."""
        self.problems += [f"{self.name(i)}: {describe(i)}" for i in np.flatnonzero(is_wrong).tolist()]

    def refuse_repeats(self, ids: _Column) -> None:
        """Add a problem for every id that an earlier entry has already."""
        indices = np.flatnonzero(ids.is_good)
        _, first = np.unique(ids.values[indices], return_index=True)
        is_repeat = ids.is_good.copy()
        is_repeat[indices[first]] = False
        self.refuse(is_repeat, lambda i: f"the id is used twice, here in {self._key}[{i}]")

    def column(self, key: str, kind: _Kind, *, is_required: bool = True) -> _Column:
        """Return the values of a key, and add a problem for each that is missing or wrong."""
        is_present = np.array([key in entry for entry in self._entries], dtype=np.bool_)
        if is_required:
            self.refuse(self._is_object & ~is_present, lambda _: f"{key} is missing")
        values = [entry.get(key, kind.blank) for entry in self._entries]
        if kind.fits(values):
            return _Column(values=kind.pack(values), is_good=is_present)
        is_good = is_present & np.array([kind.fits([value]) for value in values], dtype=np.bool_)
        self.refuse(
            is_present & ~is_good, lambda i: f"{key} is {reprlib.repr(values[i])}, expected {kind.expected}"
        )
        values = [value if good else kind.blank for value, good in zip(values, is_good, strict=True)]
        return _Column(values=kind.pack(values), is_good=is_good)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Categories:
    table: _Table
    ids: _Column
    names: _Column


@dataclass(frozen=True, kw_only=True, eq=False)
class _Images:
    table: _Table
    ids: _Column
    file_names: _Column
    widths: _Column
    heights: _Column

    def sides(self, index: int) -> Sides | None:
        """Return the sides of an image, or None if the file has no usable ones."""
        if not (self.widths.is_good[index] and self.heights.is_good[index]):
            return None
        return Sides(int(self.widths.values[index]), int(self.heights.values[index]))

    def frames(self, image: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n 2"]:
        """Return width and height of each of these images; NaN where they are unknown."""
        sides = np.stack([self.widths.values, self.heights.values], axis=1).astype(np.float64)
        sides[~(self.widths.is_good & self.heights.is_good)] = np.nan
        return sides[image] if len(sides) else np.full((len(image), 2), np.nan)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Boxes:
    """The annotations, in the order of the file.

    Attributes:
        table: the list in the file.
        image: (n,) index of each one's image in the list of images.
        category: (n,) index of each one's category in the list of categories.
        xywh: (n, 4) as in the file, image frame.
        is_crowd: (n,) whether each is a crowd.
        areas: (n,) as in the file, where it has one.
    """

    table: _Table
    image: Int[np.ndarray, " n"]
    category: Int[np.ndarray, " n"]
    xywh: Float[np.ndarray, "n 4"]
    is_crowd: Bool[np.ndarray, " n"]
    areas: _Column


def _read_tables(path: Path) -> dict[str, _Table]:
    content = read_json(path, error=AnnotationError)
    if not isinstance(content, dict):
        raise AnnotationError(
            f"{path}: is {reprlib.repr(content)}, expected an object with images, annotations, categories"
        )
    nouns = {"categories": "category", "images": "image", "annotations": "annotation"}
    problems = [f"{key} is missing, expected a list" for key in nouns if key not in content]
    problems += [
        f"{key} is {reprlib.repr(content[key])}, expected a list"
        for key in nouns
        if key in content and not isinstance(content[key], list)
    ]
    _raise_for(path, problems)
    return {key: _Table(noun, key, content[key]) for key, noun in nouns.items()}


def _check_categories(table: _Table) -> _Categories:
    ids = table.column("id", _ID)
    table.refuse_repeats(ids)
    return _Categories(table=table, ids=ids, names=table.column("name", _NAME))


def _check_images(table: _Table) -> _Images:
    ids = table.column("id", _ID)
    table.refuse_repeats(ids)
    file_names = table.column("file_name", _FILE_NAME)
    is_outside = [leaves_root(name) for name in file_names.values.tolist()]
    table.refuse(
        np.array(is_outside, dtype=np.bool_),
        lambda i: f"file_name is {reprlib.repr(str(file_names.values[i]))}, which leaves the image root",
    )
    return _Images(
        table=table,
        ids=ids,
        file_names=file_names,
        widths=table.column("width", _SIDE),
        heights=table.column("height", _SIDE),
    )


def _find_bad_files(images: _Images, root: Path, read: ReadSpec) -> list[str]:
    """Compare the image files with the annotations, reading only headers; return one problem for each bad file."""
    if not root.is_dir():
        return [f"the image root {root} is not a folder"]
    real_root = os.path.realpath(root)
    problems = []
    for i in np.flatnonzero(images.file_names.is_good).tolist():
        name = str(images.file_names.values[i])
        if leaves_root(name):
            continue  # a problem already, and not to be opened
        problem = check_image_file(real_root, name, read, expected=images.sides(i))
        if problem is not None:
            problems.append(f"{images.table.name(i)}: {problem}")
    return problems


def _check_boxes(table: _Table, images: _Images, categories: _Categories) -> _Boxes:
    table.refuse_repeats(table.column("id", _ID, is_required=False))
    image_ids = table.column("image_id", _ID)
    image, has_image = _find(image_ids, images.ids)
    table.refuse(image_ids.is_good & ~has_image, lambda _: "there is no such image")
    category_ids = table.column("category_id", _ID)
    category, has_category = _find(category_ids, categories.ids)
    table.refuse(
        category_ids.is_good & ~has_category, lambda i: f"there is no category {category_ids.values[i]}"
    )
    xywh = table.column("bbox", _BOX)
    _check_extent(table, xywh, images, image, has_image)
    return _Boxes(
        table=table,
        image=image,
        category=category,
        xywh=xywh.values,
        is_crowd=table.column("iscrowd", _FLAG, is_required=False).values,
        areas=table.column("area", _AREA, is_required=False),
    )


def _find(wanted: _Column, ids: _Column) -> tuple[Int[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """Look up ids; return the index of each, 0 where there is none, and whether there is one."""
    indices = np.flatnonzero(ids.is_good)
    known, first = np.unique(ids.values[indices], return_index=True)
    if len(known) == 0:
        return np.zeros(len(wanted.values), dtype=np.int64), np.zeros(len(wanted.values), dtype=np.bool_)
    nearest = np.minimum(np.searchsorted(known, wanted.values), len(known) - 1)
    is_found = wanted.is_good & (known[nearest] == wanted.values)
    return np.where(is_found, indices[first][nearest], 0), is_found


def _check_extent(
    table: _Table,
    xywh: _Column,
    images: _Images,
    image: Int[np.ndarray, " n"],
    has_image: Bool[np.ndarray, " n"],
) -> None:
    """Refuse boxes that are not finite, have a side of 0 or less, or are wholly outside their image."""
    boxes = xywh.values
    is_finite = np.isfinite(boxes).all(axis=1)
    table.refuse(~is_finite, lambda i: f"bbox is {boxes[i].tolist()}, expected finite numbers")
    has_sides = (boxes[:, 2:] > 0).all(axis=1)
    table.refuse(
        is_finite & ~has_sides, lambda i: f"bbox is {boxes[i].tolist()}, expected width and height above 0"
    )
    frames = images.frames(image)  # (n, 2)
    is_known = xywh.is_good & has_image & np.isfinite(frames).all(axis=1)
    with np.errstate(over="ignore", invalid="ignore"):
        is_outside = ((boxes[:, :2] >= frames) | (boxes[:, :2] + boxes[:, 2:] <= 0)).any(axis=1)
    table.refuse(
        is_known & is_finite & has_sides & is_outside,
        lambda i: (
            f"bbox is {boxes[i].tolist()}, outside its image of {frames[i, 0]:.0f}x{frames[i, 1]:.0f} pixels"
        ),
    )


def _assemble(
    path: Path,
    root: Path,
    categories: _Categories,
    images: _Images,
    boxes: _Boxes,
    *,
    bad_files: Sequence[str],
) -> Dataset:
    """Build the data set from checked columns: boxes by image, labels in the order of the category ids."""
    category_order = np.argsort(categories.ids.values)
    label_of_category = np.empty_like(category_order)
    label_of_category[category_order] = np.arange(len(category_order))
    box_order = np.argsort(boxes.image, kind="stable")
    counts = np.bincount(boxes.image, minlength=len(images.table))
    frames = images.frames(boxes.image)
    unclipped = from_xywh(boxes.xywh)
    clipped = np.clip(unclipped, 0.0, np.concatenate([frames, frames], axis=1))
    areas = np.where(boxes.areas.is_good, boxes.areas.values, area(clipped))
    labels = label_of_category[boxes.category] if len(boxes.category) else np.zeros(0, dtype=np.int64)
    return Dataset(
        path=path,
        image_root=root,
        categories=tuple(
            Category(category_id=int(categories.ids.values[index]), name=categories.names.values[index])
            for index in category_order
        ),
        image_ids=images.ids.values,
        file_names=images.file_names.values,
        widths=images.widths.values.astype(np.int32),
        heights=images.heights.values.astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        boxes=clipped[box_order],
        labels=labels[box_order].astype(np.int64),
        is_crowd=boxes.is_crowd[box_order],
        areas=areas[box_order],
        warnings=(
            *_box_warnings(path, boxes, unclipped=unclipped, clipped=clipped, frames=frames),
            *_file_warnings(path, bad_files),
        ),
    )


def _box_warnings(
    path: Path,
    boxes: _Boxes,
    *,
    unclipped: Float[np.ndarray, "n 4"],
    clipped: Float[np.ndarray, "n 4"],
    frames: Float[np.ndarray, "n 2"],
) -> Iterator[str]:
    """Yield one line for each kind of box that is not used as it is in the file."""

    def warn(is_affected: Bool[np.ndarray, " n"], problem: str) -> Iterator[str]:
        examples = [
            f"{boxes.table.name(i)}: {boxes.xywh[i].tolist()} in {frames[i, 0]:.0f}x{frames[i, 1]:.0f}"
            for i in np.flatnonzero(is_affected).tolist()
        ]
        if examples:
            noun = "box" if len(examples) == 1 else "boxes"
            yield f"{path}: {len(examples)} {noun} {problem} ({count_and_list(examples, limit=_MAX_EXAMPLES)})"

    yield from warn(
        (np.abs(unclipped - clipped) > _TOLERANCE).any(axis=1), "reaching over the border, clipped"
    )
    yield from warn(
        ~is_learnable(clipped) & ~boxes.is_crowd, "less than 1 pixel wide or high, too small to learn from"
    )


def _file_warnings(path: Path, problems: Sequence[str]) -> Iterator[str]:
    """Yield one line for the image files that will be skipped, if there are any."""
    if problems:
        noun = "file" if len(problems) == 1 else "files"
        examples = count_and_list(problems, limit=_MAX_EXAMPLES)
        yield f"{path}: {len(problems)} bad image {noun}, to be skipped ({examples})"


def _raise_for(path: Path, problems: Sequence[str]) -> None:
    """Raise an error that lists the problems, if there are any."""
    if problems:
        noun = "problem" if len(problems) == 1 else "problems"
        listed = count_and_list(problems, limit=_MAX_PROBLEMS, separator="\n  ")
        raise AnnotationError(f"{path}: {len(problems)} {noun}\n  {listed}")
