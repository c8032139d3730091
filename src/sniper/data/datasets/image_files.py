"""The image files of a data set: where they are, which may be opened, and whether each is the annotated image."""

import itertools
import os
import stat
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from sniper.data.datasets.file_names import FileNames, Match, leaves_root
from sniper.data.images.files import read_image_sides
from sniper.data.spec import ReadSpec
from sniper.errors import ImageError, count_and_list, counted, describe_os_error
from sniper.files import check_regular
from sniper.geometry.boxes import Sides
from sniper.remote import RemotePath, is_remote, read_ahead

AS_STORED = ", which are its sides as stored, before its EXIF orientation is applied"
"""End of the problem of an image file that has the annotated sides before it is oriented."""

_ANNOTATION_FOLDERS = frozenset({"annotations", "labels"})
_SAMPLE = 64  # file names by which an image root is recognized
_MAX_EXPLAINED = 20  # missing files for which similar names are searched
_MAX_EXAMPLES = 3  # listed in a warning
_REMOTE_SAMPLE = 8  # remote files that are read before others, to see whether they are there


@dataclass(frozen=True, kw_only=True)
class ImageFiles:
    """Where the image files of a data set are.

    Attributes:
        root: folder that the names are relative to.
        names: of the image files, one for each image: as in the annotations, or corrected.
        is_corrected: whether a name is not as in the annotations.
        warnings: what was corrected, one line for each kind.
        counts: number of the files under each image root that was tried; empty where all files are under the first.
    """

    root: Path
    names: Sequence[str]
    is_corrected: bool = False
    warnings: tuple[str, ...] = ()
    counts: Mapping[Path, int] = field(default_factory=dict)


