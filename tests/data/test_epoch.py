"""Plans of whole images and of tiles: batches of like shape, read as they should be."""

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
def annotations(tmp_path: Path) -> Dataset:
    return load_dataset(write_dataset(tmp_path, sides=SIDES, boxes_per_image=4))


def whole(annotations: Dataset, *, epoch: int = 0, num_shares: int = 1, batch_size: int = 6) -> EpochOrder:
    return order_whole_images(
        annotations,
        WHOLE,
        batch_size=batch_size,
        chip_size=64,
        flip=0.5,
        seed=0,
        epoch=epoch,
        num_shares=num_shares,
    )


def batches_of(plan: EpochOrder) -> list[list[int]]:
    return [plan.chip_indices[list(plan.positions(step))].tolist() for step in range(plan.num_steps)]


@pytest.mark.parametrize("num_shares", [1, 2, 3, 50])
def test_every_image_is_in_one_batch_and_batches_can_be_shared(annotations: Dataset, num_shares: int) -> None:
    plan = whole(annotations, num_shares=num_shares)
    batches = batches_of(plan)
    assert sorted({one for batch in batches for one in batch}) == list(range(len(plan.table)))
    assert all(len(batch) % num_shares == 0 for batch in batches)
    repeated = [one for batch in batches for one in dict.fromkeys(batch)]
    assert len(repeated) == len(set(repeated))  # what fills a batch up is from the same batch
    assert plan.num_padding == len(plan.chip_indices) - len(plan.table) < num_shares


