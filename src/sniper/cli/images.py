"""Image files named on the command line by path, folder, pattern or list."""

from collections.abc import Iterable, Sequence
from glob import glob
from pathlib import Path

from sniper.errors import ConfigError


def find_image_files(arguments: Sequence[str]) -> list[Path]:
    """Find the image files that arguments stand for.

    Args:
        arguments: image files, folders (searched recursively), glob patterns, and text files (`.txt`) with one path per
            line, relative to the text file.

    Returns:
        Each file once, in the order of the arguments; those of a folder or pattern are sorted.

    Raises:
        ConfigError: if a list cannot be read, or an argument stands for no image.
    """
    files: dict[Path, None] = {}
    for argument in arguments:
        if not argument:
            raise ConfigError("an image file has an empty name")
        paths = _expand(argument)
        if not paths:
            raise ConfigError(f"{argument}: no image is there")
        files |= dict.fromkeys(paths)
    return list(files)


def _expand(argument: str) -> list[Path]:
    path = Path(argument)
    if path.is_dir():
        return _images_among(path.rglob("*"))
    if path.suffix.lower() == ".txt":
        return _read_list(path)
    if not path.exists() and any(mark in argument for mark in "*?["):
        return _images_among(Path(name) for name in glob(argument, recursive=True))
    return [path]


def _images_among(paths: Iterable[Path]) -> list[Path]:
    from sniper.data.images.files import SUFFIXES

    return sorted(path for path in paths if path.suffix.lower() in SUFFIXES and not path.is_dir())


def _read_list(path: Path) -> list[Path]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a list of images ({error})") from error
    return [path.parent / line.strip() for line in lines if line.strip()]
