"""The manifest of written chips: where each was cut, so that detections on it lead back to its image.

A file of JSON lines: the first describes the chips as a whole, each further line is one chip.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from sniper.chips import Chip, Level, ValidRange
from sniper.data.datasets import Category
from sniper.errors import DetectionsError, describe_os_error
from sniper.files import atomic_write, read_bytes

MANIFEST = "chips.jsonl"
"""Name of the manifest in a folder of chips."""

_KIND, _VERSION = "sniper chips", 1


class ChipEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One written chip.

    Attributes:
        chip_id: distinct in the file; the id of the image in COCO JSON.
        file_name: of the image, relative to the folder of the manifest, with forward slashes.
        split: of the data set.
        epoch: that the chip is of, from 0.
        image_id: of the image that it is cut from.
        image: file name of that image.
        image_width: of that image, pixels.
        image_height: of that image, pixels.
        level: index of the level.
        level_width: of the image at that level, pixels.
        level_height: of the image at that level, pixels.
        at_least: lower end of the range of box sizes of the level, image pixels.
        below: upper end; None has no end.
        x: left edge of the chip, level pixels.
        y: top edge of the chip, level pixels.
        width: of the written image, pixels.
        height: of the written image, pixels.
        image_box: x1, y1, x2, y2 of the part of the image that the chip shows, image pixels.
        scale: factor from the image to the chip; above 1 enlarges.
        is_negative: whether it is a negative chip.
        num_boxes: annotated objects, without regions to ignore.
        window: longest side of the windows that the level is searched in, level pixels; None for chips that are not
            windows of a search.
    """

    chip_id: int
    file_name: str
    split: str
    epoch: int
    image_id: int | str
    image: str
    image_width: int
    image_height: int
    level: int
    level_width: int
    level_height: int
    at_least: float
    below: float | None
    x: int
    y: int
    width: int
    height: int
    image_box: tuple[float, float, float, float]
    scale: float
    is_negative: bool
    num_boxes: int
    window: int | None

    @classmethod
    def of(
        cls,
        chip: Chip,
        *,
        is_padded: bool,
        **fields: Any,
    ) -> "ChipEntry":
        """Describe a chip; `fields` are those that do not follow from it."""
        level = chip.level
        visible = chip.visible
        sides = (chip.width, chip.height) if is_padded else visible
        shown = chip.window[None].copy()
        shown[0, 2:] = chip.x + visible.width, chip.y + visible.height
        x1, y1, x2, y2 = (round(value, 4) for value in level.to_image(shown)[0].tolist())
        return cls(
            image_width=level.image_width,
            image_height=level.image_height,
            level=level.index,
            level_width=level.width,
            level_height=level.height,
            at_least=level.valid_range.at_least,
            below=level.valid_range.below if math.isfinite(level.valid_range.below) else None,
            x=chip.x,
            y=chip.y,
            width=sides[0],
            height=sides[1],
            image_box=(x1, y1, x2, y2),
            scale=round(level.scale, 6),
            **fields,
        )

    @property
    def chip(self) -> Chip:
        """The chip."""
        return Chip(
            level=Level(
                index=self.level,
                image_width=self.image_width,
                image_height=self.image_height,
                width=self.level_width,
                height=self.level_height,
                valid_range=ValidRange(
                    at_least=self.at_least, below=math.inf if self.below is None else self.below
                ),
            ),
            x=self.x,
            y=self.y,
            width=self.width,
            height=self.height,
        )


@dataclass(frozen=True, kw_only=True)
class ManifestHead:
    """The first line of a manifest.

    Attributes:
        digest: of everything that the chips depend on.
        categories: by label.
        counts: what was written and what was left out.
    """

    digest: str
    categories: tuple[Category, ...]
    counts: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class ChipManifest:
    """A manifest in memory.

    Attributes:
        path: of its file.
        head: the first line.
        chips: the others.
    """

    path: Path
    head: ManifestHead
    chips: Sequence[ChipEntry]

    def of_split(self, split: str | None) -> "ChipManifest":
        """Return the chips of one split; None takes the only one that there is, or those whose images differ by id.

        Raises:
            DetectionsError: if there is no such split, or images of two splits have one id and none is named.
        """
        names = sorted({chip.split for chip in self.chips})
        if split is not None:
            chosen = [chip for chip in self.chips if chip.split == split]
            if not chosen:
                raise DetectionsError(
                    f"{self.path}: has no chips of split {split}, expected one of {', '.join(names)}"
                )
            return replace(self, chips=chosen)
        ids = {(chip.split, chip.image_id) for chip in self.chips}
        if len({image_id for _, image_id in ids}) < len(ids):
            raise DetectionsError(
                f"{self.path}: images of several splits have the same ids; name the split that the detections are of: "
                f"--split {' or '.join(names)}"
            )
        return self


def write_manifest(path: Path, head: ManifestHead, chips: Iterator[ChipEntry]) -> None:
    """Write a manifest, whole or not at all."""
    content = {
        "manifest": _KIND,
        "version": _VERSION,
        "digest": head.digest,
        "categories": [{"id": category.category_id, "name": category.name} for category in head.categories],
        "counts": dict(head.counts),
    }
    with atomic_write(path) as file:
        file.write(json.dumps(content).encode() + b"\n")
        for chip in chips:
            file.write(msgspec.json.encode(chip) + b"\n")


def read_head(path: Path) -> ManifestHead | None:
    """Read the first line of a manifest; None if the file is not one."""
    try:
        with path.open("rb") as file:
            return _parse_head(file.readline())
    except (OSError, ValueError):
        return None


def read_manifest(path: Path) -> ChipManifest:
    """Read a manifest.

    Args:
        path: of the file, or of the folder that has it.

    Raises:
        DetectionsError: if it cannot be read, or is no manifest.
    """
    if path.is_dir():
        path = path / MANIFEST
    try:
        content = read_bytes(path)
    except OSError as error:
        raise DetectionsError(
            f"{path}: cannot be read ({describe_os_error(error)}); expected the {MANIFEST} that sniper chips --to "
            "writes, or its folder"
        ) from error
    first, _, rest = content.partition(b"\n")
    try:
        head = _parse_head(first)
    except ValueError as error:
        raise DetectionsError(
            f"{path}: is no manifest of chips ({error}); expected the {MANIFEST} that sniper chips --to writes"
        ) from error
    try:
        chips = msgspec.json.Decoder(ChipEntry).decode_lines(rest)
    except ValueError as error:
        raise DetectionsError(f"{path}: is damaged ({error}); write the chips again") from error
    return ChipManifest(path=path, head=head, chips=chips)


def _parse_head(line: bytes) -> ManifestHead:
    content = json.loads(line)
    if not isinstance(content, dict) or content.get("manifest") != _KIND:
        raise ValueError(f'its first line has no "manifest": "{_KIND}"')
    if content.get("version") != _VERSION:
        raise ValueError(f"it has version {content.get('version')}, this program reads {_VERSION}")
    try:
        return ManifestHead(
            digest=content["digest"],
            categories=tuple(
                Category(category_id=entry["id"], name=entry["name"]) for entry in content["categories"]
            ),
            counts=content["counts"],
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"its first line has no {error}") from error
