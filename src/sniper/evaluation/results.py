"""COCO results: the detections of many images as arrays, read from JSON and written to it."""

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from jaxtyping import Float, Shaped

from sniper.data.datasets.raw import MAX_NAME
from sniper.data.datasets.segmentations import EXPECTED, NO_MASK, read_segmentations, to_text
from sniper.errors import DetectionsError, count_and_list, counted
from sniper.files import atomic_write, no_garbage_collection, read_bytes, read_json
from sniper.geometry.masks import MaskArrays

_KEYS = ("image_id", "category_id", "bbox", "score")
_MAX_LISTED = 20
_CHUNK_BYTES = (
    1 << 17
)  # decoded at once: objects that stay in the processor's cache take two thirds of the time
_SEAM = re.compile(rb"\}[ \t\r\n]*,[ \t\r\n]*\{")
_LARGEST_WHOLE_FLOAT = 2**53  # above it neighbouring integers are the same float


@dataclass(frozen=True, kw_only=True, eq=False)
class DetectionTable:
    """Detections of many images as flat arrays, with the ids of their file.

    Attributes:
        image_ids: (n,) int64; text where some ids are text.
        category_ids: (n,) int64; text where some ids are text.
        boxes: (n, 4) xywh, image frame, pixels. May be empty.
        scores: (n,) of the detections.
        class_names: names by category id, where the results have them (`category_name`).
        masks: of the detections, image frame, where the results have them (`segmentation`).
    """

    image_ids: Shaped[np.ndarray, " n"]
    category_ids: Shaped[np.ndarray, " n"]
    boxes: Float[np.ndarray, "n 4"]
    scores: Float[np.ndarray, " n"]
    class_names: Mapping[int | str, str]
    masks: MaskArrays | None = None

    def __len__(self) -> int:
        return len(self.scores)

    @classmethod
    def from_entries(cls, entries: Sequence[Any], *, source: str = "detections") -> "DetectionTable":
        """Convert COCO results.

        Args:
            entries: mappings with `image_id`, `category_id`, `bbox` (x, y, width, height) and `score`;
                `category_name` and `segmentation` are optional, other keys are ignored. May be empty.
            source: name of the entries in errors.

        Raises:
            DetectionsError: if entries cannot be scored; the message lists the first 20 problems, and counts them all.
        """
        try:
            return _pack(entries)
        except (TypeError, ValueError, KeyError, OverflowError) as error:
            problems = [
                f"entry {index}: {problem}"
                for index, entry in enumerate(entries)
                for problem in _problems_of(entry)
            ] or [str(error)]
            listed = count_and_list(problems, limit=_MAX_LISTED, separator="\n  ")
            raise DetectionsError(
                f"{source}: {counted(len(problems), 'problem')} in "
                f"{counted(len(entries), 'entry', 'entries')}\n  {listed}"
            ) from error


def load_detections(path: Path) -> DetectionTable:
    """Read a COCO results file, and check every entry.

    Ids that are whole numbers as floats are integers. Keys beside `image_id`, `category_id`, `bbox`, `score`,
    `category_name` and `segmentation` are ignored.

    Args:
        path: a JSON file, written by `sniper predict` or by any tool that writes COCO results.

    Returns:
        The detections in the order of the file. May be empty.

    Raises:
        DetectionsError: if the file cannot be read, is not a list, or has entries that cannot be scored; the
            message lists the first 20 problems, and counts them all.
    """
    with suppress(OSError):  # explained below
        table = _decode(read_bytes(path))
        if table is not None:
            return table
    entries = read_json(path, error=DetectionsError)
    if isinstance(entries, Mapping) and entries.get("type") == "FeatureCollection":
        raise DetectionsError(
            f"{path}: is GeoJSON, which has the detections to look at; expected all of them, as in the COCO results "
            "that sniper predict writes beside it"
        )
    if not isinstance(entries, list):
        raise DetectionsError(
            f"{path}: expected a list of detections (COCO results), got {_shorten(entries)}"
        )
    return DetectionTable.from_entries(entries, source=str(path))


def save_detections(path: Path, detections: Sequence[Mapping[str, Any]]) -> None:
    """Write detections as COCO results; the file is complete or not written at all.

    Args:
        path: of the file, which is replaced if it exists. Its folder must exist.
        detections: COCO results of plain Python numbers. May be empty.

    Raises:
        ValueError: if a number is not finite.
    """
    text = json.dumps([dict(detection) for detection in detections], allow_nan=False)
    with atomic_write(path) as file:
        file.write(text.encode())


