"""Scores of masks, against pycocotools."""

import contextlib
import copy
import io
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as reference
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from sniper import evaluate, load_dataset
from sniper.errors import AnnotationError, DetectionsError
from sniper.evaluation import blocks
from sniper.evaluation.coco import score
from sniper.evaluation.comparison import ResampledAP
from sniper.evaluation.diagnosis import diagnose
from sniper.evaluation.pair import EvaluationPair
from sniper.evaluation.results import load_detections
from tests.cli.commands import CommandLine
from tests.data_folder import find_data

SQUARE = [[0, 0, 40, 0, 40, 40, 0, 40]]
BOX: dict[str, Any] = {"image_id": 1, "category_id": 1, "bbox": [0, 0, 40, 40], "segmentation": SQUARE}


def truth_of(*annotations: dict[str, Any]) -> dict[str, Any]:
    return {
        "images": [{"id": 1, "width": 80, "height": 60, "file_name": "a.jpg"}],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [
            {"id": number, "area": 1600, "iscrowd": 0, **each} for number, each in enumerate(annotations, 1)
        ],
    }


def draw_detections(truth: COCO, *, seed: int) -> list[dict[str, Any]]:
    """Draw detections: masks of the objects, moved and with holes, some of other classes, with tied scores."""
    rng = np.random.default_rng(seed)
    categories = [category["id"] for category in truth.dataset["categories"]]
    detections = []
    for annotation in truth.dataset["annotations"]:
        for _ in range(int(rng.integers(0, 3))):
            moved = np.roll(truth.annToMask(annotation), rng.integers(-5, 6, 2), (0, 1))
            moved[rng.integers(0, moved.shape[0]) :: 7] = 0
            encoded = reference.encode(np.asfortranarray(moved))
            is_right = rng.random() < 0.8
            detections.append(
                {
                    "image_id": annotation["image_id"],
                    "category_id": annotation["category_id"] if is_right else int(rng.choice(categories)),
                    "bbox": reference.toBbox(encoded).tolist(),
                    "score": round(float(rng.random()), 1),
                    "segmentation": {**encoded, "counts": encoded["counts"].decode()},
                }
            )
    return detections


def evaluate_with_pycocotools(truth: COCO, detections: list[dict[str, Any]], **params: Any) -> COCOeval:
    """Return the evaluation of masks; without boxes, areas are those of the masks."""
    masks = [{key: each for key, each in row.items() if key != "bbox"} for row in detections]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, truth.loadRes(copy.deepcopy(masks)), "segm")
        vars(evaluation.params).update(params)
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def load_coco_masks() -> tuple[Path, COCO]:
    path = find_data("data/coco_masks/test.json")  # polygons, and crowds as run lengths
    with contextlib.redirect_stdout(io.StringIO()):
        return path, COCO(str(path))


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools
@pytest.mark.parametrize("seed", [0, 1])
def test_scores_of_masks_equal_those_of_pycocotools(seed: int) -> None:
    path, truth = load_coco_masks()
    detections = draw_detections(truth, seed=seed)
    scores = evaluate(detections, load_dataset(path, has_images=False))
    reference_ = evaluate_with_pycocotools(truth, detections)
    with contextlib.redirect_stdout(io.StringIO()):
        reference_.summarize()
    assert scores.masks is not None
    assert list(scores.masks.numbers.values()) == pytest.approx(reference_.stats.tolist(), abs=1e-12)
    assert scores.masks.ap != scores.ap
    precision, recall = reference_.eval["precision"][..., 0, 2], reference_.eval["recall"][..., 0, 2]
    for label, row in enumerate(scores.masks.classes):
        assert row.ap == pytest.approx(precision[:, :, label].mean(), abs=1e-12)
        assert row.ar == pytest.approx(recall[:, label].mean(), abs=1e-12)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools
def test_scores_of_masks_by_size_equal_those_of_pycocotools() -> None:
    path, truth = load_coco_masks()
    detections = draw_detections(truth, seed=2)
    edges = (0.0, 25.0, 60.0, 150.0)
    params = {
        "areaRng": [[low**2, np.nextafter(high**2, 0)] for low, high in pairwise(edges)],
        "areaRngLbl": ["a", "b", "c"],
        "maxDets": [100],
    }
    masks = EvaluationPair.of(detections, load_dataset(path, has_images=False)).for_masks()
    assert masks is not None
    by_class = evaluate_with_pycocotools(truth, detections, **params).eval
    any_class = evaluate_with_pycocotools(truth, detections, **params, useCats=0).eval["recall"]
    for a, scores in enumerate(diagnose(masks, sizes=edges).sizes):
        precision, recall = by_class["precision"][:, :, :, a], by_class["recall"][:, :, a]
        assert scores.ap == pytest.approx(precision[precision > -1].mean(), abs=1e-12)
        assert scores.recall == pytest.approx(recall[recall > -1].mean(), abs=1e-12)
        assert scores.any_class_recall == pytest.approx(any_class[:, :, a].mean(), abs=1e-12)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools
