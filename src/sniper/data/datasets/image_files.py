"""The image files of a data set: the folder they are in, and whether each is the image that was annotated."""

import os
import posixpath
from dataclasses import replace
from pathlib import Path
from typing import Literal

from sniper.data.images.files import read_image_sides
from sniper.data.spec import ReadSpec
from sniper.errors import ImageError
from sniper.geometry.boxes import Sides


def find_image_root(path: Path) -> Path:
    """Return the folder that file names of an annotation file are relative to, unless another is given."""
    images = path.parent / "images"
    return images if images.is_dir() else path.parent


def leaves_root(file_name: str) -> bool:
    """Check whether a path is absolute or climbs above the folder that it is relative to."""
    if file_name.startswith("/"):
        return True
    return ".." in file_name and posixpath.normpath(file_name).split("/")[0] == ".."


def check_image_file(real_root: str, name: str, read: ReadSpec, *, expected: Sides | None) -> str | None:
    """Check one image file, and return its problem, or None.

    Args:
        real_root: folder that names are relative to, symbolic links resolved.
        name: of the file, relative.
        read: how it becomes pixels.
        expected: its sides as annotated, if known.
    """
    path = os.path.realpath(os.path.join(real_root, name))
    if os.path.commonpath([real_root, path]) != real_root:
        return f"{name} is a link that leaves the image root, to {path}"
    if not os.path.isfile(path):
        return f"{name} does not exist, expected {path}"
    try:
        sides = read_image_sides(Path(path), read)
    except ImageError as error:
        return f"{name} {str(error).removeprefix(f'{path}: ')}"
    if expected is not None and sides != expected:
        return (
            f"{name} has {sides.width}x{sides.height} pixels, but the annotations say "
            f"{expected.width}x{expected.height}{_orientation_advice(Path(path), read, expected)}"
        )
    return None


def _orientation_advice(path: Path, read: ReadSpec, expected: Sides) -> str:
    """Describe the setting of the EXIF orientation that gives a file the expected sides, if there is one."""
    other: Literal["apply", "ignore"] = "ignore" if read.exif_orientation == "apply" else "apply"
    if read_image_sides(path, replace(read, exif_orientation=other)) != expected:
        return ""
    return f", which are its sides with data.read.exif_orientation: {other}"
