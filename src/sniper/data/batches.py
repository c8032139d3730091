"""Chips read from disk, one by one and in batches, for torch's `DataLoader`."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8

from sniper.chips import BoxStatus, Chip, ChipTarget, assign_targets
from sniper.data.epoch import EpochOrder
from sniper.data.reader import ChipReader
from sniper.data.spec import ColorJitterSpec, DataSpec
from sniper.errors import ImageError, TransformError

ChipTransform = Callable[[Any, dict[str, Any]], tuple[Any, dict[str, Any]]]
"""Changes an image and its target, as torchvision's `transforms.v2` do."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ChipSample:
    """One chip, ready to be put into a batch.

    Attributes:
        pixels: (H, W, 3) grey levels, chip frame.
        target: what it teaches.
        valid_sizes: the valid range of its level in chip pixels: at least the first, below the second.
        seed: what is drawn when this chip is learnt from depends on this number alone.
        name: the image it was cut from, and where.
        skipped: chips that should have been here, but whose images cannot be read.
    """

    pixels: UInt8[np.ndarray, "h w 3"]
    target: ChipTarget
    valid_sizes: tuple[float, float]
    seed: int
    name: str
    skipped: int = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """A batch of chips. What belongs to a chip does not depend on which others share its batch.

    Attributes:
        images: (B, 3, H, W) uint8 grey levels.
        boxes: (B, M, 4) float32 xyxy, chip frame: the valid ones of each chip first, zeros after its last.
        labels: (B, M) int64, 0..C-1; 0 after the last.
        status: (B, M) int64 values of `BoxStatus`; `ABSENT` after the last.
        num_boxes: how many boxes each of the B chips has.
        num_valid: how many of them are valid.
        valid_sizes: (B, 2) float32, valid box sizes in chip pixels: at least the first, below the second.
        seeds: of the B chips, for what is drawn when they are learnt from.
        names: of the B images the chips were cut from, and where.
        skipped: for each, how many chips should have been in its place, but could not be read.
    """

    images: UInt8[torch.Tensor, "b 3 h w"]
    boxes: Float[torch.Tensor, "b m 4"]
    labels: Int[torch.Tensor, "b m"]
    status: Int[torch.Tensor, "b m"]
    num_boxes: tuple[int, ...]
    num_valid: tuple[int, ...]
    valid_sizes: Float[torch.Tensor, "b 2"]
    seeds: tuple[int, ...]
    names: tuple[str, ...]
    skipped: tuple[int, ...]

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
            skipped=self.skipped[start:stop],
        )

    @classmethod
    def join(cls, parts: Sequence["Batch"], places: Sequence[Sequence[int]], *, pin: bool = False) -> "Batch":
        """Put parts of a batch together.

        Args:
            parts: of chips of one size.
            places: for each part, the place of each of its chips in the whole.
            pin: into page-locked memory, from which copies to a GPU need no waiting.
        """
        count = sum(map(len, parts))
        height, width = parts[0].images.shape[2:]
        most = max(part.labels.shape[1] for part in parts)
        images = torch.empty((count, height, width, 3), dtype=torch.uint8, pin_memory=pin).permute(0, 3, 1, 2)
        boxes = torch.zeros((count, most, 4), pin_memory=pin)
        labels = torch.zeros((count, most), dtype=torch.int64, pin_memory=pin)
        status = torch.full((count, most), BoxStatus.PADDING, dtype=torch.int64, pin_memory=pin)
        valid_sizes = torch.zeros((count, 2), pin_memory=pin)
        for part, own in zip(parts, places, strict=True):
            num = part.labels.shape[1]
            for i, place in enumerate(own):
                images[place] = part.images[i]
                boxes[place, :num] = part.boxes[i]
                labels[place, :num] = part.labels[i]
                status[place, :num] = part.status[i]
                valid_sizes[place] = part.valid_sizes[i]
        order = np.argsort([place for own in places for place in own]).tolist()

        def joined(name: str) -> tuple[Any, ...]:
            values = [value for part in parts for value in getattr(part, name)]
            return tuple(values[i] for i in order)

        return cls(
            images=images,
            boxes=boxes,
            labels=labels,
            status=status,
            num_boxes=joined("num_boxes"),
            num_valid=joined("num_valid"),
            valid_sizes=valid_sizes,
            seeds=joined("seeds"),
            names=joined("names"),
            skipped=joined("skipped"),
        )

    def _changed(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        return replace(
            self,
            images=change(self.images),
            boxes=change(self.boxes),
            labels=change(self.labels),
            status=change(self.status),
            valid_sizes=change(self.valid_sizes),
        )

    def to_torchvision(self) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
        """Give the batch as torchvision's detectors take it.

        Those know no invalid and no ignored boxes: they get every object that the chip shows, and no crowd.

        Returns:
            B images (3, H, W) float32 from 0 to 1, and B targets with `boxes` and `labels`, the labels from 1 on.
        """
        images = list(self.images.float() / 255)
        targets = []
        for boxes, labels, status in zip(self.boxes, self.labels, self.status, strict=True):
            is_object = (status != BoxStatus.IGNORE) & (status != BoxStatus.PADDING)
            targets.append({"boxes": boxes[is_object], "labels": labels[is_object] + 1})
        return images, targets


class ChipDataset(torch.utils.data.Dataset[ChipSample]):
    """The chips of one epoch, for torch's `DataLoader`, with `collate` to make batches.

    Args:
        order: the chips of an epoch, and the data set that they are cut from.
        spec: how chips are read and changed; what it says of data sets and of the plan is not looked at.
        transform: changes each chip after that, such as one of torchvision's `transforms.v2`. It is given a
            `tv_tensors.Image` (3, H, W) uint8 and a dictionary of `boxes` (`tv_tensors.BoundingBoxes`, xyxy), `labels`
            and `status`, one for each box, and gives back both; boxes may vanish, with their labels and standings.
            torch's global generator is seeded for each chip.
        kept_images: how many images stay decoded for further chips of theirs.

    Raises:
        CacheError: if the folder of kept chips cannot be used.
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

    def __len__(self) -> int:
        return len(self._order.chip_indices)

    def __getitem__(self, index: int) -> ChipSample:
        """Read a chip; one whose image cannot be read is replaced by the next of its sides, if that was asked for."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        skipped = 0
        for place in self._of_same_sides(index):
            try:
                sample = self._read(place)
            except ImageError as error:
                if self._spec.on_bad_image == "refuse":
                    raise
                skipped, last = skipped + 1, error
                warnings.warn(f"{error}; skipped", stacklevel=2)
            else:
                return replace(sample, skipped=skipped)
        raise last

    def _of_same_sides(self, index: int) -> Iterator[int]:
        """Give a place in the plan, and after it the others, round about, that have chips of the same sides."""
        yield index
        first, _ = self._chip_at(index)
        for place in (*range(index + 1, len(self)), *range(index)):
            chip, _ = self._chip_at(place)
            if (chip.width, chip.height) == (first.width, first.height):
                yield place

    def _chip_at(self, index: int) -> tuple[Chip, int]:
        """Give the chip at a place in the plan, and its image's index."""
        chip_index = int(self._order.chip_indices[index])
        image_index = int(self._image_indices[chip_index])
        return self._order.table.chip(chip_index), image_index

    def _read(self, index: int) -> ChipSample:
        chip, image_index = self._chip_at(index)
        record = self._order.dataset[image_index]
        moved_to = self._order.table.moved_to[self._order.dataset.boxes_of(image_index)]
        target = assign_targets(
            chip,
            boxes=record.boxes,
            labels=record.labels,
            is_crowd=record.is_crowd,
            is_moved_here=moved_to == chip.level.index,
            is_negative=bool(self._order.table.is_negative[self._order.chip_indices[index]]),
            min_visible_side=self._spec.min_visible_side,
            min_visibility=self._order.min_visibility,
        )
        seed = int(self._order.seeds[index])
        sample = ChipSample(
            pixels=self._jittered(self._reader.read(record.path, chip), chip, seed=seed),
            target=target,
            valid_sizes=chip.level.valid_sizes,
            seed=seed,
            name=f"{record.file_name} ({chip.describe()})",
        )
        if self._order.is_flipped[index]:
            sample = flipped(sample)
        return sample if self._transform is None else transformed(sample, self._transform)

    def _jittered(
        self, pixels: UInt8[np.ndarray, "h w 3"], chip: Chip, *, seed: int
    ) -> UInt8[np.ndarray, "h w 3"]:
        """Change the colours of what a chip shows; what reaches beyond the image stays black."""
        if self._jitter is None:
            return pixels
        width, height = chip.visible
        changed = pixels.copy()
        with _drawing_from(seed):
            shown = self._jitter(torch.from_numpy(changed[:height, :width]).permute(2, 0, 1))
        changed[:height, :width] = shown.permute(1, 2, 0).numpy()
        return changed


def _build_jitter(color: ColorJitterSpec) -> Callable[[torch.Tensor], torch.Tensor] | None:
    if color == ColorJitterSpec():
        return None
    from torchvision.transforms import v2

    return v2.ColorJitter(color.brightness, color.contrast, color.saturation, color.hue)


@contextmanager
def _drawing_from(seed: int) -> Iterator[None]:
    """Let torch's global generator give what belongs to a chip, and go on after it as if nothing was."""
    with torch.random.fork_rng(devices=[]):
        # A number of its own: what the detector draws from the seed must not go with what is drawn here.
        torch.manual_seed(int(np.random.SeedSequence([seed, 1]).generate_state(1)[0]))
        yield


def flipped(sample: ChipSample) -> ChipSample:
    """Mirror a chip left to right, pixels and boxes."""
    width = sample.pixels.shape[1]
    boxes = sample.target.boxes
    mirrored = np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], axis=1)
    target = ChipTarget(boxes=mirrored, labels=sample.target.labels, status=sample.target.status)
    return replace(sample, pixels=sample.pixels[:, ::-1], target=target)


