"""The table of chips: flat arrays with one entry for each chip, kept in one file and read one chip at a time."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from sniper.chips.arrays import read_arrays
from sniper.chips.chip import Chip
from sniper.chips.image_boxes import ImageBoxes
from sniper.chips.pyramid import LevelSpec, PyramidSpec
from sniper.errors import ChipTableError, count_and_list, describe_os_error
from sniper.files import atomic_write
from sniper.specs import parse_json

_VERSION = 3
_OF_CHIPS = ("image_indices", "level", "x", "y", "widths", "heights", "is_negative")
_ARRAYS = ("image_widths", "image_heights", *_OF_CHIPS, "moved_to")


@dataclass(frozen=True, kw_only=True)
class _Head:
    """What a file has beside its arrays; those of earlier versions may lack the rest."""

    version: int
    digest: str = ""
    pyramid: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, eq=False)
class ChipTable:
    """Windows of the levels of many images: chips, tiles or whole images.

    Attributes:
        levels: the levels that the images are resized to.
        image_widths: (m,) widths of the images, pixels.
        image_heights: (m,) heights of the images, pixels.
        image_indices: (c,) the image of each chip.
        level: (c,) the index of its level.
        x: (c,) its left edge, level pixels.
        y: (c,) its top edge, level pixels.
        widths: (c,) widths of the chips, level pixels; padding included.
        heights: (c,) heights of the chips, level pixels; padding included.
        is_negative: (c,) which chips are negative, that is, cut around likely false positives.
        moved_to: (n,) for each box of the images, the coarser level that it moved to because no window of its own
            levels can contain it; -1 for boxes that did not move.
    """

    levels: tuple[LevelSpec, ...]
    image_widths: Int[np.ndarray, " m"]
    image_heights: Int[np.ndarray, " m"]
    image_indices: Int[np.ndarray, " c"]
    level: Int[np.ndarray, " c"]
    x: Int[np.ndarray, " c"]
    y: Int[np.ndarray, " c"]
    widths: Int[np.ndarray, " c"]
    heights: Int[np.ndarray, " c"]
    is_negative: Bool[np.ndarray, " c"]
    moved_to: Int[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.level)

    @cached_property
    def offsets(self) -> Int[np.ndarray, " m_plus_1"]:
        """Where the chips of each image begin, in a table that is ordered by image."""
        counts = np.bincount(self.image_indices, minlength=len(self.image_widths))
        return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    @property
    def pixels(self) -> Int[np.ndarray, " c"]:
        """The number of pixels of each chip, padding included."""
        return self.widths.astype(np.int64) * self.heights

    @property
    def chips_per_level(self) -> Int[np.ndarray, " l"]:
        """The number of chips at each level."""
        return np.bincount(self.level, minlength=len(self.levels))

    def chip(self, index: int) -> Chip:
        """Return one chip."""
        image, level = int(self.image_indices[index]), int(self.level[index])
        return Chip(
            level=self.levels[level].at(
                width=int(self.image_widths[image]), height=int(self.image_heights[image]), index=level
            ),
            x=int(self.x[index]),
            y=int(self.y[index]),
            width=int(self.widths[index]),
            height=int(self.heights[index]),
        )

    def select(self, indices: Int[np.ndarray, " k"]) -> "ChipTable":
        """Return a table of some chips of the same images.

        Args:
            indices: (k,) the chips, in the order of the new table. May be empty.
        """
        return replace(self, **{name: getattr(self, name)[indices] for name in _OF_CHIPS})

    def of_images(self, images: range) -> "ChipTable":
        """Return a table of some consecutive images with their chips, and without `moved_to`.

        Args:
            images: the images. This table must be ordered by image.
        """
        chips = slice(*self.offsets[[images.start, images.stop]].tolist())
        arrays = {name: getattr(self, name)[chips] for name in _OF_CHIPS}
        return ChipTable(
            levels=self.levels,
            image_widths=self.image_widths[images.start : images.stop],
            image_heights=self.image_heights[images.start : images.stop],
            moved_to=np.zeros(0, dtype=np.int8),
            **{**arrays, "image_indices": arrays["image_indices"] - images.start},
        )

    def merge(self, other: "ChipTable") -> "ChipTable":
        """Return a table with the chips of another table of the same images added, and with this table's `moved_to`.

        It is ordered by image; among the chips of an image, those of `other` come last.
        """
        arrays: dict[str, Any] = {
            name: np.concatenate([getattr(table, name) for table in (self, other)]) for name in _OF_CHIPS
        }
        order = np.argsort(arrays["image_indices"], kind="stable")
        return replace(self, **{name: values[order] for name, values in arrays.items()})

    @staticmethod
    def concatenate(tables: Sequence["ChipTable"]) -> "ChipTable":
        """Join tables of consecutive images.

        Args:
            tables: at least one table; all have the same levels.
        """
        arrays = {name: np.concatenate([getattr(table, name) for table in tables]) for name in _ARRAYS}
        num_images = [len(table.image_widths) for table in tables]
        first_images = np.repeat(np.cumsum(num_images) - num_images, [len(table) for table in tables])
        arrays["image_indices"] = arrays["image_indices"] + first_images
        return ChipTable(levels=tables[0].levels, **arrays)

    def save(self, path: Path, *, pyramid: PyramidSpec, digest: str) -> None:
        """Write the table to one compressed `.npz` file; an existing file is replaced atomically.

        Args:
            path: the file to write.
            pyramid: the pyramid that the chips are cut from.
            digest: of the annotations that the chips were chosen for.
        """
        head = {"version": _VERSION, "digest": digest, "pyramid": asdict(pyramid)}
        with atomic_write(path) as file:
            np.savez_compressed(
                file, head=np.array(json.dumps(head)), **{name: getattr(self, name) for name in _ARRAYS}
            )

    @staticmethod
    def is_table(path: Path) -> bool:
        """Check whether a file has the arrays that `save` writes, of whatever version."""
        try:
            read_arrays(path, ["head", "image_indices"])
        except (OSError, ValueError):
            return False
        return True

    @classmethod
    def load(cls, path: Path, *, pyramid: PyramidSpec, images: ImageBoxes, digest: str) -> "ChipTable":
        """Read a table that `save` wrote.

        Args:
            path: the `.npz` file.
            pyramid: the pyramid that the chips must be cut from.
            images: the images that the chips must be of, with their boxes.
            digest: of the annotations that the chips must have been chosen for.

        Raises:
            ChipTableError: if the file cannot be read, belongs to another pyramid or other annotations, or has chips
                that cannot be cut.
        """
        try:
            head = parse_json(str(read_arrays(path, ["head"])["head"]), _Head)
            if head.version != _VERSION:
                raise ChipTableError(
                    f"{path}: chip table of version {head.version}; this program reads {_VERSION}. "
                    "Write it again with `sniper chips`"
                )
            arrays = read_arrays(path, _ARRAYS)
        except OSError as error:
            raise ChipTableError(f"{path}: cannot be read ({describe_os_error(error)})") from error
        except ValueError as error:
            raise ChipTableError(f"{path}: not a chip table ({error})") from error
        if head.digest != digest:
            raise ChipTableError(
                f"{path}: made for other annotations (digest {head.digest[:12]}, expected {digest[:12]})"
            )
        expected = json.loads(json.dumps(asdict(pyramid)))
        if head.pyramid != expected:
            names = [name for name in expected if head.pyramid.get(name) != expected[name]]
            raise ChipTableError(f"{path}: made with another pyramid ({', '.join(names)} differ)")
        problems = list(_problems_of_shapes(arrays, images))
        problems = problems or list(_problems_of_values(arrays, images, pyramid))
        if problems:
            raise ChipTableError(
                f"{path}: damaged: {count_and_list(problems)}. Write it again with `sniper chips`"
            )
        return cls(levels=pyramid.levels, **arrays)


def _problems_of_shapes(arrays: dict[str, np.ndarray], images: ImageBoxes) -> Iterator[str]:
    """Describe the arrays of a file that have another type or length than those of a table."""
    num_chips = arrays["level"].size
    lengths = {"image_widths": len(images), "image_heights": len(images), "moved_to": len(images.boxes)}
    for name, array in arrays.items():
        kind, noun = ("b", "flags") if name == "is_negative" else ("i", "integers")
        length = lengths.get(name, num_chips)
        if array.dtype.kind != kind or array.shape != (length,):
            yield f"{name} has {array.size} values of type {array.dtype}, expected {length} {noun}"


def _problems_of_values(
    arrays: dict[str, np.ndarray], images: ImageBoxes, pyramid: PyramidSpec
) -> Iterator[str]:
    """Describe the values that no table of these images has."""
    num_levels, size = len(pyramid.levels), pyramid.chip_size
    indices, level = arrays["image_indices"], arrays["level"]
    for name, expected in (("image_widths", images.widths), ("image_heights", images.heights)):
        yield from _first_wrong(name, arrays[name], arrays[name] == expected, "those of the annotations")
    for name, low, high in (
        ("image_indices", 0, len(images)),
        ("level", 0, num_levels),
        ("moved_to", -1, num_levels),
    ):
        values = arrays[name]
        yield from _first_wrong(name, values, (values >= low) & (values < high), f"{low} to {high - 1}")
    for name in ("widths", "heights"):
        yield from _first_wrong(name, arrays[name], arrays[name] == size, f"{size} (pyramid.chip_size)")
    is_after = np.diff(indices, prepend=indices[:1]) >= 0
    yield from _first_wrong("image_indices", indices, is_after, "ascending numbers")
    is_known = (indices >= 0) & (indices < len(images)) & (level >= 0) & (level < num_levels)
    sides = np.array([spec.resized(images.widths, images.heights) for spec in pyramid.levels])  # (l, 2, m)
    for axis, name in enumerate(("x", "y")):
        starts = arrays[name][is_known].astype(np.int64)
        shows = (starts > -size) & (starts < sides[level[is_known], axis, indices[is_known]])
        yield from _first_wrong(name, starts, shows, "a window that shows a part of the image")


def _first_wrong(name: str, values: np.ndarray, is_right: np.ndarray, expected: str) -> Iterator[str]:
    """Describe the first of the values that are not right; nothing if all are."""
    wrong = np.flatnonzero(~is_right)
    if len(wrong):
        yield f"{name}[{wrong[0]}] is {values[wrong[0]]}, expected {expected} ({len(wrong)} such values)"
