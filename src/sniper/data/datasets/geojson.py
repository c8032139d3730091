"""Read polygons in GeoJSON over georeferenced images: one file for all images, or one for each.

`docs/georeferenced.md` describes how the image, the class and the box of a feature are found.
"""

import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from jaxtyping import Bool, Float, Int

from sniper.data.datasets.collect import LEFT_OUT, Collector, ImageIndex, has_image_suffix, numbered
from sniper.data.datasets.dataset import Category
from sniper.data.datasets.raw import RawDataset
from sniper.data.datasets.splits import by_split, canonical, choose_splits, find_split_folders
from sniper.data.datasets.text_files import flag_of, read_start, read_text
from sniper.data.images.georeference import (
    WGS84,
    Georeference,
    describe_crs,
    read_georeference,
    transform_points,
)
from sniper.data.images.tiff import has_rasterio
from sniper.data.spec import DataSpec
from sniper.errors import AnnotationError, ImageError, count_and_list
from sniper.files import is_ignored, list_folder, list_names, read_json, read_typed_json
from sniper.geometry.boxes import Sides
from sniper.geometry.polygons import clip_to_window

ONE_CLASS = "object"
"""Name of the class of all objects, where no property has classes."""

NO_PROPERTY = "none"
"""Value of `data.class_property` for one class."""

_SUFFIX = ".geojson"
_COLLECTION = re.compile(rb'"type"\s*:\s*"FeatureCollection"')
_NUM_START_BYTES = 65_536  # of a file, by which GeoJSON is recognized
_CLASS_PROPERTIES = (
    "class",
    "class_name",
    "label",
    "category",
    "category_name",
    "type",
    "class_id",
    "type_id",
    "category_id",
    "role",
)
_IMAGE_PROPERTIES = ("image", "image_id", "image_name", "file_name", "filename")
_PIXEL_BOX = "bounds_imcoords"  # of xView: x1, y1, x2, y2 in pixels, as text
_IMAGE_FOLDERS = ("images", "image", "imgs", "imagery")
_LABEL_FOLDERS = ("labels", "annotations", "geojson", "vectors")
_DEPTH = 2  # of folders in which files are looked for
_GRID = 9  # points along a side of an image whose place is compared with that of objects
_MARGIN = 0.1  # of the extent of these points, for what is between them
_TOLERANCE = 0.5  # pixels by which rounded coordinates reach over the border of an image
_MIN_VISIBLE = 1.0  # pixels of an object that is cut off at the border
_MAX_LISTED = 12  # properties in an error
_MAX_ID = 2**63  # below which integers are ids of categories


@dataclass(frozen=True, kw_only=True)
class GeoJsonSource:
    """The GeoJSON files of a data set.

    Attributes:
        path: of the data set.
        splits: files, and the folder that the images are in or under, by canonical name; under an empty name where
            there are none.
    """

    path: Path
    splits: Mapping[str, tuple[Sequence[Path], Path]]

    @property
    def split_names(self) -> list[str]:
        """Canonical names of the splits; empty where there are none."""
        return [name for name in self.splits if name]


def is_geojson(path: Path) -> bool:
    """Check whether a file is GeoJSON, by its suffix or its start."""
    if path.suffix.lower() == _SUFFIX:
        return True
    return _COLLECTION.search(read_start(path, num_bytes=_NUM_START_BYTES)) is not None


def find_geojson(path: Path) -> GeoJsonSource | None:
    """Find the GeoJSON files of a data set; None if there are none.

    Args:
        path: a file; or a folder that has some, directly or up to two folders below, or folders train, val and test of
            these, or files that are named after a split.

    Raises:
        AnnotationError: if files are in several folders that are not named after splits.
    """
    if not path.is_dir():
        folder = path.parent
        is_beside = folder.name.lower() in _LABEL_FOLDERS and not _has_images(folder)
        return GeoJsonSource(path=path, splits={"": ((path,), folder.parent if is_beside else folder)})
    by_folder = {
        name: (find_geojson_files(folder), folder) for name, folder in find_split_folders(path).items()
    }
    splits = {name: entry for name, entry in by_folder.items() if entry[0]}
    if splits:
        return GeoJsonSource(path=path, splits=splits)
    files = find_geojson_files(path)
    if not files:
        return None
    folders = sorted({file.parent for file in files})
    if len(folders) > 1:
        named = by_split((folder.name, folder) for folder in folders)
        if len(named) < len(folders):
            listed = ", ".join(str(folder) for folder in folders)
            raise AnnotationError(f"{path}: has GeoJSON in several folders, name one of {listed}")
        inside = {name: [file for file in files if file.parent == folder] for name, folder in named.items()}
        return GeoJsonSource(path=path, splits={name: (some, path) for name, some in inside.items()})
    by_name = by_split((re.split(r"[_\-.]", file.stem)[-1], file) for file in files)
    if len(by_name) == len(files):
        return GeoJsonSource(path=path, splits={name: ((file,), path) for name, file in by_name.items()})
    return GeoJsonSource(path=path, splits={"": (files, path)})


