"""Read COCO JSON and its dialects: types, ids and references. The values are checked in `check`.

`docs/annotations.md` lists what is accepted, corrected, dropped and refused.
"""

import contextlib
import math
import os
import re
import reprlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from operator import attrgetter, not_
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec
import numpy as np
from jaxtyping import Bool, Float, Int64, Shaped
from msgspec import UNSET

from sniper.data.datasets.dataset import Category
from sniper.data.datasets.raw import MAX_LISTED, MAX_SIDE, Findings, RawDataset, raise_for
from sniper.data.datasets.segmentations import (
    EXPECTED,
    FEW_POINTS,
    NO_MASK,
    UNREADABLE,
    read_segmentations,
    to_text,
)
from sniper.errors import AnnotationError, counted
from sniper.files import no_garbage_collection, read_json, read_typed_json
from sniper.geometry.boxes import from_xywh, to_xywh
from sniper.geometry.masks import MaskArrays

_MAX_TABLE = 10_000_000  # span of ids that are looked up in a table
_MAX_ID = 256  # characters of a text, bits of a number
_MAX_NAME = 1024  # characters of a file name
_FLAGS = {0: False, 1: True, "0": False, "1": True, None: False}  # True and 1.0 equal 1
_WHOLE_NUMBER = re.compile(r"[+-]?[0-9]{1,20}")


# Other keys are skipped without building them. The structs contain no cycles.


class _Category(msgspec.Struct, gc=False):
    id: Any = UNSET
    name: Any = None


class _Image(msgspec.Struct, gc=False):
    id: Any = UNSET
    file_name: Any = UNSET
    coco_url: Any = UNSET
    width: Any = None
    height: Any = None


class _StrictAnnotation(msgspec.Struct, gc=False, kw_only=True):
    """An annotation as COCO writes it, and in the order of its keys, which is decoded fastest."""

    area: float = math.nan
    iscrowd: int | bool = 0
    ignore: int | bool = 0
    image_id: int
    bbox: tuple[float, float, float, float]
    category_id: int
    id: int
    segmentation: msgspec.Raw = NO_MASK


class _LooseAnnotation(msgspec.Struct, gc=False):
    """An annotation as tools write it, with ids and flags of many types."""

    area: Any = None
    iscrowd: Any = 0
    ignore: Any = 0
    image_id: Any = UNSET
    bbox: tuple[float, float, float, float] | None = None
    category_id: Any = UNSET
    id: Any = UNSET
    segmentation: msgspec.Raw = NO_MASK


class _JSONAnnotation(_LooseAnnotation, gc=False):
    """An annotation that is built from plain JSON, so that its box can be anything."""

    def __post_init__(self) -> None:
        if not isinstance(self.segmentation, msgspec.Raw):
            self.segmentation = to_text(self.segmentation)


_Annotation = _StrictAnnotation | _LooseAnnotation
_Entry = TypeVar("_Entry", _Category, _Image, _Annotation)


class _StrictFile(msgspec.Struct):
    images: list[_Image]
    annotations: list[_StrictAnnotation] | None = None
    categories: list[_Category] | None = None


class _LooseFile(msgspec.Struct):
    images: list[_Image]
    annotations: list[_LooseAnnotation] | None = None
    categories: list[_Category] | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class _Table(Generic[_Entry]):
    """One of the file's three lists.

    Attributes:
        noun: for one entry, in messages.
        key: of the list in the file.
        entries: those that are objects.
        positions: of each in the list.
        problems: one line for each entry that is not an object.
    """

    noun: str
    key: str
    entries: list[_Entry]
    positions: Sequence[int]
    problems: tuple[str, ...] = ()

    def name(self, index: int) -> str:
        """Return the name of an entry for messages: its id, or its position if it has none."""
        entry = self.entries[index]
        name = f"{self.noun} {entry.id}" if _is_id(entry.id) else f"{self.key}[{self.positions[index]}]"
        if isinstance(entry, _Annotation) and _is_id(entry.image_id):
            return f"{name} of image {entry.image_id}"
        return name

    def select(self, is_kept: Bool[np.ndarray, " n"]) -> "_Table[_Entry]":
        """Return a table of some of the entries."""
        indices = np.flatnonzero(is_kept).tolist()
        return replace(
            self,
            entries=[self.entries[index] for index in indices],
            positions=[self.positions[index] for index in indices],
        )


