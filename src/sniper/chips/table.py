"""All chips of a data set as flat arrays: made from boxes, kept in one file, read one chip at a time."""

import json
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int

from sniper.chips.chip import Chip
from sniper.chips.cover import Cover, cover
from sniper.chips.image_boxes import ImageBoxes
from sniper.chips.pyramid import PyramidSpec
from sniper.errors import ChipTableError
from sniper.files import UNREADABLE, atomic_write

_VERSION = 2
_ARRAYS = ("widths", "heights", "is_negative", *(field.name for field in fields(Cover)))


@dataclass(frozen=True, kw_only=True, eq=False)
class ChipTable:
    """The chips of a data set, image after image.

    Attributes:
        pyramid: what they were cut from.
        digest: of the annotations they were made for.
        widths: (m,) of the images, pixels.
        heights: (m,) of the images, pixels.
        cover: the chips and the boxes that moved to another level.
        is_negative: (c,) which chips are there for what the detector takes for objects.
    """

    pyramid: PyramidSpec
    digest: str
    widths: Int[np.ndarray, " m"]
    heights: Int[np.ndarray, " m"]
    cover: Cover
    is_negative: Bool[np.ndarray, " c"]

    @classmethod
    def build(
        cls, pyramid: PyramidSpec, images: ImageBoxes, *, digest: str, generator: np.random.Generator
    ) -> "ChipTable":
        """Choose the positive chips of a data set.

        Args:
            pyramid: what to cut.
            images: their sides, and the boxes to cover.
            digest: of the annotations that these stand for.
            generator: see `cover`.
        """
        chosen = cover(pyramid, images, generator=generator)
        return cls(
            pyramid=pyramid,
            digest=digest,
            widths=images.widths,
            heights=images.heights,
            cover=chosen,
            is_negative=np.zeros(len(chosen.level), dtype=np.bool_),
        )

    def select(self, indices: Int[np.ndarray, " k"]) -> "ChipTable":
        """Keep some chips.

        Args:
            indices: (k,) of the chips, rising. May be empty.
        """
        counts = np.bincount(self.image_indices[indices], minlength=len(self.widths))
        return replace(
            self,
            cover=replace(
                self.cover,
                offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
                level=self.cover.level[indices],
                x=self.cover.x[indices],
                y=self.cover.y[indices],
            ),
            is_negative=self.is_negative[indices],
        )

    def of_images(self, images: range) -> "ChipTable":
        """Keep the chips of some images that follow each other, and forget the others; no box counts as moved."""
        first, last = self.cover.offsets[[images.start, images.stop]]
        return replace(
            self,
            widths=self.widths[images.start : images.stop],
            heights=self.heights[images.start : images.stop],
            cover=Cover(
                offsets=self.cover.offsets[images.start : images.stop + 1] - first,
                level=self.cover.level[first:last],
                x=self.cover.x[first:last],
                y=self.cover.y[first:last],
                moved_to=np.zeros(0, dtype=np.int8),
            ),
            is_negative=self.is_negative[first:last],
        )

    def __len__(self) -> int:
        return len(self.cover.level)

    @cached_property
    def image_indices(self) -> Int[np.ndarray, " c"]:
        """The image of each chip, as an index into the data set."""
        return np.repeat(np.arange(len(self.widths)), np.diff(self.cover.offsets))

    @property
    def moved_to(self) -> Int[np.ndarray, " n"]:
        """For each box the coarser level that took it, or -1; see `Cover`."""
        return self.cover.moved_to

    @property
    def pixels(self) -> Int[np.ndarray, " c"]:
        """The pixels of each chip, padding included."""
        return np.full(len(self), self.pyramid.chip_size**2, dtype=np.int64)

    @property
    def chips_per_level(self) -> Int[np.ndarray, " l"]:
        """The number of chips at each level, finest first."""
        return np.bincount(self.cover.level, minlength=len(self.pyramid.levels))

    def chip(self, index: int, *, image_index: int) -> Chip:
        """Give one chip.

        Args:
            index: of the chip in this table.
            image_index: of its image in the data set.
        """
        level_index = int(self.cover.level[index])
        level = self.pyramid.levels[level_index].at(
            width=int(self.widths[image_index]), height=int(self.heights[image_index]), index=level_index
        )
        return Chip(
            level=level,
            x=int(self.cover.x[index]),
            y=int(self.cover.y[index]),
            width=self.pyramid.chip_size,
            height=self.pyramid.chip_size,
        )

    def save(self, path: Path) -> None:
        """Write the table to one compressed `.npz`; a file already there is replaced whole or not at all."""
        head = {"version": _VERSION, "digest": self.digest, "pyramid": asdict(self.pyramid)}
        with atomic_write(path) as file:
            np.savez_compressed(
                file,
                head=np.array(json.dumps(head)),
                widths=self.widths,
                heights=self.heights,
                is_negative=self.is_negative,
                **vars(self.cover),
            )

    @classmethod
    def load(cls, path: Path, *, pyramid: PyramidSpec, digest: str) -> "ChipTable":
        """Read a table written by `save`.

        Args:
            path: the `.npz` file.
            pyramid: the pyramid it must have been made with.
            digest: of the annotations it must have been made for.

        Raises:
            ChipTableError: if the file cannot be read, or was made for something else.
        """
        try:
            with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                head = json.loads(str(file["head"]))
                if head["version"] != _VERSION:
                    raise ChipTableError(
                        f"{path}: chip table of version {head['version']}; this program reads {_VERSION}"
                    )
                made_with, made_for = head["pyramid"], head["digest"]
                arrays = {name: file[name] for name in _ARRAYS}
        except OSError as error:
            raise ChipTableError(f"{path}: cannot be read ({error.strerror or error})") from error
        except (*UNREADABLE, TypeError) as error:
            raise ChipTableError(f"{path}: not a chip table ({error})") from error
        if made_for != digest:
            raise ChipTableError(
                f"{path}: made for other annotations (digest {made_for[:12]}, not {digest[:12]})"
            )
        wanted = json.loads(json.dumps(asdict(pyramid)))
        if made_with != wanted:
            names = [name for name in wanted if made_with.get(name) != wanted[name]]
            raise ChipTableError(f"{path}: made with another pyramid ({', '.join(names)} differ)")
        own = {name: arrays.pop(name) for name in ("widths", "heights", "is_negative")}
        return cls(pyramid=pyramid, digest=digest, **own, cover=Cover(**arrays))
