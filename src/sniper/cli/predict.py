"""`sniper predict`: detect objects in images with the detector of a run."""

import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter, validators

from sniper.cli.images import check_pictures_folder, find_image_files, searched_folders
from sniper.cli.inputs import check_results_file, load_images, load_split, scored_split
from sniper.cli.locks import locking
from sniper.cli.options import (
    ANNOTATIONS_HELP,
    Checkpoint,
    Device,
    Engine,
    FollowLinks,
    Images,
    Json,
    Limit,
    ScoredSplit,
    default,
    flag,
    output_option,
)
from sniper.cli.output import announce_compilation, print_line, print_progress, print_result, print_warnings
from sniper.cli.progress import show_progress
from sniper.cli.report_page import page_reporter, update_scored_page
from sniper.cli.search import (
    describe_focus,
    describe_match,
    describe_weights,
    image_folders,
    list_images,
    load_detector,
    load_exported_detector,
    load_library_detector,
    match_classes,
    naming_kept_images,
    parse_checkpoint,
    split_overrides,
)
from sniper.errors import ConfigError, ImageError, count_and_list, counted
from sniper.remote import is_remote
from sniper.runs.lock import lock_file

if TYPE_CHECKING:
    from sniper.cli.search import LoadedDetector
    from sniper.config.experiment import ExperimentSpec
    from sniper.data.datasets import Dataset
    from sniper.data.datasets.categories import CategoryMatch
    from sniper.data.spec import ReadSpec
    from sniper.geometry import Detections
    from sniper.inference.detector import Detector
    from sniper.inference.exported import Engine as EngineName
    from sniper.inference.exported import ExportedFile
    from sniper.inference.georeferenced import GeoreferencedImages
    from sniper.inference.results import ImageToSearch
    from sniper.runs.run import Run

_UNCALIBRATED = (
    "the run has chosen no score on validation images, so pictures show detections from {} on (--min-score)"
)
_DEFAULT_OUTPUT = Path("detections.json")
_OF_ANNOTATIONS = (".json", ".geojson", ".yaml", ".yml", ".xml", ".csv")
_MAX_STEM = 60  # characters: names of files have at most 255 bytes


def _locks(
    run: Path | None, output: Path | None, detector: str | None, **_: Any
) -> Iterator[AbstractContextManager[None]]:
    if detector is not None:
        yield lock_file(output or _DEFAULT_OUTPUT, option="-o")
    elif run is not None and not is_remote(run) and run.is_dir():
        yield lock_file(output or run / _DEFAULT_OUTPUT, option="-o")