@no_garbage_collection()
def read_coco(path: Path, *, image_root: Path | None = None, has_masks: bool = True) -> RawDataset:
    """Read a COCO JSON file.

    Args:
        path: of the file.
        image_root: folder that file names are relative to, if it is known.
        has_masks: whether masks are read; if not, those of objects without a box still are, to compute it.

    Raises:
        AnnotationError: if the file cannot be read, is not JSON, or has no list of images.
    """
    annotation_table, image_table, category_table = _read_tables(path)
    warnings: list[str] = []
    if category_table is None:
        category_table = _name_categories(annotation_table, warnings)
    if annotation_table is None:
        warnings.append("there is no list of annotations, so the images have no boxes")
        annotation_table = _Table(noun="annotation", key="annotations", entries=[], positions=[])
    categories, category_ids, category_problems = _read_categories(category_table, warnings)
    images = _read_images(image_table, warnings)
    boxes = _read_boxes(annotation_table, images.ids, category_ids, warnings, has_masks=has_masks)
    with np.errstate(over="ignore", invalid="ignore"):
        corners = from_xywh(boxes.xywh)
    return RawDataset(
        path=path,
        image_root=image_root,
        categories=categories,
        image_ids=images.ids,
        file_names=images.file_names,
        widths=images.widths,
        heights=images.heights,
        image_indices=boxes.image,
        category_indices=boxes.category,
        boxes=corners,
        is_crowd=boxes.is_crowd,
        areas=boxes.areas,
        name_image=images.table.name,
        name_box=boxes.name,
        show_box=lambda index: f"bbox is {boxes.xywh[index].tolist()}",
        dropped=boxes.dropped,
        masks=boxes.masks,
        bad_masks=boxes.bad_masks,
        problems=(*category_problems, *images.problems),
        warnings=tuple(warnings),
    )


# The lists of the file


def _read_tables(
    path: Path,
) -> tuple[_Table[_Annotation] | None, _Table[_Image], _Table[_Category] | None]:
    file = read_typed_json(path, _StrictFile) or read_typed_json(path, _LooseFile)
    if file is None:
        return _read_tables_slowly(path)
    return (
        _whole_table("annotation", "annotations", file.annotations),
        _whole_table("image", "images", file.images),
        _whole_table("category", "categories", file.categories),
    )


def _whole_table(noun: str, key: str, entries: list[Any] | None) -> Any:
    return (
        None
        if entries is None
        else _Table(noun=noun, key=key, entries=entries, positions=range(len(entries)))
    )


LABELME = (
    "is LabelMe's file of one image, which is not read; convert the folder to COCO JSON: labelme2coco {}"
)
"""What errors say of such a file in a folder."""


def is_labelme(content: Any) -> bool:
    """Check whether the content of a JSON file is what LabelMe writes for an image."""
    return isinstance(content, dict) and {"shapes", "imagePath"} <= content.keys()


def _read_tables_slowly(
    path: Path,
) -> tuple[_Table[_Annotation] | None, _Table[_Image], _Table[_Category] | None]:
    """Read a file that is unusual, to explain what is wrong."""
    content = read_json(path, error=AnnotationError)
    if not isinstance(content, dict):
        raise AnnotationError(
            f"{path}: is {reprlib.repr(content)}, expected an object with images, annotations, categories"
        )
    if is_labelme(content):
        raise AnnotationError(f"{path}: {LABELME.format(path.parent)}")
    problems = [] if content.get("images") is not None else ["images is missing, expected a list"]
    problems += [
        f"{key} is {reprlib.repr(content[key])}, expected a list"
        for key in ("images", "annotations", "categories")
        if not isinstance(content.get(key), list | None)
    ]
    raise_for(path, problems)
    return (
        _build_table("annotation", "annotations", content.get("annotations"), _JSONAnnotation),
        _build_table("image", "images", content["images"], _Image),
        _build_table("category", "categories", content.get("categories"), _Category),
    )


