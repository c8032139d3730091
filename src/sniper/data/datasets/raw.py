"""The annotations of any format as they were read: the value between the readers of formats and the checks."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int64, Shaped

from sniper.data.datasets.dataset import Category


@dataclass(frozen=True, kw_only=True, eq=False)
class RawDataset:
    """Categories, images and boxes as a reader found them: of the right types, but not checked further.

    Attributes:
        path: the annotation file or folder, for messages.
        image_root: folder that the file names are relative to.
        categories: in any order; annotations refer to them by index.
        image_ids: (m,) int64, or text where the format has text.
        file_names: (m,) text, relative to the image root.
        widths: (m,) of the images, pixels; 0 where the annotations do not have them.
        heights: (m,) of the images, pixels; 0 where the annotations do not have them.
        image_indices: (n,) the image of each box, as an index.
        category_indices: (n,) the category of each box, as an index.
        boxes: (n, 4) xyxy, image frame, pixels, as in the file: not clipped, perhaps without extent or not finite.
        is_crowd: (n,) whether each box is a crowd or a region to ignore.
        areas: (n,) of the objects, square image pixels; NaN where the file has none.
        name_image: returns the name of an image for messages, by index, such as `image 139`.
        name_box: returns the name of a box for messages, by index, such as `annotation 12 of image 139`
            or `labels/a.txt, line 3`.
        warnings: of the reader, one line for each kind.
    """

    path: Path
    image_root: Path
    categories: tuple[Category, ...]
    image_ids: Shaped[np.ndarray, " m"]
    file_names: Shaped[np.ndarray, " m"]
    widths: Int64[np.ndarray, " m"]
    heights: Int64[np.ndarray, " m"]
    image_indices: Int64[np.ndarray, " n"]
    category_indices: Int64[np.ndarray, " n"]
    boxes: Float[np.ndarray, "n 4"]
    is_crowd: Bool[np.ndarray, " n"]
    areas: Float[np.ndarray, " n"]
    name_image: Callable[[int], str]
    name_box: Callable[[int], str]
    warnings: tuple[str, ...] = ()
