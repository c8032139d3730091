"""Windows and the number of detections in them follow the images and objects of a data set."""

import dataclasses

import numpy as np
import pytest

from sniper.chips import ImageBoxes, LevelSpec
from sniper.config.experiment import ExperimentSpec, PredictSpec
from sniper.models.spec import DetectorSpec
from sniper.planning.limits import limit_search, most_objects, num_proposals, suggest_window

LEVELS = (LevelSpec(factor=2.0, below=40), LevelSpec(long_side=256, at_least=30))


def images_of(*sides: tuple[int, int], boxes: list[list[float]] | None = None) -> ImageBoxes:
    """Return images, the last of which has the boxes."""
    count = len(boxes or [])
    return ImageBoxes(
        widths=np.array([width for width, _ in sides]),
        heights=np.array([height for _, height in sides]),
        offsets=np.array([0] * len(sides) + [count]),
        boxes=np.array(boxes or [], dtype=np.float64).reshape(-1, 4),
        is_required=np.ones(count, dtype=np.bool_),
    )


def grid_of(num_columns: int, num_rows: int, *, step: int, side: int) -> list[list[float]]:
    """Return boxes on a grid."""
    return [
        [float(x * step), float(y * step), float(x * step + side), float(y * step + side)]
        for y in range(num_rows)
        for x in range(num_columns)
    ]


@pytest.mark.parametrize(
    ("sides", "window"),
    [
        ([(640, 512)], 1280),
        ([(640, 512), (500, 700)], 1536),
        ([(100, 90)], 256),
        ([(12_000, 9_000), (640, 512)], 4096),
    ],
)
def test_a_window_is_as_large_as_the_level_images_of_the_data_set(
    sides: list[tuple[int, int]], window: int
) -> None:
    assert suggest_window(images_of(*sides), LEVELS) == window


def test_objects_of_a_window_are_those_in_the_range_of_its_level() -> None:
    small, large = grid_of(20, 20, step=20, side=10), grid_of(3, 2, step=200, side=100)
    images = images_of((100, 100), (1000, 1000), boxes=small + large)
    assert most_objects(images, LEVELS, window=2048) == 400
    assert most_objects(images, LEVELS, window=400) == 100  # 200 px of the image, ten by ten
    assert most_objects(images, LEVELS[1:], window=400) == 6
    ignored = dataclasses.replace(images, is_required=np.zeros(406, dtype=np.bool_))
    assert most_objects(ignored, LEVELS, window=400) == 0


@pytest.mark.parametrize(
    "model",
    [
        DetectorSpec(),
        DetectorSpec(kind="torchvision", name="fcos_resnet50_fpn"),
        DetectorSpec(kind="transformers", name="detr"),
    ],
)
def test_a_window_keeps_more_detections_than_it_has_objects(model: DetectorSpec) -> None:
    start = ExperimentSpec(model=model, predict=PredictSpec(levels=LEVELS))
    few = limit_search(start, images_of((1000, 1000), boxes=grid_of(5, 5, step=20, side=10)))
    assert (few.predict.window, few.predict.max_detections, num_proposals(few.model)) == (2048, 200, 300)
    many = limit_search(start, images_of((1000, 1000), boxes=grid_of(25, 25, step=20, side=10)))
    assert (many.predict.window, many.predict.max_detections, num_proposals(many.model)) == (2048, 1000, 1000)
    if model.kind == "two_stage":
        assert few.model.rpn.pre_nms_top_n == start.model.rpn.pre_nms_top_n
        dense = grid_of(70, 70, step=14, side=10)
        assert limit_search(start, images_of((1000, 1000), boxes=dense)).model.rpn.pre_nms_top_n == 3 * 7400


def test_fields_that_are_set_stay() -> None:
    images = images_of((1000, 1000), boxes=grid_of(25, 25, step=20, side=10))
    start = ExperimentSpec(predict=PredictSpec(levels=LEVELS, window=512))
    for names in ({"predict.window"}, {"predict.window", "predict.max_detections"}):
        limited = limit_search(start, images, is_given=names.__contains__)
        assert limited.predict.window == 512
        assert num_proposals(limited.model) == 300  # a window of 512 shows 169 objects
        assert limited.predict.max_detections == (200 if "predict.max_detections" in names else 1000)
    for name in ("model.rpn.post_nms_top_n", "model.rpn.pre_nms_top_n"):
        assert limit_search(start, images, is_given={name}.__contains__).model == start.model
