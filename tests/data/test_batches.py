"""Chips of an epoch: read, flipped, transformed and batched."""

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
from sniper.data.batches import Batch, ChipDataset, ChipTransform, collate, flip_horizontally
from sniper.data.datasets import Dataset, load_dataset
from sniper.data.epoch import EpochOrder, choose_positive_chips, order_chips
from sniper.data.spec import CacheSpec, ColorJitterSpec, DataSpec
from sniper.errors import AnnotationError, ImageError, TransformError
from tests.chips.worlds import SMALL_PYRAMID
from tests.data.assertions import assert_equal_batches
from tests.data.tiny import write_dataset
from tests.models.batches import build_sample


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return load_dataset(write_dataset(tmp_path))


def order_epoch(dataset: Dataset, *, epoch: int = 0, seed: int = 0, flip: float = 0.5) -> EpochOrder:
    return order_chips(dataset, SMALL_PYRAMID, batch_size=4, flip=flip, seed=seed, epoch=epoch)


def test_an_epoch_contains_every_chip_and_fills_the_last_batch(dataset: Dataset) -> None:
    order = order_epoch(dataset)
    assert order.num_steps * 4 == len(order.chip_indices)
    assert 0 <= order.num_padding < 4
    assert sorted(order.chip_indices[: len(order.table)].tolist()) == list(range(len(order.table)))
    assert order.chip_indices[len(order.table) :].tolist() == order.chip_indices[: order.num_padding].tolist()


def test_the_order_is_a_function_of_seed_and_epoch(dataset: Dataset) -> None:
    def summary(order: EpochOrder) -> list[object]:
        return [order.chip_indices.tolist(), order.is_flipped.tolist(), order.table.x.tolist()]

    assert summary(order_epoch(dataset)) == summary(order_epoch(dataset))
    assert summary(order_epoch(dataset)) != summary(order_epoch(dataset, epoch=1))
    assert summary(order_epoch(dataset)) != summary(order_epoch(dataset, seed=1))


def test_a_given_table_is_reshuffled_each_epoch(dataset: Dataset) -> None:
    table = choose_positive_chips(dataset, SMALL_PYRAMID, generator=np.random.default_rng(5))
    orders = [
        order_chips(dataset, SMALL_PYRAMID, batch_size=4, flip=0.5, seed=0, epoch=epoch, table=table)
        for epoch in range(2)
    ]
    assert all(order.table is table for order in orders)
    assert orders[0].chip_indices.tolist() != orders[1].chip_indices.tolist()


def test_a_data_set_without_boxes_is_refused(tmp_path: Path) -> None:
    empty = load_dataset(write_dataset(tmp_path, boxes_per_image=0))
    with pytest.raises(AnnotationError, match=r"train\.json: has no box to learn from"):
        order_epoch(empty)


def test_every_box_is_valid_and_whole_in_some_chip(dataset: Dataset) -> None:
    order = order_epoch(dataset, flip=0.0)
    chips = ChipDataset(order)
    seen = set()
    for index, chip_index in enumerate(order.chip_indices.tolist()):
        image_index = int(order.table.image_indices[chip_index])
        chip = order.table.chip(chip_index)
        target = chips[index].target
        valid = target.boxes[target.status == BoxStatus.VALID]
        for box in chip.to_image(valid):
            differences = np.abs(dataset[image_index].boxes - box).max(axis=1)
            if differences.min() < 1e-6:
                seen.add((image_index, int(differences.argmin())))
    assert len(seen) == len(dataset.boxes)


def test_boxes_lie_on_the_pixels_of_their_objects(dataset: Dataset) -> None:
    # The squares of the tiny data set are black (dark) or nearly white (bright) on grey.
    chips = ChipDataset(order_epoch(dataset, flip=0.5))
    for index in range(len(chips)):
        sample = chips[index]
        target = sample.target
        for box, label, status in zip(target.boxes, target.labels, target.status, strict=True):
            x, y = ((box[:2] + box[2:]) / 2).astype(int)
            overlapping = ((target.boxes[:, :2] <= [x, y]) & (target.boxes[:, 2:] > [x, y])).all(axis=1)
            if status == BoxStatus.VALID and overlapping.sum() == 1:
                pixel = sample.pixels[y, x].astype(int)
                assert (pixel > 200).all() if label == 1 else (pixel < 100).all()


