"""Chips read from disk, one by one and in batches, for torch's `DataLoader`."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import cv2
import numpy as np
import torch
from jaxtyping import UInt8

from sniper.chips import BoxStatus, Chip, ChipTarget, ChipTargets, assign_targets
from sniper.chips.targets import stack_targets
from sniper.data.epoch import EpochOrder
from sniper.data.reader import ChipReader
from sniper.data.spec import ColorJitterSpec, DataSpec
from sniper.errors import ImageError, TransformError
from sniper.geometry.masks import MaskArrays
from sniper.remote import is_remote

ChipTransform = Callable[[Any, dict[str, Any]], tuple[Any, dict[str, Any]]]
"""A function of an image and its target, such as one of torchvision's `transforms.v2`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ChipSample:
    """One chip with its ground truth.

    Attributes:
        pixels: (H, W, 3) RGB values 0..255, chip frame.
        target: its ground truth.
        valid_sizes: the half-open valid range of its level, chip pixels.
        seed: random draws for this chip, in training too, depend on this number alone.
        name: the file name of its image, and the window of the chip.
        skipped: number of unreadable chips that this one replaces.
    """

    pixels: UInt8[np.ndarray, "h w 3"]
    target: ChipTarget
    valid_sizes: tuple[float, float]
    seed: int
    name: str
    skipped: int = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """A batch of chips of one size. Nothing about a chip depends on the others of its batch, except padding.

    Attributes:
        images: (B, 3, H, W) uint8 RGB values.
        targets: the ground truth of the B chips.
        names: of the B chips: file name of the image, and the window of the chip.
        skipped: for each chip, the number of unreadable chips that it replaces.
    """

    images: UInt8[torch.Tensor, "b 3 h w"]
    targets: ChipTargets[torch.Tensor]
    names: tuple[str, ...]
    skipped: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device) -> Self:
        """Copy the batch to a device."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        """Copy the batch to page-locked memory, for asynchronous copies to a GPU."""
        return self.map(torch.Tensor.pin_memory)

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        """Apply a function to every tensor."""
        return replace(self, images=function(self.images), targets=self.targets.map(function))

    def part(self, start: int, stop: int) -> Self:
        """Return the chips from `start` up to, but not including, `stop`."""
        return replace(
            self,
            images=self.images[start:stop],
            targets=self.targets.part(start, stop),
            names=self.names[start:stop],
            skipped=self.skipped[start:stop],
        )

    @classmethod
    def of(cls, samples: Sequence[ChipSample], images: UInt8[torch.Tensor, "b 3 h w"]) -> "Batch":
        """Build a batch of chips whose pixels are stacked already.

        Args:
            samples: the B chips; their own pixels are not used.
            images: (B, 3, H, W) uint8 RGB values.
        """
        targets = stack_targets(
            [sample.target for sample in samples],
            valid_sizes=[sample.valid_sizes for sample in samples],
            seeds=[sample.seed for sample in samples],
        )
        return cls(
            images=images,
            targets=targets.map(torch.from_numpy),
            names=tuple(sample.name for sample in samples),
            skipped=tuple(sample.skipped for sample in samples),
        )

    def to_torchvision(self) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
        """Convert the batch to the input of torchvision's detectors.

        They have no notion of ignored boxes: their targets are all objects, in range or not, without ignored boxes.

        Returns:
            B images (3, H, W) float32 from 0 to 1, and B targets with `boxes` and `labels`, which start from 1.
        """
        images = list(self.images.float() / 255)
        targets = []
        for boxes, labels, status in zip(
            self.targets.boxes, self.targets.labels, self.targets.status, strict=True
        ):
            is_object = (status != BoxStatus.IGNORE) & (status != BoxStatus.PADDING)
            targets.append({"boxes": boxes[is_object], "labels": labels[is_object] + 1})
        return images, targets


class ChipDataset(torch.utils.data.Dataset[ChipSample]):
    """The chips of one epoch, for torch's `DataLoader` with `collate` as its `collate_fn`.

    Args:
        order: the chips of an epoch, and the data set that they are cut from.
        spec: how chips are read and augmented; its data sets and chip choice are not used here.
        transform: applied to each chip last, for instance one of torchvision's `transforms.v2`. It takes a
            `tv_tensors.Image` (3, H, W) uint8 and a dictionary of `boxes` (`tv_tensors.BoundingBoxes`, xyxy), `labels`
            and `status`, one for each box, and returns both. It may drop boxes together with their labels and status.
            With masks there are also `mask_index`, one for each box, which it drops like `labels`, and `mask_points`
            (`MaskPoints`), the corners of all masks, which it moves with the boxes and does not drop.
            torch's global generator is seeded for each chip.
        kept_images: number of decoded images kept in memory for their next chips.

    Raises:
        CacheError: if the chip cache cannot be used.
    """

    def __init__(
        self,
        order: EpochOrder,
        *,
        spec: DataSpec = DataSpec(),
        transform: ChipTransform | None = None,
        kept_images: int = 1,
    ) -> None:
        self._order = order
        self._spec = spec
        self._reader = ChipReader(spec.read, cache=spec.cache, kept_images=kept_images)
        self._jitter = _build_jitter(spec.color_jitter)
        self._transform = transform
        self._image_indices = order.table.image_indices
        self._is_remote = is_remote(order.dataset.image_root)

    def __len__(self) -> int:
        return len(self._order.chip_indices)

    def __getitem__(self, index: int) -> ChipSample:
        """Read a chip. With `on_bad_image: skip`, an unreadable chip is replaced by the next readable one of its size.

        Raises:
            IndexError: if there is no such chip.
            ImageError: if the image cannot be read, and with `skip` no other of that size either.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        skipped = 0
        for candidate in self._same_size(index):
            try:
                sample = self._read(candidate)
            except ImageError as error:
                if self._spec.on_bad_image == "refuse":
                    raise
                skipped, last = skipped + 1, error
                warnings.warn(f"{error}; skipped", stacklevel=2)
            else:
                return replace(sample, skipped=skipped)
        raise last

    def __getitems__(self, indices: Sequence[int]) -> list[ChipSample]:
        """Read chips, while remote images that they need are read ahead."""
        self.read_ahead(indices)
        return [self[index] for index in indices]

    def read_ahead(self, indices: Iterable[int]) -> None:
        """Start to read the remote images of chips that are read soon."""
        if self._is_remote:
            self._reader.read_ahead(map(self._path_of, indices))

    def _path_of(self, index: int) -> Path:
        dataset = self._order.dataset
        _, image_index = self._chip_at(index)
        return dataset.image_root / str(dataset.image_paths[image_index])

    def _same_size(self, index: int) -> Iterator[int]:
        """Iterate over an index and all others, wrapping around, whose chips have the same size."""
        yield index
        chip, _ = self._chip_at(index)
        for other_index in (*range(index + 1, len(self)), *range(index)):
            other, _ = self._chip_at(other_index)
            if (other.width, other.height) == (chip.width, chip.height):
                yield other_index

    def _chip_at(self, index: int) -> tuple[Chip, int]:
        """Return a chip and the index of its image."""
        chip_index = int(self._order.chip_indices[index])
        image_index = int(self._image_indices[chip_index])
        return self._order.table.chip(chip_index), image_index

    def _read(self, index: int) -> ChipSample:
        chip, image_index = self._chip_at(index)
        seed = int(self._order.seeds[index])
        chip = self._rescaled(chip, seed=seed)
        record = self._order.dataset[image_index]
        moved_to = self._order.table.moved_to[self._order.dataset.boxes_of(image_index)]
        target = assign_targets(
            chip,
            boxes=record.boxes,
            labels=record.labels,
            is_crowd=record.is_crowd,
            is_moved_here=moved_to == chip.level.index,
            is_negative=bool(self._order.table.is_negative[self._order.chip_indices[index]]),
            masks=record.masks,
            min_visible_side=self._spec.min_visible_side,
            min_visibility=self._order.min_visibility,
        )
        sample = ChipSample(
            pixels=self._jittered(self._reader.read_record(record, chip), chip, seed=seed),
            target=target,
            valid_sizes=chip.level.valid_sizes,
            seed=seed,
            name=f"{record.file_name} ({chip.describe()})",
        )
        if self._order.is_flipped[index]:
            sample = flip_horizontally(sample)
        return sample if self._transform is None else apply_transform(sample, self._transform)

    def _rescaled(self, chip: Chip, *, seed: int) -> Chip:
        """Apply the scale jitter: a random factor, whose logarithm is uniform."""
        if self._spec.scale_jitter == 0:
            return chip
        largest = math.log1p(self._spec.scale_jitter)
        shows_all = chip.level.width <= chip.width and chip.level.height <= chip.height
        draw = np.random.default_rng([seed, 2]).uniform(-largest, 0.0 if shows_all else largest)
        return chip.rescaled(math.exp(draw))

    def _jittered(
        self, pixels: UInt8[np.ndarray, "h w 3"], chip: Chip, *, seed: int
    ) -> UInt8[np.ndarray, "h w 3"]:
        """Apply the colour jitter inside the image; padding stays black."""
        if self._jitter is None:
            return pixels
        width, height = chip.visible
        jittered = pixels.copy()
        with _seeded_torch(seed):
            visible = self._jitter(torch.from_numpy(jittered[:height, :width]).permute(2, 0, 1))
        jittered[:height, :width] = visible.permute(1, 2, 0).numpy()
        return jittered


