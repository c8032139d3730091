"""Image files on disk and in memory: opened with Pillow, refused by name where their header cannot be true."""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from PIL import Image, UnidentifiedImageError

from sniper.data.images.formats import FORMATS, has_heif
from sniper.errors import ImageError, describe_os_error
from sniper.files import describe_other_content, open_regular
from sniper.remote import is_remote

_MAX_NAME = 240  # characters of a file name in an error
_MAX_REASON = 300  # characters of a decoder's error in ours

_CHECKED_BYTES = 64_000_000  # of decoded RGB; smaller images harm nothing, whatever their header says
_MAX_COMPRESSION = {"raw": 2, "BMP": 256, "JPEG": 2_000, "MPO": 2_000, "PPM": 8, "QOI": 256, "TGA": 256}
_MAX_OTHER_COMPRESSION = 10_000  # deflate reaches 1032, with 8 pixels in a byte
_LARGE_BYTES = 256_000_000  # of pixels as stored, from which only the compression of real images is accepted
_MAX_LARGE_COMPRESSION = 500

_PILLOW_FORMATS = tuple(name for name in FORMATS if name != "HEIF")
_HEIF_HEADER = 1_000_000  # bytes, within which the items are listed
_HEIF_ITEM = re.compile(  # box, version, flags, id of 2 or 4 bytes, protection; then the type
    rb"infe(?:\x02.{3}.{2}.{2}(.{4})|\x03.{3}.{4}.{2}(.{4}))", re.DOTALL
)
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")

TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""First bytes of TIFF and BigTIFF files."""

BinaryFile = io.BufferedReader | io.BytesIO
"""An open image file, on disk or in memory."""


@contextmanager
def naming_errors(name: str) -> Iterator[None]:
    """Turn any error of a decoder into an `ImageError` that names the image."""
    try:
        yield
    except ImageError:
        raise
    except Exception as error:
        raise ImageError(f"{name}: cannot be read as an image ({_reason(error)})") from error


@dataclass(frozen=True)
class EncodedImage:
    """The content of an image file.

    Attributes:
        data: path of the file, perhaps remote, or its content.
    """

    data: Path | bytes

    @property
    def local_data(self) -> Path | bytes:
        """The path of the file on disk, for a remote one in the cache, or its content.

        Raises:
            OSError: if a remote file cannot be read.
        """
        return self.data.fetch(is_fixed=True) if is_remote(self.data) else self.data

    @property
    def name(self) -> str:
        """The name of the file in errors; the middle of a long one is left out."""
        if isinstance(self.data, bytes):
            return "image bytes"
        name = str(self.data)
        if len(name) <= _MAX_NAME:
            return name
        return f"{name[: _MAX_NAME // 2]}...{name[-_MAX_NAME // 2 :]}"

    def open(self) -> BinaryFile:
        """Open the content for reading.

        Raises:
            OSError: if it cannot be opened, or is no regular file.
        """
        if isinstance(self.data, bytes):
            return io.BytesIO(self.data)
        if is_remote(self.data):
            return self.data.open_binary(is_fixed=True)
        return open_regular(self.data)

    def read(self) -> bytes:
        """Read the whole content."""
        with self.open() as file:
            return file.read()

    @contextmanager
    def open_pillow(self, *, verifies: bool = False) -> Iterator[Image.Image]:
        """Open the image with Pillow; only its header is read.

        Pillow gets an open file, not its name: it would map a named file into memory, and mapped pixels are wrong once
        Pillow applies an orientation.

        Args:
            verifies: compare the checksums of a PNG first; decoding alone does not.

        Raises:
            ImageError: if it cannot be opened or, later, decoded, or claims more pixels than the file can hold.
        """
        with naming_errors(self.name), self.open() as file, no_pillow_limit():
            num_bytes = file.seek(0, io.SEEK_END)
            if num_bytes == 0:
                raise ImageError(f"{self.name}: cannot be read as an image (it is empty)")
            if verifies and _starts_with(file, b"\x89PNG"):
                with self._opened(file) as image:
                    image.verify()
            with self._opened(file) as image:
                self._check_claim(image, num_bytes)
                yield image

    def _opened(self, file: BinaryFile) -> Image.Image:
        formats = _PILLOW_FORMATS
        if _is_heif(file):
            if not has_heif():
                raise ImageError(f"{self.name}: is a HEIC image: pip install 'sniper-det[heic]'")
            _check_heif_items(file)
            _register_heif()
            formats = ("HEIF",)
        try:
            return Image.open(file, formats=formats)
        except UnidentifiedImageError as error:
            file.seek(0)
            other = describe_other_content(file.read(64))
            if other is not None:
                raise ImageError(f"{self.name}: cannot be read as an image (it is {other})") from error
            raise ImageError(
                f"{self.name}: cannot be read as an image (cannot identify an intact header of {', '.join(FORMATS)})"
            ) from error

    def _check_claim(self, image: Image.Image, num_bytes: int) -> None:
        compression = image.info.get("compression") if image.format == "TIFF" else None
        limit = _MAX_COMPRESSION.get(compression or image.format or "", _MAX_OTHER_COMPRESSION)
        bits = 1 if image.mode == "1" else 8 * len(image.getbands())
        if image.width * image.height * bits // 8 > _LARGE_BYTES:
            limit = min(limit, _MAX_LARGE_COMPRESSION)
        check_claim(self, image.width, image.height, bits=bits, num_bytes=num_bytes, limit=limit)


def has_image_content(path: Path) -> bool:
    """Check by its content whether a file is an image that can be decoded, as far as its header shows."""
    image = EncodedImage(path)
    try:
        with image.open() as file:
            if file.read(4) in TIFF_STARTS:
                return True  # Pillow does not open all that are read
        with image.open_pillow() as opened:
            # Many a file looks like a TGA, which has no signature.
            return opened.format != "TGA" or path.suffix.lower() in FORMATS["TGA"]
    except (ImageError, OSError):
        return False


def check_claim(
    image: EncodedImage, width: int, height: int, *, bits: int, num_bytes: int, limit: int
) -> None:
    """Compare the sides that a header claims with the size of the file.

    Args:
        image: the file, for the error.
        width: pixels, as claimed.
        height: pixels, as claimed.
        bits: of a pixel.
        num_bytes: size of the file.
        limit: how many times larger than the file the decoded pixels may be.

    Raises:
        ImageError: if an encoder would not store an image of so many pixels in so few bytes; images of up to 64 MB as
            RGB are not compared.
    """
    num_pixels = width * height
    if num_pixels * 3 > _CHECKED_BYTES and num_pixels * bits > limit * num_bytes * 8:
        raise ImageError(
            f"{image.name}: cannot be read as an image (it claims {width}x{height} pixels, "
            f"too many for its {num_bytes:,} bytes)"
        )


def _reason(error: BaseException) -> str:
    """Return the text of a decoder's error in one line."""
    while type(error).__module__.startswith("rasterio") and error.__cause__ is not None:
        error = error.__cause__  # "Read failed. See previous exception for details."
    if isinstance(error, OSError) and error.strerror:
        text = describe_os_error(error)  # without the file name, which is in the message already
    elif isinstance(error, MemoryError):
        text = "it does not fit into memory"
    else:
        text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _MAX_REASON else f"{text[:_MAX_REASON]}..."


