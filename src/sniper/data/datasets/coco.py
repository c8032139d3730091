"""COCO JSON to image records, checked once at the door."""

import json
import os
import posixpath
import reprlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from sniper.chips.targets import is_learnable
from sniper.data.datasets.dataset import Category, Dataset
from sniper.data.images.files import read_image_sides
from sniper.data.spec import ReadSpec
from sniper.errors import AnnotationError, ImageError
from sniper.geometry.boxes import area, from_xywh

_MOST_PROBLEMS_TOLD = 20
_MOST_EXAMPLES_TOLD = 3
_ROUNDING = 1e-3  # pixels; tools that round decimals reach this far over the border without meaning it


def load_dataset(
    path: Path,
    *,
    image_root: Path | None = None,
    has_images: bool = True,
    read: ReadSpec = ReadSpec(),
    skips_bad_images: bool = False,
) -> Dataset:
    """Read a COCO JSON file, and refuse it if anything in it is wrong. `docs/annotations.md` tells what is.

    Args:
        path: the file.
        image_root: folder that the file names start from; by default `images` beside the file if there is such a
            folder, the file's own folder otherwise.
        has_images: whether the image files are there to be looked at; their headers are compared with the file.
        read: how image files become pixels.
        skips_bad_images: whether what is wrong with image files is told among the warnings, rather than refused.

    Returns:
        The data set; what was mended or is of no use is told in its `warnings`.

    Raises:
        AnnotationError: telling every problem of the file, one line each; the first 20 in words, the rest as a count.
    """
    root = _default_root(path) if image_root is None else image_root
    tables = _read_tables(path)
    categories = _check_categories(tables["categories"])
    images = _check_images(tables["images"])
    bad_files = _file_problems(images, root, read) if has_images else []
    if not skips_bad_images:
        images.table.problems += bad_files
        bad_files = []
    boxes = _check_boxes(tables["annotations"], images, categories)
    _raise(path, [*categories.table.problems, *images.table.problems, *boxes.table.problems])
    return _assemble(path, root, categories, images, boxes, bad_files=bad_files)


# What a column of the file must hold: each packs a list of values, or raises if one of them does not fit.


def _pack_whole_numbers(values: list[Any]) -> np.ndarray:
    _want_types(values, {int})
    return np.array(values, dtype=np.int64)


def _pack_sides(values: list[Any]) -> np.ndarray:
    sides = _pack_whole_numbers(values)
    if ((sides < 1) | (sides > np.iinfo(np.int32).max)).any():
        raise ValueError
    return sides


def _pack_flags(values: list[Any]) -> np.ndarray:
    flags = _pack_whole_numbers(values)
    if ((flags != 0) & (flags != 1)).any():
        raise ValueError
    return flags.astype(np.bool_)


def _pack_texts(values: list[Any]) -> np.ndarray:
    _want_types(values, {str})
    return np.array(values, dtype=object)


def _pack_file_names(values: list[Any]) -> np.ndarray:
    _want_types(values, {str})
    if not all(values) or b"\0" in os.fsencode("".join(values)):
        raise ValueError
    return np.array(values, dtype=np.str_)


def _pack_areas(values: list[Any]) -> np.ndarray:
    _want_types(values, {int, float})
    areas = np.array(values, dtype=np.float64)
    if not (np.isfinite(areas) & (areas >= 0)).all():
        raise ValueError
    return areas


def _pack_boxes(values: list[Any]) -> np.ndarray:
    _want_types(values, {list})
    if not set(map(len, values)) <= {4}:
        raise ValueError
    numbers = list(chain.from_iterable(values))
    _want_types(numbers, {int, float})
    return np.array(numbers, dtype=np.float64).reshape(-1, 4)


def _want_types(values: list[Any], types: set[type]) -> None:
    """Refuse values of other types; a bool is no int here."""
    if not set(map(type, values)) <= types:
        raise TypeError


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """What one key of an entry must hold.

    Attributes:
        words: for the message: "wanted ...".
        pack: turns a list of values into an array, or raises.
        blank: stands where there is no good value.
    """

    words: str
    pack: Callable[[list[Any]], np.ndarray]
    blank: Any

    def fits(self, values: list[Any]) -> bool:
        """Tell whether all of these values can be packed."""
        try:
            self.pack(values)
        except (TypeError, ValueError, OverflowError):
            return False
        return True


_ID = _Kind(words="a whole number of at most 64 bits", pack=_pack_whole_numbers, blank=0)
_SIDE = _Kind(words="a whole number of pixels above 0", pack=_pack_sides, blank=1)
_FLAG = _Kind(words="0 or 1", pack=_pack_flags, blank=0)
_NAME = _Kind(words="a text", pack=_pack_texts, blank="")
_FILE_NAME = _Kind(words="the name of a file", pack=_pack_file_names, blank="?")
_AREA = _Kind(words="a finite number of at least 0", pack=_pack_areas, blank=0.0)
_BOX = _Kind(words="a list of 4 numbers: x, y, width, height", pack=_pack_boxes, blank=[0.0, 0.0, 1.0, 1.0])


