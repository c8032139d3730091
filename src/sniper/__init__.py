"""SNIPER: detectors trained on chips cut around the objects, each at the scale that suits it.

The public face; each name is imported when first used, so that `import sniper` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sniper.chips.pyramid import LevelSpec as LevelSpec
    from sniper.chips.pyramid import PyramidSpec as PyramidSpec
    from sniper.config import load_experiment as load_experiment
    from sniper.data.coco import load_annotations as load_annotations
    from sniper.data.dataset import ChipDataset as ChipDataset
    from sniper.data.dataset import collate as collate
    from sniper.data.plan import plan_epoch as plan_epoch
    from sniper.engine.predict import Predictor as Predictor
    from sniper.engine.run import Run as Run
    from sniper.engine.train import train as train
    from sniper.errors import SniperError as SniperError
    from sniper.evaluation import evaluate as evaluate
    from sniper.geometry.detections import Detections as Detections
    from sniper.spec import ExperimentSpec as ExperimentSpec

_HOMES = {
    "ChipDataset": "sniper.data.dataset",
    "Detections": "sniper.geometry.detections",
    "ExperimentSpec": "sniper.spec",
    "LevelSpec": "sniper.chips.pyramid",
    "Predictor": "sniper.engine.predict",
    "PyramidSpec": "sniper.chips.pyramid",
    "Run": "sniper.engine.run",
    "SniperError": "sniper.errors",
    "collate": "sniper.data.dataset",
    "evaluate": "sniper.evaluation",
    "load_annotations": "sniper.data.coco",
    "load_experiment": "sniper.config",
    "plan_epoch": "sniper.data.plan",
    "train": "sniper.engine.train",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sniper' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(_HOMES)
