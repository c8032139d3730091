"""The idea of the paper, without pixels and without torch.

`pyramid` defines the levels and their valid ranges. `cover` chooses positive chips for the boxes of many images
(`image_boxes`), `negatives` chooses negative chips for proposals, and `baselines` makes whole images and tiles; all of
them return a `table`. `chip` is one window of it, `targets` are the boxes it learns from, and `visibility` computes
which boxes the chips show.
"""

from sniper.chips.chip import Chip
from sniper.chips.image_boxes import ImageBoxes
from sniper.chips.pyramid import Level, LevelSpec, PyramidSpec, ValidRange
from sniper.chips.table import ChipTable
from sniper.chips.targets import BoxStatus, ChipMasks, ChipTarget, ChipTargets, assign_targets

__all__ = [
    "BoxStatus",
    "Chip",
    "ChipMasks",
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
