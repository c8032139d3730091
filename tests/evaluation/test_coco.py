"""The COCO numbers against pycocotools, and what a detections file is refused for."""

import contextlib
import copy
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from sniper.errors import DetectionsError
from sniper.evaluation.coco import (
    Scores,
    check_detections_match,
    evaluate,
    load_detections,
    save_detections,
)

PRECISIONS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
RECALLS = ("ar_1", "ar_10", "ar_100", "ar_small", "ar_medium", "ar_large")


def random_truth(rng: np.random.Generator, *, num_images: int, num_boxes: int) -> dict[str, Any]:
    """Objects of all sizes; ids with gaps, some crowds, the last image and the last category empty."""
    images = [{"id": 3 + 7 * index} for index in range(num_images)]
    categories = [{"id": 1 + 4 * index, "name": f"kind {index}"} for index in range(4)]
    annotations = []
    for index in range(num_boxes):
        width, height = np.exp(rng.uniform(np.log(6), np.log(250), size=2))
        x, y = rng.uniform(0, 400, size=2)
        annotations.append(
            {
                "id": index + 1,
                "image_id": images[rng.integers(num_images - 1)]["id"],
                "category_id": categories[rng.integers(3)]["id"],
                "bbox": [x, y, width, height],
                "area": float(width * height * rng.uniform(0.5, 1.0)),  # as of a mask
                "iscrowd": int(rng.random() < 0.1),
            }
        )
    return {"images": images, "categories": categories, "annotations": annotations}


def random_detections(
    rng: np.random.Generator, truth: dict[str, Any], *, num_each: int
) -> list[dict[str, Any]]:
    """Near the truth and far from it; scores in steps of 0.05, so that many are equal."""
    detections = []
    for annotation in truth["annotations"]:
        if annotation["image_id"] == truth["images"][0]["id"]:
            continue  # an image where nothing is found
        for _ in range(num_each):
            sides = np.array(annotation["bbox"]) * rng.uniform(0.8, 1.25, size=4)
            category = truth["categories"][rng.integers(4)]["id"]
            detections.append(
                {
                    "image_id": annotation["image_id"],
                    "category_id": annotation["category_id"] if rng.random() < 0.8 else category,
                    "bbox": sides.tolist(),
                    "score": round(float(rng.integers(21)) * 0.05, 2),
                }
            )
    return [detections[index] for index in rng.permutation(len(detections))]


def numbers_by_pycocotools(detections: list[dict[str, Any]], truth: dict[str, Any]) -> list[float]:
    with contextlib.redirect_stdout(io.StringIO()):
        known = COCO()
        known.dataset = copy.deepcopy(truth)
        known.createIndex()
        if detections:
            found = known.loadRes(copy.deepcopy(detections))
        else:  # loadRes takes no empty list
            found = COCO()
            found.dataset = {**known.dataset, "annotations": []}
            found.createIndex()
        scoring = COCOeval(known, found, "bbox")
        scoring.evaluate()
        scoring.accumulate()
        scoring.summarize()
    return scoring.stats.tolist()


def numbers_of(scores: Scores) -> list[float]:
    return [scores.as_dict()[name] for name in PRECISIONS + RECALLS]


def entry(**changes: Any) -> dict[str, Any]:
    return {"image_id": 1, "category_id": 1, "bbox": [0.0, 0.0, 9.0, 9.0], "score": 0.5} | changes


def truth_of(*annotations: dict[str, Any]) -> dict[str, Any]:
    return {
        "images": [{"id": 1}, {"id": 2}],
        "categories": [{"id": 1, "name": "ship"}],
        "annotations": list(annotations),
    }


