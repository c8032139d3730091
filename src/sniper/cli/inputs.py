"""Load what arguments and options name: experiments and data sets."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sniper.cli.output import print_warnings
from sniper.errors import ConfigError
from sniper.files import open_regular
from sniper.remote import is_remote

if TYPE_CHECKING:
    from sniper.config.experiment import ExperimentSpec
    from sniper.data.datasets import Dataset
    from sniper.data.spec import DataSpec


def load_config(config: Path | None, overrides: Mapping[str, str] | None = None) -> "ExperimentSpec":
    """Load an experiment file, or else the paper's settings, with other values of some fields."""
    from sniper.config.loading import load_experiment, parse_experiment

    if config is None:
        return parse_experiment("", source=Path("options"), overrides=overrides)
    return load_experiment(config, overrides=overrides)


def load_annotations(
    annotations: Path,
    *,
    images: Path | None,
    split: str | None = None,
    data: "DataSpec | None" = None,
    has_images: bool = False,
    warns_of_left_out: bool = True,
) -> "Dataset":
    """Load a data set, and print its warnings except those of image files that are skipped."""
    from sniper.data.datasets import load_dataset
    from sniper.data.datasets.check import SKIPPED
    from sniper.data.datasets.collect import LEFT_OUT
    from sniper.data.spec import DataSpec

    if images is not None and not is_remote(images) and not images.is_dir():
        raise ConfigError(f"--images {images}: no such folder")
    dataset = load_dataset(
        annotations, image_root=images, split=split, has_images=has_images, data=data or DataSpec()
    )
    hidden = (SKIPPED,) if warns_of_left_out else (SKIPPED, LEFT_OUT)
    print_warnings(line for line in dataset.warnings if not any(part in line for part in hidden))
    return dataset


def load_images(
    annotations: Path,
    *,
    images: Path | None,
    data: "DataSpec",
    split: str | None = None,
    has_images: bool = True,
) -> "Dataset":
    """Load a data set with its image files, read as an experiment specifies, and print its warnings."""
    from sniper.data.datasets import load_dataset

    dataset = load_dataset(
        annotations,
        image_root=images,
        split=split,
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


def scored_split(annotations: Path, split: str | None) -> str | None:
    """Return the split that a command scores: the one given, else val, else test, else None."""
    from sniper.data.datasets.load import find_scored_split

    return find_scored_split(annotations) if split is None else split


def check_parent(path: Path) -> None:
    """Check that the folder of a file to be written exists."""
    if not path.parent.is_dir():
        raise ConfigError(f"{path}: there is no folder {path.parent}")


def check_results_file(path: Path) -> None:
    """Check that a COCO result file to be written replaces no file of another kind, such as annotations.

    Raises:
        ConfigError: if a file is there that does not start as a list of detections does.
    """
    if not path.is_file():
        return
    with open_regular(path) as file:
        start = file.read(1024).lstrip()
    if start and not start.startswith(b"["):
        raise ConfigError(
            f"{path}: is no result file, and would be replaced; choose another name (-o), or remove it"
        )
