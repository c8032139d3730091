"""Load what arguments and options name: experiments and data sets."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sniper.cli.output import print_warnings
from sniper.errors import ConfigError

if TYPE_CHECKING:
    from sniper.config.experiment import ExperimentSpec
    from sniper.data.datasets import Dataset
    from sniper.data.spec import DataSpec


def load_config(config: Path | None) -> "ExperimentSpec":
    """Load an experiment file; without one, return the paper's settings."""
    from sniper.config.experiment import ExperimentSpec
    from sniper.config.loading import load_experiment

    return ExperimentSpec() if config is None else load_experiment(config)


def load_annotations(annotations: Path, *, images: Path | None) -> "Dataset":
    """Load a data set whose image files are not needed, and print its warnings."""
    from sniper.data.datasets import load_dataset

    if images is not None and not images.is_dir():
        raise ConfigError(f"--images {images}: no such folder")
    dataset = load_dataset(annotations, image_root=images, has_images=False)
    print_warnings(dataset.warnings)
    return dataset


def load_images(
    annotations: Path, *, images: Path | None, data: "DataSpec", has_images: bool = True
) -> "Dataset":
    """Load a data set with its image files, read as an experiment specifies, and print its warnings."""
    from sniper.data.datasets import load_dataset

    dataset = load_dataset(
        annotations,
        image_root=images,
        has_images=has_images,
        data=data,
    )
    print_warnings(dataset.warnings)
    return dataset


def load_split(
    spec: "ExperimentSpec", split: Literal["train", "test"], *, has_images: bool = True
) -> "Dataset":
    """Load a data set of an experiment and print its warnings; see `sniper.pipeline.load_split`."""
    from sniper import pipeline
    from sniper.training.callbacks import Callbacks

    callbacks = Callbacks(on_warning=lambda message: print_warnings([message]))
    return pipeline.load_split(spec, split, has_images=has_images, callbacks=callbacks)


def check_parent(path: Path) -> None:
    """Check that the folder of a file to be written exists."""
    if not path.parent.is_dir():
        raise ConfigError(f"{path}: there is no folder {path.parent}")
