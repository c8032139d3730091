"""The COCO numbers against pycocotools, and the checks of a detections file."""

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


def random_ground_truth(rng: np.random.Generator, *, num_images: int, num_boxes: int) -> dict[str, Any]:
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
    rng: np.random.Generator, ground_truth: dict[str, Any], *, detections_per_object: int
) -> list[dict[str, Any]]:
    """Detections near and far from objects; scores in steps of 0.05, so that many are equal."""
    detections = []
    for annotation in ground_truth["annotations"]:
        if annotation["image_id"] == ground_truth["images"][0]["id"]:
            continue  # an image without detections
        for _ in range(detections_per_object):
            box = np.array(annotation["bbox"]) * rng.uniform(0.8, 1.25, size=4)
            category = ground_truth["categories"][rng.integers(4)]["id"]
            detections.append(
                {
                    "image_id": annotation["image_id"],
                    "category_id": annotation["category_id"] if rng.random() < 0.8 else category,
                    "bbox": box.tolist(),
                    "score": round(float(rng.integers(21)) * 0.05, 2),
                }
            )
    return [detections[index] for index in rng.permutation(len(detections))]


def numbers_by_pycocotools(detections: list[dict[str, Any]], ground_truth: dict[str, Any]) -> list[float]:
    with contextlib.redirect_stdout(io.StringIO()):
        reference = COCO()
        reference.dataset = copy.deepcopy(ground_truth)
        reference.createIndex()
        if detections:
            results = reference.loadRes(copy.deepcopy(detections))
        else:  # loadRes takes no empty list
            results = COCO()
            results.dataset = {**reference.dataset, "annotations": []}
            results.createIndex()
        evaluation = COCOeval(reference, results, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats.tolist()


def numbers_of(scores: Scores) -> list[float]:
    return [scores.as_dict()[name] for name in PRECISIONS + RECALLS]


def entry(**changes: Any) -> dict[str, Any]:
    return {"image_id": 1, "category_id": 1, "bbox": [0.0, 0.0, 9.0, 9.0], "score": 0.5} | changes


def ground_truth_of(*annotations: dict[str, Any]) -> dict[str, Any]:
    return {
        "images": [{"id": 1}, {"id": 2}],
        "categories": [{"id": 1, "name": "ship"}],
        "annotations": list(annotations),
    }


@pytest.mark.parametrize(
    ("seed", "num_images", "num_boxes", "detections_per_object"),
    [
        (0, 12, 60, 2),
        (1, 12, 60, 5),
        (2, 3, 200, 4),  # more than 100 detections of one class in one image
        (3, 40, 30, 1),  # images without objects
        (4, 2, 1, 3),
    ],
)
def test_numbers_equal_those_of_pycocotools(
    seed: int, num_images: int, num_boxes: int, detections_per_object: int
) -> None:
    rng = np.random.default_rng(seed)
    ground_truth = random_ground_truth(rng, num_images=num_images, num_boxes=num_boxes)
    detections = random_detections(rng, ground_truth, detections_per_object=detections_per_object)
    scores = evaluate(detections, ground_truth)
    assert numbers_of(scores) == pytest.approx(numbers_by_pycocotools(detections, ground_truth), abs=1e-6)
    assert (scores.num_images, scores.num_detections) == (num_images, len(detections))


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_boxes=st.integers(0, 20),
    detections_per_object=st.integers(0, 3),
    drops_objects=st.booleans(),
)
def test_numbers_of_small_random_data_sets_equal_those_of_pycocotools(
    seed: int, num_boxes: int, detections_per_object: int, drops_objects: bool
) -> None:
    rng = np.random.default_rng(seed)
    ground_truth = random_ground_truth(rng, num_images=3, num_boxes=num_boxes)
    detections = random_detections(rng, ground_truth, detections_per_object=detections_per_object)
    if drops_objects:  # leaves detections without an object
        ground_truth["annotations"] = ground_truth["annotations"][::2]
    scores = evaluate(detections, ground_truth)
    assert numbers_of(scores) == pytest.approx(numbers_by_pycocotools(detections, ground_truth), abs=1e-6)


