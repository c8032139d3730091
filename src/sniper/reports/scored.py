"""Score detections for the page of a run, and cut the pictures of the worst errors."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Float

from sniper.chips import LevelSpec
from sniper.data.datasets import Dataset, ImageRecord
from sniper.data.images.files import ImageReader
from sniper.data.reader import open_record
from sniper.data.spec import ReadSpec
from sniper.errors import SniperError
from sniper.evaluation.coco import ClassScores, Scores, score
from sniper.evaluation.confusion import BACKGROUND, count_confusions
from sniper.evaluation.duplicates import without_duplicates
from sniper.evaluation.errors import DetectionError, ErrorKind, ImageErrors, find_errors
from sniper.evaluation.false_positives import FalsePositiveCurve
from sniper.evaluation.match_table import MatchTable
from sniper.evaluation.matching import COCOEvaluation, PairMatches, match_pair, run_coco_eval
from sniper.evaluation.operating_point import ClassCounts, find_best_score, measure_at
from sniper.evaluation.pair import EvaluationPair
from sniper.geometry import Detections
from sniper.geometry.boxes import area, from_xywh, intersections, size
from sniper.geometry.detection_masks import DetectionMasks
from sniper.geometry.detections import DEFAULT_MIN_SCORE
from sniper.geometry.masks import MaskArrays
from sniper.reports.confusion import choose_classes
from sniper.reports.crops import Crop, level_for
from sniper.reports.images import MAX_MARKS, choose_evenly, mark_detections, read_image, to_path
from sniper.reports.page import resize_rule
from sniper.reports.parts import (
    Budget,
    ClassRow,
    ErrorCount,
    ErrorPicture,
    FalsePositiveRow,
    Mark,
    MarkedPicture,
    ScoredPart,
)
from sniper.reports.scores import defined

_MAX_CLASSIFIED = 50_000  # detections whose errors are classified; of more, those of some images
_MAX_CONFUSED = 30  # classes of the confusion matrix
_MAX_CURVE = 60  # points of a curve
_PER_CLASS = 3  # of each kind of error, every class has as many pictures as there is room for
_SUSPECT_PRECISION = 0.9
_SIZES = ((32.0, "small"), (96.0, "medium"), (math.inf, "large"))
_TIDE = {
    "Bkg": ErrorKind.BACKGROUND,
    "Miss": ErrorKind.MISSED,
    "Cls": ErrorKind.WRONG_CLASS,
    "Loc": ErrorKind.LOOSE,
    "Both": ErrorKind.WRONG_CLASS_AND_LOOSE,
    "Dupe": ErrorKind.DUPLICATE,
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """What is scored.

    Attributes:
        pair: detections and ground truth; its first images are those of the data set.
        dataset: with the image files.
        levels: of prediction; a picture of an error is cut at the scale of the level that suits the object.
        read: how image files become pixels.
        min_score: detections from this score on are shown; None chooses the one with the best F1.
        title: which images these are.
        step: of the weights.
    """

    pair: EvaluationPair
    dataset: Dataset
    levels: Sequence[LevelSpec]
    read: ReadSpec
    min_score: float | None
    title: str
    step: int


def build_scored(
    subject: Subject,
    *,
    budget: Budget,
    per_kind: int,
    matches_path: Path | None,
    scores: Scores | None = None,
) -> ScoredPart:
    """Score detections, classify the errors, and cut pictures of the worst.

    Args:
        subject: what is scored.
        budget: for the pictures.
        per_kind: pictures of each kind of error, at most.
        matches_path: where the matches are written, for `sniper report` of several runs; None writes none.
        scores: of the pair, if they are known.

    Raises:
        SniperError: if the detections cannot be scored, or the matches cannot be written.
    """
    pair = subject.pair
    evaluation = run_coco_eval(pair, max_detections=[100])
    if matches_path is not None:
        MatchTable.from_evaluation(evaluation, pair, step=subject.step).save(matches_path)
    scores = score(pair) if scores is None else scores
    matches = match_pair(without_duplicates(pair))
    min_score, reason = _choose_score(subject, matches)
    point = measure_at(matches, min_score)
    names, counts = _confusion(matches, min_score)
    shown = matches.pair.select(matches.pair.scores >= min_score)
    images = _Images(subject=subject, shown=shown)
    suspect_score = _suspect_score(matches, min_score=min_score)
    gallery = _Gallery(images=images, budget=budget, suspect_score=suspect_score, per_kind=per_kind)
    examples = list(gallery.examples())
    errors = gallery.worst()
    curve = FalsePositiveCurve(match_pair(pair, max_detections=scores.max_detections))
    return ScoredPart(
        title=subject.title,
        step=subject.step,
        num_images=pair.truth.num_images,
        num_clean_images=scores.false_positives.num_clean_images,
        min_score=min_score,
        score_reason=reason,
        ap=defined(scores.ap),
        ap50=defined(scores.ap50),
        precision=defined(point.precision),
        recall=defined(point.recall),
        classes=[
            ClassRow(
                name=row.name,
                label=label,
                num_objects=row.num_objects,
                ap=defined(row.ap),
                ap50=defined(row.ap50),
                precision=defined(at_score.precision),
                recall=defined(at_score.recall),
                curve=_precision_curve(matches, label),
            )
            for label, (row, at_score) in _most_objects(zip(scores.classes, point.classes, strict=True))
        ],
        confusion_names=names,
        confusion=counts,
        num_classes=len(pair.truth.categories),
        false_positives=[FalsePositiveRow(**vars(each)) for each in scores.false_positives.points],
        false_positive_curve=list(_false_positive_curve(curve)),
        error_counts=_error_counts(evaluation, images.errors.values()),
        num_classified=len(images.indices),
        suspect_score=suspect_score,
        errors=errors,
        images=examples,
        num_left_out=budget.num_left_out,
    )


def _choose_score(subject: Subject, matches: PairMatches) -> tuple[float, str]:
    """Return the score from which detections count, and how it was chosen."""
    if subject.min_score is not None:
        return subject.min_score, "at which F1 was best on the validation images"
    best = find_best_score(matches)
    if math.isnan(best):
        return DEFAULT_MIN_SCORE, "the default, since no detection matches an object"
    return best, "at which F1 is best on these images"


def _most_objects(
    rows: Iterable[tuple[ClassScores, ClassCounts]],
) -> list[tuple[int, tuple[ClassScores, ClassCounts]]]:
    """Iterate over classes with objects or detections and their labels, those with most objects first."""
    kept = [
        (label, row) for label, row in enumerate(rows) if row[0].num_objects or row[1].num_false_positives
    ]
    return sorted(kept, key=lambda each: -each[1][0].num_objects)


def _confusion(matches: PairMatches, min_score: float) -> tuple[list[str], list[list[int]]]:
    """Return names and counts of the confusion matrix, of the classes with most errors where there are many."""
    matrix = count_confusions(matches, min_score)
    if matrix is None:
        return [], []
    labels = choose_classes(matrix, count=_MAX_CONFUSED)
    rows = [*labels, len(matrix.categories)]
    names = [*(matrix.categories[label].name for label in labels), BACKGROUND]
    return names, matrix.counts[np.ix_(rows, rows)].tolist()


def _precision_curve(matches: PairMatches, label: int) -> list[tuple[float, float]]:
    """Return recalls and precisions of a class from the highest score on; empty without objects or detections."""
    pair = matches.pair
    num_objects = int(((pair.truth.labels == label) & ~pair.truth.is_crowd).sum())
    counted = (pair.labels == label) & (matches.is_true_positive | matches.is_false_positive)
    rows = np.flatnonzero(counted)
    if num_objects == 0 or len(rows) == 0:
        return []
    is_true = matches.is_true_positive[rows[np.argsort(-pair.scores[rows], kind="stable")]]
    num_true = np.cumsum(is_true)
    recalls, precisions = num_true / num_objects, num_true / np.arange(1, len(rows) + 1)
    last = int(np.flatnonzero(is_true)[-1]) if is_true.any() else len(rows) - 1
    # Steps along recall rather than along the many detections of a low score.
    steps = np.linspace(0, recalls[last], _MAX_CURVE)
    indices = np.unique(np.append(np.searchsorted(recalls[: last + 1], steps), last))
    return [(round(float(recalls[i]), 4), round(float(precisions[i]), 4)) for i in indices]


def _false_positive_curve(curve: FalsePositiveCurve) -> Iterator[tuple[float, float]]:
    """Iterate over recalls and false positives per image, for as long as the recall is reached."""
    for recall in np.linspace(0.02, 1, 50):
        point = curve.at_recall(float(recall))
        if point.per_image is None:
            return
        yield round(float(recall), 2), round(point.per_image, 4)


def _suspect_score(matches: PairMatches, *, min_score: float) -> float | None:
    """Return the lowest score from which on nine of ten detections are right; None if there is none."""
    scores, num_true, num_false = matches.count_by_score()
    is_precise = (num_true / (num_true + num_false) >= _SUSPECT_PRECISION) & (scores >= min_score)
    return float(scores[np.flatnonzero(is_precise)[-1]]) if is_precise.any() else None


def _error_counts(evaluation: COCOEvaluation, errors: Iterable[ImageErrors]) -> list[ErrorCount]:
    """Count the errors by kind, and what AP50 would gain without each kind among all detections."""
    gains: Mapping[str, float] = {}
    if not evaluation.blocks.is_split:
        gains = evaluation.result.tide_errors(pos_thr=0.5, bg_thr=0.1)["delta_ap"]
    counts = dict.fromkeys(ErrorKind, 0)
    for image in errors:
        for error in image.errors:
            counts[error.kind] += 1
    return [
        ErrorCount(kind=kind.value, count=counts[kind], ap50=gains.get(name)) for name, kind in _TIDE.items()
    ]


class _Images:
    """The detections that are shown, image by image, with their errors."""

    def __init__(self, *, subject: Subject, shown: EvaluationPair) -> None:
        self.subject = subject
        self.names = [category.name for category in shown.truth.categories]
        boxes = from_xywh(shown.boxes)
        order = np.lexsort((-shown.scores, shown.image_indices))
        edges = np.searchsorted(shown.image_indices[order], np.arange(shown.truth.num_images + 1))
        self._masks, self._rows = shown.masks, np.split(order, edges[1:-1])
        self.detections = [
            Detections(boxes=boxes[rows], scores=shown.scores[rows], labels=shown.labels[rows])
            for rows in self._rows
        ]
        step = -(-len(shown) // _MAX_CLASSIFIED) or 1
        self.indices = range(0, shown.truth.num_images, step)
        self.errors = {
            index: find_errors(self.detections[index], self.record(index)) for index in self.indices
        }

    def record(self, index: int) -> ImageRecord:
        return self.subject.dataset[index]

    def masks(self, index: int) -> MaskArrays | None:
        """Return the masks of the detections of an image, image frame."""
        return None if self._masks is None else self._masks.select(self._rows[index])


@dataclass(frozen=True, kw_only=True, eq=False)
class _Candidate:
    """An error that may be shown; the highest rank is the worst of its kind."""

    image: int
    error: DetectionError
    kind: ErrorKind
    label: int
    rank: float


@dataclass(frozen=True, kw_only=True, eq=False)
class _Gallery:
    """Cuts pictures of errors and of whole images."""

    images: _Images
    budget: Budget
    suspect_score: float | None
    per_kind: int

    def examples(self) -> Iterator[MarkedPicture]:
        """Iterate over pictures of images that are evenly spread, with their detections and missed objects."""
        for index in choose_evenly(self.images.indices):
            if self.budget.is_spent:
                self.budget.num_left_out += 1
                continue
            record, errors = self.images.record(index), self.images.errors[index]
            detections, masks = self.images.detections[index], self.images.masks(index)
            if masks is not None:
                detections = detections.with_masks(DetectionMasks.from_arrays(masks))
            num_wrong = sum(error.detection is not None for error in errors.errors)
            caption = (
                f"{record.file_name}: {int(errors.is_true_positive.sum())} right, {num_wrong} wrong, "
                f"{int(errors.is_missed.sum())} missed"
            )
            try:
                reader = open_record(record, self.images.subject.read)
                marked = read_image(reader, _Matched(self.images.names, detections, record, errors), caption)
            except SniperError:
                self.budget.num_left_out += 1
                continue
            self.budget.add(marked)
            yield marked

    def worst(self) -> list[ErrorPicture]:
        """Return pictures of the worst errors of each kind, kind by kind; an image is decoded once for all of its."""
        by_kind: dict[ErrorKind, list[_Candidate]] = {kind: [] for kind in ErrorKind}
        for index in self.images.indices:
            for candidate in self._candidates(index):
                by_kind[candidate.kind].append(candidate)
        chosen = [each for kind in ErrorKind for each in _choose_worst(by_kind[kind], count=self.per_kind)]
        places = {id(each): place for place, each in enumerate(chosen)}
        pictures: dict[int, ErrorPicture] = {}
        for image in dict.fromkeys(each.image for each in _round_robin(chosen)):
            of_image = [each for each in chosen if each.image == image]
            try:
                if self.budget.is_spent:
                    raise SniperError
                reader = open_record(self.images.record(image), self.images.subject.read)
                for each in of_image:
                    picture = self._draw(each, reader)
                    self.budget.add(picture.shown)
                    pictures[places[id(each)]] = picture
            except SniperError:
                self.budget.num_left_out += sum(places[id(each)] not in pictures for each in of_image)
        return [pictures[place] for place in sorted(pictures)]

    def _candidates(self, index: int) -> Iterator[_Candidate]:
        """Iterate over the errors of an image: false alarms rank by score, missed objects by size."""
        record, detections = self.images.record(index), self.images.detections[index]
        sizes = size(record.boxes)
        for error in self.images.errors[index].errors:
            if error.detection is None:
                assert error.object is not None
                label, rank = int(record.labels[error.object]), float(sizes[error.object])
            else:
                label, rank = (
                    int(detections.labels[error.detection]),
                    float(detections.scores[error.detection]),
                )
            yield _Candidate(image=index, error=error, kind=error.kind, label=label, rank=rank)

    def _draw(self, candidate: _Candidate, reader: ImageReader) -> ErrorPicture:
        """Cut an error at the scale of the level that suits it."""
        error, names = candidate.error, self.images.names
        record = self.images.record(candidate.image)
        detections = self.images.detections[candidate.image]
        found = None if error.detection is None else detections.boxes[error.detection]
        there = None if error.object is None else record.boxes[error.object]
        boxes = np.stack([box for box in (found, there) if box is not None])
        main = boxes[0]
        sides = {"width": record.width, "height": record.height}
        level = level_for(self.images.subject.levels, main, **sides)
        crop = Crop.around(np.concatenate([boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)]), level)
        marks = self._context(candidate, crop, record, detections)
        if error.object is not None:
            kind = "missed" if found is None else "object"
            marks += _mark(crop, record.boxes, record.masks, [error.object], kind=kind)
        if error.detection is not None:
            masks = self.images.masks(candidate.image)
            marks += _mark(crop, detections.boxes, masks, [error.detection], kind="wrong")
        (main_size,) = size(main[None]).tolist()
        class_name = names[candidate.label]
        other = None if error.object is None else names[int(record.labels[error.object])]
        spec = self.images.subject.levels[level.index]
        labels = {candidate.label} | (
            {int(record.labels[error.object])} if error.object is not None else set()
        )
        score_ = None if error.detection is None else float(detections.scores[error.detection])
        is_suspect = (
            error.kind is ErrorKind.BACKGROUND
            and self.suspect_score is not None
            and score_ is not None
            and score_ >= self.suspect_score
        )
        return ErrorPicture(
            kind=error.kind.value,
            is_suspect=is_suspect,
            labels=sorted(labels),
            title=class_name if score_ is None else f"{class_name} {score_:.2f}",
            text=_explain(error, other=other, is_suspect=is_suspect),
            place=f"{main_size:.0f} px, level {resize_rule(spec)}, {record.file_name}",
            size=next(name for below, name in _SIZES if main_size < below),
            shown=MarkedPicture(picture=crop.read(reader), marks=marks, caption=""),
        )

    def _context(
        self, candidate: _Candidate, crop: Crop, record: ImageRecord, detections: Detections
    ) -> list[Mark]:
        """Return the other objects and the other detections that a crop shows."""
        marks: list[Mark] = []
        error = candidate.error
        window = crop.chip.level.to_image(crop.chip.window[None])
        for boxes, masks, skipped, kind in (
            (record.boxes, record.masks, error.object, "near-object"),
            (detections.boxes, self.images.masks(candidate.image), error.detection, "near"),
        ):
            is_seen = intersections(window, boxes)[0] > 0.2 * area(boxes)
            if skipped is not None:
                is_seen[skipped] = False
            rows = np.flatnonzero(is_seen)[: MAX_MARKS // 4].tolist()
            marks += _mark(crop, boxes, masks, rows, kind=kind)
        return marks


def _mark(
    crop: Crop,
    boxes: Float[np.ndarray, "n 4"],
    masks: MaskArrays | None,
    rows: Sequence[int],
    *,
    kind: str,
) -> list[Mark]:
    """Return marks of some boxes, image frame, in the picture of a crop, with the outlines of their masks."""
    indices = np.array(rows, dtype=np.int64)
    outlines = [""] * len(rows)
    if masks is not None:
        (window,) = crop.chip.level.to_image(crop.chip.window[None])
        grids = DetectionMasks.from_arrays(masks.select(indices), window=window)
        grids = grids.with_boxes(np.reshape(crop.to_picture(grids.boxes), (-1, 4)))
        outlines = [to_path(grids, row, zoom=1.0) for row in range(len(rows))]
    return [
        Mark(box=box, kind=kind, outline=outline)
        for box, outline in zip(crop.to_picture(boxes[indices]), outlines, strict=True)
    ]


@dataclass(frozen=True, eq=False)
class _Matched:
    """The marks of an image with ground truth: missed objects, wrong and right detections, the best on top."""

    names: Sequence[str]
    detections: Detections
    record: ImageRecord
    errors: ImageErrors

    def __call__(self, zoom: float) -> list[Mark]:
        missed = np.flatnonzero(self.errors.is_missed)
        is_wrong = np.zeros(len(self.detections), dtype=np.bool_)
        is_wrong[[each.detection for each in self.errors.errors if each.detection is not None]] = True
        masks = self.record.masks
        grids = None if masks is None else DetectionMasks.from_arrays(masks.select(missed))
        boxes = (self.record.boxes[missed] * zoom).round(1).tolist()
        marks = [
            Mark(
                box=box,
                kind="missed",
                text=f"missed: {self.names[label]}",
                outline=to_path(grids, row, zoom=zoom),
            )
            for row, (box, label) in enumerate(zip(boxes, self.record.labels[missed].tolist(), strict=True))
        ]
        for mark, wrong, right in zip(
            mark_detections(self.detections, self.names, zoom=zoom)[::-1],
            is_wrong.tolist(),
            self.errors.is_true_positive.tolist(),
            strict=False,
        ):
            marks.append(replace(mark, kind="wrong" if wrong else "right" if right else "near"))
        return marks[:MAX_MARKS]


def _choose_worst(candidates: Sequence[_Candidate], *, count: int) -> list[_Candidate]:
    """Choose the worst errors of a kind, a few of every class among them, the worst first."""
    ranked = sorted(candidates, key=lambda each: -each.rank)
    num_seen: dict[int, int] = {}
    first: list[_Candidate] = []
    rest: list[_Candidate] = []
    for each in ranked:
        num_seen[each.label] = num_seen.get(each.label, 0) + 1
        (first if num_seen[each.label] <= _PER_CLASS else rest).append(each)
    chosen = [*first[: max(count // 2, 1)], *rest, *first[max(count // 2, 1) :]][:count]
    return sorted(chosen, key=lambda each: -each.rank)


def _round_robin(chosen: Sequence[_Candidate]) -> list[_Candidate]:
    """Order errors so that the worst of every kind come first."""
    places: dict[ErrorKind, int] = {}
    ordered: list[tuple[int, int, _Candidate]] = []
    for each in chosen:
        places[each.kind] = places.get(each.kind, 0) + 1
        ordered.append((places[each.kind], len(ordered), each))
    return [each for _, _, each in sorted(ordered, key=lambda entry: entry[:2])]


def _explain(error: DetectionError, *, other: str | None, is_suspect: bool) -> str:
    """Return in words what is wrong."""
    overlap = f"overlap {error.overlap:.2f}"
    match error.kind:
        case ErrorKind.BACKGROUND:
            return (
                "nothing is annotated here: is an annotation missing?"
                if is_suspect
                else "nothing is annotated here"
            )
        case ErrorKind.MISSED:
            return "missed: no detection of it from the chosen score on"
        case ErrorKind.WRONG_CLASS:
            return f"wrong class: annotated as {other}, {overlap}"
        case ErrorKind.LOOSE:
            return f"loose box: {overlap}, a match needs 0.50"
        case ErrorKind.WRONG_CLASS_AND_LOOSE:
            return f"wrong class and loose box: annotated as {other}, {overlap}"
        case ErrorKind.DUPLICATE:
            return f"second box on an object that another detection matches, {overlap}"
