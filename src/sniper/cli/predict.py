"""`sniper predict`: detect objects in images with the detector of a run."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from sniper.cli.images import find_image_files
from sniper.cli.inputs import load_images, load_split
from sniper.cli.options import Device, Images, Json, Limit, default, flag, output_option
from sniper.cli.output import print_result, print_warnings
from sniper.cli.progress import show_progress
from sniper.errors import ConfigError

if TYPE_CHECKING:
    from sniper.config.experiment import ExperimentSpec
    from sniper.data.datasets import Dataset
    from sniper.geometry import Detections
    from sniper.inference.detector import Detector
    from sniper.inference.results import ImageToSearch


def predict(
    run: Annotated[Path, Parameter(help="Folder of the run.")],
    /,
    *files: Annotated[
        str,
        Parameter(
            help="Image files, folders of them, quoted patterns such as 'shots/**/*.jpg', or text files (.txt) with "
            "one path per line. Without any, the images of --annotations, or else of data.test of the run."
        ),
    ],
    annotations: Annotated[
        Path | None,
        Parameter(
            help="COCO JSON file whose images are searched; results have its image ids.",
            show_default=default("data.test of the run"),
        ),
    ] = None,
    images: Images = None,
    output: Annotated[
        Path | None, output_option("COCO result file to write.", default="RUN/detections.json")
    ] = None,
    draw: Annotated[
        Path | None,
        Parameter(help="Folder for pictures of the detections and, with annotations, of missed objects."),
    ] = None,
    resume: Annotated[bool, flag("Continue a stopped search.")] = False,
    limit: Limit = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Detect objects in images with the detector of a run.

    Under torchrun, each process searches its share of the images.
    """
    from sniper.config.loading import load_experiment
    from sniper.files import sha256
    from sniper.inference.detector import Detector
    from sniper.inference.results import search_to_file
    from sniper.runs.processes import Processes, select_device
    from sniper.runs.run import Run

    opened = Run.open(run)
    spec = load_experiment(opened.config_path)
    truth = _load_truth(spec, files, annotations, images)
    sources = _list_images(files, truth)[:limit]
    chosen = select_device(device)
    target = output or run / "detections.json"
    _make_folders(target, draw)
    detector = Detector.load(opened, chosen, spec=spec)
    drawer = None if draw is None else _drawer(draw, sources, truth, detector=detector, run=run)
    started = time.monotonic()
    with (
        Processes.from_environment().process_group(chosen) as processes,
        show_progress(is_shown=processes.is_first) as bars,
    ):
        report = search_to_file(
            detector,
            sources,
            target,
            source={"weights": sha256(opened.weights_path), "model": asdict(spec.model)},
            resume=resume,
            processes=processes,
            on_progress=bars.predicting,
            on_image=drawer,
        )
    if not processes.is_first:
        return
    if report.num_full:
        print_warnings(
            [
                f"{report.num_full} images have more detections than predict.max_detections = "
                f"{spec.predict.max_detections}; only the best are kept"
            ]
        )
    print_result(
        {
            "run": str(run),
            "num_images": len(sources),
            "skipped_images": [str(sources[index].path) for index in report.skipped],
            "num_detections": report.num_results,
            "seconds": round(time.monotonic() - started, 3),
            "output": str(target),
        },
        is_json=json,
    )


def _load_truth(
    spec: "ExperimentSpec",
    files: Sequence[str],
    annotations: Path | None,
    images: Path | None,
) -> "Dataset | None":
    """Load the data set whose images are searched; None if image files are given instead."""
    if files and annotations is not None:
        raise ConfigError("expected either image files or --annotations, not both")
    if images is not None and annotations is None:
        raise ConfigError("--images requires --annotations")
    if files:
        return None
    if annotations is not None:
        return load_images(annotations, images=images, data=spec.data)
    return load_split(spec, "test")


def _list_images(files: Sequence[str], truth: "Dataset | None") -> list["ImageToSearch"]:
    """List the images of the data set or, without one, the image files, numbered from 1."""
    from sniper.inference.results import ImageToSearch

    if truth is not None:
        return [ImageToSearch(image_id=record.image_id, path=record.path) for record in truth]
    return [
        ImageToSearch(image_id=number, path=path, file_name=str(path))
        for number, path in enumerate(find_image_files(files), start=1)
    ]


def _make_folders(target: Path, draw: Path | None) -> None:
    if target.is_dir():
        raise ConfigError(f"{target}: expected a file to write, this is a folder")
    for folder in (target.parent, draw):
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)


def _drawer(
    folder: Path,
    sources: Sequence["ImageToSearch"],
    truth: "Dataset | None",
    *,
    detector: "Detector",
    run: Path,
) -> Callable[[int, "Detections"], None]:
    """Build the callback that draws the detections of an image beside its annotations."""
    from sniper.data.images.files import open_image
    from sniper.reports.pictures import draw_detections

    if truth is not None and truth.categories != detector.categories:
        raise ConfigError(f"--draw: the categories of {truth.path} are not those of {run}")

    def draw(index: int, detections: "Detections") -> None:
        image = sources[index]
        draw_detections(
            open_image(image.path, detector.data.read),
            detections,
            folder / f"{image.image_id:06d}_{image.path.stem}.png",
            categories=detector.categories,
            ground_truth=None if truth is None else truth[index],
        )

    return draw
