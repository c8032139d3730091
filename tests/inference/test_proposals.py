"""Negative chips from stored proposals."""

from pathlib import Path

import numpy as np
import pytest

from sniper.chips import ChipTable
from sniper.chips.negatives import NegativeSpec
from sniper.data.datasets import Dataset, load_dataset
from sniper.data.epoch import choose_positive_chips, order_chips, to_image_boxes
from sniper.errors import ProposalsError
from sniper.geometry import Detections
from sniper.inference.proposals import add_negatives, open_proposals, start_proposals
from sniper.inference.store import BoxStore
from tests.chips.worlds import SMALL_PYRAMID
from tests.data.tiny import write_dataset


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return load_dataset(write_dataset(tmp_path / "world"))


def drawn(dataset: Dataset, index: int, *, count: int = 50) -> Detections:
    rng = np.random.default_rng(index)
    low = rng.uniform(0, 0.8, (count, 2))
    boxes = np.concatenate([low, low + rng.uniform(0.02, 0.2, low.shape)], axis=1)
    sides = np.array([dataset.widths[index], dataset.heights[index]] * 2)
    return Detections(
        boxes=boxes * sides, scores=rng.uniform(0, 1, count), labels=np.zeros(count, dtype=np.int64)
    )


def fill(folder: Path, dataset: Dataset, *, max_iou: float | None = None) -> BoxStore:
    store = start_proposals(folder, dataset, source={"weights": "abc", "max_iou": max_iou})
    with store.new_part() as part:
        for index in store.missing:
            part.write(index, None if index == 2 else drawn(dataset, index))
    return open_proposals(folder, dataset)


def with_negatives(positives: ChipTable, proposals: BoxStore, *, min_proposals: int = 2) -> ChipTable:
    return add_negatives(
        positives,
        proposals,
        NegativeSpec(min_proposals=(min_proposals,)),
        pyramid=SMALL_PYRAMID,
        generator=np.random.default_rng(0),
    )


def test_proposals_of_other_images_are_not_opened(dataset: Dataset, tmp_path: Path) -> None:
    fill(tmp_path / "proposals", dataset)
    with pytest.raises(ProposalsError, match=r"of other images than those of .*train\.json"):
        open_proposals(tmp_path / "proposals", dataset.select(np.array([0, 1])))


def test_negative_chips_are_chosen_from_images_with_proposals(dataset: Dataset, tmp_path: Path) -> None:
    positives = choose_positive_chips(dataset, SMALL_PYRAMID, generator=np.random.default_rng(0))
    table = with_negatives(positives, fill(tmp_path / "proposals", dataset))
    num_negatives = np.bincount(table.image_indices[table.is_negative], minlength=4)
    assert (num_negatives > 1).tolist() == [True, True, False, True]  # one image could not be read
    assert (~table.is_negative).sum() == len(positives)


def test_a_negative_chip_covers_many_proposals_or_one_false_alarm(dataset: Dataset, tmp_path: Path) -> None:
    positives = choose_positive_chips(dataset, SMALL_PYRAMID, generator=np.random.default_rng(0))
    proposals, alarms = fill(tmp_path / "a", dataset), fill(tmp_path / "b", dataset, max_iou=0.3)
    assert len(with_negatives(positives, proposals, min_proposals=99)) == len(positives)
    assert with_negatives(positives, alarms, min_proposals=99).is_negative.sum() > 10


def test_blocks_of_images_give_negatives_in_the_order_of_images(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sniper.inference.proposals._IMAGES_PER_BLOCK", 3)
    positives = choose_positive_chips(dataset, SMALL_PYRAMID, generator=np.random.default_rng(0))
    table = with_negatives(positives, fill(tmp_path / "proposals", dataset))
    assert set(table.image_indices[table.is_negative].tolist()) == {0, 1, 3}
    assert (np.diff(table.image_indices) >= 0).all()


def test_no_images_give_no_negatives(dataset: Dataset, tmp_path: Path) -> None:
    nothing = dataset.select(np.zeros(0, dtype=np.int64))
    positives = choose_positive_chips(nothing, SMALL_PYRAMID, generator=np.random.default_rng(0))
    store = start_proposals(tmp_path / "proposals", nothing, source={})
    assert len(with_negatives(positives, store)) == 0


def test_negatives_are_drawn_anew_each_epoch(dataset: Dataset, tmp_path: Path) -> None:
    positives = choose_positive_chips(dataset, SMALL_PYRAMID, generator=np.random.default_rng(0))
    table = with_negatives(positives, fill(tmp_path / "proposals", dataset))
    table.save(tmp_path / "chips.npz", pyramid=SMALL_PYRAMID, digest=dataset.digest)
    loaded = ChipTable.load(
        tmp_path / "chips.npz",
        pyramid=SMALL_PYRAMID,
        images=to_image_boxes(dataset),
        digest=dataset.digest,
    )
    np.testing.assert_array_equal(loaded.is_negative, table.is_negative)
    orders = [
        order_chips(
            dataset,
            SMALL_PYRAMID,
            batch_size=4,
            flip=0.0,
            seed=0,
            epoch=epoch,
            table=loaded,
            negatives=NegativeSpec(per_image=1),
        )
        for epoch in range(2)
    ]
    for order in orders:
        assert order.table.is_negative.sum() == 3
        assert len(order.table) == len(positives) + 3
    drawn_chips = [order.table.x[order.table.is_negative].tolist() for order in orders]
    assert drawn_chips[0] != drawn_chips[1]
