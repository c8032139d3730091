"""Image files named on the command line by path, folder, pattern or list."""

import codecs
import itertools
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from itertools import islice
from pathlib import Path

from sniper.errors import ConfigError, count_and_list, describe_os_error, printable
from sniper.files import expand_path, is_ignored, match_remote, matches_pattern, read_bytes, similar_files
from sniper.remote import RemotePath, is_remote

_HIDDEN, _UNREADABLE = "hidden with images", "folders that cannot be read"
_BROKEN, _SPECIAL, _BARE = "broken links", "pipes, sockets or devices", "without a suffix"
_OTHER_CONTENT = "with the suffix but not the content of an image"
_NAMED = (_HIDDEN, _UNREADABLE, _BROKEN, _SPECIAL, _OTHER_CONTENT)  # kinds whose names are listed
_MAX_HIDDEN = 10_000  # names in a hidden folder that are compared with suffixes of images


@dataclass(frozen=True)
class SearchedFiles:
    """The image files that arguments stand for.

    Attributes:
        images: each once, in the order of the arguments; those of a folder or pattern are sorted.
        warnings: what else is there, a line for each argument.
    """

    images: list[Path]
    warnings: list[str]


def find_image_files(arguments: Sequence[str]) -> SearchedFiles:
    """Find the image files that arguments stand for.

    Args:
        arguments: image files, folders (searched recursively), glob patterns, and text files (`.txt`) with one path per
            line, relative to the text file. Of folders and patterns, the files are taken whose content starts like that
            of an image and whose suffix, if they have one, is that of a format that can be decoded. Hidden files and
            folders, thumbnails and trash are passed over. `~` and `$NAME` are expanded.

    Raises:
        ConfigError: if a path does not exist, a list or a folder cannot be read, or an argument stands
            for no image.
    """
    images: dict[Path, None] = {}
    warnings = []
    for argument in arguments:
        if not argument:
            raise ConfigError("an image file has an empty name")
        walk = _Walk()
        paths = _expand(expand_path(argument), walk)
        others = walk.describe_others()
        if not paths:
            raise ConfigError(
                f"{argument}: no image is there" + (f"; passed over {others}" if others else "")
            )
        if others:
            warnings.append(f"{argument}: passed over {others}")
        images |= dict.fromkeys(paths)
    return SearchedFiles(list(images), warnings)


def _expand(path: Path, walk: "_Walk") -> list[Path]:
    if is_remote(path):
        return _expand_remote(path)
    if path.is_dir():
        return sorted(Path(entry.path) for entry in walk.files(path) if walk.is_image(entry))
    if not os.path.lexists(path) and has_magic(str(path)):
        return sorted(_match(path, walk))
    if path.suffix.lower() == ".txt":
        return _read_list(path)
    if not os.path.lexists(path):
        near = similar_files(path)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ConfigError(f"{path}: no such file or folder{hint}")
    return [path]


def _expand_remote(path: RemotePath) -> list[Path]:
    """Return the images that a URL stands for: a folder or a pattern, by their suffixes, a list, or a file."""
    from sniper.data.images.formats import image_suffixes

    if has_magic(str(path)):
        found: Iterable[Path] = match_remote(path)
    elif path.suffix.lower() == ".txt":
        return _read_list(path)
    elif path.suffix.lower() not in image_suffixes() and path.is_dir():
        found = sorted(path.walk_files())
    else:
        return [path]
    return [each for each in found if each.suffix.lower() in image_suffixes() and not is_ignored(each.name)]


class _Walk:
    """A search of folders that counts what it passes over. Each folder is searched once, whatever links lead to it."""

    def __init__(self) -> None:
        from sniper.data.images.formats import image_suffixes

        self._suffixes = image_suffixes()
        self._others: dict[str, list[str]] = defaultdict(list)

    def files(self, folder: Path) -> Iterator[os.DirEntry[str]]:
        """Yield all that is not a folder, in and below a folder; folders behind links come last.

        Raises:
            ConfigError: if the folder cannot be read; those below it are counted.
        """
        folders, links = [str(folder)], list[str]()
        seen = set[tuple[int, int]]()
        while folders or links:
            path = folders.pop() if folders else links.pop(0)
            try:
                status = os.stat(path)
                with os.scandir(path) as scanned:
                    entries = sorted(scanned, key=lambda entry: entry.name)
            except OSError as error:
                if path == str(folder):
                    raise ConfigError(f"{path}: cannot be read ({describe_os_error(error)})") from error
                self._others[_UNREADABLE].append(path)
                continue
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            for entry in entries:
                if is_ignored(entry.name):
                    if self._has_images(entry):
                        self._others[_HIDDEN].append(entry.path)
                elif not _is_folder(entry):
                    yield entry
                else:
                    (links if entry.is_symlink() else folders).append(entry.path)

    def count_hidden(self, path: Path) -> None:
        """Count a file that is passed over, if its suffix is that of an image."""
        if path.suffix.lower() in self._suffixes:
            self._others[_HIDDEN].append(str(path))

    def is_image(self, path: os.DirEntry[str] | Path) -> bool:
        """Check whether a file is an image; count it as something else if it is not."""
        from sniper.data.images.encoded import has_image_content

        suffix = os.path.splitext(path.name)[1].lower()
        is_bare = suffix in ("", ".")
        if is_bare or suffix in self._suffixes:
            if not _is_file(path):
                self._others[_BROKEN if path.is_symlink() else _SPECIAL].append(os.fspath(path))
                return False
            if has_image_content(Path(path)):
                return True
            self._others[_BARE if is_bare else _OTHER_CONTENT].append(os.fspath(path))
        else:
            self._others[suffix].append(os.fspath(path))
        return False

    def describe_others(self) -> str:
        """Describe what was passed over: how many files of each kind; empty if there was nothing."""
        from sniper.data.images.formats import EXTRAS

        parts = []
        for kind, paths in sorted(self._others.items()):
            part = f"{len(paths)} {kind}"
            if kind in _NAMED:
                part += f" ({count_and_list(paths, separator=', ')})"
            elif kind in EXTRAS:
                part += f" (pip install 'sniper-det[{EXTRAS[kind]}]')"
            parts.append(part)
        return ", ".join(parts)

    def _has_images(self, entry: os.DirEntry[str]) -> bool:
        """Check by suffixes whether a hidden entry is an image, or a folder with images."""
        names: Iterator[str] = iter([entry.name])
        if entry.is_dir(follow_symlinks=False):
            names = (name for _, _, listed in os.walk(entry.path) for name in listed)
        return any(os.path.splitext(name)[1].lower() in self._suffixes for name in islice(names, _MAX_HIDDEN))


