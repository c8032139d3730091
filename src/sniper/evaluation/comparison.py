"""Two sets of detections of the same images: how far their APs differ, and how much of that the choice of images is."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import hotcoco
import numpy as np
from jaxtyping import Bool, Float, Int

from sniper.evaluation.coco import as_coco, as_results, check_detections_match

_NUM_IOUS = 10  # 0.50, 0.55 … 0.95
_RECALLS = np.linspace(0, 1, 101)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """What the second of two has more than the first.

    Attributes:
        difference: of the APs, second less first; of the mean APs where there are several sets of detections.
        low: where the middle 95 % of the differences begin that other images of the same kind would give.
        high: where they end.
    """

    difference: float
    low: float
    high: float


class ResampledAP:
    """COCO's AP of one set of detections, for images drawn with replacement.

    Args:
        detections: COCO results. May be empty.
        ground_truth: a COCO data set.
        max_detections: the best so many of each image and class count.

    Raises:
        DetectionsError: if a detection is of an image or a category that the ground truth does not have.
    """

    def __init__(
        self,
        detections: Sequence[Mapping[str, Any]],
        ground_truth: Mapping[str, Any],
        *,
        max_detections: int = 100,
    ) -> None:
        check_detections_match(detections, ground_truth)
        truth = as_coco(ground_truth)
        scoring = hotcoco.COCOeval(truth, truth.load_res(as_results(detections)), "bbox")
        scoring.params.area_rng, scoring.params.area_rng_lbl = [[0.0, 1e10]], ["all"]
        scoring.params.max_dets = [max_detections]
        scoring.evaluate()
        places = {image["id"]: place for place, image in enumerate(ground_truth["images"])}
        self.num_images = len(places)
        pairs: dict[int, list[Mapping[str, Any]]] = {}
        for pair in scoring.eval_imgs:
            if pair is not None:
                pairs.setdefault(pair["category_id"], []).append(pair)
        self._classes = [_Class.of(own, places) for own in pairs.values()]

    def __call__(self, times: Int[np.ndarray, " m"]) -> float:
        """Give the AP if each of the m images, in the order of the ground truth, were there so many times.

        Classes without objects in those images do not count; -1 if that is all of them. With every image once this is
        the AP of `evaluate`.
        """
        values = [value for one in self._classes if (value := one.ap(times)) is not None]
        return float(np.mean(values)) if values else -1.0


@dataclass(frozen=True, kw_only=True, eq=False)
class _Class:
    """The detections of one class, best first."""

    images: Int[np.ndarray, " d"]
    is_hit: Bool[np.ndarray, "t d"]
    is_miss: Bool[np.ndarray, "t d"]
    num_objects: Int[np.ndarray, " m"]

    @classmethod
    def of(cls, pairs: Sequence[Mapping[str, Any]], places: Mapping[int, int]) -> "_Class":
        scores, images, is_matched, is_ignored = [], [], [], []
        num_objects = np.zeros(len(places), dtype=np.int64)
        for pair in sorted(pairs, key=lambda pair: pair["image_id"]):
            place = places[pair["image_id"]]
            num_objects[place] += len(pair["gtIgnore"]) - sum(pair["gtIgnore"])
            num = len(pair["dtScores"])
            scores.append(np.array(pair["dtScores"], dtype=np.float64))
            images.append(np.full(num, place))
            is_matched.append(np.array(pair["dtMatched"], dtype=np.bool_).reshape(_NUM_IOUS, num))
            is_ignored.append(np.array(pair["dtIgnore"], dtype=np.bool_).reshape(_NUM_IOUS, num))
        order = np.argsort(-np.concatenate(scores), kind="stable")
        matched = np.concatenate(is_matched, axis=1)[:, order]
        counts = ~np.concatenate(is_ignored, axis=1)[:, order]
        return cls(
            images=np.concatenate(images)[order],
            is_hit=matched & counts,
            is_miss=~matched & counts,
            num_objects=num_objects,
        )

    def ap(self, times: Int[np.ndarray, " m"]) -> float | None:
        """Give the mean over IoUs of the mean precision at 101 recalls; None without objects."""
        num_objects = int((times * self.num_objects).sum())
        if num_objects == 0:
            return None
        weights = times[self.images]
        hits = np.cumsum(self.is_hit * weights, axis=1)  # (t, d)
        misses = np.cumsum(self.is_miss * weights, axis=1)
        precision = hits / np.maximum(hits + misses, 1)
        precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        return float(
            np.mean([_at_recalls(own / num_objects, best) for own, best in zip(hits, precision, strict=True)])
        )


def _at_recalls(recall: Float[np.ndarray, " d"], precision: Float[np.ndarray, " d"]) -> float:
    """Give the mean of the best precisions at or beyond 101 recalls; 0 where a recall is never reached."""
    first = np.searchsorted(recall, _RECALLS, side="left")
    reached = first[first < len(recall)]
    return float(precision[reached].sum() / len(_RECALLS))


def compare(
    first: Sequence[ResampledAP],
    second: Sequence[ResampledAP],
    *,
    generator: np.random.Generator,
    num_resamples: int = 1000,
) -> Difference:
    """Tell how far apart two detectors are, and between which bounds other images would put it (a paired bootstrap).

    Images are drawn with replacement, the same for both. What other trainings would give is another matter: the sets of
    detections of several seeds are averaged, and the spread among them is not in the bounds.

    Args:
        first: one detector's AP, of each seed.
        second: the other's, on the same images.
        generator: draws the images.
        num_resamples: how often.

    Raises:
        ValueError: if they are not of equally many images, two at least, or there is nothing to compare.
    """
    counts = {one.num_images for one in (*first, *second)}
    if len(counts) != 1 or not first or not second:
        raise ValueError(f"wanted APs of the same images, got {len(first)} and {len(second)} of {counts}")
    num_images = counts.pop()
    if num_images < 2:
        raise ValueError("other images cannot be guessed from a single one")

    def difference(times: Int[np.ndarray, " m"]) -> float:
        """Give NaN where those images have no objects."""
        values = [[ap(times) for ap in aps] for aps in (first, second)]
        if min(map(min, values)) < 0:
            return math.nan
        return float(np.mean(values[1]) - np.mean(values[0]))

    drawn = [
        difference(np.bincount(generator.integers(num_images, size=num_images), minlength=num_images))
        for _ in range(num_resamples)
    ]
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return Difference(
        difference=difference(np.ones(num_images, dtype=np.int64)), low=float(low), high=float(high)
    )
