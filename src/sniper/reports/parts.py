"""The parts of a run's page that are made from images, kept so that the page can be written again without them."""

import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from sniper.config.derived import DerivedSetting
from sniper.files import atomic_write, read_bytes
from sniper.reports.crops import Picture

_T = TypeVar("_T")

CHIPS_BYTES, SCORED_BYTES, SEARCHED_BYTES = 2_000_000, 10_000_000, 2_000_000
"""Bytes of the pictures of each part. Written as text they take a third more: a page has less than 20 MB."""


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A box drawn on a picture.

    Attributes:
        box: xyxy, picture pixels.
        kind: how it is drawn: a class of the style sheet.
        text: class, score and status, shown where there is room.
        outline: of a mask, as the path of SVG, drawn in place of the box; empty without a mask.
    """

    box: list[float]
    kind: str
    text: str = ""
    outline: str = ""


@dataclass(frozen=True, kw_only=True)
class MarkedPicture:
    """A picture with boxes.

    Attributes:
        picture: the pixels.
        marks: the boxes.
        caption: below it.
    """

    picture: Picture
    marks: list[Mark]
    caption: str


@dataclass(frozen=True, kw_only=True)
class ChipRow:
    """Chips of one level.

    Attributes:
        level: its resize rule.
        sizes: the sizes of objects that it learns from.
        num_chips: in the epoch.
        num_negative: of these.
        chips: those that are shown.
    """

    level: str
    sizes: str
    num_chips: int
    num_negative: int
    chips: list[MarkedPicture]


@dataclass(frozen=True, kw_only=True)
class ChipsPart:
    """Chips that a run learns from.

    Attributes:
        epoch: in which it does, from 1.
        num_left_out: chips that were chosen to be shown and could not be read, or not in time.
        rows: by level, finest first.
    """

    epoch: int
    num_left_out: int
    rows: list[ChipRow]


@dataclass(frozen=True, kw_only=True)
class ErrorPicture:
    """An error of the detector.

    Attributes:
        kind: a value of `ErrorKind`.
        is_suspect: whether the object may be missing from the annotations.
        labels: of the detection and of the object.
        title: class, score.
        text: what is wrong.
        place: file, level and size.
        size: `small`, `medium` or `large`.
        shown: the crop.
    """

    kind: str
    is_suspect: bool
    labels: list[int]
    title: str
    text: str
    place: str
    size: str
    shown: MarkedPicture


@dataclass(frozen=True, kw_only=True)
class ErrorCount:
    """How often an error occurs.

    Attributes:
        kind: a value of `ErrorKind`.
        count: in all images, from the chosen score on.
        ap50: what AP50 would gain without these errors; None where it is not known.
    """

    kind: str
    count: int
    ap50: float | None


@dataclass(frozen=True, kw_only=True)
class ClassRow:
    """The scores of a class, and its curve of precision over recall at IoU 0.5.

    Attributes:
        name: of the class.
        label: its index.
        num_objects: in the images.
        ap: COCO's; None without objects.
        ap50: at IoU 0.5.
        precision: from the chosen score on; None without detections.
        recall: from the chosen score on; None without objects.
        curve: recalls and precisions from the highest score on.
    """

    name: str
    label: int
    num_objects: int
    ap: float | None
    ap50: float | None
    precision: float | None
    recall: float | None
    curve: list[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class FalsePositiveRow:
    """False positives per image at a recall; None where it is not reached."""

    recall: float
    score: float | None
    per_image: float | None
    per_clean_image: float | None


@dataclass(frozen=True, kw_only=True)
class ScoredPart:
    """Detections on images with ground truth.

    Attributes:
        title: which images.
        step: of the weights.
        num_images: that were scored.
        num_clean_images: of these, images without objects.
        min_score: detections from this score on are counted and shown.
        score_reason: how it was chosen.
        ap: COCO's; None without objects.
        ap50: at IoU 0.5.
        precision: of all classes together, from the chosen score on.
        recall: the same.
        classes: with objects or detections, most objects first.
        confusion_names: of rows and columns of the confusion matrix, the background last; empty if it is left out.
        confusion: counts.
        num_classes: of the confusion matrix before the classes with most errors were chosen.
        false_positives: by recall.
        false_positive_curve: recalls, and false positives per image.
        error_counts: by kind.
        num_classified: images whose errors are counted and shown: fewer than all where there are very many detections.
        suspect_score: from this score on, nine of ten detections are right; None if there is no such score.
        errors: the worst.
        images: with their detections.
        num_left_out: pictures that were chosen and could not be read, or not in time.
    """

    title: str
    step: int
    num_images: int
    num_clean_images: int
    min_score: float
    score_reason: str
    ap: float | None
    ap50: float | None
    precision: float | None
    recall: float | None
    classes: list[ClassRow]
    confusion_names: list[str]
    confusion: list[list[int]]
    num_classes: int
    false_positives: list[FalsePositiveRow]
    false_positive_curve: list[tuple[float, float]]
    error_counts: list[ErrorCount]
    num_classified: int
    suspect_score: float | None
    errors: list[ErrorPicture]
    images: list[MarkedPicture]
    num_left_out: int


@dataclass(frozen=True, kw_only=True)
class SearchedPart:
    """Detections on images without ground truth.

    Attributes:
        step: of the weights.
        num_images: that were searched.
        num_detections: from the score on.
        min_score: detections from this score on are shown.
        images: some of them.
        num_left_out: pictures that were chosen and could not be read, or not in time.
    """

    step: int
    num_images: int
    num_detections: int
    min_score: float
    images: list[MarkedPicture]
    num_left_out: int


@dataclass(frozen=True, kw_only=True)
class SettingsPart:
    """The settings that were derived.

    Attributes:
        settings: in the order in which they were reported.
    """

    settings: list[DerivedSetting]


@dataclass(frozen=True, kw_only=True)
class RunParts:
    """All parts of a run that there are."""

    settings: SettingsPart | None
    chips: ChipsPart | None
    scored: ScoredPart | None
    searched: SearchedPart | None


class Budget:
    """Bounds the time and the bytes that pictures may take.

    Args:
        seconds: after which no further picture is begun.
        num_bytes: of all pictures, after which none is added.

    Attributes:
        num_left_out: pictures that were chosen but not added.
    """

    def __init__(self, *, seconds: float, num_bytes: int) -> None:
        self._end = time.monotonic() + seconds
        self._num_bytes = num_bytes
        self.num_left_out = 0

    @property
    def is_spent(self) -> bool:
        """Whether no further picture may be added."""
        return time.monotonic() >= self._end or self._num_bytes <= 0

    def add(self, shown: MarkedPicture) -> None:
        """Count a picture with its outlines."""
        self._num_bytes -= 3 * (len(shown.picture.jpeg) + sum(len(mark.outline) for mark in shown.marks)) // 4


Part = SettingsPart | ChipsPart | ScoredPart | SearchedPart

_NAMES: dict[type, str] = {
    SettingsPart: "settings",
    ChipsPart: "chips",
    ScoredPart: "scored",
    SearchedPart: "searched",
}


@dataclass(frozen=True)
class PartsFolder:
    """The folder with the parts of a run's page.

    Attributes:
        folder: `report` in that of the run; created when something is written.
    """

    folder: Path

    @property
    def matches_path(self) -> Path:
        """The matches of the last evaluation, see `sniper.evaluation.match_table`."""
        return self.folder / "matches.npz"

    def save(self, part: Part) -> None:
        """Write a part, in place of an earlier one."""
        self.folder.mkdir(exist_ok=True)
        with atomic_write(self._path(type(part))) as file:
            file.write(msgspec.json.encode(part))

    def load(self) -> RunParts:
        """Read all parts that are there; one that cannot be read is left out with a warning."""
        return RunParts(
            settings=self._read(SettingsPart),
            chips=self._read(ChipsPart),
            scored=self._read(ScoredPart),
            searched=self._read(SearchedPart),
        )

    def _path(self, kind: type) -> Path:
        return self.folder / f"{_NAMES[kind]}.json"

    def _read(self, kind: type[_T]) -> _T | None:
        path = self._path(kind)
        if not path.exists():
            return None
        try:
            return msgspec.json.decode(read_bytes(path), type=kind)
        except (OSError, ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
            warnings.warn(f"{path}: cannot be read, and is left out of the page ({error})", stacklevel=3)
            return None