def _build_jitter(color: ColorJitterSpec) -> Callable[[torch.Tensor], torch.Tensor] | None:
    if color == ColorJitterSpec():
        return None
    from torchvision.transforms import v2

    return v2.ColorJitter(color.brightness, color.contrast, color.saturation, color.hue)


@contextmanager
def _seeded_torch(seed: int) -> Iterator[None]:
    """Seed torch's global generator with a number derived from a chip's seed, and restore its state afterwards."""
    with torch.random.fork_rng(devices=[]):
        # Derived, because the detector draws from the seed itself: the two must be independent.
        torch.manual_seed(int(np.random.SeedSequence([seed, 1]).generate_state(1)[0]))
        yield


def flip_horizontally(sample: ChipSample) -> ChipSample:
    """Mirror a chip left to right, pixels, boxes and masks."""
    width = sample.pixels.shape[1]
    boxes, masks = sample.target.boxes, sample.target.masks
    mirrored = np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], axis=1)
    if masks is not None:
        points = np.stack([width - masks.points[:, 0], masks.points[:, 1]], axis=1)
        masks = masks.with_points(points)
    target = replace(sample.target, boxes=mirrored, masks=masks)
    return replace(sample, pixels=sample.pixels[:, ::-1], target=target)


def apply_transform(sample: ChipSample, transform: ChipTransform) -> ChipSample:
    """Apply a transform of torchvision's `tv_tensors`; its random draws depend on the chip's seed alone.

    Raises:
        TransformError: if the transform fails, or the result is not a chip of the same size with one label and status
            for each box.
    """
    from torchvision import tv_tensors

    from sniper.data.mask_points import MaskPoints

    masks = sample.target.masks
    height, width = sample.pixels.shape[:2]
    image: Any = tv_tensors.Image(torch.from_numpy(sample.pixels.copy()).permute(2, 0, 1))
    target: dict[str, Any] = {
        "boxes": tv_tensors.BoundingBoxes(
            torch.from_numpy(sample.target.boxes).float().reshape(-1, 4),
            format="XYXY",
            canvas_size=(height, width),
        ),
        "labels": torch.from_numpy(sample.target.labels),
        "status": torch.from_numpy(sample.target.status),
    }
    if masks is not None:
        target["mask_index"] = torch.arange(len(masks))
        target["mask_points"] = MaskPoints.of(
            torch.from_numpy(masks.points.copy()), canvas_size=(height, width)
        )
    try:
        with _seeded_torch(sample.seed):
            result = transform(image, target)
    except Exception as error:
        raise TransformError(
            f"{sample.name}: the transform failed ({type(error).__name__}: {error})"
        ) from error
    if not isinstance(result, tuple) or len(result) != 2:
        raise TransformError(
            f"{sample.name}: the transform returned {type(result).__name__}, expected an image and a target"
        )
    image, target = result
    problem = next(_find_problems(image, target, hw=(height, width), masks=masks), None)
    if problem is not None:
        raise TransformError(f"{sample.name}: after the transform {problem}")
    boxes, labels, status = (target[name] for name in ("boxes", "labels", "status"))
    return replace(
        sample,
        pixels=image.permute(1, 2, 0).numpy(),
        target=ChipTarget(
            boxes=boxes.double().numpy(),
            labels=labels.numpy(),
            status=status.numpy(),
            masks=None
            if masks is None
            else masks.with_points(target["mask_points"].float().numpy()).select(
                target["mask_index"].numpy()
            ),
        ),
    )


