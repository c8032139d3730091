"""Batches are the plan's, however many processes read them; each image is decoded once."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from sniper.data import reader
from sniper.data.batches import Batch, ChipDataset, collate
from sniper.data.datasets import Dataset, load_dataset
from sniper.data.epoch import EpochOrder, order_chips
from sniper.data.loader import load_batches
from sniper.data.spec import DataSpec
from tests.chips.worlds import SMALL_PYRAMID
from tests.data.tiny import write_dataset

SIDES = [(160, 120), (96, 200), (200, 200), (150, 90)] * 3


@pytest.fixture
def annotations(tmp_path: Path) -> Dataset:
    return load_dataset(write_dataset(tmp_path, sides=SIDES, boxes_per_image=6))


def order_epoch(
    annotations: Dataset, images_at_once: int | None, *, batch_size: int = 4, epoch: int = 0
) -> EpochOrder:
    return order_chips(
        annotations,
        SMALL_PYRAMID,
        batch_size=batch_size,
        flip=0.5,
        seed=0,
        epoch=epoch,
        images_at_once=images_at_once,
    )


def images_of(plan: EpochOrder) -> np.ndarray:
    return plan.table.image_indices[plan.chip_indices]


@pytest.mark.parametrize("images_at_once", [1, 2, 3, 5, 64])
def test_images_take_turns_and_every_chip_is_there_once(annotations: Dataset, images_at_once: int) -> None:
    plan = order_epoch(annotations, images_at_once)
    own = plan.chip_indices[: len(plan.table)]
    assert sorted(own.tolist()) == list(range(len(plan.table)))
    assert plan.chip_indices[len(plan.table) :].tolist() == own[: plan.num_padding].tolist()
    rows = plan.num_streams
    assert rows == {1: 1, 2: 2, 3: 2, 5: 4, 64: 12}[images_at_once]  # of 12 images, batches of 4
    images = plan.table.image_indices[own]
    changes = 0
    for row in range(rows):
        of_row = images[row::rows]
        changes += int((of_row[1:] != of_row[:-1]).sum())
    # From one image to the next, or to the rest of one that a row above began.
    assert changes <= len(annotations) - 1


def test_turns_are_drawn_anew_each_epoch(annotations: Dataset) -> None:
    plans = [order_epoch(annotations, 3, epoch=epoch) for epoch in (0, 0, 1)]
    assert plans[0].chip_indices.tolist() == plans[1].chip_indices.tolist() != plans[2].chip_indices.tolist()
    assert len({tuple(dict.fromkeys(images_of(plan).tolist())) for plan in plans}) == 2


def test_with_as_many_images_at_work_as_chips_in_a_batch_it_shows_so_many(annotations: Dataset) -> None:
    mixed = images_of(order_epoch(annotations, 4)).reshape(-1, 4)
    assert np.mean([len(set(batch)) for batch in mixed.tolist()]) > 3.5
    alone = images_of(order_epoch(annotations, 1)).reshape(-1, 4)
    assert np.mean([len(set(batch)) for batch in alone.tolist()]) < 2.5


def assert_equal(one: Batch, other: Batch) -> None:
    for field in dataclasses.fields(Batch):
        first, second = getattr(one, field.name), getattr(other, field.name)
        if not isinstance(first, torch.Tensor):
            assert first == second, field.name
        else:
            assert torch.equal(first, second), field.name


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
@pytest.mark.parametrize(
    ("images_at_once", "num_workers", "share"),
    [
        (0, 0, (0, 1)),
        (0, 2, (1, 2)),
        (1, 2, (0, 1)),
        (3, 1, (0, 1)),
        (3, 2, (1, 2)),
        (4, 2, (0, 1)),
        (4, 3, (0, 2)),  # one of the three never has a part
        (7, 3, (0, 1)),
    ],
)
def test_how_many_processes_read_changes_nothing(
    annotations: Dataset, images_at_once: int, num_workers: int, share: tuple[int, int]
) -> None:
    plan = order_epoch(annotations, images_at_once)
    chips = ChipDataset(plan)
    spec = DataSpec(num_workers=num_workers)
    steps = range(1, plan.num_steps)
    read = list(load_batches(plan, spec, steps=steps, share=share))
    assert len(read) == len(steps)
    for step, batch in zip(steps, read, strict=True):
        places = range(step * 4 + share[0], (step + 1) * 4, share[1])
        assert_equal(batch, collate([chips[place] for place in places]))


def test_an_image_is_decoded_once_for_all_its_chips(
    annotations: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    real = reader.open_image

    def note(path: Path, *args: object, **kwargs: object) -> object:
        opened.append(path)
        return real(path, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(reader, "open_image", note)

    def count(images_at_once: int) -> int:
        opened.clear()
        plan = order_epoch(annotations, images_at_once)
        spec = DataSpec(num_workers=0)
        list(load_batches(plan, spec, steps=range(plan.num_steps)))
        return len(opened)

    num_chips = len(order_epoch(annotations, 0).chip_indices)
    assert count(0) > 0.7 * num_chips
    # Each once; again where a row ends within an image, and for the chips that fill the last batch.
    assert count(4) <= len(annotations) + 3 + 4
    assert count(64) <= 2 * len(annotations) + 3
    assert num_chips > 2 * (len(annotations) + 7)


def test_a_joined_batch_has_room_for_the_most_boxes(annotations: Dataset) -> None:
    plan = order_epoch(annotations, 0, batch_size=6)
    chips = ChipDataset(plan)
    samples = [chips[place] for place in range(6)]
    parts = [collate([samples[4], samples[1]]), collate([samples[0], samples[5], samples[3], samples[2]])]
    assert_equal(Batch.join(parts, [[4, 1], [0, 5, 3, 2]]), collate(samples))


def test_by_itself_a_plan_takes_as_many_images_as_memory_is_good_for(tmp_path: Path) -> None:
    sides = [(60, 50)] * 260
    many = load_dataset(write_dataset(tmp_path / "many", sides=sides, boxes_per_image=1))
    assert order_epoch(many, None).num_streams == 256
    large = dataclasses.replace(many, widths=many.widths * 200, heights=many.heights * 200)  # 360 MB each
    assert order_epoch(large, None).num_streams == 4
    assert order_epoch(large, None, batch_size=25).num_streams == 5
    tiffs = dataclasses.replace(large, file_names=np.array([f"{i}.tif" for i in range(260)]))
    assert order_epoch(tiffs, None).num_streams == 256  # are read in windows


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_each_trainer_and_process_keeps_to_its_own_images(annotations: Dataset, num_ranks: int) -> None:
    plan = order_epoch(annotations, 8)
    assert plan.num_streams == 8
    rows_of = [
        {place % plan.num_streams for place in range(len(plan.chip_indices)) if place % num_ranks == rank}
        for rank in range(num_ranks)
    ]
    assert sum(map(len, rows_of)) == plan.num_streams
