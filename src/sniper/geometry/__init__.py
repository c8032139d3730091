"""Boxes and detections as arrays, without images, files, networks or torch.

`boxes` is box arithmetic, `nms` merges overlapping detections, `detections` is their value type.
"""

from sniper.geometry.detections import Detections, SelectDetections

__all__ = ["Detections", "SelectDetections"]
