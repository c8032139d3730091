"""The mask head: predicts the mask of each object inside its box (He et al. 2017).

It is trained on positive proposals with a mask, whether their object is valid or not, as the classes of the second
stage are. A proposal learns the part of the mask that lies inside it.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import nn
from torch.nn import functional
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor

from sniper.chips import ChipTargets
from sniper.geometry import Detections
from sniper.geometry.boxes import Sides
from sniper.geometry.detection_masks import DetectionMasks
from sniper.geometry.masks import rasterize_rings
from sniper.models.mask_targets import rasterize_on_device
from sniper.models.matching import Match, sample_anchors
from sniper.models.roi_head import Positives, build_pool
from sniper.models.spec import MaskHeadSpec

LogitsOf = Callable[[torch.Tensor], torch.Tensor]
"""Predicts the logits of (n, 4) boxes."""

_MAX_ROIS = 256  # whose masks are computed at once in inference, which bounds memory


class MaskHead(nn.Module):
    """Convolutions over the pooled features of each box, a deconvolution, and a logit for each cell.

    Args:
        spec: the configuration.
        num_channels: channels of each feature map.
        strides: strides of the feature maps, finest first; see `RoIHead`.
        num_classes: without background.
    """

    def __init__(
        self, spec: MaskHeadSpec, *, num_channels: int, strides: Sequence[int], num_classes: int
    ) -> None:
        super().__init__()
        self.spec = spec
        self.pool, num_pooled = build_pool(
            spec.channels, pool_size=spec.pool_size, num_channels=num_channels, strides=strides
        )
        self.convs = MaskRCNNHeads(num_pooled, [spec.channels] * spec.num_convs, dilation=1)
        self.predictor = MaskRCNNPredictor(
            spec.channels, spec.channels, 1 if spec.class_agnostic else num_classes
        )

    @property
    def side(self) -> int:
        """Side of a mask, cells."""
        return 2 * self.spec.pool_size

    def forward(
        self, maps: Sequence[Float[torch.Tensor, "b c _ _"]], boxes: Sequence[torch.Tensor]
    ) -> Float[torch.Tensor, "r k s s"]:
        """Predict the masks in the boxes of all images.

        Args:
            maps: feature maps, (B, C, y, x) each.
            boxes: for each of the B images (n, 4) xyxy, image frame; r in total.

        Returns:
            (r, k, s, s) logits of the cells of each box, for each class, or for one if the head is class-agnostic.
        """
        pooled = self.pool(maps, list(boxes))
        logits: torch.Tensor = self.predictor(self.convs(pooled))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))  # half precision by autocast

    def losses(
        self,
        maps: Sequence[Float[torch.Tensor, "b c _ _"]],
        positives: Positives,
        targets: ChipTargets[torch.Tensor],
    ) -> dict[str, Float[torch.Tensor, ""]]:
        """Compute the loss of the masks of positive proposals. On a GPU this forces a sync.

        Args:
            maps: feature maps, (B, C, y, x) each.
            positives: the proposals of the B chips, and which of them are positive.
            targets: the ground truth of the chips, with masks.

        Returns:
            `mask`, the mean binary cross entropy of the cells of up to `batch_size_per_image` positive proposals of a
            chip whose object has a mask, times `loss_weight`, averaged over chips. A chip without any adds nothing.

        Raises:
            ValueError: if the targets have no masks.
        """
        rows = choose_masked(positives, targets, count=self.spec.batch_size_per_image)
        chips, boxes = positives.chips[rows], positives.proposals[rows]
        logits = self(maps, [boxes[chips == chip] for chip in range(len(targets))])  # (r, k, s, s)
        masks = rasterize_targets(targets, boxes, chips, positives.box_index[rows], side=self.side)
        counts = torch.bincount(chips, minlength=len(targets))
        weights = 1 / counts[chips] / len(targets)  # (r,)
        if self.spec.class_agnostic:
            of_class = logits[:, 0]
        else:
            labels = targets.labels[chips, positives.box_index[rows]]
            of_class = logits[torch.arange(len(rows), device=rows.device), labels]
        of_cells = functional.binary_cross_entropy_with_logits(
            of_class, masks.to(of_class.dtype), reduction="none"
        )
        loss = (of_cells.mean(dim=(1, 2)) * weights).sum()
        # All layers take part in the losses of a batch without positives, too.
        return {"mask": loss * self.spec.loss_weight + logits.sum() * 0}

    def predict(
        self, maps: Sequence[Float[torch.Tensor, "b c _ _"]], detections: Sequence[Detections]
    ) -> list[Detections]:
        """Predict the masks of detections.

        Args:
            maps: feature maps, (B, C, y, x) each.
            detections: of the B images, each in its own frame.

        Returns:
            The detections with masks.
        """
        return [
            predict_masks(
                each,
                lambda boxes, image=image: self(  # type: ignore[misc]
                    [of_map[image : image + 1] for of_map in maps], [boxes]
                ),
                side=self.side,
                device=maps[0].device,
            )
            for image, each in enumerate(detections)
        ]


def choose_masked(
    positives: Positives, targets: ChipTargets[torch.Tensor], *, count: int
) -> Int[torch.Tensor, " r"]:
    """Return the positive proposals whose object has a mask, at most some of each chip, drawn by its seed.

    Args:
        positives: the proposals of the chips.
        targets: the ground truth of the chips, with masks.
        count: proposals of each chip, at most.

    Returns:
        (r,) their rows, ordered by chip.

    Raises:
        ValueError: if the targets have no masks.
    """
    if targets.masks is None:
        raise ValueError("a mask head needs targets with masks, and these have none")
    rings = targets.masks.rings[positives.chips, positives.box_index]
    is_masked = positives.is_positive & (rings[:, 1] > rings[:, 0])
    rows = []
    for chip, seed in enumerate(targets.seeds):
        (of_chip,) = torch.where(positives.chips == chip)
        state = torch.where(is_masked[of_chip], Match.POSITIVE, Match.IGNORED)
        (is_sampled,) = sample_anchors(state[None], count=count, positive_fraction=1.0, seeds=(seed,))
        rows.append(of_chip[is_sampled])
    return torch.cat(rows)


def rasterize_targets(
    targets: ChipTargets[torch.Tensor],
    boxes: Float[torch.Tensor, "r 4"],
    chips: Int[torch.Tensor, " r"],
    box_index: Int[torch.Tensor, " r"],
    *,
    side: int,
) -> Float[torch.Tensor, "r s s"]:
    """Rasterise the masks of objects to the cells of other boxes; 1 where the centre of a cell is in the mask.

    On a GPU this is done there, to the same bits. On a CPU the kernel of single polygons is faster.

    Args:
        targets: the ground truth of the chips, with masks.
        boxes: (r, 4) xyxy, chip frame, with an area.
        chips: (r,) the chip of each box.
        box_index: (r,) the object of each box in its chip.
        side: of a mask, cells.
    """
    assert targets.masks is not None
    if boxes.device.type == "cuda":
        masks = targets.masks
        on_device = rasterize_on_device(
            masks.points, masks.ring_offsets, masks.rings[chips, box_index], boxes.detach(), side=side
        )
        return on_device.float()
    rasters = rasterize_rings(
        targets.masks.points.cpu().numpy(),
        targets.masks.ring_offsets.cpu().numpy(),
        targets.masks.rings[chips, box_index].cpu().numpy(),
        boxes.detach().double().cpu().numpy(),
        sides=Sides(side, side),
    )
    return torch.from_numpy(rasters).to(boxes.device, dtype=torch.float32)


def predict_masks(
    detections: Detections, logits_of: LogitsOf, *, side: int, device: torch.device
) -> Detections:
    """Predict the masks of the detections of one image.

    Detections of several classes with the same box, as of a class-agnostic regressor, share the computation.

    Args:
        detections: in the frame of the image.
        logits_of: returns (n, k, s, s) logits of n boxes, for each class or for one.
        side: of a mask, cells.
        device: of the detector.
    """
    unique, inverse = np.unique(detections.boxes, axis=0, return_inverse=True)
    grids = np.zeros((len(detections), side, side), dtype=np.uint8)
    rows_of = np.argsort(inverse, kind="stable")
    starts = np.searchsorted(inverse[rows_of], np.arange(0, len(unique) + _MAX_ROIS, _MAX_ROIS))
    for part, first in enumerate(range(0, len(unique), _MAX_ROIS)):
        rows = rows_of[starts[part] : starts[part + 1]]
        boxes = torch.from_numpy(unique[first : first + _MAX_ROIS]).float().to(device)
        logits = logits_of(boxes)
        classes = torch.from_numpy(detections.labels[rows]).to(device)
        of_boxes = torch.from_numpy(inverse[rows] - first).to(device)
        chosen = logits[of_boxes, classes if logits.shape[1] > 1 else classes * 0]
        grids[rows] = (chosen.float().sigmoid() * 255).round().to(torch.uint8).cpu().numpy()
    return detections.with_masks(DetectionMasks.of(grids, detections.boxes))
