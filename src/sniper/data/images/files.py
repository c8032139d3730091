"""Image files to pixels: every format, depth and orientation as 8-bit RGB, whole or a window of a large one.

What cannot be read right is refused by name: a file cut short, more than 8 bits a channel without a word on which
values are black and white, more pixels than the limit.
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
"""What names of image files end in."""

_DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
_BITS = 258  # TIFF's tag of bits per channel
_TURNING = range(5, 9)  # EXIF orientations that exchange width and height
_UNDONE_BY = {6: 8, 8: 6}  # all others undo themselves
_WINDOWED_PIXELS = 50_000_000  # a TIFF beyond this is read in windows
_MOST_REDUCED_JPEG = 8
_NUM_OPEN_TIFFS = 8
_TIFF_CACHE = 256_000_000  # bytes of decoded tiles that GDAL keeps

_TIFF_SUFFIXES = (".tif", ".tiff")
_PILLOWS_LIMIT = Lock()
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
_PLAIN = ReadSpec()

cv2.setNumThreads(1)  # processes read side by side; threads within them would only fight


@runtime_checkable
class ImageReader(Protocol):
    """An image on disk, whose pixels are read when they are wanted."""

    @property
    def width(self) -> int:
        """Pixels, turned as the annotations see it."""

    @property
    def height(self) -> int:
        """Pixels, turned as the annotations see it."""

    def largest_reduction(self, wanted: int) -> int:
        """Give the largest power of two up to `wanted` by which it can be read smaller."""

    def read(self, window: tuple[int, int, int, int], *, reduction: int = 1) -> UInt8[np.ndarray, "h w 3"]:
        """Give the pixels of a window.

        Args:
            window: xyxy, image frame, inside the image; its corner a multiple of the reduction.
            reduction: average squares of so many pixels a side into one; the last of a row or column may be of fewer.

        Raises:
            ImageError: if they cannot be read.
        """


class DecodedImageReader:
    """An image whose pixels are decoded all at once, and kept for the next window.

    Args:
        path: of the file.
        spec: how to read it.
        sides: width and height, if they are known; the header tells otherwise.
    """

    def __init__(self, path: Path, spec: ReadSpec, *, sides: tuple[int, int] | None = None) -> None:
        self._path, self._spec = path, spec
        self.width, self.height = read_image_sides(path, spec) if sides is None else sides
        self._decoded: dict[int, np.ndarray] = {}
        self._lock = Lock()

    def largest_reduction(self, wanted: int) -> int:
        """See `ImageReader`: JPEG files can be decoded at a half, a quarter and an eighth of their sides."""
        if wanted < 2:
            return 1
        with _opened(self._path) as image:
            is_plain = image.format == "JPEG" and image.mode in ("RGB", "L")
            return (
                min(wanted, _MOST_REDUCED_JPEG) if is_plain and _still_to_turn(image, self._spec) == 1 else 1
            )

    def read(self, window: tuple[int, int, int, int], *, reduction: int = 1) -> UInt8[np.ndarray, "h w 3"]:
        """See `ImageReader`; threads that ask at once wait for one decode."""
        with self._lock:
            if reduction not in self._decoded:
                self._decoded[reduction] = load_image(
                    self._path, self._spec, reduction=reduction, sides=(self.width, self.height)
                )
            pixels = self._decoded[reduction]
        x1, y1, x2, y2 = window
        return pixels[y1 // reduction : -(-y2 // reduction), x1 // reduction : -(-x2 // reduction)]


class ArrayImageReader:
    """An image that is there as an array.

    Args:
        pixels: (h, w, 3) grey levels, RGB.
    """

    def __init__(self, pixels: UInt8[np.ndarray, "h w 3"]) -> None:
        self._pixels = pixels
        self.height, self.width = pixels.shape[:2]

    def largest_reduction(self, wanted: int) -> int:
        """See `ImageReader`."""
        return 1

    def read(self, window: tuple[int, int, int, int], *, reduction: int = 1) -> UInt8[np.ndarray, "h w 3"]:
        """See `ImageReader`."""
        if reduction != 1:
            raise ValueError(f"what is in memory is not read smaller, by {reduction}")
        x1, y1, x2, y2 = window
        return self._pixels[y1:y2, x1:x2]


class WindowedTiffReader:
    """A large TIFF of which only the window that is wanted is read, smaller ones from its overviews if it has such.

    Args:
        path: of the file.
        spec: how to read it.
    """

    def __init__(self, path: Path, spec: ReadSpec) -> None:
        self._path, self._spec = path, spec
        with _told(path), _tiff(path) as file:
            self.width, self.height = file.width, file.height
            _check_layout(path, file)
            kinds = {np.dtype(name) for name in file.dtypes}
            if file.count not in (1, 3, 4) or file.colorinterp[0].name == "palette":
                raise ImageError(
                    f"{path}: has {file.count} bands ({file.colorinterp[0].name}), "
                    "wanted grey, RGB or RGB and alpha"
                )
            if kinds != {np.dtype(np.uint8)} and spec.intensity_range is None:
                raise ImageError(_wants_range(path, " and ".join(sorted(map(str, kinds)))))

    def largest_reduction(self, wanted: int) -> int:
        """See `ImageReader`."""
        return wanted

    def read(self, window: tuple[int, int, int, int], *, reduction: int = 1) -> UInt8[np.ndarray, "h w 3"]:
        """See `ImageReader`."""
        from rasterio.enums import Resampling
        from rasterio.windows import Window

        x1, y1, x2, y2 = window
        width, height = max((x2 - x1) // reduction, 1), max((y2 - y1) // reduction, 1)
        with _told(self._path), _tiff(self._path) as file:
            bands = file.read(
                [1, 2, 3] if file.count >= 3 else [1],
                window=Window(x1, y1, min(width * reduction, x2 - x1), min(height * reduction, y2 - y1)),
                out_shape=(min(file.count, 3), height, width),
                resampling=Resampling.average,
            )
        pixels = np.moveaxis(bands, 0, 2)
        if pixels.dtype != np.uint8:
            assert self._spec.intensity_range is not None
            pixels = _to_grey_levels(pixels, self._spec.intensity_range)
        # What is left over of a row or column is less than a pixel: it looks like its neighbour.
        rest = (-(-(y2 - y1) // reduction) - height, -(-(x2 - x1) // reduction) - width)
        pixels = np.pad(pixels, ((0, rest[0]), (0, rest[1]), (0, 0)), mode="edge")
        return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))


def open_image(path: Path, spec: ReadSpec = _PLAIN, *, sides: tuple[int, int] | None = None) -> ImageReader:
    """Make an image ready to be read from.

    Args:
        path: of the file.
        spec: how to read it.
        sides: width and height, if the annotations tell them; the file is compared with them when it is read.

    Raises:
        ImageError: if it cannot be read, as far as the header tells.
    """
    if _is_windowed(path, spec):
        picture = WindowedTiffReader(path, spec)
        if sides is not None:
            _check_sides(path, (picture.width, picture.height), sides)
        return picture
    return DecodedImageReader(path, spec, sides=sides)


def load_image(
    path: Path,
    spec: ReadSpec = _PLAIN,
    *,
    reduction: int = 1,
    sides: tuple[int, int] | None = None,
) -> UInt8[np.ndarray, "h w 3"]:
    """Read a whole image as RGB; of an animation the first picture, of a transparent one the colours as stored.

    Args:
        path: of the file.
        spec: how to read it.
        reduction: 2, 4 or 8 decodes a JPEG at that part of its sides, see `ImageReader.largest_reduction`.
        sides: width and height that it should have, if they are known.

    Raises:
        ImageError: if the file is absent, cut short or no image, has more than 8 bits a channel and no grey range is
            given, has more pixels than the limit, or has other sides.
    """
    _verify_png(path)
    with _opened(path) as image:
        _check_size(path, image, spec)
        is_deep = _is_deep(image)
        orientation = _still_to_turn(image, spec)
        if sides is not None:
            _check_sides(path, _sides_of(image, orientation), sides)
        if reduction > 1:
            image.draft(None, (max(image.width // reduction, 1), max(image.height // reduction, 1)))
        if is_deep:
            if spec.intensity_range is None:
                raise ImageError(_wants_range(path, f"mode {image.mode}"))
            if _is_deep_color_tiff(image):
                _want_rasterio(path)
                return _whole(WindowedTiffReader(path, spec))
            pixels = _to_grey_levels(_deep_pixels(image, path), spec.intensity_range)
            turned = _turned(Image.fromarray(pixels), orientation)
        else:
            image.load()
            image.info.pop("transparency", None)  # the colours as stored, whatever they are to cover
            turned = _turned(image.convert("RGB"), orientation)
        return np.asarray(turned)


def read_image_sides(path: Path, spec: ReadSpec = _PLAIN) -> tuple[int, int]:
    """Read width and height of an image from its header, turned as `spec` says.

    Raises:
        ImageError: as `load_image`, but for what only the pixels tell.
    """
    if _is_windowed(path, spec):
        tiff = WindowedTiffReader(path, spec)
        return tiff.width, tiff.height
    with _opened(path) as image:
        _check_size(path, image, spec)
        if _is_deep(image) and spec.intensity_range is None:
            raise ImageError(_wants_range(path, f"mode {image.mode}"))
        return _sides_of(image, _still_to_turn(image, spec))


def decoded_bytes(file_name: str, *, width: int, height: int) -> int:
    """Estimate the memory of an image that stays decoded; one that is read in windows does not."""
    is_tiff = file_name.lower().endswith(_TIFF_SUFFIXES)
    return 0 if is_tiff and width * height > _WINDOWED_PIXELS else 3 * width * height


def _want_rasterio(path: Path) -> None:
    if find_spec("rasterio") is None:
        raise ImageError(f"{path}: has more than 8 bits in several channels: pip install 'sniper-det[tiff]'")


def _whole(picture: ImageReader) -> UInt8[np.ndarray, "h w 3"]:
    return picture.read((0, 0, picture.width, picture.height))


def _check_size(path: Path, image: Image.Image, spec: ReadSpec) -> None:
    if image.width * image.height > spec.max_pixels:
        raise ImageError(
            f"{path}: has {image.width}x{image.height} pixels, wanted at most {spec.max_pixels:,} in all "
            "(data.read.max_pixels)"
        )


def _check_sides(path: Path, found: tuple[int, int], wanted: tuple[int, int]) -> None:
    if found != wanted:
        raise ImageError(
            f"{path}: has {found[0]}x{found[1]} pixels, but the annotations say {wanted[0]}x{wanted[1]}"
        )


def _sides_of(image: Image.Image, orientation: int) -> tuple[int, int]:
    """Give width and height after turning."""
    return (image.height, image.width) if orientation in _TURNING else image.size


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Name the file in whatever goes wrong while it is read."""
    try:
        yield
    except ImageError:
        raise
    except (*_UNREADABLE, cv2.error) as error:
        raise ImageError(f"{path}: cannot be read as an image ({error})") from error


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Open an image; only its header is read. Pillow maps a file that it knows by name, and maps turned ones wrong."""
    with _told(path), path.open("rb") as file, _without_pillows_limit(file) as image:
        yield image


def _without_pillows_limit(file: BinaryIO) -> Image.Image:
    """Open an image of any size; our own limit holds, and Pillow's warns of images that are meant to be that large."""
    with _PILLOWS_LIMIT:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(file)
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _verify_png(path: Path) -> None:
    """Compare the checksums of a PNG, which decoding it does not."""
    if path.suffix.lower() == ".png":
        with _opened(path) as image:
            if image.format == "PNG":
                image.verify()