@dataclass(frozen=True, kw_only=True, eq=False)
class _Column:
    """The values of one key in all entries of a list.

    Attributes:
        values: one for each entry; a blank where the entry has no good one.
        is_good: (n,) whether the entry has the key, with a value that fits.
    """

    values: np.ndarray
    is_good: Bool[np.ndarray, " n"]


class _Table:
    """One of the file's three lists; it collects what is wrong with its entries.

    Args:
        noun: one entry in words.
        plural: the key of the list.
        entries: as read.
    """

    def __init__(self, noun: str, plural: str, entries: list[Any]) -> None:
        self.problems: list[str] = []
        self._noun, self._plural = noun, plural
        self._entries: list[dict[str, Any]] = [entry if isinstance(entry, dict) else {} for entry in entries]
        self._is_object = np.array([isinstance(entry, dict) for entry in entries], dtype=np.bool_)
        self.refuse(~self._is_object, lambda i: f"is {reprlib.repr(entries[i])}, wanted an object")

    def __len__(self) -> int:
        return len(self._entries)

    def name(self, index: int) -> str:
        """Name an entry by its id, or by its place in the list if it has none."""
        entry = self._entries[index]
        own_id, image_id = entry.get("id"), entry.get("image_id")
        name = f"{self._noun} {own_id}" if type(own_id) is int else f"{self._plural}[{index}]"
        return f"{name} of image {image_id}" if type(image_id) is int else name

    def refuse(self, is_wrong: Bool[np.ndarray, " n"], tell: Callable[[int], str]) -> None:
        """Note one problem for each entry that is wrong."""
        self.problems += [f"{self.name(i)}: {tell(i)}" for i in np.flatnonzero(is_wrong).tolist()]

    def refuse_repeats(self, ids: _Column) -> None:
        """Note every id that an earlier entry has already."""
        places = np.flatnonzero(ids.is_good)
        _, first_places = np.unique(ids.values[places], return_index=True)
        is_repeat = ids.is_good.copy()
        is_repeat[places[first_places]] = False
        self.refuse(is_repeat, lambda i: f"the id is used twice, here in {self._plural}[{i}]")

    def column(self, key: str, kind: _Kind, *, is_required: bool = True) -> _Column:
        """Give the values of a key, and note those that are absent or do not fit."""
        is_given = np.array([key in entry for entry in self._entries], dtype=np.bool_)
        if is_required:
            self.refuse(self._is_object & ~is_given, lambda _: f"{key} is missing")
        values = [entry.get(key, kind.blank) for entry in self._entries]
        if kind.fits(values):
            return _Column(values=kind.pack(values), is_good=is_given)
        is_good = is_given & np.array([kind.fits([value]) for value in values], dtype=np.bool_)
        self.refuse(is_given & ~is_good, lambda i: f"{key} is {_show(values[i])}, wanted {kind.words}")
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


@dataclass(frozen=True, kw_only=True, eq=False)
class _Boxes:
    """The checked annotations, in the order of the file.

    Attributes:
        table: the list they come from.
        image: (n,) place of each one's image in its list.
        category: (n,) place of each one's category in its list.
        xywh: (n, 4) as in the file, image frame.
        is_crowd: (n,) whether each is a crowd.
        areas: (n,) as in the file, where it tells one.
    """

    table: _Table
    image: Int[np.ndarray, " n"]
    category: Int[np.ndarray, " n"]
    xywh: Float[np.ndarray, "n 4"]
    is_crowd: Bool[np.ndarray, " n"]
    areas: _Column


def _default_root(path: Path) -> Path:
    images = path.parent / "images"
    return images if images.is_dir() else path.parent


def _read_tables(path: Path) -> dict[str, _Table]:
    content = _read_json(path)
    if not isinstance(content, dict):
        raise AnnotationError(
            f"{path}: is {_show(content)}, wanted an object with images, annotations, categories"
        )
    keys = {"categories": "category", "images": "image", "annotations": "annotation"}
    problems = [f"{key} is missing, wanted a list" for key in keys if key not in content]
    problems += [
        f"{key} is {_show(content[key])}, wanted a list"
        for key in keys
        if key in content and not isinstance(content[key], list)
    ]
    _raise(path, problems)
    return {key: _Table(noun, key, content[key]) for key, noun in keys.items()}


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise AnnotationError(f"{path}: cannot be read ({error.strerror})") from error
    except json.JSONDecodeError as error:
        raise AnnotationError(
            f"{path}: is not JSON ({error.msg} in line {error.lineno}, column {error.colno})"
        ) from error
    except (ValueError, RecursionError) as error:
        raise AnnotationError(f"{path}: is not JSON ({error})") from error


