"""Turn decoded pixels of any type into 8-bit RGB: bands, intensity, orientation."""

import math
from collections.abc import Sequence

import cv2
import numpy as np
from jaxtyping import Shaped, UInt8

from sniper.data.spec import ReadSpec
from sniper.errors import ImageError, counted

_BLOCK = 4_000_000  # values that are mapped at once, to bound the memory for their floating-point copies


def to_rgb(pixels: Shaped[np.ndarray, "h w c"], spec: ReadSpec, *, name: str) -> UInt8[np.ndarray, "h w 3"]:
    """Convert pixels to 8-bit RGB.

    Args:
        pixels: (h, w, 1) grey, (h, w, 3) RGB, (h, w, 4) RGB and a band that is dropped, such as alpha; any number of
            bands where `spec.bands` selects some. Integers or floating-point numbers.
        spec: bands, and the intensity range of values other than uint8.
        name: of the image, for errors.

    Raises:
        ImageError: if the values are not uint8 and no intensity range is configured, or a configured band is missing.
    """
    bands = select_bands(pixels.shape[2], spec, name=name)
    return map_intensity(pixels[..., bands], spec, name=name)


def map_intensity(
    pixels: Shaped[np.ndarray, "h w c"], spec: ReadSpec, *, name: str
) -> UInt8[np.ndarray, "h w 3"]:
    """Convert (h, w, 1) grey or (h, w, 3) RGB to 8-bit RGB; see `to_rgb`."""
    check_intensity(pixels.dtype, spec, name=name, pixels=pixels)
    if pixels.dtype != np.uint8:
        assert spec.intensity_range is not None
        pixels = _to_8_bits(pixels, spec.intensity_range)
    return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))


def select_bands(
    num_bands: int, spec: ReadSpec, *, name: str, names: Sequence[str | None] = (), is_grey: bool = False
) -> list[int]:
    """Return the indices, from 0, of the bands that are read: one for grey, three for RGB.

    Args:
        num_bands: of the image.
        spec: its `bands` are read; by default the first three of 3 or 4, or the only one.
        name: of the image, for errors.
        names: of its bands, for errors.
        is_grey: whether all bands but the first are known to be alpha.

    Raises:
        ImageError: if there is no band of a configured number, or the default does not say which to read.
    """
    if spec.bands is not None:
        if max(spec.bands) > num_bands:
            raise ImageError(
                f"{name}: has {counted(num_bands, 'band')}, but data.read.bands selects band {max(spec.bands)}"
            )
        return [band - 1 for band in spec.bands]
    if num_bands == 1 or is_grey:
        return [0]
    if num_bands in (3, 4):
        return [0, 1, 2]
    known = ", ".join(f"{i} {band}" for i, band in enumerate(names, start=1) if band)
    example = [1] if num_bands == 2 else [3, 2, 1]
    raise ImageError(
        f"{name}: has {counted(num_bands, 'band')}{f' ({known})' if known else ''}; select one for grey or three for "
        f"red, green and blue, counted from 1, for example data.read.bands: {example}"
    )


def check_intensity(
    dtype: np.dtype, spec: ReadSpec, *, name: str, pixels: Shaped[np.ndarray, "h w c"] | None = None
) -> None:
    """Check that values of a type can be mapped to 8 bits.

    Args:
        dtype: of the values.
        spec: with the intensity range.
        name: of the image, for errors.
        pixels: the values, if they are read; for an example of a range in errors.

    Raises:
        ImageError: if they are complex, or not uint8 while no intensity range is configured.
    """
    if dtype.kind not in "iuf":
        raise ImageError(f"{name}: has values of type {dtype}, expected integers or floating-point numbers")
    if dtype != np.uint8 and spec.intensity_range is None:
        raise range_required(name, str(dtype), example=_example_range(dtype, pixels))


def _example_range(dtype: np.dtype, pixels: Shaped[np.ndarray, "h w c"] | None) -> tuple[float, float]:
    """Return the range of a type, 0 to 1 for floating-point values; or of the values that are beyond it."""
    if dtype.kind in "iu":
        return (np.iinfo(dtype).min, np.iinfo(dtype).max) if dtype.itemsize <= 2 else (0, 65_535)
    finite = np.zeros(0) if pixels is None else pixels[np.isfinite(pixels)]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    if low >= 0 and high <= 1:
        return 0, 1
    return math.floor(low), max(math.ceil(high), math.floor(low) + 1)


def range_required(name: str, depth: str, *, example: tuple[float, float] = (0, 65_535)) -> ImageError:
    """Return the error for an image that cannot be mapped to 8 bits without an intensity range."""
    excess = "has signed values" if depth == "int8" else "has more than 8 bits a channel"
    return ImageError(
        f"{name}: {excess} ({depth}); specify the black and the white value, "
        f"for example data.read.intensity_range: [{example[0]}, {example[1]}]"
    )


def orient(pixels: UInt8[np.ndarray, "h w 3"], orientation: int) -> UInt8[np.ndarray, "m n 3"]:
    """Apply an EXIF orientation (1 to 8) to decoded pixels."""
    match orientation:
        case 2:
            oriented = cv2.flip(pixels, 1)
        case 3:
            oriented = cv2.rotate(pixels, cv2.ROTATE_180)
        case 4:
            oriented = cv2.flip(pixels, 0)
        case 5:
            oriented = cv2.transpose(pixels)
        case 6:
            oriented = cv2.rotate(pixels, cv2.ROTATE_90_CLOCKWISE)
        case 7:
            oriented = cv2.flip(cv2.rotate(pixels, cv2.ROTATE_90_CLOCKWISE), 0)
        case 8:
            oriented = cv2.rotate(pixels, cv2.ROTATE_90_COUNTERCLOCKWISE)
        case _:
            return pixels
    return np.asarray(oriented, dtype=np.uint8)


def _to_8_bits(
    pixels: Shaped[np.ndarray, "h w c"], intensity_range: tuple[float, float]
) -> UInt8[np.ndarray, "h w c"]:
    """Map values of any depth linearly to 0..255; NaN becomes black."""
    if pixels.dtype.kind in "iu" and pixels.dtype.itemsize <= 2:
        unsigned = np.dtype(f"u{pixels.dtype.itemsize}")
        every_value = np.arange(np.iinfo(unsigned).max + 1, dtype=unsigned).view(
            pixels.dtype.newbyteorder("=")
        )
        indices = pixels.astype(pixels.dtype.newbyteorder("="), copy=False).view(unsigned)
        return _map_linearly(every_value, intensity_range)[indices]
    levels = np.empty(pixels.shape, dtype=np.uint8)
    rows = max(_BLOCK // (pixels.shape[1] * pixels.shape[2]), 1)
    for start in range(0, len(pixels), rows):
        levels[start : start + rows] = _map_linearly(pixels[start : start + rows], intensity_range)
    return levels


def _map_linearly(values: np.ndarray, intensity_range: tuple[float, float]) -> np.ndarray:
    black, white = intensity_range
    levels = (values.astype(np.float64) - black) * (255 / (white - black))
    return np.rint(np.clip(np.nan_to_num(levels, nan=0.0), 0, 255)).astype(np.uint8)