def _build_table(noun: str, key: str, entries: list[Any] | None, kind: type[_Entry]) -> Any:
    if entries is None:
        return None
    fields = kind.__struct_fields__
    positions = [position for position, entry in enumerate(entries) if isinstance(entry, dict)]
    return _Table(
        noun=noun,
        key=key,
        entries=[
            kind(**{field: entries[position][field] for field in fields if field in entries[position]})
            for position in positions
        ],
        positions=positions,
        problems=tuple(
            f"{key}[{position}]: is {reprlib.repr(entry)}, expected an object"
            for position, entry in enumerate(entries)
            if not isinstance(entry, dict)
        ),
    )


# Ids


def _is_id(value: Any) -> bool:
    return _parse_id(value) is not None


def _parse_id(value: Any) -> int | str | None:
    """Return an id as a whole number where it is one, even as a float or as digits; None if it is no id."""
    if type(value) is int:
        if -(2**63) <= value < 2**63:
            return value
        return str(value) if abs(value) < 2**_MAX_ID else None  # such as unsigned hashes of 64 bits
    if type(value) is float and value.is_integer():
        return _parse_id(int(value))
    if type(value) is not str or not 0 < len(value) <= _MAX_ID or "\0" in value:
        return None
    if _WHOLE_NUMBER.fullmatch(value) and -(2**63) <= int(value) < 2**63:
        return int(value)
    return value


def _as_text(value: Any) -> str:
    return value if type(value) is str else str(_parse_id(value))


def _read_ids(
    table: _Table[_Entry], warnings: list[str]
) -> tuple[_Table[_Entry], Shaped[np.ndarray, " n"], list[str]]:
    """Read the ids of a list: int64 if all are whole numbers, text otherwise.

    Returns:
        The table without repeated entries, the ids of its entries, and the problems.
    """
    values = [entry.id for entry in table.entries]
    ids: list[Any] = [_parse_id(value) for value in values]
    kinds = set(map(type, values))
    is_text = any(type(one) is str for one in ids)
    if is_text or (kinds == {str} and len(set(ids)) < len(set(values)) == len(values)):
        is_text = True  # such as "7" and "07"
        ids = [None if one is None else _as_text(value) for one, value in zip(ids, values, strict=True)]
    problems = list(table.problems)
    is_kept = np.ones(len(ids), dtype=np.bool_)
    first: dict[Any, int] = {}
    for index, (one, value) in enumerate(zip(ids, values, strict=True)):
        if one is None:
            shown = (
                "missing" if value is UNSET else f"{reprlib.repr(value)}, expected a whole number or a text"
            )
            problems.append(f"{table.name(index)}: id is {shown}")
        elif first.setdefault(one, index) != index:
            if table.entries[first[one]] == table.entries[index]:
                is_kept[index] = False
            else:
                where = f"{table.key}[{table.positions[index]}]"
                problems.append(f"{table.name(index)}: the id is used twice, here in {where}")
    if not is_kept.all():
        repeats = Findings.collect("listed twice", ~is_kept, table.name, noun=table.noun, plural=table.key)
        warnings.append(str(repeats))
        table = table.select(is_kept)
        ids = [one for one, kept in zip(ids, is_kept.tolist(), strict=True) if kept]
    blank, kind = ("", np.str_) if is_text else (0, np.int64)
    return table, np.array([blank if one is None else one for one in ids], dtype=kind), problems


def _find(
    wanted: list[Any] | Int64[np.ndarray, " n"], ids: Shaped[np.ndarray, " m"]
) -> Int64[np.ndarray, " n"]:
    """Look up references; return the index of each, -1 where there is none."""
    if not len(ids):
        return np.full(len(wanted), -1)
    if isinstance(wanted, np.ndarray):
        if ids.dtype == np.int64:
            return _find_numbers(wanted, ids)
        wanted = wanted.tolist()
    index_of = {one: index for index, one in enumerate(ids.tolist())}
    read = _parse_id if ids.dtype == np.int64 else _as_text
    return np.array(
        [index_of.get(read(value), -1) if _is_id(value) else -1 for value in wanted], dtype=np.int64
    )


