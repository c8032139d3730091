"""Detections of georeferenced images, as GeoJSON in WGS 84 and as GeoPackage in the CRS of each image."""

import json
import math
import os
import sqlite3
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import numpy as np
from jaxtyping import Float

from sniper.data.images.georeference import Georeference, read_georeference
from sniper.data.spec import ReadSpec
from sniper.errors import ConfigError, ImageError, count_and_list, counted
from sniper.files import atomic_path, atomic_write, expand_path, open_regular
from sniper.geometry import Detections
from sniper.geometry.polygons import clip_polygon
from sniper.inference.results import ImageToSearch

_START = b'{"type": "FeatureCollection", "generator": "sniper predict", "features": ['
_DECIMALS = 8  # of a degree: 1 mm
_TURN = 360.0  # degrees
_LAYER = "detections"
_FIELDS = ("class", "score", "image")
_FEATURES_AT_ONCE = 10_000  # that are kept for a layer before they are written
_GDAL_POLYGON, _GDAL_MULTIPOLYGON = 3, 6  # types of geometries in well-known binary


_Shape = list[list[Float[np.ndarray, "_ 2"]]]
"""The polygons of a detection, of points x, y: each has an exterior and its holes, without a repeated point."""


@dataclass(frozen=True, kw_only=True)
class GeoreferencedImages:
    """Which images of a search have a georeference.

    Attributes:
        indices: of these images.
        layers: names of the layers of a GeoPackage, one for each CRS, by the CRS as text.
        warnings: about images whose georeference cannot be used.
    """

    indices: Sequence[int]
    layers: Mapping[str, str]
    warnings: tuple[str, ...]

    @classmethod
    def find(cls, images: Sequence[ImageToSearch], read: ReadSpec) -> "GeoreferencedImages":
        """Read the georeferences of images, which takes their headers only.

        Args:
            images: the images; those that cannot be read are left to the search.
            read: how image files become pixels.
        """
        indices: list[int] = []
        codes: dict[str, int | None] = {}
        problems: list[str] = []
        for index, image in enumerate(images):
            try:
                georeference = read_georeference(image.path, read) if image.path.is_file() else None
            except ImageError as error:
                problems.append(str(error))
                continue
            if georeference is not None:
                indices.append(index)
                if georeference.wkt not in codes:
                    codes[georeference.wkt] = georeference.crs.to_epsg()
        warnings: tuple[str, ...] = ()
        if problems:
            count, listed = counted(len(problems), "image has", "images have"), count_and_list(problems)
            warnings = (f"{count} no usable georeference, and no detections in GeoJSON ({listed})",)
        return cls(indices=indices, layers=_name_layers(codes), warnings=warnings)


def to_geojson(
    detections: Detections, image: str | os.PathLike[str], *, read: ReadSpec = ReadSpec()
) -> dict[str, Any]:
    """Convert detections of a georeferenced image to GeoJSON (RFC 7946).

    Each box is the polygon of its four corners, in longitude and latitude of WGS 84, and each mask the polygons of its
    outlines. It has the properties `class`, `score` and `image`.

    Args:
        detections: as from `Detector.predict`; all of them are converted, see `Detections.confident`.
        image: path of the image.
        read: how the image was read: `detector.data.read`.

    Returns:
        A FeatureCollection, as the module json writes it.

    Raises:
        ImageError: if the image cannot be read, or has no georeference.

    Example:
        >>> detections = detector.predict("ortho.tif").confident()  # doctest: +SKIP
        >>> Path("ortho.geojson").write_text(json.dumps(to_geojson(detections, "ortho.tif")))  # doctest: +SKIP
    """
    path = expand_path(image)
    georeference = read_georeference(path, read)
    if georeference is None:
        raise ImageError(f"{path}: has no georeference")
    features = _to_features(detections, georeference, image=os.fspath(image))
    return {"type": "FeatureCollection", "features": [each for each in features if each is not None]}


