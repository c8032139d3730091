"""COCO results and ground truth of few entries, for the tests."""

from typing import Any


def entry(**changes: Any) -> dict[str, Any]:
    """Return one detection of a COCO results file."""
    return {"image_id": 1, "category_id": 1, "bbox": [0.0, 0.0, 9.0, 9.0], "score": 0.5} | changes


def ground_truth_of(*annotations: dict[str, Any]) -> dict[str, Any]:
    """Return a COCO object of two images and one category."""
    return {
        "images": [{"id": 1}, {"id": 2}],
        "categories": [{"id": 1, "name": "ship"}],
        "annotations": list(annotations),
    }