def read_geojson(
    source: GeoJsonSource, *, image_root: Path | None, split: str | None, data: DataSpec
) -> RawDataset:
    """Read the GeoJSON files of a data set; polygons become the boxes around what is visible of them in an image.

    The files of all splits are read, as the classes are those of the whole data set. Features with `iscrowd` are
    crowds.

    Args:
        source: its files.
        image_root: folder of the images; None looks for it.
        split: to read, or `all`; None is the training split.
        data: how image files are read, and the property that has the class (`class_property`).

    Raises:
        AnnotationError: listing the problems of the files.
    """
    chosen = choose_splits(source.path, source.split_names, split) or list(source.splits)
    collector = Collector(source.path, noun="feature")
    files = {
        name: [_File.read(file, source.path) for file in files] for name, (files, _) in source.splits.items()
    }
    classes = _Classes.find([file for some in files.values() for file in some], source.path, data, collector)
    folders = {
        name: [image_root] if image_root is not None else _find_image_folders(folder, name)
        for name, (_, folder) in source.splits.items()
    }
    left_out: list[str] = []
    for name in chosen:
        others = [folder for other, some in folders.items() if other != name for folder in some]
        placing = _Placing(
            collector,
            data,
            classes,
            folders=folders[name],
            are_shared=not set(folders[name]).isdisjoint(others),
        )
        placing.place(files[name])
        left_out += placing.left_out
    root = image_root or (source.path if source.path.is_dir() else source.path.parent)
    raw = collector.build(classes.categories, root=root, data=data)
    return replace(raw, left_out=(*raw.left_out, *left_out))


# Files


def find_geojson_files(folder: Path) -> list[Path]:
    """Return the GeoJSON files in a folder, or else in the folders in it, or else in those in these."""
    by_depth: dict[int, list[Path]] = {}
    for inner, names in _walk(folder):
        files = [inner / name for name in names if name.lower().endswith(_SUFFIX) and not is_ignored(name)]
        by_depth.setdefault(len(inner.relative_to(folder).parts), []).extend(files)
    return next((files for _, files in sorted(by_depth.items()) if files), [])


def _walk(folder: Path, depth: int = _DEPTH) -> Iterator[tuple[Path, list[str]]]:
    """Yield a folder and those in it down to some depth, without hidden ones, and the names of the files in each."""
    try:
        folders, names = list_folder(folder)
    except PermissionError:
        return
    yield folder, names
    for name in folders if depth else ():
        if not is_ignored(name):
            yield from _walk(folder / name, depth - 1)


def _has_images(folder: Path) -> bool:
    return folder.is_dir() and any(map(has_image_suffix, list_names(folder)))


def _find_image_folders(folder: Path, split: str) -> list[Path]:
    """Return the folders that the images of a split may be in: those named after it, or as usual, or else all."""
    folders = [inner for inner, names in _walk(folder) if any(map(has_image_suffix, names))]
    named = [inner for inner in folders if split and inner != folder and canonical(inner.name) == split]
    usual = [inner for inner in folders if inner.name.lower() in _IMAGE_FOLDERS]
    return named or usual or [inner for inner in folders if inner == folder] or folders


class _Geometry(msgspec.Struct, gc=False):
    type: str
    coordinates: Any = None
    geometries: "list[_Geometry] | None" = None


class _Feature(msgspec.Struct, gc=False):
    geometry: _Geometry | None = None
    properties: dict[str, Any] | None = None