def locate_image_files(
    path: Path, file_names: Sequence[str], *, image_root: Path | None, is_complete: bool = True
) -> ImageFiles:
    """Find the folder that the image files of a data set are in, and the file that each name stands for.

    Args:
        path: of the annotations.
        file_names: as in the annotations.
        image_root: folder that they are relative to; None tries `images` beside the annotations, the folder of the
            annotations, the folder above, and in each of them `images` and the folder that the annotations are named
            after; and if none of these has all files, the other folders beside the annotations. The first that has all
            files is used, or else the one that has the most.
        is_complete: whether every name is looked up; else only as many as recognize the folder, if all of these are
            there, or none. Of remote files no more are looked up.
    """
    place = path.parent if image_root is None else image_root
    if is_remote(place):
        return _locate_remote(path, place, file_names, is_given=image_root is not None)
    roots = _candidates(path) if image_root is None else [image_root]
    sample = file_names[:: max(len(file_names) // _SAMPLE, 1)]
    complete = _with_all(roots, sample)
    if not complete and image_root is None:
        roots += [
            root for root in _folders_beside(path, roots) if any(has_file(root, name) for name in sample)
        ]
        complete = _with_all(roots, sample)
    for root in complete:
        if not is_complete or all(has_file(root, name) for name in file_names):
            return ImageFiles(root=root, names=file_names, warnings=_ambiguity(complete, sample=sample))
    matches: dict[Path, dict[int, Match]] = {
        root: _match_all(root, file_names, sample=sample) for root in roots
    }
    best = max(roots, key=lambda root: _num_matches(matches[root]))  # the first of several
    matched = matches[best]
    counts = {root: len(matched_here) for root, matched_here in matches.items()}
    if image_root is not None and len(matched) < len(file_names):
        others = [root for root in [*_candidates(path), *_candidates(image_root / "_")] if root not in counts]
        counts |= {root: len(_match_all(root, file_names, sample=sample)) for root in others}
    corrections = {index: match for index, match in matched.items() if match.kind}
    return ImageFiles(
        root=best,
        names=[matched[i].name if i in matched else name for i, name in enumerate(file_names)],
        is_corrected=any(match.name != file_names[index] for index, match in matched.items()),
        warnings=tuple(_correction_warnings(file_names, corrections)),
        counts=counts if len(matched) < len(file_names) else {},
    )


def _locate_remote(path: Path, place: RemotePath, file_names: Sequence[str], *, is_given: bool) -> ImageFiles:
    """Find the remote folder of images by some of their names, which are not corrected.

    A server is asked about each file, or lists a thousand at a time; that there are all would take too long to find.
    """
    sample = _remote_sample(file_names)
    roots = [place] if is_given else _usual_folders(path)
    root = next((root for root in roots if sample and all(has_file(root, name) for name in sample)), place)
    return ImageFiles(root=root, names=file_names)


def _remote_sample(names: Sequence[str]) -> Sequence[str]:
    return names[:: max(len(names) // _REMOTE_SAMPLE, 1)][:_REMOTE_SAMPLE]


def _candidates(path: Path) -> list[Path]:
    """Return the folders that the images of an annotation file may be in and that exist, the usual one first."""
    folders = _usual_folders(path)
    existing = {os.path.realpath(folder): folder for folder in reversed(folders) if folder.is_dir()}
    return sorted(existing.values(), key=folders.index) or [path.parent]


def _usual_folders(path: Path) -> list[Path]:
    """Return the folders that the images of an annotation file may be in, the usual one first."""
    beside = path.parent
    stem = path.name.partition(".")[0]
    splits = [stem, stem.rpartition("_")[2]]  # such as val2017 of instances_val2017.json
    folders = []
    above = beside.parent if is_remote(beside) else Path(os.path.normpath(beside.absolute().parent))
    for folder in (beside, above):
        inner = [folder / "images", folder] if folder == beside else [folder, folder / "images"]
        folders += [*inner, *(root / split for root in inner for split in splits)]
    return list(dict.fromkeys(folders))


def _folders_beside(path: Path, candidates: Sequence[Path]) -> Iterator[Path]:
    """Yield the folders beside an annotation file and in `images`, such as `data`, that are no usual image roots.

    Those beside a folder of annotations belong to the data set, too.
    """
    known = {os.path.realpath(folder) for folder in candidates}
    parents = [path.parent]
    if path.absolute().parent.name.lower() in _ANNOTATION_FOLDERS:
        parents.append(Path(os.path.normpath(path.absolute().parent.parent)))
    for folder in itertools.chain.from_iterable((parent, parent / "images") for parent in parents):
        try:
            names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
        except OSError:
            continue
        for name in names:
            if not name.startswith(".") and os.path.realpath(folder / name) not in known:
                yield folder / name


def _with_all(roots: Sequence[Path], names: Sequence[str]) -> list[Path]:
    return [root for root in roots if all(has_file(root, name) for name in names)]


def has_file(root: Path, name: str) -> bool:
    """Check whether there is anything but a folder under a name, be it a broken link."""
    if is_remote(root):
        return not leaves_root(name) and (root / name).is_file()
    try:
        return not leaves_root(name) and not stat.S_ISDIR(os.lstat(os.path.join(root, name)).st_mode)
    except (OSError, ValueError):
        return False


def _match_all(root: Path, file_names: Sequence[str], *, sample: Sequence[str]) -> dict[int, Match]:
    """Find the files that names stand for, by index; none where a root has none of the sample.

    A file that a corrected name and another name stand for is left to the names that need no correction.
    """
    known = FileNames(root, names=file_names)
    if not any(_match_as_written(root, name) or known.match(name) for name in sample):
        return {}
    matches: dict[int, Match] = {}
    for index, name in enumerate(file_names):
        match = _match_as_written(root, name) or known.match(name)
        if match is not None:
            matches[index] = match
    uses = Counter(match.name for match in matches.values())
    return {index: match for index, match in matches.items() if not match.kind or uses[match.name] == 1}


def _match_as_written(root: Path, name: str) -> Match | None:
    """Return the file of exactly this name, which may be an absolute path below the root."""
    relative = os.path.relpath(name, root.absolute()) if name.startswith("/") else name
    return Match(name=relative, kind="") if has_file(root, relative) else None


def _num_matches(matches: Mapping[int, Match]) -> tuple[int, int]:
    """Return how many files there are, and how many of these under the name in the annotations."""
    return len(matches), sum(not match.kind for match in matches.values())


def _ambiguity(roots: Sequence[Path], *, sample: Sequence[str]) -> tuple[str, ...]:
    """Warn if several image roots have all files, and these are not the same files."""
    first, *others = roots
    for other in others:
        if any(os.path.realpath(first / name) != os.path.realpath(other / name) for name in sample):
            return (f"the image files are in {first} and in {other}; the former are used (--images)",)
    return ()


def _correction_warnings(file_names: Sequence[str], corrections: Mapping[int, Match]) -> Iterator[str]:
    examples: dict[str, list[str]] = defaultdict(list)
    for index, match in corrections.items():
        examples[match.kind].append(f"{file_names[index]} is {match.name}")
    for kind, listed in examples.items():
        subject = counted(len(listed), "file name differs", "file names differ")
        yield (
            f"{subject} from the image file in {kind}, corrected "
            f"({count_and_list(listed, limit=_MAX_EXAMPLES)})"
        )


def find_bad_files(
    files: ImageFiles,
    file_names: Sequence[str],
    sides: Iterable[Sides | None],
    *,
    read: ReadSpec,
    follow_links: bool,
) -> list[tuple[int | None, str]]:
    """Compare the image files with the annotations, reading only headers.

    Remote files are compared when they are read; here only whether a few are there at all.

    Args:
        files: where they are.
        file_names: as in the annotations.
        sides: of the images as annotated; None where unknown.
        read: how files become pixels.
        follow_links: whether files may be links that leave the image root.

    Returns:
        For each bad file the index of its image, and the problem as a phrase that starts with the file name. The index
        is None for a problem of the image root.
    """
    if is_remote(files.root):
        return _find_remote_problem(files, read)
    if not files.root.is_dir():
        return [(None, f"the image root {files.root} is not a folder")]
    known = FileNames(files.root, names=file_names)
    num_missing = 0
    problems: list[tuple[int | None, str]] = []
    for index, (file_name, name, expected) in enumerate(zip(file_names, files.names, sides, strict=True)):
        path = files.root / name
        problem = find_file_problem(path, files.root, read, expected=expected, follow_links=follow_links)
        if problem is None:
            continue
        if num_missing < _MAX_EXPLAINED and not has_file(files.root, name):
            problem += _explain(known.nearest(name), counts={} if num_missing else files.counts)
            num_missing += 1
        problems.append((index, f"{file_name} {problem}"))
    return problems


def _find_remote_problem(files: ImageFiles, read: ReadSpec) -> list[tuple[int | None, str]]:
    """Return a problem of the image root if none of a few remote images can be read; else none."""
    paths = [files.root / name for name in _remote_sample(files.names)]
    problems = []
    for path in read_ahead(paths, is_fixed=True):
        problem = find_path_problem(path, files.root, follow_links=False) or _find_content_problem(
            path, read, expected=None
        )
        if problem is None:
            return []
        problems.append(f"{path} {problem}")
    if not problems:
        return []
    return [(None, f"none of {counted(len(problems), 'image')} that were tried can be read: {problems[0]}")]


def find_file_problem(
    path: Path, root: Path, read: ReadSpec, *, expected: Sides | None, follow_links: bool
) -> str | None:
    """Check whether an image file of a data set may be opened and is the annotated image, reading only its header.

    Args:
        path: of the file.
        root: the image root.
        read: how the file becomes pixels.
        expected: its sides as annotated, if known.
        follow_links: whether it may be a link that leaves the image root.

    Returns:
        The problem as a phrase, or None.
    """
    problem = find_path_problem(path, root, follow_links=follow_links)
    return _find_content_problem(path, read, expected=expected) if problem is None else problem


def find_path_problem(path: Path, root: Path, *, follow_links: bool) -> str | None:
    """Check whether an image file of a data set may be opened. Everything that opens one asks this first.

    Args:
        path: of the file: a name, perhaps absolute, joined to the image root.
        root: the image root.
        follow_links: whether it may be a link that leaves the image root.

    Returns:
        The problem as a phrase; None if it is a regular file under the image root, or an allowed link to one.
    """
    if is_remote(path):
        is_inside = path.is_relative_to(root) and not leaves_root(path.relative_to(root).as_posix())
        return None if is_inside else f"leaves the image root {root}"
    if leaves_root(os.path.relpath(path, root)):
        return f"leaves the image root {root}"
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        target = os.readlink(path) if path.is_symlink() else None
        return f"does not exist, expected {path}" if target is None else f"is a broken link, to {target}"
    except OSError as error:
        return f"cannot be read ({describe_os_error(error)})"
    real_path, real_root = os.path.realpath(path), os.path.realpath(root)
    if not follow_links and os.path.commonpath([real_root, real_path]) != real_root:
        return (
            f"is a link to {real_path}, outside the image root {root} "
            "(data.follow_links: true or --follow-links allows it)"
        )
    return _find_kind_problem(path)


def _find_kind_problem(path: Path) -> str | None:
    """Check whether there is a regular file under a path."""
    try:
        check_regular(path)
    except IsADirectoryError:
        return "is a folder, expected an image file"
    except OSError as error:
        return f"is {error.strerror}"
    return None


def _explain(similar: Sequence[str], *, counts: Mapping[Path, int]) -> str:
    """Describe what there is instead of a file: similar names, and how many files each image root has."""
    text = f"; there is {' and '.join(similar)}" if similar else ""
    if counts:
        listed = ", ".join(f"{count} in {root}" for root, count in counts.items())
        text += f"; files by image root (--images): {listed}"
    return text


def _find_content_problem(path: Path, read: ReadSpec, *, expected: Sides | None) -> str | None:
    """Compare the header of an image file with the annotations."""
    try:
        sides = read_image_sides(path, read)
    except ImageError as error:
        return str(error).removeprefix(f"{path}: ")
    if expected is None or sides == expected:
        return None
    return (
        f"has {sides.width}x{sides.height} pixels, but the annotations say "
        f"{expected.width}x{expected.height}{_orientation_advice(path, read, expected)}"
    )


def _orientation_advice(path: Path, read: ReadSpec, expected: Sides) -> str:
    """Describe which orientation gives a file the expected sides, if there is one."""
    other: Literal["apply", "ignore"] = "ignore" if read.exif_orientation == "apply" else "apply"
    if read_image_sides(path, replace(read, exif_orientation=other)) != expected:
        return ""
    if other == "ignore":  # the boxes may be in either frame
        return AS_STORED
    return ", which are its sides with data.read.exif_orientation: apply"
