"""Search validation images once, to score a detector and to choose how its detections are merged and shown.

Every way to merge is applied to the same detections of all levels. Only merged detections are kept in memory, and their
masks once for all ways, as run-length encodings.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Int

from sniper.config.experiment import PredictSpec
from sniper.data.datasets import Dataset
from sniper.data.datasets.categories import CategoryMatch
from sniper.evaluation.coco import score
from sniper.evaluation.duplicates import without_duplicates
from sniper.evaluation.operating_point import find_best_f1
from sniper.evaluation.pair import EvaluationPair, GroundTruth
from sniper.geometry import Detections
from sniper.geometry.masks import MaskArrays
from sniper.inference.calibration import Calibration, MergeCandidate
from sniper.inference.detector import Detector, finest_scale, round_detections
from sniper.inference.merging import MergeMethod, merge, merge_method
from sniper.inference.search import SearchResult
from sniper.runs.processes import SINGLE_PROCESS, Processes

MAX_COMPARED = 500
"""Images on which ways to merge are compared, spread evenly over the validation images; it bounds time and memory."""

_TIE = 0.001  # of AP: a better candidate must be better by more than this than an earlier, simpler one
_SIGMAS = (0.3, 0.9)
_IOUS: Mapping[MergeMethod, Sequence[float]] = {
    "linear": (0.3, 0.5),
    "hard": (0.4, 0.5, 0.6),
    "fusion": (0.45, 0.55, 0.65),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Validation:
    """A detector on its validation images.

    Attributes:
        pair: its detections, as results have them, and the ground truth; with masks where both have them.
        calibration: what was chosen.
    """

    pair: EvaluationPair
    calibration: Calibration


def validate(
    detector: Detector,
    images: Dataset,
    *,
    truth: GroundTruth,
    match: CategoryMatch,
    step: int,
    processes: Processes = SINGLE_PROCESS,
    on_image: Callable[[int, int], None] = lambda *_: None,
) -> Validation:
    """Search images, and choose how detections are merged and from which score they are shown; all processes call this.

    With `predict.merge: auto`, ways to merge are compared by their AP on up to `MAX_COMPARED` images. The others are
    merged as chosen. Otherwise `predict.merge` is used.

    Args:
        detector: the detector.
        images: to search; each process takes its share.
        truth: of the images.
        match: of the detector's classes with the categories of the images.
        step: of the detector's weights.
        processes: those that search together.
        on_image: called after each image with the number of images that this process has searched, and of all that it
            is to search.

    Returns:
        The detections of all processes, in each of them.

    Raises:
        ImageError: if an image cannot be read, and is not to be skipped.
        OutOfMemory: if a window does not fit into the device's memory.
    """
    num_shared = len(range(processes.rank, len(images), processes.world_size))
    search = SharedSearch(
        detector=detector,
        images=images,
        match=match,
        processes=processes,
        on_image=counting(on_image, num_shared),
        with_masks=truth.masks is not None,
    )
    specs = _merge_specs(detector.spec)
    if len(specs) == 1:
        compared, candidates, chosen = [], [], 0
        detections = search(range(len(images)), [_merging(specs[0])])[0]
    else:
        compared = spread(len(images), count=MAX_COMPARED)
        tables = search(compared, [_merging(spec) for spec in specs])
        compared_truth = truth.select_images(np.array(compared, dtype=np.int64))
        candidates = [
            _to_candidate(
                spec,
                pair_detections(
                    {new: table[old] for new, old in enumerate(compared) if old in table}, compared_truth
                ),
            )
            for spec, table in zip(specs, tables, strict=True)
        ]
        chosen = choose(candidates)
        rest = sorted(set(range(len(images))) - set(compared))
        detections = tables[chosen] | search(rest, [_merging(specs[chosen])])[0]
        del tables
    pair = pair_detections(detections, truth, masks=search.masks)
    best = find_best_f1(without_duplicates(pair))
    calibration = Calibration(
        step=step,
        num_images=len(images),
        num_compared=len(compared),
        merge=merge_method(specs[chosen]),
        soft_nms_sigma=specs[chosen].soft_nms_sigma,
        merge_iou=specs[chosen].merge_iou,
        min_score=None if math.isnan(best.score) else best.score,
        f1=_or_zero(best.f1),
        precision=_or_zero(best.precision),
        recall=_or_zero(best.recall),
        scale=min(
            (finest_scale(detector.spec.levels, image.width, image.height) for image in images), default=None
        ),
        candidates=tuple(candidates),
    )
    return Validation(pair=pair, calibration=calibration)


def spread(num_images: int, *, count: int) -> list[int]:
    """Return the indices of up to `count` images, evenly spread.

    Example:
        >>> spread(10, count=4)
        [0, 3, 6, 9]
        >>> spread(3, count=4)
        [0, 1, 2]
    """
    if num_images <= count:
        return list(range(num_images))
    return np.linspace(0, num_images - 1, count).round().astype(int).tolist()


def choose(candidates: Sequence[MergeCandidate]) -> int:
    """Return the index of the first candidate whose AP is within 0.001 of the best."""
    best = max(candidate.ap for candidate in candidates)
    return next(index for index, candidate in enumerate(candidates) if candidate.ap >= best - _TIE)


def _merge_specs(spec: PredictSpec) -> list[PredictSpec]:
    """Return the settings to compare, the default first; with a method that was set, that alone."""
    if spec.merge != "auto":
        return [spec]
    sigmas = dict.fromkeys((spec.soft_nms_sigma, *_SIGMAS))
    return [
        *(replace(spec, merge="gaussian", soft_nms_sigma=sigma) for sigma in sigmas),
        *(replace(spec, merge=name, merge_iou=iou) for name, ious in _IOUS.items() for iou in ious),
    ]


def counting(on_image: Callable[[int, int], None], num_images: int) -> Callable[[], None]:
    """Return a function to be called after each image, which passes on how many there were, and of how many."""
    numbers = itertools.count(1)
    return lambda: on_image(min(next(numbers), num_images), num_images)


def _merging(spec: PredictSpec) -> Callable[[SearchResult], Detections]:
    return lambda result: merge(result.detections, spec)


@dataclass(frozen=True, kw_only=True, eq=False)
class SharedSearch:
    """Searches images, each process its share, and takes their detections in several ways.

    Attributes:
        detector: the detector.
        images: to search.
        match: of the detector's classes with the categories of the images.
        processes: those that search together.
        on_image: called after each image of this process.
        keeps_all_sizes: whether results have the detections of all sizes of each level, too.
        with_masks: whether masks are predicted, if the detector does.
        masks: of each image that was searched, by its index, the masks of all detections that one of the ways takes;
            `sources` of a detection is its row. Empty without masks.
    """

    detector: Detector
    images: Dataset
    match: CategoryMatch
    processes: Processes
    on_image: Callable[[], None]
    keeps_all_sizes: bool = False
    with_masks: bool = False
    masks: dict[int, MaskArrays] = field(default_factory=dict)

    def __call__(
        self, indices: Sequence[int], ways: Sequence[Callable[[SearchResult], Detections]]
    ) -> list[dict[int, Detections]]:
        """Return for each way the detections of all images that could be read, by index, in order."""
        share = indices[self.processes.rank :: self.processes.world_size]
        results = self.detector.search(
            (self.images[index] for index in share),
            with_masks=self.with_masks,
            keeps_all_sizes=self.keeps_all_sizes,
        )
        rows = []
        for index, result in zip(share, results, strict=True):
            if result is not None:
                rows.append((index, *self._take(result, ways)))
            self.on_image()
        gathered = sorted(
            (row for rows in self.processes.all_gather(rows) for row in rows), key=lambda row: row[0]
        )
        self.masks.update({index: masks for index, _, masks in gathered if masks is not None})
        return [{index: taken[way] for index, taken, _ in gathered} for way in range(len(ways))]

    def _take(
        self, result: SearchResult, ways: Sequence[Callable[[SearchResult], Detections]]
    ) -> tuple[list[Detections], MaskArrays | None]:
        """Take the detections of an image in several ways, and the masks of all of them, once."""
        found = result.detections
        if found.masks is None:
            return [self._select(way(result)) for way in ways], None
        bare = replace(result, detections=replace(found, masks=None, sources=np.arange(len(found))))
        taken = [self._select(way(bare)) for way in ways]
        rows = np.unique(np.concatenate([_sources_of(each) for each in taken]))
        renumbered = [replace(each, sources=np.searchsorted(rows, _sources_of(each))) for each in taken]
        return renumbered, found.masks[rows].to_rle()

    def _select(self, merged: Detections) -> Detections:
        """Return the detections of classes that the images have, with their labels."""
        matched = self.match.relabel(merged)
        return replace(matched, class_names=())[matched.labels < len(self.images.categories)]


def _sources_of(detections: Detections) -> Int[np.ndarray, " n"]:
    return np.zeros(0, dtype=np.int64) if detections.sources is None else detections.sources


def pair_detections(
    detections: Mapping[int, Detections], truth: GroundTruth, *, masks: Mapping[int, MaskArrays] | None = None
) -> EvaluationPair:
    """Pair detections, by the index of their image, with the ground truth, rounded as results are.

    Args:
        detections: of each image, by its index among those of the ground truth.
        truth: the ground truth.
        masks: of each image; `sources` of a detection is the row of its mask. None, or of no image, without masks.
    """
    joined = Detections.join(list(detections.values()))
    boxes, scores = round_detections(joined)
    counts = [len(each) for each in detections.values()]
    return EvaluationPair(
        truth=truth,
        image_indices=np.repeat(np.array(list(detections), dtype=np.int64), counts),
        labels=joined.labels.astype(np.int64),
        boxes=boxes,
        scores=np.array(scores, dtype=np.float64),
        masks=MaskArrays.concatenate(
            [masks[index].select(_sources_of(each)) for index, each in detections.items()]
        )
        if masks
        else None,
    )


def _to_candidate(spec: PredictSpec, pair: EvaluationPair) -> MergeCandidate:
    scores = score(pair)
    return MergeCandidate(
        merge=merge_method(spec),
        soft_nms_sigma=spec.soft_nms_sigma,
        merge_iou=spec.merge_iou,
        ap=scores.ap,
        ap50=scores.ap50,
    )


def _or_zero(value: float) -> float:
    """Return 0 for a ratio without detections or objects."""
    return 0.0 if math.isnan(value) else value
