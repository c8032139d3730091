"""Split crowded images into blocks of boxes that can be matched separately, so that memory stays bounded.

hotcoco compares every detection with every object of an image and class, and holds all overlaps of all images at once:
50,000 detections and 20,000 objects in one image take 16 GB. A detection can match only an object that it overlaps
enough. Detections and objects that are connected through such overlaps make a component, and the matches of a component
do not depend on the others. So a block of some components is scored as an image of its own, with the same matches.

Detections are ordered by score across all images, with ties broken by image and position. Their scores are replaced by
their ranks in that order, so that the blocks are ordered as the images were.
"""

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from sniper.errors import DetectionsError, counted
from sniper.evaluation.pair import EvaluationPair
from sniper.geometry.boxes import from_xywh
from sniper.geometry.kernels import kernel

MAX_OVERLAPS = 1 << 26
"""The overlaps, of 8 bytes each, above which images are split."""

_MOST_OVERLAPS = 1 << 28  # that are computed at all
_BLOCK_SIZE = 64  # boxes of a block of small components
_MARGIN = 1e-9  # by which an overlap may miss the threshold: more components would be joined than need be


@dataclass(frozen=True, kw_only=True, eq=False)
class MatchingBlocks:
    """The images of a pair, or blocks of them.

    Attributes:
        pair: the images or blocks, as images; only detections that count.
        rows: (n,) the index of each detection in the original pair.
        object_rows: (m,) the index of each object in the original ground truth.
        images: (b,) the image of each block, as an index of the original pair.
        is_split: whether they are blocks. Numbers that are limited for each image then refer to blocks.
    """

    pair: EvaluationPair
    rows: Int[np.ndarray, " n"]
    object_rows: Int[np.ndarray, " m"]
    images: Int[np.ndarray, " b"]
    is_split: bool


def split_crowded(
    pair: EvaluationPair,
    *,
    max_detections: int,
    iou: float,
    use_categories: bool = True,
    max_overlaps: int | None = None,
) -> MatchingBlocks:
    """Return a pair as it is if its overlaps fit into memory, otherwise its detections that count, or blocks of them.

    Masks are not split: masks overlap more or less than the boxes around them.

    Args:
        pair: detections and ground truth.
        max_detections: how many detections of each image and class count, with the highest scores.
        iou: the least overlap of a match, above 0.
        use_categories: False to match detections with objects of any class; `max_detections` then are of each image.
        max_overlaps: the overlaps above which images are split; `MAX_OVERLAPS` if None.

    Raises:
        DetectionsError: if the boxes of one block, or the masks of an image, are too many to be compared.
    """
    max_overlaps = MAX_OVERLAPS if max_overlaps is None else max_overlaps
    groups = _Groups.of(pair, use_categories=use_categories)
    everything = MatchingBlocks(
        pair=pair,
        rows=np.arange(len(pair)),
        object_rows=np.arange(len(pair.truth.labels)),
        images=np.arange(pair.truth.num_images),
        is_split=False,
    )
    if groups.num_overlaps() <= max_overlaps:
        return everything
    is_best = select_best(pair, max_detections, use_categories=use_categories)
    kept = replace(everything, pair=pair.select(is_best), rows=np.flatnonzero(is_best))
    groups = _Groups.of(kept.pair, use_categories=use_categories)
    if groups.num_overlaps() <= max_overlaps:
        return kept
    if pair.iou_type == "segm":
        return _with_few_overlaps(kept, groups)
    return _split(kept, groups, iou=iou, use_categories=use_categories)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Groups:
    """The image, or image and class, of each box: boxes of different groups are not compared.

    Attributes:
        detections: (n,) the group of each detection, a number from 0.
        objects: (m,) the group of each object.
        count: number of groups.
    """

    detections: Int[np.ndarray, " n"]
    objects: Int[np.ndarray, " m"]
    count: int

    @classmethod
    def of(cls, pair: EvaluationPair, *, use_categories: bool) -> "_Groups":
        truth = pair.truth
        num_classes = len(truth.categories) if use_categories else 1
        keys = np.concatenate(
            [
                images * num_classes + (labels if use_categories else 0)
                for images, labels in ((pair.image_indices, pair.labels), (truth.image_indices, truth.labels))
            ]
        )
        distinct, groups = np.unique(keys, return_inverse=True)
        return cls(detections=groups[: len(pair)], objects=groups[len(pair) :], count=len(distinct))

    def num_overlaps(self) -> int:
        """Count the pairs of a detection and an object that are compared."""
        counts = [
            np.bincount(groups, minlength=self.count).astype(np.float64)
            for groups in (self.detections, self.objects)
        ]
        return int(np.dot(*counts))


