"""The experiment: all settings of a run, read from YAML and written back.

`experiment` has the specs, `loading` reads and writes them, `recipes` contains the experiments of the package.
"""

from sniper.config.experiment import ExperimentSpec, MineSpec, PredictSpec, TrainSpec, widened
from sniper.config.loading import (
    check_resumable,
    dump_changes,
    dump_experiment,
    load_experiment,
    parse_experiment,
)
from sniper.config.recipes import Recipe, list_recipes

__all__ = [
    "ExperimentSpec",
    "MineSpec",
    "PredictSpec",
    "Recipe",
    "TrainSpec",
    "check_resumable",
    "dump_changes",
    "dump_experiment",
    "list_recipes",
    "load_experiment",
    "parse_experiment",
    "widened",
]
