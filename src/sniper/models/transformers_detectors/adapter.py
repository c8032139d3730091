"""A detector of transformers: chips at their scale, normalised as by its image processor, and its detections."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import nn
from torchvision.ops import box_convert, clip_boxes_to_image

from sniper.chips import ChipTargets
from sniper.geometry import Detections
from sniper.geometry.boxes import Sides
from sniper.models.chip_boxes import ChipBoxes
from sniper.models.protocol import (
    GRID,
    BatchLike,
    ClassLayout,
    DetectorModel,
    count_chips,
    pad_images,
    to_detections,
)
from sniper.models.spec import DetectorSpec
from sniper.models.transformers_detectors.config import build_config
from sniper.models.transformers_detectors.families import find_family
from sniper.models.transformers_detectors.hub import import_transformers, quiet
from sniper.models.transformers_detectors.losses import CHIPS, ChipLoss, to_labels

_STRIDES = (8, 16, 32)  # of maps from whose places queries are chosen, if the configuration names none


class TransformersModel(DetectorModel):
    """A detector of transformers.

    Args:
        spec: the configuration, resolved.
        net: transformers' detector.
        num_classes: without background.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, spec: DetectorSpec, net: Any, *, num_classes: int) -> None:
        super().__init__(spec, num_classes=num_classes)
        self.net = net
        self.family = find_family(net.config.model_type, name=spec.name)
        self.min_side = _min_side(net.config)
        net.loss_function = ChipLoss(net.loss_function, self.family)
        for name in ("mean", "std"):
            values = torch.tensor(getattr(spec.transformers, f"image_{name}"), dtype=torch.float32)
            self.register_buffer(name, values.view(1, 3, 1, 1), persistent=False)
        self._second_names = _find_second_names(self)
        self.register_state_dict_post_hook(_drop_second_names)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_add_second_names)  # type: ignore[no-untyped-call]

    @property
    def trunk(self) -> nn.Module:
        """The backbone; of YOLOS the whole transformer."""
        base = self.net.base_model
        trunk: nn.Module = getattr(base, "backbone", base)
        return trunk

    @property
    def class_layouts(self) -> Mapping[str, ClassLayout]:
        """The tensors that have another shape with another number of classes."""
        with torch.device("meta"):
            other = TransformersModel(
                self.spec, build_net(self.spec, self.num_classes + 1), num_classes=self.num_classes + 1
            ).state_dict()
        return {
            name: ClassLayout(background="last" if len(tensor) == self.num_classes + 1 else None)
            for name, tensor in self.state_dict().items()
            if tensor.shape != other[name].shape
        }

    def losses_and_counts(
        self, batch: BatchLike
    ) -> tuple[dict[str, Float[torch.Tensor, ""]], dict[str, Float[torch.Tensor, ""]]]:
        """Compute the losses of a batch of chips, and the counts of `count_chips`.

        Returns:
            `head_class` and `head_box`, to be added up; and the counts.
        """
        targets = batch.targets
        padded, image_sides = pad_images(list(batch.images), min_side=self.min_side)
        labels = self._labels(targets, self._frames(padded, image_sides))
        device = padded.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            # Noisy objects and dropout are drawn for all chips at once.
            torch.manual_seed(int(np.random.SeedSequence(targets.seeds).generate_state(1)[0]))
            outputs = self.net(**self._inputs(padded, image_sides), labels=labels)
        losses = dict(outputs.loss_dict)
        counts = count_chips(targets, losses.pop(CHIPS))
        losses["head_box"] = losses["head_box"] + self._touch_parameters()
        return losses, counts

    @torch.no_grad()
    def detect(self, images: Sequence[UInt8[torch.Tensor, "3 _ _"]]) -> list[Detections]:
        """Detect objects; see `DetectorModel.detect`. There is no non-maximum suppression."""
        padded, image_sides = pad_images(images, min_side=self.min_side)
        outputs = self.net(**self._inputs(padded, image_sides))
        frames = self._frames(padded, image_sides)
        return [
            self._select(logits.float(), boxes.float(), frame=frame, sides=sides)
            for logits, boxes, frame, sides in zip(
                outputs.logits, outputs.pred_boxes, frames, image_sides, strict=True
            )
        ]

    def _inputs(
        self, padded: UInt8[torch.Tensor, "b 3 h w"], image_sides: Sequence[Sides]
    ) -> dict[str, torch.Tensor]:
        """Return normalised images, whose padding is zeros, and where they have pixels."""
        mask = torch.zeros((len(padded), *padded.shape[2:]), dtype=torch.int64, device=padded.device)
        for index, sides in enumerate(image_sides):
            mask[index, : sides.height, : sides.width] = 1
        return self.inputs(padded, mask)

    def inputs(
        self, padded: UInt8[torch.Tensor, "b 3 h w"], mask: Int[torch.Tensor, "b h w"]
    ) -> dict[str, torch.Tensor]:
        """Return what transformers' detector takes.

        Args:
            padded: RGB values.
            mask: 1 where an image has pixels, 0 in its padding.
        """
        pixels = (padded.float() / 255 - self.mean) / self.std * mask[:, None]
        inputs = {"pixel_values": pixels.contiguous(memory_format=torch.channels_last)}
        return inputs | ({"pixel_mask": mask} if self.family.has_mask else {})

    def _frames(
        self, padded: UInt8[torch.Tensor, "b 3 h w"], image_sides: Sequence[Sides]
    ) -> list[Float[torch.Tensor, " 4"]]:
        """Return for each image the sides that its boxes are relative to: width, height, width, height."""
        height, width = padded.shape[2:]
        whole = Sides(width=width, height=height)
        frames = image_sides if self.family.has_mask else [whole] * len(image_sides)
        return [
            torch.tensor([sides.width, sides.height] * 2, dtype=torch.float32, device=padded.device)
            for sides in frames
        ]

    def _labels(
        self, targets: ChipTargets[torch.Tensor], frames: Sequence[Float[torch.Tensor, " 4"]]
    ) -> list[dict[str, Any]]:
        """Return the boxes of chips as the loss takes them."""
        labels = []
        for index, frame in enumerate(frames):
            boxes = ChipBoxes.of(targets, index, self.spec.labels)
            relative = replace(boxes, objects=boxes.objects / frame, others=boxes.others / frame)
            labels.append(to_labels(relative))
        return labels

    def _select(
        self,
        logits: Float[torch.Tensor, "q c"],
        boxes: Float[torch.Tensor, "q 4"],
        *,
        frame: Float[torch.Tensor, " 4"],
        sides: Sides,
    ) -> Detections:
        """Return the best detections of an image, clipped to it."""
        best, scores, labels = self.best(logits, boxes)
        clipped = clip_boxes_to_image(box_convert(best, "cxcywh", "xyxy") * frame, sides.hw)
        is_kept = (clipped[:, 2:] > clipped[:, :2]).all(dim=1)
        is_kept &= scores >= self.spec.transformers.score_threshold
        return to_detections(clipped[is_kept], scores[is_kept], labels[is_kept])

    def best(
        self, logits: Float[torch.Tensor, "q c"], boxes: Float[torch.Tensor, "q 4"]
    ) -> tuple[Float[torch.Tensor, "n 4"], Float[torch.Tensor, " n"], Int[torch.Tensor, " n"]]:
        """Return boxes, scores and labels of the best queries of an image, or of the best classes of queries."""
        limit = self.spec.transformers.detections_per_window
        if self.family.is_softmax:
            all_scores, all_labels = logits.softmax(-1)[:, :-1].max(-1)  # one class of each query
            scores, queries = all_scores.topk(min(limit, len(all_scores)))
            return boxes[queries], scores, all_labels[queries]
        all_scores = logits.sigmoid().flatten()
        scores, indices = all_scores.topk(min(limit, len(all_scores)))
        return boxes[indices // logits.shape[1]], scores, indices % logits.shape[1]

    def _touch_parameters(self) -> Float[torch.Tensor, ""]:
        """Return 0, to which all parameters contribute: those of noisy objects are not used without objects."""
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.stack([parameter.sum() for parameter in parameters]).sum() * 0.0


def build_net(spec: DetectorSpec, num_classes: int) -> Any:
    """Build transformers' detector of a resolved spec, with random weights."""
    config = build_config(spec, num_classes=num_classes)
    with quiet():
        return import_transformers().AutoModelForObjectDetection.from_config(config)


def _min_side(config: Any) -> int:
    """Return the smallest side of images whose maps have as many places as queries are chosen from, pixels."""
    num_queries = 0
    if hasattr(config, "feat_strides"):
        num_queries = config.num_queries
    elif getattr(config, "two_stage", False):
        num_queries = config.two_stage_num_proposals
    strides = getattr(config, "feat_strides", _STRIDES)
    side = GRID
    while sum(math.ceil(side / stride) ** 2 for stride in strides) < num_queries:
        side += GRID
    return side


def _find_second_names(model: nn.Module) -> dict[str, str]:
    """Return the names of tensors that have another name, with the first name of each."""
    first_names: dict[int, str] = {}
    second_names = {}
    named = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    for name, tensor in named:
        first = first_names.setdefault(id(tensor), name)
        if first != name:
            second_names[name] = first
    return second_names


def _drop_second_names(
    model: TransformersModel, state: dict[str, Any], prefix: str, _metadata: object
) -> None:
    """Keep each tensor once in the state: a checkpoint has it once, and an average is updated once."""
    for name in model._second_names:
        state.pop(f"{prefix}{name}", None)


def _add_second_names(
    model: TransformersModel, state: dict[str, Any], prefix: str, *_arguments: object
) -> None:
    """Undo `_drop_second_names` before a state is loaded."""
    for name, first in model._second_names.items():
        if f"{prefix}{first}" in state:
            state[f"{prefix}{name}"] = state[f"{prefix}{first}"]