def _find_numbers(wanted: Int64[np.ndarray, " n"], ids: Int64[np.ndarray, " m"]) -> Int64[np.ndarray, " n"]:
    low, high = int(ids.min()), int(ids.max())
    if high - low < _MAX_TABLE:  # several times faster than a search
        index_of = np.full(high - low + 2, -1)  # the last is for ids beyond the others
        index_of[ids - low] = np.arange(len(ids))
        return index_of[np.where((wanted >= low) & (wanted <= high), wanted - low, -1)]
    order = np.argsort(ids)
    indices = order[np.minimum(np.searchsorted(ids, wanted, sorter=order), len(ids) - 1)]
    return np.where(ids[indices] == wanted, indices, -1)


# Categories and images


def _name_categories(annotations: _Table[_Annotation] | None, warnings: list[str]) -> _Table[_Category]:
    """Return categories for a file that does not list them: one for each id that an annotation has."""
    used = [] if annotations is None else [annotation.category_id for annotation in annotations.entries]
    ids = list(dict.fromkeys(one for one in map(_parse_id, used) if one is not None))
    if ids:
        warnings.append("there is no list of categories; their ids are used as names")
    return _Table(
        noun="category",
        key="categories",
        entries=[_Category(id=one, name=str(one)) for one in ids],
        positions=range(len(ids)),
    )


def _read_categories(
    table: _Table[_Category], warnings: list[str]
) -> tuple[tuple[Category, ...], Shaped[np.ndarray, " k"], list[str]]:
    table, ids, problems = _read_ids(table, warnings)
    names = [entry.name for entry in table.entries]
    is_unnamed = np.array([name in (None, "") for name in names], dtype=np.bool_)
    if is_unnamed.any():
        unnamed = Findings.collect(
            "without a name, named by the id", is_unnamed, table.name, noun="category", plural="categories"
        )
        warnings.append(str(unnamed))
    for index, name in enumerate(names):
        if name is not None and type(name) not in (str, int, float):
            problems.append(f"{table.name(index)}: name is {reprlib.repr(name)}, expected a string")
    categories = tuple(
        Category(category_id=one, name=str(one if unnamed else name))
        for one, unnamed, name in zip(ids.tolist(), is_unnamed.tolist(), names, strict=True)
    )
    return categories, ids, problems


@dataclass(frozen=True, kw_only=True, eq=False)
class _Images:
    table: _Table[_Image]
    ids: Shaped[np.ndarray, " m"]
    file_names: Shaped[np.ndarray, " m"]
    widths: Int64[np.ndarray, " m"]
    heights: Int64[np.ndarray, " m"]
    problems: list[str]


def _read_images(table: _Table[_Image], warnings: list[str]) -> _Images:
    table, ids, problems = _read_ids(table, warnings)
    file_names, name_problems = _read_file_names(table, warnings)
    widths, width_problems = _read_sides(table, "width")
    heights, height_problems = _read_sides(table, "height")
    return _Images(
        table=table,
        ids=ids,
        file_names=file_names,
        widths=widths,
        heights=heights,
        problems=[*problems, *name_problems, *width_problems, *height_problems],
    )


def _read_file_names(
    table: _Table[_Image], warnings: list[str]
) -> tuple[Shaped[np.ndarray, " m"], list[str]]:
    names = [entry.file_name for entry in table.entries]
    is_lvis = [
        name is UNSET and type(entry.coco_url) is str
        for name, entry in zip(names, table.entries, strict=True)
    ]
    if any(is_lvis):
        names = [
            "/".join(entry.coco_url.split("/")[-2:]) if from_url else name
            for name, from_url, entry in zip(names, is_lvis, table.entries, strict=True)
        ]
        findings = Findings.collect(
            "without file_name, named by the end of coco_url",
            np.array(is_lvis, dtype=np.bool_),
            lambda index: f"{table.name(index)}: {names[index]}",
            noun="image",
            plural="images",
        )
        warnings.append(str(findings))
    problems = []
    for index, name in enumerate(names):
        if not _is_file_name(name):
            shown = "missing" if name is UNSET else f"{reprlib.repr(name)}, expected the name of a file"
            problems.append(f"{table.name(index)}: file_name is {shown}")
            names[index] = ""
    return np.array(names, dtype=np.str_), problems


