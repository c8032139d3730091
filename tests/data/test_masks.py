"""Masks in chips and batches: cropped, scaled, mirrored and transformed with their pixels."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jaxtyping import Bool, Int
from torchvision.transforms import v2

from sniper.chips import BoxStatus, Chip, LevelSpec
from sniper.data.batches import Batch, ChipDataset, ChipSample, ChipTransform, collate, flip_horizontally
from sniper.data.datasets import Dataset, load_dataset
from sniper.data.epoch import order_chips
from sniper.data.loader import load_batches
from sniper.data.spec import DataSpec
from sniper.errors import TransformError
from sniper.geometry.boxes import Sides
from sniper.geometry.masks import MaskArrays, rasterize, rasterize_rings
from tests.chips.worlds import SMALL_PYRAMID
from tests.data.assertions import assert_equal_batches
from tests.data.masked import write_masked_dataset


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return load_dataset(write_masked_dataset(tmp_path))


def chips_of(dataset: Dataset, *, flip: float = 0.0, **options: Any) -> ChipDataset:
    order = order_chips(dataset, SMALL_PYRAMID, batch_size=4, flip=flip, seed=0, epoch=0)
    return ChipDataset(order, **options)


def rasters_of(sample: ChipSample) -> Bool[np.ndarray, "n h w"]:
    """Return the masks of a chip at its pixels."""
    masks = sample.target.masks
    assert masks is not None
    height, width = sample.pixels.shape[:2]
    regions = np.tile([0.0, 0.0, width, height], (len(masks), 1))
    return rasterize(masks, np.arange(len(masks)), regions, sides=Sides(width, height))


def compare(sample: ChipSample) -> Int[np.ndarray, "2"]:
    """Return intersection and union of the masks of a chip and its dark pixels, which are the shapes."""
    shapes: Any = rasters_of(sample).any(axis=0)
    is_dark: Any = (sample.pixels < 64).all(axis=2)
    ignored = sample.target.boxes[sample.target.status == BoxStatus.IGNORE]
    for x1, y1, x2, y2 in ignored.round().astype(int).tolist():
        shapes[y1:y2, x1:x2] = is_dark[y1:y2, x1:x2] = False
    return np.array([(shapes & is_dark).sum(), (shapes | is_dark).sum()])


@pytest.mark.parametrize(
    ("transform", "least"),
    [
        (None, 0.95),
        (v2.RandomHorizontalFlip(p=1.0), 0.95),
        (v2.RandomVerticalFlip(p=1.0), 0.95),
        (v2.RandomAffine(degrees=(30, 30), scale=(0.8, 0.8), shear=(10, 10), fill=128), 0.92),
        (v2.RandomPerspective(distortion_scale=0.4, p=1.0, fill=128), 0.9),
        (v2.Compose([v2.RandomRotation((90, 90)), v2.ColorJitter(brightness=0.1)]), 0.95),
    ],
    ids=["none", "horizontal flip", "vertical flip", "affine", "perspective", "rotation"],
)
def test_masks_lie_on_the_pixels_of_their_objects(
    dataset: Dataset, transform: ChipTransform | None, least: float
) -> None:
    chips = chips_of(dataset, transform=transform)
    whole = [index for index in range(len(chips)) if _is_whole(chips, index)]
    shared, union = np.sum([compare(chips[index]) for index in whole], axis=0)
    assert union > 1000
    assert shared / union > least


def _is_whole(chips: ChipDataset, index: int) -> bool:
    """Check that a chip has no padding, which is as dark as the shapes."""
    chip, _ = chips._chip_at(index)
    return chip.visible == (chip.width, chip.height)


@pytest.mark.parametrize("is_flipped", [False, True])
def test_masks_of_a_chip_equal_a_crop_of_those_of_its_level(dataset: Dataset, is_flipped: bool) -> None:
    record = dataset[0]
    assert record.masks is not None
    level = LevelSpec(factor=1.7).at(width=record.width, height=record.height)
    chip = Chip(level=level, x=37, y=21, width=64, height=64)
    whole = np.tile([0.0, 0.0, record.width, record.height], (len(record.masks), 1))
    rows = np.arange(len(record.masks))
    at_level = rasterize(record.masks, rows, whole, sides=Sides(level.width, level.height))
    expected = at_level[:, 21 : 21 + 64, 37 : 37 + 64]
    sample = replace(chips_of(dataset)[0], target=_assign(chip, dataset))
    if is_flipped:
        sample, expected = flip_horizontally(sample), expected[:, :, ::-1]
    is_shown = (
        chip.clip(chip.to_chip(record.boxes))[:, 2:] > chip.clip(chip.to_chip(record.boxes))[:, :2]
    ).all(1)
    shown = rasters_of(sample)
    for raster, at_its_level, status in zip(
        shown, expected[is_shown], sample.target.status.tolist(), strict=True
    ):
        if status != BoxStatus.IGNORE:
            assert np.array_equal(raster, at_its_level)
    assert shown.any()


def _assign(chip: Chip, dataset: Dataset) -> Any:
    from sniper.chips import assign_targets

    record = dataset[0]
    return assign_targets(
        chip,
        boxes=record.boxes,
        labels=record.labels,
        is_crowd=record.is_crowd,
        is_moved_here=np.zeros(len(record.boxes), dtype=np.bool_),
        masks=record.masks,
    )


def batch_rasters(batch: Batch) -> list[list[Any]]:
    """Return the masks of each chip of a batch, in the order of its boxes, on a grid of 16 x 16."""
    masks = batch.targets.masks
    assert masks is not None
    arrays = masks.map(torch.Tensor.numpy)
    return [
        [
            rasterize_rings(
                arrays.points,
                arrays.ring_offsets,
                arrays.rings[chip, box][None],
                np.array([[0.0, 0.0, 64.0, 64.0]]),
                sides=Sides(16, 16),
            )[0].tolist()
            for box in range(batch.targets.num_boxes[chip])
        ]
        for chip in range(len(batch))
    ]


def test_a_batch_has_the_masks_in_the_order_of_its_boxes(dataset: Dataset) -> None:
    chips = chips_of(dataset, flip=0.5)
    samples = [chips[index] for index in range(4)]
    batch = collate(samples)
    for sample, rasters, boxes in zip(samples, batch_rasters(batch), batch.targets.boxes, strict=True):
        masks = sample.target.masks
        assert masks is not None
        for box, mask in zip(sample.target.boxes, range(len(masks)), strict=True):
            region = np.array([[0.0, 0.0, 64.0, 64.0]])
            expected = rasterize(masks, np.array([mask]), region, sides=Sides(16, 16))[0].tolist()
            index = int((boxes - torch.from_numpy(box)).abs().sum(dim=1).argmin())
            assert rasters[index] == expected
    padding = batch.targets.status == BoxStatus.PADDING
    assert batch.targets.masks is not None
    assert (batch.targets.masks.rings[padding].diff(dim=1) == 0).all()


def test_parts_of_a_batch_have_their_masks(dataset: Dataset) -> None:
    chips = chips_of(dataset)
    batch = collate([chips[index] for index in range(4)])
    parts = [batch.part(0, 1), batch.part(1, 4)]
    assert [rasters for part in parts for rasters in batch_rasters(part)] == batch_rasters(batch)


def test_batches_with_masks_do_not_depend_on_the_workers(dataset: Dataset) -> None:
    order = order_chips(dataset, SMALL_PYRAMID, batch_size=4, flip=0.5, seed=0, epoch=0, images_at_once=2)
    steps = range(order.num_steps)
    alone, together = (
        list(load_batches(order, DataSpec(num_workers=workers), steps=steps)) for workers in (0, 2)
    )
    for batch, expected in zip(together, alone, strict=True):
        assert_equal_batches(batch, expected)
    assert alone[0].targets.masks is not None


def test_ignored_boxes_have_no_mask(dataset: Dataset) -> None:
    crowd = replace(dataset, is_crowd=np.arange(len(dataset.boxes)) % 2 == 0)
    samples = list(map(chips_of(crowd).__getitem__, range(4)))
    for sample in samples:
        masks = sample.target.masks
        assert masks is not None
        assert masks.has_mask.tolist() == (sample.target.status != BoxStatus.IGNORE).tolist()
    assert any((sample.target.status == BoxStatus.IGNORE).any() for sample in samples)


def test_a_transform_may_drop_boxes_with_their_masks(dataset: Dataset) -> None:
    def keep_last(image: Any, target: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        per_box = ("boxes", "labels", "status", "mask_index")
        return image, {name: each[-1:] if name in per_box else each for name, each in target.items()}

    plain, kept = (chips_of(dataset, transform=transform)[0] for transform in (None, keep_last))
    assert len(plain.target.boxes) > 1
    assert np.array_equal(rasters_of(kept), rasters_of(plain)[-1:])


def test_boxes_can_be_sanitized_with_masks(dataset: Dataset) -> None:
    sanitize = v2.SanitizeBoundingBoxes(
        min_size=30,
        labels_getter=lambda inputs: [inputs[1][key] for key in ("labels", "status", "mask_index")],
    )
    chips, sanitized = chips_of(dataset), chips_of(dataset, transform=sanitize)
    counts = [
        (len(sanitized[index].target.boxes), len(chips[index].target.boxes)) for index in range(len(chips))
    ]
    assert any(kept < given for kept, given in counts)
    for index in range(len(chips)):
        target = sanitized[index].target
        assert target.masks is not None
        assert len(target.masks) == len(target.boxes)


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (
            lambda image, target: (image, {**target, "mask_index": target["mask_index"][:0]}),
            r"mask_index is of \(0,\)",
        ),
        (
            lambda image, target: (image, {key: target[key] for key in ("boxes", "labels", "status")}),
            r"mask_index is NoneType, expected \(\d,\): it is dropped with its box, like labels",
        ),
        (
            lambda image, target: (image, {**target, "mask_points": target["mask_points"][:3]}),
            r"mask_points is of \(3, 2\)",
        ),
        (
            lambda image, target: (image, {**target, "mask_points": target["mask_points"] * torch.nan}),
            r"a point of a mask is not finite",
        ),
        (
            lambda image, target: (image, {**target, "mask_points": target["mask_points"] + 90}),
            r"the mask of box 0 spans .*, outside the box .*: mask_points are moved with the boxes",
        ),
    ],
)
def test_a_transform_that_loses_masks_is_refused(
    dataset: Dataset, transform: ChipTransform, message: str
) -> None:
    with pytest.raises(TransformError, match=message):
        chips_of(dataset, transform=transform)[0]


def test_a_data_set_without_masks_has_none_in_its_batches(dataset: Dataset) -> None:
    plain = chips_of(replace(dataset, masks=None))
    batch = collate([plain[0], plain[1]])
    assert dataset[0].masks is not None
    assert batch.targets.masks is None


def test_masks_count_for_the_digest_of_a_data_set(dataset: Dataset) -> None:
    assert dataset.masks is not None
    moved = dataset.masks.to_polygons()
    moved = moved.with_points(moved.points + np.float32(0.5))
    digests = {each.digest for each in (dataset, replace(dataset, masks=moved), replace(dataset, masks=None))}
    assert len(digests) == 3


def test_selected_images_keep_their_masks(dataset: Dataset) -> None:
    selected = dataset.select(np.array([1, 0]))
    for new, old in ((0, 1), (1, 0)):
        masks, expected = selected[new].masks, dataset[old].masks
        assert isinstance(masks, MaskArrays)
        assert isinstance(expected, MaskArrays)
        assert masks.to_coco() == expected.to_coco()
