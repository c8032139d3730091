"""Detections against ground truth: the twelve COCO numbers, and the file that detections travel in."""

import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hotcoco
import numpy as np

from sniper.errors import DetectionsError
from sniper.files import atomic_write

_KEYS = ("image_id", "category_id", "bbox", "score")
_MOST_TOLD = 20


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The COCO numbers of one set of detections: fractions of 1, or -1 where no ground truth counts.

    AP is the mean over classes, and over IoU 0.50, 0.55 … 0.95 unless the name says which. Small is an area
    of at most 32² image pixels, large one of at least 96², medium what lies between. AP, AR and the ARs by area look at
    the `max_detections` best detections of each image and class, `ar_1` and `ar_10` at fewer.

    `num_cut` counts the images and classes that have more detections than that.
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
        """Give every number by its name, in the order above; AR bears the number of detections in its name."""
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

    COCO lets the 100 best detections of each image and class count. On denser images (drone views hold several hundred
    objects) recall is capped by this, in every tool that reports COCO numbers; `num_cut` tells when it is.

    Args:
        detections: COCO results, each with `image_id`, `category_id`, `bbox` (x, y, width, height; image
            frame, pixels) and `score`. May be empty. Equal scores rank by image id, then as given.
        ground_truth: a COCO data set: `images`, `categories`, `annotations`. An annotation without `area` has
            that of its box; without `iscrowd` it is no crowd; its `id` is not needed.
        max_detections: the best so many of each image and class count, at least 10; COCO's own numbers are those for
            100.

    Returns:
        The twelve numbers, with how many images and detections they come from.

    Raises:
        DetectionsError: if a detection is of an image or a category that the ground truth does not have.

    Example:
        >>> box = {"image_id": 7, "category_id": 1, "bbox": [10, 10, 50, 40]}
        >>> truth = {"images": [{"id": 7}], "categories": [{"id": 1}], "annotations": [box]}
        >>> scores = evaluate([{**box, "score": 0.9}], truth)
        >>> round(scores.ap, 6), scores.ap_small
        (1.0, -1.0)
    """
    if max_detections < 10:
        raise ValueError(
            f"max_detections must be at least 10, for there is a recall at 10, not {max_detections}"
        )
    check_detections_match(detections, ground_truth)
    truth = as_coco(ground_truth)
    found = truth.load_res(as_results(detections))
    scoring = hotcoco.COCOeval(truth, found, "bbox")
    scoring.params.max_dets = [1, 10, max_detections]
    scoring.evaluate()
    scoring.accumulate()
    scoring.summary_lines()  # fills `stats` as `summarize` does, but prints nothing
    ap, ap50, ap75, ap_small, ap_medium, ap_large, *recalls = (float(number) for number in scoring.stats)
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
    """Make sure that every detection is of an image and a category of the ground truth.

    Args:
        detections: COCO results. May be empty.
        ground_truth: a COCO data set.

    Raises:
        DetectionsError: if not; the message names the ids that are unknown.
    """
    problems = [
        *_tell_unknown("image", "images", detections, ground_truth),
        *_tell_unknown("category", "categories", detections, ground_truth),
    ]
    if problems:
        raise DetectionsError("The detections do not match the annotations: " + "; ".join(problems))


def load_detections(path: Path) -> list[dict[str, Any]]:
    """Read a COCO results file, and check every entry.

    Args:
        path: a JSON file, written by `sniper predict` or by any tool that writes COCO results.

    Returns:
        The entries in the order of the file, with all their keys; empty if the file holds none.

    Raises:
        DetectionsError: if the file cannot be read, is not a list, or has entries that cannot be scored; the
            message tells the first 20 problems and how many there are.
    """
    entries = _read_json(path)
    if not isinstance(entries, list):
        raise DetectionsError(f"{path}: wanted a list of detections (COCO results), found {_brief(entries)}")
    problems = [
        f"entry {index}: {problem}" for index, entry in enumerate(entries) for problem in _problems_of(entry)
    ]
    if problems:
        told = "".join(f"\n  {problem}" for problem in problems[:_MOST_TOLD])
        rest = f"\n  and {len(problems) - _MOST_TOLD} more" if len(problems) > _MOST_TOLD else ""
        raise DetectionsError(
            f"{path}: {_count(len(problems), 'problem')} in {len(entries)} entries{told}{rest}"
        )
    return entries


def save_detections(path: Path, detections: Sequence[Mapping[str, Any]]) -> None:
    """Write detections as COCO results, whole or not at all.

    Args:
        path: where to; a file that is there already is replaced. Its folder must exist.
        detections: COCO results of plain Python numbers. May be empty.

    Raises:
        ValueError: if a number is not finite.
    """
    text = json.dumps([dict(detection) for detection in detections], allow_nan=False)
    with atomic_write(path) as file:
        file.write(text.encode())


def as_coco(ground_truth: Mapping[str, Any]) -> hotcoco.COCO:
    """Hand the truth over to hotcoco, only what counts; ids of annotations are new, for not every file has them."""
    annotations = ground_truth["annotations"]
    boxes = np.array([annotation["bbox"] for annotation in annotations], dtype=np.float64).reshape(-1, 4)
    return hotcoco.COCO.from_arrays(
        [{"id": image["id"]} for image in ground_truth["images"]],
        [{"id": category["id"], "name": str(category["id"])} for category in ground_truth["categories"]],
        np.array([annotation["image_id"] for annotation in annotations], dtype=np.int64),
        np.array([annotation["category_id"] for annotation in annotations], dtype=np.int64),
        boxes,
        area=np.array([_area_of(annotation) for annotation in annotations], dtype=np.float64),
        iscrowd=np.array([bool(annotation.get("iscrowd")) for annotation in annotations], dtype=np.bool_),
    )


def _area_of(annotation: Mapping[str, Any]) -> float:
    """Take the area that the annotation gives (of a mask, where there is one), else that of its box."""
    area = annotation.get("area")
    _, _, width, height = annotation["bbox"]
    return float(width * height if area is None else area)


def as_results(detections: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Hand detections over to hotcoco, only what counts: a mask beside the box would be scored otherwise."""
    return [
        {
            "image_id": int(detection["image_id"]),
            "category_id": int(detection["category_id"]),
            "bbox": [float(side) for side in detection["bbox"]],
            "score": float(detection["score"]),
        }
        for detection in detections
    ]


