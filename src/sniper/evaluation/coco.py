"""Score detections by the COCO rules, and read and write COCO results files."""

import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sniper.errors import DetectionsError, count_and_list
from sniper.evaluation.matching import LARGEST_AREA, run_coco_eval, to_hotcoco
from sniper.files import atomic_write, read_json

_AREA_RANGES = {
    "all": (0.0, LARGEST_AREA),
    "small": (0.0, 32.0**2),
    "medium": (32.0**2, 96.0**2),
    "large": (96.0**2, LARGEST_AREA),
}
_KEYS = ("image_id", "category_id", "bbox", "score")
_MAX_LISTED = 20


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The twelve COCO numbers: fractions from 0 to 1, or -1 where the ground truth has no such object.

    AP is the mean over classes, and over IoU 0.50, 0.55 … 0.95 unless the name gives an IoU. Small objects have an area
    of at most 32² image pixels, large ones of at least 96². `ar_1` and `ar_10` use the best 1 and 10 detections of each
    image and class, all other numbers the best `max_detections`.

    `num_cut` counts the pairs of image and class with more than `max_detections` detections.
    """

    ap: float
    ap50: float
    ap75: float
    ap_small: float
    ap_medium: float
    ap_large: float
    ar_1: float
    ar_10: float
    ar: float
    ar_small: float
    ar_medium: float
    ar_large: float
    num_images: int
    num_detections: int
    num_cut: int
    max_detections: int = 100

    def as_dict(self) -> dict[str, float | int]:
        """Return the numbers by name, in the order above; `ar` is named after `max_detections`, such as `ar_100`."""
        numbers = dataclasses.asdict(self)
        limit = numbers.pop("max_detections")
        return {f"ar_{limit}" if name == "ar" else name: value for name, value in numbers.items()}


def evaluate(
    detections: Sequence[Mapping[str, Any]],
    ground_truth: Mapping[str, Any],
    *,
    max_detections: int = 100,
) -> Scores:
    """Score detections by the COCO rules for boxes.

    COCO uses the 100 best detections of each image and class. This limits recall on denser images (drone views show
    several hundred objects), in every tool that reports COCO numbers; `num_cut` counts how often.

    Args:
        detections: COCO results, each with `image_id`, `category_id`, `bbox` (x, y, width, height; image
            frame, pixels) and `score`. May be empty. Equal scores are ordered by image id, then as given.
        ground_truth: a COCO data set: `images`, `categories`, `annotations`. The area of an annotation without `area`
            is that of its box; one without `iscrowd` is no crowd; `id` is not needed.
        max_detections: how many detections of each image and class count, at least 10; 100 for COCO's own numbers.

    Returns:
        The twelve numbers, and the number of images and detections.

    Raises:
        DetectionsError: if the ground truth does not have the image or category of a detection.

    Example:
        >>> box = {"image_id": 7, "category_id": 1, "bbox": [10, 10, 50, 40]}
        >>> truth = {"images": [{"id": 7}], "categories": [{"id": 1}], "annotations": [box]}
        >>> scores = evaluate([{**box, "score": 0.9}], truth)
        >>> round(scores.ap, 6), scores.ap_small
        (1.0, -1.0)
    """
    if max_detections < 10:
        raise ValueError(
            f"max_detections must be at least 10, since AR is also computed at 10, not {max_detections}"
        )
    check_detections_match(detections, ground_truth)
    evaluation = run_coco_eval(
        *to_hotcoco(detections, ground_truth),
        max_detections=(1, 10, max_detections),
        area_ranges=_AREA_RANGES,
    )
    evaluation.summary_lines()  # fills `stats` as `summarize` does, but prints nothing
    ap, ap50, ap75, ap_small, ap_medium, ap_large, *recalls = (float(number) for number in evaluation.stats)
    ar_1, ar_10, ar, ar_small, ar_medium, ar_large = recalls
    counts = Counter((detection["image_id"], detection["category_id"]) for detection in detections)
    return Scores(
        ap=ap,
        ap50=ap50,
        ap75=ap75,
        ap_small=ap_small,
        ap_medium=ap_medium,
        ap_large=ap_large,
        ar_1=ar_1,
        ar_10=ar_10,
        ar=ar,
        ar_small=ar_small,
        ar_medium=ar_medium,
        ar_large=ar_large,
        num_images=len(ground_truth["images"]),
        num_detections=len(detections),
        num_cut=sum(count > max_detections for count in counts.values()),
        max_detections=max_detections,
    )


def check_detections_match(detections: Sequence[Mapping[str, Any]], ground_truth: Mapping[str, Any]) -> None:
    """Check that the ground truth has the image and the category of every detection.

    Args:
        detections: COCO results. May be empty.
        ground_truth: a COCO data set.

    Raises:
        DetectionsError: if not; the message lists the unknown ids.
    """
    problems = [
        *_unknown_ids("image", "images", detections, ground_truth),
        *_unknown_ids("category", "categories", detections, ground_truth),
    ]
    if problems:
        raise DetectionsError("The detections do not match the annotations: " + "; ".join(problems))


def load_detections(path: Path) -> list[dict[str, Any]]:
    """Read a COCO results file, and check every entry.

    Args:
        path: a JSON file, written by `sniper predict` or by any tool that writes COCO results.

    Returns:
        The entries in the order of the file, with all their keys. May be empty.

    Raises:
        DetectionsError: if the file cannot be read, is not a list, or has entries that cannot be scored; the
            message lists the first 20 problems, and counts them all.
    """
    entries = read_json(path, error=DetectionsError)
    if not isinstance(entries, list):
        raise DetectionsError(
            f"{path}: expected a list of detections (COCO results), got {_shorten(entries)}"
        )
    problems = [
        f"entry {index}: {problem}" for index, entry in enumerate(entries) for problem in _problems_of(entry)
    ]
    if problems:
        listed = count_and_list(problems, limit=_MAX_LISTED, separator="\n  ")
        raise DetectionsError(
            f"{path}: {_count(len(problems), 'problem')} in {len(entries)} entries\n  {listed}"
        )
    return entries


def save_detections(path: Path, detections: Sequence[Mapping[str, Any]]) -> None:
    """Write detections as COCO results; the file is complete or not written at all.

    Args:
        path: of the file, which is replaced if it exists. Its folder must exist.
        detections: COCO results of plain Python numbers. May be empty.

    Raises:
        ValueError: if a number is not finite.
    """
    text = json.dumps([dict(detection) for detection in detections], allow_nan=False)
    with atomic_write(path) as file:
        file.write(text.encode())


def _unknown_ids(
    word: str, table: str, detections: Sequence[Mapping[str, Any]], ground_truth: Mapping[str, Any]
) -> Iterator[str]:
    """List the ids of detections that the ground truth's table lacks, in the order of the detections."""
    known = {row["id"] for row in ground_truth[table]}
    unknown = [row_id for detection in detections if (row_id := detection[f"{word}_id"]) not in known]
    if unknown:
        ids = [str(row_id) for row_id in dict.fromkeys(unknown)]
        listed = count_and_list(ids, limit=_MAX_LISTED, separator=", ")
        yield f"no {word} has id {listed} ({_count(len(unknown), 'detection')})"