@pytest.mark.parametrize(
    ("seed", "num_images", "num_boxes", "num_each"),
    [
        (0, 12, 60, 2),
        (1, 12, 60, 5),
        (2, 3, 200, 4),  # more than 100 detections of one class in one image
        (3, 40, 30, 1),  # images without objects
        (4, 2, 1, 3),
    ],
)
def test_the_numbers_are_those_of_pycocotools(
    seed: int, num_images: int, num_boxes: int, num_each: int
) -> None:
    rng = np.random.default_rng(seed)
    truth = random_truth(rng, num_images=num_images, num_boxes=num_boxes)
    detections = random_detections(rng, truth, num_each=num_each)
    scores = evaluate(detections, truth)
    assert numbers_of(scores) == pytest.approx(numbers_by_pycocotools(detections, truth), abs=1e-6)
    assert (scores.num_images, scores.num_detections) == (num_images, len(detections))


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_boxes=st.integers(0, 20),
    num_each=st.integers(0, 3),
    gone=st.booleans(),
)
def test_the_numbers_of_any_small_world_are_those_of_pycocotools(
    seed: int, num_boxes: int, num_each: int, gone: bool
) -> None:
    rng = np.random.default_rng(seed)
    truth = random_truth(rng, num_images=3, num_boxes=num_boxes)
    detections = random_detections(rng, truth, num_each=num_each)
    if gone:  # detections where no object is
        truth["annotations"] = truth["annotations"][::2]
    scores = evaluate(detections, truth)
    assert numbers_of(scores) == pytest.approx(numbers_by_pycocotools(detections, truth), abs=1e-6)


def test_no_detections_score_zero_where_there_is_something_to_find_and_minus_one_elsewhere() -> None:
    small = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [5, 5, 20, 20], "area": 400, "iscrowd": 0}
    scores = evaluate([], truth_of(small))
    assert numbers_of(scores) == numbers_by_pycocotools([], truth_of(small))
    assert (scores.ap, scores.ap_small, scores.ap_large) == (0.0, 0.0, -1.0)
    assert scores.num_detections == 0


def test_without_ground_truth_every_number_is_minus_one() -> None:
    assert numbers_of(evaluate([entry()], truth_of())) == [-1.0] * 12
    assert numbers_of(evaluate([], {"images": [], "categories": [], "annotations": []})) == [-1.0] * 12


