"""Read COCO's `segmentation`: polygons and run-length encodings, compressed or not, into flat arrays.

A few hundred are decoded at a time, so that only these exist as Python objects.
"""

import contextlib
import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import msgspec
import numpy as np
from jaxtyping import Bool

from sniper.data.datasets.raw import MAX_SIDE
from sniper.geometry.boxes import ragged_rows
from sniper.geometry.masks import MaskArrays, encode_counts

NO_MASK = msgspec.Raw(b"null")
"""The text of an object without a mask."""

UNREADABLE = "that cannot be read"
"""What is wrong with a mask that is neither polygons nor run lengths."""

FEW_POINTS = "with a polygon of fewer than 3 points"
"""What is wrong with a mask of which a polygon is not used."""

EXPECTED = "expected lists of x, y, x, y, ..., or size and counts of run lengths"
"""What a mask should be."""

_AT_ONCE = 512  # objects that are decoded together


class _Encoding(msgspec.Struct, gc=False):
    size: tuple[int, int]
    counts: str | list[int]


_Segmentation = list[list[float]] | _Encoding | None
_MANY = msgspec.json.Decoder(list[_Segmentation])
_SINGLE = msgspec.json.Decoder(_Segmentation, strict=False)  # numbers may be text
_FLAT = msgspec.json.Decoder(list[float], strict=False)


def read_segmentations(
    texts: Sequence[msgspec.Raw],
) -> tuple[MaskArrays, dict[str, Bool[np.ndarray, " n"]]]:
    """Read the masks of the objects of a file.

    Args:
        texts: JSON of each object's segmentation; `NO_MASK` where it has none.

    Returns:
        The masks, and which (n,) of them have a problem, by problem. Encodings are not checked here.
    """
    parts = [MaskArrays.none()]
    is_unreadable, has_few_points = np.zeros((2, len(texts)), dtype=np.bool_)
    for start in range(0, len(texts), _AT_ONCE):
        chunk = texts[start : start + _AT_ONCE]
        try:
            objects: list[Any] = _MANY.decode(b"[" + b",".join(map(bytes, chunk)) + b"]")
        except (ValueError, RecursionError):  # msgspec's errors are ValueErrors
            objects = [_decode_leniently(text) for text in chunk]
        for index, each in enumerate(objects):
            if each is _UNREADABLE or (isinstance(each, _Encoding) and not _has_sides(each)):
                is_unreadable[start + index] = True
                objects[index] = None
        masks, has_short_ring, is_odd = _pack(objects)
        parts.append(masks)
        is_unreadable[start : start + len(chunk)] |= is_odd
        has_few_points[start : start + len(chunk)] = has_short_ring
    return MaskArrays.concatenate(parts), {
        UNREADABLE: is_unreadable,
        FEW_POINTS: has_few_points,
    }


def to_text(segmentation: Any) -> msgspec.Raw:
    """Return the JSON of a segmentation that was read as plain JSON."""
    try:
        return msgspec.Raw(json.dumps(segmentation).encode())
    except (ValueError, RecursionError):  # an integer of thousands of digits, or nested too deeply
        return msgspec.Raw(b'"?"')


_UNREADABLE = object()


def _decode_leniently(text: msgspec.Raw) -> Any:
    """Decode the segmentation of one object, also if it is a single polygon outside a list."""
    for decoder in (_SINGLE, _FLAT):
        with contextlib.suppress(ValueError, RecursionError):
            segmentation = decoder.decode(text)
            return [segmentation] if decoder is _FLAT else segmentation
    return _UNREADABLE


def _has_sides(encoding: _Encoding) -> bool:
    if isinstance(encoding.counts, str) and not encoding.counts.isascii():
        return False
    return all(1 <= side <= MAX_SIDE for side in encoding.size)


def _pack(objects: Sequence[Any]) -> tuple[MaskArrays, np.ndarray, np.ndarray]:
    """Pack decoded segmentations.

    Returns:
        The masks, (n,) whether a polygon of fewer than 3 points was left out of each, and (n,) whether each was left
        out because it has an x without a y.
    """
    rings_of = [each if isinstance(each, list) else [] for each in objects]
    codes = [_to_codes(each) if isinstance(each, _Encoding) else b"" for each in objects]
    sides = [each.size[::-1] if isinstance(each, _Encoding) else (0, 0) for each in objects]
    num_rings = np.array([len(rings) for rings in rings_of], dtype=np.int64)
    lengths = np.array([len(ring) for rings in rings_of for ring in rings], dtype=np.int64)
    numbers = np.fromiter(chain.from_iterable(chain.from_iterable(rings_of)), np.float64, int(lengths.sum()))
    object_of = np.repeat(np.arange(len(objects)), num_rings)
    is_odd = np.bincount(object_of[lengths % 2 == 1], minlength=len(objects)) > 0
    is_kept = (lengths >= 6) & ~is_odd[object_of]
    has_few_points = np.bincount(object_of[lengths < 6], minlength=len(objects)) > 0
    if not is_kept.all():
        _, rows = ragged_rows(np.append(0, np.cumsum(lengths)), np.flatnonzero(is_kept))
        numbers = numbers[rows]
    masks = MaskArrays.from_arrays(
        numbers.reshape(-1, 2),
        ring_lengths=lengths[is_kept] // 2,
        num_rings=np.bincount(object_of[is_kept], minlength=len(objects)),
    )
    masks = replace(
        masks,
        codes=np.frombuffer(b"".join(codes), np.uint8),
        code_offsets=np.append(0, np.cumsum([len(each) for each in codes])).astype(np.int64),
        sides=np.array(sides, dtype=np.int32).reshape(-1, 2),
    )
    return masks, has_few_points & ~is_odd, is_odd


def _to_codes(encoding: _Encoding) -> bytes:
    if isinstance(encoding.counts, str):
        return encoding.counts.encode()
    counts = np.array([min(count, 2**48) for count in encoding.counts], dtype=np.int64)
    return encode_counts(counts, np.array([0, len(counts)]))[0].tobytes()