def test_masks_are_resampled_by_their_overlaps() -> None:
    path, truth = load_coco_masks()
    pair = EvaluationPair.of(draw_detections(truth, seed=3), load_dataset(path, has_images=False))
    masks = pair.for_masks()
    assert masks is not None
    resampled = ResampledAP(masks)
    assert resampled(np.ones(resampled.num_images, np.int64)) == pytest.approx(score(masks).ap, abs=1e-12)
    assert score(masks).ap == pytest.approx(score(pair).masks.ap)  # type: ignore[union-attr]


def test_masks_of_a_crowded_image_are_not_split(monkeypatch: pytest.MonkeyPatch) -> None:
    objects = [{**BOX, "segmentation": [[i, 0, i + 20, 0, i + 20, 40, i, 40]]} for i in range(30)]
    pair = EvaluationPair.of([{**each, "score": 0.9} for each in objects], truth_of(*objects))
    masks = pair.for_masks()
    assert masks is not None
    expected = score(masks)
    monkeypatch.setattr(blocks, "MAX_OVERLAPS", 100)
    assert score(masks) == expected
    monkeypatch.setattr(blocks, "_MOST_OVERLAPS", 100)
    with pytest.raises(DetectionsError, match="masks of 30 detections and 30 objects are too many"):
        score(masks)


def test_masks_are_scored_by_their_overlap_and_not_by_that_of_boxes() -> None:
    half = [[0, 0, 40, 0, 0, 40]]  # of the area of the square
    scores = evaluate([{**BOX, "segmentation": half, "score": 0.9}], truth_of(BOX))
    assert scores.masks is not None
    assert scores.ap50 == pytest.approx(1)
    assert scores.masks.ap75 == pytest.approx(0)
    assert evaluate([{**BOX, "score": 0.9}], truth_of(BOX)).masks.ap == pytest.approx(1)  # type: ignore[union-attr]


def test_an_object_without_a_mask_is_a_region_to_ignore() -> None:
    bare = {**BOX, "bbox": [42, 0, 30, 30], "segmentation": []}
    inside = {**BOX, "bbox": [45, 5, 10, 10], "segmentation": [[45, 5, 55, 5, 55, 15, 45, 15]], "score": 0.95}
    scores = evaluate([{**BOX, "score": 0.9}, inside], truth_of(BOX, bare))
    assert scores.masks is not None
    assert scores.masks.ap == pytest.approx(1)
    assert scores.ap < 1


def test_a_detection_without_a_mask_is_a_false_positive() -> None:
    bare = {key: each for key, each in BOX.items() if key != "segmentation"}
    scores = evaluate([{**bare, "score": 0.95}, {**BOX, "score": 0.9}], truth_of(BOX))
    assert scores.masks is not None
    assert scores.masks.ap == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("has_masks", "annotation"),
    [(False, BOX), (True, {**BOX, "segmentation": []})],
    ids=["no detection has one", "no object has one"],
)
def test_there_are_no_scores_of_masks_without_masks(has_masks: bool, annotation: dict[str, Any]) -> None:
    detection = {**BOX, "score": 0.9, "segmentation": SQUARE if has_masks else None}
    assert evaluate([detection], truth_of(annotation)).masks is None


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        (
            {"size": [50, 80], "counts": [4000]},
            r"entry 0 of image 1: size is \[50, 80\], expected \[60, 80\]",
        ),
        ({"size": [60, 80], "counts": [100, 20]}, r"1 mask with run lengths that do not fill the image"),
        ({"size": [60, 80], "counts": "?\t"}, r"1 mask with run lengths that do not fill the image"),
        ({"size": [60, 80]}, r"entry 0: segmentation is an object with size: a mask that cannot be read"),
        ([[1, 2, 3, 4, 5]], r"segmentation is \[\[1, 2, 3, 4, 5\]\]: a mask that cannot be read"),
        ([[1, 2, 3, 4]], r"a mask with a polygon of fewer than 3 points"),
    ],
)
def test_masks_of_detections_that_cannot_be_scored_are_refused(segmentation: Any, message: str) -> None:
    with pytest.raises(DetectionsError, match=message):
        evaluate([{**BOX, "score": 0.9, "segmentation": segmentation}], truth_of(BOX))


