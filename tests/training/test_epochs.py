"""The chips of an epoch: those of a table that the experiment names, whole images or tiles."""

from pathlib import Path

import numpy as np
import pytest

from sniper.chips import ChipTable, PyramidSpec
from sniper.config.experiment import ExperimentSpec
from sniper.data.datasets import Dataset, load_dataset
from sniper.data.epoch import choose_positive_chips
from sniper.errors import AnnotationError, ChipTableError
from sniper.runs.run import Run
from sniper.training.epochs import load_configured_chips, order_epoch
from tests.data.tiny import write_dataset
from tests.training.experiments import (
    have_equal_weights,
    train_killed_at,
    train_run,
    with_data,
    with_train,
)


def write_table(path: Path, dataset: Dataset, pyramid: PyramidSpec) -> ChipTable:
    table = choose_positive_chips(dataset, pyramid, generator=np.random.default_rng(8))
    path.parent.mkdir(exist_ok=True)
    table.save(path, pyramid=pyramid, digest=dataset.digest)
    return table


def test_without_a_table_chips_are_chosen_anew(
    dataset: Dataset, spec: ExperimentSpec, tmp_path: Path
) -> None:
    assert load_configured_chips(Run(tmp_path), spec, dataset) is None
    first, again, second = (order_epoch(spec, dataset, epoch=epoch) for epoch in (0, 0, 1))
    assert first.chip_indices.tolist() == again.chip_indices.tolist()
    assert first.chip_indices.tolist() != second.chip_indices.tolist()


def test_a_table_serves_every_epoch_even_if_its_file_is_deleted(
    dataset: Dataset, spec: ExperimentSpec, tmp_path: Path
) -> None:
    path = tmp_path / "table.npz"
    table = write_table(path, dataset, spec.pyramid)
    spec = with_train(with_data(spec, chips=str(path), flip=0.0), epochs=2.0)
    unbroken = Run.create(tmp_path / "unbroken", config="")
    train_run(unbroken, spec, dataset)
    assert {entry["chips"] for entry in unbroken.entries() if "chips" in entry} == {len(table)}
    broken = Run.create(tmp_path / "broken", config="")
    train_killed_at(broken, spec, dataset, step=3)
    path.unlink()
    train_run(broken, spec, dataset)
    assert have_equal_weights(unbroken, broken)


def test_a_table_in_the_folder_of_the_run_is_kept(
    dataset: Dataset, spec: ExperimentSpec, tmp_path: Path
) -> None:
    path = tmp_path / "run" / "chips.npz"
    write_table(path, dataset, spec.pyramid)
    run = Run.create(tmp_path / "run", config="")
    assert load_configured_chips(run, with_data(spec, chips=str(path)), dataset) is not None
    assert path.exists()


def test_a_table_of_another_pyramid_is_refused(
    dataset: Dataset, spec: ExperimentSpec, tmp_path: Path
) -> None:
    path = tmp_path / "table.npz"
    write_table(path, dataset, PyramidSpec())
    with pytest.raises(ChipTableError, match=r"table\.npz: made with another pyramid"):
        load_configured_chips(Run(tmp_path), with_data(spec, chips=str(path)), dataset)


def test_a_data_set_without_boxes_is_refused(spec: ExperimentSpec, tmp_path: Path) -> None:
    empty = load_dataset(write_dataset(tmp_path / "empty", boxes_per_image=0))
    with pytest.raises(AnnotationError, match=r"train\.json: has no box to learn from"):
        order_epoch(spec, empty, epoch=0)