def _still_to_turn(image: Image.Image, spec: ReadSpec) -> int:
    """Give the EXIF orientation that is to be undone after decoding; Pillow turns TIFF files by itself."""
    if image.format == "TIFF":
        orientation = _tiff_orientation(image)
        is_turned = True
    else:
        # In a PNG, EXIF may also follow the pixels; looking there would decode the image to read its header.
        has_exif = image.format != "PNG" or "exif" in image.info
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1) if has_exif else 1
        is_turned = False
    if orientation not in range(1, 9) or is_turned == (spec.exif_orientation == "apply"):
        return 1
    return _UNDONE_BY.get(orientation, orientation) if is_turned else orientation


def _tiff_orientation(image: Image.Image) -> int:
    """Give the orientation of a TIFF that is not decoded yet; decoding turns it, and the tag is gone."""
    orientation: int = image.tag_v2.get(ExifTags.Base.Orientation, 1)  # type: ignore[attr-defined]
    return orientation


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    """Turn decoded pixels upright."""
    if orientation == 1:
        return image
    plain = Image.fromarray(np.asarray(image))
    plain.getexif()[ExifTags.Base.Orientation] = orientation
    return ImageOps.exif_transpose(plain)


def _is_deep(image: Image.Image) -> bool:
    """Tell whether an image has more than 8 bits a channel, also where Pillow would keep the upper 8 alone."""
    if image.mode in _DEEP_MODES:
        return True
    if image.format == "TIFF":
        return max(image.tag_v2.get(_BITS, (1,))) > 8  # type: ignore[attr-defined]
    packings = [tile[3] for tile in getattr(image, "tile", [])]
    if image.format == "PPM":  # with the highest value
        return any(isinstance(packing, tuple) and packing[-1] > 255 for packing in packings)
    return any(isinstance(packing, str) and packing.endswith(";16B") for packing in packings)


