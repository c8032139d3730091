"""Detections and the ground truth they are scored against, with indices in place of the ids of their files."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import hotcoco
import numpy as np
from jaxtyping import Bool, Float, Int, Int64, Shaped

from sniper.data.datasets import Category, Dataset, load_dataset
from sniper.data.datasets.categories import match_categories
from sniper.data.datasets.segmentations import read_segmentations, to_text
from sniper.errors import AnnotationError, DetectionsError, count_and_list, counted
from sniper.evaluation.results import DetectionTable, load_detections, pack_ids, to_id
from sniper.geometry.boxes import from_xywh, to_xywh
from sniper.geometry.masks import MaskArrays

_MAX_LISTED = 20
_MAX_ID = 60  # characters of an id in a message
_MAX_KEYS = 10_000_000  # pairs of image and class that are counted in memory at once
_MAX_SPAN = 1_000_000  # of ids that are looked up in a table, which takes a quarter of the time
_DIGITS = re.compile(r"-?[0-9]{1,19}")  # of at most 64 bits

Results = DetectionTable | Sequence[Mapping[str, Any]] | str | os.PathLike[str]
"""Detections: a table, COCO results, or the path of a results file."""

Truth = Dataset | Mapping[str, Any] | str | os.PathLike[str]
"""Ground truth: a data set, a COCO object, or the path of annotations."""


@dataclass(frozen=True, kw_only=True, eq=False)
class GroundTruth:
    """The objects of many images as flat arrays.

    Attributes:
        image_ids: (m,) int64 or text.
        categories: by label, in the order of their ids.
        image_indices: (n,) the image of each object.
        labels: (n,) 0..C-1.
        boxes: (n, 4) xywh, image frame, pixels. May be empty.
        areas: (n,) of the objects, square image pixels.
        is_crowd: (n,) whether each is a crowd.
        masks: of the objects, image frame; None where there are none.
        sides: (m, 2) width and height of the images, pixels; None where they are not given and there are no masks.
    """

    image_ids: Shaped[np.ndarray, " m"]
    categories: tuple[Category, ...]
    image_indices: Int64[np.ndarray, " n"]
    labels: Int64[np.ndarray, " n"]
    boxes: Float[np.ndarray, "n 4"]
    areas: Float[np.ndarray, " n"]
    is_crowd: Bool[np.ndarray, " n"]
    masks: MaskArrays | None = None
    sides: Int[np.ndarray, "m 2"] | None = None

    @property
    def num_images(self) -> int:
        """Number of images."""
        return len(self.image_ids)

    def sides_of(self, image_indices: Int[np.ndarray, " k"]) -> Int[np.ndarray, "k 2"]:
        """Return (k, 2) width and height of images.

        Raises:
            ValueError: if they are not given.
        """
        if self.sides is None:
            raise ValueError("the sides of the images are not given")
        return self.sides[image_indices]

    def select(self, is_kept: Bool[np.ndarray, " n"]) -> "GroundTruth":
        """Return the same images with some of the objects."""
        names = ("image_indices", "labels", "boxes", "areas", "is_crowd")
        masks = None if self.masks is None else self.masks.select(is_kept)
        return replace(self, **{name: getattr(self, name)[is_kept] for name in names}, masks=masks)

    def select_images(self, indices: Int[np.ndarray, " k"]) -> "GroundTruth":
        """Return some images with their objects, in the order of the indices, which must be distinct."""
        new = self.new_indices(indices)[self.image_indices]
        kept = self.select(new >= 0)
        return replace(
            kept,
            image_ids=self.image_ids[indices],
            image_indices=new[new >= 0],
            sides=None if self.sides is None else self.sides[indices],
        )

    def new_indices(self, indices: Int[np.ndarray, " k"]) -> Int64[np.ndarray, " m"]:
        """Return the index of each image among some of the images; -1 where it is none of them."""
        new = np.full(self.num_images, -1)
        new[indices] = np.arange(len(indices))
        return new

    @classmethod
    def of(cls, truth: Truth) -> "GroundTruth":
        """Convert a data set or a COCO object, or load annotations.

        Raises:
            AnnotationError: if annotations cannot be loaded, or refer to images or categories that are not there.
        """
        if isinstance(truth, Mapping):
            return cls._from_coco(truth)
        dataset = truth if isinstance(truth, Dataset) else load_dataset(truth, has_images=False)
        return cls(
            image_ids=dataset.image_ids,
            categories=dataset.categories,
            image_indices=np.repeat(np.arange(len(dataset)), np.diff(dataset.offsets)),
            labels=dataset.labels,
            boxes=to_xywh(dataset.boxes),
            areas=dataset.areas,
            is_crowd=dataset.is_crowd,
            masks=dataset.masks,
            sides=np.stack([dataset.widths, dataset.heights], axis=1),
        )

    @classmethod
    def _from_coco(cls, coco: Mapping[str, Any]) -> "GroundTruth":
        rows = coco["annotations"]
        categories = sorted(
            (
                Category(category_id=to_id(row["id"]), name=str(row.get("name", row["id"])))
                for row in coco["categories"]
            ),
            key=lambda category: (isinstance(category.category_id, str), category.category_id),
        )
        image_ids = [to_id(image["id"]) for image in coco["images"]]
        boxes = np.array([row["bbox"] for row in rows], dtype=np.float64).reshape(-1, 4)
        sides = [(image.get("width"), image.get("height")) for image in coco["images"]]
        has_masks = all(map(all, sides)) and any(row.get("segmentation") for row in rows)
        return cls(
            image_ids=pack_ids(image_ids),
            categories=tuple(categories),
            image_indices=_refer(rows, "image_id", image_ids),
            labels=_refer(rows, "category_id", [category.category_id for category in categories]),
            boxes=boxes,
            areas=np.array([_area_of(row) for row in rows], dtype=np.float64),
            is_crowd=np.array([bool(row.get("iscrowd")) for row in rows], dtype=np.bool_),
            masks=_masks_of(rows) if has_masks else None,
            sides=np.array(sides, dtype=np.int64).reshape(-1, 2) if has_masks else None,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class EvaluationPair:
    """Detections and their ground truth.

    Attributes:
        truth: the ground truth.
        image_indices: (n,) the image of each detection.
        labels: (n,) the label of each detection, of the ground truth's categories.
        boxes: (n, 4) xywh, image frame, pixels. May be empty.
        scores: (n,) of the detections.
        masks: of the detections, image frame; None unless the ground truth has masks, too.
        iou_type: what is matched: boxes (COCO's `bbox`) or masks (`segm`), see `for_masks`.
        warnings: differences between the categories of both, one line for each kind.
    """

    truth: GroundTruth
    image_indices: Int64[np.ndarray, " n"]
    labels: Int64[np.ndarray, " n"]
    boxes: Float[np.ndarray, "n 4"]
    scores: Float[np.ndarray, " n"]
    masks: MaskArrays | None = None
    iou_type: Literal["bbox", "segm"] = "bbox"
    warnings: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.scores)

    @classmethod
    def of(cls, detections: Results, truth: Truth | GroundTruth) -> "EvaluationPair":
        """Look up the images and the categories of detections in the ground truth.

        Detections that bear the names of their categories are matched by name, all others by id. Detections of classes
        that the ground truth lacks are left out if they have names, with a warning.

        Args:
            detections: May be empty.
            truth: of the images of the detections, and perhaps of others.

        Raises:
            DetectionsError: if the ground truth does not have the image or the category of a detection, or detections
                cannot be read; the message lists the unknown ids.
            AnnotationError: if annotations cannot be loaded, or no category name of the detections is one of theirs.
        """
        table = _to_table(detections)
        truth = truth if isinstance(truth, GroundTruth) else GroundTruth.of(truth)
        image_indices = look_up_ids(table.image_ids, truth.image_ids)
        source = str(detections) if isinstance(detections, str | os.PathLike) else "the detections"
        labels, is_scored, warnings = _look_up_labels(table, truth.categories, source=source)
        problems = [
            f"no {word} has id {_list_ids(ids)} ({counted(len(ids), 'detection')})"
            for word, ids in (
                ("image", table.image_ids[image_indices < 0]),
                ("category", table.category_ids[(labels < 0) & is_scored]),
            )
            if len(ids)
        ]
        if problems:
            hint = (
                "; are they of another split (--split)?"
                if len(image_indices) and (image_indices < 0).all()
                else ""
            )
            raise DetectionsError(f"{source}: do not match the annotations: {'; '.join(problems)}{hint}")
        masks = table.masks if truth.masks is not None else None
        if masks is not None:
            _check_masks(masks, table, truth.sides_of(image_indices), source=source)
        pair = cls(
            truth=truth,
            image_indices=image_indices,
            labels=labels,
            boxes=table.boxes,
            scores=table.scores,
            masks=masks,
            warnings=warnings,
        )
        return pair if is_scored.all() else pair.select(is_scored)

    def first_images(self, count: int) -> "EvaluationPair":
        """Return the first images of the ground truth, with their objects and detections."""
        return self.select_images(np.arange(min(count, self.truth.num_images)))

    def select_images(self, indices: Int[np.ndarray, " k"]) -> "EvaluationPair":
        """Return some images with their objects and detections, in the order of the indices, which must be distinct."""
        new = self.truth.new_indices(indices)[self.image_indices]
        kept = self.select(new >= 0)
        return replace(kept, truth=self.truth.select_images(indices), image_indices=new[new >= 0])

    def select(self, is_kept: Bool[np.ndarray, " n"]) -> "EvaluationPair":
        """Return the same ground truth with some of the detections."""
        names = ("image_indices", "labels", "boxes", "scores")
        masks = None if self.masks is None else self.masks.select(is_kept)
        return replace(self, **{name: getattr(self, name)[is_kept] for name in names}, masks=masks)

    def for_masks(self) -> "EvaluationPair | None":
        """Return the pair with masks to be matched in place of boxes.

        An object without a mask becomes a region to ignore, as large as its box. A detection without a mask matches no
        object.

        Returns:
            None unless both the detections and the ground truth have masks.
        """
        truth = self.truth
        if self.masks is None or truth.masks is None:
            return None
        is_bare, rows = ~truth.masks.has_mask, np.arange(len(truth.labels))
        masks = MaskArrays.concatenate([truth.masks, MaskArrays.from_boxes(from_xywh(truth.boxes))])
        masks = masks.select(np.where(is_bare, len(rows) + rows, rows))
        return replace(
            self, truth=replace(truth, masks=masks, is_crowd=truth.is_crowd | is_bare), iou_type="segm"
        )

    @property
    def num_per_image_and_class(self) -> Int[np.ndarray, " k"]:
        """How many detections each image and class has, where it has any."""
        num_classes = len(self.truth.categories)
        keys = self.image_indices * num_classes + self.labels
        if self.truth.num_images * num_classes > _MAX_KEYS:
            return np.unique(keys, return_counts=True)[1]
        counts = np.bincount(keys)  # ten times as fast as sorting
        return counts[counts > 0]

    @cached_property
    def image_ranks(self) -> Int64[np.ndarray, " m"]:
        """The rank of each image in the order of the ids: its id in `hotcoco`."""
        ranks = np.empty(self.truth.num_images, dtype=np.int64)
        ranks[np.argsort(self.truth.image_ids, kind="stable")] = np.arange(self.truth.num_images)
        return ranks

    @cached_property
    def hotcoco(self) -> tuple[hotcoco.COCO, hotcoco.COCO]:
        """The ground truth and the detections in hotcoco's form.

        Images are named by their ranks, so that equal scores are ordered by image id, and categories by their labels.
        Masks are left out where boxes are matched, and boxes of detections where masks are: either would change how the
        other is scored.
        """
        truth, ranks = self.truth, self.image_ranks
        masks = truth.masks.to_coco() if self.iou_type == "segm" and truth.masks is not None else None
        dataset = hotcoco.COCO.from_arrays(
            [{"id": rank} for rank in range(truth.num_images)] if masks is None else self._sized_images(),
            [{"id": label, "name": str(label)} for label in range(len(truth.categories))],
            ranks[truth.image_indices],
            truth.labels,
            truth.boxes,
            area=truth.areas,
            iscrowd=truth.is_crowd,
            segmentation=masks,
        )
        if masks is not None:
            return dataset, dataset.load_res(self._mask_results())
        rows = np.empty((len(self), 7))
        rows[:, 0], rows[:, 5], rows[:, 6] = ranks[self.image_indices], self.scores, self.labels
        rows[:, 1:5] = self.boxes
        return dataset, dataset.load_res(rows)

    def _sized_images(self) -> list[dict[str, int]]:
        sides = self.truth.sides_of(np.argsort(self.image_ranks)).tolist()
        return [{"id": rank, "width": width, "height": height} for rank, (width, height) in enumerate(sides)]

    def _mask_results(self) -> list[dict[str, Any]]:
        """Return results without boxes, so that the area of a detection is that of its mask."""
        assert self.masks is not None
        return [
            {
                "image_id": rank,
                "category_id": label,
                "score": score,
                "segmentation": {"size": [height, width], "counts": [width * height]}
                if mask is None
                else mask,
            }
            for rank, label, score, mask, (width, height) in zip(
                self.image_ranks[self.image_indices].tolist(),
                self.labels.tolist(),
                self.scores.tolist(),
                self.masks.to_coco(),
                self.truth.sides_of(self.image_indices).tolist(),
                strict=True,
            )
        ]


def _masks_of(rows: Sequence[Mapping[str, Any]]) -> MaskArrays:
    """Return the masks of COCO's annotations.

    Raises:
        AnnotationError: if one cannot be read.
    """
    masks, problems = read_segmentations([to_text(row.get("segmentation")) for row in rows])
    for problem, is_bad in problems.items():
        if is_bad.any():
            raise AnnotationError(f"ground truth: annotations[{int(is_bad.argmax())}]: has a mask {problem}")
    return masks


def _check_masks(
    masks: MaskArrays, table: DetectionTable, sides: Int[np.ndarray, "n 2"], *, source: str
) -> None:
    """Check that run lengths are of the size of their image, and fill it.

    Raises:
        DetectionsError: if some do not.
    """
    is_other = masks.is_encoded & (masks.sides != sides).any(axis=1)
    rows = np.flatnonzero(is_other | masks.measure().is_invalid)
    if len(rows):
        width, height = sides[rows[0]].tolist()
        given_width, given_height = masks.sides[rows[0]].tolist()
        raise DetectionsError(
            f"{source}: {counted(len(rows), 'mask')} with run lengths that do not fill the image; entry {rows[0]} of "
            f"image {table.image_ids[rows[0]]}: size is [{given_height}, {given_width}], expected [{height}, {width}] "
            "and counts that add up to its pixels"
        )


def _to_table(detections: Results) -> DetectionTable:
    if isinstance(detections, DetectionTable):
        return detections
    if isinstance(detections, str | os.PathLike):
        return load_detections(Path(detections))
    return DetectionTable.from_entries(detections)


def _look_up_labels(
    table: DetectionTable, categories: Sequence[Category], *, source: str
) -> tuple[Int64[np.ndarray, " n"], Bool[np.ndarray, " n"], tuple[str, ...]]:
    """Return the label of each detection (-1 if its id is unknown), whether it can be scored, and warnings."""
    labels = look_up_ids(table.category_ids, pack_ids([category.category_id for category in categories]))
    is_scored = np.ones(len(table), dtype=np.bool_)
    if not table.class_names:
        return labels, is_scored, ()
    named = [Category(category_id=each, name=name) for each, name in table.class_names.items()]
    match = match_categories(
        named,
        categories,
        classes_of=source,
        categories_of="the ground truth",
        are_all=False,
    )
    indices = look_up_ids(table.category_ids, pack_ids([category.category_id for category in named]))
    is_named = indices >= 0
    labels[is_named] = match.labels[indices[is_named]]
    is_scored[is_named] = match.is_known[indices[is_named]]
    warnings = match.warnings
    if not is_scored.all():
        num = int((~is_scored).sum())
        warnings = (*warnings, f"{counted(num, 'detection')} of those categories left out")
    return labels, is_scored, warnings


def look_up_ids(ids: Shaped[np.ndarray, " n"], known: Shaped[np.ndarray, " m"]) -> Int64[np.ndarray, " n"]:
    """Return the index of each id among the known ones, -1 where it is none of them.

    Text matches integers that it is the digits of, and integers match text that is their digits.
    """
    if len(known) == 0 or len(ids) == 0:
        return np.full(len(ids), -1, dtype=np.int64)
    if ids.dtype.kind != known.dtype.kind:
        return _look_up_text(ids, known)
    if known.dtype.kind == "i" and int(known.max()) - int(known.min()) < _MAX_SPAN:
        low, high = known.min(), known.max()
        index_of = np.full(int(high) - int(low) + 1, -1)
        index_of[known - low] = np.arange(len(known))
        is_between = (ids >= low) & (ids <= high)
        return np.where(is_between, index_of[np.where(is_between, ids, low) - low], -1)
    order = np.argsort(known, kind="stable")
    nearest = order[np.minimum(np.searchsorted(known[order], ids), len(known) - 1)]
    return np.where(known[nearest] == ids, nearest, -1)


def _look_up_text(ids: Shaped[np.ndarray, " n"], known: Shaped[np.ndarray, " m"]) -> Int64[np.ndarray, " n"]:
    index_of = {_to_integer(each): index for index, each in enumerate(known.tolist())}
    distinct, inverse = np.unique(ids, return_inverse=True)
    indices = [index_of.get(_to_integer(each), -1) for each in distinct.tolist()]
    return np.array(indices, dtype=np.int64)[inverse]


def _to_integer(value: int | str) -> int | str:
    """Return the integer that text is the digits of; other text as it is."""
    return int(value) if isinstance(value, str) and _DIGITS.fullmatch(value) else value


def _refer(rows: Sequence[Mapping[str, Any]], key: str, ids: Sequence[int | str]) -> Int64[np.ndarray, " n"]:
    """Return the index of the image or category of each annotation."""
    index_of = {each: index for index, each in enumerate(ids)}
    try:
        return np.array([index_of[row[key]] for row in rows], dtype=np.int64)
    except KeyError:
        row = next(row for row in rows if row.get(key) not in index_of)
        raise AnnotationError(
            f"ground truth: an annotation has {key} {row.get(key)!r}, which is not there"
        ) from None


def _area_of(annotation: Mapping[str, Any]) -> float:
    """Return the annotation's `area` (of its mask, where it has one), or else the area of its box."""
    given = annotation.get("area")
    _, _, width, height = annotation["bbox"]
    return float(width * height if given is None else given)


def _list_ids(ids: Shaped[np.ndarray, " n"]) -> str:
    distinct = [_shorten(str(each)) for each in dict.fromkeys(ids.tolist())]
    return count_and_list(distinct, limit=_MAX_LISTED, separator=", ")


def _shorten(text: str) -> str:
    return text if len(text) <= _MAX_ID else f"{text[:_MAX_ID]}..."
