"""SNIPER: object detectors trained on chips cut around the objects, each at the scale that suits it.

The public names. Each is imported when first used, so that `import sniper` is fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sniper.chips.negatives import NegativeSpec as NegativeSpec
    from sniper.chips.pyramid import LevelSpec as LevelSpec
    from sniper.chips.pyramid import PyramidSpec as PyramidSpec
    from sniper.config.experiment import ExperimentSpec as ExperimentSpec
    from sniper.config.experiment import MineSpec as MineSpec
    from sniper.config.experiment import PredictSpec as PredictSpec
    from sniper.config.experiment import TrainSpec as TrainSpec
    from sniper.config.loading import load_experiment as load_experiment
    from sniper.data.batches import ChipDataset as ChipDataset
    from sniper.data.batches import collate as collate
    from sniper.data.datasets import Dataset as Dataset
    from sniper.data.datasets import load_dataset as load_dataset
    from sniper.data.epoch import order_chips as order_chips
    from sniper.data.spec import DataSpec as DataSpec
    from sniper.data.spec import SourceSpec as SourceSpec
    from sniper.errors import SniperError as SniperError
    from sniper.evaluation.coco import evaluate as evaluate
    from sniper.geometry.detections import Detections as Detections
    from sniper.inference.detector import Detector as Detector
    from sniper.inference.georeferenced import to_geojson as to_geojson
    from sniper.models.spec import BackboneSpec as BackboneSpec
    from sniper.models.spec import DetectorSpec as DetectorSpec
    from sniper.models.spec import RoIHeadSpec as RoIHeadSpec
    from sniper.models.spec import RPNSpec as RPNSpec
    from sniper.models.spec import TorchvisionSpec as TorchvisionSpec
    from sniper.models.spec import TransformersSpec as TransformersSpec
    from sniper.pipeline import train as train
    from sniper.planning.plan import plan as plan
    from sniper.runs.run import Run as Run
    from sniper.training.callbacks import Callbacks as Callbacks
    from sniper.training.callbacks import Tracker as Tracker

__version__ = "0.2.0.dev0"

_MODULES = {
    "BackboneSpec": "sniper.models.spec",
    "Callbacks": "sniper.training.callbacks",
    "ChipDataset": "sniper.data.batches",
    "DataSpec": "sniper.data.spec",
    "Dataset": "sniper.data.datasets",
    "Detections": "sniper.geometry.detections",
    "Detector": "sniper.inference.detector",
    "DetectorSpec": "sniper.models.spec",
    "ExperimentSpec": "sniper.config.experiment",
    "LevelSpec": "sniper.chips.pyramid",
    "MineSpec": "sniper.config.experiment",
    "NegativeSpec": "sniper.chips.negatives",
    "PredictSpec": "sniper.config.experiment",
    "PyramidSpec": "sniper.chips.pyramid",
    "RPNSpec": "sniper.models.spec",
    "RoIHeadSpec": "sniper.models.spec",
    "Run": "sniper.runs.run",
    "SniperError": "sniper.errors",
    "SourceSpec": "sniper.data.spec",
    "TorchvisionSpec": "sniper.models.spec",
    "Tracker": "sniper.training.callbacks",
    "TrainSpec": "sniper.config.experiment",
    "TransformersSpec": "sniper.models.spec",
    "collate": "sniper.data.batches",
    "evaluate": "sniper.evaluation.coco",
    "load_dataset": "sniper.data.datasets",
    "load_experiment": "sniper.config.loading",
    "order_chips": "sniper.data.epoch",
    "plan": "sniper.planning.plan",
    "to_geojson": "sniper.inference.georeferenced",
    "train": "sniper.pipeline",
}

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'sniper' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted(["__version__", *_MODULES])