@locking(_locks)
def predict(
    run: Annotated[
        Path | None,
        Parameter(
            allow_leading_hyphen=True,  # with --detector, a field may come first
            help="Folder of the run, or a file of `sniper export`; not with --detector.",
            show_default=False,
        ),
    ] = None,
    /,
    *files: Annotated[
        str,
        Parameter(
            allow_leading_hyphen=True,
            help="Image files, folders of them, quoted patterns such as 'shots/**/*.jpg', or text files (.txt) with "
            "one path per line. Without any, the images of --annotations, or else of data.test of the run. Options "
            "--predict.FIELD VALUE and --data.read.FIELD VALUE set fields of the sections predict and data.read, in "
            "place of the run's values.",
        ),
    ],
    detector: Annotated[
        str | None,
        Parameter(
            help="Detector to search with in place of a run: torchvision:NAME, with torchvision's weights, or "
            "torchvision:NAME@FILE, with those of a file; such as torchvision:fcos_resnet50_fpn. Or transformers:NAME, "
            "with a name on the Hugging Face hub or a folder.",
            show_default=False,
        ),
    ] = None,
    annotations: Annotated[
        Path | None,
        Parameter(
            help=f"Data set whose images are searched; results have its image ids. {ANNOTATIONS_HELP}",
            show_default=default("data.test of the run"),
        ),
    ] = None,
    images: Images = None,
    split: ScoredSplit = None,
    follow_links: FollowLinks = False,
    output: Annotated[
        Path | None,
        output_option(
            "COCO result file to write.",
            default="RUN/detections.json; detections.json with --detector",
        ),
    ] = None,
    gpkg: Annotated[
        bool, flag("Write detections of georeferenced images as GeoPackage, too, in the CRS of each image.")
    ] = False,
    draw: Annotated[
        Path | None,
        Parameter(help="Folder for pictures of the detections and, with annotations, of missed objects."),
    ] = None,
    min_score: Annotated[
        float | None,
        Parameter(
            validator=validators.Number(gte=0, lte=1),
            help="Show detections from this score on: in pictures, GeoJSON and num_shown. The result file has all.",
            show_default=default("where F1 was best on the validation images of the run, else 0.3"),
        ),
    ] = None,
    checkpoint: Checkpoint = "best",
    resume: Annotated[bool, flag("Continue a stopped search.")] = False,
    limit: Limit = None,
    engine: Engine = "torch",
    device: Device = None,
    json: Json = False,
) -> None:
    """Detect objects in images with the detector of a run, with an exported one, or with one of a library.

    Detections of georeferenced images are written as GeoJSON, too, beside the result file. Under torchrun, each process
    searches its share of the images.
    """
    from sniper.geometry.detections import DEFAULT_MIN_SCORE
    from sniper.inference.results import search_to_file
    from sniper.runs.processes import Processes

    given = () if run is None else (str(run),)
    paths, overrides = split_overrides((*given, *files), sections=("predict", "data.read"))
    if detector is None:
        if run is None or paths[:1] != [str(run)]:
            raise ConfigError("RUN is missing: expected the folder of a run first, or --detector")
        paths.pop(0)
    elif run is not None and not is_remote(run) and (run / "config.yaml").is_file():
        raise ConfigError(
            f"--detector {detector}: searches in place of a run; leave out {run}, or --detector"
        )
    searcher = _Searcher.of(run, detector, checkpoint=checkpoint, engine=engine, device=device)
    spec = searcher.experiment(overrides, follow_links=follow_links)
    spec.data.configure_remote()
    truth = _load_truth(spec, paths, annotations, images, split, searcher=searcher)
    sources = list_images(_find_files(paths) if truth is None else truth)[:limit]
    target = output or searcher.folder / _DEFAULT_OUTPUT
    if draw is not None:
        _check_pictures_folder(draw, sources, truth, paths=paths)
    _make_folders(target, draw)
    geo_files = _GeoFiles.find(sources, target, spec=spec, has_gpkg=gpkg)
    check_results_file(target)
    loaded = searcher.load(spec=spec)
    model = loaded.detector
    match = match_classes(model, truth, run=searcher.name)
    if Processes.from_environment().is_first:
        print_warnings(describe_match(match))
        searcher.print_choices(loaded, spec=spec)
    if min_score is None:
        min_score = DEFAULT_MIN_SCORE if model.min_score is None else model.min_score
        if draw is not None and model.min_score is None and Processes.from_environment().is_first:
            print_warnings([_UNCALIBRATED.format(min_score)])
    drawer = (
        None
        if draw is None
        else _drawer(draw, sources, truth, detector=model, match=match, min_score=min_score)
    )
    started = time.monotonic()
    with (
        Processes.from_environment().process_group(model.device) as processes,
        show_progress(is_shown=processes.is_first) as bars,
        announce_compilation(is_shown=processes.is_first),
        naming_kept_images("--resume continues with the others"),
        _naming_skip(searcher.run),
    ):
        report = search_to_file(
            model,
            sources,
            target,
            match=match,
            min_score=min_score,
            source=loaded.source,
            existing="resume" if resume else "replace",
            processes=processes,
            on_progress=bars.predicting,
            on_image=drawer,
            on_results=partial(geo_files.write, min_score=min_score),
        )
    if not processes.is_first:
        return
    if report.num_cut:
        print_warnings(
            [
                f"{counted(report.num_cut, 'image has', 'images have')} as many detections of at least {min_score:g} "
                f"as predict.max_detections allows ({spec.predict.max_detections}), and perhaps had more"
            ]
        )
    opened = searcher.run
    is_on_page = opened is not None and target.parent.absolute() == searcher.folder.absolute()
    if opened is not None and is_on_page:
        _update_page(opened, loaded, target, sources, truth, match=match, min_score=min_score)
    result = {
        "detector" if opened is None else "run": searcher.name,
        "num_images": len(sources),
        "skipped_images": [str(sources[index].path) for index in report.skipped],
        "num_detections": report.num_results,
        "min_score": min_score,
        "num_shown": report.num_shown,
        "seconds": round(time.monotonic() - started, 3),
        "output": str(target),
        **geo_files.as_dict(),
    }
    if opened is not None and is_on_page and opened.report_path.exists():
        result["page"] = str(opened.report_path)
    print_result(result if json else _summary(result, draw=draw), is_json=json)
    if not json and not paths and annotations is None:
        print_line(f"next: sniper evaluate {shlex.quote(searcher.name)}")