def test_mirrored_chips_and_others_are_collated_with_their_pixels() -> None:
    samples = [build_sample([], [], side=side, seed=seed) for side, seed in ((40, 0), (40, 1), (40, 2))]
    cropped = dataclasses.replace(
        samples[2], pixels=np.pad(samples[2].pixels, ((2, 3), (5, 1), (0, 0)))[2:42, 5:45]
    )
    mixed = [samples[0], flip_horizontally(samples[1]), cropped, flip_horizontally(cropped)]
    images = collate(mixed).images
    assert images.is_contiguous(memory_format=torch.channels_last)
    for image, sample in zip(images, mixed, strict=True):
        assert np.array_equal(image.permute(1, 2, 0).numpy(), sample.pixels)


def test_chips_of_different_sides_are_not_collated() -> None:
    samples = [build_sample([], [], side=side) for side in (40, 48)]
    with pytest.raises(ValueError, match=r"chips of \(40, 40, 3\) and \(48, 48, 3\) cannot share a batch"):
        collate([samples[0], flip_horizontally(samples[1])])


def test_flipping_twice_restores_the_chip(dataset: Dataset) -> None:
    sample = ChipDataset(order_epoch(dataset, flip=0.0))[0]
    twice = flip_horizontally(flip_horizontally(sample))
    np.testing.assert_array_equal(twice.pixels, sample.pixels)
    np.testing.assert_allclose(twice.target.boxes, sample.target.boxes)


def test_flipping_moves_boxes_with_pixels(dataset: Dataset) -> None:
    sample = ChipDataset(order_epoch(dataset, flip=0.0))[0]
    flipped = flip_horizontally(sample)
    np.testing.assert_array_equal(flipped.pixels[:, 0], sample.pixels[:, -1])
    assert (flipped.target.boxes[:, 2] > flipped.target.boxes[:, 0]).all()
    np.testing.assert_allclose(flipped.target.boxes[:, 0], 64 - sample.target.boxes[:, 2])


def test_an_index_out_of_bounds_is_refused(dataset: Dataset) -> None:
    chips = ChipDataset(order_epoch(dataset))
    with pytest.raises(IndexError):
        chips[len(chips)]


def test_batches_of_a_data_loader_do_not_depend_on_workers(dataset: Dataset) -> None:
    chips = ChipDataset(order_epoch(dataset))
    without = DataLoader(chips, batch_size=4, collate_fn=collate)
    with_workers = DataLoader(chips, batch_size=4, collate_fn=collate, num_workers=2)
    for expected, batch in zip(without, with_workers, strict=True):
        assert_equal_batches(batch, expected)


def batch_of(dataset: Dataset) -> Batch:
    chips = ChipDataset(order_epoch(dataset))
    return collate([chips[i] for i in range(4)])


def test_a_batch_has_one_shape(dataset: Dataset) -> None:
    batch = batch_of(dataset)
    assert batch.images.shape == (4, 3, 64, 64)
    assert batch.images.dtype == torch.uint8
    assert batch.targets.valid_sizes.shape == (4, 2)
    assert len(batch) == len(batch.targets) == len(batch.names) == len(set(batch.targets.seeds)) == 4


