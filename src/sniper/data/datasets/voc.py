"""Read Pascal VOC data sets: one XML file for each image."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from sniper.data.datasets.collect import Collector, ImageIndex, has_image_suffix, names_by_stem, numbered
from sniper.data.datasets.raw import RawDataset, raise_for
from sniper.data.datasets.splits import canonical, choose_splits, find_split_folders
from sniper.data.datasets.text_files import (
    flag_of,
    iterate_xml,
    number_of,
    read_text,
    read_xml,
    sides_of,
    text_of,
)
from sniper.data.datasets.voc_masks import MASK_FOLDER, read_object_masks
from sniper.data.spec import DataSpec
from sniper.errors import AnnotationError, counted
from sniper.geometry.boxes import Sides
from sniper.remote import read_ahead

_ANNOTATION_FOLDERS = ("Annotations", "annotations", "annotations/xmls", "xmls", "xml", "labels", ".")
_IMAGE_FOLDERS = ("JPEGImages", "images", "Images", "imgs", ".")


@dataclass(frozen=True, kw_only=True)
class VocSource:
    """What a Pascal VOC data set consists of.

    Attributes:
        path: its folder.
        files: XML files, the folders of their images, and the folder of their masks, which may be absent.
        splits: names of XML files, without suffix, by canonical name of the split; empty where there are none.
    """

    path: Path
    files: Mapping[str, tuple[Path, Sequence[Path], Path]]
    splits: Mapping[str, Sequence[str]]

    @property
    def split_names(self) -> list[str]:
        """Canonical names of the splits; empty where there are none."""
        return list(self.splits)


def find_voc(path: Path) -> VocSource | None:
    """Find the parts of a Pascal VOC data set; None if there is none.

    Args:
        path: a folder with XML files in `Annotations` or directly, or with folders train, val and test of them.

    Raises:
        AnnotationError: if a list of a split cannot be used.
    """
    if not path.is_dir():
        return None
    files: dict[str, tuple[Path, Sequence[Path], Path]] = {}
    folder = _find_annotations(path)
    if folder is not None:
        images = [path / name for name in _IMAGE_FOLDERS] + [folder]
        files |= {
            stem: (folder / name, images, path / MASK_FOLDER)
            for stem, name in names_by_stem(folder, ".xml").items()
        }
        return VocSource(path=path, files=files, splits=_read_lists(path))
    splits: dict[str, Sequence[str]] = {}
    for split, split_folder in find_split_folders(path).items():
        part = find_voc(split_folder)
        if part is not None:
            files |= {f"{split}/{stem}": entry for stem, entry in part.files.items()}
            splits[split] = [f"{split}/{stem}" for stem in part.files]
    return VocSource(path=path, files=files, splits=splits) if files else None


def read_voc(source: VocSource, *, image_root: Path | None, split: str | None, data: DataSpec) -> RawDataset:
    """Read the XML files of a Pascal VOC data set.

    All of them are read, whatever the split: the class names are those of the whole data set, and so is the origin of
    coordinates, see `_find_origin`. Objects marked as difficult are crowds, as VOC's scores ignore them.

    Args:
        source: its parts.
        image_root: folder of the images; None looks in the usual ones.
        split: to read, or `all`; None is the training split.
        data: how image files are read.

    Raises:
        AnnotationError: listing the problems of the files.
    """
    chosen = choose_splits(source.path, source.split_names, split)
    stems = dict.fromkeys(stem for name in chosen for stem in source.splits[name]) or dict.fromkeys(
        source.files
    )
    reader = _Reader(source, image_root, data)
    files = read_ahead(file for file, _, _ in source.files.values())
    for (stem, (_, images, masks)), file in zip(source.files.items(), files, strict=True):
        reader.read(file, images, masks, is_used=stem in stems)
    if not source.splits:
        reader.note_unlabelled()
    reader.add_unlabelled(stem for stem in stems if stem not in source.files)
    raise_for(source.path, reader.collector.problems)
    reader.collector.shift(_find_origin(reader))
    names = sorted(reader.names)
    reader.collector.replace_categories({number: names.index(name) for name, number in reader.names.items()})
    return reader.collector.build(numbered(names), root=image_root or source.path, data=data)


def _find_annotations(path: Path) -> Path | None:
    """Return the folder that has the XML files."""
    for name in _ANNOTATION_FOLDERS:
        folder = path / name
        names = list(names_by_stem(folder, ".xml").values())
        if names and root_tag(folder / names[0]) != "annotations":  # CVAT's
            return folder
    return None


def root_tag(path: Path) -> str:
    """Return the name of the outermost element of an XML file; empty if it has none."""
    try:
        return next((str(element.tag) for _, element in iterate_xml(path)), "")
    except AnnotationError:
        return ""


def _read_lists(path: Path) -> dict[str, list[str]]:
    """Read the lists of the splits, in `ImageSets/Main`."""
    folder = path / "ImageSets" / "Main"
    splits: dict[str, list[str]] = {}
    for stem, name in names_by_stem(folder, ".txt").items():
        lines = [line.split() for line in read_text(folder / name).split("\n") if line.strip()]
        if all(len(fields) == 1 for fields in lines):  # others are of one class, with a column of -1, 0 and 1
            splits[canonical(stem)] = [_to_stem(fields[0]) for fields in lines]
    order = {"train": 0, "val": 1, "test": 2}
    return dict(sorted(splits.items(), key=lambda item: order.get(item[0], len(order))))


def _to_stem(name: str) -> str:
    """Return the name of an XML file without suffix; some lists have paths, or the names of images."""
    name = name.replace("\\", "/").rsplit("/", 1)[-1]
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() == ".xml" or has_image_suffix(name) else name


def _find_origin(reader: "_Reader") -> tuple[float, float, float, float]:
    """Return what is added to xmin, ymin, xmax, ymax to make them continuous coordinates from 0.

    VOC's pixels are numbered from 1 and its boxes include xmax and ymax: a box of 1 to W is the whole image, 0 to W.
    Many tools write coordinates from 0 instead. An xmin or ymin below 1 in any file shows that they did.
    """
    if reader.from_zero:
        reader.collector.warnings.append(
            "coordinates are taken to start at 0 and not at 1 as those of VOC: xmin or ymin is below 1 in "
            f"{len(reader.from_zero)} of the boxes ({reader.from_zero[0]})"
        )
        return 0.0, 0.0, 0.0, 0.0
    return -1.0, -1.0, 0.0, 0.0


class _Reader:
    def __init__(self, source: VocSource, image_root: Path | None, data: DataSpec) -> None:
        self.collector = Collector(source.path, noun="object")
        self.names: dict[str, int] = {}
        self.from_zero: list[str] = []
        self._path = source.path
        self._image_root, self._data = image_root, data
        self._mask_names: dict[Path, dict[str, str]] = {}
        self._indices: dict[tuple[Path, ...], ImageIndex] = {}

    def read(self, file: Path, folders: Sequence[Path], masks: Path, *, is_used: bool) -> None:
        """Read a file; without `is_used`, only its class names and its origin of coordinates."""
        source = file.relative_to(self._path).as_posix()
        try:
            root = read_xml(file)
        except AnnotationError as error:
            self.collector.problems.append(str(error))
            return
        if root.tag != "annotation":
            self.collector.problems.append(
                f"{source}: the element is {root.tag!r}, expected VOC's 'annotation'"
            )
            return
        collector = self.collector if is_used else Collector(self._path, noun="object")
        size = root.find("size")
        sides = sides_of(text_of(size, "width"), text_of(size, "height"))
        image = collector.add_image(
            self._find_image(file, folders, text_of(root, "filename")),
            source=source,
            sides=sides,
        )
        items = root.findall("object")
        boxes = [
            self._read_object(collector, image, number, item, source)
            for number, item in enumerate(items, start=1)
        ]
        if is_used and self._data.masks == "read":
            self._read_masks(masks, file.stem, boxes, sides)

    def note_unlabelled(self) -> None:
        """Count images without an XML file, where no list names them."""
        for images in self._indices.values():
            self.collector.note_unused(images, kind="without an XML file, not used")

    def add_unlabelled(self, stems: Iterable[str]) -> None:
        """Add images that the list of a split names and that have no XML file."""
        folders = [self._path / name for name in _IMAGE_FOLDERS]
        for stem in stems:
            file = self._find_image(Path(stem), folders, "")
            if file.is_file():
                self.collector.note("image", "without an XML file, taken as without objects", stem)
                self.collector.add_image(file, source=stem)
            else:
                self.collector.note("name", "of a split without XML file and image, left out", stem)

    def _read_object(
        self, collector: Collector, image: int, number: int, item: ElementTree.Element, source: str
    ) -> int | None:
        """Add an object, and return the index of its box; None if it is dropped."""
        name = text_of(item, "name")
        box, problem = _read_box(item)
        if not name:
            collector.drop("without a name", image, number, "has no name")
            return None
        category = self.names.setdefault(name, len(self.names))
        if box is None:
            collector.drop("without a box", image, number, problem)
            return None
        if min(box[:2]) < 1:
            self.from_zero.append(f"{source}, object {number}: {list(box)}")
        is_difficult = flag_of(text_of(item, "difficult"))
        return collector.add_box(image, category, box, number=number, is_crowd=is_difficult)

    def _read_masks(self, folder: Path, stem: str, boxes: Sequence[int | None], sides: Sides | None) -> None:
        """Read the masks of the objects of an image, whose pixels are their numbers in the XML file."""
        if folder not in self._mask_names:
            self._mask_names[folder] = names_by_stem(folder, ".png")
        name = self._mask_names[folder].get(stem)
        if name is None:
            return
        source = f"{folder.name}/{name}"
        try:
            numbers, masks = read_object_masks(
                folder / name, sides=sides, max_pixels=self._data.read.max_pixels
            )
        except AnnotationError as error:
            self.collector.note("file", "with masks, not used", f"{source} {error}")
            return
        unknown = numbers[numbers > len(boxes)].tolist()
        if unknown:
            self.collector.note(
                "file",
                "with masks of objects that the XML file lacks, not used",
                f"{source}: {unknown[0]} of {counted(len(boxes), 'object')}",
            )
        found = [(int(number), boxes[number - 1]) for number in numbers.tolist() if number <= len(boxes)]
        rows = [row for row, (_, box) in enumerate(found) if box is not None]
        self.collector.add_encodings(
            [box for _, box in found if box is not None], masks.select(np.array(rows, dtype=np.int64))
        )

    def _find_image(self, file: Path, folders: Sequence[Path], name: str) -> Path:
        key = (self._image_root,) if self._image_root is not None else tuple(folders)
        if key not in self._indices:
            self._indices[key] = ImageIndex(key)
        return self._indices[key].find(file.stem, name=name)


def _read_box(item: ElementTree.Element) -> tuple[tuple[float, float, float, float] | None, str]:
    """Return the box of an object, or what is wrong with it."""
    element = item.find("bndbox")
    if element is None:
        return None, "has no bndbox"
    texts = {key: text_of(element, key) for key in ("xmin", "ymin", "xmax", "ymax")}
    x1, y1, x2, y2 = (number_of(text) for text in texts.values())
    if x1 is None or y1 is None or x2 is None or y2 is None:
        wrong = [f"{key} is {text!r}" for key, text in texts.items() if number_of(text) is None]
        return None, f"{', '.join(wrong)}, expected a number"
    return (x1, y1, x2, y2), ""
