"""Collect the images and boxes that a reader of a format finds, and the problems of its files."""

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
from jaxtyping import Shaped

from sniper.data.datasets.dataset import Category
from sniper.data.datasets.image_files import find_path_problem
from sniper.data.datasets.raw import MAX_LISTED, Findings, RawDataset, raise_for
from sniper.data.images.files import read_image_sides
from sniper.data.images.formats import EXTRAS, image_suffixes
from sniper.data.spec import DataSpec
from sniper.errors import AnnotationError, ImageError
from sniper.files import absolute_text, is_ignored, list_names, real_text
from sniper.geometry.boxes import Sides
from sniper.geometry.masks import MaskArrays
from sniper.remote import is_remote, is_url, read_ahead, to_path

LEFT_OUT = "that cannot be read, left out with their boxes"
"""Part of the warning that lists images that are not in the data set, as their file cannot be read."""

_NUM_THREADS = 8  # that wait for the headers of image files
_FILES_AT_ONCE = 64  # that a thread reads before it takes others
_DECIMALS = 6  # of pixels, of boxes that are read as fractions
_MAX_DIGITS = 18  # of an image id that is read as an integer


class Collector:
    """The images and boxes of a data set while they are read.

    Args:
        path: of the data set, for messages.
        noun: of one box in messages, such as `line` of a label file.
        are_fractions: whether boxes are fractions of the sides of their images instead of pixels.
    """

    def __init__(self, path: Path, *, noun: str, are_fractions: bool = False) -> None:
        self.path = path
        self.problems: list[str] = []
        self.warnings: list[str] = []
        self._noun, self._are_fractions = noun, are_fractions
        self._files: list[Path] = []
        self._sources: list[str] = []
        self._sides: list[Sides | None] = []
        self._ids: list[int | None] = []
        self._images: list[int] = []
        self._categories: list[int] = []
        self._boxes: list[float] = []
        self._crowds: list[bool] = []
        self._points: list[float] = []
        self._ring_lengths: list[int] = []
        self._ring_boxes: list[int] = []
        self._encodings: list[MaskArrays] = []
        self._encoded_boxes: list[int] = []
        self._numbers: list[int] = []
        self._box_sources: dict[int, str] = {}
        self._dropped: dict[str, list[str]] = {}
        self._corrected: dict[str, list[str]] = {}
        self._noted: dict[tuple[str, str], list[str]] = {}

    def __len__(self) -> int:
        return len(self._files)

    def add_image(
        self, file: Path, *, source: str, sides: Sides | None = None, image_id: int | None = None
    ) -> int:
        """Add an image and return its index.

        Args:
            file: of the image.
            source: name of its annotations in messages.
            sides: pixels; None if the annotations do not have them.
            image_id: None if the format has none.
        """
        self._files.append(file)
        self._sources.append(source)
        self._sides.append(sides)
        self._ids.append(image_id)
        return len(self._files) - 1

    def add_box(
        self,
        image: int,
        category: int,
        box: Sequence[float],
        *,
        number: int,
        source: str | None = None,
        is_crowd: bool = False,
    ) -> int:
        """Add a box and return its index.

        Args:
            image: its index.
            category: index of its category.
            box: xyxy, image frame, pixels or fractions.
            number: of the box in its source, from 1.
            source: name of its annotations in messages; None for those of its image.
            is_crowd: whether it is a crowd or a region to ignore.
        """
        if source is not None:
            self._box_sources[len(self._images)] = source
        self._images.append(image)
        self._categories.append(category)
        self._boxes += box
        self._crowds.append(is_crowd)
        self._numbers.append(number)
        return len(self._images) - 1

    def add_polygon(self, points: Sequence[float]) -> None:
        """Add a polygon to the mask of the box that was added last.

        Args:
            points: x, y, x, y, ..., pixels or fractions as the boxes are; of at least 3 corners.
        """
        self._points += points
        self._ring_lengths.append(len(points) // 2)
        self._ring_boxes.append(len(self._images) - 1)

    def add_encodings(self, boxes: Sequence[int], masks: MaskArrays) -> None:
        """Add the masks of some boxes, where no box has polygons.

        Args:
            boxes: their indices, rising, and above those of earlier calls.
            masks: run-length encodings.
        """
        self._encoded_boxes += boxes
        self._encodings.append(masks)

    def drop_polygons(self) -> None:
        """Forget all polygons; boxes remain."""
        self._points, self._ring_lengths, self._ring_boxes = [], [], []

    def drop(self, kind: str, image: int, number: int, problem: str) -> None:
        """Leave out a box that cannot be read.

        Args:
            kind: of problem, completes "N lines" in the warning.
            image: its index.
            number: of the box in its source.
            problem: what the box is, and what was expected.
        """
        self.drop_line(kind, f"{self._sources[image]}, {self._noun} {number}: {problem}")

    def drop_line(self, kind: str, line: str) -> None:
        """Leave out a box of an unknown image; `line` names the box and its problem."""
        self._dropped.setdefault(kind, []).append(line)

    def correct(self, kind: str, image: int, number: int) -> None:
        """Count a box that is not used as it is in the file; `kind` completes "N lines" in the warning."""
        self._corrected.setdefault(kind, []).append(f"{self._sources[image]}, {self._noun} {number}")

    def note(self, noun: str, kind: str, example: str) -> None:
        """Count something else than a box that is not used as it is; `kind` completes "N images" in the warning."""
        self._noted.setdefault((noun, kind), []).append(example)

    def note_unused(self, images: "ImageIndex", *, kind: str) -> None:
        """Count the files of an index that no image of the data set has."""
        for file in sorted(images.files.difference(self._files)):
            self.note("image", kind, os.path.relpath(file, self.path))

    @property
    def _as_added(self) -> np.ndarray:
        """(n, 4) the boxes as they were added."""
        return np.array(self._boxes, dtype=np.float64).reshape(-1, 4)

    def shift(self, offset: Sequence[float]) -> None:
        """Add an offset of 4 numbers to all boxes."""
        self._boxes = (self._as_added + np.asarray(offset)).ravel().tolist()

    def replace_categories(self, index_of: Mapping[int, int]) -> None:
        """Replace the category of every box by what it stands for."""
        self._categories = [index_of[category] for category in self._categories]

    def build(
        self,
        categories: Sequence[Category],
        *,
        root: Path,
        data: DataSpec,
        order: Sequence[int] | None = None,
    ) -> RawDataset:
        """Return what was collected, with the sides of images that the annotations do not have.

        Args:
            categories: by index.
            root: folder that file names are relative to, unless an image is outside it: then the closest folder that
                all images are in.
            data: how image files are read, and whether bad ones are skipped.
            order: of the images; None keeps the order in which they were added.

        Raises:
            AnnotationError: listing the problems of the files.
        """
        if self._are_fractions:
            self._check_fractions()
        raise_for(self.path, self.problems)
        root, _ = relative_names(self._files, root)
        have_no_sides = all(sides is None for sides in self._sides)
        is_kept, left_out = self._read_sides(root, data)
        kept = np.flatnonzero(is_kept)
        if order is not None:
            kept = np.array([i for i in order if is_kept[i]], dtype=np.int64)
        index_of_image = np.full(len(is_kept), -1, dtype=np.int64)
        index_of_image[kept] = np.arange(len(kept))
        images = np.array(self._images, dtype=np.int64)
        rows = np.flatnonzero(index_of_image[images] >= 0) if len(images) else images
        sides = np.array(
            [(0, 0) if sides is None else (sides.width, sides.height) for sides in self._sides],
            dtype=np.int64,
        ).reshape(-1, 2)
        boxes = self._as_added
        if self._are_fractions and len(boxes):
            # Decimal fractions are inexact in binary: without rounding, a box of 1 pixel may be narrower than 1.
            boxes = np.round(boxes * np.tile(sides[images], (1, 2)), _DECIMALS)
        has_masks = bool(self._ring_boxes or self._encoded_boxes) and data.masks == "read"
        masks = self._build_masks(sides[images]) if has_masks else None
        root, names = relative_names([self._files[i] for i in kept.tolist()], root)
        numbers, sources = np.array(self._numbers, dtype=np.int64), self._sources

        def name_box(row: int) -> str:
            box = int(rows[row])
            source = self._box_sources.get(box, sources[int(images[box])])
            return f"{source}, {self._noun} {numbers[box]}"

        return RawDataset(
            path=self.path,
            image_root=root,
            categories=tuple(categories),
            image_ids=self._image_ids(kept, names),
            file_names=np.array(names, dtype=np.str_),
            widths=sides[kept, 0],
            heights=sides[kept, 1],
            image_indices=index_of_image[images[rows]],
            category_indices=np.array(self._categories, dtype=np.int64)[rows],
            boxes=boxes[rows],
            is_crowd=np.array(self._crowds, dtype=np.bool_)[rows],
            areas=np.full(len(rows), np.nan),
            masks=None if masks is None else masks.select(rows),
            name_image=lambda image: f"image {names[image]}",
            name_box=name_box,
            dropped=tuple(self._list(kind, examples, self._noun) for kind, examples in self._dropped.items()),
            are_files_checked=have_no_sides,
            left_out=tuple(left_out),
            warnings=(*self.warnings, *map(str, self._list_corrections())),
        )

    def _build_masks(self, sides: np.ndarray) -> MaskArrays:
        """Return the masks of all boxes, given the (n, 2) sides of their images."""
        if self._encoded_boxes:
            is_given = np.zeros(len(self._images), dtype=np.bool_)
            is_given[self._encoded_boxes] = True
            return MaskArrays.concatenate(self._encodings).spread(is_given)
        points = np.array(self._points, dtype=np.float64).reshape(-1, 2)
        lengths = np.array(self._ring_lengths, dtype=np.int64)
        if self._are_fractions:
            points = np.round(points * np.repeat(sides[self._ring_boxes], lengths, axis=0), _DECIMALS)
        return MaskArrays.from_arrays(
            points,
            ring_lengths=lengths,
            num_rings=np.bincount(self._ring_boxes, minlength=len(self._images)),
        )

    def _check_fractions(self) -> None:
        boxes = self._as_added
        with np.errstate(invalid="ignore", over="ignore"):
            are_pixels = (boxes[:, :2] + boxes[:, 2:] > 2.5).any(axis=1)
        if len(boxes) and are_pixels.mean() > 0.5:
            self.problems.append(
                f"{are_pixels.sum()} of {len(boxes)} boxes have their centre beyond 1; the numbers of this format are "
                "fractions of the sides of the image, these look like pixels"
            )

    def _list_corrections(self) -> Iterable[Findings]:
        for kind, examples in self._corrected.items():
            yield self._list(kind, examples, self._noun)
        for (noun, kind), examples in self._noted.items():
            yield self._list(kind, examples, noun)

    def _list(self, kind: str, examples: Sequence[str], noun: str) -> Findings:
        listed = tuple(examples[:MAX_LISTED])
        plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
        return Findings(problem=kind, count=len(examples), examples=listed, noun=noun, plural=plural)

    def _read_sides(self, root: Path, data: DataSpec) -> tuple[np.ndarray, list[str]]:
        """Read the sides of images that have none; return whether each image can be used, and why the others cannot."""
        is_kept = np.ones(len(self._files), dtype=np.bool_)
        missing = [i for i, sides in enumerate(self._sides) if sides is None]
        problems = []
        for i, sides in zip(missing, read_sides([self._files[i] for i in missing], root, data), strict=True):
            if isinstance(sides, Sides):
                self._sides[i] = sides
            else:
                is_kept[i] = False
                problems.append(sides)
        if problems and data.on_bad_image == "refuse":
            raise_for(self.path, problems)
        for problem in problems:
            self.note("image", LEFT_OUT, problem)
        return is_kept, problems

    def _image_ids(self, kept: np.ndarray, names: Sequence[str]) -> Shaped[np.ndarray, " m"]:
        ids = [self._ids[i] for i in kept.tolist()]
        whole = [image_id for image_id in ids if image_id is not None]
        return np.array(whole, dtype=np.int64) if len(set(whole)) == len(ids) else ids_of_names(names)


def read_sides(files: Sequence[Path], root: Path, data: DataSpec) -> list[Sides | str]:
    """Read the sides of images from their headers, in threads; the problem instead where that fails."""

    def read_one(file: Path) -> Sides | str:
        problem = find_path_problem(file, root, follow_links=data.follow_links)
        if problem is not None:
            return (
                f"{os.path.relpath(file, root)} {problem}; the annotations do not have the sides of the image"
            )
        try:
            return read_image_sides(file, data.read)
        except ImageError as error:
            return str(error)

    def read_some(first: int) -> list[Sides | str]:
        return [read_one(file) for file in files[first : first + _FILES_AT_ONCE]]

    if any(map(is_remote, files)):
        return [read_one(file) for file in read_ahead(files, is_fixed=True)]
    firsts = range(0, len(files), _FILES_AT_ONCE)
    if len(firsts) <= 1:
        return [read_one(file) for file in files]
    with ThreadPoolExecutor(_NUM_THREADS) as threads:
        return [sides for some in threads.map(read_some, firsts) for sides in some]


def has_image_suffix(name: str) -> bool:
    """Check whether a file name is that of an image, and not hidden."""
    return os.path.splitext(name)[1].lower() in _known_suffixes() and not is_ignored(name)


@lru_cache(maxsize=1)
def _known_suffixes() -> frozenset[str]:
    return image_suffixes() | frozenset(EXTRAS)


def relative_names(files: Sequence[Path], root: Path) -> tuple[Path, list[str]]:
    """Return names relative to a folder, with forward slashes, and the folder.

    Args:
        files: of images.
        root: the folder, unless it does not have all files: then the closest folder that has. A linked folder of images
            is not in the folder that has the link.
    """
    if not files:
        return root, []
    texts = [absolute_text(file) for file in files]
    closest = _closest_folder(texts)
    base = absolute_text(root)
    if not _is_inside(closest, base) or not _is_inside(real_text(closest), real_text(base)):
        root, base = to_path(closest), closest
    prefix = os.path.join(base, "")
    return root, [text[len(prefix) :].replace(os.sep, "/") for text in texts]


def _closest_folder(texts: Sequence[str]) -> str:
    """Return the closest folder that all files are in, local or remote.

    Raises:
        AnnotationError: if there is none.
    """
    servers = {text[: text.index("/", text.index("://") + 3)] if is_url(text) else "" for text in texts}
    if len(servers) > 1:
        raise AnnotationError(
            f"the images of a data set are in {' and '.join(sorted(server or 'local folders' for server in servers))}, "
            "expected one place"
        )
    (server,) = servers
    return server + os.path.commonpath([os.path.dirname(text[len(server) :]) for text in texts]).rstrip(
        "/" * bool(server)
    )


def _is_inside(folder: str, root: str) -> bool:
    return os.path.join(folder, "").startswith(os.path.join(root, ""))


def ids_of_names(names: Sequence[str]) -> Shaped[np.ndarray, " m"]:
    """Return image ids for a format without ids: the names of the files without folder and suffix.

    Names without two images of one name are integers if all of them are: `000139.jpg` is image 139, as in COCO and in
    the results of other tools. Images of one name in several folders keep the folder in their ids.

    Args:
        names: of the files, relative.
    """
    stems = [name.rsplit("/", 1)[-1].rsplit(".", 1)[0] for name in names]
    if len(set(stems)) < len(stems):
        stems = [name.rsplit(".", 1)[0] for name in names]
    if len(set(stems)) < len(stems):
        stems = list(names)
    if all(stem.isascii() and stem.isdigit() and len(stem) <= _MAX_DIGITS for stem in stems):
        numbers = np.array([int(stem) for stem in stems], dtype=np.int64)
        if len(np.unique(numbers)) == len(numbers):
            return numbers
    return np.array(stems, dtype=np.str_)


def numbered(names: Iterable[str], *, first: int = 1) -> tuple[Category, ...]:
    """Return categories with ids that count from `first`, in the order of their names."""
    return tuple(Category(category_id=number, name=name) for number, name in enumerate(names, start=first))


def envelope(points: Sequence[float]) -> tuple[float, float, float, float]:
    """Return the box around points x, y, x, y, ..."""
    xs, ys = points[0::2], points[1::2]
    return min(xs), min(ys), max(xs), max(ys)


class ImageIndex:
    """The image files of some folders, by name and by name without suffix.

    Args:
        folders: searched in this order, not recursively; those that do not exist are passed over.
    """

    def __init__(self, folders: Iterable[Path]) -> None:
        self._folders = [folder for folder in folders if folder.is_dir()]
        self._by_name: dict[str, Path] = {}
        self._by_stem: dict[str, Path] = {}
        for folder in self._folders:
            for name in sorted(list_names(folder)):
                if has_image_suffix(name):
                    self._by_name.setdefault(name, folder / name)
                    self._by_stem.setdefault(os.path.splitext(name)[0], folder / name)
        suffixes = Counter(os.path.splitext(name)[1] for name in self._by_name)
        self._suffix = max(suffixes, key=suffixes.__getitem__, default=".jpg")

    @property
    def files(self) -> set[Path]:
        """All files; of several with one name, the first."""
        return set(self._by_name.values())

    def get(self, name: str) -> Path | None:
        """Return the file of a name, with or without suffix; None if there is none."""
        return self._by_stem.get(name) or self._by_name.get(name)

    def find(self, stem: str, *, name: str = "") -> Path:
        """Return the file of an image: the one named like its annotations, else the one that these name.

        Without either, return the path where it was expected.
        """
        name = name.replace("\\", "/").rsplit("/", 1)[-1]
        file = self.get(stem) or self.get(name)
        return file or (self._folders[0] if self._folders else Path()) / (name or f"{stem}{self._suffix}")


def names_by_stem(folder: str | Path, suffix: str) -> dict[str, str]:
    """Return the names of the files in a folder that have a suffix, in lower or upper case, by the name without it.

    They are sorted. Hidden files are passed over; a folder that does not exist has none.
    """
    try:
        names = sorted(list_names(folder))  # a.txt after a.TXT
    except (FileNotFoundError, NotADirectoryError):
        return {}
    return {
        name[: -len(suffix)]: name for name in names if name.lower().endswith(suffix) and not is_ignored(name)
    }
