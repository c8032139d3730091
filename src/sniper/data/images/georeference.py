"""Where the pixels of an image are on the Earth: its coordinate reference system (CRS), read with rasterio.

Pixel coordinates are those of boxes: continuous, in the oriented image, with (0, 0) at the outer corner of the first
pixel. GDAL has the same origin, also for files that refer to the centres of pixels (PixelIsPoint). Coordinates in a CRS
are in the order x, y, which is longitude, latitude in a geographic one, whatever its definition says.
"""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from sniper.data.images.encoded import TIFF_STARTS, EncodedImage, naming_errors
from sniper.data.images.files import read_orientation
from sniper.data.images.tiff import SIDE_SWAPPING, has_rasterio, open_tiff, read_tiff_header
from sniper.data.spec import ReadSpec
from sniper.errors import ImageError
from sniper.geometry.boxes import Sides
from sniper.remote import to_path

WGS84 = "EPSG:4326"
"""The CRS of GeoJSON: longitude and latitude in degrees."""

_DRIVERS = {
    **dict.fromkeys(TIFF_STARTS, "GTiff"),
    b"\0\0\0\x0cjP  ": "JP2OpenJPEG",
    b"\xff\x4f\xff\x51": "JP2OpenJPEG",
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG": "PNG",
}
"""GDAL's drivers by the first bytes of a file."""

_HAVE_CRS_BESIDE = ("JPEG", "PNG")  # whose CRS is in a file of GDAL's beside them, or nowhere
_MIRRORED_X, _MIRRORED_Y = (2, 3, 7, 8), (3, 4, 6, 7)  # orientations, once the sides are exchanged


