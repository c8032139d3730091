"""All chips of a data set as flat arrays: made from boxes, kept in one file, read one chip at a time."""

import json
import zipfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
from jaxtyping import Int

from sniper.chips.chip import Chip
from sniper.chips.cover import Cover, cover
from sniper.chips.image_boxes import ImageBoxes
from sniper.chips.pyramid import PyramidSpec
from sniper.errors import ChipTableError
from sniper.files import replace_whole

_VERSION = 1
_ARRAYS = ("widths", "heights", *(field.name for field in fields(Cover)))


@dataclass(frozen=True, kw_only=True, eq=False)
class ChipTable:
    """The chips of a data set, image after image.

    Attributes:
        pyramid: what they were cut from.
        digest: of the annotations they were made for.
        widths: (m,) of the images, pixels.
        heights: (m,) of the images, pixels.
        cover: the chips and the boxes that moved to another level.
    """

    pyramid: PyramidSpec
    digest: str
    widths: Int[np.ndarray, " m"]
    heights: Int[np.ndarray, " m"]
    cover: Cover

    @classmethod
    def build(
        cls, pyramid: PyramidSpec, images: ImageBoxes, *, digest: str, generator: np.random.Generator
    ) -> "ChipTable":
        """Choose the chips of a data set.

        Args:
            pyramid: what to cut.
            images: their sides, and the boxes to cover.
            digest: of the annotations that these stand for.
            generator: see `cover`.
        """
        return cls(
            pyramid=pyramid,
            digest=digest,
            widths=images.widths,
            heights=images.heights,
            cover=cover(pyramid, images, generator=generator),
        )

    def __len__(self) -> int:
        return len(self.cover.level)

    @property
    def image_indices(self) -> Int[np.ndarray, " c"]:
        """The image of each chip, as an index into the data set."""
        return np.repeat(np.arange(len(self.widths)), np.diff(self.cover.offsets))

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
            size=self.pyramid.chip_size,
        )

    def save(self, path: Path) -> None:
        """Write the table to one compressed `.npz`; a file already there is replaced whole or not at all."""
        head = {"version": _VERSION, "digest": self.digest, "pyramid": asdict(self.pyramid)}
        with replace_whole(path) as file:
            np.savez_compressed(
                file,
                head=np.array(json.dumps(head)),
                widths=self.widths,
                heights=self.heights,
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
        except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            raise ChipTableError(f"{path}: not a chip table ({error})") from error
        if made_for != digest:
            raise ChipTableError(
                f"{path}: made for other annotations (digest {made_for[:12]}, not {digest[:12]})"
            )
        wanted = json.loads(json.dumps(asdict(pyramid)))
        if made_with != wanted:
            names = [name for name in wanted if made_with.get(name) != wanted[name]]
            raise ChipTableError(f"{path}: made with another pyramid ({', '.join(names)} differ)")
        sides = {name: arrays.pop(name) for name in ("widths", "heights")}
        return cls(pyramid=pyramid, digest=digest, **sides, cover=Cover(**arrays))