def _check_categories(table: _Table) -> _Categories:
    ids = table.column("id", _ID)
    table.refuse_repeats(ids)
    return _Categories(table=table, ids=ids, names=table.column("name", _NAME))


def _check_images(table: _Table) -> _Images:
    ids = table.column("id", _ID)
    table.refuse_repeats(ids)
    file_names = table.column("file_name", _FILE_NAME)
    is_outside = [_leaves_root(name) for name in file_names.values.tolist()]
    table.refuse(
        np.array(is_outside, dtype=np.bool_),
        lambda i: f"file_name is {_show(str(file_names.values[i]))}, which leaves the image root",
    )
    return _Images(
        table=table,
        ids=ids,
        file_names=file_names,
        widths=table.column("width", _SIDE),
        heights=table.column("height", _SIDE),
    )


def _leaves_root(file_name: str) -> bool:
    """Tell whether a path is absolute or climbs above where it starts."""
    if file_name.startswith("/"):
        return True
    return ".." in file_name and posixpath.normpath(file_name).split("/")[0] == ".."


def _file_problems(images: _Images, root: Path, read: ReadSpec) -> list[str]:
    """Compare the image files with what is said of them; only their headers are read."""
    if not root.is_dir():
        return [f"the image root {root} is not a folder"]
    real_root = os.path.realpath(root)
    problems = []
    for i in np.flatnonzero(images.file_names.is_good).tolist():
        name = str(images.file_names.values[i])
        if _leaves_root(name):
            continue  # told already, and not to be opened
        wanted = (int(images.widths.values[i]), int(images.heights.values[i]))
        has_size = images.widths.is_good[i] and images.heights.is_good[i]
        problem = _file_problem(real_root, name, read, size=wanted if has_size else None)
        if problem is not None:
            problems.append(f"{images.table.name(i)}: {problem}")
    return problems


def _file_problem(real_root: str, name: str, read: ReadSpec, *, size: tuple[int, int] | None) -> str | None:
    """Tell what is wrong with an image file, if anything.

    Args:
        real_root: folder that names start from, symbolic links resolved.
        name: of the file, relative.
        read: how it becomes pixels.
        size: width and height that it should have, if that is known.
    """
    path = os.path.realpath(os.path.join(real_root, name))
    if os.path.commonpath([real_root, path]) != real_root:
        return f"{name} is a link that leaves the image root, to {path}"
    if not os.path.isfile(path):
        return f"{name} is not there, wanted {path}"
    try:
        found = read_image_sides(Path(path), read)
    except ImageError as error:
        return f"{name} {str(error).removeprefix(f'{path}: ')}"
    if size is not None and found != size:
        told = f"{name} has {found[0]}x{found[1]} pixels, but the annotations say {size[0]}x{size[1]}"
        return told + _orientation_advice(Path(path), read, size)
    return None


def _orientation_advice(path: Path, read: ReadSpec, size: tuple[int, int]) -> str:
    """Tell where the sides are those of the image as EXIF does not, or does, want it turned."""
    other: Literal["apply", "ignore"] = "ignore" if read.exif_orientation == "apply" else "apply"
    if read_image_sides(path, replace(read, exif_orientation=other)) != size:
        return ""
    return f", which are its sides with data.read.exif_orientation: {other}"


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
    """Look up ids; gives the place of each, 0 where there is none, and whether there is one."""
    places = np.flatnonzero(ids.is_good)
    known, first = np.unique(ids.values[places], return_index=True)
    if len(known) == 0:
        return np.zeros(len(wanted.values), dtype=np.int64), np.zeros(len(wanted.values), dtype=np.bool_)
    nearest = np.minimum(np.searchsorted(known, wanted.values), len(known) - 1)
    is_found = wanted.is_good & (known[nearest] == wanted.values)
    return np.where(is_found, places[first][nearest], 0), is_found


def _check_extent(
    table: _Table,
    xywh: _Column,
    images: _Images,
    image: Int[np.ndarray, " n"],
    has_image: Bool[np.ndarray, " n"],
) -> None:
    """Refuse boxes that are not finite, have no sides, or lie wholly outside their image."""
    boxes = xywh.values
    is_finite = np.isfinite(boxes).all(axis=1)
    table.refuse(~is_finite, lambda i: f"bbox is {boxes[i].tolist()}, wanted finite numbers")
    has_sides = (boxes[:, 2:] > 0).all(axis=1)
    table.refuse(
        is_finite & ~has_sides, lambda i: f"bbox is {boxes[i].tolist()}, wanted width and height above 0"
    )
    frames = _frames(images, image)  # (n, 2)
    is_known = xywh.is_good & has_image & np.isfinite(frames).all(axis=1)
    with np.errstate(over="ignore", invalid="ignore"):
        is_outside = ((boxes[:, :2] >= frames) | (boxes[:, :2] + boxes[:, 2:] <= 0)).any(axis=1)
    table.refuse(
        is_known & is_finite & has_sides & is_outside,
        lambda i: (
            f"bbox is {boxes[i].tolist()}, outside its image of {frames[i, 0]:.0f}x{frames[i, 1]:.0f} pixels"
        ),
    )


