"""How far apart two detectors are, against COCO's own numbers and against images that are really repeated."""

import copy
from typing import Any

import numpy as np
import pytest

from sniper.errors import DetectionsError
from sniper.evaluation.coco import evaluate
from sniper.evaluation.comparison import ResampledAP, compare
from tests.evaluation.test_diagnosis import drawn


@pytest.mark.parametrize("seed", range(8))
def test_with_every_image_once_it_is_coco_s_ap(seed: int) -> None:
    found, truth = drawn(seed)
    times = np.ones(len(truth["images"]), dtype=np.int64)
    assert ResampledAP(found, truth)(times) == pytest.approx(evaluate(found, truth).ap, abs=1e-9)


def repeated(
    found: list[dict[str, Any]], truth: dict[str, Any], times: np.ndarray
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Write images out as often as they are to count, each copy with an id of its own."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    copies: list[dict[str, Any]] = []
    for image, count in zip(truth["images"], times.tolist(), strict=True):
        for _ in range(count):
            new_id = len(images) + 1
            images.append({"id": new_id})
            for rows, into in ((truth["annotations"], annotations), (found, copies)):
                into += [{**row, "image_id": new_id} for row in rows if row["image_id"] == image["id"]]
    for place, row in enumerate(annotations, start=1):
        row["id"] = place
    return copies, {**truth, "images": images, "annotations": annotations}


@pytest.mark.parametrize("seed", range(8))
def test_an_image_that_counts_thrice_is_as_if_it_were_there_thrice(seed: int) -> None:
    found, truth = drawn(seed)
    for rank, one in enumerate(found):
        one["score"] = 1 - rank / 1000  # copies of a detection stand side by side, nothing between them
    times = np.random.default_rng(seed).integers(0, 4, size=len(truth["images"]))
    copies, larger = repeated(found, truth, times)
    # Between the copies of a miss, precision falls step by step; only where all copies have been counted is it asked.
    assert ResampledAP(found, truth)(times) == pytest.approx(evaluate(copies, larger).ap, abs=0.02)


def test_images_that_are_not_there_teach_nothing() -> None:
    found, truth = drawn(0)
    assert ResampledAP(found, truth)(np.zeros(len(truth["images"]), dtype=np.int64)) == -1.0
    assert ResampledAP([], truth)(np.ones(len(truth["images"]), dtype=np.int64)) == 0.0


def test_a_detector_does_not_differ_from_itself_and_is_surely_worse_with_half_its_hits() -> None:
    found, truth = drawn(3, num_images=40)
    same = compare(
        [ResampledAP(found, truth)],
        [ResampledAP(found, truth)],
        generator=np.random.default_rng(0),
        num_resamples=100,
    )
    assert (same.difference, same.low, same.high) == (0.0, 0.0, 0.0)
    half = compare(
        [ResampledAP(found, truth)],
        [ResampledAP(found[::2], truth)],
        generator=np.random.default_rng(0),
        num_resamples=200,
    )
    ap = evaluate(found, truth).ap
    assert half.difference == pytest.approx(evaluate(found[::2], truth).ap - ap, abs=1e-9)
    assert half.low < half.difference < half.high < 0


def test_seeds_are_averaged() -> None:
    found, truth = drawn(3, num_images=12)
    one, other = ResampledAP(found, truth), ResampledAP(found[::2], truth)
    mean = compare([one], [one, other], generator=np.random.default_rng(0), num_resamples=10)
    alone = compare([one], [other], generator=np.random.default_rng(0), num_resamples=10)
    assert mean.difference == pytest.approx(alone.difference / 2)
    assert mean.low == pytest.approx(alone.low / 2)


def test_the_bounds_hold_the_truth_about_as_often_as_they_say() -> None:
    """Of many small test sets, most put the difference that a large one has between their bounds."""
    found, truth = drawn(5, num_images=400)
    worse = [one for place, one in enumerate(found) if place % 4]
    everything = compare(
        [ResampledAP(found, truth)],
        [ResampledAP(worse, truth)],
        generator=np.random.default_rng(0),
        num_resamples=2,
    ).difference
    held = 0
    for start in range(0, 400, 40):
        ids = {image["id"] for image in truth["images"][start : start + 40]}
        part = copy.deepcopy(truth)
        part["images"] = [row for row in truth["images"] if row["id"] in ids]
        part["annotations"] = [row for row in truth["annotations"] if row["image_id"] in ids]
        one, other = (
            ResampledAP([row for row in rows if row["image_id"] in ids], part) for rows in (found, worse)
        )
        told = compare([one], [other], generator=np.random.default_rng(start), num_resamples=100)
        held += told.low <= everything <= told.high
    assert held >= 7


def test_what_cannot_be_compared_is_refused() -> None:
    found, truth = drawn(0)
    with pytest.raises(DetectionsError, match="no image has id 99"):
        ResampledAP([{**found[0], "image_id": 99}], truth)
    with pytest.raises(ValueError, match="wanted APs of the same images, got 0 and 1"):
        compare([], [ResampledAP(found, truth)], generator=np.random.default_rng(0))
    alone = {**truth, "images": [{"id": 1}], "annotations": []}
    one = ResampledAP([], alone)
    with pytest.raises(ValueError, match="cannot be guessed from a single one"):
        compare([one], [one], generator=np.random.default_rng(0))


def test_draws_of_images_without_objects_do_not_count() -> None:
    box = {"category_id": 1, "bbox": [10, 10, 50, 40], "image_id": 1}
    truth = {"images": [{"id": 1}, {"id": 2}], "categories": [{"id": 1, "name": "a"}], "annotations": [box]}
    found = ResampledAP([{**box, "score": 0.9}], truth)
    told = compare([ResampledAP([], truth)], [found], generator=np.random.default_rng(0))
    assert (told.difference, told.low, told.high) == pytest.approx((1.0, 1.0, 1.0))
