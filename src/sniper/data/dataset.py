"""Chips read from disk, one by one and in batches, for torch's `DataLoader`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch.utils.data import Dataset

from sniper.chips import ChipTarget, Standing, assign
from sniper.data.coco import Annotations
from sniper.data.images import cut_chip, load_image
from sniper.data.plan import EpochPlan


@dataclass(frozen=True, kw_only=True, eq=False)
class ChipSample:
    """One chip, ready to be put into a batch.

    Attributes:
        pixels: (K, K, 3) grey levels, chip frame.
        target: what it teaches.
        valid_sizes: the valid range of its level in chip pixels: at least the first, below the second.
        seed: what is drawn when this chip is learnt from depends on this number alone.
        name: the image it was cut from, and where.
    """

    pixels: UInt8[np.ndarray, "k k 3"]
    target: ChipTarget
    valid_sizes: tuple[float, float]
    seed: int
    name: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """A batch of chips. What belongs to a chip does not depend on which others share its batch.

    Attributes:
        images: (B, 3, K, K) uint8 grey levels.
        boxes: (B, M, 4) float32 xyxy, chip frame: the valid ones of each chip first, zeros after its last.
        labels: (B, M) int64, 0..C-1; 0 after the last.
        standing: (B, M) int64 values of `Standing`; `ABSENT` after the last.
        num_boxes: how many boxes each of the B chips has.
        num_valid: how many of them are valid.
        valid_sizes: (B, 2) float32, valid box sizes in chip pixels: at least the first, below the second.
        seeds: of the B chips, for what is drawn when they are learnt from.
        names: of the B images the chips were cut from, and where.
    """

    images: UInt8[torch.Tensor, "b 3 k k"]
    boxes: Float[torch.Tensor, "b m 4"]
    labels: Int[torch.Tensor, "b m"]
    standing: Int[torch.Tensor, "b m"]
    num_boxes: tuple[int, ...]
    num_valid: tuple[int, ...]
    valid_sizes: Float[torch.Tensor, "b 2"]
    seeds: tuple[int, ...]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device) -> Self:
        """Copy to a device."""
        return self._changed(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        """Copy to page-locked memory, from which copies to a GPU need no waiting; called by torch's loader."""
        return self._changed(torch.Tensor.pin_memory)

    def part(self, start: int, stop: int) -> Self:
        """Give the chips from `start` up to `stop`."""
        chosen = self._changed(lambda tensor: tensor[start:stop])
        return replace(
            chosen,
            num_boxes=self.num_boxes[start:stop],
            num_valid=self.num_valid[start:stop],
            seeds=self.seeds[start:stop],
            names=self.names[start:stop],
        )

    def _changed(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        return replace(
            self,
            images=change(self.images),
            boxes=change(self.boxes),
            labels=change(self.labels),
            standing=change(self.standing),
            valid_sizes=change(self.valid_sizes),
        )

    def to_torchvision(self) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
        """Give the batch as torchvision's detectors take it.

        Those know no invalid and no ignored boxes: they get every object that the chip shows, and no crowd.

        Returns:
            B images (3, K, K) float32 from 0 to 1, and B targets with `boxes` and `labels`, the labels from 1 on.
        """
        images = list(self.images.float() / 255)
        targets = []
        for boxes, labels, standing in zip(self.boxes, self.labels, self.standing, strict=True):
            is_object = (standing != Standing.IGNORED) & (standing != Standing.ABSENT)
            targets.append({"boxes": boxes[is_object], "labels": labels[is_object] + 1})
        return images, targets


class ChipDataset(Dataset[ChipSample]):
    """The chips of one epoch, for torch's `DataLoader`, with `collate` to make batches.

    Args:
        annotations: the data set.
        plan: the chips and their order.
        min_visible_side: chip pixels that a clipped box must show in both axes, or it is ignored.
    """

    def __init__(self, annotations: Annotations, plan: EpochPlan, *, min_visible_side: float = 10.0) -> None:
        self._annotations = annotations
        self._plan = plan
        self._min_visible_side = min_visible_side
        self._image_indices = plan.table.image_indices

    def __len__(self) -> int:
        return len(self._plan.order)

    def __getitem__(self, index: int) -> ChipSample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        chip_index = int(self._plan.order[index])
        image_index = int(self._image_indices[chip_index])
        record = self._annotations[image_index]
        chip = self._plan.table.chip(chip_index, image_index=image_index)
        moved_to = self._plan.table.cover.moved_to[self._annotations.boxes_of(image_index)]
        target = assign(
            chip,
            boxes=record.boxes,
            labels=record.labels,
            is_crowd=record.is_crowd,
            is_moved_here=moved_to == chip.level.index,
            is_negative=bool(self._plan.table.is_negative[chip_index]),
            min_visible_side=self._min_visible_side,
        )
        sample = ChipSample(
            pixels=cut_chip(load_image(record.path), chip),
            target=target,
            valid_sizes=chip.level.valid_sizes,
            seed=int(self._plan.seeds[index]),
            name=f"{record.file_name} ({chip.describe()})",
        )
        return flipped(sample) if self._plan.is_flipped[index] else sample


def flipped(sample: ChipSample) -> ChipSample:
    """Mirror a chip left to right, pixels and boxes."""
    width = sample.pixels.shape[1]
    boxes = sample.target.boxes
    mirrored = np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], axis=1)
    target = ChipTarget(boxes=mirrored, labels=sample.target.labels, standing=sample.target.standing)
    return replace(sample, pixels=sample.pixels[:, ::-1], target=target)


def collate(samples: Sequence[ChipSample]) -> Batch:
    """Put chips of one size together; here NumPy becomes torch."""
    pixels = np.stack([sample.pixels for sample in samples])  # (b, k, k, 3)
    most = max(1, *(len(sample.target.labels) for sample in samples))
    boxes = np.zeros((len(samples), most, 4), dtype=np.float32)
    labels = np.zeros((len(samples), most), dtype=np.int64)
    standing = np.full((len(samples), most), Standing.ABSENT, dtype=np.int64)
    for i, sample in enumerate(samples):
        target = sample.target
        order = np.argsort(target.standing != Standing.VALID, kind="stable")  # valid boxes first
        boxes[i, : len(order)] = target.boxes[order]
        labels[i, : len(order)] = target.labels[order]
        standing[i, : len(order)] = target.standing[order]
    return Batch(
        images=torch.from_numpy(pixels).permute(0, 3, 1, 2),
        boxes=torch.from_numpy(boxes),
        labels=torch.from_numpy(labels),
        standing=torch.from_numpy(standing),
        num_boxes=tuple(len(sample.target.labels) for sample in samples),
        num_valid=tuple((standing == Standing.VALID).sum(axis=1).tolist()),
        valid_sizes=torch.tensor([sample.valid_sizes for sample in samples], dtype=torch.float32),
        seeds=tuple(sample.seed for sample in samples),
        names=tuple(sample.name for sample in samples),
    )
