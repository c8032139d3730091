"""The image formats that are decoded, and the suffixes of their files."""

from functools import cache
from importlib.util import find_spec

FORMATS: dict[str, tuple[str, ...]] = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png", ".apng"),
    "TIFF": (".tif", ".tiff", ".gtif", ".gtiff", ".btf", ".tf8", ".ntif"),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    "JPEG2000": (".jp2", ".j2k", ".jpf", ".jpx", ".j2c", ".jpc"),
    "AVIF": (".avif", ".avifs"),
    "HEIF": (".heic", ".heif", ".hif"),
    "QOI": (".qoi",),
    "TGA": (".tga",),  # last: its files have no signature
}
"""Suffixes by the names that Pillow has for the formats. Pillow tries no others: some of its readers start programs."""

EXTRAS = dict.fromkeys(FORMATS["HEIF"], "heic")
"""The extra of the package that decodes files of a suffix, for those that are not always decoded."""


def has_heif() -> bool:
    """Check whether HEIC files can be decoded (the extra `heic`)."""
    return find_spec("pi_heif") is not None


@cache
def has_simplejpeg() -> bool:
    """Check whether JPEG files are decoded by simplejpeg, the extra `jpeg`."""
    return find_spec("simplejpeg") is not None


def image_suffixes() -> frozenset[str]:
    """Return the suffixes, in lower case, of the files that can be decoded here."""
    return frozenset(
        suffix for name, suffixes in FORMATS.items() for suffix in suffixes if name != "HEIF" or has_heif()
    )