def check_replaceable(geojson: Path, gpkg: Path | None) -> None:
    """Check that files beside the results may be replaced: that `sniper predict` has written them.

    Args:
        geojson: GeoJSON file, which may be absent.
        gpkg: GeoPackage, which may be absent; None if none is to be written.

    Raises:
        ConfigError: if not, or if a GeoPackage cannot be written.
    """
    if gpkg is not None and find_spec("pyogrio") is None:
        raise ConfigError("--gpkg requires pyogrio: pip install 'sniper-det[geo]'")
    for path, is_ours in ((geojson, _is_our_geojson), (gpkg, _is_our_gpkg)):
        if path is not None and path.exists() and not is_ours(path):
            raise ConfigError(
                f"{path}: was not written by sniper predict, and would be replaced; choose another name (-o)"
            )


def remove_earlier(geojson: Path) -> None:
    """Remove the GeoJSON of an earlier search, where the present one has none."""
    if geojson.is_file() and _is_our_geojson(geojson):
        geojson.unlink()


def write_georeferenced(
    found: GeoreferencedImages,
    images: Sequence[ImageToSearch],
    read_detections: Callable[[int], Detections],
    *,
    read: ReadSpec,
    geojson: Path,
    gpkg: Path | None,
) -> tuple[str, ...]:
    """Write the detections of all georeferenced images: each file whole or not at all, image after image.

    Args:
        found: which images these are.
        images: the images of the search.
        read_detections: returns the detections of an image, by its index.
        read: how image files become pixels.
        geojson: the GeoJSON file to write.
        gpkg: the GeoPackage to write, if any.

    Returns:
        Warnings: about detections that are not on the Earth, and images whose georeference is gone.
    """
    lost: list[str] = []
    with ExitStack() as stack:
        collection = _GeoJsonWriter(stack.enter_context(atomic_write(geojson)))
        package = None
        if gpkg is not None:
            package = _GeoPackageWriter(stack.enter_context(atomic_path(gpkg)), found.layers)
        for index in found.indices:
            image = images[index]
            name = _name_of(image)
            detections = read_detections(index)
            try:
                georeference = read_georeference(image.path, read)
            except ImageError as error:
                georeference = None
                lost.append(str(error))
            if georeference is None or georeference.wkt not in found.layers:  # the file has changed meanwhile
                continue
            features = list(_to_features(detections, georeference, image=name))
            rows = [row for row, feature in enumerate(features) if feature is not None]
            if len(rows) < len(features):
                lost.append(f"{image.path}: {len(features) - len(rows)} of {len(features)} detections")
            collection.write(feature for feature in features if feature is not None)
            if package is not None:
                package.write(georeference, detections[np.array(rows, dtype=np.int64)], name)
        collection.finish()
        if package is not None:
            package.finish()
    if not lost:
        return ()
    return (f"{geojson}: lacks detections without a place on the Earth ({count_and_list(lost)})",)


def _name_of(image: ImageToSearch) -> str:
    """Return the name of an image as the results have it, or else as its data set has it."""
    if image.file_name is not None:
        return image.file_name
    return str(image.path) if image.record is None else image.record.file_name


def _name_layers(codes: Mapping[str, int | None]) -> dict[str, str]:
    """Return the name of a layer for each CRS: by its EPSG code, if there are several, or else its number."""
    if len(codes) == 1:
        return dict.fromkeys(codes, _LAYER)
    names: dict[str, str] = {}
    for number, (wkt, code) in enumerate(codes.items(), start=1):
        name = f"{_LAYER}_{number}" if code is None else f"{_LAYER}_epsg_{code}"
        names[wkt] = f"{name}_{number}" if name in names.values() else name
    return names


# Features


def _to_features(
    detections: Detections, georeference: Georeference, *, image: str
) -> Iterator[dict[str, Any] | None]:
    """Yield a feature for each detection; None for one with a corner that is not on the Earth."""
    shapes = _transform(_shapes_of(detections), georeference.to_wgs84)
    for shape, name, score in zip(shapes, _names_of(detections), detections.scores.tolist(), strict=True):
        if not all(np.isfinite(ring).all() for polygon in shape for ring in polygon):
            yield None
            continue
        properties = {"class": name, "score": round(score, 5), "image": image}
        yield {"type": "Feature", "geometry": _to_geometry(shape), "properties": properties}


