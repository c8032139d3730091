"""`sniper evaluate`: score detections against annotations."""

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter, validators

from sniper.cli.inputs import check_parent, load_annotations, scored_split
from sniper.cli.options import Annotations, Crowds, Json, Limit, ScoredSplit, default, flag
from sniper.cli.output import console, print_result, print_table, print_warnings
from sniper.errors import AnnotationError, ConfigError, DetectionsError

if TYPE_CHECKING:
    from sniper.evaluation.pair import EvaluationPair, GroundTruth


def evaluate(
    detections: Annotated[Path, Parameter(help="COCO result file.")],
    annotations: Annotations,
    /,
    *,
    split: ScoredSplit = None,
    crowds: Crowds = "ignore",
    limit: Limit = None,
    max_detections: Annotated[
        int,
        Parameter(
            validator=validators.Number(gte=10),
            help="Count only this many of the best detections per image and class; COCO's own value is 100.",
        ),
    ] = 100,
    details: Annotated[
        bool,
        flag("Add scores by class and by object size, class-agnostic recall, and false positives per image."),
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
            help="COCO result file of the same images to compare with: difference in AP with its 95 % interval, by a "
            "paired bootstrap over images."
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Compute the 12 COCO scores of detections.

    The image files are not needed.
    """
    from sniper.data.spec import DataSpec
    from sniper.evaluation.coco import score
    from sniper.evaluation.exchanged import find_exchanged_classes
    from sniper.evaluation.pair import GroundTruth
    from sniper.files import no_garbage_collection

    _check_sizes(sizes, details=details)
    if curve is not None:
        _check_curve(curve)
    dataset = load_annotations(
        annotations, images=None, split=scored_split(annotations, split), data=DataSpec(crowds=crowds)
    )
    with no_garbage_collection():
        truth = GroundTruth.of(dataset)
        pair = _load_pair(detections, truth)
        other = None if against is None else _load_pair(against, truth, option="--against")
        print_warnings(find_exchanged_classes(pair))
        if limit is not None:
            pair = pair.first_images(limit)
            other = None if other is None else other.first_images(limit)
        scores = score(pair, max_detections=max_detections)
    if scores.num_cut:
        print_warnings(
            [
                f"{scores.num_cut} times an image has more than {max_detections} detections of one class; "
                f"only the best {max_detections} count (--max-detections)"
            ]
        )
    answer: dict[str, Any] = dict(scores.as_dict())
    if other is not None:
        answer |= _compare(pair, other, max_detections=max_detections)
    if details or curve is not None:
        answer |= _diagnose(
            pair,
            max_detections=max_detections,
            sizes=sizes,
            curve=curve,
            details=details,
            is_json=json,
        )
    print_result(answer, is_json=json)


def _check_sizes(sizes: Sequence[float] | None, *, details: bool) -> None:
    if sizes is None:
        return
    is_rising = all(0 <= low < high for low, high in pairwise((*sizes, math.inf)))
    if not details or not is_rising:
        raise ConfigError(
            f"--sizes {' '.join(map(str, sizes))}: expected rising numbers from 0, together with --details"
        )


def _check_curve(path: Path) -> None:
    from sniper.reports.curves import CURVE_SUFFIXES

    check_parent(path)
    if path.suffix.lower() not in CURVE_SUFFIXES:
        raise ConfigError(f"--curve {path}: expected a name that ends in {', '.join(CURVE_SUFFIXES)}")


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


def _compare(pair: "EvaluationPair", other: "EvaluationPair", *, max_detections: int) -> dict[str, float]:
    """Compute the difference in AP to other detections, and its confidence interval."""
    import numpy as np

    from sniper.evaluation.comparison import ResampledAP, compare

    if pair.truth.num_images < 2 or pair.truth.is_crowd.all():
        raise ConfigError("--against: a comparison needs at least two images, with objects in them")
    with console.status("resampling images"):
        difference = compare(
            [ResampledAP(other, max_detections=max_detections)],
            [ResampledAP(pair, max_detections=max_detections)],
            generator=np.random.default_rng(0),
        )
    return {
        "ap_difference": difference.difference,
        "ap_difference_low": difference.low,
        "ap_difference_high": difference.high,
    }


def _diagnose(
    pair: "EvaluationPair",
    *,
    max_detections: int,
    sizes: Sequence[float] | None,
    curve: Path | None,
    details: bool,
    is_json: bool,
) -> dict[str, Any]:
    """Draw the curve and print the details, as asked for; return what belongs in the answer."""
    from sniper.evaluation.diagnosis import PAPER_SIZES, diagnose
    from sniper.reports.curves import draw_precision, show_diagnosis

    bins = PAPER_SIZES if sizes is None else (*sizes, math.inf)
    diagnosis = diagnose(pair, max_detections=max_detections, sizes=bins)
    answer: dict[str, Any] = {}
    if curve is not None:
        draw_precision(diagnosis, curve)
        answer["curve"] = str(curve)
    if details and is_json:
        answer |= diagnosis.as_dict()
    elif details:
        for table in show_diagnosis(diagnosis):
            print_table(table)
    return answer
