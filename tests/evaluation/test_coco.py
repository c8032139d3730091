"""The COCO numbers against pycocotools."""

import contextlib
import copy
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from sniper.data.datasets import load_dataset
from sniper.errors import AnnotationError
from sniper.evaluation.coco import Scores, evaluate
from tests.data.tiny import write_dataset
from tests.evaluation.entries import entry, ground_truth_of

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
            category = ground_truth["categories"][rng.integers(len(ground_truth["categories"]))]["id"]
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


def test_paths_and_data_sets_score_like_coco_objects(tmp_path: Path) -> None:
    annotations = write_dataset(tmp_path, sides=((160, 120), (90, 140)), boxes_per_image=4)
    ground_truth = json.loads(annotations.read_text())
    detections = random_detections(np.random.default_rng(8), ground_truth, detections_per_object=3)
    (tmp_path / "found.json").write_text(json.dumps(detections))
    scores = evaluate(detections, ground_truth)
    assert scores.ap > 0
    assert evaluate(tmp_path / "found.json", annotations) == scores
    assert evaluate(str(tmp_path / "found.json"), load_dataset(annotations)) == scores


def renumbered(
    detections: list[dict[str, Any]], ground_truth: dict[str, Any], *, images: Any, categories: Any
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Replace the ids of images and categories by functions of them."""

    def of(row: dict[str, Any]) -> dict[str, Any]:
        return row | {"image_id": images(row["image_id"]), "category_id": categories(row["category_id"])}

    return [of(row) for row in detections], {
        "images": [row | {"id": images(row["id"])} for row in ground_truth["images"]],
        "categories": [row | {"id": categories(row["id"])} for row in ground_truth["categories"]],
        "annotations": [of(row) for row in ground_truth["annotations"]],
    }


@pytest.mark.parametrize(
    ("images", "categories"),
    [
        (lambda number: number - 1000, lambda number: number - 1),  # negative, from 0
        (lambda number: number - 2**63, lambda number: 2**63 - 100 + number),
        (lambda number: f"scene/{number:04d}", lambda number: number),
        (lambda number: f"{number:04d}", lambda number: f"class {number:03d}"),
        (float, float),
        (np.int64, np.int32),
    ],
)
def test_ids_of_any_kind_give_the_same_numbers(images: Any, categories: Any) -> None:
    rng = np.random.default_rng(9)
    ground_truth = random_ground_truth(rng, num_images=20, num_boxes=80)
    detections = random_detections(rng, ground_truth, detections_per_object=3)
    expected = evaluate(detections, ground_truth)
    assert evaluate(*renumbered(detections, ground_truth, images=images, categories=categories)) == expected


def test_annotations_that_refer_to_nothing_are_refused() -> None:
    with pytest.raises(AnnotationError, match="an annotation has category_id 9, which is not there"):
        evaluate([], ground_truth_of(entry(category_id=9)))


def test_differences_of_categories_are_python_warnings() -> None:
    box = entry(bbox=[10, 10, 50, 40], score=0.9)
    with pytest.warns(UserWarning, match="other category ids .* 'ship' is 1, not 7"):
        scores = evaluate([box | {"category_id": 7, "category_name": "ship"}], ground_truth_of(box))
    assert scores.ap == pytest.approx(1.0)