class _Entry(msgspec.Struct, gc=False):
    """An entry of the usual types."""

    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    score: float
    category_name: str | None = None
    segmentation: msgspec.Raw = NO_MASK


_DECODER = msgspec.json.Decoder(list[_Entry])


def _decode(content: bytes) -> DetectionTable | None:
    """Decode results of the usual types; return None for all others, and for those with a problem."""
    content = content.strip()
    if not (content.startswith(b"[") and content.endswith(b"]")):
        return None
    try:
        with no_garbage_collection():
            columns = [_columns(_DECODER.decode(chunk)) for chunk in _chunks(content)]
        pairs = set().union(*(column[0] for column in columns))
        masks = MaskArrays.concatenate([column[1] for column in columns])
        arrays = zip(*(column[2:] for column in columns), strict=True)
        image_ids, category_ids, scores, boxes = map(np.concatenate, arrays) if columns else _pack_empty()
        class_names = _to_class_names(pairs)
    except (ValueError, OverflowError, RecursionError):  # msgspec's errors are ValueErrors
        return None
    boxes = boxes.reshape(-1, 4)
    if (boxes[:, 2:] < 0).any():
        return None
    return DetectionTable(
        image_ids=image_ids,
        category_ids=category_ids,
        boxes=boxes,
        scores=scores,
        class_names=class_names,
        masks=masks if masks.has_mask.any() else None,
    )


def _chunks(content: bytes) -> Iterator[bytes]:
    """Split a JSON list of objects into lists of some of them.

    A cut inside an entry, between the objects of an inner list or in a string, leaves brackets or quotes open, so
    that the chunk is no JSON and the caller learns of it.
    """
    start, end, view = 1, len(content) - 1, memoryview(content)
    while start < end:
        seam = _SEAM.search(content, start + _CHUNK_BYTES, end)
        stop = end if seam is None else seam.start() + 1
        yield b"".join((b"[", view[start:stop], b"]"))
        start = end if seam is None else seam.end() - 1


def _columns(entries: Sequence[_Entry]) -> tuple[Any, ...]:
    """Return the pairs of category id and name, masks, image ids, category ids, scores and flat boxes of entries.

    Raises:
        ValueError: if a mask cannot be read.
    """
    count = len(entries)
    has_names = any(map(attrgetter("category_name"), entries))
    return (
        set(map(attrgetter("category_id", "category_name"), entries)) if has_names else set(),
        _read_masks([entry.segmentation for entry in entries]),
        np.fromiter(map(attrgetter("image_id"), entries), np.int64, count),
        np.fromiter(map(attrgetter("category_id"), entries), np.int64, count),
        np.fromiter(map(attrgetter("score"), entries), np.float64, count),
        np.fromiter(chain.from_iterable(map(attrgetter("bbox"), entries)), np.float64, 4 * count),
    )


def _read_masks(texts: Sequence[msgspec.Raw]) -> MaskArrays:
    """Return masks, or raise if one of them cannot be read."""
    if all(text is NO_MASK for text in texts):
        return MaskArrays.none(len(texts))
    masks, problems = read_segmentations(texts)
    if any(is_bad.any() for is_bad in problems.values()):
        raise ValueError("masks are polygons or run lengths")
    return masks


def _pack_empty() -> tuple[np.ndarray, ...]:
    return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0), np.zeros(0)


def _pack(entries: Sequence[Any]) -> DetectionTable:
    """Convert entries, or raise if one of them cannot be scored."""
    category_ids = [to_id(entry["category_id"]) for entry in entries]
    boxes = list(chain.from_iterable(entry["bbox"] for entry in entries))
    scores = [entry["score"] for entry in entries]
    if not all(map(_is_number_type, set(map(type, boxes)) | set(map(type, scores)))):
        raise TypeError("numbers are expected")
    if {len(entry["bbox"]) for entry in entries} - {4}:
        raise ValueError("boxes have four numbers")
    has_masks = any(entry.get("segmentation") for entry in entries)
    table = DetectionTable(
        image_ids=pack_ids([to_id(entry["image_id"]) for entry in entries]),
        category_ids=pack_ids(category_ids),
        boxes=np.array(boxes, dtype=np.float64).reshape(-1, 4),
        scores=np.array(scores, dtype=np.float64),
        class_names=_to_class_names(
            set(zip(category_ids, [_to_name(entry) for entry in entries], strict=True))
        ),
        masks=_read_masks([to_text(entry.get("segmentation")) for entry in entries]) if has_masks else None,
    )
    if not (np.isfinite(table.boxes).all() and np.isfinite(table.scores).all()):
        raise ValueError("a number is not finite")
    if (table.boxes[:, 2:] < 0).any():
        raise ValueError("a side is negative")
    return table