def select_best(pair: EvaluationPair, count: int, *, use_categories: bool = True) -> Bool[np.ndarray, " n"]:
    """Check which detections are among those with the highest scores of their image and class.

    Args:
        pair: detections and ground truth.
        count: how many detections of each image and class.
        use_categories: False for those of each image.
    """
    groups = _Groups.of(pair, use_categories=use_categories).detections
    order = np.lexsort((*_ties(pair, use_categories=use_categories), -pair.scores, groups))
    in_order = groups[order]
    ranks = np.arange(len(order)) - np.searchsorted(in_order, in_order)
    is_best = np.zeros(len(pair), dtype=np.bool_)
    is_best[order[ranks < count]] = True
    return is_best


def _with_few_overlaps(kept: MatchingBlocks, groups: _Groups) -> MatchingBlocks:
    """Return the images as they are, or raise if their overlaps do not fit into memory."""
    num_overlaps = groups.num_overlaps()
    if num_overlaps > _MOST_OVERLAPS:
        raise DetectionsError(
            f"the masks of {counted(len(kept.rows), 'detection')} and {counted(len(kept.object_rows), 'object')} are "
            f"too many to be compared: {num_overlaps:,} overlaps, expected at most {_MOST_OVERLAPS:,}. Count fewer "
            "detections of each image (--max-detections)"
        )
    return kept


def _split(kept: MatchingBlocks, groups: _Groups, *, iou: float, use_categories: bool) -> MatchingBlocks:
    """Split the images of a pair into blocks."""
    pair, truth = kept.pair, kept.pair.truth
    is_object = ~truth.is_crowd
    detections, objects = from_xywh(pair.boxes), from_xywh(truth.boxes)
    roots = _components(
        detections, groups.detections, objects[is_object], groups.objects[is_object], groups.count, iou=iou
    )
    block_of, num_blocks = _join_components(
        roots, np.concatenate([groups.detections, groups.objects[is_object]])
    )
    block_of_detection, block_of_object = block_of[: len(pair)], block_of[len(pair) :]
    crowds = np.flatnonzero(truth.is_crowd)
    # A crowd matches any number of detections, so each block has a copy of every crowd that its detections lie in.
    crowd_of_copy, block_of_copy = _copy_crowds(
        detections, groups.detections, block_of_detection, objects[crowds], groups.objects[crowds], iou=iou
    )
    rows = np.concatenate([np.flatnonzero(is_object), crowds[crowd_of_copy]])
    blocks = np.concatenate([block_of_object, block_of_copy])
    order = np.argsort(rows, kind="stable")  # of equal overlaps, the last object is matched
    rows, blocks = rows[order], blocks[order]
    images = np.zeros(num_blocks, dtype=np.int64)
    images[block_of_detection] = pair.image_indices
    images[block_of_object] = truth.image_indices[is_object]
    _check_size(block_of_detection, blocks, truth.image_ids[images])
    names = ("labels", "boxes", "areas", "is_crowd")
    block_truth = replace(
        truth,
        image_ids=np.arange(num_blocks),
        image_indices=blocks,
        masks=None,
        sides=None,
        **{name: getattr(truth, name)[rows] for name in names},
    )
    return MatchingBlocks(
        pair=replace(
            pair,
            truth=block_truth,
            masks=None,
            image_indices=block_of_detection,
            scores=_rank_scores(pair, use_categories=use_categories),
        ),
        rows=kept.rows,
        object_rows=rows,
        images=images,
        is_split=True,
    )


def _rank_scores(pair: EvaluationPair, *, use_categories: bool) -> Float[np.ndarray, " n"]:
    """Return distinct scores that order the detections as they are ordered across images."""
    ranks = pair.image_ranks[pair.image_indices]
    order = np.lexsort((*_ties(pair, use_categories=use_categories), ranks, -pair.scores))
    scores = np.empty(len(pair), dtype=np.float64)
    scores[order] = np.arange(len(pair), 0, -1)
    return scores


def _ties(pair: EvaluationPair, *, use_categories: bool) -> tuple[np.ndarray, ...]:
    """Return the key that orders detections of equal scores in an image before their position, if there is one."""
    return () if use_categories else (pair.labels,)


def _components(
    detections: Float[np.ndarray, "n 4"],
    detection_groups: Int[np.ndarray, " n"],
    objects: Float[np.ndarray, "m 4"],
    object_groups: Int[np.ndarray, " m"],
    num_groups: int,
    *,
    iou: float,
) -> Int[np.ndarray, " n_plus_m"]:
    """Return a number for each detection and object: equal where they are connected through overlaps."""
    order = np.lexsort((objects[:, 0], object_groups))
    starts = np.searchsorted(object_groups[order], np.arange(num_groups + 1))
    parents = np.arange(len(detections) + len(objects))
    _connect(detections, detection_groups, objects[order], order, starts, iou * (1 - _MARGIN), parents)
    return parents