def _frames(images: _Images, image: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n 2"]:
    """Give width and height of the image of each box; NaN where they are not known."""
    sides = np.stack([images.widths.values, images.heights.values], axis=1).astype(np.float64)
    sides[~(images.widths.is_good & images.heights.is_good)] = np.nan
    return sides[image] if len(sides) else np.full((len(image), 2), np.nan)


def _assemble(
    path: Path,
    root: Path,
    categories: _Categories,
    images: _Images,
    boxes: _Boxes,
    *,
    bad_files: Sequence[str],
) -> Dataset:
    """Put checked columns together: boxes by image, labels in the order of the category ids."""
    ranks = np.argsort(categories.ids.values)
    label_of = np.empty_like(ranks)
    label_of[ranks] = np.arange(len(ranks))
    order = np.argsort(boxes.image, kind="stable")
    counts = np.bincount(boxes.image, minlength=len(images.table))
    frames = _frames(images, boxes.image)
    given = from_xywh(boxes.xywh)
    clipped = np.clip(given, 0.0, np.concatenate([frames, frames], axis=1))
    areas = np.where(boxes.areas.is_good, boxes.areas.values, area(clipped))
    labels = label_of[boxes.category] if len(boxes.category) else np.zeros(0, dtype=np.int64)
    return Dataset(
        path=path,
        image_root=root,
        categories=tuple(
            Category(category_id=int(categories.ids.values[rank]), name=categories.names.values[rank])
            for rank in ranks
        ),
        image_ids=images.ids.values,
        file_names=images.file_names.values,
        widths=images.widths.values.astype(np.int32),
        heights=images.heights.values.astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        boxes=clipped[order],
        labels=labels[order].astype(np.int64),
        is_crowd=boxes.is_crowd[order],
        areas=areas[order],
        warnings=(
            *_warnings(path, boxes, given=given, clipped=clipped, frames=frames),
            *_warn_of_files(path, bad_files),
        ),
    )


def _warnings(
    path: Path,
    boxes: _Boxes,
    *,
    given: Float[np.ndarray, "n 4"],
    clipped: Float[np.ndarray, "n 4"],
    frames: Float[np.ndarray, "n 2"],
) -> Iterator[str]:
    """Tell what is used, but not as the file has it; one line for each kind."""

    def tell(is_meant: Bool[np.ndarray, " n"], what: str) -> Iterator[str]:
        places = np.flatnonzero(is_meant).tolist()
        if not places:
            return
        shown = [
            f"{boxes.table.name(i)}: {boxes.xywh[i].tolist()} in {frames[i, 0]:.0f}x{frames[i, 1]:.0f}"
            for i in places[:_MOST_EXAMPLES_TOLD]
        ]
        rest = [f"and {len(places) - len(shown)} more"] * (len(places) > len(shown))
        noun = "box" if len(places) == 1 else "boxes"
        yield f"{path}: {len(places)} {noun} {what} ({'; '.join(shown + rest)})"

    yield from tell((np.abs(given - clipped) > _ROUNDING).any(axis=1), "reaching over the border, clipped")
    yield from tell(
        ~is_learnable(clipped) & ~boxes.is_crowd,
        "less than 1 pixel wide or high, too small to be learnt from",
    )


def _warn_of_files(path: Path, problems: Sequence[str]) -> Iterator[str]:
    """Tell what will be skipped; one line."""
    if problems:
        shown = list(problems[:_MOST_EXAMPLES_TOLD])
        rest = [f"and {len(problems) - len(shown)} more"] * (len(problems) > len(shown))
        plural = "s" if len(problems) > 1 else ""
        yield f"{path}: {len(problems)} bad image file{plural}, to be skipped ({'; '.join(shown + rest)})"


def _show(value: Any) -> str:
    """Show a value of the file, shortened; an object or a long list by its first few parts."""
    return reprlib.repr(value)


def _raise(path: Path, problems: Sequence[str]) -> None:
    """Raise if there are problems."""
    if not problems:
        return
    lines = [f"{path}: {len(problems)} problem{'s' * (len(problems) > 1)}", *problems[:_MOST_PROBLEMS_TOLD]]
    if len(problems) > _MOST_PROBLEMS_TOLD:
        lines.append(f"and {len(problems) - _MOST_PROBLEMS_TOLD} more")
    raise AnnotationError("\n  ".join(lines))
