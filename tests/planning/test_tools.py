"""Settings of other tools: tiles as they place them, and what no part of an image shows well."""

from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sniper.chips import ImageBoxes
from sniper.planning.tools import ToolName, plan_tool

USEFUL = (16.0, 480.0)


def images_of(*sides: tuple[int, int], boxes: list[list[float]], per_image: list[int]) -> ImageBoxes:
    array = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    return ImageBoxes(
        widths=np.array([width for width, _ in sides]),
        heights=np.array([height for _, height in sides]),
        offsets=np.concatenate([[0], np.cumsum(per_image)]).astype(np.int64),
        boxes=array,
        is_required=np.ones(len(array), dtype=np.bool_),
    )


def starts_along(length: int, tile: int, overlap: float) -> list[int]:
    """Return where tiles start, as SAHI and supervision place them."""
    starts, position = [], 0
    while position + tile < length:
        starts.append(position)
        position += tile - int(tile * overlap)
    return [*starts, max(length - tile, 0)]


@given(st.integers(0, 10_000), st.sampled_from(["sahi", "supervision"]))
@settings(deadline=None, max_examples=8)
def test_tiles_and_cut_boxes_are_those_of_brute_force(seed: int, tool: ToolName) -> None:
    rng = np.random.default_rng(seed)
    width, height = rng.integers(300, 3000, 2).tolist()
    low = rng.uniform(0, 0.9, (30, 2)) * [width, height]
    high = np.minimum(low + rng.uniform(5, 400, (30, 2)), [width, height])
    images = images_of((width, height), boxes=np.concatenate([low, high], axis=1).tolist(), per_image=[30])
    plan = plan_tool(tool, images, data=Path("data.yaml"), useful_sizes=USEFUL)
    assert plan.tile is not None
    assert plan.overlap is not None
    columns = starts_along(width, plan.tile, plan.overlap)
    rows = starts_along(height, plan.tile, plan.overlap)
    shown = np.zeros((30, 2), dtype=bool)
    for axis, starts in enumerate((columns, rows)):
        for start in starts:
            shown[:, axis] |= (low[:, axis] >= start) & (high[:, axis] <= start + plan.tile)
    num_cut = int((~shown.all(axis=1)).sum())
    assert sum(each.num_cut for each in plan.boxes) == (0 if tool == "sahi" else num_cut)
    if min(width, height) >= plan.tile:
        assert plan.train_megapixels == pytest.approx(len(columns) * len(rows) * 640**2 / 1e6)


@pytest.mark.parametrize(
    ("size", "input_size", "missed"),
    [
        (40.0, 832, 0.0),  # 16 px at 832 / 2048
        (8.0, 320, 1.0),  # too small at every size: the cheapest one
        (1900.0, 320, 0.0),
    ],
)
def test_the_size_of_images_is_the_smallest_that_shows_the_objects(
    size: float, input_size: int, missed: float
) -> None:
    images = images_of((2048, 1024), boxes=[[10, 10, 10 + size, 10 + min(size, 900)]], per_image=[1])
    plan = plan_tool("ultralytics", images, data=Path("data.yaml"), useful_sizes=USEFUL)
    assert (plan.input_size, plan.share_missed) == (input_size, missed)
    assert f"imgsz={input_size}" in plan.lines[0]


def test_boxes_are_counted_by_size_and_by_what_is_wrong() -> None:
    boxes = [[0.0, 0.0, 4.0, 4.0], [100.0, 100.0, 140.0, 140.0], [0.0, 0.0, 4000.0, 4000.0]]
    images = images_of((4000, 4000), boxes=boxes + [[50.0, 50.0, 90.0, 90.0]] * 60, per_image=[63])
    plan = plan_tool("supervision", images, data=Path("data.yaml"), useful_sizes=USEFUL)
    small, medium, large = plan.boxes
    assert (small.num_boxes, small.num_too_small, small.num_cut) == (1, 1, 0)
    assert (medium.num_boxes, medium.num_missed) == (61, 0)
    assert (large.num_boxes, large.num_cut, large.num_too_large) == (1, 1, 0)
    with_whole = plan_tool("sahi", images, data=Path("data.yaml"), useful_sizes=USEFUL)
    assert with_whole.boxes[2].num_cut == 0
    assert with_whole.boxes[2].num_too_large == 1


@pytest.mark.parametrize("tool", get_args(ToolName))
def test_a_data_set_without_objects_has_a_plan(tool: ToolName) -> None:
    images = images_of((640, 480), boxes=[], per_image=[0])
    plan = plan_tool(tool, images, data=Path("set"), useful_sizes=USEFUL)
    assert plan.share_missed == 0
    assert plan.megapixels > 0


def test_more_objects_than_a_tool_returns_are_named() -> None:
    images = images_of((640, 480), boxes=[[0, 0, 40, 40]] * 350, per_image=[350])
    yolo = plan_tool("ultralytics", images, data=Path("a b/train.json"), useful_sizes=USEFUL)
    assert yolo.lines[0] == "sniper convert 'a b/train.json' yolo --to yolo"
    assert yolo.lines[-1].endswith("max_det=400")
    detr = plan_tool("rfdetr", images, data=Path("set/train.json"), useful_sizes=USEFUL)
    assert "num_queries=400, num_select=400" in detr.lines[0]
    assert detr.lines[1] == "model.train(dataset_dir='set')"


def test_names_of_options_are_those_of_the_packages() -> None:
    images = images_of((3000, 2000), boxes=[[0, 0, 20, 20]], per_image=[1])
    import inspect
    import re

    sahi = pytest.importorskip("sahi.predict")
    lines = plan_tool("sahi", images, data=Path("x"), useful_sizes=USEFUL).lines
    names = set(re.findall(r"(\w+)=", lines[0]))
    assert names <= set(inspect.signature(sahi.get_sliced_prediction).parameters)
    options = set(re.findall(r"--(\w+)", lines[1]))
    assert options <= set(inspect.signature(sahi.predict).parameters)


def test_the_line_for_supervision_builds_a_slicer() -> None:
    sv = pytest.importorskip("supervision")
    images = images_of((3000, 2000), boxes=[[0, 0, 20, 20]], per_image=[1])
    (line,) = plan_tool("supervision", images, data=Path("x"), useful_sizes=USEFUL).lines
    slicer = eval(line, {"sv": sv, "callback": lambda image: sv.Detections.empty()})
    assert isinstance(slicer, sv.InferenceSlicer)
