"""Read TIFFs with rasterio: of any depth, number of bands and compression, and large ones in windows.

`docs/decisions/0012-image-formats.md` explains which TIFFs Pillow reads.
"""

import logging
import os
import struct
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path
from threading import get_ident
from typing import Any

import numpy as np
from jaxtyping import Shaped, UInt8

from sniper.data.images.encoded import TIFF_STARTS, BinaryFile, EncodedImage, check_claim, naming_errors
from sniper.data.images.libtiff import collect_errors
from sniper.data.images.pixels import check_intensity, map_intensity, orient, select_bands
from sniper.data.spec import ReadSpec
from sniper.errors import ImageError, counted
from sniper.geometry.boxes import Sides

WINDOWED_PIXELS = 50_000_000
"""A TIFF of more is read in windows."""

SIDE_SWAPPING = range(5, 9)
"""EXIF orientations that exchange width and height."""

_MAX_OPEN_TIFFS = 8
_GDAL_CACHE = 256_000_000  # bytes of decoded tiles that GDAL keeps
_MAX_BLOCK = 500_000_000  # bytes of a decoded tile or strip, which is the least that GDAL decodes
_MAX_COMPRESSION = (
    100_000  # of a TIFF with only absent tiles of 512x512, whose offsets are stored all the same
)

_MAX_TAGS = 4096
_MAX_VALUES = 100_000  # of a tag that is read
_VALUE_CODES = {1: "B", 3: "H", 4: "I", 16: "Q"}  # by TIFF type: BYTE, SHORT, LONG, LONG8
_NODATA, _DNG_VERSION, _GEO_KEYS = 42113, 50706, 34735  # TIFF tags
_STRIP_OFFSETS, _STRIP_SIZES, _TILE_OFFSETS, _TILE_SIZES = _BLOCK_TAGS = (273, 279, 324, 325)
_VALUE_TAGS = (254, 256, 257, 258, 259, 262, 274, 277, 338, 339, *_BLOCK_TAGS)

_MIN_IS_WHITE, _MIN_IS_BLACK, _RGB, _PALETTE, _YCBCR = 0, 1, 2, 3, 6  # photometric
_UNCOMPRESSED, _JPEG = 1, 7
_PILLOW_COMPRESSIONS = (_UNCOMPRESSED, 2, 3, 4, 5, _JPEG, 8, 32773, 32946)  # CCITT, LZW, deflate, PackBits
_COMPRESSION_NAMES = {34712: "JPEG 2000", 34887: "LERC", 34925: "LZMA", 50000: "ZSTD", 50001: "WebP"}
_ALPHA = ((1,), (2,))  # extra samples: associated and unassociated
_PILLOW_SAMPLES = {
    _MIN_IS_WHITE: (1,),
    _MIN_IS_BLACK: (1,),
    _RGB: (3, 4),
    _PALETTE: (1,),
    5: (4,),
    6: (3,),
    8: (3,),
}

# rasterio logs GDAL's messages; without any handler, Python would print them on standard error.
logging.getLogger("rasterio").addHandler(logging.NullHandler())