class _Collection(msgspec.Struct, gc=False):
    type: str
    features: list[_Feature]
    crs: Any = None


@dataclass(frozen=True, kw_only=True, eq=False)
class _File:
    """The features of a file.

    Attributes:
        path: of the file.
        name: relative to the data set, for messages.
        features: in the order of the file.
        crs: name of the CRS of their coordinates.
    """

    path: Path
    name: str
    features: Sequence[_Feature]
    crs: str

    @classmethod
    def read(cls, path: Path, root: Path) -> "_File":
        content = read_typed_json(path, _Collection)
        if content is None:
            raw = read_json(path, error=AnnotationError)
            try:
                content = msgspec.convert(raw, _Collection)
            except msgspec.ValidationError as error:
                raise AnnotationError(
                    f"{path}: expected a FeatureCollection of GeoJSON ({error}); each feature is an object with "
                    "geometry and properties"
                ) from error
        if content.type != "FeatureCollection":
            raise AnnotationError(
                f"{path}: is GeoJSON of type {content.type!r}, expected a FeatureCollection"
            )
        name = path.relative_to(root).as_posix() if root.is_dir() else path.name
        return cls(path=path, name=name, features=content.features, crs=_crs_name(path, content.crs))

    def describe(self, index: int) -> str:
        """Return the name of a feature for messages."""
        return f"{self.name}, feature {index + 1}"


def _crs_name(path: Path, member: Any) -> str:
    """Return the CRS that the member `crs` of GeoJSON before RFC 7946 names; WGS 84 without one."""
    if member is None:
        return WGS84
    properties = member.get("properties") if isinstance(member, Mapping) else None
    name = properties.get("name") if isinstance(properties, Mapping) else None
    if not isinstance(name, str):
        raise AnnotationError(
            f"{path}: crs is {reprlib.repr(member)}, expected an object with properties.name, such as "
            "urn:ogc:def:crs:EPSG::32633"
        )
    return name


# Classes


@dataclass(frozen=True, kw_only=True, eq=False)
class _Classes:
    """The classes of a data set.

    Attributes:
        property: that has the class of a feature; None if all objects are of one class.
        categories: of the data set.
        index_of: index of the category by the value of the property.
    """

    property: str | None
    categories: tuple[Category, ...]
    index_of: Mapping[int | str, int]

    @classmethod
    def find(cls, files: Sequence[_File], path: Path, data: DataSpec, collector: Collector) -> "_Classes":
        name = _find_class_property(files, path, data.class_property, collector)
        if name is None:
            return cls(property=None, categories=numbered([ONE_CLASS]), index_of={})
        found = {
            value
            for file in files
            for feature in file.features
            if (value := _to_class(_properties(feature).get(name))) is not None
        }
        if all(isinstance(value, int) for value in found):
            names = _read_class_names(path if path.is_dir() else path.parent)
            numbers = sorted(value for value in found if isinstance(value, int))
            categories = tuple(
                Category(category_id=number, name=names.get(number, str(number))) for number in numbers
            )
            return cls(
                property=name, categories=categories, index_of={each: i for i, each in enumerate(numbers)}
            )
        texts = sorted({str(value) for value in found})
        index_of = {value: texts.index(str(value)) for value in found}
        return cls(property=name, categories=numbered(texts), index_of=index_of)

    def get(self, feature: _Feature) -> int | None:
        """Return the category of a feature, as an index; None if it has none."""
        if self.property is None:
            return 0
        value = _to_class(_properties(feature).get(self.property))
        return None if value is None else self.index_of[value]