def _names_of(detections: Detections) -> tuple[str, ...]:
    """Return the class name of each detection, or its label where names are unknown."""
    return detections.names if detections.class_names else tuple(map(str, detections.labels.tolist()))


def _shapes_of(detections: Detections) -> list[_Shape]:
    """Return the outlines of masks, or the corners of boxes in order, image frame."""
    x1, y1, x2, y2 = detections.boxes.T
    corners = np.stack([x1, y1, x1, y2, x2, y2, x2, y1], axis=1).reshape(-1, 4, 2)
    masks = detections.masks
    if masks is None:
        return [[[ring]] for ring in corners]
    return [
        [[ring[:-1] for ring in part] for part in masks.outlines(row)] or [[ring]]
        for row, ring in enumerate(corners)
    ]


def _transform(
    shapes: Sequence[_Shape], transform: Callable[[Float[np.ndarray, "n 2"]], Float[np.ndarray, "n 2"]]
) -> Iterator[_Shape]:
    """Transform the points of all shapes at once."""
    rings = [ring for shape in shapes for polygon in shape for ring in polygon]
    points = transform(np.concatenate([np.zeros((0, 2)), *rings]))
    moved = iter(np.split(points, np.cumsum([len(ring) for ring in rings])[:-1]))
    return ([[next(moved) for _ in polygon] for polygon in shape] for shape in shapes)


def _to_geometry(shape: _Shape) -> dict[str, Any]:
    """Return polygons of longitudes and latitudes as GeoJSON, cut where they cross the antimeridian."""
    polygons = [
        [_to_coordinates(ring) for ring in part]
        for exterior, *holes in shape
        for part in _cut(exterior, holes)
    ]
    if len(polygons) == 1:
        return {"type": "Polygon", "coordinates": polygons[0]}
    return {"type": "MultiPolygon", "coordinates": polygons}


def _cut(
    ring: Float[np.ndarray, "_ 2"], holes: Sequence[Float[np.ndarray, "_ 2"]]
) -> list[list[Float[np.ndarray, "_ 2"]]]:
    """Cut a polygon at the antimeridian (RFC 7946, section 3.1.9); exteriors are anticlockwise, holes clockwise.

    One around a pole is extended to the pole along the meridian of its first corner.
    """
    closed = np.concatenate([ring, ring[:1]]).round(_DECIMALS)  # first, or a part might round to nothing
    closed[:, 0] = np.unwrap(closed[:, 0], period=_TURN)
    winding = closed[-1, 0] - closed[0, 0]
    points = closed[:-1]
    if abs(winding) > _TURN / 2:
        pole = math.copysign(90.0, points[:, 1].sum())
        points = np.concatenate([closed, [[closed[-1, 0], pole], [closed[0, 0], pole]]])
    points = _turned(points, is_clockwise=False)
    points[:, 0] -= _TURN * math.floor((points[:, 0].min() + _TURN / 2) / _TURN)
    rings = [points, *(_beside(_turned(hole, is_clockwise=True), points) for hole in holes)]
    limit = _TURN / 2
    if points[:, 0].max() <= limit:
        return [rings]
    west = [clip_polygon(each, axis=0, limit=limit, keeps=-1) for each in rings]
    east = [clip_polygon(each, axis=0, limit=limit, keeps=1) - [_TURN, 0] for each in rings]
    return [[each for each in part if len(each)] for part in (west, east)]


def _beside(hole: Float[np.ndarray, "n 2"], exterior: Float[np.ndarray, "_ 2"]) -> Float[np.ndarray, "n 2"]:
    """Return a hole with the longitudes that are inside its exterior."""
    moved = hole.round(_DECIMALS)
    moved[:, 0] = np.unwrap(moved[:, 0], period=_TURN)
    moved[:, 0] += _TURN * math.ceil((exterior[:, 0].min() - moved[:, 0].min()) / _TURN)
    return moved


