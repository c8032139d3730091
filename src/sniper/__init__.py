"""SNIPER: detectors trained on chips cut around the objects, each at the scale that suits it.

The public face; each name is imported when first used, so that `import sniper` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sniper.chips.pyramid import LevelSpec as LevelSpec
    from sniper.chips.pyramid import PyramidSpec as PyramidSpec
    from sniper.config.experiment import ExperimentSpec as ExperimentSpec
    from sniper.config.loading import load_experiment as load_experiment
    from sniper.data.batches import ChipDataset as ChipDataset
    from sniper.data.batches import collate as collate
    from sniper.data.datasets import load_dataset as load_dataset
    from sniper.data.epoch import order_chips as order_chips
    from sniper.errors import SniperError as SniperError
    from sniper.evaluation.coco import evaluate as evaluate
    from sniper.geometry.detections import Detections as Detections
    from sniper.inference.detector import Detector as Detector
    from sniper.runs.run import Run as Run
    from sniper.training.loop import train as train

__version__ = "0.2.0.dev0"

_HOMES = {
    "ChipDataset": "sniper.data.batches",
    "Detections": "sniper.geometry.detections",
    "ExperimentSpec": "sniper.config.experiment",
    "LevelSpec": "sniper.chips.pyramid",
    "Detector": "sniper.inference.detector",
    "PyramidSpec": "sniper.chips.pyramid",
    "Run": "sniper.runs.run",
    "SniperError": "sniper.errors",
    "collate": "sniper.data.batches",
    "evaluate": "sniper.evaluation.coco",
    "load_dataset": "sniper.data.datasets",
    "load_experiment": "sniper.config.loading",
    "order_chips": "sniper.data.epoch",
    "train": "sniper.training.loop",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sniper' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(_HOMES)
