"""`sniper evaluate`: score the detector of a run, or detections, against annotations."""

import json as json_module
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from itertools import pairwise, product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter, validators

from sniper.cli.inputs import (
    check_parent,
    check_results_file,
    load_annotations,
    load_images,
    load_split,
    scored_split,
)
from sniper.cli.locks import locking
from sniper.cli.options import (
    ANNOTATIONS_HELP,
    Checkpoint,
    ClassProperty,
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
from sniper.cli.output import (
    announce_compilation,
    console,
    fits,
    print_line,
    print_paragraph,
    print_progress,
    print_result,
    print_table,
    print_warnings,
)
from sniper.cli.progress import show_progress
from sniper.cli.proposals import evaluate_proposals
from sniper.cli.report_page import update_scored_page
from sniper.cli.search import (
    describe_focus,
    describe_match,
    describe_weights,
    list_images,
    load_detector,
    match_classes,
    naming_kept_images,
    parse_checkpoint,
    split_overrides,
)
from sniper.errors import AnnotationError, ConfigError, DetectionsError, count_and_list, counted
from sniper.files import atomic_write, expand_path
from sniper.runs.lock import lock_file

if TYPE_CHECKING:
    from sniper.cli.search import LoadedDetector
    from sniper.config.experiment import ExperimentSpec
    from sniper.data.datasets import Dataset
    from sniper.evaluation.coco import Scores
    from sniper.evaluation.comparison import Difference
    from sniper.evaluation.confusion import ConfusionMatrix
    from sniper.evaluation.diagnosis import Diagnosis
    from sniper.evaluation.operating_point import MatchCounts, OperatingPoint
    from sniper.evaluation.pair import EvaluationPair, GroundTruth
    from sniper.inference.exported import Engine as EngineName
    from sniper.runs.run import CheckpointChoice

_MAX_SIZE = 100_000  # pixels; the square root of COCO's largest area

_MIN_DEFINED = 0.95  # of the resampled images, which otherwise give no bounds

_Choice = Literal["min_score", "validation_images", "scored_images"]


def _locks(
    run: Path, output: Path | None, *, proposals: bool, **_: Any
) -> Iterator[AbstractContextManager[None]]:
    if proposals:
        return
    folder = run / "evaluation" if run.is_dir() and output is None else output
    if folder is not None:
        yield lock_file(folder / "detections.json", option="-o")


@locking(_locks)
def evaluate(
    run: Annotated[
        Path,
        Parameter(
            help="Folder of a run, or COCO result file; with --proposals, a folder of `sniper mine` or a COCO result "
            "file."
        ),
    ],
    /,
    *annotations: Annotated[
        str,
        Parameter(
            allow_leading_hyphen=True,
            help=f"Data set to score against; for a run, by default its validation images. {ANNOTATIONS_HELP} "
            "Fields of the sections predict and data.read of a run are set by --predict.FIELD VALUE and "
            "--data.read.FIELD VALUE, such as --predict.merge hard.",
        ),
    ],
    images: Images = None,
    split: ScoredSplit = None,
    follow_links: FollowLinks = False,
    crowds: Annotated[
        Literal["ignore", "objects"] | None,
        Parameter(
            help="Take boxes that are marked as crowds as regions to ignore, or for objects.",
            show_default=default("as the run is configured, else ignore"),
        ),
    ] = None,
    class_property: ClassProperty = None,
    limit: Limit = None,
    max_detections: Annotated[
        int,
        Parameter(
            validator=validators.Number(gte=10, lte=1_000_000),
            help="Count only this many of the best detections per image and class; COCO's own value is 100. Precision, "
            "recall, F1 and the confusion matrix count all.",
        ),
    ] = 100,
    min_score: Annotated[
        float | None,
        Parameter(
            validator=validators.Number(gte=0, lte=1),
            help="Score from which on precision, recall, F1 and the confusion matrix count detections.",
            show_default=default(
                "where F1 was best on the validation images of the run, else on these images"
            ),
        ),
    ] = None,
    drop_duplicates: Annotated[
        bool | None,
        Parameter(
            help="Count no second box on an object in precision, recall, F1 and the confusion matrix, as pictures "
            "show none. AP, AR and false positives per image always count all.",
            show_default=default("for runs"),
        ),
    ] = None,
    details: Annotated[
        bool,
        flag("Add AR by class, scores by object size, and class-agnostic recall."),
    ] = False,
    sizes: Annotated[
        tuple[float, ...] | None,
        Parameter(
            consume_multiple=True,
            negative=(),
            help="With --details: edges of the bins of object sizes, in image pixels; the last bin is open.",
            show_default=default("0 25 50 100 200 300, as in the paper"),
        ),
    ] = None,
    curve: Annotated[
        Path | None, Parameter(help="Precision-recall curve to draw (.png, .svg or .pdf).")
    ] = None,
    against: Annotated[
        Path | None,
        Parameter(
            help="COCO result file of the same images to compare with: differences in AP and in false positives per "
            "image with their 95 % intervals, by a paired bootstrap over images."
        ),
    ] = None,
    proposals: Annotated[
        bool,
        flag(
            "Score the first argument as proposals, whatever their classes: recall with the best 100, 300 and 1000 of "
            "each image. Without a data set, proposals in the folder of a run are scored on data.train."
        ),
    ] = False,
    output: Annotated[
        Path | None,
        output_option(
            "Folder for scores.json, confusion.csv, confusion.png and, of a run, detections.json.",
            default="RUN/evaluation; none for detections",
        ),
    ] = None,
    checkpoint: Checkpoint = "best",
    engine: Engine = "torch",
    device: Device = None,
    json: Json = False,
) -> None:
    """Score the detector of a run on its validation images or another data set; or score detections.

    Prints the 12 COCO scores; false positives per image at 50, 80 and 90 % recall; precision, recall and F1 of each
    class at one score; and the confusion matrix. With detections, the image files are not needed. With a run, the
    images are searched, unless results of the same weights and settings are there. Under torchrun, each process
    searches its share of the images.
    """
    from sniper.files import no_garbage_collection

    _check_sizes(sizes, details=details)
    if curve is not None:
        _check_curve(curve)
    paths, overrides = split_overrides(annotations, sections=("predict", "data.read"))
    if proposals:
        _refuse_with_proposals(
            {
                "--images": images,
                "--follow-links": follow_links,
                "--class-property": class_property,
                "--max-detections": max_detections != 100,
                "--min-score": min_score is not None,
                "--drop-duplicates": drop_duplicates is not None,
                "--details": details,
                "--curve": curve,
                "--against": against,
                "--output": output,
                "--checkpoint": checkpoint != "best",
                "--engine": engine != "torch",
                "--device": device,
                **overrides,
            }
        )
        evaluate_proposals(run, _only(paths), split=split, crowds=crowds, limit=limit, json=json)
        return
    options = _Options(
        annotations=_only(paths),
        images=images,
        split=split,
        follow_links=follow_links,
        crowds=crowds,
        class_property=class_property,
        limit=limit,
        overrides=overrides,
        checkpoint=parse_checkpoint(checkpoint),
        engine=engine,
        device=device,
    )
    is_run = run.is_dir()
    output = run / "evaluation" if is_run and output is None else output
    subject = _search(run, options, output=output) if output and is_run else _open(run, options)
    if subject is None:  # another process scores
        return
    with no_garbage_collection():
        pair, other = _load_pairs(subject, against=against, limit=limit)
        report = _Report.of(
            pair,
            subject=subject,
            max_detections=max_detections,
            min_score=min_score,
            drops_duplicates=is_run if drop_duplicates is None else drop_duplicates,
        )
    answer = report.as_dict()
    differences = None if other is None else _compare(pair, other, max_detections=max_detections)
    for name, difference in (differences or {}).items():
        answer |= {
            f"{name}_difference": difference.difference,
            f"{name}_difference_low": difference.low,
            f"{name}_difference_high": difference.high,
        }
    diagnoses = None
    if details or curve is not None:
        diagnoses = _diagnose(pair, max_detections=max_detections, sizes=sizes, curve=curve)
        answer |= {"curve": str(curve)} if curve is not None else {}
        answer |= _details_as_dict(diagnoses) if details else {}
    if is_run:
        answer |= {"run": str(run), "detections": str(subject.detections)}
    answer = _with_null(answer)
    if output is not None:
        answer["output"] = str(output)
        if subject.searched is not None and output.parent.absolute() == run.absolute():
            from sniper.runs.run import Run

            loaded, dataset = subject.searched
            opened = Run.open(run)
            update_scored_page(
                opened,
                loaded,
                subject.detections,
                dataset,
                num_images=pair.truth.num_images,
                min_score=None if math.isnan(report.point.score) else report.point.score,
            )
            if opened.report_path.exists():
                answer["page"] = str(opened.report_path)
        _write(report.confusion, answer, output)
    if json:
        print_result(answer, is_json=True)
    else:
        report.show(answer, differences=differences, details=diagnoses if details else None)


@dataclass(frozen=True, kw_only=True)
class _Options:
    """Which images are scored, and how they are searched."""

    annotations: Path | None
    images: Path | None
    split: str | None
    follow_links: bool
    crowds: Literal["ignore", "objects"] | None
    class_property: str | None
    limit: int | None
    overrides: Mapping[str, str]
    checkpoint: "CheckpointChoice"
    engine: "EngineName"
    device: str | None


@dataclass(frozen=True, kw_only=True)
class _Subject:
    """What is scored.

    Attributes:
        detections: COCO results file.
        truth: of the images.
        min_score: score at which F1 was best on the validation images of the run; None if it is unknown.
        is_validation: whether these are the validation images of the run.
        searched: the detector that has searched the images, and their data set; None of a results file.
    """

    detections: Path
    truth: "GroundTruth"
    min_score: float | None = None
    is_validation: bool = False
    searched: "tuple[LoadedDetector, Dataset] | None" = None


def _only(paths: Sequence[str]) -> Path | None:
    """Return the path of the data set that is given, if any."""
    if len(paths) > 1:
        raise ConfigError(f"{paths[1]}: expected one data set, after {paths[0]}")
    return expand_path(paths[0]) if paths else None


def _refuse_with_proposals(options: Mapping[str, Any]) -> None:
    for name, value in options.items():
        if value:
            raise ConfigError(f"{name} is not used with --proposals")


def _open(detections: Path, options: _Options) -> _Subject:
    """Load the ground truth of a results file."""
    from sniper.data.spec import DataSpec
    from sniper.evaluation.pair import GroundTruth
    from sniper.inference.detector import EXPORTED_SUFFIXES

    if detections.suffix in EXPORTED_SUFFIXES:
        raise ConfigError(
            f"{detections}: is a detector; search images with it first: sniper predict {detections} --annotations DATA "
            "-o detections.json, then sniper evaluate detections.json DATA"
        )
    if options.annotations is None:
        if not detections.exists():
            raise ConfigError(f"{detections}: no such file or folder")
        raise ConfigError(f"{detections}: expected the folder of a run, or annotations after the result file")
    if (options.annotations / "config.yaml").is_file():
        raise ConfigError(
            f"{options.annotations}: the folder of a run comes first: sniper evaluate {options.annotations} "
            f"{detections}"
        )
    for name, value in (
        ("--images", options.images),
        ("--follow-links", options.follow_links),
        ("--engine", options.engine != "torch"),
        ("--device", options.device),
        ("--checkpoint", options.checkpoint != "best"),
        *options.overrides.items(),
    ):
        if value:
            raise ConfigError(f"{name} requires the folder of a run, not detections")
    dataset = load_annotations(
        options.annotations,
        images=None,
        split=scored_split(options.annotations, options.split),
        data=DataSpec(crowds=options.crowds or "ignore", class_property=options.class_property),
    )
    return _Subject(detections=detections, truth=GroundTruth.of(dataset))


def _search(run: Path, options: _Options, *, output: Path) -> _Subject | None:
    """Search images with the detector of a run, unless that was done; None in all but the first process."""
    from sniper.config.loading import load_experiment, merge_experiment
    from sniper.evaluation.pair import GroundTruth
    from sniper.inference.results import find_results, search_to_file
    from sniper.runs.processes import Processes
    from sniper.runs.run import Run

    opened = Run.open(run)
    check_results_file(output / "detections.json")
    output.mkdir(parents=True, exist_ok=True)
    spec = merge_experiment(load_experiment(opened.config_path), None, overrides=options.overrides)
    data = replace(spec.data, follow_links=spec.data.follow_links or options.follow_links)
    data = replace(data, class_property=options.class_property or data.class_property)
    spec = replace(spec, data=replace(data, crowds=options.crowds or data.crowds))
    dataset = _load_dataset(spec, options, run=run)
    sources = list_images(dataset)[: options.limit]
    loaded = load_detector(
        opened, options.device, spec=spec, checkpoint=options.checkpoint, engine=options.engine
    )
    detector = loaded.detector
    match = match_classes(detector, dataset, run=run)
    if Processes.from_environment().is_first:
        print_progress(describe_weights(opened, loaded.step))
        focus = describe_focus(loaded, spec, run=opened)
        if focus is not None:
            print_progress(focus)
    with (
        Processes.from_environment().process_group(detector.device) as processes,
        show_progress(is_shown=processes.is_first) as bars,
        announce_compilation(is_shown=processes.is_first),
        naming_kept_images("the same command continues with the others"),
    ):
        stored = find_results(
            detector,
            sources,
            [run / "detections.json", output / "detections.json"],
            match=match,
            source=loaded.source,
        )
        if stored is not None:
            detections, skipped = stored.path, stored.skipped
            if processes.is_first:
                print_progress(f"detections of the same weights and settings are in {detections}")
        else:
            detections = output / "detections.json"
            report = search_to_file(
                detector,
                sources,
                detections,
                match=match,
                source=loaded.source,
                existing="resume or replace",
                processes=processes,
                on_progress=bars.predicting,
            )
            skipped = tuple(sources[index].image_id for index in report.skipped)
        processes.barrier()
    if not processes.is_first:
        return None
    print_warnings(describe_match(match))
    if skipped:
        ids = count_and_list([str(each) for each in skipped], separator=", ")
        images = counted(len(skipped), "image")
        print_warnings([f"{images} could not be read and counted without detections: {ids}"])
    return _Subject(
        detections=detections,
        truth=GroundTruth.of(dataset),
        min_score=detector.min_score,
        is_validation=options.annotations is None,
        searched=(loaded, dataset),
    )


def _load_dataset(spec: "ExperimentSpec", options: _Options, *, run: Path) -> "Dataset":
    """Load the data set to search: the one given, or the validation images of a run."""
    from sniper.pipeline import has_test_images

    if options.annotations is not None:
        split = scored_split(options.annotations, options.split)
        return load_images(options.annotations, images=options.images, split=split, data=spec.data)
    for name, value in (("--images", options.images), ("--split", options.split)):
        if value is not None:
            raise ConfigError(f"{name} requires annotations")
    if not has_test_images(spec):
        raise ConfigError(
            f"{run}: has no validation images (data.test.annotations, data.holdout); name a data set to evaluate on: "
            f"sniper evaluate {run} ANNOTATIONS"
        )
    return load_split(spec, "test")


@dataclass(frozen=True, kw_only=True)
class _Report:
    """Everything that is printed without options.

    Attributes:
        scores: COCO's.
        point: precision, recall and F1 at one score.
        confusion: at the same score; None for too many classes.
        chosen_on: how the score was chosen.
        is_optimistic: whether it was chosen on the images that are scored.
        drops_duplicates: whether second boxes on an object count neither in `point` nor in `confusion`.
    """

    scores: "Scores"
    point: "OperatingPoint"
    confusion: "ConfusionMatrix | None"
    chosen_on: _Choice
    is_optimistic: bool
    drops_duplicates: bool

    @classmethod
    def of(
        cls,
        pair: "EvaluationPair",
        *,
        subject: _Subject,
        max_detections: int,
        min_score: float | None,
        drops_duplicates: bool,
    ) -> "_Report":
        """Score detections, and print a warning where there are more than count."""
        from sniper.evaluation import coco
        from sniper.evaluation.confusion import MAX_CLASSES, count_confusions
        from sniper.evaluation.duplicates import without_duplicates
        from sniper.evaluation.matching import match_pair
        from sniper.evaluation.operating_point import find_best_score, measure_at

        matches = match_pair(without_duplicates(pair) if drops_duplicates else pair)
        scores = coco.score(
            pair, max_detections=max_detections, matches=None if drops_duplicates else matches
        )
        if scores.num_cut:
            print_warnings(
                [
                    f"{counted(scores.num_cut, 'time')} an image has more than {max_detections} detections of one "
                    f"class; AP and AR count only the best {max_detections} (--max-detections)"
                ]
            )
        chosen_on: _Choice
        if min_score is not None:
            score, chosen_on = min_score, "min_score"
        elif subject.min_score is not None:
            score, chosen_on = subject.min_score, "validation_images"
        else:
            score, chosen_on = find_best_score(matches), "scored_images"
        confusion = count_confusions(matches, score)
        if confusion is None:
            num_classes = len(pair.truth.categories)
            print_warnings(
                [
                    f"the confusion matrix is left out: {num_classes:,} classes, expected at most {MAX_CLASSES:,}"
                ]
            )
        return cls(
            scores=scores,
            point=measure_at(matches, score),
            confusion=confusion,
            chosen_on=chosen_on,
            is_optimistic=chosen_on == "scored_images"
            or (chosen_on == "validation_images" and subject.is_validation),
            drops_duplicates=drops_duplicates,
        )

    def as_dict(self) -> dict[str, Any]:
        """Return all numbers as plain data; what is undefined is NaN, or COCO's -1."""
        point = self.point
        return {
            **self.scores.as_dict(),
            **self.scores.false_positives.as_dict(),
            "bbox": self.scores.numbers,
            "segm": None if self.scores.masks is None else self.scores.masks.numbers,
            "operating_point": {
                "score": point.score,
                "chosen_on": self.chosen_on,
                "is_optimistic": self.is_optimistic,
                "drops_duplicates": self.drops_duplicates,
                "iou": point.iou,
                **_counts_as_dict(point),
            },
            "classes": [
                {**asdict(scores), **_counts_as_dict(counts), **masks}
                for scores, counts, masks in zip(
                    self.scores.classes, point.classes, self._masks_by_class(), strict=True
                )
            ],
            "confusions": None if self.confusion is None else self.confusion.as_list(),
        }

    def _masks_by_class(self) -> list[dict[str, float]]:
        """Return the scores of masks of each class, if masks are scored."""
        if self.scores.masks is None:
            return [{}] * len(self.scores.classes)
        return [
            {f"segm_{name}": getattr(row, name) for name in ("ap", "ap50", "ar")}
            for row in self.scores.masks.classes
        ]

    def show(
        self,
        answer: Mapping[str, Any],
        *,
        differences: "Mapping[str, Difference] | None",
        details: "Sequence[Diagnosis] | None",
    ) -> None:
        """Print lines and tables.

        Args:
            answer: the JSON object, for the paths in it.
            differences: to other detections, by score; to be printed, too.
            details: of boxes, and of masks if they are scored; to be printed, too.
        """
        from sniper.reports.scores import (
            describe_ap_differences,
            describe_scores,
            show_classes,
            show_details,
            show_false_positive_differences,
            show_false_positives,
        )

        for line in describe_scores(self.scores):
            print_line(line)
        print_line("")
        print_table(show_false_positives(self.scores))
        print_line("")
        if differences is not None:
            for line in describe_ap_differences(differences):
                print_line(line)
            for table in show_false_positive_differences(differences):
                print_table(table)
                print_line("")
        for line in self._describe_point():
            print_paragraph(line)
        print_table(show_classes(self.scores, self.point))
        if self.confusion is not None:
            print_line("")
            _show_confusions(self.confusion)
        if details is not None:
            scored = (
                [(self.scores, "")]
                if self.scores.masks is None
                else [(self.scores, "boxes"), (self.scores.masks, "masks")]
            )
            for (scores, kind), diagnosis in zip(scored, details, strict=True):
                for table in show_details(scores, diagnosis, kind=kind):
                    print_line("")
                    print_table(table)
        for name in ("curve", "detections", "output", "page"):
            if name in answer:
                print_line(f"{name}: {answer[name]}")

    def _describe_point(self) -> list[str]:
        """Describe at which score precision, recall and F1 are."""
        if math.isnan(self.point.score):
            return ["no detection matches an object (IoU 0.5), so no score is better than another"]
        reason = {
            "min_score": "--min-score",
            "validation_images": "at which F1 was best on the validation images of the run",
            "scored_images": "at which F1 is best on these images",
        }[self.chosen_on]
        duplicates = ", without second boxes on an object" if self.drops_duplicates else ""
        lines = [
            f"precision, recall and F1: detections from score {self.point.score:g} on ({reason}), "
            f"IoU {self.point.iou:g}{duplicates}"
        ]
        if self.is_optimistic:
            lines.append(
                "caution: the score was chosen on the images that are scored; on others, expect a lower F1"
            )
        return lines


def _show_confusions(confusion: "ConfusionMatrix") -> None:
    """Print the confusion matrix of few classes, or the most frequent confusions."""
    from sniper.reports.scores import MAX_CLASSES_IN_TABLE, describe_confusions, show_confusion

    if len(confusion.categories) <= MAX_CLASSES_IN_TABLE:
        table = show_confusion(confusion)
        print_table(table if fits(table) else show_confusion(confusion, is_numbered=True))
        return
    lines = list(describe_confusions(confusion))
    print_line("most frequent confusions of two classes" if lines else "no class is detected as another")
    for line in lines:
        print_line(line)


def _counts_as_dict(counts: "MatchCounts") -> dict[str, float]:
    return {
        "precision": counts.precision,
        "recall": counts.recall,
        "f1": counts.f1,
        "num_objects": counts.num_objects,
        "num_true_positives": counts.num_true_positives,
        "num_false_positives": counts.num_false_positives,
    }


def _with_null(value: Any, *, is_difference: bool = False) -> Any:
    """Return plain data with None for numbers that are not defined: NaN, and COCO's -1 except in differences."""
    if isinstance(value, dict):
        return {name: _with_null(part, is_difference="_difference" in name) for name, part in value.items()}
    if isinstance(value, list):
        return [_with_null(part) for part in value]
    is_undefined = isinstance(value, float) and (math.isnan(value) or (value == -1 and not is_difference))
    return None if is_undefined else value


def _write(confusion: "ConfusionMatrix | None", answer: Mapping[str, Any], folder: Path) -> None:
    """Write the scores and the confusion matrix, if there is one."""
    from sniper.reports.confusion import draw_confusion, write_confusion

    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / "scores.json") as file:
        file.write(json_module.dumps(answer, indent=1).encode())
    table, picture = folder / "confusion.csv", folder / "confusion.png"
    if confusion is None:
        table.unlink(missing_ok=True)  # of an earlier evaluation
        picture.unlink(missing_ok=True)
        return
    write_confusion(confusion, table)
    draw_confusion(confusion, picture)