def _starts_with(file: BinaryFile, signature: bytes) -> bool:
    file.seek(0)
    return file.read(len(signature)) == signature


def _is_heif(file: BinaryFile) -> bool:
    """Check whether a file is a HEIF container of other codecs than AV1, which is Pillow's own AVIF."""
    file.seek(0)
    start = file.read(64).ljust(4, b"\0")
    brands = {start[8:12]} | {start[i : i + 4] for i in range(16, min(len(start), start[3]), 4)}
    return start[4:8] == b"ftyp" and start[8:12] in _HEIF_BRANDS and not brands & {b"avif", b"avis"}


def _check_heif_items(file: BinaryFile) -> None:
    """Refuse items whose type is no text, with which pi-heif 1.4 ends the process.

    Raises:
        OSError: if there are any.
    """
    file.seek(0)
    for item in _HEIF_ITEM.finditer(file.read(_HEIF_HEADER)):
        if not (item[1] or item[2]).isascii():
            raise OSError("it has an item of an unknown type")


def _register_heif() -> None:
    if "HEIF" not in Image.OPEN:
        from pi_heif import register_heif_opener

        register_heif_opener()


_pillow_limit_lock = Lock()
_pillow_limit: list[int | None] = []  # Pillow's limit, once for each image that is open


@contextmanager
def no_pillow_limit() -> Iterator[None]:
    """Open images of any size: `ReadSpec.max_pixels` replaces Pillow's limit, which warns of large images."""
    with _pillow_limit_lock:
        _pillow_limit.append(_pillow_limit[0] if _pillow_limit else Image.MAX_IMAGE_PIXELS)
        Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    finally:
        with _pillow_limit_lock:
            limit = _pillow_limit.pop()
            if not _pillow_limit:
                Image.MAX_IMAGE_PIXELS = limit