def _find_problems(
    image: Any, target: Any, *, hw: tuple[int, int], masks: MaskArrays | None
) -> Iterator[str]:
    """Check the result of a transform. Each check assumes that those before it found no problem."""
    from torchvision import tv_tensors

    if not isinstance(image, torch.Tensor):
        yield f"the image is {type(image).__name__}, expected a tensor"
    if image.shape != (3, *hw) or image.dtype != torch.uint8:
        yield f"the image is {image.dtype} of {tuple(image.shape)}, expected uint8 of {(3, *hw)}"
    if not isinstance(target, dict):
        yield f"the target is {type(target).__name__}, expected a dictionary"
    entries: dict[str, Any] = {name: target.get(name) for name in ("boxes", "labels", "status")}
    for name, entry in entries.items():
        if not isinstance(entry, torch.Tensor):
            yield f"{name} is {type(entry).__name__}, expected a tensor"
    boxes, labels, status = entries.values()
    box_format = boxes.format.value if isinstance(boxes, tv_tensors.BoundingBoxes) else "XYXY"
    if box_format != "XYXY":
        yield f"boxes are {box_format}, expected XYXY"
    if boxes.shape != (len(labels), 4) or labels.shape != status.shape or labels.dim() != 1:
        shapes = ", ".join(f"{name} of {tuple(entry.shape)}" for name, entry in entries.items())
        yield f"there are {shapes}, expected (n, 4), (n,) and (n,)"
    if labels.is_floating_point() or status.is_floating_point():
        yield "labels or status are not integers"
    if not torch.isfinite(boxes).all():
        yield "a box is not finite"
    if masks is not None:
        yield from _find_mask_problems(target, masks, num_boxes=len(boxes))


