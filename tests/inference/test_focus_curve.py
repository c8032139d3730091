"""The choice of a focus: what each candidate would find is replayed, chosen, and used with the same weights only."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from sniper.chips import LevelSpec
from sniper.config.experiment import FocusSpec, PredictSpec
from sniper.data.datasets import Dataset, load_dataset
from sniper.data.datasets.categories import match_categories
from sniper.errors import AnnotationError, RunError
from sniper.evaluation.pair import GroundTruth
from sniper.geometry import Detections
from sniper.inference.focus_choice import FocusChoice, hash_levels, load_focus, save_focus
from sniper.inference.focus_curve import (
    CUES,
    Replay,
    WindowCost,
    candidates_for,
    check_objects,
    choose_focus,
    measure_focus,
)
from sniper.runs.run import Run
from tests.inference.blobs import blob_detector, draw_blobs
from tests.inference.focus_points import point

LEVELS = (LevelSpec(factor=2.0, below=30), LevelSpec(factor=1.0, at_least=24))
CANDIDATES = [
    FocusSpec(min_score=score, window=window, cues=cues)
    for cues in CUES
    for window in (128, 256)
    for score in (0.4, 0.9, 1.5)
]


@pytest.mark.parametrize("count", [3, 30])
@pytest.mark.parametrize(
    "focus", CANDIDATES, ids=lambda focus: f"{focus.cues}-{focus.window}-{focus.min_score}"
)
def test_a_replay_finds_what_a_search_finds(focus: FocusSpec, count: int) -> None:
    image, _ = draw_blobs(count, width=1200, height=900, smallest=6, largest=60, count=count)
    detector = blob_detector(*LEVELS, merge="hard", has_head=True).with_focus(None)
    (whole,) = detector.search([image], keeps_all_sizes=True)
    (searched,) = detector.with_focus(focus).search([image])
    assert whole is not None
    assert searched is not None
    replay = Replay(spec=detector.spec, focus=focus)
    replayed, found = replay(whole), detector.with_focus(focus).predict(image)
    assert replay.num_pixels == searched.num_pixels
    assert replay.num_windows == sum(len(level.windows) for level in searched.by_level)
    order, other = np.lexsort(replayed.boxes.T), np.lexsort(found.boxes.T)
    np.testing.assert_array_equal(replayed.boxes[order], found.boxes[other])
    np.testing.assert_array_equal(replayed.scores[order], found.scores[other])


@pytest.fixture
def images(tmp_path: Path) -> Dataset:
    """Two images: many small objects in one corner of the first, none in the second."""
    image = np.zeros((800, 800, 3), dtype=np.uint8)
    boxes = [[20 + 30 * column, 20 + 30 * row, 12, 12] for column in range(5) for row in range(5)]
    for x, y, width, height in boxes:
        image[y : y + height, x : x + width] = 255
    (tmp_path / "images").mkdir()
    Image.fromarray(image).save(tmp_path / "images" / "full.png")
    Image.fromarray(np.zeros_like(image)).save(tmp_path / "images" / "empty.png")
    truth = {
        "images": [
            {"id": number, "file_name": name, "width": 800, "height": 800}
            for number, name in enumerate(("full.png", "empty.png"), start=1)
        ],
        "annotations": [
            {"id": number, "image_id": 1, "category_id": 1, "bbox": box, "area": 144, "iscrowd": 0}
            for number, box in enumerate(boxes, start=1)
        ],
        "categories": [{"id": 1, "name": "blob"}],
    }
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    return load_dataset(tmp_path / "truth.json")


def test_the_curve_has_the_whole_search_first_and_the_cheapest_that_loses_nothing_is_chosen(
    images: Dataset,
) -> None:
    detector = blob_detector(*LEVELS, merge="hard")
    done: list[tuple[int, int]] = []
    points = measure_focus(
        detector,
        images,
        truth=GroundTruth.of(images),
        match=match_categories(detector.categories, images.categories),
        candidates=[FocusSpec(min_score=0.4, window=256), FocusSpec(min_score=30.0, window=256)],
        cost=WindowCost(per_window=0.5, per_megapixel=2.0),
        on_image=lambda *counts: done.append(counts),
    )
    assert done == [(1, 2), (2, 2)]
    whole, focused, blind = points
    assert (whole.focus, whole.pixel_share, whole.ap) == (None, 1.0, 1.0)
    coarse = 2 * 832**2  # padded to the grid
    assert whole.megapixels == (coarse + 2 * 1600**2) / 2e6
    assert focused.ap == 1.0
    assert coarse / 2e6 < focused.megapixels < 1.5 * coarse / 2e6
    assert blind.megapixels == coarse / 2e6
    assert blind.ap == 0.0
    assert whole.seconds == 2 * 0.5 + 2.0 * whole.megapixels  # a window of each level
    assert blind.seconds == 0.5 + 2.0 * blind.megapixels
    assert blind.time_share == blind.seconds / whole.seconds
    assert choose_focus(points, loss=0.0) is focused
    assert choose_focus(points, loss=1.0) is blind


def test_a_choice_loses_no_more_than_allowed_or_is_fast_enough() -> None:
    points = [point(1, 0.4), point(0.6, 0.399), point(0.3, 0.396), point(0.2, 0.3)]
    assert choose_focus(points, loss=0.005) is points[2]
    assert choose_focus(points, loss=0.002) is points[1]
    assert choose_focus(points, loss=0.0) is points[0]
    assert choose_focus(points, loss=0.0, speed_up=2) is points[2]
    assert choose_focus(points, loss=0.0, speed_up=5) is points[3]
    assert choose_focus(points, loss=0.0, speed_up=6) is points[0]
    slower = [point(1, 0.4), point(1.2, 0.5)]  # many small windows
    assert choose_focus(slower, loss=0.1) is slower[0]


@pytest.mark.parametrize("ap", [-1.0, 0.0])
def test_nothing_is_chosen_where_a_whole_search_finds_nothing(ap: float) -> None:
    with pytest.raises(ValueError, match="an AP above 0"):
        choose_focus([point(1, ap), point(0.5, ap)], loss=0.005)


def test_objects_of_the_coarsest_level_or_of_one_that_no_coarser_shows_do_not_count(images: Dataset) -> None:
    check_objects(images, LEVELS)  # objects of 12 pixels
    for levels in (
        (LevelSpec(factor=2.0, below=12), LevelSpec(factor=1.0, at_least=10)),
        (LevelSpec(factor=5.0, below=15), LevelSpec(factor=1.0, at_least=12)),
    ):
        with pytest.raises(AnnotationError, match="none of 25 objects is in the range"):
            check_objects(images, levels)
    crowds = dataclasses.replace(images, is_crowd=np.ones(25, dtype=np.bool_))
    with pytest.raises(AnnotationError, match="no objects to score"):
        check_objects(crowds, LEVELS)


def test_a_second_stage_makes_small_windows_as_dear_as_large_ones() -> None:
    """A detector that takes 3 ms for a window and 20 ms for a megapixel, as a clock counts that its calls advance."""
    now = 0.0

    def detect(images: Sequence[torch.Tensor]) -> list[Detections]:
        nonlocal now
        now += sum(0.003 + 0.02 * image[0].numel() / 1e6 for image in images)
        return [Detections.empty() for _ in images]

    detector = dataclasses.replace(blob_detector(*LEVELS), detect=detect)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sniper.inference.focus_curve.time", SimpleNamespace(process_time=lambda: now))
        cost = WindowCost.measure(detector)
    assert cost.per_window == pytest.approx(0.003)
    assert cost.per_megapixel == pytest.approx(0.02)
    assert cost.seconds(num_windows=2, megapixels=0.5) == pytest.approx(0.016)


def test_objects_fit_into_the_windows_that_are_compared() -> None:
    assert {each.window for each in candidates_for(LEVELS)} == {128, 256, 512}
    large = (LevelSpec(factor=2.0, below=80), LevelSpec(long_side=256, at_least=60))
    assert {each.window for each in candidates_for(large)} == {256, 512}
    assert {each.window for each in candidates_for((LevelSpec(factor=2.0, below=900),))} == {512}


def test_candidates_have_the_cues_that_a_detector_has() -> None:
    assert {each.cues for each in candidates_for(LEVELS)} == {"detections"}
    assert {each.cues for each in candidates_for(LEVELS, cues=CUES)} == {"detections", "head"}


def test_a_choice_counts_for_its_weights_and_levels(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", config="")
    assert load_focus(run) is None
    spec = PredictSpec(levels=LEVELS)
    choice = FocusChoice(
        step=7,
        levels=hash_levels(LEVELS),
        focus=CANDIDATES[0],
        num_images=2,
        pixel_share=0.5,
        time_share=0.6,
        ap=0.4,
        ap_whole=0.4,
    )
    save_focus(run, choice)
    loaded = load_focus(run)
    assert loaded == choice
    assert choice.resolve(spec, step=7) == CANDIDATES[0]
    assert choice.resolve(spec, step=8) is None
    assert choice.resolve(dataclasses.replace(spec, levels=LEVELS[1:]), step=7) is None
    run.focus_path.write_text('{"step": -1}')
    with pytest.raises(RunError, match=r"focus\.json: cannot be read \(.*\); delete it"):
        load_focus(run)