def _problems_of(entry: Any) -> Iterator[str]:
    """Describe why an entry of a results file cannot be scored."""
    if not isinstance(entry, dict):
        yield f"expected an object with {', '.join(_KEYS)}, got {_shorten(entry)}"
        return
    missing = [key for key in _KEYS if key not in entry]
    if missing:
        yield f"has no {', '.join(missing)}"
    for key in ("image_id", "category_id"):
        if key in entry and type(entry[key]) is not int:
            yield f"{key} must be an integer, not {_shorten(entry[key])}"
    if "score" in entry and not _is_finite(entry["score"]):
        yield f"score must be a finite number, not {_shorten(entry['score'])}"
    if "bbox" in entry:
        yield from _problems_of_box(entry["bbox"])


def _problems_of_box(box: Any) -> Iterator[str]:
    if not isinstance(box, list) or len(box) != 4 or not all(_is_finite(value) for value in box):
        yield f"bbox must be four finite numbers (x, y, width, height), not {_shorten(box)}"
    elif box[2] < 0 or box[3] < 0:
        yield f"bbox has a negative width or height: {_shorten(box)}"


def _is_finite(value: Any) -> bool:
    """Check whether a value is a number in the range of a float; JSON has NaN, Infinity and integers of any length."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _shorten(value: Any) -> str:
    """Return a value as JSON, at most 60 characters."""
    if isinstance(value, dict) and value:
        return f"an object with {', '.join(list(value)[:5])}"
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _count(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"