def _find_class_property(
    files: Sequence[_File], path: Path, wanted: str | None, collector: Collector
) -> str | None:
    """Return the property that has the classes; None for one class.

    Raises:
        AnnotationError: if there is no such property, or no property with a known name among others.
    """
    if wanted == NO_PROPERTY:
        return None
    examples: dict[str, Any] = {}
    for file in files:
        for feature in file.features:
            for name, value in _properties(feature).items():
                if examples.get(name) is None and _to_class(value) is not None:
                    examples[name] = value
    listed = count_and_list(
        [f"{name} (such as {reprlib.repr(value)})" for name, value in examples.items()],
        limit=_MAX_LISTED,
        separator=", ",
    )
    if wanted is not None:
        if wanted in examples:
            return wanted
        raise AnnotationError(
            f"{path}: no feature has the property {wanted} (data.class_property); there are {listed or 'none'}"
        )
    lower = {name.lower(): name for name in reversed(examples)}
    known = [lower[name] for name in _CLASS_PROPERTIES if name in lower]
    if known:
        if len(known) > 1:
            collector.warnings.append(
                f"the property {known[0]} has the classes; data.class_property (--class-property) chooses another, "
                f"such as {' or '.join(known[1:])}"
            )
        return known[0]
    if examples:
        raise AnnotationError(
            f"{path}: no property of the features is known to have the class, expected one of "
            f"{', '.join(_CLASS_PROPERTIES)}; there are {listed}. Name one with data.class_property "
            f"(--class-property), where {NO_PROPERTY} takes all objects for one class"
        )
    if any(file.features for file in files):
        collector.warnings.append(f"the features have no properties: all are of one class, {ONE_CLASS!r}")
    return None


def _to_class(value: Any) -> int | str | None:
    """Return the value of a property as a class: an integer or text; None for anything else."""
    if isinstance(value, str):
        return value.strip() or None
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, int):
        return None
    return value if abs(value) < _MAX_ID else str(value)


def _read_class_names(folder: Path) -> dict[int, str]:
    """Read the names of classes by number from a file like xView's: a number, a colon and a name in each line."""
    file = next(iter(sorted(folder.glob("*class_labels.txt"))), None)
    if file is None:
        return {}
    pairs = (line.partition(":") for line in read_text(file).split("\n"))
    return {
        int(number): name.strip() for number, _, name in pairs if number.strip().isdecimal() and name.strip()
    }


# Objects


@dataclass(frozen=True, kw_only=True, eq=False)
class _Object:
    """An object of a file.

    Attributes:
        file: index of the file.
        number: of the feature in it, from 1.
        name: of the feature in messages.
        category: as an index.
        is_crowd: whether it is a crowd.
        image: name of its image, if the feature has one.
        rings: exterior rings of its polygons, (n, 2) xy each.
    """

    file: int
    number: int
    name: str
    category: int
    is_crowd: bool
    image: str | None
    rings: Sequence[Float[np.ndarray, "n 2"]]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Table:
    """Objects whose coordinates are in one CRS.

    Attributes:
        crs: of rasterio.
        objects: in the order of the files.
    """

    crs: Any
    objects: Sequence[_Object]

    @cached_property
    def envelopes(self) -> Float[np.ndarray, "n 4"]:
        """(n, 4) the boxes around the objects, xyxy in the CRS."""
        return np.array([_envelope(each.rings) for each in self.objects]).reshape(-1, 4)

    def overlapping(self, georeference: Georeference) -> Int[np.ndarray, " k"]:
        """Return the rows of the objects that may be in an image."""
        points = transform_points(georeference.to_crs(georeference.grid(_GRID)), georeference.crs, self.crs)
        points = points[np.isfinite(points).all(axis=1)]
        if not len(points):
            return np.zeros(0, dtype=np.int64)
        low, high = points.min(axis=0), points.max(axis=0)
        margin = _MARGIN * (high - low)
        x1, y1, x2, y2 = self.envelopes.T
        is_near = (y1 <= high[1] + margin[1]) & (y2 >= low[1] - margin[1])
        if not self.crs.is_geographic:
            return np.flatnonzero(is_near & (x1 <= high[0] + margin[0]) & (x2 >= low[0] - margin[0]))
        turn = 2 * np.pi / self.crs.units_factor[1]
        if (
            high[0] - low[0] < turn / 2
        ):  # else the image has a pole or crosses the antimeridian: all longitudes
            is_near &= np.logical_or.reduce(
                [
                    (x1 + shift <= high[0] + margin[0]) & (x2 + shift >= low[0] - margin[0])
                    for shift in (-turn, 0.0, turn)
                ]
            )
        return np.flatnonzero(is_near)