def test_a_torchvision_detector_trains_on_a_batch(dataset: Dataset) -> None:
    torch.manual_seed(0)
    model = fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None, num_classes=3).train()
    images, targets = batch_of(dataset).to_torchvision()
    losses = model(images, targets)
    assert set(losses) == {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert min(int(target["labels"].min()) for target in targets if len(target["labels"])) >= 1


def test_targets_for_torchvision_contain_no_ignored_boxes(dataset: Dataset) -> None:
    batch = batch_of(dataset)
    status = batch.targets.status.clone()
    status[0] = BoxStatus.IGNORE
    ignored = dataclasses.replace(batch, targets=dataclasses.replace(batch.targets, status=status))
    _, targets = ignored.to_torchvision()
    assert [len(target["boxes"]) for target in targets] == [0, *batch.targets.num_boxes[1:]]


def test_a_part_of_a_batch_contains_the_chips_of_its_range(dataset: Dataset) -> None:
    chips = ChipDataset(order_epoch(dataset))
    batch, part = collate([chips[i] for i in range(4)]), batch_of(dataset).part(1, 3)
    assert len(part) == 2
    assert part.names == batch.names[1:3]
    assert torch.equal(part.images, batch.images[1:3])
    assert torch.equal(part.targets.boxes, batch.targets.boxes[1:3])


def truncate_image(dataset: Dataset, index: int) -> str:
    """Truncate an image file, and return its name."""
    path = dataset[index].path
    path.write_bytes(path.read_bytes()[:200])
    return path.name


def test_an_unreadable_image_is_refused_by_name(dataset: Dataset) -> None:
    name = truncate_image(dataset, 1)
    chips = ChipDataset(order_epoch(dataset))
    with pytest.raises(ImageError, match=rf"{name}: cannot be read as an image"):
        collate([chips[index] for index in range(len(chips))])


def test_unreadable_images_are_skipped_and_counted_on_request(dataset: Dataset) -> None:
    name = truncate_image(dataset, 1)
    order = order_epoch(dataset)
    chips = ChipDataset(order, spec=DataSpec(on_bad_image="skip"))
    with pytest.warns(UserWarning, match=rf"{name}: cannot be read.*; skipped"):
        samples = [chips[index] for index in range(len(chips))]
    is_bad = order.table.image_indices[order.chip_indices] == 1
    for index, sample in enumerate(samples):
        following = [(index + k) % len(is_bad) for k in range(len(is_bad))]
        num_bad = next(k for k, other in enumerate(following) if not is_bad[other])
        assert sample.skipped == num_bad
        assert sample.name == samples[(index + num_bad) % len(samples)].name
    assert sum(collate(samples).skipped) >= is_bad.sum() > 0


def test_a_data_set_without_readable_images_is_refused(dataset: Dataset) -> None:
    for index in range(len(dataset)):
        truncate_image(dataset, index)
    chips = ChipDataset(order_epoch(dataset), spec=DataSpec(on_bad_image="skip"))
    with pytest.warns(UserWarning, match="skipped"), pytest.raises(ImageError, match="cannot be read"):
        chips[0]


def test_transforms_of_torchvision_move_boxes_with_pixels(dataset: Dataset) -> None:
    order = order_epoch(dataset, flip=0.0)
    plain = ChipDataset(order)[0]
    mirrored = ChipDataset(order, transform=v2.RandomHorizontalFlip(p=1.0))[0]
    np.testing.assert_array_equal(mirrored.pixels, flip_horizontally(plain).pixels)
    np.testing.assert_allclose(mirrored.target.boxes, flip_horizontally(plain).target.boxes, atol=1e-4)
    np.testing.assert_array_equal(mirrored.target.status, plain.target.status)
    upside_down = ChipDataset(order, transform=v2.RandomVerticalFlip(p=1.0))[0]
    np.testing.assert_array_equal(upside_down.pixels, plain.pixels[::-1])
    np.testing.assert_allclose(
        upside_down.target.boxes[:, [1, 3]], 64 - plain.target.boxes[:, [3, 1]], atol=1e-4
    )


def test_a_transform_may_drop_boxes(dataset: Dataset) -> None:
    def keep_first(image: Any, target: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return image, {name: values[:1] for name, values in target.items()}

    order = order_epoch(dataset, flip=0.0)
    batch = collate([ChipDataset(order, transform=keep_first)[index] for index in range(4)])
    assert max(batch_of(dataset).targets.num_boxes) > 1
    assert max(batch.targets.num_boxes) == 1


def test_random_transforms_depend_on_the_chip_alone(dataset: Dataset) -> None:
    order = order_epoch(dataset)
    spec = DataSpec(color_jitter=ColorJitterSpec(brightness=0.5, hue=0.2))
    chips = ChipDataset(order, spec=spec, transform=v2.RandomPosterize(bits=3))
    rng_state = torch.random.get_rng_state()
    pixels = [chips[index].pixels for index in range(4)]
    assert torch.equal(torch.random.get_rng_state(), rng_state)
    torch.manual_seed(7)
    for index in reversed(range(4)):
        np.testing.assert_array_equal(chips[index].pixels, pixels[index])
    plain = ChipDataset(order)
    factors = [pixels[index].mean() / plain[index].pixels.mean() for index in range(4)]
    assert np.std(factors) > 0.02


def test_color_jitter_leaves_padding_black(tmp_path: Path) -> None:
    narrow = load_dataset(write_dataset(tmp_path, sides=[(40, 40)]))
    spec = DataSpec(color_jitter=ColorJitterSpec(brightness=1.0, contrast=1.0))
    order = order_epoch(narrow, flip=0.0)
    plain, jittered = ChipDataset(order), ChipDataset(order, spec=spec)
    for index in range(len(plain)):
        is_padding = (plain[index].pixels == 0).all(axis=2)[:, ::-1].cumprod(axis=1)[:, ::-1].astype(bool)
        assert (jittered[index].pixels[is_padding] == 0).all()


def test_scale_jitter_changes_pixels_boxes_and_ranges_alike(dataset: Dataset) -> None:
    order = order_epoch(dataset, flip=0.0)
    plain, jittered = ChipDataset(order), ChipDataset(order, spec=DataSpec(scale_jitter=0.5))
    factors = []
    for index in range(len(plain)):
        before, after = plain[index], jittered[index]
        factor = after.valid_sizes[1] / before.valid_sizes[1] if np.isfinite(before.valid_sizes[1]) else None
        factors.append(factor)
        chip, _ = jittered._chip_at(index)
        rescaled = jittered._rescaled(chip, seed=after.seed)
        record = dataset[int(order.table.image_indices[order.chip_indices[index]])]
        expected = rescaled.clip(rescaled.to_chip(record.boxes))
        shown = expected[(expected[:, 2:] > expected[:, :2]).all(axis=1)]
        np.testing.assert_allclose(after.target.boxes, shown)
        np.testing.assert_array_equal(after.pixels, jittered[index].pixels)
    bounded = [factor for factor in factors if factor is not None]
    assert all(1 / 1.51 < factor < 1.51 for factor in bounded)
    assert np.std(bounded) > 0.1


def test_scale_jitter_never_enlarges_a_whole_image(tmp_path: Path) -> None:
    small = load_dataset(write_dataset(tmp_path, sides=[(60, 50)] * 4))
    chips = ChipDataset(order_epoch(small), spec=DataSpec(scale_jitter=1.0))
    for index in range(len(chips)):
        chip, _ = chips._chip_at(index)
        if chip.level.width <= chip.width and chip.level.height <= chip.height:
            rescaled = chips._rescaled(chip, seed=chips[index].seed)
            assert rescaled.level.width <= chip.level.width
            assert rescaled.visible == (rescaled.level.width, rescaled.level.height)


def test_scale_jitter_excludes_a_cache(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"scale_jitter must be 0 with cache\.folder"):
        DataSpec(scale_jitter=0.1, cache=CacheSpec(folder=str(tmp_path)))


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (lambda image, target: (image[:, :32], target), r"the image is torch.uint8 of \(3, 32, 64\)"),
        (lambda image, target: (image.float(), target), r"the image is torch.float32 of"),
        (lambda image, target: (None, target), r"the image is NoneType, expected a tensor"),
        (lambda image, target: (image, None), r"the target is NoneType"),
        (lambda image, target: None, r"the transform returned NoneType"),
        (
            lambda image, target: target["masks"],
            r"train_\d\.png .*: the transform failed \(KeyError: 'masks'\)",
        ),
        (lambda image, target: (image, {**target, "labels": target["labels"][:0]}), r"labels of \(0,\)"),
        (lambda image, target: (image, {"boxes": target["boxes"]}), r"labels is NoneType"),
        (lambda image, target: (image, {**target, "labels": target["labels"].float()}), r"are not integers"),
        (lambda image, target: (image, {**target, "boxes": target["boxes"] * torch.nan}), r"not finite"),
        (v2.ConvertBoundingBoxFormat("CXCYWH"), r"boxes are CXCYWH, expected XYXY"),
    ],
)
def test_a_transform_that_returns_no_chip_is_refused(
    dataset: Dataset, transform: ChipTransform, message: str
) -> None:
    with pytest.raises(TransformError, match=message):
        ChipDataset(order_epoch(dataset), transform=transform)[0]
