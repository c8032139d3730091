"""Masks of detections: pasted, encoded and outlined against torch, pycocotools and brute force."""

import resource

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco
from torch.nn import functional

from sniper.geometry import Detections
from sniper.geometry.boxes import Sides
from sniper.geometry.detection_masks import DetectionMasks
from sniper.geometry.masks import MaskArrays
from sniper.geometry.nms import soft_nms, weighted_box_fusion


def random_masks(
    seed: int, *, count: int = 6, width: int = 40, height: int = 30, side: int = 28
) -> DetectionMasks:
    """Return blobs in boxes that may reach beyond the image."""
    generator = np.random.default_rng(seed)
    corners = generator.uniform(-5, [width, height], size=(count, 2))
    boxes = np.concatenate([corners, corners + generator.uniform(0.3, 25, size=(count, 2))], axis=1)
    coarse = torch.from_numpy(generator.uniform(0, 255, size=(count, 1, 5, 5)))
    grids = functional.interpolate(coarse, (side, side), mode="bilinear")[:, 0].numpy().astype(np.uint8)
    return DetectionMasks.of(grids, boxes).in_image(Sides(width, height))


def area_of(ring: np.ndarray) -> float:
    return cv2.contourArea((ring - ring[0]).astype(np.float32))


def paste_with_torch(masks: DetectionMasks) -> np.ndarray:
    """Paste masks by torch's sampling of grids."""
    width, height = masks.sides[0].tolist()
    pasted = []
    for grid, (x1, y1, x2, y2) in zip(masks.grids, masks.boxes.tolist(), strict=True):
        x, y = torch.arange(width).double() + 0.5, torch.arange(height).double() + 0.5
        u, v = (x - x1) / (x2 - x1) * 2 - 1, (y - y1) / (y2 - y1) * 2 - 1
        places = torch.stack(torch.meshgrid(u, v, indexing="xy"), dim=-1)[None]
        values = functional.grid_sample(
            torch.from_numpy(grid).double()[None, None], places, padding_mode="border", align_corners=False
        )[0, 0]
        is_inside = ((u >= -1) & (u < 1))[None, :] & ((v >= -1) & (v < 1))[:, None]
        pasted.append(((values >= 127.5) & is_inside).numpy())
    return np.array(pasted)


@pytest.mark.parametrize("seed", range(8))
def test_masks_are_pasted_as_torch_samples_their_grids(seed: int) -> None:
    masks = random_masks(seed)
    different = masks.to_arrays() != paste_with_torch(masks)
    assert masks.to_arrays().any()
    assert different.sum() <= 2  # rounding at the threshold


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.sampled_from([2, 4, 28]))
def test_encodings_equal_those_of_pycocotools(seed: int, side: int) -> None:
    masks = random_masks(seed, side=side)
    for array, encoding in zip(masks.to_arrays(), masks.to_rle().to_coco(), strict=True):
        expected = coco.encode(np.asfortranarray(array.astype(np.uint8)))
        assert encoding == {"size": expected["size"], "counts": expected["counts"].decode()}


@pytest.mark.parametrize(
    "box",
    [
        (0, 0, 6, 5),  # the whole image: one run
        (0, 0, 3, 5),  # runs over whole columns
        (2, 0, 6, 5),
        (-3, -3, 9, 9),
        (1, 1, 1, 4),  # without width
        (7, 0, 9, 5),  # beyond the image
        (2.6, 1, 3.4, 4),  # between the centres of pixels
        (2.4, 1, 2.6, 2),
        (0, 3, 6, 5),
    ],
)
def test_encodings_of_boxes_at_edges_equal_those_of_pycocotools(box: tuple[float, ...]) -> None:
    masks = DetectionMasks.of(np.full((1, 28, 28), 255, np.uint8), np.array([box], dtype=np.float64))
    masks = masks.in_image(Sides(6, 5))
    (encoding,) = masks.to_rle().to_coco()
    expected = coco.encode(np.asfortranarray(masks.to_arrays()[0].astype(np.uint8)))
    assert encoding == {"size": [5, 6], "counts": expected["counts"].decode()}


def test_no_masks_are_encoded_as_nothing() -> None:
    assert DetectionMasks.empty().to_rle().to_coco() == []
    assert DetectionMasks.empty().in_image(Sides(6, 5)).to_arrays().shape[0] == 0


def test_masks_of_an_unknown_image_are_refused() -> None:
    masks = DetectionMasks.of(np.zeros((1, 28, 28), np.uint8), np.array([[0.0, 0.0, 2.0, 2.0]]))
    with pytest.raises(ValueError, match="size of their image, which is not known"):
        masks.to_rle()
    with pytest.raises(ValueError, match="size of their image, which is not known"):
        masks.to_arrays()


@pytest.mark.parametrize("seed", range(4))
def test_outlines_enclose_the_pixels_of_a_mask(seed: int) -> None:
    masks = random_masks(seed, width=400, height=300)
    masks = masks.with_boxes(np.clip(masks.boxes * 10, 0, [400, 300, 400, 300]))
    for row, array in enumerate(masks.to_arrays()):
        parts = masks.outlines(row)
        area = sum(area_of(outer) - sum(area_of(hole) for hole in holes) for outer, *holes in parts)
        length = sum(np.abs(np.diff(ring, axis=0)).sum() for part in parts for ring in part)
        assert abs(area - array.sum()) <= 1 + 0.5 * length
        for part in parts:
            for ring in part:
                assert (ring[0] == ring[-1]).all()
                assert (ring >= masks.boxes[row, :2] - 1e-9).all()
                assert (ring <= masks.boxes[row, 2:] + 1e-9).all()


