"""Boxes and detections as arrays; knows no image, file, network or torch.

`boxes` holds the arithmetic, `suppression` merges overlapping detections, `detections` is what an image yields.
"""

from sniper.geometry.detections import Detections

__all__ = ["Detections"]