def transformed(sample: ChipSample, transform: ChipTransform) -> ChipSample:
    """Change a chip by a transform that knows torchvision's `tv_tensors`; what it draws depends on its seed alone.

    Raises:
        TransformError: if what comes back is no chip of the same size, or not one label and status for each box.
    """
    from torchvision import tv_tensors

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
    with _drawing_from(sample.seed):
        changed = transform(image, target)
    if not isinstance(changed, tuple) or len(changed) != 2:
        raise TransformError(
            f"{sample.name}: the transform gave {type(changed).__name__}, wanted image and target"
        )
    image, target = changed
    problem = next(_problems_of(image, target, (height, width)), None)
    if problem is not None:
        raise TransformError(f"{sample.name}: after the transform {problem}")
    boxes, labels, status = (target[name] for name in ("boxes", "labels", "status"))
    return replace(
        sample,
        pixels=image.permute(1, 2, 0).numpy(),
        target=ChipTarget(boxes=boxes.double().numpy(), labels=labels.numpy(), status=status.numpy()),
    )


def _problems_of(image: Any, target: Any, sides: tuple[int, int]) -> Iterator[str]:
    """Tell what is wrong with what a transform gave back; the first problem hides others."""
    from torchvision import tv_tensors

    if not isinstance(image, torch.Tensor):
        yield f"the image is {type(image).__name__}, wanted a tensor"
    if image.shape != (3, *sides) or image.dtype != torch.uint8:
        yield f"the image is {image.dtype} of {tuple(image.shape)}, wanted uint8 of {(3, *sides)}"
    if not isinstance(target, dict):
        yield f"the target is {type(target).__name__}, wanted a dictionary"
    parts: dict[str, Any] = {name: target.get(name) for name in ("boxes", "labels", "status")}
    for name, part in parts.items():
        if not isinstance(part, torch.Tensor):
            yield f"{name} is {type(part).__name__}, wanted a tensor"
    boxes, labels, status = parts.values()
    form = boxes.format.value if isinstance(boxes, tv_tensors.BoundingBoxes) else "XYXY"
    if form != "XYXY":
        yield f"boxes are {form}, wanted XYXY"
    if boxes.shape != (len(labels), 4) or labels.shape != status.shape or labels.dim() != 1:
        shapes = ", ".join(f"{name} of {tuple(part.shape)}" for name, part in parts.items())
        yield f"there are {shapes}, wanted (n, 4), (n,) and (n,)"
    if labels.is_floating_point() or status.is_floating_point():
        yield "labels or status are no whole numbers"
    if not torch.isfinite(boxes).all():
        yield "a box is not finite"


