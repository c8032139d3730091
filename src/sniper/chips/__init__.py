"""The idea of the paper, without pixels and without torch.

`pyramid` says how far to resize and which box sizes are valid there, `cover` chooses the chips, `chip` is one of them,
`assign` tells what it teaches, `table` keeps all chips of a data set.
"""

from sniper.chips.assign import ChipTarget, Standing, assign
from sniper.chips.chip import Chip
from sniper.chips.pyramid import Level, LevelSpec, PyramidSpec, ValidRange
from sniper.chips.table import ChipTable

__all__ = [
    "Chip",
    "ChipTable",
    "ChipTarget",
    "Level",
    "LevelSpec",
    "PyramidSpec",
    "Standing",
    "ValidRange",
    "assign",
]
