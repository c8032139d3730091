"""An epoch's chips: planned, read, mirrored and batched."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn

from sniper.chips import Standing
from sniper.data.coco import Annotations, load_annotations
from sniper.data.dataset import Batch, ChipDataset, collate, flipped
from sniper.data.plan import EpochPlan, build_table, plan_epoch
from sniper.errors import AnnotationError
from tests.chips.worlds import SMALL_PYRAMID
from tests.data.tiny import write_dataset


@pytest.fixture
def annotations(tmp_path: Path) -> Annotations:
    return load_annotations(write_dataset(tmp_path))


def plan_of(annotations: Annotations, *, epoch: int = 0, seed: int = 0, flip: float = 0.5) -> EpochPlan:
    return plan_epoch(annotations, SMALL_PYRAMID, batch_size=4, flip=flip, seed=seed, epoch=epoch)


def test_a_plan_holds_every_chip_once_and_fills_the_last_batch(annotations: Annotations) -> None:
    plan = plan_of(annotations)
    assert plan.num_steps * 4 == len(plan.order)
    assert 0 <= plan.num_padding < 4
    assert sorted(plan.order[: len(plan.table)].tolist()) == list(range(len(plan.table)))
    assert plan.order[len(plan.table) :].tolist() == plan.order[: plan.num_padding].tolist()


def test_a_plan_is_a_function_of_seed_and_epoch(annotations: Annotations) -> None:
    def told(plan: EpochPlan) -> list[object]:
        return [plan.order.tolist(), plan.is_flipped.tolist(), plan.table.cover.x.tolist()]

    assert told(plan_of(annotations)) == told(plan_of(annotations))
    assert told(plan_of(annotations)) != told(plan_of(annotations, epoch=1))
    assert told(plan_of(annotations)) != told(plan_of(annotations, seed=1))


def test_a_table_chosen_before_is_shuffled_anew_each_epoch(annotations: Annotations) -> None:
    table = build_table(annotations, SMALL_PYRAMID, generator=np.random.default_rng(5))
    plans = [
        plan_epoch(annotations, SMALL_PYRAMID, batch_size=4, flip=0.5, seed=0, epoch=epoch, table=table)
        for epoch in range(2)
    ]
    assert all(plan.table is table for plan in plans)
    assert plans[0].order.tolist() != plans[1].order.tolist()


def test_a_data_set_without_boxes_makes_no_plan(tmp_path: Path) -> None:
    empty = load_annotations(write_dataset(tmp_path, boxes_per_image=0))
    with pytest.raises(AnnotationError, match=r"train\.json: has no box to learn from"):
        plan_of(empty)


def test_every_box_is_valid_and_whole_in_some_chip(annotations: Annotations) -> None:
    plan = plan_of(annotations, flip=0.0)
    chips = ChipDataset(annotations, plan)
    seen = set()
    for place, index in enumerate(plan.order.tolist()):
        image_index = int(plan.table.image_indices[index])
        chip = plan.table.chip(index, image_index=image_index)
        target = chips[place].target
        valid = target.boxes[target.standing == Standing.VALID]
        for box in chip.to_image(valid):
            own = annotations[image_index].boxes
            nearest = np.abs(own - box).max(axis=1)
            if nearest.min() < 1e-6:
                seen.add((image_index, int(nearest.argmin())))
    assert len(seen) == len(annotations.boxes)


def test_pixels_lie_under_their_boxes(annotations: Annotations) -> None:
    # The squares of the tiny data set are black (dark) or nearly white (bright) on grey.
    chips = ChipDataset(annotations, plan_of(annotations, flip=0.5))
    for place in range(len(chips)):
        sample = chips[place]
        target = sample.target
        for box, label, standing in zip(target.boxes, target.labels, target.standing, strict=True):
            x, y = ((box[:2] + box[2:]) / 2).astype(int)
            overlapping = ((target.boxes[:, :2] <= [x, y]) & (target.boxes[:, 2:] > [x, y])).all(axis=1)
            if standing == Standing.VALID and overlapping.sum() == 1:
                level = sample.pixels[y, x].astype(int)
                assert (level > 200).all() if label == 1 else (level < 100).all()


def test_mirroring_twice_is_the_same_and_once_moves_boxes_with_pixels(annotations: Annotations) -> None:
    sample = ChipDataset(annotations, plan_of(annotations, flip=0.0))[0]
    twice = flipped(flipped(sample))
    np.testing.assert_array_equal(twice.pixels, sample.pixels)
    np.testing.assert_allclose(twice.target.boxes, sample.target.boxes)
    once = flipped(sample)
    np.testing.assert_array_equal(once.pixels[:, 0], sample.pixels[:, -1])
    assert (once.target.boxes[:, 2] > once.target.boxes[:, 0]).all()
    np.testing.assert_allclose(once.target.boxes[:, 0], 64 - sample.target.boxes[:, 2])


def test_an_index_outside_is_refused(annotations: Annotations) -> None:
    chips = ChipDataset(annotations, plan_of(annotations))
    with pytest.raises(IndexError):
        chips[len(chips)]


def test_a_loader_with_and_without_processes_gives_the_same_batches(annotations: Annotations) -> None:
    chips = ChipDataset(annotations, plan_of(annotations))
    alone = list(DataLoader(chips, batch_size=4, collate_fn=collate))
    beside = list(DataLoader(chips, batch_size=4, collate_fn=collate, num_workers=2))
    for one, other in zip(alone, beside, strict=True):
        assert torch.equal(one.images, other.images)
        assert one.names == other.names
        assert one.seeds == other.seeds
        assert torch.equal(one.boxes, other.boxes)


def batch_of(annotations: Annotations) -> Batch:
    chips = ChipDataset(annotations, plan_of(annotations))
    return collate([chips[i] for i in range(4)])


def test_a_batch_has_one_shape(annotations: Annotations) -> None:
    batch = batch_of(annotations)
    assert batch.images.shape == (4, 3, 64, 64)
    assert batch.images.dtype == torch.uint8
    assert batch.valid_sizes.shape == (4, 2)
    assert len(batch) == len(batch.boxes) == len(batch.names) == len(set(batch.seeds)) == 4


def test_a_torchvision_detector_trains_on_a_batch(annotations: Annotations) -> None:
    torch.manual_seed(0)
    model = fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None, num_classes=3).train()
    images, targets = batch_of(annotations).to_torchvision()
    losses = model(images, targets)
    assert set(losses) == {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert min(int(target["labels"].min()) for target in targets if len(target["labels"])) >= 1


def test_torchvision_is_given_no_ignored_boxes(annotations: Annotations) -> None:
    batch = batch_of(annotations)
    standing = batch.standing.clone()
    standing[0] = Standing.IGNORED
    _, targets = dataclasses.replace(batch, standing=standing).to_torchvision()
    assert targets[0]["boxes"].shape == (0, 4)
    assert [len(one["boxes"]) for one in targets[1:]] == (standing[1:] != Standing.ABSENT).sum(1).tolist()


def test_a_batch_has_the_valid_boxes_of_each_chip_first_and_a_part_of_it_its_own(
    annotations: Annotations,
) -> None:
    batch = batch_of(annotations)
    for standing, count in zip(batch.standing, batch.num_valid, strict=True):
        assert (standing[:count] == Standing.VALID).all()
        assert (standing[count:] != Standing.VALID).all()
    part = batch.part(1, 3)
    assert part.names == batch.names[1:3]
    assert part.seeds == batch.seeds[1:3]
    assert part.num_valid == batch.num_valid[1:3]
    assert torch.equal(part.images, batch.images[1:3])
    assert torch.equal(part.boxes, batch.boxes[1:3])
