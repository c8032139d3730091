"""Read CVAT's XML of images (version 1.1)."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.etree import ElementTree

from sniper.data.datasets.collect import Collector, envelope, numbered
from sniper.data.datasets.file_names import leaves_root
from sniper.data.datasets.raw import RawDataset
from sniper.data.datasets.splits import canonical, choose_splits
from sniper.data.datasets.text_files import iterate_xml, sides_of
from sniper.data.spec import DataSpec
from sniper.errors import AnnotationError

Box = tuple[float, float, float, float]

_WITH_MASK = ("polygons", "masks")  # kinds of shapes


def read_cvat(path: Path, *, image_root: Path | None, split: str | None, data: DataSpec) -> RawDataset:
    """Read an XML file of CVAT; its subsets are splits.

    Boxes, polygons and masks are read. Rotated boxes and ellipses become their boxes, with a warning. Other shapes are
    counted.

    Args:
        path: of the file.
        image_root: folder that the names of images are relative to.
        split: to read, or `all`; None is the training split, or everything where there are no subsets.
        data: how image files are read.

    Raises:
        AnnotationError: listing the problems of the file.
    """
    root = image_root or _find_root(path)
    reader = _Reader(path, root)
    for event, element in iterate_xml(path):
        reader.read(event, element)
    chosen = set(choose_splits(path, reader.splits, split))
    order = [i for i, subset in enumerate(reader.subsets) if not chosen or subset in chosen]
    return reader.collector.build(numbered(reader.names), root=root, data=data, order=order)


def _find_root(path: Path) -> Path:
    images = path.parent / "images"
    return images if images.is_dir() else path.parent


def cvat_splits(path: Path) -> list[str]:
    """Return the splits of an XML file of CVAT."""
    reader = _Reader(path, path.parent)
    for event, element in iterate_xml(path):
        reader.read(event, element)
    return reader.splits


class _Reader:
    def __init__(self, path: Path, root: Path) -> None:
        self.collector = Collector(path, noun="shape")
        self.names: dict[str, int] = {}
        self.subsets: list[str] = []
        self._path, self._root = path, root
        self._depth = 0
        self._parents: list[str] = []
        self._has_labels = False

    @property
    def splits(self) -> list[str]:
        """The subsets, if there are several or one is named after a split."""
        subsets = sorted(set(self.subsets), key=lambda name: ("train", "val", "test", name).index(name))
        return [] if set(subsets) <= {"", "default"} else subsets

    def read(self, event: str, element: ElementTree.Element) -> None:
        """Read an element of the file once it is complete."""
        if event == "start":
            self._check_start(element)
            self._parents.append(element.tag)
            return
        self._parents.pop()
        if element.tag == "label" and self._parents[-1:] == ["labels"]:
            name = (element.findtext("name") or "").strip()
            if name:
                self._has_labels = True
                self.names.setdefault(name, len(self.names))
        elif element.tag == "image" and len(self._parents) == 1:
            self._read_image(element)
            element.clear()

    def _check_start(self, element: ElementTree.Element) -> None:
        if not self._parents and element.tag != "annotations":
            raise AnnotationError(
                f"{self._path}: the element is {element.tag!r}, expected CVAT's 'annotations'"
            )
        if len(self._parents) == 1 and element.tag == "track":
            raise AnnotationError(
                f"{self._path}: has tracks of a video; export it from CVAT as 'CVAT for images 1.1'"
            )

    def _read_image(self, element: ElementTree.Element) -> None:
        name = element.get("name", "")
        source = f"image {element.get('id', '?')} ({name})"
        if not name:
            self.collector.problems.append(f"{source}: has no name")
            return
        subset = element.get("subset", "")
        if leaves_root(name):
            self.collector.problems.append(f"{source}: leaves the image root {self._root}")
            return
        image = self.collector.add_image(
            self._find_image(name, subset),
            source=source,
            sides=sides_of(element.get("width"), element.get("height")),
            image_id=_id(element),
        )
        self.subsets.append(canonical(subset))
        for number, shape in enumerate(element, start=1):
            self._read_shape(image, number, shape)

    def _find_image(self, name: str, subset: str) -> Path:
        """Return the file of an image; CVAT puts those of a subset into a folder of its name."""
        file, in_subset = self._root / name, self._root / subset / name
        return in_subset if subset and not file.exists() and in_subset.exists() else file

    def _read_shape(self, image: int, number: int, shape: ElementTree.Element) -> None:
        convert = _CONVERTERS.get(str(shape.tag))
        if convert is None:
            self.collector.correct(f"of the kind {shape.tag}, which has no box, not used", image, number)
            return
        if shape.get("outside") == "1":
            self.collector.correct("marked as outside, not used", image, number)
            return
        try:
            box, kind = convert(shape)
        except (TypeError, ValueError):
            listed = " ".join(f'{key}="{value[:40]}"' for key, value in shape.items() if key != "rle")
            self.collector.drop(
                "with text in place of numbers",
                image,
                number,
                f"is a {shape.tag} with {listed}, expected numbers",
            )
            return
        if kind and kind not in _WITH_MASK:
            self.collector.correct(f"drawn as {kind}, used as their boxes", image, number)
        label = shape.get("label", "")
        if label not in self.names:
            if self._has_labels:
                self.collector.correct(
                    f"of the label {label!r}, which the list of labels lacks", image, number
                )
            self.names[label] = len(self.names)
        self.collector.add_box(image, self.names[label], box, number=number)
        for points in _polygons(shape) if kind in _WITH_MASK else ():
            self.collector.add_polygon(points)


def _number(shape: ElementTree.Element, key: str, missing: float | None = None) -> float:
    text = shape.get(key)
    if text is None and missing is not None:
        return missing
    return float(text if text is not None else "missing")


def _convert_box(shape: ElementTree.Element) -> tuple[Box, str]:
    x1, y1, x2, y2 = (_number(shape, key) for key in ("xtl", "ytl", "xbr", "ybr"))
    rotation = _number(shape, "rotation", 0.0)
    if rotation % 360 == 0:
        return (x1, y1, x2, y2), ""
    angle = math.radians(rotation)
    return _rotated_envelope((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1, angle), "rotated boxes"


def _rotated_envelope(x: float, y: float, width: float, height: float, angle: float) -> Box:
    """Return the box around a rotated box of a centre, two sides and an angle in radians."""
    cos, sin = math.cos(angle), math.sin(angle)
    corners = [(sx * width / 2, sy * height / 2) for sx, sy in ((-1, -1), (1, -1), (1, 1), (-1, 1))]
    points = [value for dx, dy in corners for value in (x + dx * cos - dy * sin, y + dx * sin + dy * cos)]
    return envelope(points)


def _corners(shape: ElementTree.Element) -> list[float]:
    """Return x, y, x, y, ... of a polygon."""
    points = [float(value) for point in shape.get("points", "").split(";") for value in point.split(",")]
    if len(points) < 6 or len(points) % 2:
        raise ValueError
    return points


def _convert_polygon(shape: ElementTree.Element) -> tuple[Box, str]:
    return envelope(_corners(shape)), "polygons"


def _convert_ellipse(shape: ElementTree.Element) -> tuple[Box, str]:
    x, y, rx, ry = (_number(shape, key) for key in ("cx", "cy", "rx", "ry"))
    angle = math.radians(_number(shape, "rotation", 0.0))
    width = math.hypot(rx * math.cos(angle), ry * math.sin(angle))
    height = math.hypot(rx * math.sin(angle), ry * math.cos(angle))
    return (x - width, y - height, x + width, y + height), "ellipses"


def _convert_mask(shape: ElementTree.Element) -> tuple[Box, str]:
    x, y, width, height = (_number(shape, key) for key in ("left", "top", "width", "height"))
    is_filled = sum(_counts(shape)) == width * height
    kind = "masks" if is_filled else "masks whose run lengths do not fill them"
    return (x, y, x + width, y + height), kind


def _counts(shape: ElementTree.Element) -> list[int]:
    """Return the lengths of the runs of a mask inside its box, row by row; none if they are no numbers.

    The first run is outside the mask.
    """
    counts = shape.get("rle", "").split(",")
    return [int(count) for count in counts] if all(count.strip().isdecimal() for count in counts) else []


def _polygons(shape: ElementTree.Element) -> Iterator[list[float]]:
    """Yield x, y, x, y, ... of the polygons of a shape: of a mask, a rectangle for each run of pixels in a row."""
    if shape.tag == "polygon":
        yield _corners(shape)
        return
    left, top, width = (_number(shape, key) for key in ("left", "top", "width"))
    start = 0
    for index, count in enumerate(_counts(shape)):
        stop = start + count
        while index % 2 == 1 and start < stop:
            row, column = divmod(start, int(width))
            end = min(int(width), column + stop - start)
            x1, y1, x2, y2 = left + column, top + row, left + end, top + row + 1
            yield [x1, y1, x2, y1, x2, y2, x1, y2]
            start += end - column
        start = stop


_CONVERTERS: dict[str, Callable[[ElementTree.Element], tuple[Box, str]]] = {
    "box": _convert_box,
    "polygon": _convert_polygon,
    "ellipse": _convert_ellipse,
    "mask": _convert_mask,
}


def _id(element: ElementTree.Element) -> int | None:
    text = element.get("id", "")
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 18 else None
