"""Decode image files of every format, depth and orientation to 8-bit RGB, whole or in windows.

A file that cannot be decoded correctly is refused by name: one that is truncated, has more than 8 bits a channel
without a configured intensity range, or has more pixels than the limit.
"""

import os
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from threading import Lock, get_ident
from typing import Any, BinaryIO, Protocol, runtime_checkable

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageOps

from sniper.data.spec import ReadSpec
from sniper.errors import ImageError
from sniper.geometry.boxes import Sides

SUFFIXES = (
    ".jpg",
    ".jpeg",
    ".png",
    ".webp",
    ".tif",
    ".tiff",
    ".bmp",
    ".gif",
    ".ppm",
    ".pgm",
    ".jp2",
    ".avif",
)
"""The suffixes by which image files are recognized in a folder."""

_DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
_BITS_PER_SAMPLE = 258  # TIFF tag
_SIDE_SWAPPING = range(5, 9)  # EXIF orientations that exchange width and height
_INVERSE_ORIENTATION = {6: 8, 8: 6}  # all others are their own inverse
_WINDOWED_PIXELS = 50_000_000  # a TIFF of more is read in windows
_MAX_JPEG_REDUCTION = 8
_MAX_OPEN_TIFFS = 8
_GDAL_CACHE = 256_000_000  # bytes of decoded tiles that GDAL keeps

_TIFF_SUFFIXES = (".tif", ".tiff")
_PILLOW_LIMIT_LOCK = Lock()
_UNREADABLE = (
    OSError,
    ValueError,
    SyntaxError,
    TypeError,
    LookupError,
    EOFError,
    RuntimeError,
    ArithmeticError,
    struct.error,
)
_DEFAULT = ReadSpec()

cv2.setNumThreads(1)  # loader processes run in parallel; threads within them would only compete


@runtime_checkable
class ImageReader(Protocol):
    """An image whose pixels are read on demand, window by window."""

    @property
    def width(self) -> int:
        """Pixels, in the orientation that the annotations refer to."""

    @property
    def height(self) -> int:
        """Pixels, in the orientation that the annotations refer to."""

    def largest_reduction(self, limit: int) -> int:
        """Return the largest power of two, at most `limit`, by which the image can be decoded smaller."""

    def read(self, window: tuple[int, int, int, int], *, reduction: int = 1) -> UInt8[np.ndarray, "h w 3"]:
        """Read the pixels of a window.

        Args:
            window: xyxy, image frame, inside the image; x1 and y1 are multiples of the reduction.
            reduction: average squares of this many pixels a side into one; the last of a row or column may be smaller.

        Raises:
            ImageError: if the pixels cannot be read.
        """


