"""Load what arguments and options name: experiments, data sets, devices."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from sniper.cli.output import print_warnings
from sniper.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from sniper.config.experiment import ExperimentSpec
    from sniper.data.datasets import Dataset
    from sniper.data.spec import DataSpec, SourceSpec


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
        read=data.read,
        skips_bad_images=data.on_bad_image == "skip",
    )
    print_warnings(dataset.warnings)
    return dataset


def load_source(
    source: "SourceSpec", name: str, *, config: Path, data: "DataSpec", has_images: bool = True
) -> "Dataset":
    """Load a data set that an experiment names.

    Args:
        source: its section of the experiment.
        name: of that section, such as `data.train`.
        config: the experiment file.
        data: how images are read.
        has_images: whether the image files are needed.

    Raises:
        ConfigError: if the experiment names none.
    """
    if not source.annotations:
        raise ConfigError(f"{config}: {name}.annotations is missing")
    images = None if source.images is None else Path(source.images)
    return load_images(Path(source.annotations), images=images, data=data, has_images=has_images)


def select_device(name: str | None) -> "torch.device":
    """Select the device to compute on; under torchrun each process takes the GPU of its local rank.

    Raises:
        ConfigError: if the device does not exist or cannot be used.
    """
    import torch

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    index = f":{os.environ.get('LOCAL_RANK', '0')}" if name == "cuda" else ""
    try:
        device = torch.device(f"{name}{index}")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        first_line = str(error).partition("\n")[0]
        raise ConfigError(f"--device {name}: cannot be used ({first_line})") from error
    return device


def check_parent(path: Path) -> None:
    """Check that the folder of a file to be written exists."""
    if not path.parent.is_dir():
        raise ConfigError(f"{path}: there is no folder {path.parent}")
