"""`sniper.plan`, as a Python function."""

from pathlib import Path

import numpy as np

import sniper
from tests.chips.worlds import SMALL_PYRAMID
from tests.data.tiny import write_dataset


def test_a_plan_of_a_file_is_that_of_its_data_set(tmp_path: Path) -> None:
    path = write_dataset(tmp_path)
    experiment = sniper.ExperimentSpec(pyramid=SMALL_PYRAMID)
    of_file = sniper.plan(str(path), experiment=experiment, num_levels=1, share=0.5)
    of_dataset = sniper.plan(sniper.load_dataset(path), experiment=experiment, num_levels=1, share=0.5)
    assert of_file.as_dict() == of_dataset.as_dict()
    assert of_file.cost.pyramid == SMALL_PYRAMID
    np.testing.assert_array_equal(of_file.table.x, of_dataset.table.x)


def test_a_plan_without_suggestion_removes_an_earlier_one(tmp_path: Path) -> None:
    path = write_dataset(tmp_path, boxes_per_image=0)
    (tmp_path / "plan").mkdir()
    (tmp_path / "plan" / "suggested.yaml").write_text("of an earlier plan")
    page = sniper.plan(path)
    assert not page.suggestions
    page.save(tmp_path / "plan")
    assert [file.name for file in (tmp_path / "plan").iterdir()] == ["plan.html"]