class DecodedImageReader:
    """An image that is decoded whole on the first read, and kept for the next window.

    Args:
        path: of the file.
        spec: how image files become pixels.
        sides: of the image, pixels; read from the header if None.
    """

    def __init__(self, path: Path, spec: ReadSpec, *, sides: Sides | None = None) -> None:
        self._path, self._spec = path, spec
        self._sides = read_image_sides(path, spec) if sides is None else sides
        self.width, self.height = self._sides
        self._decoded: dict[int, np.ndarray] = {}
        self._lock = Lock()

    def largest_reduction(self, limit: int) -> int:
        """See `ImageReader`: JPEG files can be decoded at a half, a quarter and an eighth of their sides."""
        if limit < 2:
            return 1
        with _open_file(self._path) as image:
            is_plain = image.format == "JPEG" and image.mode in ("RGB", "L")
            if is_plain and _remaining_orientation(image, self._spec) == 1:
                return min(limit, _MAX_JPEG_REDUCTION)
        return 1

    def read(self, window: tuple[int, int, int, int], *, reduction: int = 1) -> UInt8[np.ndarray, "h w 3"]:
        """See `ImageReader`; threads that read at the same time share one decode."""
        with self._lock:
            if reduction not in self._decoded:
                self._decoded[reduction] = load_image(
                    self._path, self._spec, reduction=reduction, sides=self._sides
                )
            pixels = self._decoded[reduction]
        x1, y1, x2, y2 = window
        return pixels[y1 // reduction : -(-y2 // reduction), x1 // reduction : -(-x2 // reduction)]


class ArrayImageReader:
    """An image in memory.

    Args:
        pixels: (h, w, 3) uint8 RGB.
    """

    def __init__(self, pixels: UInt8[np.ndarray, "h w 3"]) -> None:
        self._pixels = pixels
        self.height, self.width = pixels.shape[:2]

    def largest_reduction(self, limit: int) -> int:
        """See `ImageReader`; always 1."""
        return 1

    def read(self, window: tuple[int, int, int, int], *, reduction: int = 1) -> UInt8[np.ndarray, "h w 3"]:
        """See `ImageReader`."""
        if reduction != 1:
            raise ValueError(f"an image in memory is not read smaller: reduction must be 1, not {reduction}")
        x1, y1, x2, y2 = window
        return self._pixels[y1:y2, x1:x2]


class WindowedTiffReader:
    """A large TIFF of which only the requested window is read, reduced ones from its overviews if it has any.

    Args:
        path: of the file.
        spec: how image files become pixels.
    """

    def __init__(self, path: Path, spec: ReadSpec) -> None:
        self._path, self._spec = path, spec
        with _naming_file(path), _open_tiff(path) as file:
            self.width, self.height = file.width, file.height
            _check_layout(path, file)
            dtypes = {np.dtype(name) for name in file.dtypes}
            if file.count not in (1, 3, 4) or file.colorinterp[0].name == "palette":
                raise ImageError(
                    f"{path}: has {file.count} bands ({file.colorinterp[0].name}), "
                    "expected grey, RGB, or RGB and alpha"
                )
            if dtypes != {np.dtype(np.uint8)} and spec.intensity_range is None:
                raise _range_required(path, " and ".join(sorted(map(str, dtypes))))

    def largest_reduction(self, limit: int) -> int:
        """See `ImageReader`; always the limit."""
        return limit

    def read(self, window: tuple[int, int, int, int], *, reduction: int = 1) -> UInt8[np.ndarray, "h w 3"]:
        """See `ImageReader`."""
        from rasterio.enums import Resampling
        from rasterio.windows import Window

        x1, y1, x2, y2 = window
        width, height = max((x2 - x1) // reduction, 1), max((y2 - y1) // reduction, 1)
        with _naming_file(self._path), _open_tiff(self._path) as file:
            bands = file.read(
                [1, 2, 3] if file.count >= 3 else [1],
                window=Window(x1, y1, min(width * reduction, x2 - x1), min(height * reduction, y2 - y1)),
                out_shape=(min(file.count, 3), height, width),
                resampling=Resampling.average,
            )
        pixels = np.moveaxis(bands, 0, 2)
        if pixels.dtype != np.uint8:
            assert self._spec.intensity_range is not None
            pixels = _to_8_bits(pixels, self._spec.intensity_range)
        # The remainder of a row or column is less than a reduced pixel: repeat the last one.
        missing = Sides(-(-(x2 - x1) // reduction) - width, -(-(y2 - y1) // reduction) - height)
        pixels = np.pad(pixels, ((0, missing.height), (0, missing.width), (0, 0)), mode="edge")
        return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))


def open_image(path: Path, spec: ReadSpec = _DEFAULT, *, sides: Sides | None = None) -> ImageReader:
    """Open an image file for reading.

    Args:
        path: of the file.
        spec: how image files become pixels.
        sides: of the image as annotated, pixels, if known; compared with the file when it is read.

    Raises:
        ImageError: if the file cannot be read, as far as its header shows.
    """
    if _is_windowed(path, spec):
        reader = WindowedTiffReader(path, spec)
        if sides is not None:
            _check_sides(path, Sides(reader.width, reader.height), sides)
        return reader
    return DecodedImageReader(path, spec, sides=sides)


def load_image(
    path: Path,
    spec: ReadSpec = _DEFAULT,
    *,
    reduction: int = 1,
    sides: Sides | None = None,
) -> UInt8[np.ndarray, "h w 3"]:
    """Load a whole image as RGB: of an animation the first frame, of a transparent image the colours as stored.

    Args:
        path: of the file.
        spec: how image files become pixels.
        reduction: 2, 4 or 8 decodes a JPEG at that fraction of its sides; see `ImageReader.largest_reduction`.
        sides: expected of the image, pixels, if known.

    Raises:
        ImageError: if the file is absent, truncated or not an image, has more than 8 bits a channel and no intensity
            range is configured, has more pixels than the limit, or has other sides.
    """
    _verify_png(path)
    with _open_file(path) as image:
        _check_num_pixels(path, image, spec)
        is_deep = _is_deep(image)
        orientation = _remaining_orientation(image, spec)
        if sides is not None:
            _check_sides(path, _oriented_sides(image, orientation), sides)
        if reduction > 1:
            image.draft(None, (max(image.width // reduction, 1), max(image.height // reduction, 1)))
        if is_deep:
            if spec.intensity_range is None:
                raise _range_required(path, f"mode {image.mode}")
            if _is_deep_color_tiff(image):
                _require_rasterio(path)
                return _read_whole(WindowedTiffReader(path, spec))
            pixels = _to_8_bits(_deep_pixels(image, path), spec.intensity_range)
            oriented = _orient(Image.fromarray(pixels), orientation)
        else:
            image.load()
            image.info.pop("transparency", None)  # the colours as stored, not blended with a background
            oriented = _orient(image.convert("RGB"), orientation)
        return np.asarray(oriented)


def read_image_sides(path: Path, spec: ReadSpec = _DEFAULT) -> Sides:
    """Read the sides of an image from its header, in the orientation that `spec` asks for.

    Raises:
        ImageError: as `load_image`, except for faults that only show in the pixels.
    """
    if _is_windowed(path, spec):
        tiff = WindowedTiffReader(path, spec)
        return Sides(tiff.width, tiff.height)
    with _open_file(path) as image:
        _check_num_pixels(path, image, spec)
        if _is_deep(image) and spec.intensity_range is None:
            raise _range_required(path, f"mode {image.mode}")
        return _oriented_sides(image, _remaining_orientation(image, spec))


def decoded_bytes(file_name: str, sides: Sides) -> int:
    """Estimate the memory that an image takes while it stays decoded; 0 if it is read in windows."""
    is_tiff = file_name.lower().endswith(_TIFF_SUFFIXES)
    num_pixels = sides.width * sides.height
    return 0 if is_tiff and num_pixels > _WINDOWED_PIXELS else 3 * num_pixels


def _require_rasterio(path: Path) -> None:
    if find_spec("rasterio") is None:
        raise ImageError(f"{path}: has more than 8 bits in several channels: pip install 'sniper-det[tiff]'")


def _read_whole(reader: ImageReader) -> UInt8[np.ndarray, "h w 3"]:
    return reader.read((0, 0, reader.width, reader.height))


def _check_num_pixels(path: Path, image: Image.Image, spec: ReadSpec) -> None:
    if image.width * image.height > spec.max_pixels:
        raise ImageError(
            f"{path}: has {image.width}x{image.height} pixels, expected at most {spec.max_pixels:,} in all "
            "(data.read.max_pixels)"
        )


def _check_sides(path: Path, sides: Sides, expected: Sides) -> None:
    if sides != expected:
        raise ImageError(
            f"{path}: has {sides.width}x{sides.height} pixels, but the annotations say "
            f"{expected.width}x{expected.height}"
        )


def _oriented_sides(image: Image.Image, orientation: int) -> Sides:
    """Return the sides of an image once its orientation is applied."""
    if orientation in _SIDE_SWAPPING:
        return Sides(image.height, image.width)
    return Sides(image.width, image.height)


@contextmanager
def _naming_file(path: Path) -> Iterator[None]:
    """Turn any error of a decoder into an `ImageError` that names the file."""
    try:
        yield
    except ImageError:
        raise
    except (*_UNREADABLE, cv2.error) as error:
        raise ImageError(f"{path}: cannot be read as an image ({error})") from error


@contextmanager
def _open_file(path: Path) -> Iterator[Image.Image]:
    """Open an image with Pillow; only its header is read.

    Pillow gets an open file, not its name: it would map a named file into memory, and mapped pixels are wrong once
    Pillow applies an orientation.
    """
    with _naming_file(path), path.open("rb") as file, _open_without_pixel_limit(file) as image:
        yield image


def _open_without_pixel_limit(file: BinaryIO) -> Image.Image:
    """Open an image of any size; `ReadSpec.max_pixels` replaces Pillow's limit, which warns of large images."""
    with _PILLOW_LIMIT_LOCK:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(file)
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _verify_png(path: Path) -> None:
    """Compare the checksums of a PNG; decoding alone does not."""
    if path.suffix.lower() == ".png":
        with _open_file(path) as image:
            if image.format == "PNG":
                image.verify()


def _remaining_orientation(image: Image.Image, spec: ReadSpec) -> int:
    """Return the EXIF orientation to apply to the decoded pixels; Pillow applies that of TIFF files itself."""
    if image.format == "TIFF":
        orientation = _tiff_orientation(image)
        is_applied = True
    else:
        # In a PNG, EXIF may also follow the pixels; looking there would decode the image to read its header.
        has_exif = image.format != "PNG" or "exif" in image.info
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1) if has_exif else 1
        is_applied = False
    if orientation not in range(1, 9) or is_applied == (spec.exif_orientation == "apply"):
        return 1
    return _INVERSE_ORIENTATION.get(orientation, orientation) if is_applied else orientation


def _tiff_orientation(image: Image.Image) -> int:
    """Return the orientation of a TIFF that is not decoded yet; decoding applies it and removes the tag."""
    orientation: int = image.tag_v2.get(ExifTags.Base.Orientation, 1)  # type: ignore[attr-defined]
    return orientation


def _orient(image: Image.Image, orientation: int) -> Image.Image:
    """Apply an EXIF orientation to decoded pixels."""
    if orientation == 1:
        return image
    plain = Image.fromarray(np.asarray(image))
    plain.getexif()[ExifTags.Base.Orientation] = orientation
    return ImageOps.exif_transpose(plain)


def _is_deep(image: Image.Image) -> bool:
    """Check whether an image has more than 8 bits a channel, also where Pillow would keep only the upper 8."""
    if image.mode in _DEEP_MODES:
        return True
    if image.format == "TIFF":
        return max(image.tag_v2.get(_BITS_PER_SAMPLE, (1,))) > 8  # type: ignore[attr-defined]
    packings = [tile[3] for tile in getattr(image, "tile", [])]
    if image.format == "PPM":  # the last argument of its decoder is the highest value
        return any(isinstance(packing, tuple) and packing[-1] > 255 for packing in packings)
    return any(isinstance(packing, str) and packing.endswith(";16B") for packing in packings)


def _is_deep_color_tiff(image: Image.Image) -> bool:
    """Check whether an image is a TIFF of several channels of more than 8 bits, which Pillow does not read."""
    return image.format == "TIFF" and image.mode not in _DEEP_MODES and _is_deep(image)


def _deep_pixels(image: Image.Image, path: Path) -> np.ndarray:
    """Read all bits of an image: (h, w, 1) or (h, w, 3)."""
    image.load()  # raises for a truncated file, which OpenCV would fill up silently
    if image.mode in _DEEP_MODES:
        return np.asarray(image)[..., None]
    pixels = cv2.imdecode(np.fromfile(path, dtype=np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None or pixels.dtype != np.uint16:
        raise ImageError(f"{path}: more than 8 bits a channel in mode {image.mode}, which cannot be read")
    return pixels[..., None] if pixels.ndim == 2 else pixels[..., 2::-1]


def _to_8_bits(pixels: np.ndarray, intensity_range: tuple[float, float]) -> UInt8[np.ndarray, "h w 3"]:
    """Map values of any depth linearly to 0..255; NaN becomes black."""
    black, white = intensity_range
    levels = (pixels.astype(np.float32) - black) * (255 / (white - black))
    levels = np.rint(np.clip(np.nan_to_num(levels, nan=0.0), 0, 255)).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(levels, (*levels.shape[:2], 3)))


def _range_required(path: Path, depth: str) -> ImageError:
    return ImageError(
        f"{path}: has more than 8 bits a channel ({depth}); specify the black and the white value, "
        "for example data.read.intensity_range: [0, 65535]"
    )


def _is_windowed(path: Path, spec: ReadSpec) -> bool:
    """Check whether an image is a TIFF that is better read in windows, and can be."""
    if not path.name.lower().endswith(_TIFF_SUFFIXES) or find_spec("rasterio") is None:
        return False
    with _open_file(path) as image:
        is_large = image.width * image.height > _WINDOWED_PIXELS
        is_candidate = image.format == "TIFF" and (is_large or _is_deep_color_tiff(image))
        return is_candidate and (spec.exif_orientation == "ignore" or _tiff_orientation(image) == 1)


def _check_layout(path: Path, file: Any) -> None:
    """Refuse layouts that GDAL decodes differently from Pillow."""
    layout = file.tags(ns="IMAGE_STRUCTURE") | file.tags(1, ns="IMAGE_STRUCTURE")
    if layout.get("MINISWHITE") == "YES":
        raise ImageError(f"{path}: has 0 for white, which cannot be read in windows")
    if "NBITS" in layout:
        raise ImageError(f"{path}: has {layout['NBITS']} bits a channel, which cannot be read in windows")


@contextmanager
def _open_tiff(path: Path) -> Iterator[Any]:
    import rasterio

    with rasterio.Env(GDAL_CACHEMAX=_GDAL_CACHE):
        stat = path.stat()
        yield _cached_tiff((os.getpid(), get_ident()), path, stat.st_size, stat.st_mtime_ns)


@lru_cache(_MAX_OPEN_TIFFS)
def _cached_tiff(thread: tuple[int, int], path: Path, size: int, modified: int) -> Any:
    """Open a version of a TIFF once for each process and thread that reads it."""
    import rasterio

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        return rasterio.open(path)