def _is_file_name(name: Any) -> bool:
    if type(name) is not str or not 0 < len(name) <= _MAX_NAME:
        return False
    if name.isascii():
        return "\0" not in name
    try:
        return b"\0" not in os.fsencode(name)
    except ValueError:
        return False


def _read_sides(table: _Table[_Image], key: str) -> tuple[Int64[np.ndarray, " m"], list[str]]:
    """Read the widths or the heights; 0 where there is none."""
    values = [getattr(entry, key) for entry in table.entries]
    if set(map(type, values)) == {int} and min(values) > 0 and max(values) <= MAX_SIDE:
        return np.array(values, dtype=np.int64), []
    sides, problems = [], []
    for index, value in enumerate(values):
        side = 0 if value in (None, "") else _parse_side(value)
        if type(side) is not int or side > MAX_SIDE:
            is_whole = isinstance(side, int) or (isinstance(side, str) and side.lstrip("+-").isdecimal())
            wanted = f"at most {MAX_SIDE:,} pixels" if is_whole else "a whole number of pixels"
            problems.append(f"{table.name(index)}: {key} is {reprlib.repr(value)}, expected {wanted}")
            sides.append(-1)
        else:
            sides.append(max(side, 0))
    return np.array(sides, dtype=np.int64), problems


def _parse_side(value: Any) -> int | str | None:
    if type(value) is str:
        with contextlib.suppress(ValueError):
            return _parse_id(float(value))  # such as "640.0"
    return _parse_id(value)


# Annotations


@dataclass(frozen=True, kw_only=True, eq=False)
class _Boxes:
    name: Callable[[int], str]
    image: Int64[np.ndarray, " n"]
    category: Int64[np.ndarray, " n"]
    xywh: Float[np.ndarray, "n 4"]
    is_crowd: Bool[np.ndarray, " n"]
    areas: Float[np.ndarray, " n"]
    dropped: tuple[Findings, ...]
    masks: MaskArrays | None
    bad_masks: tuple[Findings, ...]


def _read_boxes(
    table: _Table[_Annotation],
    image_ids: Shaped[np.ndarray, " m"],
    category_ids: Shaped[np.ndarray, " k"],
    warnings: list[str],
    *,
    has_masks: bool,
) -> _Boxes:
    entries = table.entries
    _check_annotation_ids(table, warnings)
    image = _find(_column(entries, "image_id", np.int64), image_ids)
    category = _find(_column(entries, "category_id", np.int64), category_ids)
    masks, bad_masks = _read_masks(table, has_masks=has_masks)
    xywh, has_box = _read_numbers(table, masks, warnings)
    if not has_masks:
        masks, bad_masks = None, {}
    is_crowd, has_flag = _read_flags(_column(entries, "iscrowd", np.int64))
    is_kept = np.ones(len(entries), dtype=np.bool_)
    dropped = [_describe_others(table)]

    def drop(is_bad: Bool[np.ndarray, " n"], problem: str, describe: Callable[[int], str]) -> None:
        dropped.append(
            Findings.collect(
                problem, is_kept & is_bad, lambda index: f"{table.name(index)}: {describe(index)}"
            )
        )
        is_kept[is_bad] = False

    def describe_reference(noun: str, index: int) -> str:
        value = getattr(entries[index], f"{noun}_id")
        if value is UNSET:
            return f"{noun}_id is missing"
        if _is_id(value):
            return f"there is no {noun} {reprlib.repr(value) if type(value) is str else value}"
        return f"{noun}_id is {reprlib.repr(value)}, expected the id of the {noun}"

    _check_ignored(table, is_crowd, warnings)
    drop(image < 0, "whose image is not listed", lambda i: describe_reference("image", i))
    drop(category < 0, "whose category is not listed", lambda i: describe_reference("category", i))
    drop(~has_box, "without 4 numbers", lambda i: _describe_box(entries[i]))
    drop(
        ~has_flag,
        "whose iscrowd is not 0 or 1",
        lambda i: f"iscrowd is {reprlib.repr(entries[i].iscrowd)}, expected 0 or 1",
    )
    areas = _read_areas(table, is_kept, warnings)
    findings = _describe_masks(table, {problem: is_bad & is_kept for problem, is_bad in bad_masks.items()})
    if not is_kept.all():
        table = table.select(is_kept)
    return _Boxes(
        name=table.name,
        image=image[is_kept],
        category=category[is_kept],
        xywh=xywh[is_kept],
        is_crowd=is_crowd[is_kept],
        areas=areas[is_kept],
        dropped=tuple(findings for findings in dropped if findings.count),
        masks=masks if masks is None or is_kept.all() else masks.select(is_kept),
        bad_masks=findings,
    )


