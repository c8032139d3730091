"""`sniper.plan`, as a Python function."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import sniper
from sniper.config.experiment import widened
from sniper.config.loading import load_experiment
from sniper.planning.plan import choose_chips
from tests.chips.worlds import SMALL_PYRAMID
from tests.data.datasets.layouts import write_files
from tests.data.tiny import write_dataset
from tests.planning.test_auto import derived

YOLO = {
    "data.yaml": "{train: images/train, val: images/val, names: [cat]}",
    **{f"images/{split}/{split}.png": None for split in ("train", "val")},
    **{f"labels/{split}/{split}.txt": "0 0.5 0.5 0.2 0.4" for split in ("train", "val")},
}


def test_a_plan_of_a_file_is_that_of_its_data_set(tmp_path: Path) -> None:
    path = write_dataset(tmp_path)
    experiment = sniper.ExperimentSpec(pyramid=SMALL_PYRAMID)
    of_file = sniper.plan(str(path), experiment=experiment, num_levels=1)
    of_dataset = sniper.plan(sniper.load_dataset(path), experiment=experiment, num_levels=1)
    assert of_file.as_dict() == of_dataset.as_dict()
    assert of_file.cost.pyramid == SMALL_PYRAMID
    np.testing.assert_array_equal(of_file.table.x, of_dataset.table.x)


def test_a_plan_without_suggestion_removes_an_earlier_one(tmp_path: Path) -> None:
    path = write_dataset(tmp_path, boxes_per_image=0)
    (tmp_path / "plan").mkdir()
    (tmp_path / "plan" / "suggested.yaml").write_text("of an earlier plan")
    page = sniper.plan(path)
    assert page.suggestion is None
    page.save(tmp_path / "plan")
    assert [file.name for file in (tmp_path / "plan").iterdir()] == ["plan.html"]


def test_without_an_experiment_the_suggestion_is_planned_and_loads(tmp_path: Path) -> None:
    path = write_dataset(tmp_path)
    page = sniper.plan(path, seed=3)
    assert page.suggestion is not None
    assert page.is_suggested
    page.save(tmp_path / "plan")
    spec = load_experiment(tmp_path / "plan" / "suggested.yaml")
    assert spec == page.experiment
    assert spec.pyramid == page.suggestion.pyramid
    assert spec.predict.levels == widened(spec.pyramid.levels)
    assert spec.data.train.annotations == str(path)
    again = choose_chips(page.dataset, spec, proposals=None, seed=3)
    np.testing.assert_array_equal(page.table.x, again.x)


@pytest.mark.parametrize("has_experiment", [True, False])
def test_a_batch_size_is_used_with_and_without_an_experiment(tmp_path: Path, has_experiment: bool) -> None:
    experiment = sniper.ExperimentSpec(pyramid=SMALL_PYRAMID) if has_experiment else None
    page = sniper.plan(write_dataset(tmp_path), experiment=experiment, batch_size=3)
    assert page.experiment.train.batch_size == page.as_dict()["batch_size"] == 3


@pytest.mark.parametrize(
    ("split", "is_scored"), [(None, True), ("train", True), ("val", False), ("all", False)]
)
@pytest.mark.parametrize("has_experiment", [True, False])
def test_the_suggestion_keeps_the_split_and_scores_on_another(
    tmp_path: Path, split: str | None, is_scored: bool, has_experiment: bool
) -> None:
    experiment = sniper.ExperimentSpec(pyramid=SMALL_PYRAMID) if has_experiment else None
    page = sniper.plan(write_files(tmp_path, YOLO), experiment=experiment, split=split)
    assert len(page.dataset) == (2 if split == "all" else 1)
    assert yaml.safe_load(page.suggested_yaml)["data"]["train"].get("split") == split
    assert ("For scores" in page.suggested_yaml) != is_scored
    assert (page.experiment.train.evaluate_every is not None) == (is_scored and not has_experiment)


def test_the_suggestion_follows_links_where_the_plan_does(tmp_path: Path) -> None:
    spec = sniper.DataSpec(follow_links=True)
    page = sniper.plan(sniper.load_dataset(write_dataset(tmp_path), data=spec))
    assert page.experiment.data.follow_links


@pytest.mark.parametrize(
    ("options", "is_derived"),
    [
        ({}, True),
        ({"seed": 1, "crowded_above": 3}, True),
        ({"share": 0.9}, False),
        ({"num_levels": 2}, False),
        ({"useful_sizes": (20.0, 90.0)}, False),
        ({"batch_size": 3}, False),
        ({"split": "all"}, False),
        ({"experiment": sniper.ExperimentSpec(pyramid=SMALL_PYRAMID)}, False),
    ],
)
def test_a_plan_is_of_what_training_derives_unless_options_decide(
    tmp_path: Path, options: dict[str, Any], is_derived: bool
) -> None:
    path = write_dataset(tmp_path)
    page = sniper.plan(path, **options)
    assert page.source == (path if is_derived else None)
    if is_derived:
        experiment = derived(sniper.load_dataset(path), num_scored=0)
        assert experiment.pyramid == page.experiment.pyramid
        assert experiment.train == page.experiment.train
        assert experiment.model == page.experiment.model


def test_planning_imports_no_torch(tmp_path: Path) -> None:
    path = write_dataset(tmp_path)
    program = f"import sys, sniper\nsniper.plan({str(path)!r}).as_dict()\n"
    program += "print({'torch', 'matplotlib'} & set(sys.modules))"
    environment = {**os.environ, "PYTHONPATH": str(Path(sniper.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "set()\n"


def test_the_useful_sizes_are_those_of_the_neck(tmp_path: Path) -> None:
    path = write_dataset(tmp_path)
    one_map = sniper.ExperimentSpec(pyramid=SMALL_PYRAMID)
    assert sniper.plan(path).cost.useful_sizes == (16.0, 480.0)
    assert sniper.plan(path, experiment=one_map).cost.useful_sizes == (32.0, 480.0)
    assert sniper.plan(path, experiment=one_map, useful_sizes=(20.0, 90.0)).cost.useful_sizes == (20.0, 90.0)