class _Placing:
    """Finds the images of the objects of a split, and adds both to a collector.

    Args:
        collector: of the data set.
        data: how image files are read.
        classes: of the data set.
        folders: that may have the images.
        are_shared: whether another split has images in them, too.

    Attributes:
        left_out: one line for each image whose place cannot be read.
    """

    def __init__(
        self,
        collector: Collector,
        data: DataSpec,
        classes: _Classes,
        *,
        folders: Sequence[Path],
        are_shared: bool,
    ) -> None:
        self._collector, self._data, self._classes = collector, data, classes
        self._folders, self._are_shared = folders, are_shared
        self._images = {folder: ImageIndex([folder]) for folder in folders}
        self.left_out: list[str] = []

    def place(self, files: Sequence[_File]) -> None:
        """Add the objects of files, and their images.

        Raises:
            AnnotationError: if no image is found, or it is not clear which folder has them.
        """
        if not any(index.files for index in self._images.values()):
            raise AnnotationError(
                f"{self._collector.path}: found no images beside it, nor in folders there; name their folder (--images)"
            )
        key, named = self._find_named(files)
        if key is not None and any(
            _PIXEL_BOX in _properties(each) for file in files for each in file.features
        ):
            self._add_pixel_boxes(files, key, named)
            return
        tables = self._build_tables(files, key)
        if key is not None:
            self._place_named(tables, key, named)
        else:
            paired = self._find_paired(files)
            if paired:
                self._place_paired(files, tables, paired)
            else:
                self._place_by_position(tables)

    def _build_tables(self, files: Sequence[_File], key: str | None) -> list[_Table]:
        """Read the coordinates of features; those that cannot be used are dropped or counted."""
        if not has_rasterio():
            raise AnnotationError(
                f"{self._collector.path}: the places of images are read by rasterio: pip install 'sniper-det[tiff]'"
            )
        objects: dict[str, list[_Object]] = {}
        num_others = 0
        for position, file in enumerate(files):
            for index, feature in enumerate(file.features):
                try:
                    rings = _exterior_rings(feature.geometry)
                except (TypeError, ValueError, LookupError, OverflowError):
                    self._collector.drop_line(
                        "with coordinates that cannot be read",
                        f"{file.describe(index)}: expected polygons of positions with two numbers at least",
                    )
                    continue
                if rings is None:
                    num_others += 1
                    kind = feature.geometry.type if feature.geometry is not None else ""
                    self._collector.drop_line(
                        "without a polygon",
                        f"{file.describe(index)}: is a {kind}, which has no width and height",
                    )
                elif not rings:
                    self._collector.note("feature", "without coordinates, not used", file.describe(index))
                else:
                    category = self._get_category(file, index)
                    if category is not None:
                        each = _Object(
                            file=position,
                            number=index + 1,
                            name=file.describe(index),
                            category=category,
                            is_crowd=_is_crowd(feature),
                            image=None if key is None else _image_name(feature, key),
                            rings=rings,
                        )
                        objects.setdefault(file.crs, []).append(each)
        if num_others and not objects:
            raise AnnotationError(
                f"{self._collector.path}: all {num_others} features with coordinates are points or lines, expected "
                "polygons: a box has width and height"
            )
        return [self._build_table(crs, some) for crs, some in objects.items()]

    def _build_table(self, name: str, objects: Sequence[_Object]) -> _Table:
        from rasterio.crs import CRS
        from rasterio.errors import CRSError

        try:
            crs = CRS.from_user_input(name)
        except (CRSError, ValueError) as error:
            raise AnnotationError(
                f"{self._collector.path}: crs is {reprlib.repr(name)}, which is not known ({error})"
            ) from error
        table = _Table(crs=crs, objects=objects)
        if name == WGS84:
            is_bad = (np.abs(table.envelopes) > [360, 90, 360, 90]).any(axis=1)
            if 2 * is_bad.sum() > len(is_bad):
                row = int(np.flatnonzero(is_bad)[0])
                x, y = objects[row].rings[0][0].tolist()
                raise AnnotationError(
                    f"{self._collector.path}: {objects[row].name} is at {x:g}, {y:g}, which are no degrees of "
                    "longitude and latitude; other coordinates need a member crs, as ogr2ogr -f GeoJSON -lco "
                    "RFC7946=NO -a_srs EPSG:CODE writes"
                )
        return table

    def _get_category(self, file: _File, index: int) -> int | None:
        """Return the category of a feature; one without is dropped."""
        category = self._classes.get(file.features[index])
        if category is None:
            value = _properties(file.features[index]).get(self._classes.property or "")
            self._collector.drop_line(
                "without a class",
                f"{file.describe(index)}: {self._classes.property} is {reprlib.repr(value)}, expected text or an "
                "integer",
            )
        return category

    # Images that features name

    def _find_named(self, files: Sequence[_File]) -> tuple[str | None, dict[str, Path]]:
        """Return the property that names images, and the image files by name; None if no property does."""
        for key in _IMAGE_PROPERTIES:
            names = {_image_name(feature, key) for file in files for feature in file.features}
            images = {
                name: image
                for name in names
                for index in self._images.values()
                if name is not None and (image := index.get(name)) is not None
            }
            if images:
                return key, images
        return None, {}

    def _drop_unnamed(self, name: str, key: str, value: str | None) -> None:
        self._collector.drop_line(
            "of an image that is not there", f"{name}: {key} is {value!r}, expected the name of an image file"
        )

    def _add_pixel_boxes(self, files: Sequence[_File], key: str, named: Mapping[str, Path]) -> None:
        """Add objects whose boxes are in pixels, as xView has them."""
        collector = self._collector
        images = {
            image: collector.add_image(image, source=files[0].name) for image in sorted(set(named.values()))
        }
        for file in files:
            for index, feature in enumerate(file.features):
                name = _image_name(feature, key)
                if name is None or name not in named:
                    self._drop_unnamed(file.describe(index), key, name)
                    continue
                text = _properties(feature).get(_PIXEL_BOX)
                try:
                    x1, y1, x2, y2 = (float(value) for value in str(text).split(","))
                except ValueError:
                    collector.drop_line(
                        "without a box",
                        f"{file.describe(index)}: {_PIXEL_BOX} is {reprlib.repr(text)}, expected 4 numbers between "
                        "commas",
                    )
                    continue
                category = self._get_category(file, index)
                if category is not None:
                    collector.add_box(
                        images[named[name]],
                        category,
                        (x1, y1, x2, y2),
                        number=index + 1,
                        source=file.name,
                        is_crowd=_is_crowd(feature),
                    )
        self._note_unused("that no feature names, not used")

    def _place_named(self, tables: Sequence[_Table], key: str, named: Mapping[str, Path]) -> None:
        rows: dict[Path, list[tuple[_Table, int]]] = {image: [] for image in sorted(set(named.values()))}
        for table in tables:
            for row, each in enumerate(table.objects):
                if each.image is None or each.image not in named:
                    self._drop_unnamed(each.name, key, each.image)
                else:
                    rows[named[each.image]].append((table, row))
        for image, some in rows.items():
            self._place_all(image, tables, some)
        self._note_unused("that no feature names, not used")

    # Images of the same name as a file

    def _find_paired(self, files: Sequence[_File]) -> dict[int, Path]:
        """Return the images that are named as a file, by its index."""
        matched = {
            folder: {
                i: image for i, file in enumerate(files) if (image := index.get(file.path.stem)) is not None
            }
            for folder, index in self._images.items()
        }
        matched = {folder: images for folder, images in matched.items() if images}
        if len(matched) > 1:
            raise AnnotationError(self._describe_several(list(matched)))
        return next(iter(matched.values()), {})

    def _place_paired(
        self, files: Sequence[_File], tables: Sequence[_Table], paired: Mapping[int, Path]
    ) -> None:
        rows: dict[int, list[tuple[_Table, int]]] = {}
        for table in tables:
            for row, each in enumerate(table.objects):
                rows.setdefault(each.file, []).append((table, row))
        for position, file in enumerate(files):
            if position in paired:
                self._place_all(paired[position], tables, rows.get(position, []))
            else:
                self._collector.note("label file", "without an image, not used", file.name)
        self._note_unused("without a label file, not used")

    def _place_all(self, image: Path, tables: Sequence[_Table], rows: Sequence[tuple[_Table, int]]) -> None:
        """Add an image and its objects; those outside are dropped."""
        georeference = self._read_georeference(image)
        if georeference is None:
            return
        index = self._collector.add_image(image, source=image.name)
        for table in tables:
            some = np.array([row for other, row in rows if other is table], dtype=np.int64)
            placed = self._add_boxes(index, table, _visible_boxes(table, some, georeference))
            for row in np.setdiff1d(some, placed).tolist():
                self._collector.drop_line(
                    "outside the image", f"{table.objects[row].name}: is outside {image.name}"
                )

    # Images that objects are in

    def _place_by_position(self, tables: Sequence[_Table]) -> None:
        """Add each object to every image that it is in."""
        folders = [folder for folder, index in self._images.items() if index.files]
        if len(folders) > 1:
            raise AnnotationError(self._describe_several(folders))
        is_placed = {id(table): np.zeros(len(table.objects), dtype=np.bool_) for table in tables}
        num_images, extent = 0, []
        for image in sorted(self._images[folders[0]].files):
            georeference = self._read_georeference(image, is_needed=False)
            if georeference is None:
                continue
            num_images += 1
            extent.append(georeference.to_wgs84(georeference.grid(3)))
            near = [(table, rows) for table in tables if len(rows := table.overlapping(georeference))]
            visible = [(table, _visible_boxes(table, rows, georeference)) for table, rows in near]
            if not any(boxes for _, boxes in visible):
                kind = (
                    "without objects, not used" if self._are_shared else "without objects, used as background"
                )
                self._collector.note("image", kind, image.name)
                if self._are_shared:
                    continue
            index = self._collector.add_image(image, source=image.name)
            for table, boxes in visible:
                is_placed[id(table)][self._add_boxes(index, table, boxes)] = True
        if not num_images:
            raise AnnotationError(f"{self._collector.path}: no image in {folders[0]} has a georeference")
        self._check_placed(tables, is_placed, np.concatenate(extent))

    def _check_placed(
        self,
        tables: Sequence[_Table],
        is_placed: Mapping[int, Bool[np.ndarray, " n"]],
        extent: Float[np.ndarray, "k 2"],
    ) -> None:
        """Count objects in none of the images.

        Raises:
            AnnotationError: if these are all, since their coordinates or the images are then others than expected.
        """
        lost = [(table, row) for table in tables for row in np.flatnonzero(~is_placed[id(table)]).tolist()]
        if lost and not any(flags.any() for flags in is_placed.values()):
            table, row = lost[0]
            low, high = np.nanmin(extent, axis=0), np.nanmax(extent, axis=0)
            raise AnnotationError(
                f"{self._collector.path}: none of the {len(lost)} objects is in an image: {table.objects[row].name} is "
                f"at {_show(table.envelopes[row])} in {describe_crs(table.crs)}, and the images are between longitudes "
                f"{low[0]:.6g} and {high[0]:.6g}, latitudes {low[1]:.6g} and {high[1]:.6g}"
            )
        for table, row in lost:
            self._collector.note("feature", "in none of the images, not used", table.objects[row].name)

    # Both

    def _read_georeference(self, image: Path, *, is_needed: bool = True) -> Georeference | None:
        """Read where an image is; None if it is left out, since its place cannot be read, or is not needed."""
        try:
            georeference = read_georeference(image, self._data.read)
        except ImageError as error:
            problem = str(error)
        else:
            if georeference is not None:
                return georeference
            problem = f"{image}: has no georeference"
            if not is_needed:
                self._collector.note("image", "without a georeference, not used", image.name)
                return None
        if self._data.on_bad_image == "refuse":
            self._collector.problems.append(problem)
        else:
            self._collector.note("image", LEFT_OUT, problem)
            self.left_out.append(problem)
        return None

    def _add_boxes(self, image: int, table: _Table, boxes: Mapping[int, "_Visible"]) -> list[int]:
        """Add visible boxes to an image, and return the rows of their objects."""
        for row, visible in boxes.items():
            each = table.objects[row]
            if visible.is_cut:
                self._collector.note(
                    "feature", "reaching over the border of an image, whose visible part is used", each.name
                )
            source = each.name.rpartition(", ")[0]
            self._collector.add_box(
                image, each.category, visible.box, number=each.number, source=source, is_crowd=each.is_crowd
            )
        return list(boxes)

    def _note_unused(self, kind: str) -> None:
        for index in self._images.values():
            self._collector.note_unused(index, kind=kind)

    def _describe_several(self, folders: Sequence[Path]) -> str:
        listed = " and ".join(str(folder) for folder in folders)
        return f"{self._collector.path}: the images may be those in {listed}; name one of these folders (--images)"