def _check_sizes(sizes: Sequence[float] | None, *, details: bool) -> None:
    if sizes is None:
        return
    is_rising = all(0 <= low < high for low, high in pairwise((*sizes, _MAX_SIZE)))
    if not details or not is_rising:
        raise ConfigError(
            f"--sizes {' '.join(map(str, sizes))}: expected rising numbers from 0 to {_MAX_SIZE:,}, together with "
            "--details"
        )


def _check_curve(path: Path) -> None:
    from sniper.reports.curves import CURVE_SUFFIXES

    check_parent(path)
    if path.suffix.lower() not in CURVE_SUFFIXES:
        raise ConfigError(f"--curve {path}: expected a name that ends in {', '.join(CURVE_SUFFIXES)}")


def _load_pairs(
    subject: _Subject, *, against: Path | None, limit: int | None
) -> "tuple[EvaluationPair, EvaluationPair | None]":
    """Load the detections, and those to compare with, of the first images."""
    from sniper.evaluation.exchanged import find_exchanged_classes

    pair = _load_pair(subject.detections, subject.truth)
    other = None if against is None else _load_pair(against, subject.truth, option="--against")
    print_warnings(find_exchanged_classes(pair))
    if limit is None:
        return pair, other
    return pair.first_images(limit), None if other is None else other.first_images(limit)