def _is_file(path: os.DirEntry[str] | Path) -> bool:
    """Check for a regular file, or a link to one; most entries of a folder need no call of the system."""
    is_plain = isinstance(path, os.DirEntry) and path.is_file(follow_symlinks=False)
    return is_plain or os.path.isfile(path)  # False for a link in a circle, too


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle
        return False


def _match(pattern: Path, walk: _Walk) -> Iterator[Path]:
    """Yield the image files that match a pattern; `**` stands for any number of folders."""
    base, parts = Path(), list(pattern.parts)
    while parts and (not has_magic(parts[0]) or os.path.lexists(base / parts[0])):
        base /= parts.pop(0)
    if "**" not in parts:
        yield from _match_names(base, parts, walk)
        return
    start = parts.index("**")
    folders = (
        [base / name for name in sorted(glob(os.path.join(*parts[:start]), root_dir=base))]
        if start
        else [base]
    )
    for folder in folders:
        if not folder.is_dir():
            continue
        for entry in walk.files(folder):
            path = Path(entry.path)
            if matches_pattern(path.relative_to(folder).parts, parts[start:]) and walk.is_image(entry):
                yield path


def _match_names(base: Path, parts: Sequence[str], walk: _Walk) -> Iterator[Path]:
    """Yield the image files that match a pattern without `**`, those of each folder under one name."""
    paths: dict[str, str] = {}  # of folders by the real path
    for name in sorted(glob(os.path.join(*parts), root_dir=base)):
        path = base / name
        folder = str(path.parent)
        if path.is_dir() or paths.setdefault(os.path.realpath(folder), folder) != folder:
            continue
        matched = zip(Path(name).parts, parts, strict=False)
        if any(is_ignored(part) and has_magic(pattern) and pattern[0] != "." for part, pattern in matched):
            walk.count_hidden(path)
        elif walk.is_image(path):
            yield path


def _read_list(path: Path) -> list[Path]:
    """Read a list of paths: UTF-8 or, with a mark at its start, UTF-16; other bytes are kept as in names of files."""
    try:
        content = read_bytes(path)
        is_utf_16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = content.decode("utf-16") if is_utf_16 else os.fsdecode(content.removeprefix(codecs.BOM_UTF8))
        if "\0" in text:
            raise ValueError("it is not text")
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read as a list of images ({describe_os_error(error)})"
        ) from error
    except ValueError as error:
        raise ConfigError(f"{path}: cannot be read as a list of images ({error})") from error
    lines = [line.strip() for line in text.replace("\r", "\n").split("\n") if line.strip()]
    paths = [path.parent / expand_path(line, folder=path.parent) for line in lines]
    if paths and not any(is_remote(each) or os.path.lexists(each) for each in paths):
        raise ConfigError(
            f"{path}: is read as a list of images, one path per line, but no file of it is there, such as "
            f"{printable(lines[0])!r}"
        )
    return paths


def check_pictures_folder(folder: Path, images: Iterable[Path], *, searched: Iterable[Path] = ()) -> None:
    """Check that pictures written to a folder do not get among the images that they are of.

    Args:
        folder: for pictures.
        images: that pictures are drawn of.
        searched: folders whose images, and those of the folders below, are searched.

    Raises:
        ConfigError: if one of the images is in the folder, or the folder is in one that is searched, or around it.
    """
    target = folder.resolve()
    trees = {path.resolve() for path in searched if not is_remote(path)}
    parents = {path.parent for path in images if not is_remote(path)}
    for source in {path.resolve() for path in parents} | trees:
        is_among = source in trees and (target.is_relative_to(source) or source.is_relative_to(target))
        if target == source or is_among:
            raise ConfigError(
                f"--draw {folder}: pictures would be among the images in {source}; choose another folder"
            )


def searched_folders(arguments: Sequence[str]) -> Iterator[Path]:
    """Yield the folders that are searched with all below: those given, and where a pattern with `**` starts."""
    for argument in arguments:
        path = expand_path(argument)
        if is_remote(path):
            continue
        if path.is_dir():
            yield path
        elif "**" in path.parts and not os.path.lexists(path):
            yield Path(*itertools.takewhile(lambda part: not has_magic(part), path.parts))
