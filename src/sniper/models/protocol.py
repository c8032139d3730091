"""The protocol of detectors: what the training loop, the search and checkpoints need of a model.

Chips and search know nothing else of a detector. An adapter for the detectors of a library is a subclass of
`DetectorModel`, or of `ProposingModel` if it has a region proposal network:

1. Its constructor takes the configuration and the number of classes, and builds the layers of that configuration, the
   same whether weights are loaded or not, since a run is resumed without them. Layers that are not trained have
   `requires_grad_(False)`; every other parameter must take part in the losses of every batch, as
   DistributedDataParallel requires. `train` leaves frozen layers in evaluation mode.
2. `losses_and_counts` reads `batch.images`, uint8 RGB values, which it normalises itself, and `batch.targets`. A box
   has a status (`BoxStatus`): what is on a box that is not valid must not become background. Random draws for a chip
   depend on `targets.seeds` alone, never on a global generator: this makes a resumed run equal an uninterrupted one.
   `is_taught` selects the objects that a one-stage detector learns; `count_chips` returns the counts that it reports.
3. `detect` takes images of any sides, pads them with `pad_images`, never rescales them, and returns the detections of
   each in its own frame with labels from 0 (`to_detections`).
4. `trunk` is the module that `train.compile` compiles, and `for_inference` returns a faster copy.
5. `class_layouts` names the tensors with rows for classes, so that weights of other classes can be loaded.
6. The kind is added to `DetectorSpec.kind`, with a section of its own fields, and to `build_detector`.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, Self, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import nn

from sniper.chips import BoxStatus, ChipTargets
from sniper.geometry import Detections, SelectDetections
from sniper.geometry.boxes import Sides
from sniper.geometry.focus_cells import FocusCells
from sniper.models.spec import DetectorSpec

GRID = 64  # pixels; a multiple of all strides


@runtime_checkable
class BatchLike(Protocol):
    """A batch of chips, as a detector reads it."""

    @property
    def images(self) -> UInt8[torch.Tensor, "b 3 h w"]:
        """(B, 3, H, W) RGB values."""

    @property
    def targets(self) -> ChipTargets[torch.Tensor]:
        """The ground truth of the B chips."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Proposals:
    """The proposals of one image.

    Attributes:
        boxes: (n, 4) xyxy, image frame. May be empty.
        scores: (n,) objectness from 0 to 1, descending.
    """

    boxes: Float[torch.Tensor, "n 4"]
    scores: Float[torch.Tensor, " n"]


@dataclass(frozen=True, kw_only=True)
class ClassLayout:
    """How the rows of a tensor belong to classes: groups of anchors, of classes, of rows.

    Attributes:
        num_groups: number of groups with all classes each, such as the anchors of a place.
        rows_per_class: number of neighbouring rows of a class, such as the four deltas of its box.
        background: where the background is among the classes; None if it has no rows.
    """

    num_groups: int = 1
    rows_per_class: int = 1
    background: Literal["first", "last"] | None = None

    def rows(
        self, labels: Sequence[int | None], *, num_classes: int, skips_background: bool = False
    ) -> list[int | None]:
        """Return the rows of another detector of this layout that the rows of this one are loaded from.

        Args:
            labels: for each class of this detector, its label in the other; None if the other has no such class.
            num_classes: number of classes of the other detector.
            skips_background: whether the background is not loaded either.

        Returns:
            For each row of this detector a row of the other, or None.

        Example:
            >>> ClassLayout(background="last").rows([None, 0], num_classes=2)
            [None, 0, 2]
            >>> ClassLayout(num_groups=2).rows([1], num_classes=3)
            [1, 4]
        """
        first = int(self.background == "first")
        slots = [None if label is None else label + first for label in labels]
        background = None if skips_background else 0 if first else num_classes
        if self.background is not None:
            slots.insert(0 if first else len(slots), background)
        num_slots = num_classes + int(self.background is not None)
        return [
            None if slot is None else (group * num_slots + slot) * self.rows_per_class + row
            for group in range(self.num_groups)
            for slot in slots
            for row in range(self.rows_per_class)
        ]