def _describe_other_file(path: Path) -> str:
    """Describe what is wrong with a file in place of a run."""
    from sniper.inference.detector import EXPORTED_SUFFIXES

    graph = path.with_suffix(".xml")
    if path.suffix == ".bin" and graph.is_file():
        return f"{path}: has the weights of an exported model; name the file beside it, {graph}"
    suffixes = ", ".join(EXPORTED_SUFFIXES)
    return f"{path}: there is no run; expected its folder, or a model that sniper export has written ({suffixes})"


@dataclass(frozen=True, kw_only=True, eq=False)
class _Searcher:
    """The detector that searches: of a run, of a library, or exported.

    Attributes:
        name: as it was given: the folder of the run, the name of the detector, or the exported file.
        run: None for another detector.
        exported: None for another detector.
        folder: of the run, or the working folder.
        checkpoint: of the run.
        engine: that runs the detector of a run.
        device: as it was given.
    """

    name: str
    run: "Run | None" = None
    exported: "ExportedFile | None" = None
    folder: Path = Path()
    checkpoint: str = "best"
    engine: "EngineName" = "torch"
    device: str | None = None

    @classmethod
    def of(
        cls,
        run: Path | None,
        detector: str | None,
        *,
        checkpoint: str,
        engine: "EngineName",
        device: str | None,
    ) -> "_Searcher":
        """Return the detector that the arguments of the command name.

        Raises:
            ConfigError: if they name none, or a checkpoint or an engine of another detector than a run.
        """
        from sniper.inference.detector import EXPORTED_SUFFIXES

        if detector is None and is_remote(run):
            raise ConfigError(f"{run}: runs and models are not read from URLs; download it first")
        is_exported = (
            detector is None and run is not None and run.suffix in EXPORTED_SUFFIXES and not run.is_dir()
        )
        if detector is not None or is_exported:
            kind = str(run) if is_exported else "--detector"
            if checkpoint != "best":
                raise ConfigError(f"--checkpoint: is of a run, and excludes {kind}")
            if engine != "torch":
                hint = (
                    f"{run} has its own, by its suffix; leave it out, or give the run, or export that for {engine}"
                    if is_exported
                    else "--detector is run by torch; write it with sniper export first"
                )
                raise ConfigError(f"--engine {engine}: chooses what runs the detector of a run; {hint}")
        if detector is not None:
            return cls(name=detector, device=device)
        assert run is not None  # one of the two was given
        if run.is_file() and not is_exported:
            raise ConfigError(_describe_other_file(run))
        if is_exported:
            from sniper.inference.exported import ExportedFile

            return cls(name=str(run), exported=ExportedFile.open(run, device=device), device=device)
        from sniper.runs.run import Run

        opened = Run.open(run)
        return cls(name=str(run), run=opened, folder=run, checkpoint=checkpoint, engine=engine, device=device)

    def experiment(self, overrides: Mapping[str, str], *, follow_links: bool) -> "ExperimentSpec":
        """Return the experiment to search with."""
        from sniper.config.experiment import ExperimentSpec
        from sniper.config.loading import load_experiment, merge_experiment

        if self.exported is not None:
            base = self.exported.experiment
        else:
            base = ExperimentSpec() if self.run is None else load_experiment(self.run.config_path)
        spec = merge_experiment(base, None, overrides=overrides)
        return replace(spec, data=replace(spec.data, follow_links=True)) if follow_links else spec

    def load(self, *, spec: "ExperimentSpec") -> "LoadedDetector":
        """Load the detector."""
        if self.exported is not None:
            return load_exported_detector(self.exported, Path(self.name), spec=spec)
        if self.run is None:
            return load_library_detector(self.name, self.device, spec=spec)
        return load_detector(
            self.run,
            self.device,
            spec=spec,
            checkpoint=parse_checkpoint(self.checkpoint),
            engine=self.engine,
        )

    def print_choices(self, loaded: "LoadedDetector", *, spec: "ExperimentSpec") -> None:
        """Print which checkpoint of a run is used, and which focus."""
        if self.run is not None:
            print_progress(describe_weights(self.run, loaded.step))
        focus = describe_focus(loaded, spec, run=self.run)
        if focus is not None:
            print_progress(focus)