def _is_deep_color_tiff(image: Image.Image) -> bool:
    """Tell whether an image is a TIFF of several deep channels, which Pillow does not read."""
    return image.format == "TIFF" and image.mode not in _DEEP_MODES and _is_deep(image)


def _deep_pixels(image: Image.Image, path: Path) -> np.ndarray:
    """Read all bits of an image: (h, w, 1) or (h, w, 3)."""
    image.load()  # it tells a file cut short, which OpenCV fills up in silence
    if image.mode in _DEEP_MODES:
        return np.asarray(image)[..., None]
    pixels = cv2.imdecode(np.fromfile(path, dtype=np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None or pixels.dtype != np.uint16:
        raise ImageError(f"{path}: more than 8 bits a channel in mode {image.mode}, which cannot be read")
    return pixels[..., None] if pixels.ndim == 2 else pixels[..., 2::-1]


def _to_grey_levels(pixels: np.ndarray, intensity_range: tuple[float, float]) -> UInt8[np.ndarray, "h w 3"]:
    """Bring values of any depth to 0..255; what is no number is black."""
    black, white = intensity_range
    levels = (pixels.astype(np.float32) - black) * (255 / (white - black))
    levels = np.rint(np.clip(np.nan_to_num(levels, nan=0.0), 0, 255)).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(levels, (*levels.shape[:2], 3)))


def _wants_range(path: Path, found: str) -> str:
    return (
        f"{path}: has more than 8 bits a channel ({found}); tell which values are black and white, "
        "such as data.read.intensity_range: [0, 65535]"
    )


def _is_windowed(path: Path, spec: ReadSpec) -> bool:
    """Tell whether an image is a TIFF that is better read in windows, and can be."""
    if not path.name.lower().endswith(_TIFF_SUFFIXES) or find_spec("rasterio") is None:
        return False
    with _opened(path) as image:
        is_large = image.width * image.height > _WINDOWED_PIXELS
        is_meant = image.format == "TIFF" and (is_large or _is_deep_color_tiff(image))
        return is_meant and (spec.exif_orientation == "ignore" or _tiff_orientation(image) == 1)


def _check_layout(path: Path, file: Any) -> None:
    """Refuse what GDAL reads otherwise than Pillow does."""
    layout = file.tags(ns="IMAGE_STRUCTURE") | file.tags(1, ns="IMAGE_STRUCTURE")
    if layout.get("MINISWHITE") == "YES":
        raise ImageError(f"{path}: has 0 for white, which cannot be read in windows")
    if "NBITS" in layout:
        raise ImageError(f"{path}: has {layout['NBITS']} bits a channel, which cannot be read in windows")


@contextmanager
def _tiff(path: Path) -> Iterator[Any]:
    import rasterio

    with rasterio.Env(GDAL_CACHEMAX=_TIFF_CACHE):
        stat = path.stat()
        yield _open_tiff((os.getpid(), get_ident()), path, stat.st_size, stat.st_mtime_ns)


@lru_cache(_NUM_OPEN_TIFFS)
def _open_tiff(reader: tuple[int, int], path: Path, size: int, modified: int) -> Any:
    """Open a TIFF once for each thread and process that reads it."""
    import rasterio

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        return rasterio.open(path)
