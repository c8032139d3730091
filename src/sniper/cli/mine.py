"""`sniper mine`: collect proposals on the training images, for negative chips."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from sniper.cli.inputs import load_images, load_split
from sniper.cli.locks import locking
from sniper.cli.options import (
    ANNOTATIONS_HELP,
    Device,
    FollowLinks,
    Images,
    Json,
    TrainSplit,
    default,
    output_option,
)
from sniper.cli.output import print_result
from sniper.cli.progress import show_progress
from sniper.cli.search import naming_kept_images
from sniper.errors import ConfigError
from sniper.runs.lock import lock_folder

if TYPE_CHECKING:
    from sniper.config.experiment import ExperimentSpec
    from sniper.data.datasets import Dataset


def _locks(run: Path, output: Path | None, **_: Any) -> Iterator[AbstractContextManager[None]]:
    if not run.is_dir():
        return
    folder = output or run / "proposals"
    if folder.resolve().is_relative_to(run.resolve()):
        yield lock_folder(run, option="-o")
    yield lock_folder(folder, option="-o")


@locking(_locks)
def mine(
    run: Annotated[Path, Parameter(help="Folder of the run.")],
    annotations: Annotated[
        Path | None,
        Parameter(
            help=f"Data set of the images. {ANNOTATIONS_HELP}", show_default=default("data.train of the run")
        ),
    ] = None,
    /,
    *,
    images: Images = None,
    split: TrainSplit = None,
    follow_links: FollowLinks = False,
    detections: Annotated[
        Path | None,
        Parameter(
            name="--from", help="COCO result file of any detector, to use instead of searching the images."
        ),
    ] = None,
    output: Annotated[
        Path | None, output_option("Folder for the proposals.", default="RUN/proposals")
    ] = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Collect the proposals of a run on its training images, for negative chips.

    A stopped search is continued. Under torchrun, each process searches its share of the images.
    """
    started = time.monotonic()
    from sniper.config.loading import load_experiment
    from sniper.evaluation.results import load_detections
    from sniper.inference.mining import mine as mine_run
    from sniper.inference.mining import proposals_from_detections
    from sniper.runs.processes import Processes, select_device
    from sniper.runs.run import Run

    opened = Run.open(run)
    spec = load_experiment(opened.config_path)
    if follow_links:
        spec = replace(spec, data=replace(spec.data, follow_links=True))
    dataset = _load_dataset(spec, annotations, images, split, has_images=detections is None)
    folder = output or run / "proposals"
    chosen = select_device(device if detections is None else "cpu")
    with (
        Processes.from_environment().process_group(chosen) as processes,
        show_progress(is_shown=processes.is_first) as bars,
        naming_kept_images("the same command continues with the others"),
    ):
        if detections is not None:
            store = proposals_from_detections(
                load_detections(detections),
                dataset,
                folder,
                spec=spec.mine,
                source=detections,
                processes=processes,
            )
        else:
            store = mine_run(
                opened, spec, dataset, folder, device=chosen, on_progress=bars.mining, processes=processes
            )
    if not processes.is_first:
        return
    print_result(
        {
            "num_images": len(dataset),
            "skipped_images": [str(dataset[index].path) for index in store.unreadable],
            "num_proposals": int(store.counts.sum()),
            "bytes_per_image": round(store.num_bytes / max(len(dataset), 1), 1),
            "seconds": round(time.monotonic() - started, 3),
            "output": str(folder),
        },
        is_json=json,
    )


def _load_dataset(
    spec: "ExperimentSpec",
    annotations: Path | None,
    images: Path | None,
    split: str | None,
    *,
    has_images: bool,
) -> "Dataset":
    """Load the annotations given, or those that the run is trained on."""
    if annotations is not None:
        return load_images(annotations, images=images, split=split, data=spec.data, has_images=has_images)
    if split is not None:
        raise ConfigError("--split requires ANNOTATIONS; the run has the split of its own data set")
    if images is not None:
        raise ConfigError("--images requires ANNOTATIONS; the run has the image folder of its own data set")
    return load_split(spec, "train", has_images=has_images)
