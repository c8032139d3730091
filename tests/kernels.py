"""Compile the numba kernels once, so that several test processes only load them from numba's cache."""

import numpy as np

from sniper.chips.cover import cover
from sniper.chips.visibility import chip_visibility
from sniper.geometry import Detections
from sniper.geometry.nms import is_mostly_contained, soft_nms, weighted_box_fusion
from tests.chips.worlds import SMALL_PYRAMID, build_world


def compile_kernels() -> None:
    """Call every function that has kernels, on small inputs of the types that the tests use."""
    world = build_world(0)
    chip_visibility(cover(SMALL_PYRAMID, world, generator=np.random.default_rng(0)), world)
    detections = Detections(
        boxes=np.array([[0.0, 0.0, 8.0, 8.0], [1.0, 1.0, 9.0, 9.0]]),
        scores=np.array([0.9, 0.8]),
        labels=np.array([0, 0]),
    )
    soft_nms(detections)
    weighted_box_fusion(detections)
    is_mostly_contained(detections, np.array([False, True]))
