"""Images in any form that a caller has them in, opened for reading."""

import os
import sys
from typing import TYPE_CHECKING, Any, Literal, Union, get_args

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from sniper.data.datasets import ImageRecord
from sniper.data.images.files import ArrayImageReader, ImageReader, load_pillow_image, open_image
from sniper.data.images.pixels import to_rgb
from sniper.data.reader import open_record
from sniper.data.spec import ReadSpec
from sniper.files import expand_path

if TYPE_CHECKING:
    import torch

ImageSource = Union[
    str, os.PathLike[str], bytes, Image.Image, np.ndarray, "torch.Tensor", ImageReader, ImageRecord
]
"""Path of an image file, content of one, Pillow image, array (h, w), (h, w, 1), (h, w, 3) or (h, w, 4), tensor (h, w),
(1, h, w), (3, h, w) or (4, h, w), or record of a data set."""

Channels = Literal["RGB", "BGR"]
"""The order of the colours in arrays and tensors."""

_LAYOUTS = {
    "array": "(height, width) or (height, width, channels)",
    "tensor": "(height, width) or (channels, height, width)",
}


def open_source(source: ImageSource, spec: ReadSpec, *, channels: Channels = "RGB") -> ImageReader:
    """Open an image: in every form, the same pixels are mapped to 8 bits, oriented and ordered in the same way.

    Args:
        source: the image. A fourth channel of an array or tensor is dropped; pixels that a masked array masks in all
            channels are black. A Pillow image is oriented by the EXIF
            data that it still has; `ImageOps.exif_transpose` removes the orientation from them.
        spec: how images become pixels.
        channels: order of the colours in an array or tensor; files and Pillow images state theirs.

    Raises:
        ImageError: if a file, or the content of one, cannot be read, or an image has more than 8 bits a channel and no
            intensity range is configured.
        ValueError: if an array or tensor has another type or shape.
        TypeError: if it is none of these.
    """
    if channels not in get_args(Channels):
        raise ValueError(f"channels must be RGB or BGR, not {channels!r}")
    if isinstance(source, str | os.PathLike | bytes):
        return open_image(source if isinstance(source, bytes) else expand_path(source), spec)
    if isinstance(source, ImageRecord):
        return open_record(source, spec)
    if isinstance(source, Image.Image):
        return ArrayImageReader(load_pillow_image(source, spec))
    if isinstance(source, np.ndarray) or _is_tensor(source):
        return ArrayImageReader(_convert(source, spec, channels))
    if isinstance(source, ImageReader):
        return source
    raise TypeError(
        "an image must be a path, bytes, a Pillow image, an array, a tensor or a record of a data set, "
        f"not {type(source).__name__}"
    )


def _is_tensor(source: object) -> bool:
    """Check for a tensor without importing torch: where there is one, it is imported."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(source, torch.Tensor)


def _convert(source: Any, spec: ReadSpec, channels: Channels) -> UInt8[np.ndarray, "h w 3"]:
    """Convert an array, or a tensor with its channels first, to RGB."""
    is_tensor = _is_tensor(source)
    noun = "tensor" if is_tensor else "array"
    pixels = _to_array(source) if is_tensor else source
    image = pixels[..., None] if pixels.ndim == 2 else pixels
    has_channels = image.ndim == 3 and (spec.bands is not None or image.shape[2] in (1, 3, 4))
    if not has_channels or pixels.dtype.kind not in "uif":
        raise ValueError(
            f"an image {noun} must be uint8, or another type of number with data.read.intensity_range, of "
            f"{_LAYOUTS[noun]} with 1, 3 or 4 channels, not {source.dtype} of {tuple(source.shape)}"
        )
    if 0 in image.shape:
        raise ValueError(f"an image must have pixels, not a shape of {tuple(source.shape)}")
    if channels == "BGR" and image.shape[2] != 1:
        if image.shape[2] not in (3, 4):
            raise ValueError(f"channels: BGR is of 3 or 4 channels, not {image.shape[2]}")
        image = image[..., [2, 1, 0, *range(3, image.shape[2])]]
    rgb = to_rgb(np.ma.getdata(image), spec, name=f"image {noun}")
    if isinstance(image, np.ma.MaskedArray):
        rgb[np.ma.getmaskarray(image).all(axis=2)] = 0
    return rgb


def _to_array(tensor: "torch.Tensor") -> np.ndarray:
    """Return the values of a tensor, channels last."""
    import torch

    if tensor.is_meta or tensor.layout != torch.strided:
        raise ValueError(
            f"an image tensor must be dense and have values, not {tensor.layout} on {tensor.device}"
        )
    values = tensor.detach().cpu()
    if values.is_floating_point() and values.dtype not in (torch.float16, torch.float32, torch.float64):
        values = values.float()  # NumPy has no such type
    return values.movedim(0, -1).numpy() if values.ndim == 3 else values.numpy()