def _update_page(
    run: "Run",
    loaded: "LoadedDetector",
    results: Path,
    sources: Sequence["ImageToSearch"],
    truth: "Dataset | None",
    *,
    match: "CategoryMatch",
    min_score: float,
) -> None:
    """Write the page of the run with the detections; what fails is a warning."""
    if truth is None:
        reporter = page_reporter(run)
        reporter.save_searched(
            results,
            sources,
            categories=match.categories,
            read=loaded.detector.data.read,
            min_score=min_score,
            step=loaded.step,
        )
        reporter.write()
        return
    update_scored_page(
        run, loaded, results, truth, num_images=len(sources), min_score=loaded.detector.min_score
    )


@contextmanager
def _naming_skip(run: "Run | None") -> Iterator[None]:
    """Add to the error about an image that cannot be read how to go on without it."""
    try:
        yield
    except ImageError as error:
        if run is None:
            raise
        raise ImageError(
            f"{error}; to skip such images, set data.on_bad_image to skip in {run.config_path}, and continue with "
            "--resume"
        ) from error


def _summary(result: Mapping[str, Any], *, draw: Path | None) -> dict[str, Any]:
    """Return the result of a search as lines for people."""
    name = "run" if "run" in result else "detector"
    lines: dict[str, Any] = {name: result[name], "images": f"{result['num_images']:,}"}
    if result["skipped_images"]:
        lines["not readable"] = count_and_list(result["skipped_images"], separator=", ")
    shown = f"{result['num_shown']:,} with a score of at least {result['min_score']:.3g}"
    lines["detections"] = f"{result['num_detections']:,}; {shown}"
    lines["seconds"] = f"{result['seconds']:.1f}"
    lines["results"] = result["output"]
    lines |= {
        name: result[key] for name, key in (("GeoJSON", "geojson"), ("GeoPackage", "gpkg")) if result[key]
    }
    if draw is not None:
        lines["pictures"] = str(draw)
    if "page" in result:
        lines["page"] = result["page"]
    return lines


def _load_truth(
    spec: "ExperimentSpec",
    files: Sequence[str],
    annotations: Path | None,
    images: Path | None,
    split: str | None,
    *,
    searcher: _Searcher,
) -> "Dataset | None":
    """Load the data set whose images are searched; None if image files are given instead."""
    if files and annotations is not None:
        raise ConfigError("expected either image files or --annotations, not both")
    if images is not None and annotations is None:
        raise ConfigError("--images requires --annotations")
    if split is not None and annotations is None:
        raise ConfigError("--split requires --annotations")
    for file in files:
        if Path(file).suffix.lower() in _OF_ANNOTATIONS and Path(file).is_file():
            raise ConfigError(
                f"{file}: is no image; the images of a data set are searched by --annotations {file}"
            )
    if files:
        return None
    if annotations is not None:
        return load_images(annotations, images=images, split=scored_split(annotations, split), data=spec.data)
    if searcher.run is None:
        option = "" if searcher.exported is not None else "--detector "
        raise ConfigError(f"{option}{searcher.name}: needs images: files, folders or --annotations")
    return load_split(spec, "test")


def _find_files(arguments: Sequence[str]) -> list[Path]:
    """Find the image files that arguments stand for, and print what else is there."""
    found = find_image_files(arguments)
    print_warnings(found.warnings)
    return found.images


