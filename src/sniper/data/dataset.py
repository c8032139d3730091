"""Chips read from disk, one by one and in batches, for torch's `DataLoader`."""

from collections.abc import Sequence
from dataclasses import dataclass
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
        file_name: of the image it was cut from.
    """

    pixels: UInt8[np.ndarray, "k k 3"]
    target: ChipTarget
    valid_sizes: tuple[float, float]
    file_name: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Target:
    """The ground truth of one chip as tensors.

    Attributes:
        boxes: (n, 4) float32 xyxy, chip frame. May be empty.
        labels: (n,) int64, 0..C-1.
        standing: (n,) int64 values of `Standing`.
    """

    boxes: Float[torch.Tensor, "n 4"]
    labels: Int[torch.Tensor, " n"]
    standing: Int[torch.Tensor, " n"]

    def to(self, device: torch.device) -> "Target":
        """Copy to a device."""
        return Target(
            boxes=self.boxes.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            standing=self.standing.to(device, non_blocking=True),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """A batch of chips.

    Attributes:
        images: (B, 3, K, K) uint8 grey levels.
        targets: B ground truths.
        valid_sizes: (B, 2) float32, valid box sizes in chip pixels: at least the first, below the second.
        file_names: of the B images the chips were cut from.
    """

    images: UInt8[torch.Tensor, "b 3 k k"]
    targets: tuple[Target, ...]
    valid_sizes: Float[torch.Tensor, "b 2"]
    file_names: tuple[str, ...]

    def to(self, device: torch.device) -> Self:
        """Copy to a device."""
        return type(self)(
            images=self.images.to(device, non_blocking=True),
            targets=tuple(target.to(device) for target in self.targets),
            valid_sizes=self.valid_sizes.to(device, non_blocking=True),
            file_names=self.file_names,
        )

    def pin_memory(self) -> Self:
        """Copy to page-locked memory, from which copies to a GPU need no waiting; called by torch's loader."""
        return type(self)(
            images=self.images.pin_memory(),
            targets=self.targets,
            valid_sizes=self.valid_sizes.pin_memory(),
            file_names=self.file_names,
        )

    def to_torchvision(self) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
        """Give the batch as torchvision's detectors take it.

        Those know no invalid and no ignored boxes: they get every object that the chip shows, and no crowd.

        Returns:
            B images (3, K, K) float32 from 0 to 1, and B targets with `boxes` and `labels`, the labels from 1 on.
        """
        images = list(self.images.float() / 255)
        targets = []
        for target in self.targets:
            is_object = target.standing != Standing.IGNORED
            targets.append({"boxes": target.boxes[is_object], "labels": target.labels[is_object] + 1})
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
            file_name=record.file_name,
        )
        return flipped(sample) if self._plan.is_flipped[index] else sample


def flipped(sample: ChipSample) -> ChipSample:
    """Mirror a chip left to right, pixels and boxes."""
    width = sample.pixels.shape[1]
    boxes = sample.target.boxes
    mirrored = np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], axis=1)
    return ChipSample(
        pixels=sample.pixels[:, ::-1],
        target=ChipTarget(boxes=mirrored, labels=sample.target.labels, standing=sample.target.standing),
        valid_sizes=sample.valid_sizes,
        file_name=sample.file_name,
    )


def collate(samples: Sequence[ChipSample]) -> Batch:
    """Put chips of one size together; here NumPy becomes torch."""
    pixels = np.stack([sample.pixels for sample in samples])  # (b, k, k, 3)
    return Batch(
        images=torch.from_numpy(pixels).permute(0, 3, 1, 2),
        targets=tuple(
            Target(
                boxes=torch.from_numpy(sample.target.boxes.astype(np.float32)),
                labels=torch.from_numpy(sample.target.labels),
                standing=torch.from_numpy(sample.target.standing),
            )
            for sample in samples
        ),
        valid_sizes=torch.tensor([sample.valid_sizes for sample in samples], dtype=torch.float32),
        file_names=tuple(sample.file_name for sample in samples),
    )