def pack_ids(ids: Sequence[int | str]) -> Shaped[np.ndarray, " n"]:
    """Return ids as an array: int64, or text if some are text.

    Raises:
        OverflowError: if an integer has more than 64 bits.
    """
    if any(isinstance(each, str) for each in ids):
        return np.array([str(each) for each in ids], dtype=np.str_)
    return np.array(ids, dtype=np.int64)


def to_id(value: Any) -> int | str:
    """Return an id as an integer or text; raise for everything else."""
    if isinstance(value, str):
        return str(value)
    if type(value) is bool or not _is_number_type(type(value)):
        raise TypeError("an id is an integer or text")
    number = int(value)
    if number != value or not -(2**63) <= number < 2**63:
        raise ValueError("an id is whole")
    if isinstance(value, float | np.floating) and abs(number) > _LARGEST_WHOLE_FLOAT:
        raise ValueError("an id is exact")
    return number


def _to_name(entry: Mapping[str, Any]) -> str | None:
    name = entry.get("category_name")
    if name is not None and not isinstance(name, str):
        raise TypeError("a name is text")
    return name


def _to_class_names(pairs: set[tuple[int | str, str | None]]) -> dict[int | str, str]:
    """Return names by category id; an empty name is none.

    Raises:
        ValueError: if a category has several names, or too long a one.
    """
    named = sorted(((category_id, name) for category_id, name in pairs if name), key=str)
    names: dict[int | str, str] = {}
    for category_id, name in named:
        if len(name) > MAX_NAME:
            raise ValueError(f"category {category_id} has a name of {len(name):,} characters")
        if names.setdefault(category_id, name) != name:
            raise ValueError(
                f"category {category_id} has two names in category_name: {names[category_id]!r} and {name!r}"
            )
    return names


def _is_number_type(type_: type) -> bool:
    return issubclass(type_, int | float | np.integer | np.floating) and not issubclass(type_, bool)


def _problems_of(entry: Any) -> Iterator[str]:
    """Describe why an entry of a results file cannot be scored."""
    if not isinstance(entry, Mapping):
        yield f"expected an object with {', '.join(_KEYS)}, got {_shorten(entry)}"
        return
    missing = [key for key in _KEYS if key not in entry]
    if missing:
        is_mask = "bbox" in missing and "segmentation" in entry
        reason = " (it has a segmentation, but boxes are scored)" if is_mask else ""
        yield f"has no {', '.join(missing)}{reason}"
    for key in ("image_id", "category_id"):
        if key in entry and not _is_id(entry[key]):
            yield f"{key} must be an integer of at most 64 bits or a string, not {_shorten(entry[key])}"
    if "score" in entry and not _is_finite(entry["score"]):
        yield f"score must be a finite number, not {_shorten(entry['score'])}"
    if "bbox" in entry:
        yield from _problems_of_box(entry["bbox"])
        yield from _problems_of_mask(entry.get("segmentation"))
    name = entry.get("category_name")
    if name is not None and not isinstance(name, str):
        yield f"category_name must be a string, not {_shorten(name)}"
    elif name is not None and len(name) > MAX_NAME:
        yield (
            f"category_name must have at most {MAX_NAME:,} characters, not {len(name):,}, as {_shorten(name)} has"
        )


def _problems_of_box(box: Any) -> Iterator[str]:
    is_list = isinstance(box, list | tuple | np.ndarray)
    if not is_list or len(box) != 4 or not all(_is_finite(value) for value in box):
        yield f"bbox must be four finite numbers (x, y, width, height), not {_shorten(box)}"
    elif box[2] < 0 or box[3] < 0:
        yield f"bbox has a negative width or height: {_shorten(box)}"


def _problems_of_mask(segmentation: Any) -> Iterator[str]:
    text = to_text(segmentation)
    for problem, is_bad in read_segmentations([text])[1].items():
        if is_bad.any():
            yield f"segmentation is {_shorten(segmentation)}: a mask {problem}; {EXPECTED}"


def _is_id(value: Any) -> bool:
    try:
        to_id(value)
    except (TypeError, ValueError, OverflowError):
        return False
    return True


def _is_finite(value: Any) -> bool:
    """Check whether a value is a number in the range of a float; JSON has NaN, Infinity and integers of any length."""
    return _is_number_type(type(value)) and bool(abs(value) <= sys.float_info.max)


def _shorten(value: Any) -> str:
    """Return a value as JSON, at most 60 characters."""
    if isinstance(value, Mapping) and value:
        return f"an object with {', '.join(map(str, list(value)[:5]))}"
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
