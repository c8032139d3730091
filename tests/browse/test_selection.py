"""Filters keep the images that have a box, or an error, of a class, size and level; content says what is drawn."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sniper.browse import content
from sniper.browse.chips import ChipChooser, ChosenChips, choose_chips
from sniper.browse.content import MatchedDetections, describe_image
from sniper.browse.selection import KINDS, Filter, Kind, select_images
from sniper.chips import LevelSpec, PyramidSpec
from sniper.chips.targets import BoxStatus
from sniper.data.datasets import Dataset, load_dataset
from sniper.errors import ConfigError
from sniper.geometry.detections import DEFAULT_MIN_SCORE
from tests.browse.data import match, write_coco
from tests.evaluation.random_pairs import random_pair

PYRAMID = PyramidSpec(
    chip_size=128, levels=(LevelSpec(factor=2.0, below=40), LevelSpec(long_side=128, at_least=30))
)


@pytest.fixture
def world(tmp_path: Path) -> Dataset:
    """Images with a small car, a large bike, both, a crowd only, and nothing."""
    sides = dict.fromkeys(["small.png", "Large.png", "both.png", "crowd.png", "none.png"], (400, 300))
    boxes = {
        "small.png": [(1, 10, 10, 20, 20)],
        "Large.png": [(2, 50, 50, 100, 100)],
        "both.png": [(1, 10, 10, 20, 20), (2, 50, 50, 100, 100)],
        "crowd.png": [(1, 0, 0, 200, 200)],
    }
    path = write_coco(tmp_path, sides, boxes, crowds={"crowd.png": [0]})
    return load_dataset(path, has_images=False)


@pytest.fixture
def detections(world: Dataset) -> MatchedDetections:
    """The small car, a bike at 0.4, a false car of 50 px at 0.6, and a car in the crowd."""
    return match(
        world,
        [
            (1, 1, 0.9, [10, 10, 20, 20]),
            (2, 1, 0.6, [200, 200, 50, 50]),
            (3, 2, 0.4, [50, 50, 100, 100]),
            (4, 1, 0.8, [10, 10, 30, 30]),
        ],
    )


@pytest.fixture
def chips(world: Dataset) -> ChosenChips:
    chosen = choose_chips(world, PYRAMID)
    assert chosen is not None
    return chosen


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"kind": "objects"}, [0, 1, 2]),
        ({"kind": "empty"}, [3, 4]),
        ({"label": 0}, [0, 1, 2, 3]),  # detections count, too
        ({"label": 1}, [1, 2]),
        ({"label": 1, "kind": "objects"}, [1, 2]),
        ({"label": 0, "kind": "empty"}, [1, 3, 4]),
        ({"at_least": 20.0, "below": 20.1, "kind": "objects"}, [0, 2]),
        ({"below": 20.0, "kind": "objects"}, []),
        ({"level": 0, "kind": "objects"}, [0, 2]),
        ({"level": 1, "kind": "objects"}, [1, 2]),
        ({"level": 1}, [1, 2, 3]),  # with detections of the size of the level
        ({"name": "lar"}, [1]),
        ({"name": ".PNG", "kind": "empty"}, [3, 4]),
        ({"kind": "errors"}, [1, 2]),
        ({"kind": "false"}, [1]),
        ({"kind": "missed"}, [1, 2]),
        ({"kind": "correct"}, [0, 3, 4]),
        ({"kind": "missed", "label": 0}, [2]),
        ({"kind": "missed", "min_score": 0.5}, [1, 2]),
        ({"kind": "missed", "label": 1, "min_score": 0.3}, [1]),
        ({"kind": "missed", "label": 1, "min_score": 0.41}, [1, 2]),
        ({"kind": "false", "min_score": 0.7}, []),
        ({"kind": "false", "at_least": 51.0}, []),
        ({"kind": "false", "level": 0}, []),
        ({"kind": "missed", "min_score": 0.95}, [0, 1, 2]),
    ],
)
def test_a_filter_keeps_the_images_with_such_a_box(
    world: Dataset,
    detections: MatchedDetections,
    chips: ChosenChips,
    values: dict[str, Any],
    kept: list[int],
) -> None:
    selected = select_images(world, Filter(**values), detections=detections, chips=chips)
    assert selected.tolist() == kept


def test_a_filter_without_what_it_needs_is_a_mistake_of_the_caller(world: Dataset) -> None:
    with pytest.raises(ValueError, match="errors requires detections"):
        select_images(world, Filter(kind="errors"))
    with pytest.raises(ValueError, match="a level requires chips"):
        select_images(world, Filter(level=0))
    assert select_images(world, Filter(label=0)).tolist() == [0, 2]


def test_a_box_that_moved_to_a_coarser_level_belongs_to_that_level(tmp_path: Path) -> None:
    path = write_coco(
        tmp_path, {"a.png": (400, 300)}, {"a.png": [(1, 10, 10, 200, 4)]}
    )  # size 28, longer than a chip
    long = load_dataset(path, has_images=False)
    chips = choose_chips(long, PYRAMID)
    assert chips is not None
    assert chips.table.moved_to.tolist() == [1]
    assert select_images(long, Filter(level=1), chips=chips).tolist() == [0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_data_set_without_images_has_no_image_to_keep(tmp_path: Path, kind: Kind) -> None:
    empty = load_dataset(write_coco(tmp_path, {}, {}), has_images=False)
    assert select_images(empty, Filter(kind=kind), detections=match(empty, [])).tolist() == []


def test_detections_agree_with_the_matching_of_each_object() -> None:
    pair = random_pair(0, 60, 80)
    matched = MatchedDetections.of(pair)
    images = np.repeat(np.arange(pair.truth.num_images), np.diff(matched.offsets))
    assert (np.diff(matched.scores)[np.diff(images) == 0] <= 0).all()
    scores = matched.match_scores[np.isfinite(matched.match_scores)]
    assert len(scores) > 5
    np.testing.assert_array_equal(np.sort(scores), np.sort(matched.scores[matched.is_true_positive]))
    assert not np.isfinite(matched.match_scores[pair.truth.is_crowd]).any()


def test_without_detections_the_usual_score_is_shown_first(world: Dataset) -> None:
    matched = match(world, [])
    assert matched.best_score == DEFAULT_MIN_SCORE
    assert matched.offsets.tolist() == [0] * 6


def test_an_image_is_described_with_objects_errors_and_chips(
    world: Dataset, detections: MatchedDetections, chips: ChosenChips
) -> None:
    described = describe_image(world, 2, detections=detections, chips=chips)
    assert described["objects"] == {
        "boxes": [[10, 10, 30, 30], [50, 50, 150, 150]],
        "labels": [0, 1],
        "crowds": [False, False],
        "match_scores": [None, 0.4],
    }
    assert described["detections"] == {
        "boxes": [[50, 50, 150, 150]], "labels": [1], "scores": [0.4], "kinds": ["true"]
    }  # fmt: skip
    fine, whole = described["chips"]
    assert described["num_chips"] == 2
    assert (fine["level"], whole["level"]) == (0, 1)
    assert whole["window"] == [0, 0, 400, 300]
    assert fine["window"][2] - fine["window"][0] == 64
    assert fine["status"][0] == BoxStatus.VALID
    assert whole["status"] == [BoxStatus.OUT_OF_RANGE, BoxStatus.VALID]
    assert describe_image(world, 1, detections=detections, chips=None)["detections"]["kinds"] == ["false"]
    assert describe_image(world, 3, detections=detections, chips=None)["detections"]["kinds"] == ["ignored"]
    plain = describe_image(world, 4, detections=None, chips=None)
    assert plain["detections"] is None
    assert "chips" not in plain


def test_of_many_chips_those_with_the_most_objects_are_drawn(
    world: Dataset, chips: ChosenChips, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(content, "MAX_CHIPS", 1)
    described = describe_image(world, 2, detections=None, chips=chips)
    assert (len(described["chips"]), described["num_chips"]) == (1, 2)


def test_without_a_pyramid_the_one_that_suits_the_boxes_is_taken(world: Dataset) -> None:
    chips = choose_chips(world, None)
    assert chips is not None
    assert chips.is_suggested
    assert chips.pyramid.levels[-1].below == math.inf
    assert chips.table.offsets[-1] == len(chips.table) > 0


def test_the_state_of_the_choice_is_reported(
    world: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = ChipChooser(world, PYRAMID)
    ready.wait()
    assert (ready.state, ready.problem) == ("ready", "")
    none = ChipChooser(world.select(np.array([4])), PYRAMID)
    none.wait()
    assert (none.state, none.chips) == ("none", None)

    def refuse(*_: object, **__: object) -> None:
        raise ConfigError("levels: too large")

    monkeypatch.setattr("sniper.browse.chips.choose_chips", refuse)
    failed = ChipChooser(world, PYRAMID)
    failed.wait()
    assert (failed.state, failed.problem) == ("failed", "levels: too large")