def _check_pictures_folder(
    folder: Path, sources: "Sequence[ImageToSearch]", truth: "Dataset | None", *, paths: Sequence[str]
) -> None:
    """Check that pictures do not get among the images that are searched."""
    searched = searched_folders(paths) if truth is None else image_folders(truth)
    check_pictures_folder(folder, [source.path for source in sources], searched=searched)


def _make_folders(target: Path, draw: Path | None) -> None:
    if target.is_dir():
        raise ConfigError(f"{target}: expected a file to write, this is a folder")
    for folder in (target.parent, draw):
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)


@dataclass(frozen=True, kw_only=True, eq=False)
class _GeoFiles:
    """What is written of georeferenced images beside the result file.

    Attributes:
        images: all that are searched.
        found: which of them are georeferenced.
        read: how their files become pixels.
        geojson: file to write.
        gpkg: file to write; None if none is wanted.
    """

    images: Sequence["ImageToSearch"]
    found: "GeoreferencedImages"
    read: "ReadSpec"
    geojson: Path
    gpkg: Path | None

    @classmethod
    def find(
        cls, images: Sequence["ImageToSearch"], target: Path, *, spec: "ExperimentSpec", has_gpkg: bool
    ) -> "_GeoFiles":
        """Find the georeferenced images, print which of them cannot be used, and check the files to write.

        Only the first process reads their headers, as it writes the files.
        """
        from sniper.inference.georeferenced import GeoreferencedImages, check_replaceable
        from sniper.runs.processes import Processes

        geojson, gpkg = target.with_suffix(".geojson"), target.with_suffix(".gpkg") if has_gpkg else None
        if target in (geojson, gpkg):
            raise ConfigError(
                f"-o {target}: expected the COCO result file; {target.suffix} is written beside it, for georeferenced "
                f"images: -o {target.with_suffix('.json')}"
            )
        is_first = Processes.from_environment().is_first
        found = GeoreferencedImages.find(images if is_first else [], spec.data.read)
        if found.indices or gpkg is not None:
            check_replaceable(geojson, gpkg)
        warnings = list(found.warnings)
        if is_first and gpkg is not None and not found.indices:
            warnings.append("none of the images has a georeference, so no GeoPackage is written")
        print_warnings(warnings)
        return cls(images=images, found=found, read=spec.data.read, geojson=geojson, gpkg=gpkg)

    def write(self, read: Callable[[int], "Detections"], *, min_score: float) -> None:
        """Write the detections to look at."""
        from sniper.inference.georeferenced import remove_earlier, write_georeferenced

        if not self.found.indices:
            remove_earlier(self.geojson)
            return
        warnings = write_georeferenced(
            self.found,
            self.images,
            lambda index: read(index).confident(min_score),
            read=self.read,
            geojson=self.geojson,
            gpkg=self.gpkg,
        )
        print_warnings(warnings)

    def as_dict(self) -> dict[str, str | None]:
        """Return the files that are written, by the keys of the command's result."""
        has_any = bool(self.found.indices)
        return {
            "geojson": str(self.geojson) if has_any else None,
            "gpkg": str(self.gpkg) if has_any and self.gpkg is not None else None,
        }


def _drawer(
    folder: Path,
    sources: Sequence["ImageToSearch"],
    truth: "Dataset | None",
    *,
    detector: "Detector",
    match: "CategoryMatch",
    min_score: float,
) -> Callable[[int, "Detections"], None]:
    """Build the callback that draws the detections of an image beside its annotations."""
    from sniper.inference.sources import open_source
    from sniper.reports.pictures import draw_detections

    def draw(index: int, detections: "Detections") -> None:
        image = sources[index]
        draw_detections(
            open_source(image.record or image.path, detector.data.read),
            match.relabel(detections),
            folder / picture_name(index, image),
            categories=match.categories,
            ground_truth=None if truth is None else truth[index],
            min_score=min_score,
        )

    return draw


def picture_name(index: int, image: "ImageToSearch") -> str:
    """Return a name that no other image has: by its id or, if that is text, by its position."""
    number = image.image_id if isinstance(image.image_id, int) else index + 1
    return f"{number:06d}_{image.path.stem[:_MAX_STEM]}.jpg"