def _load_pair(path: Path, truth: "GroundTruth", *, option: str | None = None) -> "EvaluationPair":
    """Load detections, look up what they refer to, and print warnings; errors name the option."""
    from sniper.evaluation.pair import EvaluationPair
    from sniper.evaluation.results import load_detections

    detections = load_detections(path)
    try:
        pair = EvaluationPair.of(detections, truth)
    except (AnnotationError, DetectionsError) as error:
        if option is None:
            raise
        raise DetectionsError(f"{option} {path}: {error}") from error
    print_warnings(f"{path}: {warning}" for warning in pair.warnings)
    return pair


def _compare(
    pair: "EvaluationPair", other: "EvaluationPair", *, max_detections: int
) -> "dict[str, Difference]":
    """Compute the differences in AP and in false positives per image to other detections, of masks, too."""
    if pair.truth.num_images < 2 or pair.truth.is_crowd.all():
        raise ConfigError("--against: a comparison needs at least two images, with objects in them")
    with console.status("resampling images"):
        differences = _compare_one(pair, other, max_detections=max_detections)
        masks, other_masks = pair.for_masks(), other.for_masks()
        if masks is not None and other_masks is not None:
            of_masks = _compare_one(masks, other_masks, max_detections=max_detections)
            differences |= {f"segm_{name}": difference for name, difference in of_masks.items()}
    return differences


