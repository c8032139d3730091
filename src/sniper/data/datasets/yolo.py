"""Read YOLO data sets: a YAML file or a folder, and one label file for each image."""

import glob
import os
import reprlib
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sniper.data.datasets.collect import Collector, envelope, has_image_suffix, names_by_stem
from sniper.data.datasets.dataset import Category
from sniper.data.datasets.geojson import find_geojson_files
from sniper.data.datasets.raw import MAX_CATEGORIES, RawDataset
from sniper.data.datasets.splits import ALL, by_split, canonical, choose_splits, find_split_folders
from sniper.data.datasets.text_files import read_text
from sniper.data.spec import DataSpec
from sniper.errors import AnnotationError
from sniper.files import absolute_text, expand_path, is_ignored, is_there, match_remote, matches_pattern
from sniper.remote import is_remote, read_ahead, to_path

YAML_SUFFIXES = (".yaml", ".yml")
_SPLIT_KEYS = ("train", "val", "valid", "validation", "test")
_NAME_FILES = ("classes.txt", "obj.names", "classes.names", "labels.txt")
_ABSENT = ("", "~", "null", "None")
_MAX_LINES = 250_000  # of data.yaml, which is read slowly
_MAX_CLASSES = (
    MAX_CATEGORIES  # without names: a larger number is a mistake, and its names would fill the memory
)


@dataclass(frozen=True, kw_only=True)
class YoloSource:
    """What a YOLO data set consists of.

    Attributes:
        path: of the data set: its YAML file or its folder.
        base: folder that the splits are relative to.
        names: of the classes by number; None where no file has them.
        splits: folders, lists and patterns of image files by canonical name; under an empty name where there are none.
        missing: entries of splits that are not there, such as the test images that Roboflow always names.
        moved: folder or file that an entry was found as, by the path in the file; of each split.
        names_file: that has the names, for messages.
        num_keypoint_values: that follow the box in a line; 0 without keypoints.
    """

    path: Path
    base: Path
    names: Mapping[int, str] | None
    splits: Mapping[str, Sequence[Path]]
    names_file: Path | None
    missing: Mapping[str, Path] = field(default_factory=dict)
    moved: Mapping[str, Mapping[Path, Path]] = field(default_factory=dict)
    num_keypoint_values: int = 0

    @property
    def split_names(self) -> list[str]:
        """Canonical names of the splits; empty where there are none."""
        return [name for name in self.splits if name]

    def list_missing(self) -> list[str]:
        """Return one line for each split that is not there."""
        return [f"{name}: {file} is not there, left out" for name, file in self.missing.items()]


def find_yolo(path: Path, *, base: Path | None = None) -> YoloSource | None:
    """Find the parts of a YOLO data set; None if there is none.

    Args:
        path: a YAML file, a `.data` file of Darknet, or a folder that has one, or has images and labels.
        base: folder that the splits are relative to, instead of the one in the file.

    Raises:
        AnnotationError: if it is one, and cannot be used.
    """
    if path.suffix.lower() in YAML_SUFFIXES:
        return _parse(path, _read_yaml(path), base=base)
    if path.suffix.lower() == ".data" and not path.is_dir():
        return _parse(path, _read_darknet(path), base=base)
    if not path.is_dir():
        return None
    description = _find_yaml(path)
    if description is not None:
        return find_yolo(description, base=base)
    return _find_folders(path)


def read_yolo(source: YoloSource, *, split: str | None, data: DataSpec) -> RawDataset:
    """Read the images and label files of a YOLO data set.

    Args:
        source: its parts.
        split: to read, or `all`; None is the training split.
        data: how image files are read; label files have fractions of their sides.

    Raises:
        AnnotationError: listing the problems of the files.
    """
    wanted = canonical(split or "train")
    if wanted in source.missing or not source.splits:
        raise AnnotationError(_describe_missing(source, wanted))
    chosen = choose_splits(source.path, source.split_names, split)
    collector = Collector(source.path, noun="line", are_fractions=True)
    collector.warnings += [
        f"{name}: {file} is not there, {found} is used"
        for name in chosen
        for file, found in source.moved.get(name, {}).items()
    ]
    if wanted == ALL:
        collector.warnings += source.list_missing()
    images = _list_images(source, chosen or list(source.splits), collector)
    labels = _Labels(source, collector)
    for image, _ in zip(images, read_ahead(map(labels.find, images)), strict=True):
        labels.read(image)
    labels.note_unused([entry for name in chosen or source.splits for entry in source.splits[name]])
    categories = labels.finish()
    return collector.build(categories, root=source.base, data=data)