def test_a_full_mask_is_outlined_by_its_box() -> None:
    masks = DetectionMasks.of(np.full((1, 28, 28), 255, np.uint8), np.array([[2.0, 3.0, 10.0, 7.0]]))
    ((ring,),) = masks.outlines(0)
    assert ring.min(axis=0).tolist() == [2, 3]
    assert ring.max(axis=0).tolist() == [10, 7]
    assert area_of(ring) == pytest.approx(32)


def test_a_mask_with_a_hole_has_two_rings_and_an_empty_one_none() -> None:
    grids = np.full((2, 28, 28), 255, np.uint8)
    grids[0, 10:18, 10:18] = 0
    grids[1] = 0
    masks = DetectionMasks.of(grids, np.array([[0.0, 0.0, 28.0, 28.0]] * 2))
    ((outer, hole),) = masks.outlines(0)
    assert area_of(outer) == pytest.approx(784)
    assert area_of(hole) == pytest.approx(64, abs=3)
    assert masks.outlines(1) == []


def detections_with_masks() -> Detections:
    boxes = np.array([[0.0, 0, 10, 10], [0.0, 0, 10, 12], [20.0, 0, 30, 10]])
    grids = np.arange(3, dtype=np.uint8)[:, None, None] + np.zeros((1, 28, 28), np.uint8)
    return Detections(
        boxes=boxes,
        scores=np.array([0.6, 0.9, 0.3]),
        labels=np.zeros(3, dtype=np.int64),
        masks=DetectionMasks.of(grids, boxes).in_image(Sides(40, 20)),
    )


def ids_of(detections: Detections) -> list[int]:
    assert detections.masks is not None
    return detections.masks.grids[:, 0, 0].tolist()


def test_masks_stay_with_their_detections() -> None:
    detections = detections_with_masks()
    assert ids_of(detections[::-1]) == [2, 1, 0]
    assert ids_of(detections[1]) == [1]
    assert ids_of(Detections.join([detections, Detections.empty(), detections[:1]])) == [0, 1, 2, 0]
    assert ids_of(soft_nms(detections, decay="hard")) == [1, 2]
    assert ids_of(soft_nms(detections)) == [1, 2, 0]
    assert ids_of(detections.confident(0.2)) == [1, 2]


def test_a_fused_detection_has_the_mask_of_its_best_member_in_its_place() -> None:
    fused = weighted_box_fusion(detections_with_masks())
    assert ids_of(fused) == [1, 2]
    assert fused.masks is not None
    assert fused.masks.boxes[0].tolist() == [0, 0, 10, 12]
    assert fused.boxes[0, 3] == pytest.approx(11.2)


def test_detections_with_and_without_masks_are_not_joined() -> None:
    detections = detections_with_masks()
    bare = Detections(boxes=detections.boxes, scores=detections.scores, labels=detections.labels)
    with pytest.raises(ValueError, match="some of the detections have masks"):
        Detections.join([detections, bare])


def test_five_thousand_masks_of_a_large_image_are_encoded_in_little_memory() -> None:
    generator = np.random.default_rng(0)
    corners = generator.uniform(0, [11_500, 8_500], size=(5000, 2))
    boxes = np.concatenate([corners, corners + generator.uniform(10, 300, size=(5000, 2))], axis=1)
    grids = np.full((5000, 28, 28), 255, np.uint8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    encoded = DetectionMasks.of(grids, boxes).in_image(Sides(12_000, 9_000)).to_rle()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 100_000  # kilobytes
    assert encoded.measure().areas.sum() == pytest.approx(
        (boxes[:, 2:] - boxes[:, :2]).prod(axis=1).sum(), rel=0.01
    )


def test_polygons_and_encodings_become_grids_in_the_boxes_around_them() -> None:
    triangle = [[0.0, 0.0], [40.0, 0.0], [0.0, 20.0]]
    polygons = MaskArrays.from_rings([[triangle], []])
    rectangle = DetectionMasks.of(np.full((1, 28, 28), 255, np.uint8), np.array([[2.0, 3.0, 10.0, 7.0]]))
    encoded = rectangle.in_image(Sides(20, 10)).to_rle()
    masks = DetectionMasks.from_arrays(MaskArrays.concatenate([polygons, encoded]))
    assert masks.boxes.tolist() == [[0, 0, 40, 20], [0, 0, 0, 0], [2, 3, 10, 7]]
    clipped = DetectionMasks.from_arrays(polygons, window=np.array([10.0, 5, 20, 50]))
    assert clipped.boxes[0].tolist() == [10, 5, 20, 20]
    ((ring,),) = masks.outlines(0)
    assert area_of(ring) == pytest.approx(400, rel=0.02)
    assert masks.outlines(1) == []
    ((ring,),) = masks.outlines(2)
    assert area_of(ring) == pytest.approx(32)