def test_batches_are_of_like_shape_and_of_no_more_pixels_than_asked(annotations: Dataset) -> None:
    plan = whole(annotations)
    table = plan.table
    for batch in batches_of(plan):
        sides = {(int(table.widths[one]), int(table.heights[one])) for one in batch}
        assert len(sides) == 1
        (width, height) = sides.pop()
        assert width % 32 == height % 32 == 0
        assert len(batch) == 1 or (len(batch) <= 6 and width * height * len(batch) <= 0.15e6)
        chips = [table.chip(one) for one in batch]
        alone = [-(-chip.level.width // 32) * 32 * (-(-chip.level.height // 32) * 32) for chip in chips]
        assert sum(alone) >= 0.9 * width * height * len(batch)
        assert all(chip.level.width <= width and chip.level.height <= height for chip in chips)
    assert max(map(len, batches_of(plan))) == 6
    assert plan.num_steps <= 0.7 * len(plan.table)


@pytest.mark.parametrize("num_shares", [1, 4])
def test_all_images_of_an_epoch_count_alike_and_pixels_as_much_as_in_chips(
    annotations: Dataset, num_shares: int
) -> None:
    plan = whole(annotations, num_shares=num_shares)
    weights = [plan.weight(step) for step in range(plan.num_steps)]
    # What a step learns is the mean over its images: each has this share of the weight.
    shares = {round(weight / len(batch), 9) for weight, batch in zip(weights, batches_of(plan), strict=True)}
    assert len(shares) == 1
    assert sum(weights) == pytest.approx(plan.megapixels / 0.15)
    chips = order_tiles(annotations, TileSpec(side=64), batch_size=5, flip=0.5, seed=0, epoch=0)
    assert {chips.weight(step) for step in range(chips.num_steps)} == {1.0}


def test_a_batch_has_the_pixels_of_a_batch_of_chips_if_nothing_else_is_said(annotations: Dataset) -> None:
    plan = order_whole_images(
        annotations, WholeSpec(), batch_size=50, chip_size=700, flip=0.0, seed=0, epoch=0
    )
    assert plan.batch_megapixels == pytest.approx(50 * 0.49)
    assert max(map(len, batches_of(plan))) > 10


def test_the_pixels_of_a_plan_are_those_of_its_batches(annotations: Dataset) -> None:
    for plan in (
        whole(annotations, num_shares=2),
        order_tiles(annotations, TileSpec(side=64), batch_size=5, flip=0.5, seed=0, epoch=0),
    ):
        batches = load_batches(plan, DataSpec(num_workers=0), steps=range(plan.num_steps))
        read = sum(batch.images[:, 0].numel() for batch in batches)
        assert plan.megapixels == pytest.approx(read / 1e6)


def test_a_whole_image_is_read_whole_and_padded_with_black(annotations: Dataset) -> None:
    plan = whole(annotations)
    chips = ChipDataset(plan)
    has_padding = 0
    for place in range(len(plan.chip_indices)):
        sample = chips[place]
        index = int(plan.chip_indices[place])
        image = int(plan.table.image_indices[index])
        level = plan.table.chip(index).level
        pixels = sample.pixels[:, ::-1] if plan.is_flipped[place] else sample.pixels
        with Image.open(annotations[image].path) as opened:
            wanted = np.asarray(
                opened.convert("RGB").resize((level.width, level.height), Image.Resampling.BILINEAR), np.int64
            )
        assert np.abs(pixels[: level.height, : level.width] - wanted).max() <= 1
        assert not pixels[level.height :].any()
        assert not pixels[:, level.width :].any()
        has_padding += pixels.shape[:2] != wanted.shape[:2]
        record = annotations[image]
        boxes = level.to_level(record.boxes)
        if plan.is_flipped[place]:
            boxes[:, [0, 2]] = sample.pixels.shape[1] - boxes[:, [2, 0]]
        np.testing.assert_allclose(sample.target.boxes, boxes, atol=1e-6)
        is_valid = level.valid_range.contains(record.boxes)
        assert ((sample.target.status == BoxStatus.VALID) == is_valid).all()
    assert has_padding


def test_the_place_of_an_image_that_cannot_be_read_is_taken_by_one_of_its_sides(
    annotations: Dataset,
) -> None:
    plan = whole(annotations)
    is_batched = [batch for batch in batches_of(plan) if len(batch) > 1]
    path = annotations[int(plan.table.image_indices[is_batched[0][0]])].path
    path.write_bytes(path.read_bytes()[:300])
    spec = DataSpec(num_workers=0, on_bad_image="skip")
    with pytest.warns(UserWarning, match=f"{path.name}.*skipped"):
        read = list(load_batches(plan, spec, steps=range(plan.num_steps)))
    assert sum(sum(batch.skipped) for batch in read)
    assert not any(path.name in name for batch in read for name in batch.names)


def test_an_image_that_cannot_be_read_and_has_no_like_is_refused(tmp_path: Path) -> None:
    alone = load_dataset(write_dataset(tmp_path, sides=[(100, 300), (300, 100)]))
    alone[0].path.write_bytes(alone[0].path.read_bytes()[:300])
    plan = order_whole_images(alone, WholeSpec(), batch_size=1, chip_size=64, flip=0.5, seed=0, epoch=0)
    chips = ChipDataset(plan, spec=DataSpec(on_bad_image="skip"))
    place = next(place for place in range(2) if plan.table.image_indices[plan.chip_indices[place]] == 0)
    with pytest.warns(UserWarning, match="skipped"), pytest.raises(ImageError, match=r"train_0\.png"):
        chips[place]


def test_trainers_share_each_batch_of_whole_images(annotations: Dataset) -> None:
    plan = whole(annotations, num_shares=2)
    steps = range(plan.num_steps)
    spec = DataSpec(num_workers=0)
    together = list(load_batches(plan, spec, steps=steps))
    parts = [list(load_batches(plan, spec, steps=steps, share=(rank, 2))) for rank in range(2)]
    for step, batch in enumerate(together):
        names = [None] * len(batch)
        for rank in range(2):
            names[rank::2] = parts[rank][step].names
        assert tuple(names) == batch.names


def test_a_tile_teaches_what_has_enough_of_itself_left(annotations: Dataset) -> None:
    spec = TileSpec(side=64, overlap=0.25, min_visibility=0.5)
    plan = order_tiles(annotations, spec, batch_size=4, flip=0.0, seed=0, epoch=0)
    chips = ChipDataset(plan, spec=DataSpec(min_visible_side=0.0))
    has_dropped = 0
    for place in range(len(plan.table)):
        index = int(plan.chip_indices[place])
        image = int(plan.table.image_indices[index])
        window = plan.table.chip(index).window
        boxes = annotations[image].boxes
        left = np.minimum(boxes[:, 2:], window[2:]) - np.maximum(boxes[:, :2], window[:2])
        share = np.maximum(left, 0).prod(axis=1) / (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
        target = chips[place].target
        assert len(target.boxes) == (share >= 0.5).sum()
        assert (target.status == BoxStatus.VALID).all()
        has_dropped += ((share > 0) & (share < 0.5)).any()
    assert has_dropped


def test_plans_are_functions_of_seed_and_epoch(annotations: Dataset) -> None:
    def told(plan: EpochOrder) -> list[object]:
        return [
            plan.chip_indices.tolist(),
            plan.is_flipped.tolist(),
            plan.offsets.tolist(),
            plan.seeds.tolist(),
        ]

    assert told(whole(annotations)) == told(whole(annotations)) != told(whole(annotations, epoch=1))
    # Who shares a batch is drawn anew, too.
    assert {frozenset(batch) for batch in batches_of(whole(annotations))} != {
        frozenset(batch) for batch in batches_of(whole(annotations, epoch=1))
    }


def test_a_data_set_without_boxes_makes_no_plan(tmp_path: Path) -> None:
    empty = load_dataset(write_dataset(tmp_path, boxes_per_image=0))
    with pytest.raises(AnnotationError, match=r"train\.json: has no box to learn from"):
        whole(empty)
    with pytest.raises(AnnotationError, match="has no box to learn from"):
        order_tiles(empty, TileSpec(side=64, empty="drop"), batch_size=4, flip=0.5, seed=0, epoch=0)
    assert order_tiles(empty, TileSpec(side=64), batch_size=4, flip=0.5, seed=0, epoch=0).num_steps