def _compare_one(
    pair: "EvaluationPair", other: "EvaluationPair", *, max_detections: int
) -> "dict[str, Difference]":
    """Compute the differences of boxes or of masks."""
    import numpy as np

    from sniper.evaluation.comparison import ResampledAP, ResampledFalsePositives, compare
    from sniper.evaluation.false_positives import RECALLS, FalsePositiveCurve, name_of
    from sniper.evaluation.matching import match_pair

    first, second = (ResampledAP(each, max_detections=max_detections) for each in (other, pair))
    differences = {"ap": compare([first], [second], generator=np.random.default_rng(0))}
    curves = [FalsePositiveCurve(match_pair(each, max_detections=max_detections)) for each in (other, pair)]
    for recall, on_clean in product(RECALLS, (False, True)):
        counts = [ResampledFalsePositives(curve, recall=recall, on_clean=on_clean) for curve in curves]
        differences[name_of(recall, on_clean=on_clean)] = compare(
            counts[:1], counts[1:], generator=np.random.default_rng(0), min_defined=_MIN_DEFINED
        )
    return differences


def _diagnose(
    pair: "EvaluationPair", *, max_detections: int, sizes: Sequence[float] | None, curve: Path | None
) -> "list[Diagnosis]":
    """Score boxes by size, and masks if they are there; draw the curve of boxes if a path is given."""
    from sniper.evaluation.diagnosis import PAPER_SIZES, diagnose

    bins = PAPER_SIZES if sizes is None else (*sizes, math.inf)
    scored = [each for each in (pair, pair.for_masks()) if each is not None]
    diagnoses = [diagnose(each, max_detections=max_detections, sizes=bins) for each in scored]
    if curve is not None:
        from sniper.reports.curves import draw_precision

        draw_precision(diagnoses[0], curve)
    return diagnoses


def _details_as_dict(diagnoses: "Sequence[Diagnosis]") -> dict[str, Any]:
    """Return the scores by size as plain data; those of masks beside those of boxes, as `segm_ap` and so on."""
    boxes, *masks = (diagnosis.as_dict()["sizes"] for diagnosis in diagnoses)
    for of_masks in masks:
        for row, other in zip(boxes, of_masks, strict=True):
            row |= {f"segm_{name}": other[name] for name in ("ap", "recall", "any_class_recall")}
    return {"sizes": boxes}