def collate(samples: Sequence[ChipSample]) -> Batch:
    """Put chips of one size together; here NumPy becomes torch."""
    pixels = np.stack([sample.pixels for sample in samples])  # (b, k, k, 3)
    most = max(1, *(len(sample.target.labels) for sample in samples))
    boxes = np.zeros((len(samples), most, 4), dtype=np.float32)
    labels = np.zeros((len(samples), most), dtype=np.int64)
    status = np.full((len(samples), most), BoxStatus.PADDING, dtype=np.int64)
    for i, sample in enumerate(samples):
        target = sample.target
        order = np.argsort(target.status != BoxStatus.VALID, kind="stable")  # valid boxes first
        boxes[i, : len(order)] = target.boxes[order]
        labels[i, : len(order)] = target.labels[order]
        status[i, : len(order)] = target.status[order]
    return Batch(
        images=torch.from_numpy(pixels).permute(0, 3, 1, 2),
        boxes=torch.from_numpy(boxes),
        labels=torch.from_numpy(labels),
        status=torch.from_numpy(status),
        num_boxes=tuple(len(sample.target.labels) for sample in samples),
        num_valid=tuple((status == BoxStatus.VALID).sum(axis=1).tolist()),
        valid_sizes=torch.tensor([sample.valid_sizes for sample in samples], dtype=torch.float32),
        seeds=tuple(sample.seed for sample in samples),
        names=tuple(sample.name for sample in samples),
        skipped=tuple(sample.skipped for sample in samples),
    )
