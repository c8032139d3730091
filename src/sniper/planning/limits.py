"""Choose how much of a level image a search takes at once, and how many objects it may find there.

Detectors keep a fixed number of proposals or detections of each image that they are given. In a window of a large image
that shows more objects than that, the others would be lost.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from sniper.chips import ImageBoxes, LevelSpec
from sniper.config.experiment import ExperimentSpec, PredictSpec
from sniper.models.spec import DetectorSpec

_SIDE_STEP = 256  # level pixels
_STEP = 100
_PER_OBJECT = 1.5
_CANDIDATES = 3  # that enter non-maximum suppression, for each that is kept

PROPOSALS_FIELDS = {
    "two_stage": "model.rpn.post_nms_top_n",
    "torchvision": "model.torchvision.detections_per_window",
    "transformers": "model.transformers.detections_per_window",
}
"""The field that limits what a detector finds in a window, by kind."""


def suggest_window(images: ImageBoxes, levels: Sequence[LevelSpec]) -> int:
    """Return the longest side of a window: that of the largest level image, rounded up, or the default if it is less.

    So a larger image is searched in parts that show as much as the images of the data set.

    Args:
        images: of the data set.
        levels: at which images are searched.
    """
    longest = max(int(np.maximum(*level.resized(images.widths, images.heights)).max()) for level in levels)
    return min(_SIDE_STEP * math.ceil(longest / _SIDE_STEP), PredictSpec().window)


def most_objects(images: ImageBoxes, levels: Sequence[LevelSpec], *, window: int) -> int:
    """Return the largest number of objects in the valid range of a level that a window of it shows.

    Args:
        images: of the data set, with their boxes.
        levels: at which images are searched.
        window: side of the windows, level pixels; they lie side by side.
    """
    most = 0
    image = images.image_of_box
    centres = (images.boxes[:, :2] + images.boxes[:, 2:]) / 2
    for level in levels:
        scales = level.resized(images.widths, images.heights)[0] / images.widths
        is_counted = images.is_required & level.valid_range.contains(images.boxes)
        x, y = (centres * scales[image, None] // window).astype(np.int64).T
        windows = ((image * (x.max(initial=0) + 1) + x) * (y.max(initial=0) + 1) + y)[is_counted]
        most = max(most, int(np.unique(windows, return_counts=True)[1].max(initial=0)))
    return most


def limit_search(
    experiment: ExperimentSpec, images: ImageBoxes, *, is_given: Callable[[str], bool] = lambda name: False
) -> ExperimentSpec:
    """Choose the largest window of a search, and how many detections are kept in it and in an image.

    Args:
        experiment: with the levels of the search.
        images: of the data set, with their boxes.
        is_given: whether a field, by dotted name, has been set and stays as it is.
    """
    predict, model = experiment.predict, experiment.model
    if not is_given("predict.max_detections"):
        most = int(np.diff(images.offsets).max(initial=0))
        predict = replace(predict, max_detections=max(_detections_for(most), PredictSpec().max_detections))
    if not is_given("predict.window"):
        predict = replace(predict, window=suggest_window(images, predict.levels))
    if not any(map(is_given, (PROPOSALS_FIELDS[model.kind], "model.rpn.pre_nms_top_n"))):
        model = _with_proposals(model, most_objects(images, predict.levels, window=predict.window))
    return replace(experiment, predict=predict, model=model)


def num_proposals(model: DetectorSpec) -> int:
    """Return how many proposals, or detections, a detector keeps in a window."""
    part, name = PROPOSALS_FIELDS[model.kind].split(".")[1:]
    return int(getattr(getattr(model, part), name))


def _with_proposals(model: DetectorSpec, num_objects: int) -> DetectorSpec:
    """Return a detector that keeps enough proposals, or detections, for a number of objects in a window."""
    wanted = max(_detections_for(num_objects), num_proposals(model))
    if model.kind == "torchvision":
        return replace(model, torchvision=replace(model.torchvision, detections_per_window=wanted))
    if model.kind == "transformers":
        return replace(model, transformers=replace(model.transformers, detections_per_window=wanted))
    candidates = max(model.rpn.pre_nms_top_n, _CANDIDATES * wanted)
    return replace(model, rpn=replace(model.rpn, post_nms_top_n=wanted, pre_nms_top_n=candidates))


def _detections_for(num_objects: int) -> int:
    """Return how many detections suit a number of objects: half as many again, rounded up to hundreds."""
    return _STEP * math.ceil(_PER_OBJECT * num_objects / _STEP)