@dataclass(frozen=True, kw_only=True)
class TiffHeader:
    """The layout of the first image of a TIFF or BigTIFF.

    Attributes:
        width: pixels, as stored.
        height: pixels, as stored.
        bits: of each sample.
        sample_formats: of each sample: 1 is unsigned, 2 signed, 3 floating-point.
        samples: in each pixel.
        extra_samples: meaning of the samples beyond the colours.
        photometric: how samples become colours.
        compression: TIFF's number for it.
        orientation: 1 to 8, as in EXIF.
        has_nodata: whether a value stands for absent pixels (GDAL's tag).
        has_absent_blocks: whether a strip or tile is not stored, as GDAL leaves out those without data.
        is_big_endian_bigtiff: whether it is a BigTIFF in the byte order that Pillow does not open.
        has_crs: whether it has the keys of a coordinate reference system, as a GeoTIFF has.
    """

    width: int
    height: int
    bits: tuple[int, ...]
    sample_formats: tuple[int, ...]
    samples: int
    extra_samples: tuple[int, ...]
    photometric: int
    compression: int
    orientation: int
    has_nodata: bool
    has_absent_blocks: bool
    is_big_endian_bigtiff: bool
    has_crs: bool

    @property
    def is_deep(self) -> bool:
        """Check whether a sample has more than 8 bits."""
        return max(self.bits) > 8

    @property
    def is_large(self) -> bool:
        """Check whether it is read in windows where that is possible."""
        return self.width * self.height > WINDOWED_PIXELS

    @property
    def is_windowable(self) -> bool:
        """Check whether rasterio reads its colours, window by window."""
        return self.has_gdal_colors and self.photometric != _PALETTE and min(self.bits) >= 8

    @property
    def has_gdal_colors(self) -> bool:
        """Check whether GDAL reads its samples as grey, RGB or numbers of a palette."""
        is_converted = self.photometric == _YCBCR and self.compression == _JPEG
        return is_converted or self.photometric in (_MIN_IS_WHITE, _MIN_IS_BLACK, _RGB, _PALETTE)

    @property
    def is_plain(self) -> bool:
        """Check whether Pillow reads every pixel of it as meant: at most 8 bits, grey, RGB, palette, CMYK or Lab."""
        is_unsigned = not self.is_deep and set(self.sample_formats) == {1}
        has_alpha = self.samples == 2 and self.extra_samples[:1] in _ALPHA
        num_samples = _PILLOW_SAMPLES.get(self.photometric, ())
        return (
            is_unsigned
            and self.is_complete_for_pillow
            and self.compression in _PILLOW_COMPRESSIONS
            and (self.samples in num_samples or (has_alpha and self.is_grey))
        )

    @property
    def is_grey(self) -> bool:
        """Check whether the first sample is a grey level."""
        return self.photometric in (_MIN_IS_WHITE, _MIN_IS_BLACK)

    @property
    def is_deep_grey(self) -> bool:
        """Check whether Pillow reads all bits of it, if rasterio is absent."""
        is_grey = self.samples == 1 and self.is_grey
        is_compressed_so = self.compression in _PILLOW_COMPRESSIONS
        return self.is_deep and is_grey and self.is_complete_for_pillow and is_compressed_so

    @property
    def is_complete_for_pillow(self) -> bool:
        """Check whether Pillow opens the file, and every pixel is stored in it and has data."""
        return not (self.has_nodata or self.has_absent_blocks or self.is_big_endian_bigtiff)

    def needs_rasterio(self, spec: ReadSpec) -> bool:
        """Check whether Pillow would not read the pixels, or not those of the configured bands."""
        return not self.is_plain or (spec.bands is not None and self.samples not in (1, 3))

    def __str__(self) -> str:
        kinds = {1: "unsigned", 2: "signed", 3: "floating-point"}
        kind = kinds.get(self.sample_formats[0], "other")
        compression = _COMPRESSION_NAMES.get(self.compression)
        bands = counted(self.samples, "band")
        return f"{bands} of {kind} {max(self.bits)}-bit values{f' in {compression}' if compression else ''}"


def read_tiff_header(image: EncodedImage) -> TiffHeader | None:
    """Read the layout of a TIFF from its first directory; None for an image of another format.

    Raises:
        ImageError: if the file cannot be opened, its directory is damaged, or it is a camera's raw file, whose first
            image is a preview.
    """
    with naming_errors(image.name), image.open() as file:
        start = file.read(4)
        if start not in TIFF_STARTS:
            return None
        tags = _read_tags(file)
        missing = [name for tag, name in ((256, "width"), (257, "height")) if not tags.get(tag, (0,))[0]]
        if missing:
            raise ImageError(
                f"{image.name}: cannot be read as an image (TIFF without {' and '.join(missing)})"
            )
        if _DNG_VERSION in tags or tags.get(254, (0,))[0] & 1:
            raise ImageError(
                f"{image.name}: is raw camera data with a preview, expected an image: develop it"
            )
        (samples,) = tags.get(277, (1,))[:1]
        return TiffHeader(
            width=tags[256][0],
            height=tags[257][0],
            bits=tags.get(258, (1,)),
            sample_formats=tags.get(339, (1,)),
            samples=samples,
            extra_samples=tags.get(338, ()),
            photometric=tags.get(262, (_MIN_IS_BLACK,))[0],
            compression=tags.get(259, (_UNCOMPRESSED,))[0],
            orientation=tags.get(274, (1,))[0] if tags.get(274, (1,))[0] in range(1, 9) else 1,
            has_nodata=_NODATA in tags,
            has_absent_blocks=_has_absent_blocks(tags),
            is_big_endian_bigtiff=start == TIFF_STARTS[-1],
            has_crs=_GEO_KEYS in tags,
        )


