"""The command line: reads what the user said, calls the rooms, prints and exits.

Exit 0 when done, 2 for a mistake of the user told in one paragraph, 130 when stopped, 1 for a fault of ours. With
`--json` standard output holds one JSON object and nothing else; progress and words go to standard error. torch is
imported only by the commands that need it.
"""

import json as json_module
import logging
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from glob import glob
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, CycloptsError, Parameter, validators
from rich.console import Console

from sniper import __version__
from sniper.cli.recipes import recipes
from sniper.errors import ConfigError, DetectionsError, ImageError, SniperError

if TYPE_CHECKING:
    import torch
    from rich.progress import Progress, TaskID

    from sniper.chips import ChipTable
    from sniper.config.experiment import ExperimentSpec
    from sniper.data.datasets import Dataset
    from sniper.data.spec import DataSpec, SourceSpec
    from sniper.geometry import Detections
    from sniper.planning.page import PlanPage
    from sniper.training.callbacks import StepReport

_console = Console(stderr=True, highlight=False)

app = App(
    name="sniper",
    help="Train detectors on chips cut around the objects, each at the scale that suits it (SNIPER, NeurIPS 2018).",
    version=__version__,
    version_flags=["--version"],
    console=Console(),
    error_console=_console,
    help_format="plaintext",
    suppress_keyboard_interrupt=False,
)

Count = Annotated[int, Parameter(validator=validators.Number(gte=1))]
Seed = Annotated[int, Parameter(validator=validators.Number(gte=0))]
Json = Annotated[bool, Parameter(name="--json", negative=())]
Device = Annotated[str | None, Parameter(name="--device")]


app.command(recipes)


