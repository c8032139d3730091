"""Images in any form that a caller has them in, opened for reading."""

import os
from pathlib import Path
from tempfile import NamedTemporaryFile

import numpy as np
import torch
from PIL import Image

from sniper.data.images.files import ArrayImageReader, ImageReader, load_image, open_image
from sniper.data.spec import ReadSpec
from sniper.errors import ImageError

ImageSource = str | os.PathLike[str] | bytes | Image.Image | np.ndarray | torch.Tensor | ImageReader
"""Path of an image file, content of one, Pillow image, uint8 array (h, w, 3) RGB, or uint8 tensor (3, h, w) RGB."""

_SUFFIXES = {  # by the first bytes of a file whose reading depends on its format
    b"\x89PNG": ".png",
    b"II*\0": ".tif",
    b"MM\0*": ".tif",
    b"II+\0": ".tif",
    b"MM\0+": ".tif",
}


def open_source(source: ImageSource, spec: ReadSpec) -> ImageReader:
    """Open an image.

    Args:
        source: the image. Pillow images, arrays and tensors are taken as they are: EXIF orientation and
            `intensity_range` apply to files alone.
        spec: how files are read.

    Raises:
        ImageError: if a file, or the content of one, cannot be read.
        ValueError: if an array or tensor has another type or shape, or a Pillow image has more than 8 bits a channel.
    """
    if isinstance(source, str | os.PathLike):
        return open_image(Path(source), spec)
    if isinstance(source, bytes):
        return ArrayImageReader(_decode(source, spec))
    if isinstance(source, Image.Image):
        if source.mode[0] in "IF":
            raise ValueError(f"a Pillow image must have 8 bits a channel, not mode {source.mode}")
        return ArrayImageReader(np.asarray(source.convert("RGB")))
    if isinstance(source, torch.Tensor):
        if source.dtype != torch.uint8 or source.ndim != 3 or source.shape[0] != 3:
            raise ValueError(
                f"an image tensor must be uint8 of (3, height, width), not {source.dtype} of {tuple(source.shape)}"
            )
        return ArrayImageReader(_with_pixels(source.permute(1, 2, 0).contiguous().cpu().numpy()))
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3:
            raise ValueError(
                f"an image array must be uint8 of (height, width, 3), not {source.dtype} of {source.shape}"
            )
        return ArrayImageReader(_with_pixels(source))
    return source


def _with_pixels(pixels: np.ndarray) -> np.ndarray:
    """Reject an image without pixels."""
    if 0 in pixels.shape:
        raise ValueError(f"an image must have pixels, not a shape of {pixels.shape}")
    return pixels


def _decode(content: bytes, spec: ReadSpec) -> np.ndarray:
    """Decode the content of an image file exactly as the file would be."""
    with NamedTemporaryFile(suffix=_SUFFIXES.get(content[:4], "")) as file:
        file.write(content)
        file.flush()
        try:
            return load_image(Path(file.name), spec)
        except ImageError as error:
            raise ImageError(str(error).replace(file.name, "image bytes")) from error