def _turned(ring: Float[np.ndarray, "n 2"], *, is_clockwise: bool) -> Float[np.ndarray, "n 2"]:
    """Return a copy of a ring in the direction that is asked for, with y upwards."""
    xs, ys = ring.T
    has_direction = ((xs * np.roll(ys, -1) - np.roll(xs, -1) * ys).sum() < 0) == is_clockwise
    return (ring if has_direction else ring[::-1]).copy()


def _to_coordinates(points: Float[np.ndarray, "n 2"]) -> list[list[float]]:
    rounded = points.round(_DECIMALS).tolist()
    return [*rounded, rounded[0]]


# Files


class _GeoJsonWriter:
    """Writes the features of a collection to an open file, one a line."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._separator = b"\n"
        file.write(_START)

    def write(self, features: Iterator[dict[str, Any]]) -> None:
        for feature in features:
            self._file.write(self._separator + json.dumps(feature).encode())
            self._separator = b",\n"

    def finish(self) -> None:
        self._file.write(b"\n]}\n")


@dataclass(eq=False)
class _GeoPackageWriter:
    """Writes polygons to the layers of a GeoPackage, many at a time."""

    path: Path
    layers: Mapping[str, str]
    _kept: dict[str, list[tuple[bytes, str, float, str]]] = field(default_factory=dict)
    _has_masks: bool = False
    _started: set[str] = field(default_factory=set)

    def write(self, georeference: Georeference, detections: Detections, image: str) -> None:
        self._has_masks |= detections.masks is not None
        shapes = _transform(_shapes_of(detections), georeference.to_crs)
        kept = self._kept.setdefault(georeference.wkt, [])
        for shape, name, score in zip(shapes, _names_of(detections), detections.scores.tolist(), strict=True):
            kept.append((_to_wkb(shape, is_multiple=self._has_masks), name, round(score, 5), image))
        if len(kept) >= _FEATURES_AT_ONCE:
            self._flush(georeference.wkt)

    def finish(self) -> None:
        """Write what is left, and layers without detections."""
        for wkt in self.layers:
            if wkt not in self._started or self._kept.get(wkt):
                self._flush(wkt)

    def _flush(self, wkt: str) -> None:
        from pyogrio.raw import write

        kept = self._kept.pop(wkt, [])
        geometries, classes, scores, images = zip(*kept, strict=True) if kept else ((), (), (), ())
        write(
            self.path,
            np.array(geometries, dtype=object),
            [
                np.array(classes, dtype=object),
                np.array(scores, dtype=np.float64),
                np.array(images, dtype=object),
            ],
            list(_FIELDS),
            layer=self.layers[wkt],
            driver="GPKG",
            geometry_type="MultiPolygon" if self._has_masks else "Polygon",
            crs=wkt,
            append=wkt in self._started,
        )
        self._started.add(wkt)


def _to_wkb(shape: _Shape, *, is_multiple: bool) -> bytes:
    """Return polygons as well-known binary, with exteriors anticlockwise: several, or the only one."""
    polygons = b"".join(map(_polygon_to_wkb, shape))
    return struct.pack("<BII", 1, _GDAL_MULTIPOLYGON, len(shape)) + polygons if is_multiple else polygons


def _polygon_to_wkb(polygon: Sequence[Float[np.ndarray, "_ 2"]]) -> bytes:
    parts = [struct.pack("<BII", 1, _GDAL_POLYGON, len(polygon))]
    for index, ring in enumerate(polygon):
        points = _turned(ring, is_clockwise=index > 0)
        parts.append(struct.pack("<I", len(points) + 1))
        parts.append(np.concatenate([points, points[:1]]).astype("<f8").tobytes())
    return b"".join(parts)


def _is_our_geojson(path: Path) -> bool:
    with open_regular(path) as file:
        return file.read(len(_START)) == _START


def _is_our_gpkg(path: Path) -> bool:
    """Check whether a GeoPackage has layers of detections alone."""
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as file:
            names = [name for (name,) in file.execute("SELECT table_name FROM gpkg_contents")]
    except sqlite3.Error:
        return False
    return all(name.startswith(_LAYER) for name in names)
