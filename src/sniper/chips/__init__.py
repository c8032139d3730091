"""The idea of the paper, without pixels and without torch.

`pyramid` says how far to resize and which box sizes are valid there, `image_boxes` is what chips are chosen for,
`cover` chooses them, `chip` is one of them, `assign` tells what it teaches, `table` keeps all chips of a data set;
`windows` is what chips are compared with.
"""

from sniper.chips.chip import Chip
from sniper.chips.image_boxes import ImageBoxes
from sniper.chips.pyramid import Level, LevelSpec, PyramidSpec, ValidRange
from sniper.chips.table import ChipTable
from sniper.chips.targets import BoxStatus, ChipTarget, ChipTargets, assign_targets

__all__ = [
    "BoxStatus",
    "Chip",
    "ChipTable",
    "ChipTarget",
    "ChipTargets",
    "ImageBoxes",
    "Level",
    "LevelSpec",
    "PyramidSpec",
    "ValidRange",
    "assign_targets",
]
