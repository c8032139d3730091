"""`sniper focus`: choose where the fine levels of a run are searched."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter, validators

from sniper.cli.images import check_pictures_folder
from sniper.cli.inputs import load_images, load_split, scored_split
from sniper.cli.locks import locking
from sniper.cli.options import (
    ANNOTATIONS_HELP,
    Checkpoint,
    Device,
    FollowLinks,
    Images,
    Json,
    Limit,
    ScoredSplit,
    default,
)
from sniper.cli.output import print_line, print_progress, print_result, print_table, print_warnings
from sniper.cli.progress import show_progress
from sniper.cli.search import (
    describe_match,
    describe_weights,
    image_folders,
    load_detector,
    match_classes,
    parse_checkpoint,
)
from sniper.errors import AnnotationError, ConfigError, counted
from sniper.remote import is_remote
from sniper.runs.lock import lock_file

if TYPE_CHECKING:
    from sniper.config.experiment import ExperimentSpec
    from sniper.data.datasets import Dataset
    from sniper.data.datasets.categories import CategoryMatch
    from sniper.inference.detector import Detector
    from sniper.inference.focus_curve import FocusPoint

_LOSS = 0.005
_MAX_PICTURES = 24
_PAGE_NAME = "focus.html"


def _locks(run: Path, **_: Any) -> Iterator[AbstractContextManager[None]]:
    if not is_remote(run) and run.is_dir():
        yield lock_file(run / "focus.json", option="RUN")


@locking(_locks)
def focus(
    run: Annotated[Path, Parameter(help="Folder of the run.")],
    annotations: Annotated[
        Path | None,
        Parameter(
            help=f"Data set of images to choose on. {ANNOTATIONS_HELP}",
            show_default=default("the validation images of the run"),
        ),
    ] = None,
    /,
    *,
    images: Images = None,
    split: ScoredSplit = None,
    follow_links: FollowLinks = False,
    loss: Annotated[
        float | None,
        Parameter(
            validator=validators.Number(gte=0, lt=1),
            help="AP that may be lost: the fastest setting that loses no more is chosen.",
            show_default=default(f"{_LOSS}, without --speed-up"),
        ),
    ] = None,
    speed_up: Annotated[
        float | None,
        Parameter(
            validator=validators.Number(gt=1),
            help="How many times as fast as a whole search; of the settings that are, that with the best AP is chosen.",
            show_default=False,
        ),
    ] = None,
    cues: Annotated[
        Literal["detections", "head"] | None,
        Parameter(
            help="What says where to search: the detections of coarser levels, or the focus head of a run that was "
            "trained with model.focus.",
            show_default=default("whichever is better"),
        ),
    ] = None,
    draw: Annotated[
        Path | None,
        Parameter(
            help="Folder for a page and its pictures: the curve, and of up to 24 images what was searched, found "
            "and missed.",
        ),
    ] = None,
    limit: Limit = None,
    checkpoint: Checkpoint = "best",
    device: Device = None,
    json: Json = False,
) -> None:
    """Choose where the fine levels of a run are searched, by AP and time.

    Images are searched once as a whole. For each setting, what it would have found is scored: a level is searched in
    windows in which the detections of coarser levels, unsure ones too, or the cells of a focus head (model.focus), have
    scores that sum to a minimum. Its time follows from its windows and pixels, by what small and large windows take the
    detector. The choice is written to RUN/focus.json, and `sniper predict` and `sniper evaluate` use it with the same
    weights and levels; `--predict.focus null` searches everything.
    """
    import numpy as np

    from sniper.config.loading import load_experiment
    from sniper.evaluation.pair import GroundTruth
    from sniper.inference.focus_choice import FocusChoice, hash_levels, save_focus
    from sniper.inference.focus_curve import (
        CUES,
        WindowCost,
        candidates_for,
        check_objects,
        choose_focus,
        measure_focus,
    )
    from sniper.runs.processes import Processes, select_device
    from sniper.runs.run import Run

    if loss is not None and speed_up is not None:
        raise ConfigError("expected either --loss or --speed-up, not both")
    opened = Run.open(run)
    spec = load_experiment(opened.config_path)
    spec = replace(spec, data=replace(spec.data, follow_links=spec.data.follow_links or follow_links))
    if len(spec.predict.levels) < 2:
        raise ConfigError(
            f"{run}: searches one level (predict.levels); a focus needs a coarser one beside it"
        )
    if cues == "head" and not spec.model.focus:
        raise ConfigError(f"--cues head: {run} was trained without a focus head (model.focus)")
    sources = (cues,) if cues else CUES if spec.model.focus else CUES[:1]
    dataset = _load_images(spec, run, annotations, images=images, split=split)
    dataset = dataset if limit is None else dataset.select(np.arange(min(limit, len(dataset))))
    check_objects(dataset, spec.predict.levels)
    if draw is not None:
        check_pictures_folder(draw, [record.path for record in dataset], searched=image_folders(dataset))
        draw.mkdir(parents=True, exist_ok=True)
    chosen_device = select_device(device)
    loaded = load_detector(opened, device, spec=spec, checkpoint=parse_checkpoint(checkpoint))
    match = match_classes(loaded.detector, dataset, run=run)
    print_warnings(describe_match(match))
    print_progress(describe_weights(opened, loaded.step))
    with (
        Processes.from_environment().process_group(chosen_device) as processes,
        show_progress(is_shown=processes.is_first) as bars,
    ):
        cost = processes.all_gather(WindowCost.measure(loaded.detector))[0]
        points = measure_focus(
            loaded.detector,
            dataset,
            truth=GroundTruth.of(dataset),
            match=match,
            candidates=candidates_for(spec.predict.levels, cues=sources),
            cost=cost,
            processes=processes,
            on_image=bars.predicting,
        )
    if not processes.is_first:
        return
    _check_whole(points[0], dataset, has_default_loss=loss is None and speed_up is None)
    chosen = choose_focus(points, loss=_LOSS if loss is None else loss, speed_up=speed_up)
    if chosen.focus is None:
        opened.focus_path.unlink(missing_ok=True)
    else:
        choice = FocusChoice(
            step=loaded.step,
            levels=hash_levels(spec.predict.levels),
            focus=chosen.focus,
            num_images=len(dataset),
            pixel_share=chosen.pixel_share,
            time_share=chosen.time_share,
            ap=chosen.ap,
            ap_whole=points[0].ap,
        )
        save_focus(opened, choice)
    if draw is not None:
        _draw(draw, points, chosen, dataset, detector=loaded.detector, match=match, run=run)
    answer: dict[str, Any] = {
        "run": str(run),
        "num_images": len(dataset),
        "chosen": None if chosen.focus is None else _as_dict(chosen),
        "curve": [_as_dict(point) for point in points],
        **({} if draw is None else {"pictures": str(draw)}),
    }
    if json:
        print_result(answer, is_json=True)
        return
    _print(points, chosen, num_images=len(dataset), written_to=opened.focus_path)
    if draw is not None:
        print_line(f"page: {draw / _PAGE_NAME}")


def _check_whole(whole: "FocusPoint", dataset: "Dataset", *, has_default_loss: bool) -> None:
    """Check that a whole search finds objects, which a focus could lose."""
    if whole.ap <= 0:
        raise AnnotationError(
            f"{dataset.path}: a whole search finds none of its objects (AP {whole.ap:.3f}), so AP does not say what a "
            "focus loses; nothing was written"
        )
    if has_default_loss and whole.ap <= _LOSS:
        raise AnnotationError(
            f"{dataset.path}: the AP of a whole search is {whole.ap:.3f}, no more than what may be lost ({_LOSS}), so "
            "that a search that finds nothing would do; nothing was written; train longer, or set --loss or --speed-up"
        )


def _load_images(
    spec: "ExperimentSpec", run: Path, annotations: Path | None, *, images: Path | None, split: str | None
) -> "Dataset":
    """Load the images to choose on: those given, or the validation images of the run."""
    from sniper.pipeline import has_test_images

    if annotations is not None:
        return load_images(annotations, images=images, split=scored_split(annotations, split), data=spec.data)
    for name, value in (("--images", images), ("--split", split)):
        if value is not None:
            raise ConfigError(f"{name} requires a data set")
    if not has_test_images(spec):
        raise ConfigError(
            f"{run}: has no validation images; name a data set to choose on: sniper focus {run} DATA"
        )
    return load_split(spec, "test")


def _draw(
    folder: Path,
    points: "list[FocusPoint]",
    chosen: "FocusPoint",
    dataset: "Dataset",
    *,
    detector: "Detector",
    match: "CategoryMatch",
    run: Path,
) -> None:
    """Draw the curve, what a search with the chosen focus shows of some images, spread evenly, and a page of both."""
    import numpy as np

    from sniper.cli.predict import picture_name
    from sniper.inference.merging import merge
    from sniper.inference.results import ImageToSearch
    from sniper.inference.sources import open_source
    from sniper.inference.validation import spread
    from sniper.reports.focus import draw_curve, write_focus_page
    from sniper.reports.pictures import draw_focus

    draw_curve(points, chosen, folder / "curve.png")
    focused = detector.with_focus(chosen.focus)
    indices = [] if chosen.focus is None else spread(len(dataset), count=_MAX_PICTURES)
    results = focused.search((dataset[index] for index in indices), with_masks=False)
    pictures = []
    for index, result in zip(indices, results, strict=True):
        if result is None:
            continue
        record = dataset[index]
        pictures.append(
            folder / picture_name(index, ImageToSearch(image_id=record.image_id, path=record.path))
        )
        draw_focus(
            open_source(record, detector.data.read),
            match.relabel(merge(result.detections, focused.spec)),
            pictures[-1],
            ground_truth=record,
            searched=np.concatenate([level.searched_boxes for level in result.by_level[1:]]),
            is_shown=np.any([level.has_shown(record.boxes) for level in result.by_level], axis=0),
            min_score=detector.min_score,
        )
    write_focus_page(
        points,
        chosen,
        folder / _PAGE_NAME,
        run=run,
        num_images=len(dataset),
        curve=folder / "curve.png",
        pictures=pictures,
    )


def _as_dict(point: "FocusPoint") -> dict[str, Any]:
    values = asdict(point)
    of_focus = values.pop("focus") or {"min_score": None, "window": None, "cues": None}
    return {**of_focus, **values}


def _print(points: "list[FocusPoint]", chosen: "FocusPoint", *, num_images: int, written_to: Path) -> None:
    """Print the table of all settings, and the choice."""
    from rich import box
    from rich.table import Table

    from sniper.reports.focus import COLUMNS, describe_choice, describe_point

    table = Table(box=box.SIMPLE, show_edge=False, pad_edge=False, collapse_padding=True)
    for name in (*COLUMNS, ""):
        table.add_column(name, justify="right" if name else "left")
    for point in points:
        table.add_row(*describe_point(point), "chosen" if point is chosen else "")
    print_table(table)
    text = describe_choice(points, chosen)
    if chosen.focus is not None:
        text = f"chosen on {counted(num_images, 'image')}: {text}; written to {written_to}"
    print_line(text)
