"""An epoch's chips: planned, read, mirrored and batched."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn
from torchvision.transforms import v2

from sniper.chips import BoxStatus
from sniper.data.batches import Batch, ChipDataset, collate, flipped
from sniper.data.datasets import Dataset, load_dataset
from sniper.data.epoch import EpochOrder, build_table, order_chips
from sniper.data.spec import ColorJitterSpec, DataSpec
from sniper.errors import AnnotationError, ImageError, TransformError
from tests.chips.worlds import SMALL_PYRAMID
from tests.data.tiny import write_dataset


@pytest.fixture
def annotations(tmp_path: Path) -> Dataset:
    return load_dataset(write_dataset(tmp_path))


def order_epoch(annotations: Dataset, *, epoch: int = 0, seed: int = 0, flip: float = 0.5) -> EpochOrder:
    return order_chips(annotations, SMALL_PYRAMID, batch_size=4, flip=flip, seed=seed, epoch=epoch)


def test_a_plan_holds_every_chip_once_and_fills_the_last_batch(annotations: Dataset) -> None:
    plan = order_epoch(annotations)
    assert plan.num_steps * 4 == len(plan.chip_indices)
    assert 0 <= plan.num_padding < 4
    assert sorted(plan.chip_indices[: len(plan.table)].tolist()) == list(range(len(plan.table)))
    assert plan.chip_indices[len(plan.table) :].tolist() == plan.chip_indices[: plan.num_padding].tolist()


def test_a_plan_is_a_function_of_seed_and_epoch(annotations: Dataset) -> None:
    def told(plan: EpochOrder) -> list[object]:
        return [plan.chip_indices.tolist(), plan.is_flipped.tolist(), plan.table.x.tolist()]

    assert told(order_epoch(annotations)) == told(order_epoch(annotations))
    assert told(order_epoch(annotations)) != told(order_epoch(annotations, epoch=1))
    assert told(order_epoch(annotations)) != told(order_epoch(annotations, seed=1))


def test_a_table_chosen_before_is_shuffled_anew_each_epoch(annotations: Dataset) -> None:
    table = build_table(annotations, SMALL_PYRAMID, generator=np.random.default_rng(5))
    plans = [
        order_chips(annotations, SMALL_PYRAMID, batch_size=4, flip=0.5, seed=0, epoch=epoch, table=table)
        for epoch in range(2)
    ]
    assert all(plan.table is table for plan in plans)
    assert plans[0].chip_indices.tolist() != plans[1].chip_indices.tolist()


def test_a_data_set_without_boxes_makes_no_plan(tmp_path: Path) -> None:
    empty = load_dataset(write_dataset(tmp_path, boxes_per_image=0))
    with pytest.raises(AnnotationError, match=r"train\.json: has no box to learn from"):
        order_epoch(empty)


def test_every_box_is_valid_and_whole_in_some_chip(annotations: Dataset) -> None:
    plan = order_epoch(annotations, flip=0.0)
    chips = ChipDataset(plan)
    seen = set()
    for place, index in enumerate(plan.chip_indices.tolist()):
        image_index = int(plan.table.image_indices[index])
        chip = plan.table.chip(index)
        target = chips[place].target
        valid = target.boxes[target.status == BoxStatus.VALID]
        for box in chip.to_image(valid):
            own = annotations[image_index].boxes
            nearest = np.abs(own - box).max(axis=1)
            if nearest.min() < 1e-6:
                seen.add((image_index, int(nearest.argmin())))
    assert len(seen) == len(annotations.boxes)


def test_pixels_lie_under_their_boxes(annotations: Dataset) -> None:
    # The squares of the tiny data set are black (dark) or nearly white (bright) on grey.
    chips = ChipDataset(order_epoch(annotations, flip=0.5))
    for place in range(len(chips)):
        sample = chips[place]
        target = sample.target
        for box, label, status in zip(target.boxes, target.labels, target.status, strict=True):
            x, y = ((box[:2] + box[2:]) / 2).astype(int)
            overlapping = ((target.boxes[:, :2] <= [x, y]) & (target.boxes[:, 2:] > [x, y])).all(axis=1)
            if status == BoxStatus.VALID and overlapping.sum() == 1:
                level = sample.pixels[y, x].astype(int)
                assert (level > 200).all() if label == 1 else (level < 100).all()


def test_mirroring_twice_is_the_same_and_once_moves_boxes_with_pixels(annotations: Dataset) -> None:
    sample = ChipDataset(order_epoch(annotations, flip=0.0))[0]
    twice = flipped(flipped(sample))
    np.testing.assert_array_equal(twice.pixels, sample.pixels)
    np.testing.assert_allclose(twice.target.boxes, sample.target.boxes)
    once = flipped(sample)
    np.testing.assert_array_equal(once.pixels[:, 0], sample.pixels[:, -1])
    assert (once.target.boxes[:, 2] > once.target.boxes[:, 0]).all()
    np.testing.assert_allclose(once.target.boxes[:, 0], 64 - sample.target.boxes[:, 2])


def test_an_index_outside_is_refused(annotations: Dataset) -> None:
    chips = ChipDataset(order_epoch(annotations))
    with pytest.raises(IndexError):
        chips[len(chips)]


def test_a_loader_with_and_without_processes_gives_the_same_batches(annotations: Dataset) -> None:
    chips = ChipDataset(order_epoch(annotations))
    alone = list(DataLoader(chips, batch_size=4, collate_fn=collate))
    beside = list(DataLoader(chips, batch_size=4, collate_fn=collate, num_workers=2))
    for one, other in zip(alone, beside, strict=True):
        assert torch.equal(one.images, other.images)
        assert one.names == other.names
        assert one.seeds == other.seeds
        assert torch.equal(one.boxes, other.boxes)


def batch_of(annotations: Dataset) -> Batch:
    chips = ChipDataset(order_epoch(annotations))
    return collate([chips[i] for i in range(4)])


def test_a_batch_has_one_shape(annotations: Dataset) -> None:
    batch = batch_of(annotations)
    assert batch.images.shape == (4, 3, 64, 64)
    assert batch.images.dtype == torch.uint8
    assert batch.valid_sizes.shape == (4, 2)
    assert len(batch) == len(batch.boxes) == len(batch.names) == len(set(batch.seeds)) == 4


def test_a_torchvision_detector_trains_on_a_batch(annotations: Dataset) -> None:
    torch.manual_seed(0)
    model = fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None, num_classes=3).train()
    images, targets = batch_of(annotations).to_torchvision()
    losses = model(images, targets)
    assert set(losses) == {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert min(int(target["labels"].min()) for target in targets if len(target["labels"])) >= 1


def test_torchvision_is_given_no_ignored_boxes(annotations: Dataset) -> None:
    batch = batch_of(annotations)
    status = batch.status.clone()
    status[0] = BoxStatus.IGNORE
    _, targets = dataclasses.replace(batch, status=status).to_torchvision()
    assert targets[0]["boxes"].shape == (0, 4)
    assert [len(one["boxes"]) for one in targets[1:]] == (status[1:] != BoxStatus.PADDING).sum(1).tolist()


def test_a_batch_has_the_valid_boxes_of_each_chip_first_and_a_part_of_it_its_own(
    annotations: Dataset,
) -> None:
    batch = batch_of(annotations)
    for status, count in zip(batch.status, batch.num_valid, strict=True):
        assert (status[:count] == BoxStatus.VALID).all()
        assert (status[count:] != BoxStatus.VALID).all()
    part = batch.part(1, 3)
    assert part.names == batch.names[1:3]
    assert part.seeds == batch.seeds[1:3]
    assert part.num_valid == batch.num_valid[1:3]
    assert torch.equal(part.images, batch.images[1:3])
    assert torch.equal(part.boxes, batch.boxes[1:3])


def spoilt(annotations: Dataset, index: int) -> str:
    """Cut an image file short; gives its name."""
    path = annotations[index].path
    path.write_bytes(path.read_bytes()[:200])
    return path.name


def test_a_bad_image_is_refused_by_name(annotations: Dataset) -> None:
    name = spoilt(annotations, 1)
    chips = ChipDataset(order_epoch(annotations))
    with pytest.raises(ImageError, match=rf"{name}: cannot be read as an image"):
        collate([chips[place] for place in range(len(chips))])


def test_a_bad_image_is_skipped_and_counted_if_that_was_asked_for(annotations: Dataset) -> None:
    name = spoilt(annotations, 1)
    plan = order_epoch(annotations)
    chips = ChipDataset(plan, spec=DataSpec(on_bad_image="skip"))
    with pytest.warns(UserWarning, match=rf"{name}: cannot be read.*; skipped"):
        samples = [chips[place] for place in range(len(chips))]
    is_bad = plan.table.image_indices[plan.chip_indices] == 1
    for place, sample in enumerate(samples):
        following = [(place + k) % len(is_bad) for k in range(len(is_bad))]
        num_bad = next(k for k, other in enumerate(following) if not is_bad[other])
        assert sample.skipped == num_bad
        assert sample.name == samples[(place + num_bad) % len(samples)].name
    assert sum(collate(samples).skipped) >= is_bad.sum() > 0


def test_a_data_set_of_bad_images_alone_is_refused_all_the_same(annotations: Dataset) -> None:
    for index in range(len(annotations)):
        spoilt(annotations, index)
    chips = ChipDataset(order_epoch(annotations), spec=DataSpec(on_bad_image="skip"))
    with pytest.warns(UserWarning, match="skipped"), pytest.raises(ImageError, match="cannot be read"):
        chips[0]


def test_torchvisions_transforms_move_boxes_with_pixels(annotations: Dataset) -> None:
    plan = order_epoch(annotations, flip=0.0)
    plain = ChipDataset(plan)[0]
    mirrored = ChipDataset(plan, transform=v2.RandomHorizontalFlip(p=1.0))[0]
    np.testing.assert_array_equal(mirrored.pixels, flipped(plain).pixels)
    np.testing.assert_allclose(mirrored.target.boxes, flipped(plain).target.boxes, atol=1e-4)
    np.testing.assert_array_equal(mirrored.target.status, plain.target.status)
    upside_down = ChipDataset(plan, transform=v2.RandomVerticalFlip(p=1.0))[0]
    np.testing.assert_array_equal(upside_down.pixels, plain.pixels[::-1])
    np.testing.assert_allclose(
        upside_down.target.boxes[:, [1, 3]], 64 - plain.target.boxes[:, [3, 1]], atol=1e-4
    )


def test_boxes_that_a_transform_drops_take_their_labels_and_standings_along(annotations: Dataset) -> None:
    def keep_first(image: Any, target: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return image, {name: values[:1] for name, values in target.items()}

    plan = order_epoch(annotations, flip=0.0)
    batch = collate([ChipDataset(plan, transform=keep_first)[place] for place in range(4)])
    plain = batch_of(annotations)
    assert max(plain.num_boxes) > 1
    assert max(batch.num_boxes) == 1


def test_what_a_transform_draws_depends_on_the_chip_alone(annotations: Dataset) -> None:
    plan = order_epoch(annotations)
    spec = DataSpec(color_jitter=ColorJitterSpec(brightness=0.5, hue=0.2))
    chips = ChipDataset(plan, spec=spec, transform=v2.RandomPosterize(bits=3))
    before = torch.random.get_rng_state()
    first = [chips[place].pixels for place in range(4)]
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(7)
    again = [chips[place].pixels for place in reversed(range(4))]
    for one, other in zip(first, reversed(again), strict=True):
        np.testing.assert_array_equal(one, other)
    plain = [ChipDataset(plan)[place].pixels.mean() for place in range(4)]
    factors = [changed.mean() / pixels for changed, pixels in zip(first, plain, strict=True)]
    assert np.std(factors) > 0.02


def test_what_reaches_beyond_the_image_stays_black_whatever_becomes_of_the_colours(tmp_path: Path) -> None:
    narrow = load_dataset(write_dataset(tmp_path, sides=[(40, 40)]))
    spec = DataSpec(color_jitter=ColorJitterSpec(brightness=1.0, contrast=1.0))
    plan = order_epoch(narrow, flip=0.0)
    plain, changed = ChipDataset(plan), ChipDataset(plan, spec=spec)
    for place in range(len(plain)):
        is_padding = (plain[place].pixels == 0).all(axis=2)[:, ::-1].cumprod(axis=1)[:, ::-1].astype(bool)
        assert (changed[place].pixels[is_padding] == 0).all()


@pytest.mark.parametrize(
    ("transform", "told"),
    [
        (lambda image, target: (image[:, :32], target), r"the image is torch.uint8 of \(3, 32, 64\)"),
        (lambda image, target: (image.float(), target), r"the image is torch.float32 of"),
        (lambda image, target: (None, target), r"the image is NoneType, wanted a tensor"),
        (lambda image, target: (image, None), r"the target is NoneType"),
        (lambda image, target: None, r"the transform gave NoneType"),
        (lambda image, target: (image, {**target, "labels": target["labels"][:0]}), r"labels of \(0,\)"),
        (lambda image, target: (image, {"boxes": target["boxes"]}), r"labels is NoneType"),
        (lambda image, target: (image, {**target, "labels": target["labels"].float()}), r"no whole numbers"),
        (lambda image, target: (image, {**target, "boxes": target["boxes"] * torch.nan}), r"not finite"),
        (v2.ConvertBoundingBoxFormat("CXCYWH"), r"boxes are CXCYWH, wanted XYXY"),
    ],
)
def test_a_transform_that_makes_something_else_of_a_chip_is_told(
    annotations: Dataset, transform: Any, told: str
) -> None:
    with pytest.raises(TransformError, match=told):
        ChipDataset(order_epoch(annotations), transform=transform)[0]
