"""The public names: these and no others."""

import re
import subprocess
import sys

import pytest

import sniper

NAMES = [
    "BackboneSpec",
    "Callbacks",
    "ChipDataset",
    "DataSpec",
    "Dataset",
    "Detections",
    "Detector",
    "DetectorSpec",
    "ExperimentSpec",
    "LevelSpec",
    "MineSpec",
    "NegativeSpec",
    "PredictSpec",
    "PyramidSpec",
    "RPNSpec",
    "RoIHeadSpec",
    "Run",
    "SniperError",
    "SourceSpec",
    "TorchvisionSpec",
    "Tracker",
    "TrainSpec",
    "TransformersSpec",
    "collate",
    "evaluate",
    "load_dataset",
    "load_experiment",
    "order_chips",
    "plan",
    "to_geojson",
    "train",
]


def test_the_public_names_are_these() -> None:
    assert sorted(sniper.__all__) == NAMES
    assert dir(sniper) == sorted(["__version__", *NAMES])


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_is_documented(name: str) -> None:
    assert getattr(sniper, name).__doc__


def test_the_version_is_one_of_pep_440() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+)?", sniper.__version__)


def test_training_is_the_whole_pipeline() -> None:
    assert sniper.train.__module__ == "sniper.pipeline"


def test_any_other_name_is_refused() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'roidb'"):
        _ = sniper.roidb


def test_importing_is_fast() -> None:
    code = "import sys, sniper; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