def _find_mask_problems(target: dict[str, Any], masks: MaskArrays, *, num_boxes: int) -> Iterator[str]:
    entries: dict[str, Any] = {name: target.get(name) for name in ("mask_index", "mask_points")}
    index, points = entries.values()
    if not isinstance(index, torch.Tensor) or index.shape != (num_boxes,):
        shown = f"of {tuple(index.shape)}" if isinstance(index, torch.Tensor) else type(index).__name__
        yield f"mask_index is {shown}, expected {(num_boxes,)}: it is dropped with its box, like labels"
    if not isinstance(points, torch.Tensor) or points.shape != masks.points.shape:
        shown = f"of {tuple(points.shape)}" if isinstance(points, torch.Tensor) else type(points).__name__
        yield f"mask_points is {shown}, expected {masks.points.shape}: points are moved, never dropped"
    if not torch.isfinite(points).all():
        yield "a point of a mask is not finite"
    moved = masks.with_points(points.float().numpy()).select(index.numpy()).bounds()
    boxes = target["boxes"].numpy()
    is_apart = ((moved[:, 2:] < boxes[:, :2] - 1) | (moved[:, :2] > boxes[:, 2:] + 1)).any(axis=1)
    if is_apart.any():
        row = int(np.flatnonzero(is_apart)[0])
        yield (
            f"the mask of box {row} spans {moved[row].round(1).tolist()}, outside the box "
            f"{boxes[row].round(1).tolist()}: mask_points are moved with the boxes"
        )


def collate(samples: Sequence[ChipSample]) -> Batch:
    """Stack chips of one size to a batch of torch tensors."""
    pixels = np.empty((len(samples), *samples[0].pixels.shape), dtype=np.uint8)  # (b, h, w, 3)
    for copy, sample in zip(pixels, samples, strict=True):
        copy_pixels(sample, to=copy)
    return Batch.of(samples, torch.from_numpy(pixels).permute(0, 3, 1, 2))


def copy_pixels(sample: ChipSample, *, to: UInt8[np.ndarray, "h w 3"]) -> None:
    """Copy the pixels of a chip to its place in a batch.

    Raises:
        ValueError: if the chip is of another size.
    """
    if sample.pixels.shape != to.shape:
        raise ValueError(f"chips of {to.shape} and {sample.pixels.shape} cannot share a batch")
    if sample.pixels.strides[1] < 0:  # mirrored: NumPy would copy it pixel by pixel
        cv2.flip(sample.pixels[:, ::-1], 1, dst=to)
    else:
        to[:] = sample.pixels