@dataclass(frozen=True, kw_only=True)
class _Visible:
    """What is visible of an object in an image.

    Attributes:
        box: around it, xyxy, image frame.
        is_cut: whether the object reaches over the border, by more than rounded coordinates do.
    """

    box: tuple[float, float, float, float]
    is_cut: bool


def _visible_boxes(
    table: _Table, rows: Int[np.ndarray, " k"], georeference: Georeference
) -> dict[int, _Visible]:
    """Return what is visible of objects in an image, by row, without those of which less than a pixel is."""
    rings = [ring for row in rows.tolist() for ring in table.objects[row].rings]
    counts = [len(table.objects[row].rings) for row in rows.tolist()]
    if not rings:
        return {}
    points = georeference.to_pixels(transform_points(np.concatenate(rings), table.crs, georeference.crs))
    parts = iter(np.split(points, np.cumsum([len(ring) for ring in rings])[:-1]))
    boxes = {}
    for row, count in zip(rows.tolist(), counts, strict=True):
        visible = _find_visible([next(parts) for _ in range(count)], georeference.sides)
        if visible is not None:
            boxes[row] = visible
    return boxes


def _find_visible(parts: Sequence[Float[np.ndarray, "n 2"]], sides: Sides) -> _Visible | None:
    """Return what is visible of polygons in an image; None if less than a pixel of what reaches over its border is."""
    kept = []
    is_cut = False
    for part in parts:
        if not np.isfinite(part).all():
            continue  # far from the image, where its CRS ends
        low, high = part.min(axis=0), part.max(axis=0)
        is_over = bool((low < 0).any() or (high > sides).any())
        is_cut |= bool((low < -_TOLERANCE).any() or (high > np.array(sides) + _TOLERANCE).any())
        inside = clip_to_window(part, (0.0, 0.0, *sides)) if is_over else part
        if len(inside):
            kept.append(inside)
    if not kept:
        return None
    box = _envelope(kept)
    if is_cut and min(box[2] - box[0], box[3] - box[1]) < _MIN_VISIBLE:
        return None
    return _Visible(box=box, is_cut=is_cut)