class DetectorModel(nn.Module, ABC):
    """A detector that is trained on chips and searches images.

    Args:
        spec: the configuration.
        num_classes: without background.
    """

    def __init__(self, spec: DetectorSpec, *, num_classes: int) -> None:
        super().__init__()
        self.spec = spec
        self.num_classes = num_classes

    @property
    @abstractmethod
    def trunk(self) -> nn.Module:
        """The backbone's convolutions, which `train.compile` compiles."""

    @property
    def second_stage(self) -> tuple[nn.Module, ...]:
        """The submodules that the training of the RPN alone leaves out; none if there is no RPN."""
        return ()

    @property
    @abstractmethod
    def class_layouts(self) -> Mapping[str, ClassLayout]:
        """The tensors with rows for classes, by name."""

    @abstractmethod
    def losses_and_counts(
        self, batch: BatchLike
    ) -> tuple[dict[str, Float[torch.Tensor, ""]], dict[str, Float[torch.Tensor, ""]]]:
        """Compute the losses of a batch of chips, and counts that are no losses.

        Args:
            batch: on the detector's device.

        Returns:
            Losses by name, to be added up; those that begin with `rpn_`, `head_`, `mask` or `focus` have a curve on the
            page of the run. And counts, any of these: `positives`, the positive proposals of a second
            stage; `correct`, those of them whose most probable class is right; and those of `count_chips`, without
            which `negatives.dose: auto` keeps its first value.
        """

    @abstractmethod
    def detect(self, images: Sequence[UInt8[torch.Tensor, "3 _ _"]]) -> list[Detections]:
        """Detect objects.

        Args:
            images: (3, H, W) RGB values each, on the detector's device; sides may differ.

        Returns:
            The detections of each image, in its own frame. They do not depend on the other images, if these are padded
            to the same sides.
        """

    def detect_masks(
        self, images: Sequence[UInt8[torch.Tensor, "3 _ _"]], select: SelectDetections
    ) -> list[Detections]:
        """Detect objects as `detect` does, and predict the masks of those that are selected.

        Args:
            images: as for `detect`.
            select: returns the detections of an image to keep, of all its detections.

        Returns:
            The detections that are kept, with masks.

        Raises:
            ValueError: if the detector predicts no masks.
        """
        raise ValueError("this detector predicts no masks")

    def detect_focused(
        self, images: Sequence[UInt8[torch.Tensor, "3 _ _"]], select: SelectDetections | None
    ) -> tuple[list[Detections], list[FocusCells]]:
        """Detect objects, and predict where objects are that are left to finer levels.

        Args:
            images: as for `detect`.
            select: as for `detect_masks`; None detects boxes alone, as `detect` does.

        Returns:
            The detections of each image, and its cells.

        Raises:
            ValueError: if the detector has no focus head.
        """
        raise ValueError("this detector has no focus head")

    def losses(self, batch: BatchLike) -> dict[str, Float[torch.Tensor, ""]]:
        """Compute the losses of a batch of chips; see `losses_and_counts`."""
        return self.losses_and_counts(batch)[0]

    def for_inference(self) -> Self:
        """Return a copy for inference, in channels-last layout.

        The detector must be in evaluation mode; it is not changed.
        """
        return copy.deepcopy(self).to(memory_format=torch.channels_last)


class ProposingModel(DetectorModel):
    """A detector with a region proposal network, which can be trained alone and mines negative chips."""

    @property
    @abstractmethod
    def second_stage(self) -> tuple[nn.Module, ...]:
        """The submodules that the training of the RPN alone leaves out."""

    @abstractmethod
    def rpn_losses(self, batch: BatchLike) -> dict[str, Float[torch.Tensor, ""]]:
        """Compute the losses of the RPN alone, without running the second stage. See `losses`."""

    @abstractmethod
    def propose(self, images: Sequence[UInt8[torch.Tensor, "3 _ _"]]) -> list[Proposals]:
        """Return the class-less proposals of each image, in its own frame."""


def pad_images(
    images: Sequence[UInt8[torch.Tensor, "3 _ _"]], *, multiple: int = GRID, min_side: int = 0
) -> tuple[UInt8[torch.Tensor, "b 3 h w"], list[Sides]]:
    """Pad images with black, right and below, to one size.

    The search puts images into one batch that have the same sides in multiples of `GRID`. They are padded to the same
    size alone, so their features are the same.

    Args:
        images: (3, H, W) RGB values each, on one device; sides may differ.
        multiple: of which the sides are, pixels; itself a multiple of `GRID`.
        min_side: the sides are at least this, pixels.

    Returns:
        The padded images, and the sides of each image before padding.
    """
    image_sides = [Sides(width=image.shape[2], height=image.shape[1]) for image in images]
    height = -(-max(min_side, *(sides.height for sides in image_sides)) // multiple) * multiple
    width = -(-max(min_side, *(sides.width for sides in image_sides)) // multiple) * multiple
    padded = torch.zeros((len(images), 3, height, width), dtype=torch.uint8, device=images[0].device)
    for i, image in enumerate(images):
        padded[i, :, : image.shape[1], : image.shape[2]] = image
    return padded, image_sides


def to_detections(
    boxes: Float[torch.Tensor, "n 4"], scores: Float[torch.Tensor, " n"], labels: Int[torch.Tensor, " n"]
) -> Detections:
    """Return detections in CPU memory."""
    return Detections(
        boxes=boxes.double().cpu().numpy(),
        scores=scores.double().cpu().numpy(),
        labels=labels.cpu().numpy(),
    )


def is_taught(status: Int[torch.Tensor, "*m"], labels: Literal["valid", "all"]) -> Bool[torch.Tensor, "*m"]:
    """Check which boxes of a chip a detector learns as objects.

    Args:
        status: values of `BoxStatus`.
        labels: `valid` for the boxes in the valid range of the level, `all` for the others too, without ignored ones.
    """
    is_object = status == BoxStatus.VALID
    return is_object | (status == BoxStatus.OUT_OF_RANGE) if labels == "all" else is_object


def count_chips(
    targets: ChipTargets[torch.Tensor], class_losses: Float[torch.Tensor, " b"]
) -> dict[str, Float[torch.Tensor, ""]]:
    """Return the counts by which the dose of negative chips is chosen.

    Args:
        targets: the ground truth of the B chips.
        class_losses: (B,) the classification losses of each chip, without gradient.

    Returns:
        `negative_chips`, the chips without a valid box; and the sums of the losses over these chips, `negative_loss`,
        and over the others, `positive_loss`.
    """
    is_negative = ~(targets.status == BoxStatus.VALID).any(dim=1)
    return {
        "negative_chips": is_negative.float().sum(),
        "negative_loss": (class_losses * is_negative).sum(),
        "positive_loss": (class_losses * ~is_negative).sum(),
    }
