"""A checked data set in memory: categories, images and boxes as flat arrays."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Int32, Int64, Shaped, UInt8

from sniper.geometry.boxes import Sides, ragged_rows, to_xywh
from sniper.geometry.masks import MaskArrays


@dataclass(frozen=True, kw_only=True)
class Category:
    """One class of objects.

    Attributes:
        category_id: as in the file; text where the file's ids are text.
        name: human-readable.
    """

    category_id: int | str
    name: str


@dataclass(frozen=True, kw_only=True)
class DatasetIdentity:
    """What identifies the content of a data set, wherever its files are.

    Attributes:
        categories: by label, in the order of their ids.
        digest: SHA-256 of images, boxes and category ids, as hex; see `Dataset.digest`.
    """

    categories: tuple[Category, ...]
    digest: str


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageRecord:
    """The facts of one image.

    Attributes:
        image_id: as in the file; text where the file's ids are text.
        file_name: as in the file, relative to the image root.
        path: of the image file; `open_record` opens it.
        image_root: folder that it must be in.
        follow_links: whether it may be a link that leaves that folder.
        width: pixels, in the orientation that the annotations refer to.
        height: pixels, in the same orientation.
        boxes: (n, 4) xyxy, image frame, clipped to the image. May be empty.
        labels: (n,) 0..C-1.
        is_crowd: (n,) whether each box is a crowd rather than one object.
        masks: of the n objects, image frame; None where the data set has no masks.
    """

    image_id: int | str
    file_name: str
    path: Path
    image_root: Path
    follow_links: bool = False
    width: int
    height: int
    boxes: Float[np.ndarray, "n 4"]
    labels: Int64[np.ndarray, " n"]
    is_crowd: Bool[np.ndarray, " n"]
    masks: MaskArrays | None = None

    @property
    def sides(self) -> Sides:
        """Width and height, pixels."""
        return Sides(self.width, self.height)


@dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """A checked data set as flat arrays, which loader processes share instead of copying.

    Images are in the order of the file, and so are the boxes of each image. The boxes of image `i` are
    `boxes[offsets[i]:offsets[i + 1]]`.

    Attributes:
        path: the annotation file.
        image_root: folder that the file names are relative to.
        categories: by label, in the order of their ids.
        image_ids: (m,) as in the file: int64, or text where its ids are text.
        file_names: (m,) text, as in the file.
        image_paths: (m,) text, of the image files relative to the image root: `file_names`, or corrected ones.
        follow_links: whether image files may be links that leave the image root.
        widths: (m,) of the images, pixels.
        heights: (m,) of the images, pixels.
        offsets: (m + 1,) where the boxes of each image start; the last is the number of boxes.
        boxes: (n, 4) float64 xyxy, image frame, clipped to the image. May be empty.
        labels: (n,) 0..C-1.
        is_crowd: (n,) whether each box is a crowd rather than one object.
        areas: (n,) of the objects, square image pixels: as in the file, or of the box where the file has none.
        masks: of the n objects, image frame; None where no object has a mask, or masks are not read.
        num_dropped: number of boxes that could not be used, and were left out.
        left_out: one line for each image that is not in the data set, as its file cannot be read.
        warnings: what was corrected or cannot be used, one line for each kind.
    """

    path: Path
    image_root: Path
    categories: tuple[Category, ...]
    image_ids: Shaped[np.ndarray, " m"]
    file_names: Shaped[np.ndarray, " m"]
    image_paths: Shaped[np.ndarray, " m"]
    follow_links: bool = False
    widths: Int32[np.ndarray, " m"]
    heights: Int32[np.ndarray, " m"]
    offsets: Int64[np.ndarray, " m_plus_1"]
    boxes: Float[np.ndarray, "n 4"]
    labels: Int64[np.ndarray, " n"]
    is_crowd: Bool[np.ndarray, " n"]
    areas: Float[np.ndarray, " n"]
    masks: MaskArrays | None = None
    num_dropped: int = 0
    left_out: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> ImageRecord:
        boxes = self.boxes_of(index)
        file_name = str(self.file_names[index])
        return ImageRecord(
            image_id=self.image_ids[index].item(),
            file_name=file_name,
            path=self.image_root / str(self.image_paths[index]),
            image_root=self.image_root,
            follow_links=self.follow_links,
            width=int(self.widths[index]),
            height=int(self.heights[index]),
            boxes=self.boxes[boxes],
            labels=self.labels[boxes],
            is_crowd=self.is_crowd[boxes],
            masks=None if self.masks is None else self.masks.select(boxes),
        )

    def __iter__(self) -> Iterator[ImageRecord]:
        return (self[index] for index in range(len(self)))

    def boxes_of(self, index: int) -> slice:
        """Return the rows of an image's boxes in the flat arrays.

        Raises:
            IndexError: if there is no such image; indices start at 0 and are not counted from the end.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        return slice(int(self.offsets[index]), int(self.offsets[index + 1]))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of images, boxes and category ids, as hex: equal for data sets that train a detector equally."""
        digest = hashlib.sha256()
        category_ids = np.array(
            [category.category_id for category in self.categories] or np.zeros(0, np.int64)
        )
        ids = [
            values if values.dtype == np.int64 else _encode(values)
            for values in (category_ids, self.image_ids)
        ]
        images = (*ids, self.widths, self.heights, self.offsets)
        masks = () if self.masks is None else tuple(vars(self.masks).values())
        for array in (*images, self.boxes, self.labels, self.is_crowd, _encode(self.file_names), *masks):
            digest.update(f"{array.dtype.name}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False).data)
        return digest.hexdigest()

    @property
    def identity(self) -> DatasetIdentity:
        """What identifies the content of this data set."""
        return DatasetIdentity(categories=self.categories, digest=self.digest)

    def select(self, indices: Int[np.ndarray, " k"]) -> "Dataset":
        """Return a data set of some of the images, with their boxes.

        Args:
            indices: (k,) of the images, in the new order. May be empty.
        """
        offsets, rows = ragged_rows(self.offsets, indices)
        return Dataset(
            path=self.path,
            image_root=self.image_root,
            categories=self.categories,
            image_ids=self.image_ids[indices],
            file_names=self.file_names[indices],
            image_paths=self.image_paths[indices],
            follow_links=self.follow_links,
            widths=self.widths[indices],
            heights=self.heights[indices],
            offsets=offsets,
            boxes=self.boxes[rows],
            labels=self.labels[rows],
            is_crowd=self.is_crowd[rows],
            areas=self.areas[rows],
            masks=None if self.masks is None else self.masks.select(rows),
            num_dropped=self.num_dropped,
            left_out=self.left_out,
            warnings=self.warnings,
        )

    def to_coco(self) -> dict[str, Any]:
        """Return the data set as a COCO object: the content as loaded, with annotation ids from 1."""
        images = zip(
            self.image_ids.tolist(),
            self.file_names.tolist(),
            self.widths.tolist(),
            self.heights.tolist(),
            strict=True,
        )
        annotations = zip(
            np.repeat(self.image_ids, np.diff(self.offsets)).tolist(),
            self.labels.tolist(),
            to_xywh(self.boxes).tolist(),
            self.areas.tolist(),
            self.is_crowd.tolist(),
            [None] * len(self.boxes) if self.masks is None else self.masks.to_coco(),
            strict=True,
        )
        return {
            "images": [
                {"id": image_id, "file_name": file_name, "width": width, "height": height}
                for image_id, file_name, width, height in images
            ],
            "annotations": [
                {
                    "id": annotation_id,
                    "image_id": image_id,
                    "category_id": self.categories[label].category_id,
                    "bbox": box,
                    "area": area,
                    "iscrowd": int(is_crowd),
                    **({} if mask is None else {"segmentation": mask}),
                }
                for annotation_id, (image_id, label, box, area, is_crowd, mask) in enumerate(
                    annotations, start=1
                )
            ],
            "categories": [
                {"id": category.category_id, "name": category.name} for category in self.categories
            ],
        }


def _encode(text: Shaped[np.ndarray, " n"]) -> UInt8[np.ndarray, " k"]:
    """Return the bytes of an array of text, independent of the width of its type."""
    return np.frombuffer(json.dumps(text.tolist()).encode(), np.uint8)
