"""Search validation images once, to score a detector and to choose how its detections are merged and shown.

Every way to merge is applied to the same detections of all levels. Only merged detections are kept in memory.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from sniper.config.experiment import PredictSpec
from sniper.data.datasets import Dataset
from sniper.data.datasets.categories import CategoryMatch
from sniper.evaluation.coco import score
from sniper.evaluation.duplicates import without_duplicates
from sniper.evaluation.operating_point import find_best_f1
from sniper.evaluation.pair import EvaluationPair, GroundTruth
from sniper.geometry import Detections
from sniper.inference.calibration import Calibration, MergeCandidate
from sniper.inference.detector import Detector, round_detections
from sniper.inference.merging import MergeMethod, merge, merge_method
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
        pair: its detections, as results have them, and the ground truth.
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
    numbers = itertools.count(1)
    search = _SharedSearch(
        detector=detector,
        images=images,
        match=match,
        processes=processes,
        on_image=lambda: on_image(min(next(numbers), num_shared), num_shared),
    )
    specs = _merge_specs(detector.spec)
    if len(specs) == 1:
        compared, candidates, chosen = [], [], 0
        detections = search(range(len(images)), specs)[0]
    else:
        compared = spread(len(images), count=MAX_COMPARED)
        tables = search(compared, specs)
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
        detections = tables[chosen] | search(rest, specs[chosen : chosen + 1])[0]
        del tables
    pair = pair_detections(detections, truth)
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


@dataclass(frozen=True, kw_only=True, eq=False)
class _SharedSearch:
    """Searches images, each process its share, and merges their detections in several ways."""

    detector: Detector
    images: Dataset
    match: CategoryMatch
    processes: Processes
    on_image: Callable[[], None]

    def __call__(self, indices: Sequence[int], specs: Sequence[PredictSpec]) -> list[dict[int, Detections]]:
        """Return for each way to merge the detections of all images that could be read, by index, in order."""
        share = indices[self.processes.rank :: self.processes.world_size]
        # Ways to merge and scores to show are chosen by boxes; masks for all ways would take gigabytes.
        results = self.detector.search((self.images[index] for index in share), with_masks=False)
        rows = []
        for index, result in zip(share, results, strict=True):
            if result is not None:
                rows.append((index, [self._select(merge(result.detections, spec)) for spec in specs]))
            self.on_image()
        gathered = sorted(
            (row for rows in self.processes.all_gather(rows) for row in rows), key=lambda row: row[0]
        )
        return [{index: merged[way] for index, merged in gathered} for way in range(len(specs))]

    def _select(self, merged: Detections) -> Detections:
        """Return the detections of classes that the images have, with their labels."""
        matched = self.match.relabel(merged)
        return replace(matched, class_names=())[matched.labels < len(self.images.categories)]


def pair_detections(detections: Mapping[int, Detections], truth: GroundTruth) -> EvaluationPair:
    """Pair detections, by the index of their image, with the ground truth, rounded as results are."""
    joined = Detections.join(list(detections.values()))
    boxes, scores = round_detections(joined)
    counts = [len(each) for each in detections.values()]
    return EvaluationPair(
        truth=truth,
        image_indices=np.repeat(np.array(list(detections), dtype=np.int64), counts),
        labels=joined.labels.astype(np.int64),
        boxes=boxes,
        scores=np.array(scores, dtype=np.float64),
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