def main() -> None:
    """Run the command line and exit."""
    code = run(sys.argv[1:])
    if (
        code and os.environ.get("WORLD_SIZE", "1") != "1"
    ):  # under torchrun: the others may be waiting for this process
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def run(tokens: Sequence[str]) -> int:
    """Run one command and give its exit code."""
    logging.getLogger("timm").setLevel(logging.ERROR)  # it warns of a head that we leave out on purpose
    try:
        app(tokens, exit_on_error=False, result_action="return_value")
    except CycloptsError:
        return 2  # cyclopts has told it
    except SniperError as error:
        _console.print(f"error: {error}", markup=False, soft_wrap=True)
        return 2
    except BrokenPipeError:  # whoever reads, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a path that cannot be written, a disk that is full
        place = f"{error.filename}: " if error.filename else ""
        _console.print(f"error: {place}{error.strerror or error}", markup=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        _console.print("stopped")
        return 130
    return 0


@app.command
def plan(
    annotations: Path,
    /,
    *,
    config: Path | None = None,
    proposals: Path | None = None,
    images: Path | None = None,
    output: Annotated[Path | None, Parameter(name=["-o", "--output"])] = None,
    batch_size: Count | None = None,
    crowd: Count = 100,
    levels: Count | None = None,
    share: Annotated[float, Parameter(validator=validators.Number(gt=0, lte=1))] = 0.99,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Tell what training on chips would cost, before anyone trains, and which pyramid would suit the data set.

    Writes plan.html, a page to look at, and suggested.yaml, an experiment with the suggested pyramid.

    Args:
        annotations: COCO JSON; its images are not needed.
        config: an experiment whose pyramid is planned with; the paper's otherwise.
        proposals: a folder of `sniper mine`; negative chips are planned from it, too.
        images: folder that the file names of the annotations start from, if not beside them; for page and suggestion.
        output: folder for page and suggestion; plans/FOLDER_NAME otherwise, after folder and name of the annotations.
        batch_size: chips in a step, of the suggestion too; that of the experiment otherwise.
        crowd: count the chips that show more boxes than this.
        levels: suggest a pyramid of this many levels; otherwise the cheapest of 1 to 4.
        share: of the boxes, that the suggestion must bring to a useful size.
        seed: draws among equally good chips.
        json: print one JSON object and nothing else.
    """
    started = time.monotonic()
    from dataclasses import replace

    from sniper.config.loading import dump_changes
    from sniper.data.datasets import load_dataset
    from sniper.data.epoch import to_image_boxes
    from sniper.data.spec import SourceSpec
    from sniper.files import atomic_write
    from sniper.planning.cost import compute_cost, levels_megapixels
    from sniper.planning.page import PlanPage
    from sniper.planning.suggest import suggest_pyramids

    spec = _experiment(config)
    if batch_size is not None:
        spec = replace(spec, train=replace(spec.train, batch_size=batch_size))
    if images is not None and not images.is_dir():
        raise ConfigError(f"--images {images}: there is no such folder")
    loaded = load_dataset(annotations, image_root=images, has_images=False)
    _warn(loaded)
    folder = output or Path("plans") / f"{annotations.absolute().parent.name}_{annotations.stem}"
    folder.mkdir(parents=True, exist_ok=True)
    boxes = to_image_boxes(loaded)
    table = _choose_chips(loaded, spec, proposals, seed=seed)
    budget = compute_cost(table, boxes, pyramid=spec.pyramid, negatives_per_image=spec.negatives.per_image)
    with _console.status("looking for a pyramid that suits"):
        num_levels = [levels] if levels else range(1, 5)
        found = suggest_pyramids(boxes, base=spec.pyramid, num_levels=num_levels, share=share)
    suggested = None
    if found:
        old = spec.data.train
        root = old.images if images is None and Path(old.annotations) == annotations.absolute() else images
        source = SourceSpec(
            annotations=str(annotations.absolute()),
            images=None if root is None else str(Path(root).absolute()),
        )
        suggested = spec.with_pyramid(found[0].cost.pyramid, train=source)
    page = PlanPage(
        dataset=loaded,
        table=table,
        cost=budget,
        suggestions=found,
        test_megapixels=levels_megapixels(spec.predict.levels, boxes) / max(budget.num_images, 1),
        batch_size=spec.train.batch_size,
        crowded_above=crowd,
        suggested_yaml="" if suggested is None else dump_changes(suggested),
        read=spec.data.read,
    )
    page.save(folder / "plan.html")
    (folder / "suggested.yaml").unlink(missing_ok=True)  # of an earlier plan
    if found:
        with atomic_write(folder / "suggested.yaml") as file:
            file.write(page.suggested_yaml.encode())
    if json:
        told = page.as_dict()
        _answer(json, {**told, "seconds": round(time.monotonic() - started, 3), "output": str(folder)})
    else:
        _show_plan(page, folder)


@app.command
def chips(
    annotations: Path,
    /,
    *,
    output: Annotated[Path, Parameter(name=["-o", "--output"])],
    config: Path | None = None,
    proposals: Path | None = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Choose the chips of a data set and write them to one file, for data.chips of an experiment.

    Args:
        annotations: COCO JSON; its images are not needed.
        output: the .npz file to write.
        config: an experiment whose pyramid is used; the paper's otherwise.
        proposals: a folder of `sniper mine`; negative chips are chosen from it, too.
        seed: draws among equally good chips.
        json: print one JSON object and nothing else.
    """
    started = time.monotonic()
    from sniper.data.datasets import load_dataset
    from sniper.data.epoch import to_image_boxes
    from sniper.planning.cost import compute_cost

    spec = _experiment(config)
    loaded = load_dataset(annotations, has_images=False)
    _warn(loaded)
    table = _choose_chips(loaded, spec, proposals, seed=seed)
    _check_folder(output)
    table.save(output, pyramid=spec.pyramid, digest=loaded.digest)
    budget = compute_cost(
        table,
        to_image_boxes(loaded),
        pyramid=spec.pyramid,
        negatives_per_image=spec.negatives.per_image,
    )
    told = budget.as_dict()
    _answer(json, {**told, "seconds": round(time.monotonic() - started, 3), "output": str(output)})


@app.command
def check(
    annotations: Path,
    /,
    *,
    images: Path | None = None,
    config: Path | None = None,
    json: Json = False,
) -> None:
    """Read a data set to the last pixel, and name everything that is wrong with it.

    Args:
        annotations: COCO JSON.
        images: folder that the file names of the annotations start from, if not beside them.
        config: an experiment whose data.read says how images are read.
        json: print one JSON object and nothing else.
    """
    started = time.monotonic()
    from rich.progress import track

    from sniper.data.datasets import load_dataset
    from sniper.data.reader import find_bad_images

    read = _experiment(config).data.read
    loaded = load_dataset(annotations, image_root=images, has_images=False)
    _warn(loaded)
    found = track(find_bad_images(loaded, read), "check", total=len(loaded), console=_console, transient=True)
    problems = [problem for problem in found if problem is not None]
    if problems:
        plural = "s" if len(problems) > 1 else ""
        listed = "\n  ".join(problems)
        raise ImageError(f"{annotations}: {len(problems)} bad image{plural}\n  {listed}")
    _answer(
        json,
        {
            "num_images": len(loaded),
            "num_boxes": len(loaded.boxes),
            "seconds": round(time.monotonic() - started, 3),
        },
    )


@app.command
def train(
    config: Path,
    /,
    *overrides: Annotated[str, Parameter(allow_leading_hyphen=True)],
    run: Path | None = None,
    resume: Annotated[bool, Parameter(negative=())] = False,
    step: Count | None = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Train a detector. Under torchrun, each process takes its share of every batch.

    Args:
        config: the experiment, YAML.
        overrides: any field of it, as --section.field VALUE.
        run: folder of the run; runs/NAME otherwise, after the name of the experiment file.
        resume: go on with a run that was stopped; what neither config nor overrides say is as it was.
        step: with --resume, go on from the checkpoint of this step; later ones are put aside.
        device: where to compute, such as cpu or cuda:0; a GPU if there is one.
        json: print one JSON object and nothing else.
    """
    from sniper.pipeline import train as train_experiment
    from sniper.runs.processes import Processes
    from sniper.training.callbacks import Callbacks

    last: dict[str, Any] = {}
    is_first = Processes.from_environment().is_first
    with _step_bar(is_shown=is_first) as bars:

        def note(report: "StepReport") -> None:
            last.update(epoch=round(report.epoch, 4), loss=round(report.loss, 5))
            bars.step(report)

        trained = train_experiment(
            config,
            run=run,
            resume=resume,
            step=step,
            device=device,
            overrides=_as_overrides(overrides),
            callbacks=Callbacks(
                on_step=note, on_mining=bars.mining, on_scores=bars.scores, on_warning=_print_warning
            ),
        )
    if is_first:
        _answer(json, {"run": str(trained.folder), "step": int(trained.checkpoints[-1].name), **last})


@app.command
def mine(
    run: Path,
    annotations: Path | None = None,
    /,
    *,
    image_root: Path | None = None,
    detections: Annotated[Path | None, Parameter(name="--from")] = None,
    output: Annotated[Path | None, Parameter(name=["-o", "--output"])] = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Find what a run's detector takes for objects in every training image, for negative chips.

    Goes on where it was stopped. Under torchrun, each process takes its share of the images.

    Args:
        run: folder of the run.
        annotations: COCO JSON of the images; the run's data.train otherwise.
        image_root: folder that the file names of the annotations start from, if not beside them.
        detections: take these, of any detector, COCO results, instead of looking.
        output: folder for the proposals; RUN/proposals otherwise.
        device: where to compute, such as cpu or cuda:0; a GPU if there is one.
        json: print one JSON object and nothing else.
    """
    started = time.monotonic()
    from sniper.config.loading import load_experiment
    from sniper.data.datasets import load_dataset
    from sniper.evaluation.coco import load_detections
    from sniper.inference.mining import mine as mine_run
    from sniper.inference.mining import proposals_from_detections
    from sniper.runs.processes import Processes
    from sniper.runs.run import Run

    opened = Run.open(run)
    spec = load_experiment(opened.config_path)
    if annotations is None:
        if image_root is not None:
            raise ConfigError("--image-root goes with ANNOTATIONS; the run knows where its own images are")
        source = spec.data.train
        annotations = Path(source.annotations) if source.annotations else None
        image_root = None if source.images is None else Path(source.images)
    if annotations is None:
        raise ConfigError(f"{opened.config_path}: data.train.annotations is missing")
    loaded = load_dataset(
        annotations,
        image_root=image_root,
        has_images=detections is None,
        read=spec.data.read,
        skips_bad_images=spec.data.on_bad_image == "skip",
    )
    _warn(loaded)
    ranks = Processes.from_environment()
    share = ranks.rank, ranks.world_size
    folder = output or run / "proposals"
    if detections is not None:
        store = proposals_from_detections(
            load_detections(detections), loaded, folder, spec=spec.mine, source=detections, share=share
        )
    else:
        with _step_bar() as bars:
            store = mine_run(
                opened, spec, loaded, folder, device=_device(device), watch=bars.mining, share=share
            )
    seconds = time.monotonic() - started
    _answer(
        json,
        {
            "num_images": len(loaded),
            "missing_shards": len(store.missing),
            "num_proposals": store.num_proposals,
            "bytes_per_image": round(store.num_bytes / max(len(loaded), 1), 1),
            "seconds": round(seconds, 3),
            "output": str(folder),
        },
    )


@app.command
def predict(
    run: Path,
    /,
    *images: str,
    annotations: Path | None = None,
    image_root: Path | None = None,
    output: Annotated[Path | None, Parameter(name=["-o", "--output"])] = None,
    draw: Path | None = None,
    resume: Annotated[bool, Parameter(negative=())] = False,
    limit: Count | None = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Find objects in images with the detector of a run. Under torchrun, each process takes its share of them.

    Args:
        run: folder of the run.
        images: image files, folders of such, patterns in quotes such as "shots/**/*.jpg", or text files (.txt) with a
            path in each line; without any, those of --annotations, or else of the run's data.test.
        annotations: COCO JSON whose images are taken, under their ids.
        image_root: folder that the file names of the annotations start from, if not beside them.
        output: the COCO result file to write; RUN/detections.json otherwise.
        draw: a folder for pictures of what was found and, if there are annotations, of what was missed.
        resume: go on with a search that was stopped.
        limit: take only the first this many images.
        device: where to compute, such as cpu or cuda:0; a GPU if there is one.
        json: print one JSON object and nothing else.
    """
    from dataclasses import asdict

    from sniper.config.loading import load_experiment
    from sniper.data.datasets import Dataset
    from sniper.data.images.files import open_image
    from sniper.files import sha256
    from sniper.inference.detector import Detector
    from sniper.inference.results import ImageToSearch, search_to_file
    from sniper.reports.pictures import draw_detections
    from sniper.runs.processes import Processes
    from sniper.runs.run import Run

    opened = Run.open(run)
    spec = load_experiment(opened.config_path)
    if images and annotations is not None:
        raise ConfigError("predict wants either image files or --annotations, not both")
    if image_root is not None and annotations is None:
        raise ConfigError("--image-root goes with --annotations")
    truth: Dataset | None = None
    if images:
        files = _image_files(images)
        sources = [
            ImageToSearch(image_id=number, path=path, file_name=str(path))
            for number, path in enumerate(files, start=1)
        ][:limit]
    else:
        truth = _images_to_search(annotations, image_root, spec, run)
        sources = [ImageToSearch(image_id=record.image_id, path=record.path) for record in truth][:limit]
    place = _device(device)
    target = output or run / "detections.json"
    if target.is_dir():
        raise ConfigError(f"{target}: is a folder, wanted a file to write")
    for folder in (target.parent, draw):
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
    predictor = Detector.load(opened, spec, device=place)
    if draw is not None and truth is not None and truth.categories != predictor.categories:
        raise ConfigError(
            f"--draw: {truth.path} has other categories than {run}, so nothing can be told right"
        )

    def show(index: int, detections: "Detections") -> None:
        assert draw is not None
        own = sources[index]
        draw_detections(
            open_image(own.path, spec.data.read),
            detections,
            draw / f"{own.image_id:06d}_{own.path.stem}.png",
            categories=predictor.categories,
            ground_truth=None if truth is None else truth[index],
        )

    started = time.monotonic()
    with (
        Processes.from_environment().process_group(place) as ranks,
        _step_bar(is_shown=ranks.is_first) as bars,
    ):
        report = search_to_file(
            predictor,
            sources,
            target,
            made_of={"weights": sha256(opened.weights_path), "model": asdict(spec.model)},
            resume=resume,
            ranks=ranks,
            watch=bars.predicting,
            show=None if draw is None else show,
        )
    seconds = time.monotonic() - started
    if ranks.is_first and report.num_full:
        limit_ = spec.predict.max_detections
        _console.print(
            f"warning: in {report.num_full} images {limit_} objects were found, which is predict.max_detections; "
            "others were cut off",
            markup=False,
            soft_wrap=True,
        )
    if ranks.is_first:
        _answer(
            json,
            {
                "run": str(run),
                "num_images": len(sources),
                "skipped_images": [str(sources[index].path) for index in report.skipped],
                "num_detections": report.num_results,
                "seconds": round(seconds, 3),
                "output": str(target),
            },
        )


@app.command
def evaluate(
    detections: Path,
    annotations: Path,
    /,
    *,
    limit: Count | None = None,
    max_detections: Annotated[int, Parameter(validator=validators.Number(gte=10))] = 100,
    sizes: Annotated[tuple[float, ...] | None, Parameter(consume_multiple=True, negative=())] = None,
    details: Annotated[bool, Parameter(negative=())] = False,
    curve: Path | None = None,
    against: Path | None = None,
    json: Json = False,
) -> None:
    """Score detections against the truth: the 12 COCO numbers and, if asked for, where they come from.

    Args:
        detections: COCO result JSON.
        annotations: COCO JSON; its images are not needed.
        limit: score only the first this many images.
        max_detections: the best so many of each image and class count; COCO's numbers are those for 100.
        sizes: with --details, where bins of object sizes end, image pixels; the paper's 0 25 50 100 200 300 otherwise.
        details: tell scores by class and by size, the recall whatever the class, and false positives per image.
        curve: a picture of precision over recall to write, .png, .svg or .pdf.
        against: other detections of the same images; tells how far their AP is from these, and the middle 95 % of what
            other such images would say (a paired bootstrap).
        json: print one JSON object and nothing else.
    """
    import numpy as np

    from sniper.data.datasets import load_dataset
    from sniper.evaluation.coco import check_detections_match, load_detections
    from sniper.evaluation.coco import evaluate as score
    from sniper.evaluation.diagnosis import PAPER_SIZES, diagnose
    from sniper.reports.curves import CURVE_SUFFIXES, draw_precision, show_diagnosis

    _check_sizes(sizes, details=details)
    if curve is not None:
        _check_folder(curve)
        if curve.suffix.lower() not in CURVE_SUFFIXES:
            raise ConfigError(f"--curve {curve}: wanted a name that ends in {', '.join(CURVE_SUFFIXES)}")
    loaded = load_dataset(annotations, has_images=False)
    truth = loaded.to_coco()
    found, other = (None if path is None else load_detections(path) for path in (detections, against))
    assert found is not None
    check_detections_match(found, truth)
    if other is not None:
        with _told_of(f"--against {against}"):
            check_detections_match(other, truth)
    if limit is not None:
        loaded = loaded.select(np.arange(min(limit, len(loaded))))
        truth = loaded.to_coco()
        kept = set(loaded.image_ids.tolist())
        found = [entry for entry in found if entry["image_id"] in kept]
        other = None if other is None else [entry for entry in other if entry["image_id"] in kept]
    scores = score(found, truth, max_detections=max_detections)
    if scores.num_cut:
        _console.print(
            f"warning: {scores.num_cut} times an image has more than {max_detections} detections of one class; "
            f"only the best {max_detections} count (--max-detections)",
            markup=False,
            soft_wrap=True,
        )
    told: dict[str, Any] = dict(scores.as_dict())
    if other is not None:
        told |= _compared(found, other, truth, max_detections=max_detections)
    if details or curve is not None:
        bins = PAPER_SIZES if sizes is None else (*sizes, math.inf)
        diagnosis = diagnose(found, truth, max_detections=max_detections, sizes=bins)
        if curve is not None:
            draw_precision(diagnosis, curve)
            told["curve"] = str(curve)
        if details and json:
            told |= diagnosis.as_dict()
        elif details:
            for table in show_diagnosis(diagnosis):
                Console().print(table)
    _answer(json, told)


@app.command
def demo(
    *,
    run: Path = Path("runs/demo"),
    device: Device = None,
    json: Json = False,
) -> None:
    """Tell the whole story on a made-up world: draw it, train on it, find its objects, score them, show pictures.

    Args:
        run: folder of the run; it must not exist.
        device: where to compute, such as cpu or cuda:0; a GPU if there is one.
        json: print one JSON object and nothing else.
    """
    from sniper.demo.run import run_demo

    with _step_bar() as bars:
        told = run_demo(run, device=_device(device), watch=bars.step, log=_console.print)
    _answer(json, told)


def _experiment(config: Path | None) -> "ExperimentSpec":
    """Read an experiment; without one, the paper's."""
    from sniper.config.experiment import ExperimentSpec
    from sniper.config.loading import load_experiment

    return ExperimentSpec() if config is None else load_experiment(config)


def _choose_chips(
    annotations: "Dataset", spec: "ExperimentSpec", proposals: Path | None, *, seed: int
) -> "ChipTable":
    """Choose the positive chips of a data set and, from proposals, the negative ones."""
    import numpy as np

    from sniper.data.epoch import build_table
    from sniper.inference.proposals import ProposalStore, add_negatives

    generator = np.random.default_rng(seed)
    table = build_table(annotations, spec.pyramid, generator=generator)
    if proposals is None:
        return table
    store = ProposalStore.open(proposals, annotations)
    return add_negatives(table, store, spec.negatives, pyramid=spec.pyramid, generator=generator)


def _show_plan(page: "PlanPage", folder: Path) -> None:
    """Print a plan as tables."""
    from sniper.planning.tables import draw_levels, draw_pixels, draw_suggestions

    budget = page.cost
    out = Console()
    out.print(
        f"{budget.num_images:,} images, {budget.num_images_with_boxes:,} with boxes; "
        f"{budget.num_required:,} boxes to cover, {budget.num_uncovered} covered by no chip; "
        f"{budget.num_steps(page.batch_size):,} steps of {page.batch_size} chips an epoch; "
        f"{page.num_crowded:,} chips show more than {page.crowded_above} boxes"
        + (
            f"; {budget.num_negatives_per_epoch:,} negative chips an epoch, out of {budget.num_negatives:,}"
            if budget.num_negatives
            else ""
        ),
        highlight=False,
    )
    for table in (draw_levels(budget), draw_pixels(budget), draw_suggestions(page)):
        out.print(table)
    out.print(f"to look at: {folder / 'plan.html'}", soft_wrap=True, markup=False)
    if not page.suggestions:
        out.print("no pyramid was found that brings so many boxes to a useful size; try a lower --share")
    else:
        out.print(f"to train:   sniper train {folder / 'suggested.yaml'}", soft_wrap=True, markup=False)


def _as_overrides(tokens: Sequence[str]) -> dict[str, str]:
    """Read `--section.field VALUE` and `--section.field=VALUE`."""
    overrides = {}
    rest = list(tokens)
    while rest:
        token = rest.pop(0)
        name, has_value, value = token.removeprefix("--").partition("=")
        if not token.startswith("--"):
            raise ConfigError(f"{token}: wanted --section.field VALUE")
        if not has_value:
            if not rest:
                raise ConfigError(f"{token}: a value is missing")
            value = rest.pop(0)
        overrides[name] = value
    return overrides


def _image_files(tokens: Sequence[str]) -> list[Path]:
    """Find the image files that folders, patterns, lists and names stand for."""
    from sniper.data.images.files import SUFFIXES

    files: dict[Path, None] = {}
    for token in tokens:
        path = Path(token)
        if not token:
            raise ConfigError("an image file has no name")
        if path.is_dir():
            found = sorted(one for one in path.rglob("*") if one.suffix.lower() in SUFFIXES)
        elif path.suffix.lower() == ".txt":
            try:
                lines = path.read_text(encoding="utf-8-sig").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"{path}: cannot be read as a list of images ({error})") from error
            found = [path.parent / line.strip() for line in lines if line.strip()]
        elif not path.exists() and any(mark in token for mark in "*?["):
            matching = (Path(one) for one in glob(token, recursive=True))
            found = sorted(one for one in matching if one.suffix.lower() in SUFFIXES and one.is_file())
        else:
            found = [path]
        if not found:
            raise ConfigError(f"{token}: there is no image")
        files |= dict.fromkeys(found)
    return list(files)


def _images_to_search(
    annotations: Path | None, image_root: Path | None, spec: "ExperimentSpec", run: Path
) -> "Dataset":
    """Load the annotations whose images are to be searched."""
    from sniper.data.datasets import load_dataset

    if annotations is None:
        return _load_source(spec.data.test, "data.test.annotations", run / "config.yaml", spec.data)
    loaded = load_dataset(
        annotations,
        image_root=image_root,
        read=spec.data.read,
        skips_bad_images=spec.data.on_bad_image == "skip",
    )
    _warn(loaded)
    return loaded


def _load_source(source: "SourceSpec", name: str, config: Path, data: "DataSpec") -> "Dataset":
    """Load a data set that an experiment names."""
    from sniper.data.datasets import load_dataset

    if not source.annotations:
        raise ConfigError(f"{config}: {name} is missing")
    root = None if source.images is None else Path(source.images)
    loaded = load_dataset(
        Path(source.annotations),
        image_root=root,
        read=data.read,
        skips_bad_images=data.on_bad_image == "skip",
    )
    _warn(loaded)
    return loaded


def _check_sizes(sizes: tuple[float, ...] | None, *, details: bool) -> None:
    """Refuse bins of sizes that do not rise, and such as nothing would show."""
    if sizes is None:
        return
    is_rising = all(0 <= low < high for low, high in pairwise((*sizes, math.inf)))
    if not details or not is_rising:
        raise ConfigError(
            f"--sizes goes with --details, from 0 or more and rising: {' '.join(map(str, sizes))}"
        )


@contextmanager
def _told_of(name: str) -> Iterator[None]:
    """Say what detections a problem is of."""
    try:
        yield
    except DetectionsError as error:
        raise DetectionsError(f"{name}: {error}") from error


def _compared(
    found: Sequence[Mapping[str, Any]],
    other: Sequence[Mapping[str, Any]],
    truth: Mapping[str, Any],
    *,
    max_detections: int,
) -> dict[str, float]:
    """Tell how far the AP is from that of other detections, and what other images would say."""
    import numpy as np

    from sniper.evaluation.comparison import ResampledAP, compare

    if len(truth["images"]) < 2 or all(one.get("iscrowd") for one in truth["annotations"]):
        raise ConfigError("--against: to compare on other images takes two images, and objects in them")
    with _console.status("drawing other images"):
        difference = compare(
            [ResampledAP(other, truth, max_detections=max_detections)],
            [ResampledAP(found, truth, max_detections=max_detections)],
            generator=np.random.default_rng(0),
        )
    return {
        "ap_difference": difference.difference,
        "ap_difference_low": difference.low,
        "ap_difference_high": difference.high,
    }


def _check_folder(path: Path) -> None:
    if not path.parent.is_dir():
        raise ConfigError(f"{path}: there is no folder {path.parent}")


def _device(name: str | None) -> "torch.device":
    """Find the device to compute on; under torchrun each process has the GPU of its number."""
    import torch

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    own = os.environ.get("LOCAL_RANK", "0") if name == "cuda" else None
    try:
        device = torch.device(name if own is None else f"cuda:{own}")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        first_line = str(error).partition("\n")[0]
        raise ConfigError(f"--device {name}: cannot be used ({first_line})") from error
    return device


def _warn(annotations: "Dataset") -> None:
    for warning in annotations.warnings:
        _print_warning(warning)


def _print_warning(warning: str) -> None:
    _console.print(f"warning: {warning}", markup=False, soft_wrap=True)


def _answer(is_json: bool, values: Mapping[str, Any]) -> None:
    """Print the outcome: one JSON object, or a line for each value."""
    if is_json:
        print(json_module.dumps(values))
        return
    width = max(len(name) for name in values)
    for name, value in values.items():
        print(f"{name:<{width}}  {f'{value:.4g}' if isinstance(value, float) else value}")


@contextmanager
def _step_bar(*, is_shown: bool = True) -> Iterator["_Bars"]:
    """Show a bar for each stage; on a console that is no terminal, a line now and then."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[told]}"),
        TimeRemainingColumn(),
    )
    is_bar = is_shown and _console.is_terminal
    with Progress(*columns, console=_console, transient=True, disable=not is_bar) as progress:
        yield _Bars(progress, is_shown=is_shown)


class _Bars:
    """One bar for each stage, as it begins."""

    def __init__(self, progress: "Progress", *, is_shown: bool) -> None:
        self._progress = progress
        self._is_shown = is_shown
        self._tasks: dict[str, TaskID] = {}
        self._spoken = time.monotonic()

    def step(self, report: "StepReport") -> None:
        """Show how far a training is."""
        epoch = f"{report.epoch:.2f}/{report.epochs:g}"
        told = f"epoch {epoch}  loss {report.loss:.3f}  {report.chips_per_second:.1f} chips/s"
        done = report.progress.step
        self._show(report.stage, told, done=done, total=done + report.steps_left, unit="step")

    def mining(self, num_done: int, num_images: int) -> None:
        """Show how far a mining is."""
        self._show(
            "mine", f"{num_done} of {num_images} images", done=num_done, total=num_images, unit="image"
        )

    def predicting(self, num_done: int, num_images: int) -> None:
        """Show how far a search is."""
        self._show(
            "predict", f"{num_done} of {num_images} images", done=num_done, total=num_images, unit="image"
        )

    def scores(self, epoch: float, scores: Mapping[str, float]) -> None:
        """Tell the scores on the test images."""
        told = "  ".join(f"{name} {scores[name]:.3f}" for name in ("ap", "ap50", "ap75", "ar_100"))
        _console.print(f"epoch {epoch:g}  {told}")

    def _show(self, stage: str, told: str, *, done: int, total: int, unit: str) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=total, told=told)
        self._progress.update(self._tasks[stage], completed=done, total=total, told=told)
        now = time.monotonic()
        if self._is_shown and not _console.is_terminal and (now - self._spoken > 30 or done == total):
            _console.print(f"{stage}  {unit} {done}  {told}")
            self._spoken = now
