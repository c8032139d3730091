"""The public face: these names and no others."""

import subprocess
import sys

import pytest

import sniper


def test_the_public_names_are_these() -> None:
    assert sorted(sniper.__all__) == [
        "ChipDataset",
        "Detections",
        "Detector",
        "ExperimentSpec",
        "LevelSpec",
        "PyramidSpec",
        "Run",
        "SniperError",
        "collate",
        "evaluate",
        "load_dataset",
        "load_experiment",
        "order_chips",
        "train",
    ]


def test_every_public_name_can_be_had_and_says_what_it_is_for() -> None:
    assert dir(sniper) == sorted(sniper.__all__)
    for name in sniper.__all__:
        assert getattr(sniper, name).__doc__


def test_any_other_name_is_refused() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'roidb'"):
        _ = sniper.roidb


def test_importing_costs_nothing() -> None:
    code = "import sys, sniper; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
