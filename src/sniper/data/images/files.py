"""Decode image files of every format, depth and orientation to 8-bit RGB, whole or in windows.

A file that cannot be decoded correctly is refused by name: one that is truncated, has more than 8 bits a channel
without a configured intensity range, or has more pixels than the limit. Files on disk, files in memory and Pillow
images go through the same functions.
"""

import io
import warnings
from pathlib import Path
from threading import Lock
from typing import Protocol, runtime_checkable

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageFile

from sniper.data.images.encoded import EncodedImage, naming_errors
from sniper.data.images.formats import has_simplejpeg
from sniper.data.images.libtiff import collect_errors
from sniper.data.images.pixels import orient, range_required, select_bands, to_rgb
from sniper.data.images.tiff import (
    SIDE_SWAPPING,
    WINDOWED_PIXELS,
    TiffReader,
    has_rasterio,
    read_tiff_header,
)
from sniper.data.spec import ReadSpec
from sniper.errors import ImageError
from sniper.geometry.boxes import Sides

_DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262  # TIFF tags
_MIN_IS_WHITE = 0
_INVERSE_ORIENTATION = {6: 8, 8: 6}  # all others are their own inverse
_MAX_JPEG_REDUCTION = 8

_JPEG2000_SIZES = b"\xff\x4f\xff\x51"  # start of a codestream, and of its sizes
_JPEG2000_HEADER = 1_000_000  # bytes, colour profiles included, before which the codestream starts

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_MAX_EXIF = 1_000_000  # bytes

_PILLOW_IMAGE = "Pillow image"  # its name in errors
_TIFF_SUFFIXES = (".tif", ".tiff")
_DEFAULT = ReadSpec()