def _find_yaml(folder: Path) -> Path | None:
    """Return the file that describes the data set in a folder."""
    for name in ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml", "obj.data"):
        if (folder / name).is_file():
            return folder / name
    files = sorted(
        file for file in folder.iterdir() if file.suffix.lower() in YAML_SUFFIXES and file.is_file()
    )
    described = [file for file in files if _describes_yolo(file)]
    if len(described) > 1:
        listed = ", ".join(file.name for file in described)
        raise AnnotationError(f"{folder}: has several descriptions of a YOLO data set, name one of {listed}")
    return described[0] if described else None


def _describes_yolo(file: Path) -> bool:
    try:
        content = _read_yaml(file)
    except AnnotationError:
        return False
    if any(isinstance(content.get(key), str | list) for key in _SPLIT_KEYS):
        return "names" in content or "nc" in content
    return isinstance(content.get("names"), list | dict) and bool(_find_images(file.parent, has_names=False))


class _TextLoader(yaml.BaseLoader):
    """Loads all values as text: a class named `no` is no bool. A key that occurs twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Construct a mapping."""
        mapping = super().construct_mapping(node, deep=deep)
        if len(mapping) < len(node.value):
            keys = [key.value for key, _ in node.value]
            repeated = next(key for key in keys if keys.count(key) > 1)
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {repeated!r} occurs twice", node.start_mark
            )
        return mapping