def test_annotations_need_no_id_no_area_and_no_iscrowd() -> None:
    rng = np.random.default_rng(5)
    full = random_truth(rng, num_images=6, num_boxes=30)
    for annotation in full["annotations"]:
        annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
        annotation["iscrowd"] = 0
    bare = copy.deepcopy(full)
    for annotation in bare["annotations"]:
        del annotation["id"], annotation["area"], annotation["iscrowd"]
    detections = random_detections(rng, full, num_each=2)
    expected = numbers_by_pycocotools(detections, full)
    assert numbers_of(evaluate(detections, bare)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("first", [0, 1])
def test_ids_of_annotations_do_not_matter(first: int) -> None:
    rng = np.random.default_rng(6)
    truth = random_truth(rng, num_images=4, num_boxes=12)
    detections = random_detections(rng, truth, num_each=2)
    moved = copy.deepcopy(truth)
    for index, annotation in enumerate(moved["annotations"]):
        annotation["id"] = first + index // 2  # twice each, and pycocotools never matches an id of 0
    assert evaluate(detections, moved) == evaluate(detections, truth)


def test_ids_beyond_what_a_float_holds_stay_apart() -> None:
    boxes = [{"image_id": 2**60 + i, "category_id": 1, "bbox": [50.0 * i, 0, 40, 40]} for i in range(2)]
    truth = truth_of(*boxes) | {"images": [{"id": 2**60}, {"id": 2**60 + 1}]}
    assert evaluate([box | {"score": 0.9} for box in boxes], truth).ap == pytest.approx(1.0)


def test_a_mask_beside_the_box_changes_nothing() -> None:
    box = {"image_id": 1, "category_id": 1, "bbox": [0, 0, 40, 40]}
    mask = [[0, 0, 4, 0, 4, 4]]
    truth = truth_of(box | {"segmentation": mask})
    assert evaluate([box | {"score": 0.9, "segmentation": mask}], truth) == evaluate(
        [box | {"score": 0.9}], truth_of(box)
    )


def test_the_arguments_stay_as_they_were_and_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(7)
    truth = random_truth(rng, num_images=4, num_boxes=12)
    detections = random_detections(rng, truth, num_each=2)
    before = copy.deepcopy((detections, truth))
    evaluate(detections, truth)
    assert (detections, truth) == before
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("detections", "message"),
    [
        (
            [entry(image_id=5), entry(image_id=5), entry(image_id=4)],
            r": no image has id 5, 4 \(3 detections\)$",
        ),
        ([entry(category_id=9)], r": no category has id 9 \(1 detection\)$"),
        ([entry(image_id=5, category_id=9)], "no image has id 5 .*; no category has id 9 "),
        ([entry(image_id=10 + i) for i in range(23)], r" 28, 29 or 3 more \(23 detections\)$"),
    ],
)
def test_detections_of_other_annotations_are_refused_by_name(
    detections: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(DetectionsError, match=message):
        check_detections_match(detections, truth_of())
    with pytest.raises(DetectionsError, match=message):
        evaluate(detections, truth_of())


def test_detections_of_these_annotations_are_let_through() -> None:
    check_detections_match([entry(), entry(image_id=2)], truth_of())
    check_detections_match([], truth_of())


@pytest.mark.parametrize(
    "detections", [[], [entry(), entry(score=1, bbox=[0, 0, 0, 0.1], segmentation=[[1, 2, 3, 4, 5, 6]])]]
)
def test_saved_detections_come_back_as_they_were(tmp_path: Path, detections: list[dict[str, Any]]) -> None:
    path = tmp_path / "detections.json"
    path.write_text("an older file")
    save_detections(path, detections)
    assert load_detections(path) == detections
    assert list(tmp_path.iterdir()) == [path]


def test_detections_that_cannot_be_written_leave_the_older_file(tmp_path: Path) -> None:
    path = tmp_path / "detections.json"
    save_detections(path, [entry()])
    with pytest.raises(ValueError, match="not JSON compliant"):
        save_detections(path, [entry(score=float("nan"))])
    assert load_detections(path) == [entry()]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"image_id": 1, "score": 0.5}, "entry 1: has no category_id, bbox"),
        ([1, 2], "entry 1: wanted an object with image_id, category_id, bbox, score, found [1, 2]"),
        (entry(image_id="7"), 'entry 1: image_id must be an integer, not "7"'),
        (entry(image_id=1.0), "entry 1: image_id must be an integer, not 1.0"),
        (entry(category_id=True), "entry 1: category_id must be an integer, not true"),
        (entry(score=float("nan")), "entry 1: score must be a finite number, not NaN"),
        (entry(score=None), "entry 1: score must be a finite number, not null"),
        (entry(score=10**400), "entry 1: score must be a finite number, not 1000"),
        (
            entry(bbox=[1, 2, 3]),
            "entry 1: bbox must be four finite numbers (x, y, width, height), not [1, 2, 3]",
        ),
        (entry(bbox=[1, 2, 3, float("inf")]), "not [1, 2, 3, Infinity]"),
        (
            entry(bbox={"x": 1}),
            "entry 1: bbox must be four finite numbers (x, y, width, height), not an object",
        ),
        (entry(bbox=[5, 5, -2, 4]), "entry 1: bbox has a negative width or height: [5, 5, -2, 4]"),
    ],
)
def test_an_entry_that_cannot_be_scored_is_refused_with_its_place_and_value(
    tmp_path: Path, bad: Any, message: str
) -> None:
    path = tmp_path / "detections.json"
    path.write_text(json.dumps([entry(), bad]))
    with pytest.raises(
        DetectionsError, match=f"^{re.escape(str(path))}: 1 problem in 2 entries\n.*{re.escape(message)}"
    ):
        load_detections(path)


def test_every_problem_is_counted_and_the_first_twenty_are_told(tmp_path: Path) -> None:
    path = tmp_path / "detections.json"
    path.write_text(json.dumps([entry(score=None, bbox=None)] * 12))
    with pytest.raises(DetectionsError) as refusal:
        load_detections(path)
    first, *told, last = str(refusal.value).splitlines()
    assert first == f"{path}: 24 problems in 12 entries"
    assert len(told) == 20
    assert told[-1] == "  entry 9: bbox must be four finite numbers (x, y, width, height), not null"
    assert last == "  and 4 more"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", r"is not JSON \(Expecting"),
        (b"\xff\xfe\xfd", r"is not JSON \("),
        (b"[" * 100_000, r"is not JSON \(maximum recursion"),
        (b"7", r"wanted a list of detections \(COCO results\), found 7$"),
        (b'{"images": [], "annotations": []}', "wanted a list .* found an object with images, annotations$"),
    ],
)
def test_a_file_that_is_no_list_of_results_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "detections.json"
    path.write_bytes(content)
    with pytest.raises(DetectionsError, match=f"^{re.escape(str(path))}: {message}"):
        load_detections(path)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DetectionsError, match=r"nowhere.json: cannot be read \(No such file or directory\)$"):
        load_detections(tmp_path / "nowhere.json")