def _envelope(rings: Sequence[Float[np.ndarray, "n 2"]]) -> tuple[float, float, float, float]:
    """Return the box around polygons, xyxy."""
    points = np.concatenate(rings)
    (x1, y1), (x2, y2) = points.min(axis=0).tolist(), points.max(axis=0).tolist()
    return x1, y1, x2, y2


def _exterior_rings(geometry: _Geometry | None) -> list[np.ndarray] | None:
    """Return the exterior rings of all polygons of a geometry, without heights; None if it has points or lines alone.

    Raises:
        TypeError, ValueError, LookupError, OverflowError: if its coordinates are not those of polygons.
    """
    if geometry is None:
        return []
    if geometry.type == "GeometryCollection":
        parts = [_exterior_rings(each) for each in geometry.geometries or []]
        rings = [ring for part in parts if part is not None for ring in part]
        return None if parts and all(part is None for part in parts) else rings
    if geometry.type not in ("Polygon", "MultiPolygon"):
        return None
    polygons = geometry.coordinates or []
    if geometry.type == "Polygon":
        polygons = [polygons]
    return [_to_ring(polygon[0]) for polygon in polygons if polygon]


def _to_ring(positions: Any) -> np.ndarray:
    ring = np.array([position[:2] for position in positions], dtype=np.float64)
    if ring.ndim != 2 or ring.shape[1] != 2:
        raise ValueError("positions have two numbers")
    return ring[:-1] if len(ring) > 1 and (ring[0] == ring[-1]).all() else ring


def _properties(feature: _Feature) -> Mapping[str, Any]:
    return feature.properties or {}


def _image_name(feature: _Feature, key: str) -> str | None:
    """Return the name of the image that a feature names, without folders; None if it names none."""
    value = _properties(feature).get(key)
    if isinstance(value, str) and value:
        return value.replace("\\", "/").rsplit("/", 1)[-1]
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else None


def _is_crowd(feature: _Feature) -> bool:
    return flag_of(str(_properties(feature).get("iscrowd", "")))


def _show(box: Float[np.ndarray, "4"]) -> str:
    return ", ".join(f"{value:.6g}" for value in box.tolist())