def _read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file with text for all values."""
    try:
        text = read_text(path)
        num_lines = text.count("\n")
        if num_lines > _MAX_LINES:
            raise AnnotationError(
                f"{path}: has {num_lines:,} lines, expected at most {_MAX_LINES:,}; image files can be listed in a "
                "text file that it names"
            )
        content = yaml.load(text, Loader=_TextLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise AnnotationError(f"{path}: is not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise AnnotationError(f"{path}: expected the keys train, val and names, as in YOLO's data.yaml")
    return content


def _read_darknet(path: Path) -> dict[str, Any]:
    """Read a `.data` file of Darknet: lines of `key = value`, with the names in a file of their own."""
    pairs = (line.partition("=") for line in read_text(path).split("\n") if "=" in line)
    content: dict[str, Any] = {key.strip(): value.strip() for key, _, value in pairs}
    if isinstance(content.get("names"), str):
        file = _resolve(path.parent, content["names"])[0]
        content["names"] = _read_names(file if file.exists() else path.parent / file.name)
        content.pop("classes", None)
    return content


def _parse(path: Path, content: Mapping[str, Any], *, base: Path | None) -> YoloSource:
    given = {key: content[key] for key in _SPLIT_KEYS if content.get(key) not in (None, *_ABSENT, [])}
    if not given:
        folders = _find_images(base or path.parent, has_names=False) if "names" in content else {}
        if not folders:
            raise AnnotationError(
                f"{path}: has none of the keys train, val and test; expected YOLO's data.yaml, with these and names"
            )
        given = {key: [str(folder) for folder in entries] for key, entries in folders.items()}
    names = _parse_names(path, content)
    entries_of = {canonical(key): _to_entries(path, key, value) for key, value in given.items()}
    entries = [entry for some in entries_of.values() for entry in some]
    base = base or _find_base(path, content, entries)
    splits = {
        name: [file for entry in some for file in _resolve(base, entry)] for name, some in entries_of.items()
    }
    folder = base if base.is_dir() else path.parent
    moved = {
        name: {file: found for file in files if (found := _find_moved(file, folder, split=name)) is not None}
        for name, files in splits.items()
    }
    if any(moved.values()):
        base = folder
    splits = {name: [moved[name].get(file, file) for file in files] for name, files in splits.items()}
    missing = {name: files[0] for name, files in splits.items() if files and not any(map(is_there, files))}
    return YoloSource(
        path=path,
        base=base,
        names=names,
        names_file=path,
        splits={name: files for name, files in splits.items() if name not in missing},
        missing=missing,
        moved=moved,
        num_keypoint_values=_count_keypoint_values(path, content),
    )


def _to_entries(path: Path, key: str, value: Any) -> list[str]:
    entries = value if isinstance(value, list) else [value]
    if not all(isinstance(entry, str) and entry for entry in entries):
        raise AnnotationError(
            f"{path}: {key} is {_shorten(value)}, expected a folder, a list of image files, or a list of these"
        )
    return entries


def _parse_names(path: Path, content: Mapping[str, Any]) -> dict[int, str]:
    names, count = content.get("names"), content.get("nc")
    if count is not None and not (isinstance(count, str) and count.isascii() and count.isdigit()):
        raise AnnotationError(f"{path}: nc is {_shorten(count)}, expected the number of classes")
    if count is not None and (len(count) > 9 or int(count) > _MAX_CLASSES):
        raise AnnotationError(f"{path}: nc is {_shorten(count)}, expected at most {_MAX_CLASSES:,} classes")
    if names is None and count is not None:
        return {number: f"class_{number}" for number in range(int(count))}
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        parsed = dict(enumerate(names))
    elif isinstance(names, dict) and all(
        key.isascii() and key.isdigit() and len(key) <= 9 and isinstance(name, str)
        for key, name in names.items()
    ):
        parsed = {int(key): name for key, name in names.items()}
        if len(parsed) < len(names):
            raise AnnotationError(f"{path}: names has a class number twice: {_shorten(names)}")
    else:
        raise AnnotationError(
            f"{path}: names is {_shorten(names)}, expected a list of names, or names by class number"
        )
    if count is not None and int(count) != len(parsed):
        raise AnnotationError(f"{path}: nc is {count}, but names has {len(parsed)} classes")
    return dict(sorted(parsed.items()))


def _count_keypoint_values(path: Path, content: Mapping[str, Any]) -> int:
    shape = content.get("kpt_shape")
    if shape is None:
        return 0
    try:
        count, values = map(int, shape)
    except (TypeError, ValueError):
        raise AnnotationError(f"{path}: kpt_shape is {_shorten(shape)}, expected two numbers") from None
    return count * values


def _find_base(path: Path, content: Mapping[str, Any], entries: Sequence[str]) -> Path:
    """Return the folder that the splits are relative to.

    It is `path`, relative to the file. A `path` that is not there was written on another machine, or is relative to a
    folder of another tool: then it is the folder of the file, if the splits are in it.
    """
    named = content.get("path")
    if not isinstance(named, str) or named in _ABSENT:
        return path.parent
    candidates = [path.parent / expand_path(named.replace("\\", "/"), folder=path.parent), path.parent]
    for base in candidates:
        if any((base / entry).exists() for entry in entries):
            return base
    return candidates[0]


def _resolve(base: Path, entry: str) -> list[Path]:
    """Return the paths that an entry stands for: itself, or the files of a pattern."""
    entry = str(expand_path(entry.replace("\\", "/"), folder=base))
    path = base / entry
    if not path.exists() and entry.startswith(("../", "data/")):
        # Roboflow writes ../train/images for a folder beside the YAML file, CVAT data/train.txt for a file beside it.
        path = base / entry.lstrip("./").removeprefix("data/")
    if not path.exists() and any(mark in entry for mark in "*?["):
        return _match(path)
    return [path]


def _find_moved(file: Path, folder: Path, *, split: str | None = None) -> Path | None:
    """Return what there is in a folder under the longest end of a path that is not there; None if there is nothing.

    Such paths were written on another machine. A last part alone, such as `images`, could be that of another split.

    Args:
        file: the path.
        folder: searched.
        split: canonical name, whose folder or list the path is; None for an image.
    """
    if is_there(file):
        return None
    parts = Path(os.path.normpath(file)).parts
    for end in (parts[first:] for first in range(1, len(parts))):
        if split is not None and len(end) == 1 and not end[0].endswith(".txt") and canonical(end[0]) != split:
            return None
        if end[0] != ".." and (found := folder.joinpath(*end)).exists():
            return found
    return None


def _match(pattern: Path) -> list[Path]:
    """Return what matches a pattern; with `**` the image files, each folder searched once, however it is linked."""
    if is_remote(pattern):
        return list(match_remote(pattern))
    if "**" not in pattern.parts:
        return [Path(name) for name in sorted(glob.glob(str(pattern)))]
    start = pattern.parts.index("**")
    folders = glob.glob(str(Path(*pattern.parts[:start])))
    files = [(Path(folder), Path(file)) for folder in sorted(folders) for file in _walk(Path(folder))]
    rest = pattern.parts[start:]
    return sorted(file for folder, file in files if matches_pattern(file.relative_to(folder).parts, rest))


def _find_folders(folder: Path) -> YoloSource | None:
    """Find a data set without description: folders of images and labels, or both in one folder."""
    names_file = next(
        (
            file
            for name in _NAME_FILES
            for file in (folder / name, folder / "labels" / name)
            if file.is_file()
        ),
        None,
    )
    splits = _find_images(folder, has_names=names_file is not None)
    if not splits:
        return None
    return YoloSource(
        path=folder,
        base=folder,
        names=None if names_file is None else dict(enumerate(_read_names(names_file))),
        names_file=names_file,
        splits=splits,
    )


def _find_images(folder: Path, *, has_names: bool) -> dict[str, list[Path]]:
    images = folder / "images"
    if images.is_dir() and _has_labels(folder):
        named = find_split_folders(images)
        return {name: [path] for name, path in named.items()} or {"": [images]}
    folders = {name: path for name, path in find_split_folders(folder).items() if (path / "images").is_dir()}
    if folders and any(map(_has_labels, folders.values())):
        return {name: [path / "images"] for name, path in folders.items()}
    lists = by_split(
        (file.stem, file)
        for file in sorted(folder.glob("*.txt"))
        if file.stem in ("train", "val", "valid", "test")
    )
    if has_names and lists:
        return {name: [path] for name, path in lists.items()}
    is_flat = has_names and any(has_image_suffix(file.name) for file in folder.iterdir())
    return {"": [folder]} if is_flat else {}


def _has_labels(folder: Path) -> bool:
    """Check whether there is a folder of labels, and not of GeoJSON."""
    labels = folder / "labels"
    return labels.is_dir() and not find_geojson_files(labels)


def _read_names(path: Path) -> list[str]:
    return [line.strip() for line in read_text(path).strip().split("\n")]


def _list_images(source: YoloSource, splits: Sequence[str], collector: Collector) -> list[Path]:
    """Return the image files of splits, each once, sorted."""
    files: dict[str, None] = {}
    for split in splits:
        expanded = [
            file for entry in source.splits[split] for file in _expand(source, split, entry, collector)
        ]
        files |= dict.fromkeys(expanded)
        if not expanded:
            listed = ", ".join(map(str, source.splits[split])) or "a pattern"
            raise AnnotationError(f"{source.path}: {split or 'images'}: no image is in {listed}")
    return [to_path(file) for file in sorted(files)]


def _expand(source: YoloSource, split: str, entry: Path, collector: Collector) -> list[str]:
    """Return the image files that a folder or a list stands for."""
    if entry.is_dir():
        return list(_walk(entry))
    if entry.suffix.lower() == ".txt":
        return _read_list(entry, base=source.base, collector=collector)
    if has_image_suffix(entry.name) and entry.exists():
        return [str(entry)]
    raise AnnotationError(
        f"{source.path}: {split}: {entry} is not there, expected a folder, or a .txt file with one image on each line"
    )


def _describe_missing(source: YoloSource, split: str) -> str:
    missing = {split: source.missing[split]} if split in source.missing else source.missing
    lines = [
        f"{name}: {file} is not there, expected a folder, or a .txt file" for name, file in missing.items()
    ]
    hint = "names another folder that train, val and test are relative to"
    return f"{source.path}: " + "\n  ".join([*lines, f"--images {hint}"])


def _read_list(path: Path, *, base: Path, collector: Collector) -> list[str]:
    """Read a list of image files: relative to the data set, to the list, or to its folder with a leading `./`."""
    files = []
    for line in read_text(path).split("\n"):
        name = line.strip().replace("\\", "/")
        if not name:
            continue
        candidates = [path.parent / name] if name.startswith("./") else [base / name, path.parent / name]
        candidates += [base / name, path.parent / name.removeprefix("data/")]
        file = next((file for file in candidates if file.exists()), None)
        if file is None and (file := _find_moved(candidates[0], base)) is not None:
            collector.note("image", "listed under a path that is not there", f"{name}, {file} is used")
        found = file or candidates[0]
        files.append(str(found) if is_remote(found) else os.path.normpath(found))
    return files


def _walk(folder: Path) -> Iterator[str]:
    """Yield the image files in a folder and the folders in it; links are followed, but not in circles."""
    if is_remote(folder):
        yield from (str(file) for file in folder.walk_files() if has_image_suffix(file.name))
        return
    visited = set()
    for directory, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(directory)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not is_ignored(name))
        for name in names:
            if has_image_suffix(name):
                yield os.path.join(directory, name)


class _Labels:
    """Reads label files into a collector."""

    def __init__(self, source: YoloSource, collector: Collector) -> None:
        self._source, self._collector = source, collector
        self._folders: dict[str, list[tuple[str, dict[str, str]]]] = {}
        self._used: dict[str, set[str]] = {}
        self._classes: list[float] = []
        self._segments: list[tuple[int, int]] = []
        self._are_oriented = True  # whether all segments have 4 corners

        self._base = os.path.join(absolute_text(source.base), "")

    def read(self, image: Path) -> None:
        """Read the labels of an image."""
        file = self._find(image)
        if file is None:
            expected = self._shorten(
                os.path.join(self._candidates(str(image.parent))[0][0], f"{image.stem}.txt")
            )
            self._collector.note("image", "without a label file, taken as without objects", f"no {expected}")
            self._collector.add_image(image, source=expected)
            return

        name = self._shorten(file)
        index = self._collector.add_image(image, source=name)
        try:
            text = read_text(to_path(file))
        except AnnotationError as error:
            self._collector.problems.append(str(error))
            return
        for number, line in enumerate(text.split("\n"), start=1):
            fields = line.split()
            if fields:
                self._read_line(fields, image=index, number=number)

    def _read_line(self, fields: list[str], *, image: int, number: int) -> None:
        try:
            label, *values = map(float, fields)
        except ValueError:
            self._drop("with text in place of numbers", image, number, f"is {_cut(fields)}, expected numbers")
            return
        box = self._to_box(values, image=image, number=number)
        if box is None:
            self._drop(
                "without a box",
                image,
                number,
                f"has {len(fields)} numbers, expected a class and a box of 4, or at least 3 points of 2",
            )
        elif not self._is_class(label):
            self._drop(
                "whose class is not listed",
                image,
                number,
                f"the class is {fields[0]}, expected {self._expected_classes()}",
            )
        else:
            self._classes.append(label)
            self._collector.add_box(image, int(label), box, number=number)
            if self._is_segment(values):
                self._collector.add_polygon(values)

    def _drop(self, kind: str, image: int, number: int, problem: str) -> None:
        self._collector.drop(kind, image, number, problem)

    def _to_box(self, values: list[float], *, image: int, number: int) -> Sequence[float] | None:
        """Return the box that the numbers after the class stand for, xyxy; None if they stand for none."""
        count = len(values)
        if count == 5:
            self._collector.correct("with a confidence, which is not used", image, number)
        elif count != 4 and count == 4 + self._source.num_keypoint_values:
            self._collector.correct("with keypoints, which are not used", image, number)
        elif self._is_segment(values):
            self._are_oriented &= count == 8
            self._segments.append((image, number))
            return envelope(values)
        elif count != 4:
            return None
        x, y, width, height = values[:4]
        return x - width / 2, y - height / 2, x + width / 2, y + height / 2

    def _is_segment(self, values: list[float]) -> bool:
        """Check whether the numbers after the class are corners of a polygon."""
        count = len(values)
        return count >= 6 and count % 2 == 0 and count != 4 + self._source.num_keypoint_values

    def _is_class(self, label: float) -> bool:
        if not label.is_integer() or label < 0:
            return False
        names = self._source.names
        return label < _MAX_CLASSES if names is None else int(label) in names

    def _expected_classes(self) -> str:
        names = self._source.names
        if names is None:
            return f"a whole number from 0 to {_MAX_CLASSES - 1}"
        known = list(names)
        is_gapless = known == list(range(len(known)))
        listed = f"0 to {len(known) - 1}" if is_gapless and known else ", ".join(map(str, known)) or "none"
        return f"{listed} as in {self._shorten(str(self._source.names_file))}"

    def finish(self) -> tuple[Category, ...]:
        """Check the labels as a whole; return the categories, by class number."""
        if self._are_oriented and self._segments:
            self._collector.drop_polygons()
            for image, number in self._segments:
                kind = "with 4 corners, taken for oriented boxes, used as their boxes"
                self._collector.correct(kind, image, number)
        names = self._source.names
        if names is None:
            count = int(max(self._classes, default=-1)) + 1
            names = {number: f"class_{number}" for number in range(count)}
            self._collector.warnings += [
                f"the {count} classes have no names, as there is no data.yaml and none of "
                f"{', '.join(_NAME_FILES)}; they are named class_0, class_1, ..."
            ] * (count > 0)
        categories = [
            Category(category_id=number, name=name or str(number)) for number, name in names.items()
        ]
        for number, name in names.items():
            if not name:
                self._collector.note("class", "without a name, named by the number", str(number))
        index_of = {number: index for index, number in enumerate(names)}
        self._collector.replace_categories(index_of)
        return tuple(categories)

    def note_unused(self, entries: Sequence[Path]) -> None:
        """Count label files that belong to no image, where whole folders are read."""
        if not all(entry.is_dir() for entry in entries):
            return
        for folder, used in self._used.items():
            for stem, name in sorted(names_by_stem(folder, ".txt").items()):
                if stem not in used and name not in _NAME_FILES:
                    self._collector.note(
                        "label file", "without an image, not used", self._shorten(os.path.join(folder, name))
                    )

    def find(self, image: Path) -> Path:
        """Return the label file of an image; an empty path where there is none."""
        return to_path(self._find(image) or "")

    def _find(self, image: Path) -> str | None:
        for folder, names in self._candidates(str(image.parent)):
            if image.stem in names:
                self._used.setdefault(folder, set()).add(image.stem)
                return os.path.join(folder, names[image.stem])
        return None

    def _candidates(self, folder: str) -> list[tuple[str, dict[str, str]]]:
        """Return where the labels of a folder of images may be, with the label files there.

        They are in `labels` where the path has `images`, the last one, or else beside the images.
        """
        if folder not in self._folders:
            head, images, tail = f"{absolute_text(folder)}/".rpartition("/images/")
            folders = [f"{head}/labels/{tail}".rstrip("/")] if images else []
            self._used |= {path: self._used.get(path, set()) for path in folders}
            self._folders[folder] = [
                (path, names_by_stem(path, ".txt")) for path in (*folders, absolute_text(folder))
            ]
        return self._folders[folder]

    def _shorten(self, file: str) -> str:
        return absolute_text(file).removeprefix(self._base)


def _shorten(value: Any) -> str:
    """Return a value as text of bounded length; YAML can repeat values without end."""
    text = reprlib.repr(value)
    return text if len(text) <= 120 else f"{text[:120]}..."


def _cut(fields: Sequence[str]) -> str:
    text = " ".join(fields)
    return repr(text if len(text) <= 60 else f"{text[:60]}...")
