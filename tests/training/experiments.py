"""A tiny experiment that trains in a second, for the tests of engine and command line."""

from pathlib import Path

from sniper.config.experiment import ExperimentSpec, PredictSpec, TrainSpec
from sniper.data.spec import DataSpec, SourceSpec
from tests.chips.worlds import SMALL_PYRAMID
from tests.models.batches import TINY


def tiny_experiment(annotations: Path) -> ExperimentSpec:
    source = SourceSpec(annotations=str(annotations))
    return ExperimentSpec(
        data=DataSpec(train=source, test=source, num_workers=0),
        pyramid=SMALL_PYRAMID,
        model=TINY,
        train=TrainSpec(
            epochs=1.5,
            batch_size=4,
            learning_rate=0.01,
            reference_batch_size=4,
            warmup_steps=2,
            milestones=(1.0,),
            precision="fp32",
            checkpoint_minutes=1e-9,  # after every step
        ),
        predict=PredictSpec(levels=SMALL_PYRAMID.levels, precision="fp32"),
    )
