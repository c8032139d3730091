r"""Find the file that a name in an annotation file stands for, where no file has exactly that name.

Names are written on one system and read on another: `images\a.jpg`, `/home/me/images/a.jpg`, `my%20photo.jpg`,
`A.JPG`, `é` as one character or as two. `docs/annotations.md` lists what is corrected.
"""

import difflib
import posixpath
import re
import unicodedata
from bisect import bisect
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from urllib.parse import unquote

from sniper.data.images.formats import image_suffixes
from sniper.files import is_folder, list_names

_DRIVE = re.compile(r"[A-Za-z]:(?=/)")
_UPLOAD = re.compile(r"[0-9a-f]{8}-(?=.)")  # Label Studio puts it before the names of uploaded files
_MAX_COMPARED = 1000  # names before and after a name in the order of the alphabet that it is compared with


@dataclass(frozen=True, kw_only=True)
class Match:
    """The file that a name stands for.

    Attributes:
        name: of the file, relative to its root.
        kind: in what the two names differ, such as `backslashes` or `upper and lower case`.
    """

    name: str
    kind: str


class FileNames:
    """The names of the files under a folder, each of its folders listed when it is first needed.

    Args:
        root: the folder.
        names: that are to be found, by which leading folders that no file needs are recognized.
    """

    def __init__(self, root: Path, *, names: Sequence[str] = ()) -> None:
        self._root = root
        self._num_optional = _count_optional_folders(names, root)
        self._listings: dict[str, _Listing] = {}

    def match(self, name: str) -> Match | None:
        """Find the one file that a name stands for; None if there is none, or if there are several."""
        for variant, kinds in _variants(name, self._num_optional):
            walked = self._walk(variant)
            if walked is not None:
                actual, differences = walked
                return Match(name=actual, kind=" and ".join(dict.fromkeys([*kinds, *differences])))
        return None

    def nearest(self, name: str) -> list[str]:
        """Return the names most similar to one that `match` does not find: of files, or of a folder on the way."""
        for variant, _ in reversed(list(_variants(name, self._num_optional))):
            folder = ""
            parts = _parts(variant) or []
            for part in parts:
                listing = self._list(folder)
                if part in listing.names:
                    folder = posixpath.join(folder, part)
                    continue
                return [posixpath.join(folder, near) for near in listing.nearest(part)]
        return []

    def _walk(self, name: str) -> tuple[str, list[str]] | None:
        """Follow a name from folder to folder; return the name of the file, and in what it differs."""
        parts = _parts(name)
        if not parts:
            return None
        path, differences = "", []
        for depth, part in enumerate(parts):
            listing = self._list(path)
            actual, kind = part, ""
            if part not in listing.names:
                similar = listing.similar(part, is_last=depth == len(parts) - 1)
                if similar is None:
                    return None
                actual, kind = similar
            path = posixpath.join(path, actual)
            differences += [kind] if kind else []
        return None if is_folder(self._root / path) else (path, differences)

    def _list(self, folder: str) -> "_Listing":
        if folder not in self._listings:
            self._listings[folder] = _Listing(self._root / folder)
        return self._listings[folder]


class _Listing:
    """The names in one folder, and what they are compared by."""

    def __init__(self, folder: Path) -> None:
        try:
            self.names = set(list_names(folder))
        except OSError:
            self.names = set()
        self._folded: dict[str, list[str]] = defaultdict(list)
        self._stems: dict[str, list[str]] = defaultdict(list)
        for name in self.names:
            self._folded[_fold(name)].append(name)
            self._stems[_fold(posixpath.splitext(name)[0])].append(name)

    def similar(self, part: str, *, is_last: bool) -> tuple[str, str] | None:
        """Return the one name that stands for a part of a path, and in what it differs; None if that is not clear."""
        folded = self._folded.get(_fold(part), [])
        if len(folded) == 1:
            same = unicodedata.normalize("NFC", folded[0].strip()) == unicodedata.normalize(
                "NFC", part.strip()
            )
            if not same:
                return folded[0], "upper and lower case"
            return folded[0], "Unicode form" if folded[0].strip() != part.strip() else "blanks"
        if folded or not is_last:
            return None
        images = [name for name in self._stems.get(_fold(part), []) if _is_image(name)]
        if len(images) == 1 and not _is_image(part):
            return images[0], "the suffix"
        uploaded = _UPLOAD.sub("", part, count=1)
        if uploaded != part and uploaded in self.names:
            return uploaded, "the prefix of an upload"
        return None

    def nearest(self, part: str) -> list[str]:
        folded = self._folded.get(_fold(part)) or self._stems.get(_fold(posixpath.splitext(part)[0]))
        if folded:
            return sorted(folded)[:2]
        position = bisect(self._in_order, part)
        names = self._in_order[max(position - _MAX_COMPARED, 0) : position + _MAX_COMPARED]
        return difflib.get_close_matches(part, names, n=1)

    @cached_property
    def _in_order(self) -> list[str]:
        return sorted(self.names)


def _count_optional_folders(names: Sequence[str], root: Path) -> int:
    """Return how many leading folders names can lack and remain distinct; 0 if one of the first folders is there."""
    all_names = "".join(names)
    if "/" not in all_names and "\\" not in all_names:
        return 0
    paths = {tuple(posixpath.normpath(name.replace("\\", "/")).split("/")) for name in names}
    if any((root / first).is_dir() for first in {path[0] for path in paths if len(path) > 1}):
        return 0
    count, most = 0, max((len(path) - 1 for path in paths), default=0)
    while count < most and len({path[min(count + 1, len(path) - 1) :] for path in paths}) == len(paths):
        count += 1
    return count


def _variants(name: str, num_optional: int) -> Iterator[tuple[str, list[str]]]:
    """Yield a name as it is, then as it may have been meant, each with the kinds of its changes."""
    kinds: list[str] = []
    yield name, []
    if "\\" in name:
        name, kinds = name.replace("\\", "/"), [*kinds, "backslashes"]
        yield name, kinds
    is_url = "://" in name
    if "%" in name or is_url or "?d=" in name:
        path = name.partition("?d=")[2] or name.partition("://")[2].partition("?")[0] or name
        name, kinds = unquote(path), [*kinds, "URL encoding"]
        yield name, kinds
    kinds = [*kinds, "the folder before it"]
    parts = [part for part in posixpath.normpath(_DRIVE.sub("", name)).split("/") if part not in ("", "..")]
    is_relative = not is_url and not leaves_root(name)
    for start in range(1, min(num_optional + 1, len(parts))) if is_relative else range(len(parts)):
        yield "/".join(parts[start:]), kinds


def leaves_root(name: str) -> bool:
    """Check whether a path is absolute or climbs above the folder that it is relative to."""
    if name.startswith("/") or _DRIVE.match(name):
        return True
    return ".." in name and posixpath.normpath(name).split("/")[0] == ".."


def _parts(name: str) -> list[str] | None:
    """Return the parts of a relative path; None if it leaves its folder."""
    return (
        None if leaves_root(name) else [part for part in posixpath.normpath(name).split("/") if part != "."]
    )


def _is_image(name: str) -> bool:
    return posixpath.splitext(name)[1].lower() in image_suffixes()


def _fold(name: str) -> str:
    """Return what names have in common that differ in case, Unicode form, or blanks at the ends."""
    if name.isascii():
        return name.strip().lower()
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold()).strip()