@kernel
def _connect(
    detections: np.ndarray,
    groups: np.ndarray,
    objects: np.ndarray,
    order: np.ndarray,
    starts: np.ndarray,
    iou: float,
    parents: np.ndarray,
) -> None:
    """Fill `parents` with the root of each detection and object (union-find with path halving).

    `objects` are sorted by group and left edge; `order` has their indices, and `starts` where each group begins.
    """
    widest = np.zeros(len(starts) - 1)
    for group in range(len(widest)):
        for o in range(starts[group], starts[group + 1]):
            widest[group] = max(widest[group], objects[o, 2] - objects[o, 0])
    for d in range(len(detections)):
        x1, y1, x2, y2 = detections[d]
        group = groups[d]
        first, last = starts[group], starts[group + 1]
        first += np.searchsorted(objects[first:last, 0], x1 - widest[group])
        area = (x2 - x1) * (y2 - y1)
        for o in range(first, last):
            if objects[o, 0] >= x2:
                break
            width = min(x2, objects[o, 2]) - max(x1, objects[o, 0])
            height = min(y2, objects[o, 3]) - max(y1, objects[o, 1])
            if width <= 0 or height <= 0:
                continue
            overlap = width * height
            other = (objects[o, 2] - objects[o, 0]) * (objects[o, 3] - objects[o, 1])
            if overlap >= iou * (area + other - overlap):
                a, b = _root(parents, d), _root(parents, len(detections) + order[o])
                parents[max(a, b)] = min(a, b)
    for index in range(len(parents)):
        parents[index] = _root(parents, index)


@kernel
def _root(parents: np.ndarray, index: int) -> int:
    while parents[index] != index:
        parents[index] = parents[parents[index]]
        index = parents[index]
    return index


def _join_components(
    roots: Int[np.ndarray, " n"], groups: Int[np.ndarray, " n"]
) -> tuple[Int[np.ndarray, " n"], int]:
    """Join small components of a group to blocks; return the block of each box, and the number of blocks."""
    distinct, component_of, sizes = np.unique(roots, return_inverse=True, return_counts=True)
    group_of = groups[distinct]
    order = np.argsort(group_of, kind="stable")
    starts = np.cumsum(sizes[order]) - sizes[order]
    keys = np.stack([group_of[order], starts // _BLOCK_SIZE])
    is_first = np.ones(len(order), dtype=np.bool_)
    is_first[1:] = (keys[:, 1:] != keys[:, :-1]).any(axis=0)
    block_of_component = np.empty(len(order), dtype=np.int64)
    block_of_component[order] = np.cumsum(is_first) - 1
    return block_of_component[component_of], int(is_first.sum())


def _copy_crowds(
    detections: Float[np.ndarray, "n 4"],
    detection_groups: Int[np.ndarray, " n"],
    blocks: Int[np.ndarray, " n"],
    crowds: Float[np.ndarray, "c 4"],
    crowd_groups: Int[np.ndarray, " c"],
    *,
    iou: float,
) -> tuple[Int[np.ndarray, " k"], Int[np.ndarray, " k"]]:
    """Return pairs of a crowd and a block with a detection that lies in the crowd."""
    crowd_of, block_of = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    order = np.argsort(detection_groups, kind="stable")
    in_order = detection_groups[order]
    for crowd, (box, group) in enumerate(zip(crowds, crowd_groups, strict=True)):
        rows = order[np.searchsorted(in_order, group) : np.searchsorted(in_order, group, side="right")]
        boxes = detections[rows]
        sides = np.minimum(boxes[:, 2:], box[2:]) - np.maximum(boxes[:, :2], box[:2])
        overlaps = np.maximum(sides, 0.0).prod(axis=1)
        areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
        touched = np.unique(blocks[rows[(overlaps > 0) & (overlaps >= iou * (1 - _MARGIN) * areas)]])
        crowd_of.append(np.full(len(touched), crowd))
        block_of.append(touched)
    return np.concatenate(crowd_of), np.concatenate(block_of)


def _check_size(
    block_of_detection: Int[np.ndarray, " n"],
    block_of_object: Int[np.ndarray, " m"],
    image_ids: Shaped[np.ndarray, " b"],
) -> None:
    """Raise if the overlaps of the blocks do not fit into memory either."""
    num_detections, num_objects = (
        np.bincount(blocks, minlength=len(image_ids)) for blocks in (block_of_detection, block_of_object)
    )
    overlaps = num_detections.astype(np.float64) * num_objects
    if overlaps.sum() > _MOST_OVERLAPS:
        largest = int(overlaps.argmax())
        raise DetectionsError(
            f"image {image_ids[largest]}: {num_detections[largest]:,} detections and {num_objects[largest]:,} objects "
            f"that are connected by their overlaps are too many to be compared: {overlaps.sum():,.0f} overlaps, "
            f"expected at most {_MOST_OVERLAPS:,}. Detect fewer objects on each other (--predict.merge_iou, "
            "--predict.score_threshold, --predict.max_detections)"
        )