def _read_masks(
    table: _Table[_Annotation], *, has_masks: bool
) -> tuple[MaskArrays | None, dict[str, Bool[np.ndarray, " n"]]]:
    """Read the masks, or those of objects without a box alone; None if there are none. See `read_segmentations`."""
    texts = [
        annotation.segmentation if has_masks or not annotation.bbox else NO_MASK
        for annotation in table.entries
    ]
    if all(text is NO_MASK for text in texts):
        return None, {}
    return read_segmentations(texts)


def _describe_masks(
    table: _Table[_Annotation], bad_masks: dict[str, Bool[np.ndarray, " n"]]
) -> tuple[Findings, ...]:
    def describe(index: int) -> str:
        text = bytes(table.entries[index].segmentation).decode(errors="replace")
        return f"{table.name(index)}: segmentation is {reprlib.repr(text)}"

    left_out = {
        UNREADABLE: f"{UNREADABLE}, left out; {EXPECTED}",
        FEW_POINTS: f"{FEW_POINTS}, which is left out",
    }
    findings = [
        Findings.collect(left_out[problem], is_bad, describe, noun="mask", plural="masks")
        for problem, is_bad in bad_masks.items()
    ]
    return tuple(each for each in findings if each.count)


def _column(entries: list[_Annotation], key: str, kind: type[np.generic]) -> Any:
    """Return the values of a key: an array if their type was checked as they were decoded, a list otherwise."""
    if entries and type(entries[0]) is _StrictAnnotation:
        with contextlib.suppress(OverflowError):
            return np.fromiter(map(attrgetter(key), entries), kind, len(entries))
    return [getattr(entry, key) for entry in entries]


def _describe_others(table: _Table[_Annotation]) -> Findings:
    return Findings(
        problem="not given as objects", count=len(table.problems), examples=table.problems[:MAX_LISTED]
    )


def _describe_box(entry: _Annotation) -> str:
    if entry.bbox is None:
        return "bbox is missing, and no mask to compute it from"
    return f"bbox is {reprlib.repr(entry.bbox)}, expected a list of 4 numbers: x, y, width, height"


def _check_annotation_ids(table: _Table[_Annotation], warnings: list[str]) -> None:
    """Warn of ids that several annotations have; ids are used in messages only."""
    ids = _column(table.entries, "id", np.int64)
    if isinstance(ids, np.ndarray):
        if (np.diff(np.sort(ids)) > 0).all():
            return
        ids = ids.tolist()
    keys = [repr(one) for one in ids if one is not UNSET]
    num_repeats = len(keys) - len(set(keys))
    if num_repeats:
        repeated = next(one for one, count in Counter(keys).items() if count > 1)
        warnings.append(
            f"{counted(num_repeats, 'annotation')} with the id of another, all used (such as id {repeated})"
        )


