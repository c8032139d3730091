"""The experiment: every number of a run, read from YAML and written back.

`experiment` has the specs, `loading` reads and writes them, `recipes` holds the experiments that come with the package.
"""

from sniper.config.experiment import ExperimentSpec, MineSpec, PredictSpec, TrainSpec, widened
from sniper.config.loading import (
    check_resumable,
    dump_changes,
    dump_experiment,
    load_experiment,
    parse_experiment,
)

__all__ = [
    "ExperimentSpec",
    "MineSpec",
    "PredictSpec",
    "TrainSpec",
    "check_resumable",
    "dump_changes",
    "dump_experiment",
    "load_experiment",
    "parse_experiment",
    "widened",
]