cv2.setNumThreads(1)  # loader processes run in parallel; threads within them would only compete
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # our errors say what failed
warnings.filterwarnings("ignore", module=r"PIL\.\w+ImagePlugin")  # of damage: what matters becomes an error


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
    """An image file that is decoded whole on the first read, and kept for the next window.

    Args:
        data: path of the file, or its content.
        spec: how image files become pixels.
        sides: of the image, pixels; read from the header if None.
    """

    def __init__(self, data: Path | bytes, spec: ReadSpec, *, sides: Sides | None = None) -> None:
        self._data, self._spec = data, spec
        self._sides = read_image_sides(data, spec) if sides is None else sides
        self.width, self.height = self._sides
        self._decoded: dict[int, np.ndarray] = {}
        self._lock = Lock()

    def largest_reduction(self, limit: int) -> int:
        """See `ImageReader`: JPEG files can be decoded at a half, a quarter and an eighth of their sides."""
        if limit < 2:
            return 1
        with EncodedImage(self._data).open_pillow() as image:
            is_plain = image.format == "JPEG" and image.mode in ("RGB", "L")
            if is_plain and _remaining_orientation(image, self._spec) == 1:
                return min(limit, _MAX_JPEG_REDUCTION)
        return 1

    def read(self, window: tuple[int, int, int, int], *, reduction: int = 1) -> UInt8[np.ndarray, "h w 3"]:
        """See `ImageReader`; threads that read at the same time share one decode."""
        with self._lock:
            if reduction not in self._decoded:
                self._decoded[reduction] = load_image(
                    self._data, self._spec, reduction=reduction, sides=self._sides
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


def open_image(data: Path | bytes, spec: ReadSpec = _DEFAULT, *, sides: Sides | None = None) -> ImageReader:
    """Open an image file for reading.

    Args:
        data: path of the file, or its content.
        spec: how image files become pixels.
        sides: of the image as annotated, pixels, if known; compared with the file when it is read.

    Raises:
        ImageError: if the file cannot be read, as far as its header shows.
    """
    image = EncodedImage(data)
    tiff = _open_tiff(image, spec)
    if tiff is not None and tiff.is_windowed:
        if sides is not None:
            _check_sides(image.name, Sides(tiff.width, tiff.height), sides)
        return tiff
    return DecodedImageReader(data, spec, sides=sides)


def load_image(
    data: Path | bytes,
    spec: ReadSpec = _DEFAULT,
    *,
    reduction: int = 1,
    sides: Sides | None = None,
) -> UInt8[np.ndarray, "h w 3"]:
    """Load a whole image as RGB: of an animation the first frame, of a transparent image the colours as stored.

    Args:
        data: path of the file, or its content.
        spec: how image files become pixels.
        reduction: 2, 4 or 8 decodes a JPEG at that fraction of its sides; see `ImageReader.largest_reduction`.
        sides: expected of the image, pixels, if known.

    Raises:
        ImageError: if the file is absent, truncated or not an image, has more than 8 bits a channel and no intensity
            range is configured, has more pixels than the limit, or has other sides.
    """
    image = EncodedImage(data)
    tiff = _open_tiff(image, spec)
    if tiff is not None:
        _check_num_pixels(image.name, Sides(tiff.width, tiff.height), spec)
        if sides is not None:
            _check_sides(image.name, Sides(tiff.width, tiff.height), sides)
        return tiff.read_whole()
    with image.open_pillow(verifies=True) as opened:
        _check_num_pixels(image.name, Sides(opened.width, opened.height), spec)
        orientation = _remaining_orientation(opened, spec)
        if sides is not None:
            _check_sides(image.name, _oriented_sides(opened, orientation), sides)
        if reduction > 1:
            opened.draft(None, (max(opened.width // reduction, 1), max(opened.height // reduction, 1)))
        whole = image if reduction == 1 else None
        return orient(_decode(opened, spec, name=image.name, encoded=whole), orientation)


def load_pillow_image(image: Image.Image, spec: ReadSpec = _DEFAULT) -> UInt8[np.ndarray, "h w 3"]:
    """Load a Pillow image as RGB, as the file that it was opened from where it is not decoded yet.

    Args:
        image: the image; it is not changed, except that its pixels may be decoded.
        spec: how image files become pixels; an orientation that is still in its EXIF data is applied.

    Raises:
        ImageError: as `load_image`.
    """
    with naming_errors(_PILLOW_IMAGE):
        content = _content_of(image)
        if content is not None:
            return load_image(content, spec)
        if 0 in image.size:
            raise ImageError(
                f"{_PILLOW_IMAGE}: has {image.width}x{image.height} pixels, expected at least one"
            )
        _check_num_pixels(_PILLOW_IMAGE, Sides(image.width, image.height), spec)
        _check_depth_is_kept(image)
        orientation = _remaining_orientation(image, spec)
        return orient(_decode(image, spec, name=_PILLOW_IMAGE), orientation)


def read_image_sides(data: Path | bytes, spec: ReadSpec = _DEFAULT) -> Sides:
    """Read the sides of an image from its header, in the orientation that `spec` asks for.

    Raises:
        ImageError: as `load_image`, except for faults that only show in the pixels.
    """
    image = EncodedImage(data)
    tiff = _open_tiff(image, spec)
    if tiff is not None:
        sides = Sides(tiff.width, tiff.height)
        if not tiff.is_windowed:
            _check_num_pixels(image.name, sides, spec)
        return sides
    with image.open_pillow() as opened:
        _check_num_pixels(image.name, Sides(opened.width, opened.height), spec)
        if spec.intensity_range is None and _is_deep(opened):
            raise _range_required(image.name, opened)
        return _oriented_sides(opened, _remaining_orientation(opened, spec))


def _range_required(name: str, image: Image.Image) -> ImageError:
    return range_required(name, f"mode {image.mode}", example=(0, 1) if image.mode == "F" else (0, 65_535))


def read_orientation(data: Path | bytes, spec: ReadSpec = _DEFAULT) -> int:
    """Read the EXIF orientation that is applied to the pixels of an image as stored, 1 to 8; 1 leaves them.

    Raises:
        ImageError: if the file cannot be read, as far as its header shows.
    """
    if spec.exif_orientation == "ignore":
        return 1
    image = EncodedImage(data)
    header = read_tiff_header(image)
    if header is not None:
        return header.orientation
    with image.open_pillow() as opened:
        return _remaining_orientation(opened, spec)


def decoded_bytes(file_name: str, sides: Sides) -> int:
    """Estimate the memory that an image takes while it stays decoded; 0 if it is read in windows."""
    is_tiff = file_name.lower().endswith(_TIFF_SUFFIXES)
    num_pixels = sides.width * sides.height
    return 0 if is_tiff and num_pixels > WINDOWED_PIXELS else 3 * num_pixels


def _open_tiff(image: EncodedImage, spec: ReadSpec) -> TiffReader | None:
    """Open an image for reading with rasterio, if it is a TIFF that Pillow does not read as well."""
    header = read_tiff_header(image)
    if header is None:
        return None
    needs_rasterio = header.needs_rasterio(spec)
    if has_rasterio():
        is_windowed = header.is_large and header.is_windowable
        return TiffReader(image, header, spec) if needs_rasterio or is_windowed else None
    if needs_rasterio and not header.is_deep_grey:
        raise ImageError(f"{image.name}: is a TIFF of {header}: pip install 'sniper-det[tiff]'")
    return None


def _check_num_pixels(name: str, sides: Sides, spec: ReadSpec) -> None:
    if sides.width * sides.height > spec.max_pixels:
        raise ImageError(
            f"{name}: has {sides.width}x{sides.height} pixels, expected at most {spec.max_pixels:,} in all "
            "(data.read.max_pixels)"
        )


def _check_sides(name: str, sides: Sides, expected: Sides) -> None:
    if sides != expected:
        raise ImageError(
            f"{name}: has {sides.width}x{sides.height} pixels, but the annotations say "
            f"{expected.width}x{expected.height}"
        )


def _oriented_sides(image: Image.Image, orientation: int) -> Sides:
    """Return the sides of an image once its orientation is applied."""
    if orientation in SIDE_SWAPPING:
        return Sides(image.height, image.width)
    return Sides(image.width, image.height)


def _remaining_orientation(image: Image.Image, spec: ReadSpec) -> int:
    """Return the EXIF orientation to apply to the decoded pixels; Pillow applies that of TIFF files itself."""
    if image.format == "TIFF":
        orientation = _tiff_tag(image, ExifTags.Base.Orientation, 1)
        is_applied = True
    else:
        orientation = _exif_of(image).get(ExifTags.Base.Orientation, 1)
        is_applied = False
    if orientation not in range(1, 9) or is_applied == (spec.exif_orientation == "apply"):
        return 1
    return _INVERSE_ORIENTATION.get(orientation, orientation) if is_applied else orientation


def _exif_of(image: Image.Image) -> Image.Exif:
    """Return the EXIF data of an image; those of a PNG may follow its pixels, which Pillow would decode to read on."""
    if image.format != "PNG":
        return image.getexif()
    file = getattr(image, "fp", None)
    if "exif" not in image.info and file is not None:
        position = file.tell()
        file.seek(len(_PNG_SIGNATURE))
        while len(header := file.read(8)) == 8 and header[4:] not in (b"eXIf", b"IEND"):
            file.seek(int.from_bytes(header[:4], "big") + 4, io.SEEK_CUR)
        if header[4:] == b"eXIf":
            image.info["exif"] = b"Exif\0\0" + file.read(min(int.from_bytes(header[:4], "big"), _MAX_EXIF))
        file.seek(position)
    return Image.Image.getexif(image)


def _tiff_tag(image: Image.Image, tag: int, default: int) -> int:
    """Return a tag of a TIFF; that of its orientation is gone once Pillow has decoded, and so oriented, the image."""
    tags = getattr(image, "tag_v2", {})  # absent in copies
    value = tags.get(tag, default)
    return max(value) if isinstance(value, tuple) else value


def _decode(
    image: Image.Image, spec: ReadSpec, *, name: str, encoded: EncodedImage | None = None
) -> UInt8[np.ndarray, "h w 3"]:
    """Decode an image that is open in Pillow to RGB, as stored.

    Args:
        image: to decode; left as it is if it is decoded already.
        spec: how image files become pixels.
        name: of the image, for errors.
        encoded: its file, from which simplejpeg decodes JPEG, and OpenCV the bits that Pillow drops; None if the image
            is decoded already, or at a fraction of its sides.
    """
    if not _is_deep(image):
        pixels = None if encoded is None else _decode_jpeg(image, encoded)
        if pixels is None:
            _load(image)
            pixels = np.asarray(_to_pillow_rgb(image))
        if spec.bands is None:
            return pixels
        is_grey = len(image.getbands()) == 1 and image.mode != "P"
        bands = select_bands(1 if is_grey else 3, spec, name=name)
        return to_rgb(pixels[..., bands], ReadSpec(), name=name)
    if spec.intensity_range is None:
        raise _range_required(name, image)
    is_inverted = image.format == "TIFF" and _tiff_tag(image, _PHOTOMETRIC, 1) == _MIN_IS_WHITE
    _load(image)  # raises for a truncated file, which OpenCV would fill up silently
    if image.mode in _DEEP_MODES and (encoded is None or not _is_rescaled(image)):
        pixels = np.asarray(image)[..., None]
    else:
        pixels = _decode_with_opencv(image, name=name, encoded=encoded)
    levels = to_rgb(pixels, spec, name=name)
    return 255 - levels if is_inverted else levels


def _decode_jpeg(image: Image.Image, encoded: EncodedImage) -> UInt8[np.ndarray, "h w 3"] | None:
    """Decode a JPEG with simplejpeg, to the pixels of Pillow with a third of the memory.

    None if it is not installed, or the file is not intact: Pillow then decodes the image, or refuses it.
    """
    if image.format != "JPEG" or image.mode not in ("RGB", "L") or not has_simplejpeg():
        return None
    from simplejpeg import decode_jpeg

    try:
        return np.asarray(decode_jpeg(encoded.read(), fastdct=False, fastupsample=False), dtype=np.uint8)
    except ValueError:
        return None


def _load(image: Image.Image) -> None:
    """Decode an image in Pillow; damage that libtiff reports but decodes is an error."""
    if image.format != "TIFF":
        image.load()
        return
    with collect_errors() as messages:
        try:
            image.load()
        except OSError as error:
            # Without the error's traceback, which would keep libtiff's decoder open while no errors are collected.
            messages[:] = messages or [str(error)]
    if messages:
        raise OSError("; ".join(messages))


def _to_pillow_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to RGB: the colours as stored, not blended with a background."""
    if image.mode == "RGB":
        return image
    transparency = image.info.pop("transparency", None)
    try:
        return image.convert("RGB")
    finally:
        if transparency is not None:
            image.info["transparency"] = transparency


def _is_deep(image: Image.Image) -> bool:
    """Check whether an image has more than 8 bits a channel, also where Pillow would keep only the upper 8."""
    if image.mode in _DEEP_MODES:
        return True
    if image.format == "TIFF":
        return _tiff_tag(image, _BITS_PER_SAMPLE, 1) > 8
    packings = [tile[3] for tile in getattr(image, "tile", [])]
    if image.format == "PPM":  # the last argument of its decoder is the highest value
        return any(isinstance(packing, tuple) and packing[-1] > 255 for packing in packings)
    if image.format == "JPEG2000":
        return bool(packings) and _jpeg2000_bits(image) > 8
    return any(isinstance(packing, str) and packing.endswith(";16B") for packing in packings)


def _jpeg2000_bits(image: Image.Image) -> int:
    """Return the bits of the deepest channel of a JPEG 2000 that is not decoded yet."""
    file = image.fp  # type: ignore[attr-defined]
    position = file.tell()
    file.seek(0)
    header = file.read(_JPEG2000_HEADER)
    file.seek(position)
    sizes = header.find(_JPEG2000_SIZES) + 6  # of the marker segment, after its length
    if sizes < 6 or len(header) < sizes + 36:
        return 8
    num_channels = int.from_bytes(header[sizes + 34 : sizes + 36], "big")
    depths = header[sizes + 36 : sizes + 36 + 3 * num_channels : 3]
    return max(((depth & 0x7F) + 1 for depth in depths), default=8)


def _is_rescaled(image: Image.Image) -> bool:
    """Check whether Pillow scales values of less than 16 bits to 16."""
    return image.format == "JPEG2000" or (image.format == "PPM" and image.mode != "F")


def _decode_with_opencv(image: Image.Image, *, name: str, encoded: EncodedImage | None) -> np.ndarray:
    """Decode all bits of an image: (h, w, 1) or (h, w, 3), with the values that are stored."""
    content = None if encoded is None else np.frombuffer(encoded.read(), dtype=np.uint8)
    pixels = None if content is None else cv2.imdecode(content, cv2.IMREAD_UNCHANGED)
    if pixels is None or pixels.dtype != np.uint16:
        raise ImageError(f"{name}: more than 8 bits a channel in mode {image.mode}, which cannot be read")
    return pixels[..., None] if pixels.ndim == 2 else pixels[..., 2::-1]


def _content_of(image: Image.Image) -> bytes | None:
    """Return the file of a Pillow image that is as it was opened; None if it is decoded or changed already."""
    file = getattr(image, "fp", None)
    if not isinstance(image, ImageFile.ImageFile) or file is None or not image.tile or image.tell() != 0:
        return None
    position = file.tell()
    file.seek(0)
    content: bytes = file.read()
    file.seek(position)
    with EncodedImage(content).open_pillow() as opened:
        is_same = (opened.format, opened.mode, opened.size) == (image.format, image.mode, image.size)
    return content if is_same else None


def _check_depth_is_kept(image: Image.Image) -> None:
    """Refuse an image that Pillow has decoded to the upper 8 of more bits, if its file is still there."""
    if not isinstance(image, ImageFile.ImageFile) or image.mode in _DEEP_MODES:
        return
    path = Path(str(image.filename))
    if image.filename and path.is_file():
        with EncodedImage(path).open_pillow() as opened:
            if opened.format == image.format and _is_deep(opened):
                raise ImageError(
                    f"{_PILLOW_IMAGE}: Pillow has decoded only the upper 8 bits of each channel of {path}; "
                    "pass the path instead"
                )
