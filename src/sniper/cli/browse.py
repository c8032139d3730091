"""`sniper browse`: look through a data set in a browser."""

import errno
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter, validators

from sniper.cli.inputs import load_annotations, load_config, scored_split
from sniper.cli.options import (
    ANNOTATIONS_HELP,
    FollowLinks,
    Images,
    Json,
    Proposals,
    default,
    split_option,
)
from sniper.cli.output import announce_compilation, console, flush, print_line, print_result, print_warnings
from sniper.errors import ConfigError, DetectionsError, counted, describe_os_error
from sniper.files import expand_path

if TYPE_CHECKING:
    from sniper.browse.content import MatchedDetections
    from sniper.browse.server import BrowseServer, Content
    from sniper.config.experiment import ExperimentSpec
    from sniper.data.datasets import Dataset
    from sniper.inference.store import BoxStore


def browse(
    data: Annotated[
        Path,
        Parameter(
            help=f"Data set: {ANNOTATIONS_HELP} Or the folder of a run: its validation images, its detections of them, "
            "and chips of its pyramid."
        ),
    ],
    /,
    *,
    detections: Annotated[
        Path | None,
        Parameter(
            help="COCO result file to show, matched with the objects at IoU 0.5.",
            show_default=default("those of a run, if it has any"),
        ),
    ] = None,
    min_score: Annotated[
        float | None,
        Parameter(
            validator=validators.Number(gte=0, lte=1),
            help="Score from which detections are shown at first.",
            show_default=default("where F1 is best on the validation images of a run, else on these images"),
        ),
    ] = None,
    drop_duplicates: Annotated[
        bool, Parameter(help="Show no second box on an object, as pictures show none.")
    ] = True,
    images: Images = None,
    split: Annotated[
        str | None,
        split_option(
            "train, or everything where there are no splits; with detections val, else test; of a run val"
        ),
    ] = None,
    follow_links: FollowLinks = False,
    config: Annotated[
        Path | None,
        Parameter(
            help="Experiment file (YAML) or name of a recipe: its chips are shown, and images read as it specifies.",
            show_default=default("chips of the pyramid that suits the data set"),
        ),
    ] = None,
    proposals: Proposals = None,
    port: Annotated[
        int,
        Parameter(
            validator=validators.Number(gte=0, lte=65_535),
            help="Port of the page on this machine.",
            show_default=default("a free one"),
        ),
    ] = 0,
    open: Annotated[
        bool,
        Parameter(
            name="--open",
            help="Open the page in a browser.",
            show_default=default("where there is a desktop"),
        ),
    ] = True,
    json: Json = False,
) -> None:
    """Look through a data set in a browser: its objects, the chips that training cuts, and detections.

    Serves a page to this machine alone, at an address with a random token, until Ctrl-C. Large TIFFs are read in
    windows. The page lists its keys.
    """
    with console.status("reading the data set"):
        content = _load(
            data,
            detections=detections,
            min_score=min_score,
            drops_duplicates=drop_duplicates,
            images=images,
            split=split,
            follow_links=follow_links,
            config=config,
            proposals=proposals,
        )
    server = _listen(content, port)
    try:
        if json:
            answer = {"url": server.url, "port": server.server_port, "num_images": len(content.dataset)}
            print_result(answer, is_json=True)
        else:
            print_line(f"{counted(len(content.dataset), 'image')} of {content.name}: {server.url}")
            print_line("Only this machine can open the page. Ctrl-C ends it.")
        flush()
        if open and (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
            import webbrowser

            # In a thread, since a browser of the terminal returns only when it is closed.
            threading.Thread(target=webbrowser.open, args=(server.launch_url,), daemon=True).start()
        with announce_compilation():
            server.serve_forever()
    finally:
        server.server_close()


def _is_run(data: Path) -> bool:
    return (data / "config.yaml").is_file()


def _load(
    data: Path,
    *,
    detections: Path | None,
    min_score: float | None,
    drops_duplicates: bool,
    images: Path | None,
    split: str | None,
    follow_links: bool,
    config: Path | None,
    proposals: Path | None,
) -> "Content":
    """Load the images, their objects and their detections."""
    from dataclasses import replace

    from sniper.browse.chips import ChipChooser
    from sniper.browse.server import Content
    from sniper.browse.tiles import ImageTiles

    if _is_run(data):
        for name, value in (("--images", images), ("--config", config)):
            if value is not None:
                raise ConfigError(f"{name}: is not used with the folder of a run, which has its own ({data})")
    spec = load_config(data / "config.yaml" if _is_run(data) else config)
    # An image that cannot be read is shown with the reason, and is no error here.
    section = replace(spec.data, on_bad_image="skip", follow_links=follow_links or spec.data.follow_links)
    spec = replace(spec, data=section)
    if _is_run(data):
        dataset, matched, best = _load_run(
            data, spec, detections, split=split, drops_duplicates=drops_duplicates
        )
    else:
        if detections is not None:
            split = scored_split(data, split)
        dataset = load_annotations(data, images=images, split=split, data=spec.data, has_images=True)
        matched = (
            None if detections is None else _match(detections, dataset, drops_duplicates=drops_duplicates)
        )
        best = None
    if not len(dataset):
        raise ConfigError(f"{data}: there is no image to show")
    if min_score is not None and matched is None:
        raise ConfigError(f"--min-score {min_score:g}: there are no detections; name some with --detections")
    scores = (min_score, best, None if matched is None else matched.best_score, 0.0)
    pyramid = None if config is None and not _is_run(data) else spec.pyramid
    chips = ChipChooser(
        dataset,
        pyramid,
        min_visible_side=spec.data.min_visible_side,
        seed=spec.seed,
        proposals=None if proposals is None else _open_proposals(proposals, dataset),
        negatives=spec.negatives,
    )
    return Content(
        name="/".join(data.absolute().parts[-2:]),
        dataset=dataset,
        tiles=ImageTiles(dataset, spec.data.read),
        chips=chips,
        detections=matched,
        min_score=next(score for score in scores if score is not None),
    )


def _load_run(
    folder: Path,
    spec: "ExperimentSpec",
    detections: Path | None,
    *,
    split: str | None,
    drops_duplicates: bool,
) -> tuple["Dataset", "MatchedDetections | None", float | None]:
    """Load the images of a run, its detections of them, and the score from which it shows detections."""
    from sniper import pipeline
    from sniper.inference.calibration import load_calibration
    from sniper.runs.run import Run
    from sniper.training.callbacks import Callbacks

    if split is not None and split not in ("train", "val", "test"):
        raise ConfigError(f"--split {split}: a run has the images that it trains on (train) and others (val)")
    is_scored = split != "train" and (split is not None or pipeline.has_test_images(spec))
    callbacks = Callbacks(on_warning=lambda message: print_warnings([message]))
    dataset = pipeline.load_split(spec, "test" if is_scored else "train", callbacks=callbacks)
    matched = None
    if detections is not None:
        matched = _match(detections, dataset, drops_duplicates=drops_duplicates)
    elif is_scored:
        for path in (folder / "evaluation" / "detections.json", folder / "detections.json"):
            if matched is None and path.is_file():
                try:
                    matched = _match(path, dataset, drops_duplicates=drops_duplicates)
                except DetectionsError as error:
                    advice = f"for other images than the run's: sniper browse DATA --detections {path}"
                    print_warnings([f"{error}; they are not shown ({advice})"])
    calibration = load_calibration(Run(folder))
    return dataset, matched, None if calibration is None else calibration.min_score


def _open_proposals(folder: Path, dataset: "Dataset") -> "BoxStore":
    """Open what `sniper mine` collected on these images."""
    from sniper.inference.proposals import open_proposals  # imports torch

    return open_proposals(expand_path(folder), dataset)


def _match(path: Path, dataset: "Dataset", *, drops_duplicates: bool) -> "MatchedDetections":
    """Read detections, and match them with the objects."""
    from sniper.browse.content import MatchedDetections
    from sniper.evaluation.duplicates import without_duplicates
    from sniper.evaluation.pair import EvaluationPair

    pair = EvaluationPair.of(path, dataset)
    print_warnings(pair.warnings)
    return MatchedDetections.of(without_duplicates(pair) if drops_duplicates else pair)


def _listen(content: "Content", port: int) -> "BrowseServer":
    """Start to listen on a port.

    Raises:
        ConfigError: if it is in use, or needs other permissions.
    """
    from sniper.browse.server import BrowseServer

    try:
        return BrowseServer(content, port=port)
    except OSError as error:
        reason = (
            "is in use by another program" if error.errno == errno.EADDRINUSE else describe_os_error(error)
        )
        raise ConfigError(
            f"--port {port}: {reason}; name another one, or leave the option out for a free one"
        ) from error
