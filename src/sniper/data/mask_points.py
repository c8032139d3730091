"""Points of masks for torchvision's transforms: moved exactly as the corners of boxes are.

`tv_tensors.KeyPoints` are centres of pixels where they are mirrored, and are clamped to the image where they are
rotated. Corners of polygons are neither.
"""

from typing import Any

import torch
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional

_GEOMETRIC = (
    functional.horizontal_flip,
    functional.vertical_flip,
    functional.affine,
    functional.rotate,
    functional.perspective,
    functional.elastic,
    functional.crop,
    functional.center_crop,
    functional.resized_crop,
    functional.pad,
    functional.resize,
)


class MaskPoints(tv_tensors.TVTensor):  # type: ignore[misc]
    """(p, 2) float xy of the corners of polygons, continuous like those of boxes.

    Attributes:
        canvas_size: height and width of the image.
    """

    canvas_size: tuple[int, int]

    @classmethod
    def of(cls, points: torch.Tensor, *, canvas_size: tuple[int, int]) -> "MaskPoints":
        """Return points of an image."""
        wrapped = points.as_subclass(cls)
        wrapped.canvas_size = canvas_size
        return wrapped

    @classmethod
    def wrap(cls, tensor: torch.Tensor, like: Any, **_: Any) -> Any:
        """Return the result of a function of points as points; called by torchvision."""
        return cls.of(tensor, canvas_size=like.canvas_size)


def _register(function: Any) -> None:
    def move(points: MaskPoints, *args: Any, **kwargs: Any) -> MaskPoints:
        boxes = tv_tensors.BoundingBoxes(
            points.as_subclass(torch.Tensor).repeat(1, 2),
            format="XYXY",
            canvas_size=points.canvas_size,
            clamping_mode=None,
        )
        moved = function(boxes, *args, **kwargs)
        return MaskPoints.of(moved.as_subclass(torch.Tensor)[:, :2], canvas_size=moved.canvas_size)

    functional.register_kernel(function, MaskPoints)(move)


for _function in _GEOMETRIC:
    _register(_function)