@dataclass(frozen=True, kw_only=True, eq=False)
class Georeference:
    """The CRS of an image, and where its pixels are in it.

    Attributes:
        crs: of rasterio.
        stored: sides of the image as stored.
        orientation: EXIF orientation that is applied to the pixels as stored, which the georeference refers to.
        transform: six numbers of the affine transform from pixels as stored to the CRS (`a`, `b`, `c`, `d`, `e`, `f` of
            rasterio); None where there are ground control points instead.
        gcps: ground control points of rasterio; empty where there is a transform.
    """

    crs: Any
    stored: Sides
    orientation: int = 1
    transform: tuple[float, float, float, float, float, float] | None
    gcps: tuple[Any, ...] = ()

    @property
    def sides(self) -> Sides:
        """Sides of the oriented image."""
        if self.orientation in SIDE_SWAPPING:
            return Sides(self.stored.height, self.stored.width)
        return self.stored

    @cached_property
    def wkt(self) -> str:
        """The CRS as text."""
        return str(self.crs.to_wkt())

    @property
    def name(self) -> str:
        """The CRS for messages: its EPSG code, or else its name."""
        return describe_crs(self.crs)

    def to_crs(self, points: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, "n 2"]:
        """Transform pixels to the CRS.

        Args:
            points: (n, 2) xy, image frame. May be empty.

        Returns:
            (n, 2) xy in the CRS; NaN where a transform by ground control points fails.
        """
        columns, rows = self._to_stored(points).T
        if self.transform is None:
            return self._transform_by_gcps(columns, rows, to_crs=True)
        a, b, c, d, e, f = self.transform
        return np.stack([a * columns + b * rows + c, d * columns + e * rows + f], axis=1)

    def to_pixels(self, points: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, "n 2"]:
        """Transform coordinates in the CRS to pixels, the inverse of `to_crs`.

        Args:
            points: (n, 2) xy in the CRS. May be empty. In a geographic CRS, longitudes may be a turn off.

        Returns:
            (n, 2) xy, image frame, perhaps outside the image; NaN for points that are not finite.
        """
        xs, ys = points.T
        if self.crs.is_geographic:
            turn = 2 * math.pi / self.crs.units_factor[1]
            xs = self._centre[0] + (xs - self._centre[0] + turn / 2) % turn - turn / 2
        if self.transform is None:
            return self._to_oriented(self._transform_by_gcps(xs, ys, to_crs=False))
        a, b, c, d, e, f = self.transform
        determinant = a * e - b * d
        x, y = xs - c, ys - f
        stored = np.stack([(e * x - b * y) / determinant, (a * y - d * x) / determinant], axis=1)
        return self._to_oriented(stored)

    def to_wgs84(self, points: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, "n 2"]:
        """Transform pixels to longitude and latitude, degrees in WGS 84.

        Args:
            points: (n, 2) xy, image frame. May be empty.

        Returns:
            (n, 2) longitude, latitude; NaN for points that are not on the Earth, such as the corners of a full disc.
        """
        return transform_points(self.to_crs(points), self.crs, WGS84)

    def grid(self, number: int) -> Float[np.ndarray, "n 2"]:
        """Return a grid of points over the image, with its corners.

        Args:
            number: of points along a side, at least 2.

        Returns:
            (number ** 2, 2) xy, image frame.
        """
        width, height = self.sides
        xs, ys = np.meshgrid(np.linspace(0, width, number), np.linspace(0, height, number))
        return np.stack([xs.ravel(), ys.ravel()], axis=1)

    @cached_property
    def _centre(self) -> Float[np.ndarray, "2"]:
        width, height = self.sides
        return self.to_crs(np.array([[width / 2, height / 2]]))[0]

    def _to_stored(self, points: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, "n 2"]:
        xs, ys = points.T
        if self.orientation in SIDE_SWAPPING:
            xs, ys = ys, xs
        if self.orientation in _MIRRORED_X:
            xs = self.stored.width - xs
        if self.orientation in _MIRRORED_Y:
            ys = self.stored.height - ys
        return np.stack([xs, ys], axis=1)

    def _to_oriented(self, points: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, "n 2"]:
        xs, ys = points.T
        if self.orientation in _MIRRORED_X:
            xs = self.stored.width - xs
        if self.orientation in _MIRRORED_Y:
            ys = self.stored.height - ys
        if self.orientation in SIDE_SWAPPING:
            xs, ys = ys, xs
        return np.stack([xs, ys], axis=1)

    def _transform_by_gcps(self, xs: np.ndarray, ys: np.ndarray, *, to_crs: bool) -> Float[np.ndarray, "n 2"]:
        """Transform by thin plate splines, which pass through all ground control points."""
        from rasterio.transform import GCPTransformer

        points = np.full((len(xs), 2), np.nan)
        is_finite = np.isfinite(xs) & np.isfinite(ys)
        if is_finite.any():
            with GCPTransformer(list(self.gcps), tps=True) as transformer:
                if to_crs:
                    pairs = transformer.xy(ys[is_finite], xs[is_finite], offset="ul")
                else:
                    pairs = transformer.rowcol(xs[is_finite], ys[is_finite], op=np.positive)[::-1]
            points[is_finite] = np.stack(pairs, axis=1)
        return points


def read_georeference(path: Path, read: ReadSpec = ReadSpec()) -> Georeference | None:
    """Read where the pixels of an image are on the Earth.

    Args:
        path: of a TIFF or JPEG 2000, or of a JPEG or PNG with a file of GDAL's beside it (`a.png.aux.xml`).
        read: how image files become pixels; georeferences refer to pixels as stored, boxes to the oriented image.

    Returns:
        None for an image without any georeference.

    Raises:
        ImageError: if its georeference is incomplete, has no transformation to WGS 84, or cannot be read here; what to
            do is in the message.
    """
    name = EncodedImage(path).name
    with naming_errors(name), EncodedImage(path).open() as file:
        start = file.read(8)
    driver = next((driver for first, driver in _DRIVERS.items() if start.startswith(first)), None)
    if driver is None or (driver in _HAVE_CRS_BESIDE and not to_path(f"{path}.aux.xml").is_file()):
        return None
    if not has_rasterio():
        header = read_tiff_header(EncodedImage(path))
        if driver == "JP2OpenJPEG" or (header is not None and not header.has_crs):
            return None
        raise ImageError(f"{name}: its georeference is read by rasterio: pip install 'sniper-det[tiff]'")
    with naming_errors(name), _opened(path, driver) as file:
        georeference = _georeference_of(file, name, read_orientation(path, read))
        return None if georeference is None else _check(georeference, name)


