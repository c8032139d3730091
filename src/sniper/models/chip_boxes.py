"""The boxes of one chip as the losses of libraries take them, and what is neither object nor background."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torchvision.ops import box_iou

from sniper.chips import BoxStatus, ChipTargets
from sniper.models.matching import is_half_in_ignored
from sniper.models.protocol import is_taught

_IGNORED_IOU = 0.3  # SNIPER §3.4


@dataclass(frozen=True, kw_only=True, eq=False)
class ChipBoxes:
    """The boxes of one chip.

    Attributes:
        objects: (n, 4) xyxy, chip frame: the boxes to learn. May be empty.
        labels: (n,) of the objects.
        others: (m, 4) xyxy, chip frame: boxes that are neither objects to learn nor background. May be empty.
        other_labels: (m,) of the others.
        other_status: (m,) values of `BoxStatus`.
    """

    objects: Float[torch.Tensor, "n 4"]
    labels: Int[torch.Tensor, " n"]
    others: Float[torch.Tensor, "m 4"]
    other_labels: Int[torch.Tensor, " m"]
    other_status: Int[torch.Tensor, " m"]

    @classmethod
    def of(
        cls, targets: ChipTargets[torch.Tensor], index: int, labels: Literal["valid", "all"]
    ) -> "ChipBoxes":
        """Select the boxes of a chip of a batch; see `is_taught`."""
        count = targets.num_boxes[index]
        boxes, status = targets.boxes[index, :count], targets.status[index, :count]
        classes = targets.labels[index, :count]
        is_object = is_taught(status, labels)
        return cls(
            objects=boxes[is_object],
            labels=classes[is_object],
            others=boxes[~is_object],
            other_labels=classes[~is_object],
            other_status=status[~is_object],
        )

    def target(self, *, first_label: int) -> dict[str, torch.Tensor]:
        """Return the objects as torchvision's detectors take them."""
        return {"boxes": self.objects, "labels": self.labels + first_label}

    def is_on_other(self, anchors: Float[torch.Tensor, "n 4"]) -> Bool[torch.Tensor, " n"]:
        """Check which anchors have an IoU above 0.3 with a box that is no object to learn (SNIPER §3.4)."""
        return self.other_iou(anchors) > _IGNORED_IOU

    def other_iou(self, anchors: Float[torch.Tensor, "n 4"]) -> Float[torch.Tensor, " n"]:
        """Return the highest IoU of each anchor with a box that is no object to learn; 0 without such boxes."""
        if not len(self.others):
            return anchors.new_zeros(len(anchors))
        return box_iou(anchors, self.others).amax(dim=1)

    def is_in_ignored(self, anchors: Float[torch.Tensor, "n 4"]) -> Bool[torch.Tensor, " n"]:
        """Check which anchors lie at least half inside a box of status `IGNORE`."""
        if not len(self.others):
            return torch.zeros(len(anchors), dtype=torch.bool, device=anchors.device)
        return is_half_in_ignored(anchors[None], self.others[None], self.other_status[None])[0]

    @property
    def out_of_range(self) -> Bool[torch.Tensor, " m"]:
        """Which of the others are objects."""
        return self.other_status != BoxStatus.IGNORE