def test_no_detections_score_zero_with_objects_and_minus_one_without() -> None:
    small = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [5, 5, 20, 20], "area": 400, "iscrowd": 0}
    scores = evaluate([], ground_truth_of(small))
    assert numbers_of(scores) == numbers_by_pycocotools([], ground_truth_of(small))
    assert (scores.ap, scores.ap_small, scores.ap_large) == (0.0, 0.0, -1.0)
    assert scores.num_detections == 0


def test_without_ground_truth_every_number_is_minus_one() -> None:
    assert numbers_of(evaluate([entry()], ground_truth_of())) == [-1.0] * 12
    assert numbers_of(evaluate([], {"images": [], "categories": [], "annotations": []})) == [-1.0] * 12


def test_annotations_need_no_id_no_area_and_no_iscrowd() -> None:
    rng = np.random.default_rng(5)
    full = random_ground_truth(rng, num_images=6, num_boxes=30)
    for annotation in full["annotations"]:
        annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
        annotation["iscrowd"] = 0
    bare = copy.deepcopy(full)
    for annotation in bare["annotations"]:
        del annotation["id"], annotation["area"], annotation["iscrowd"]
    detections = random_detections(rng, full, detections_per_object=2)
    expected = numbers_by_pycocotools(detections, full)
    assert numbers_of(evaluate(detections, bare)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("first", [0, 1])
def test_ids_of_annotations_do_not_matter(first: int) -> None:
    rng = np.random.default_rng(6)
    ground_truth = random_ground_truth(rng, num_images=4, num_boxes=12)
    detections = random_detections(rng, ground_truth, detections_per_object=2)
    moved = copy.deepcopy(ground_truth)
    for index, annotation in enumerate(moved["annotations"]):
        annotation["id"] = first + index // 2  # twice each, and pycocotools never matches an id of 0
    assert evaluate(detections, moved) == evaluate(detections, ground_truth)


def test_ids_too_large_for_a_float_are_distinguished() -> None:
    boxes = [{"image_id": 2**60 + i, "category_id": 1, "bbox": [50.0 * i, 0, 40, 40]} for i in range(2)]
    ground_truth = ground_truth_of(*boxes) | {"images": [{"id": 2**60}, {"id": 2**60 + 1}]}
    assert evaluate([box | {"score": 0.9} for box in boxes], ground_truth).ap == pytest.approx(1.0)


def test_a_mask_beside_the_box_changes_nothing() -> None:
    box = {"image_id": 1, "category_id": 1, "bbox": [0, 0, 40, 40]}
    mask = [[0, 0, 4, 0, 4, 4]]
    ground_truth = ground_truth_of(box | {"segmentation": mask})
    assert evaluate([box | {"score": 0.9, "segmentation": mask}], ground_truth) == evaluate(
        [box | {"score": 0.9}], ground_truth_of(box)
    )


def test_evaluate_changes_no_argument_and_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(7)
    ground_truth = random_ground_truth(rng, num_images=4, num_boxes=12)
    detections = random_detections(rng, ground_truth, detections_per_object=2)
    before = copy.deepcopy((detections, ground_truth))
    evaluate(detections, ground_truth)
    assert (detections, ground_truth) == before
    assert capfd.readouterr() == ("", "")


def test_num_cut_counts_images_with_more_detections_than_the_limit() -> None:
    box = [10.0, 10.0, 40.0, 40.0]
    ground_truth = {
        "images": [{"id": 1}, {"id": 2}],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [{"image_id": 1, "category_id": 1, "bbox": box}],
    }
    detections = [
        {"image_id": 1, "category_id": 1, "bbox": [200.0 + i, 10.0, 40.0, 40.0], "score": 0.9}
        for i in range(14)
    ]
    detections.append({"image_id": 1, "category_id": 1, "bbox": box, "score": 0.5})
    few, enough = evaluate(detections, ground_truth, max_detections=12), evaluate(detections, ground_truth)
    assert (few.num_cut, enough.num_cut) == (1, 0)
    assert few.as_dict()["ar_12"] == 0.0
    assert enough.as_dict()["ar_100"] == 1.0
    with pytest.raises(ValueError, match="at least 10"):
        evaluate(detections, ground_truth, max_detections=9)


@pytest.mark.parametrize(
    ("detections", "message"),
    [
        (
            [entry(image_id=5), entry(image_id=5), entry(image_id=4)],
            r": no image has id 5, 4 \(3 detections\)$",
        ),
        ([entry(category_id=9)], r": no category has id 9 \(1 detection\)$"),
        ([entry(image_id=5, category_id=9)], "no image has id 5 .*; no category has id 9 "),
        ([entry(image_id=10 + i) for i in range(23)], r" 28, 29, and 3 more \(23 detections\)$"),
    ],
)
def test_unknown_image_and_category_ids_are_listed(detections: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(DetectionsError, match=message):
        check_detections_match(detections, ground_truth_of())
    with pytest.raises(DetectionsError, match=message):
        evaluate(detections, ground_truth_of())


def test_known_image_and_category_ids_pass() -> None:
    check_detections_match([entry(), entry(image_id=2)], ground_truth_of())
    check_detections_match([], ground_truth_of())


@pytest.mark.parametrize(
    "detections", [[], [entry(), entry(score=1, bbox=[0, 0, 0, 0.1], segmentation=[[1, 2, 3, 4, 5, 6]])]]
)
def test_saved_detections_load_unchanged(tmp_path: Path, detections: list[dict[str, Any]]) -> None:
    path = tmp_path / "detections.json"
    path.write_text("an older file")
    save_detections(path, detections)
    assert load_detections(path) == detections
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_save_keeps_the_older_file(tmp_path: Path) -> None:
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
        ([1, 2], "entry 1: expected an object with image_id, category_id, bbox, score, got [1, 2]"),
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
def test_an_invalid_entry_is_reported_with_its_index_and_value(
    tmp_path: Path, bad: Any, message: str
) -> None:
    path = tmp_path / "detections.json"
    path.write_text(json.dumps([entry(), bad]))
    with pytest.raises(
        DetectionsError, match=f"^{re.escape(str(path))}: 1 problem in 2 entries\n.*{re.escape(message)}"
    ):
        load_detections(path)


def test_all_problems_are_counted_and_twenty_listed(tmp_path: Path) -> None:
    path = tmp_path / "detections.json"
    path.write_text(json.dumps([entry(score=None, bbox=None)] * 12))
    with pytest.raises(DetectionsError) as refusal:
        load_detections(path)
    first, *listed, last = str(refusal.value).splitlines()
    assert first == f"{path}: 24 problems in 12 entries"
    assert len(listed) == 20
    assert listed[-1] == "  entry 9: bbox must be four finite numbers (x, y, width, height), not null"
    assert last == "  and 4 more"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", r"is not JSON \(Expecting"),
        (b"\xff\xfe\xfd", r"is not JSON \("),
        (b"[" * 100_000, r"is not JSON \(maximum recursion"),
        (b"7", r"expected a list of detections \(COCO results\), got 7$"),
        (b'{"images": [], "annotations": []}', "expected a list .* got an object with images, annotations$"),
    ],
)
def test_a_file_without_a_list_of_results_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "detections.json"
    path.write_bytes(content)
    with pytest.raises(DetectionsError, match=f"^{re.escape(str(path))}: {message}"):
        load_detections(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DetectionsError, match=r"nowhere.json: cannot be read \(No such file or directory\)$"):
        load_detections(tmp_path / "nowhere.json")