def transform_points(points: Float[np.ndarray, "n 2"], source: Any, target: Any) -> Float[np.ndarray, "n 2"]:
    """Transform coordinates between two CRSs; heights are 0.

    Args:
        points: (n, 2) xy in `source`, perhaps not finite. May be empty.
        source: CRS, or what rasterio makes one of.
        target: CRS, or what rasterio makes one of.

    Returns:
        (n, 2) xy in `target`; NaN where there is none.
    """
    from rasterio._err import CPLE_BaseError
    from rasterio.warp import transform

    moved = np.full((len(points), 2), np.nan)
    todo = [np.flatnonzero(np.isfinite(points).all(axis=1))]
    while todo:
        rows = todo.pop()
        if not len(rows):
            continue
        try:
            pairs = transform(source, target, points[rows, 0], points[rows, 1])
        except CPLE_BaseError:  # GDAL fails for all points if it does for one
            if len(rows) > 1:
                todo += np.array_split(rows, 2)
            continue
        moved[rows] = np.stack(pairs, axis=1)
    moved[~np.isfinite(moved).all(axis=1)] = np.nan
    return moved


def describe_crs(crs: Any) -> str:
    """Return the EPSG code of a CRS of rasterio, or else its name."""
    code = crs.to_epsg()
    if code is not None:
        return f"EPSG:{code}"
    quoted = crs.to_wkt().split('"')
    return quoted[1] if len(quoted) > 1 else str(crs)


@contextmanager
def _opened(path: Path, driver: str) -> Iterator[Any]:
    import rasterio

    if driver == "GTiff":
        with open_tiff(EncodedImage(path)) as file:
            yield file
        return
    with warnings.catch_warnings(), rasterio.Env():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        data = EncodedImage(path).local_data
        if isinstance(data, bytes):
            with rasterio.MemoryFile(data) as memory, memory.open(driver=driver) as file:
                yield file
            return
        with rasterio.open(data, driver=driver) as file:
            yield file


def _georeference_of(file: Any, name: str, orientation: int) -> Georeference | None:
    """Return the georeference of a file that is open in rasterio.

    Raises:
        ImageError: if it has only a part of what is needed.
    """
    stored = Sides(file.width, file.height)
    gcps, gcps_crs = file.gcps
    if not file.transform.is_identity:
        if file.crs is None:
            raise ImageError(
                f"{name}: has a geotransform, but no CRS: assign it with rio edit-info --crs EPSG:CODE FILE"
            )
        if file.transform.is_degenerate:
            raise ImageError(f"{name}: its geotransform maps all pixels to one line ({_numbers(file)})")
        return Georeference(
            crs=file.crs, stored=stored, orientation=orientation, transform=tuple(file.transform)[:6]
        )
    if gcps:
        if gcps_crs is None:
            raise ImageError(f"{name}: has ground control points, but no CRS")
        if len(gcps) < 3:
            raise ImageError(f"{name}: has {len(gcps)} ground control points, expected at least 3")
        return Georeference(
            crs=gcps_crs, stored=stored, orientation=orientation, transform=None, gcps=tuple(gcps)
        )
    if file.rpcs is not None:
        raise ImageError(
            f"{name}: is located by RPCs, whose positions depend on the height of the terrain: orthorectify it with "
            "gdalwarp -rpc, and use the result"
        )
    if file.crs is not None:
        raise ImageError(f"{name}: has a CRS ({describe_crs(file.crs)}), but no geotransform")
    return None


def _check(georeference: Georeference, name: str) -> Georeference:
    """Check that some of the image is on the Earth."""
    if np.isfinite(georeference.to_wgs84(georeference.grid(3))).any():
        return georeference
    raise ImageError(
        f"{name}: its CRS ({georeference.name}) has no transformation to WGS 84 at this place, as a local one has not"
    )


def _numbers(file: Any) -> str:
    return ", ".join(f"{number:g}" for number in tuple(file.transform)[:6])
