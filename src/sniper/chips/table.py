"""The table of chips: flat arrays with one entry for each chip, kept in one file and read one chip at a time."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from sniper.chips.chip import Chip
from sniper.chips.pyramid import LevelSpec, PyramidSpec
from sniper.errors import ChipTableError, describe_os_error
from sniper.files import UNREADABLE, atomic_write, open_regular

_VERSION = 3
_OF_CHIPS = ("image_indices", "level", "x", "y", "widths", "heights", "is_negative")
_ARRAYS = ("image_widths", "image_heights", *_OF_CHIPS, "moved_to")


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

    @classmethod
    def load(cls, path: Path, *, pyramid: PyramidSpec, digest: str) -> "ChipTable":
        """Read a table that `save` wrote.

        Args:
            path: the `.npz` file.
            pyramid: the pyramid that the chips must be cut from.
            digest: of the annotations that the chips must have been chosen for.

        Raises:
            ChipTableError: if the file cannot be read, or belongs to another pyramid or other annotations.
        """
        try:
            with open_regular(path) as opened, np.load(opened, allow_pickle=False) as file:
                head = json.loads(str(file["head"]))
                if head["version"] != _VERSION:
                    raise ChipTableError(
                        f"{path}: chip table of version {head['version']}; this program reads {_VERSION}. "
                        "Write it again with `sniper chips`"
                    )
                saved_pyramid, saved_digest = head["pyramid"], head["digest"]
                arrays = {name: file[name] for name in _ARRAYS}
        except OSError as error:
            raise ChipTableError(f"{path}: cannot be read ({describe_os_error(error)})") from error
        except (*UNREADABLE, TypeError) as error:
            raise ChipTableError(f"{path}: not a chip table ({error})") from error
        if saved_digest != digest:
            raise ChipTableError(
                f"{path}: made for other annotations (digest {saved_digest[:12]}, expected {digest[:12]})"
            )
        expected = json.loads(json.dumps(asdict(pyramid)))
        if saved_pyramid != expected:
            names = [name for name in expected if saved_pyramid.get(name) != expected[name]]
            raise ChipTableError(f"{path}: made with another pyramid ({', '.join(names)} differ)")
        return cls(levels=pyramid.levels, **arrays)