def _read_tags(file: BinaryFile) -> dict[int, tuple[int, ...]]:
    """Read the tags of the first directory: the values of those that matter here, 0 for the others."""
    file.seek(0)
    start = file.read(16).ljust(16, b"\0")
    order = "<" if start.startswith(b"II") else ">"
    version = struct.unpack_from(f"{order}H", start, 2)[0]
    entry, count_size, offset_code = ("HHI4s", 2, "I") if version == 42 else ("HHQ8s", 8, "Q")
    offset = struct.unpack_from(f"{order}{offset_code}", start, 4 if version == 42 else 8)[0]
    file.seek(offset)
    count = int.from_bytes(file.read(count_size), "little" if order == "<" else "big")
    size = struct.calcsize(f"={entry}")
    entries = file.read(min(count, _MAX_TAGS) * size)
    tags: dict[int, tuple[int, ...]] = {}
    for tag, kind, num_values, inline in struct.iter_unpack(
        f"{order}{entry}", entries[: len(entries) // size * size]
    ):
        is_readable = tag in _VALUE_TAGS and kind in _VALUE_CODES and 0 < num_values <= _MAX_VALUES
        if is_readable or tag not in _BLOCK_TAGS:
            values = _read_values(file, order, kind, num_values, inline, offset_code) if is_readable else (0,)
            tags.setdefault(tag, values)
    return tags


def _read_values(
    file: BinaryFile, order: str, kind: int, num_values: int, inline: bytes, offset_code: str
) -> tuple[int, ...]:
    """Read the values of a tag, which are in its entry if they fit, else where it points to."""
    layout = f"{order}{num_values}{_VALUE_CODES[kind]}"
    size = struct.calcsize(layout)
    if size > len(inline):
        file.seek(struct.unpack(f"{order}{offset_code}", inline)[0])
        inline = file.read(size)
    return struct.unpack(layout, inline[:size]) if len(inline) >= size else (0,)


def _has_absent_blocks(tags: Mapping[int, tuple[int, ...]]) -> bool:
    """Check whether a strip or tile has neither a place in the file nor a size."""
    return any(
        (0, 0) in zip(tags.get(offsets, ()), tags.get(sizes, ()), strict=False)
        for offsets, sizes in ((_STRIP_OFFSETS, _STRIP_SIZES), (_TILE_OFFSETS, _TILE_SIZES))
    )


def has_rasterio() -> bool:
    """Check whether rasterio is installed (the extra `tiff`)."""
    return find_spec("rasterio") is not None


class TiffReader:
    """A TIFF of which only the requested window is read, reduced ones from its overviews if it has any.

    Args:
        image: the file, on disk or in memory.
        header: of it.
        spec: how image files become pixels.

    Attributes:
        width: pixels, in the orientation that the annotations refer to.
        height: pixels, in the same orientation.
        is_windowed: whether it is too large to be read whole, and can be read in windows.

    Raises:
        ImageError: if it has values or bands that cannot be read as RGB, or not as configured.
    """

    def __init__(self, image: EncodedImage, header: TiffHeader, spec: ReadSpec) -> None:
        self._image, self._spec = image, spec
        self._orientation = header.orientation if spec.exif_orientation == "apply" else 1
        self._stored = Sides(header.width, header.height)
        self.width, self.height = self._stored
        if self._orientation in SIDE_SWAPPING:
            self.width, self.height = self.height, self.width
        self._is_inverted = header.photometric == _MIN_IS_WHITE
        with naming_errors(self._image.name), open_tiff(image) as file:
            self._check_layout(file, header)
            self._palette = _palette_of(file, image.name)
            if header.photometric == _PALETTE and self._palette is None:
                raise ImageError(
                    f"{image.name}: cannot be read as an image (its palette is absent or damaged)"
                )
            self.is_windowed = header.is_large and header.is_windowable and self._palette is None
            self._bands = self._select_bands(file)
            self._nodata = [file.nodatavals[band] for band in self._bands]
            if self._palette is None:
                for band in self._bands:
                    check_intensity(np.dtype(file.dtypes[band]), spec, name=image.name)

    def largest_reduction(self, limit: int) -> int:
        """See `ImageReader`: the limit, except that colours of a palette cannot be averaged by number."""
        return limit if self._palette is None else 1

    def read(self, window: tuple[int, int, int, int], *, reduction: int = 1) -> UInt8[np.ndarray, "h w 3"]:
        """See `ImageReader`."""
        x1, y1, x2, y2 = window
        width, height = max((x2 - x1) // reduction, 1), max((y2 - y1) // reduction, 1)
        whole = (x1, y1, min(x1 + width * reduction, x2), min(y1 + height * reduction, y2))
        with naming_errors(self._image.name), open_tiff(self._image) as file:
            values = self._read_stored(file, whole, Sides(width, height))
        pixels = orient(self._colors(values), self._orientation)
        # The remainder of a row or column is less than a reduced pixel: repeat the last one.
        missing = Sides(-(-(x2 - x1) // reduction) - width, -(-(y2 - y1) // reduction) - height)
        if missing == (0, 0):
            return pixels
        return np.pad(pixels, ((0, missing.height), (0, missing.width), (0, 0)), mode="edge")

    def read_whole(self) -> UInt8[np.ndarray, "h w 3"]:
        """Read all pixels."""
        return self.read((0, 0, self.width, self.height))

    def _read_stored(
        self, file: Any, window: tuple[int, int, int, int], sides: Sides
    ) -> Shaped[np.ndarray, "h w c"]:
        """Read the values of the bands in a window, before the orientation is applied to them."""
        from rasterio.enums import Resampling
        from rasterio.windows import Window

        x1, y1, x2, y2 = _to_stored(window, self._stored, self._orientation)
        hw = sides.hw if self._orientation not in SIDE_SWAPPING else (sides.width, sides.height)
        bands = file.read(
            [band + 1 for band in self._bands],
            window=Window(x1, y1, x2 - x1, y2 - y1),
            out_shape=(len(self._bands), *hw),
            resampling=Resampling.average,
        )
        return np.moveaxis(bands, 0, 2)

    def _colors(self, values: Shaped[np.ndarray, "h w c"]) -> UInt8[np.ndarray, "h w 3"]:
        """Convert the values of the bands to RGB; pixels without data are black."""
        if self._palette is not None:
            return self._palette[values[..., 0]]
        pixels = map_intensity(values, self._spec, name=self._image.name)
        if self._is_inverted:
            pixels = 255 - pixels
        if None not in self._nodata:
            absent = [
                np.isnan(values[..., i]) if np.isnan(nodata) else values[..., i] == nodata
                for i, nodata in enumerate(self._nodata)
            ]
            pixels = np.where(np.all(absent, axis=0)[..., None], np.uint8(0), pixels)
        return np.ascontiguousarray(pixels)

    def _select_bands(self, file: Any) -> list[int]:
        """Return the indices of the bands to read; without a setting, those that the file marks as colours."""
        kinds = [kind.name for kind in file.colorinterp]
        if self._spec.bands is None and file.count in (3, 4) and {"red", "green", "blue"} <= set(kinds):
            return [kinds.index(color) for color in ("red", "green", "blue")]
        names = [
            description or (None if kind in ("undefined", "gray") else kind)
            for description, kind in zip(file.descriptions, kinds, strict=True)
        ]
        is_grey = file.count == 2 and kinds[1] == "alpha"
        return select_bands(file.count, self._spec, name=self._image.name, names=names, is_grey=is_grey)

    def _check_layout(self, file: Any, header: TiffHeader) -> None:
        """Refuse what GDAL does not read as colours, and what does not fit into memory."""
        name = self._image.name
        if (file.width, file.height) != (header.width, header.height):
            raise ImageError(
                f"{name}: cannot be read as an image (it claims {header.width}x{header.height} pixels, "
                f"which GDAL reads as {file.width}x{file.height})"
            )
        if not header.has_gdal_colors:
            raise ImageError(
                f"{name}: has {header} of photometric interpretation {header.photometric}, "
                "expected grey, RGB or a palette"
            )
        if min(header.bits) < 8:
            raise ImageError(
                f"{name}: has {min(header.bits)} bits a channel, which cannot be read from {header}"
            )
        bits = sum(np.dtype(dtype).itemsize * 8 for dtype in file.dtypes)
        with self._image.open() as content:
            num_bytes = content.seek(0, os.SEEK_END)
        check_claim(
            self._image, file.width, file.height, bits=bits, num_bytes=num_bytes, limit=_MAX_COMPRESSION
        )
        block = max(height * width for height, width in file.block_shapes) * bits // 8
        if header.compression != _UNCOMPRESSED and block > _MAX_BLOCK:
            raise ImageError(
                f"{name}: cannot be read in windows (a tile or strip has {block:,} bytes, expected at most "
                f"{_MAX_BLOCK:,}); convert it with gdal_translate -co TILED=YES"
            )


def _palette_of(file: Any, name: str) -> UInt8[np.ndarray, "n 3"] | None:
    """Return the colours of a palette by their numbers, if there is one; numbers without a colour are black."""
    if file.colorinterp[0].name != "palette":
        return None
    dtype = np.dtype(file.dtypes[0])
    if dtype not in (np.dtype(np.uint8), np.dtype(np.uint16)):
        raise ImageError(f"{name}: has a palette for values of type {dtype}, expected uint8 or uint16")
    colors = np.zeros((np.iinfo(dtype).max + 1, 3), dtype=np.uint8)
    for number, color in file.colormap(1).items():
        colors[number] = color[:3]
    return colors


def _to_stored(
    window: tuple[int, int, int, int], stored: Sides, orientation: int
) -> tuple[int, int, int, int]:
    """Return where the pixels of a window of the oriented image are in the image as stored, xyxy."""
    x1, y1, x2, y2 = window
    if orientation in SIDE_SWAPPING:
        x1, y1, x2, y2 = y1, x1, y2, x2
    if orientation in (2, 3, 7, 8):
        x1, x2 = stored.width - x2, stored.width - x1
    if orientation in (3, 4, 6, 7):
        y1, y2 = stored.height - y2, stored.height - y1
    return x1, y1, x2, y2


@contextmanager
def open_tiff(image: EncodedImage) -> Iterator[Any]:
    """Open a TIFF with rasterio: a file once for each process and thread, content in memory each time."""
    import rasterio
    from rasterio.io import MemoryFile

    _ignore_undecodable_messages()
    # GDAL's own errors say more than those that its libtiff would print.
    with rasterio.Env(GDAL_CACHEMAX=_GDAL_CACHE), collect_errors():
        data = image.local_data
        if isinstance(data, Path) and _is_utf_8(data):
            stat = data.stat()
            yield _cached_tiff((os.getpid(), get_ident()), data, stat.st_size, stat.st_mtime_ns)
        else:
            with MemoryFile(image.read(), filename="image.tif") as memory, _opened(memory.name) as file:
                yield file


@cache
def _ignore_undecodable_messages() -> None:
    """Keep Python from printing a traceback where rasterio cannot log a message of GDAL that is not UTF-8."""
    report = sys.unraisablehook

    def report_others(unraisable: "sys.UnraisableHookArgs") -> None:
        is_message = isinstance(unraisable.exc_value, UnicodeDecodeError)
        if not (is_message and "rasterio._env" in str(unraisable.object)):
            report(unraisable)

    sys.unraisablehook = report_others


def _is_utf_8(path: Path) -> bool:
    """Check whether a path is UTF-8, as GDAL's are."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


@lru_cache(_MAX_OPEN_TIFFS)
def _cached_tiff(thread: tuple[int, int], path: Path, size: int, modified: int) -> Any:
    return _opened(os.path.abspath(path))


def _opened(name: str) -> Any:
    import rasterio

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        return rasterio.open(name, driver="GTiff")