def test_masks_of_a_coco_object_that_cannot_be_read_are_refused() -> None:
    with pytest.raises(AnnotationError, match=r"annotations\[0\]: has a mask that cannot be read"):
        evaluate([], truth_of({**BOX, "segmentation": [["x"]]}))


def test_masks_of_a_file_equal_those_of_its_entries(tmp_path: Path) -> None:
    encoded = {"size": [60, 80], "counts": [0, 120, 4680]}
    entries = [{**BOX, "score": 0.9}, {**BOX, "score": 0.8, "segmentation": encoded}] * 900  # several chunks
    path = tmp_path / "detections.json"
    path.write_text(json.dumps(entries))
    masks = load_detections(path).masks
    expected = EvaluationPair.of(entries, truth_of(BOX)).masks
    assert masks is not None
    assert expected is not None
    assert masks.to_coco() == expected.to_coco()


def test_evaluate_prints_the_numbers_of_boxes_and_masks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sniper, paths = CommandLine(capsys), (tmp_path / "detections.json", tmp_path / "truth.json")
    paths[0].write_text(json.dumps([{**BOX, "score": 0.9, "segmentation": [[0, 0, 40, 0, 40, 33, 0, 33]]}]))
    paths[1].write_text(json.dumps(truth_of(BOX)))
    answer = sniper.json("evaluate", *paths)
    assert list(answer["bbox"]) == list(answer["segm"])
    assert len(answer["segm"]) == 12
    assert answer["bbox"]["ap"] == answer["ap"] == pytest.approx(1)
    assert answer["segm"]["ar_100"] == pytest.approx(0.7)  # an overlap of 0.825
    assert answer["segm"]["ap_large"] is None
    assert answer["classes"][0]["segm_ap"] == answer["segm"]["ap"]
    assert "boxes  masks" in sniper.text("evaluate", *paths).out
    bare = {key: each for key, each in BOX.items() if key != "segmentation"}
    paths[0].write_text(json.dumps([{**bare, "score": 0.9}]))
    assert sniper.json("evaluate", *paths)["segm"] is None


@pytest.mark.usefixtures("few_draws")
def test_details_and_differences_are_also_of_masks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sniper = CommandLine(capsys)
    truth, found, other = (tmp_path / name for name in ("truth.json", "found.json", "other.json"))
    images = [{"id": i, "width": 80, "height": 60, "file_name": f"{i}.jpg"} for i in range(4)]
    objects = [{**BOX, "image_id": i, "id": i, "area": 1600, "iscrowd": 0} for i in range(4)]
    half = [[0, 0, 40, 0, 0, 40]]  # in the same box
    truth.write_text(json.dumps({**truth_of(), "images": images, "annotations": objects}))
    found.write_text(json.dumps([{**each, "score": 0.9} for each in objects]))
    low = [{**each, "score": 0.8, "segmentation": [[0, 0, 9, 0, 0, 9]]} for each in objects]
    other.write_text(json.dumps([{**each, "score": 0.9, "segmentation": half} for each in objects] + low))
    score = ("evaluate", found, truth, "--against", other, "--details", "--sizes", "0", "30", "50")
    answer = sniper.json(*score)
    assert answer["ap_difference"] == pytest.approx(0)
    others = sniper.json("evaluate", other, truth)["segm"]
    assert answer["segm_ap_difference"] == pytest.approx(answer["segm"]["ap"] - others["ap"])
    assert answer["fp_per_image_at_90_difference"] == 0
    assert answer["segm_fp_per_image_at_90_difference"] is None  # the triangles overlap by less than a half
    rows = [(row["recall"], row["segm_recall"], row["segm_ap"]) for row in answer["sizes"]]
    assert rows == [(None, None, None), pytest.approx((1, 1, 1)), (None, None, None)]
    out = sniper.text(*score).out
    assert "AP of masks minus that of --against: +1.000, 95 % interval +1.000 to +1.000" in out
    assert "false positives of masks per image minus those of --against" in out
    assert "by size of the object, masks" in out
    bare = [{key: each for key, each in row.items() if key != "segmentation"} for row in low]
    other.write_text(json.dumps(bare))
    assert "segm_ap_difference" not in sniper.json(*score)
    assert "of masks" not in sniper.text(*score).out
