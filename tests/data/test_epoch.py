"""The order of an epoch: batches of tiles, and of whole images of similar shape; how they are read."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sniper.chips import BoxStatus, LevelSpec
from sniper.chips.baselines import TileSpec, WholeSpec
from sniper.data.batches import ChipDataset
from sniper.data.datasets import Dataset, load_dataset
from sniper.data.epoch import EpochOrder, order_tiles, order_whole_images
from sniper.data.loader import load_batches
from sniper.data.spec import DataSpec
from sniper.errors import AnnotationError, ImageError
from tests.data.tiny import write_dataset

SIDES = [(160, 120), (96, 200), (200, 200), (150, 90), (120, 160), (161, 121), (90, 60)] * 4
WHOLE = WholeSpec(
    levels=(
        LevelSpec(factor=2.0, below=24),
        LevelSpec(factor=1.0, at_least=16, below=40),
        LevelSpec(long_side=64, at_least=32),
    ),
    batch_megapixels=0.15,
)


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return load_dataset(write_dataset(tmp_path, sides=SIDES, boxes_per_image=4))


def order_wholes(dataset: Dataset, *, epoch: int = 0, num_shares: int = 1, batch_size: int = 6) -> EpochOrder:
    return order_whole_images(
        dataset,
        WHOLE,
        batch_size=batch_size,
        chip_size=64,
        flip=0.5,
        seed=0,
        epoch=epoch,
        num_shares=num_shares,
    )


def order_small_tiles(dataset: Dataset) -> EpochOrder:
    return order_tiles(dataset, TileSpec(side=64), batch_size=5, flip=0.5, seed=0, epoch=0)


def batches_of(order: EpochOrder) -> list[list[int]]:
    return [order.chip_indices[list(order.positions(step))].tolist() for step in range(order.num_steps)]


@pytest.mark.parametrize("num_shares", [1, 2, 3, 50])
def test_every_image_is_in_one_batch_and_batches_split_evenly(dataset: Dataset, num_shares: int) -> None:
    order = order_wholes(dataset, num_shares=num_shares)
    batches = batches_of(order)
    assert sorted({index for batch in batches for index in batch}) == list(range(len(order.table)))
    assert all(len(batch) % num_shares == 0 for batch in batches)
    distinct = [index for batch in batches for index in dict.fromkeys(batch)]
    assert len(distinct) == len(set(distinct))  # a batch is filled up with its own images
    assert order.num_padding == len(order.chip_indices) - len(order.table) < num_shares


def test_batches_have_similar_shapes_and_no_more_pixels_than_the_limit(dataset: Dataset) -> None:
    order = order_wholes(dataset)
    table = order.table
    for batch in batches_of(order):
        sides = {(int(table.widths[index]), int(table.heights[index])) for index in batch}
        assert len(sides) == 1
        (width, height) = sides.pop()
        assert width % 32 == height % 32 == 0
        assert len(batch) == 1 or (len(batch) <= 6 and width * height * len(batch) <= 0.15e6)
        levels = [table.chip(index).level for index in batch]
        unpadded = [-(-level.width // 32) * 32 * (-(-level.height // 32) * 32) for level in levels]
        assert sum(unpadded) >= 0.9 * width * height * len(batch)
        assert all(level.width <= width and level.height <= height for level in levels)
    assert max(map(len, batches_of(order))) == 6
    assert order.num_steps <= 0.7 * len(table)


@pytest.mark.parametrize("num_shares", [1, 4])
def test_all_images_of_an_epoch_have_equal_weight(dataset: Dataset, num_shares: int) -> None:
    order = order_wholes(dataset, num_shares=num_shares)
    weights = [order.weight(step) for step in range(order.num_steps)]
    # The loss of a step is the mean over its images, so each has this share of the weight.
    shares = {round(weight / len(batch), 9) for weight, batch in zip(weights, batches_of(order), strict=True)}
    assert len(shares) == 1


@pytest.mark.parametrize("num_shares", [1, 4])
def test_a_pixel_of_whole_images_weighs_as_much_as_one_of_chips(dataset: Dataset, num_shares: int) -> None:
    order = order_wholes(dataset, num_shares=num_shares)
    weights = [order.weight(step) for step in range(order.num_steps)]
    assert sum(weights) == pytest.approx(order.megapixels / 0.15)
    tiles = order_small_tiles(dataset)
    assert {tiles.weight(step) for step in range(tiles.num_steps)} == {1.0}


def test_by_default_batches_of_images_have_the_pixels_of_chip_batches(dataset: Dataset) -> None:
    order = order_whole_images(dataset, WholeSpec(), batch_size=50, chip_size=700, flip=0.0, seed=0, epoch=0)
    assert order.batch_megapixels == pytest.approx(50 * 0.49)
    assert max(map(len, batches_of(order))) > 10


@pytest.mark.parametrize("kind", ["whole images", "tiles"])
def test_the_pixels_of_an_order_are_those_of_its_batches(dataset: Dataset, kind: str) -> None:
    order = order_wholes(dataset, num_shares=2) if kind == "whole images" else order_small_tiles(dataset)
    batches = load_batches(order, DataSpec(num_workers=0), steps=range(order.num_steps))
    num_pixels = sum(batch.images[:, 0].numel() for batch in batches)
    assert order.megapixels == pytest.approx(num_pixels / 1e6)


def test_a_whole_image_is_resized_and_padded_with_black(dataset: Dataset) -> None:
    order = order_wholes(dataset)
    chips = ChipDataset(order)
    num_padded = 0
    for position, index in enumerate(order.chip_indices.tolist()):
        level = order.table.chip(index).level
        pixels = chips[position].pixels
        if order.is_flipped[position]:
            pixels = pixels[:, ::-1]
        with Image.open(dataset[int(order.table.image_indices[index])].path) as opened:
            expected = np.asarray(
                opened.convert("RGB").resize((level.width, level.height), Image.Resampling.BILINEAR), np.int64
            )
        assert np.abs(pixels[: level.height, : level.width] - expected).max() <= 1
        assert not pixels[level.height :].any()
        assert not pixels[:, level.width :].any()
        num_padded += pixels.shape[:2] != expected.shape[:2]
    assert num_padded


def test_a_whole_image_has_all_boxes_and_those_in_range_valid(dataset: Dataset) -> None:
    order = order_wholes(dataset)
    chips = ChipDataset(order)
    for position, index in enumerate(order.chip_indices.tolist()):
        level = order.table.chip(index).level
        sample = chips[position]
        record = dataset[int(order.table.image_indices[index])]
        boxes = level.to_level(record.boxes)
        if order.is_flipped[position]:
            boxes[:, [0, 2]] = sample.pixels.shape[1] - boxes[:, [2, 0]]
        np.testing.assert_allclose(sample.target.boxes, boxes, atol=1e-6)
        is_valid = level.valid_range.contains(record.boxes)
        assert ((sample.target.status == BoxStatus.VALID) == is_valid).all()


def test_a_bad_image_is_replaced_by_one_of_its_sides(dataset: Dataset) -> None:
    order = order_wholes(dataset)
    batch = next(batch for batch in batches_of(order) if len(batch) > 1)
    path = dataset[int(order.table.image_indices[batch[0]])].path
    path.write_bytes(path.read_bytes()[:300])
    spec = DataSpec(num_workers=0, on_bad_image="skip")
    with pytest.warns(UserWarning, match=f"{path.name}.*skipped"):
        batches = list(load_batches(order, spec, steps=range(order.num_steps)))
    assert sum(sum(batch.skipped) for batch in batches)
    assert not any(path.name in name for batch in batches for name in batch.names)


def test_a_bad_image_without_another_of_its_sides_is_refused(tmp_path: Path) -> None:
    dataset = load_dataset(write_dataset(tmp_path, sides=[(100, 300), (300, 100)]))
    dataset[0].path.write_bytes(dataset[0].path.read_bytes()[:300])
    order = order_whole_images(dataset, WholeSpec(), batch_size=1, chip_size=64, flip=0.5, seed=0, epoch=0)
    chips = ChipDataset(order, spec=DataSpec(on_bad_image="skip"))
    position = order.table.image_indices[order.chip_indices].tolist().index(0)
    with pytest.warns(UserWarning, match="skipped"), pytest.raises(ImageError, match=r"train_0\.png"):
        chips[position]


def test_processes_share_each_batch_of_whole_images(dataset: Dataset) -> None:
    order = order_wholes(dataset, num_shares=2)
    steps = range(order.num_steps)
    spec = DataSpec(num_workers=0)
    batches = load_batches(order, spec, steps=steps)
    first, second = (load_batches(order, spec, steps=steps, share=(rank, 2)) for rank in range(2))
    for batch, even, odd in zip(batches, first, second, strict=True):
        assert batch.names[0::2] == even.names
        assert batch.names[1::2] == odd.names


def test_a_tile_has_the_boxes_that_are_visible_enough(dataset: Dataset) -> None:
    spec = TileSpec(side=64, overlap=0.25, min_visibility=0.5)
    order = order_tiles(dataset, spec, batch_size=4, flip=0.0, seed=0, epoch=0)
    chips = ChipDataset(order, spec=DataSpec(min_visible_side=0.0))
    num_partial = 0
    for position, index in enumerate(order.chip_indices[: len(order.table)].tolist()):
        window = order.table.chip(index).window
        boxes = dataset[int(order.table.image_indices[index])].boxes
        visible = np.minimum(boxes[:, 2:], window[2:]) - np.maximum(boxes[:, :2], window[:2])
        share = np.maximum(visible, 0).prod(axis=1) / (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
        target = chips[position].target
        assert len(target.boxes) == (share >= 0.5).sum()
        assert (target.status == BoxStatus.VALID).all()
        num_partial += ((share > 0) & (share < 0.5)).any()
    assert num_partial


def test_an_order_is_a_function_of_seed_and_epoch(dataset: Dataset) -> None:
    def values(order: EpochOrder) -> list[object]:
        arrays = (order.chip_indices, order.is_flipped, order.offsets, order.seeds)
        return [array.tolist() for array in arrays]

    order, again, other = (order_wholes(dataset, epoch=epoch) for epoch in (0, 0, 1))
    assert values(order) == values(again) != values(other)


def test_each_epoch_draws_which_images_share_a_batch(dataset: Dataset) -> None:
    first, second = (batches_of(order_wholes(dataset, epoch=epoch)) for epoch in (0, 1))
    assert {frozenset(batch) for batch in first} != {frozenset(batch) for batch in second}


def test_a_data_set_without_boxes_is_refused(tmp_path: Path) -> None:
    empty = load_dataset(write_dataset(tmp_path, boxes_per_image=0))
    with pytest.raises(AnnotationError, match=r"train\.json: has no box to learn from"):
        order_wholes(empty)
    with pytest.raises(AnnotationError, match="has no box to learn from"):
        order_tiles(empty, TileSpec(side=64, empty="drop"), batch_size=4, flip=0.5, seed=0, epoch=0)
    assert order_small_tiles(empty).num_steps
