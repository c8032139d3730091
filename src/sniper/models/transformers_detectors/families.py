"""What differs between the architectures of transformers: matching, scores, masks, the order of their outputs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from sniper.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Family:
    """What adapter and losses need to know of an architecture.

    Attributes:
        matching: the cost of classes when queries are matched: `softmax` as in DETR, `focal` as in Deformable DETR,
            `rt_detr` as in RT-DETR, which takes its weights from other fields of the configuration.
        has_mask: whether a mask leaves out the padding of images. Boxes are then relative to an image without padding,
            else to the padded one.
        layer_axis: axis of the decoder's layers in the outputs that the loss gets.
        is_normalized: whether images are usually normalised with mean and standard deviation of ImageNet; else values
            are only divided by 255.
    """

    matching: Literal["softmax", "focal", "rt_detr"]
    has_mask: bool
    layer_axis: Literal[0, 1] = 0
    is_normalized: bool = True

    @property
    def is_softmax(self) -> bool:
        """Whether the last of the scores is that of no object; else each class has a sigmoid."""
        return self.matching == "softmax"

    def build_matcher(self, config: Any) -> Callable[[Any, Any], Any]:
        """Return the matcher that the losses of transformers use."""
        from transformers.loss import loss_deformable_detr, loss_for_object_detection, loss_rt_detr

        kind: Any
        matcher: Callable[[Any, Any], Any]
        if self.matching == "rt_detr":
            kind = loss_rt_detr.RTDetrHungarianMatcher
            matcher = kind(config)
            return matcher
        kind = (
            loss_for_object_detection.HungarianMatcher
            if self.is_softmax
            else loss_deformable_detr.DeformableDetrHungarianMatcher
        )
        matcher = kind(class_cost=config.class_cost, bbox_cost=config.bbox_cost, giou_cost=config.giou_cost)
        return matcher


_DETR = Family(matching="softmax", has_mask=True)
_FOCAL = Family(matching="focal", has_mask=True)
_RT_DETR = Family(matching="rt_detr", has_mask=False, layer_axis=1, is_normalized=False)

FAMILIES = {
    "conditional_detr": _FOCAL,
    "d_fine": _RT_DETR,
    "dab-detr": _FOCAL,
    "deformable_detr": _FOCAL,
    "detr": _DETR,
    "rt_detr": _RT_DETR,
    "rt_detr_v2": _RT_DETR,
    "table-transformer": _DETR,
    "yolos": Family(matching="softmax", has_mask=False),
}
"""By `model_type` of the configuration."""


def find_family(model_type: Any, *, name: str | None) -> Family:
    """Return the family of an architecture.

    Args:
        model_type: of its configuration.
        name: of the detector, for the error.

    Raises:
        ConfigError: if it is not supported.
    """
    if model_type not in FAMILIES:
        raise ConfigError(
            f"model.name: {name} is of type {model_type!r} of transformers; supported are {', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]