def _read_numbers(
    table: _Table[_Annotation], masks: MaskArrays | None, warnings: list[str]
) -> tuple[Float[np.ndarray, "n 4"], Bool[np.ndarray, " n"]]:
    """Read `bbox`, or compute it from the mask where it is absent.

    Returns:
        (n, 4) xywh, and (n,) whether each could be read.
    """
    values: list[Any] = list(map(attrgetter("bbox"), table.entries))
    num_entries = len(values)
    is_missing = np.fromiter(map(not_, values), np.bool_, num_entries)
    boxes = np.zeros((num_entries, 4))
    is_read = ~is_missing
    if num_entries and not isinstance(table.entries[0], _JSONAnnotation):  # decoded as 4 numbers
        numbers = chain.from_iterable(filter(None, values))
        boxes[is_read] = np.fromiter(numbers, np.float64, 4 * int(is_read.sum())).reshape(-1, 4)
    else:
        parsed = [_parse_numbers(value) for value in values]
        is_read = np.array([box is not None for box in parsed], dtype=np.bool_)
        boxes[is_read] = np.array(list(filter(None, parsed)), dtype=np.float64).reshape(-1, 4)
    if masks is not None and is_missing.any():
        rows = np.flatnonzero(is_missing)
        boxes[rows] = to_xywh(masks.select(rows).bounds())
        is_computed = is_missing & ~np.isnan(boxes[:, 0])
        computed = Findings.collect(
            "without bbox, computed from the mask",
            is_computed,
            lambda i: f"{table.name(i)}: {boxes[i].tolist()}",
        )
        warnings += [str(computed)] * (computed.count > 0)
        is_read |= is_computed
    return boxes, is_read


def _parse_numbers(value: Any) -> list[float] | None:
    """Return the 4 numbers of a box, which may be text; None if they are not."""
    if type(value) is not list or len(value) != 4 or not set(map(type, value)) <= {int, float, str}:
        return None
    try:
        return [float(number) for number in value]
    except (ValueError, OverflowError):
        return None


def _read_flags(
    values: list[Any] | Int64[np.ndarray, " n"],
) -> tuple[Bool[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """Read `iscrowd`; return the flags, and whether each could be read."""
    if isinstance(values, np.ndarray):
        return values == 1, (values == 0) | (values == 1)
    flags = [_FLAGS.get(value) if isinstance(value, str | int | float | None) else None for value in values]
    return (
        np.array([flag is True for flag in flags], dtype=np.bool_),
        np.array([flag is not None for flag in flags], dtype=np.bool_),
    )


def _check_ignored(table: _Table[_Annotation], is_crowd: Bool[np.ndarray, " n"], warnings: list[str]) -> None:
    """Warn of boxes that a key that COCO does not have marks as regions to ignore."""
    if any(map(attrgetter("ignore"), table.entries)):
        ignored = Findings.collect(
            "with ignore: 1, which is not read, used as objects (expected iscrowd: 1)",
            np.array([entry.ignore in (1, "1") for entry in table.entries], dtype=np.bool_) & ~is_crowd,
            table.name,
        )
        if ignored.count:
            warnings.append(str(ignored))


def _read_areas(
    table: _Table[_Annotation], is_kept: Bool[np.ndarray, " n"], warnings: list[str]
) -> Float[np.ndarray, " n"]:
    """Read `area`; NaN where there is none, or none that can be used."""
    values = _column(table.entries, "area", np.float64)
    if isinstance(values, np.ndarray):
        areas, is_given = values, ~np.isnan(values)
    else:
        areas = np.array([_parse_area(value) for value in values], dtype=np.float64)
        is_given = np.array([value is not None for value in values], dtype=np.bool_)
    is_good = np.isfinite(areas) & (areas >= 0)
    wrong = Findings.collect(
        "whose area is not a number of at least 0, computed from the box",
        is_kept & is_given & ~is_good,
        lambda i: f"{table.name(i)}: area is {reprlib.repr(table.entries[i].area)}",
    )
    if wrong.count:
        warnings.append(str(wrong))
    return np.where(is_good, areas, np.nan)


def _parse_area(value: Any) -> float:
    try:
        return float(value) if type(value) in (int, float, str) else np.nan
    except (ValueError, OverflowError):
        return np.nan