def _tell_unknown(
    word: str, table: str, detections: Sequence[Mapping[str, Any]], ground_truth: Mapping[str, Any]
) -> Iterator[str]:
    """Name the ids that the ground truth's table lacks, in the order they first come."""
    known = {row["id"] for row in ground_truth[table]}
    strangers = [found for detection in detections if (found := detection[f"{word}_id"]) not in known]
    if strangers:
        names = list(dict.fromkeys(strangers))
        told = ", ".join(str(name) for name in names[:_MOST_TOLD])
        rest = f" or {len(names) - _MOST_TOLD} more" if len(names) > _MOST_TOLD else ""
        yield f"no {word} has id {told}{rest} ({_count(len(strangers), 'detection')})"


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise DetectionsError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise DetectionsError(f"{path}: is not JSON ({error})") from error


def _problems_of(entry: Any) -> Iterator[str]:
    """Tell what keeps one entry of a results file from being scored."""
    if not isinstance(entry, dict):
        yield f"wanted an object with {', '.join(_KEYS)}, found {_brief(entry)}"
        return
    missing = [key for key in _KEYS if key not in entry]
    if missing:
        yield f"has no {', '.join(missing)}"
    for key in ("image_id", "category_id"):
        if key in entry and type(entry[key]) is not int:
            yield f"{key} must be an integer, not {_brief(entry[key])}"
    if "score" in entry and not _is_finite(entry["score"]):
        yield f"score must be a finite number, not {_brief(entry['score'])}"
    if "bbox" in entry:
        yield from _problems_of_box(entry["bbox"])


def _problems_of_box(box: Any) -> Iterator[str]:
    if not isinstance(box, list) or len(box) != 4 or not all(_is_finite(side) for side in box):
        yield f"bbox must be four finite numbers (x, y, width, height), not {_brief(box)}"
    elif box[2] < 0 or box[3] < 0:
        yield f"bbox has a negative width or height: {_brief(box)}"


def _is_finite(value: Any) -> bool:
    """Tell whether this is a number that a float can hold; JSON knows NaN, Infinity and endless integers."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _brief(value: Any) -> str:
    """Show a value as JSON has it, cut short."""
    if isinstance(value, dict) and value:
        return f"an object with {', '.join(list(value)[:5])}"
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _count(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"
