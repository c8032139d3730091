"""A detector as one graph detects what the detector does, in images of any sides."""

from pathlib import Path

import numpy as np
import pytest
import torch

from sniper.errors import ExportError
from sniper.geometry.boxes import Sides
from sniper.models.graphs import build_graph, check_exportable, pool_pyramid
from sniper.models.spec import BackboneSpec, DetectorSpec, MaskHeadSpec
from tests.models.graphs import DETECTORS, build_random, detect_in_graph, draw_noise


@pytest.mark.parametrize("name", DETECTORS)
@pytest.mark.parametrize("sides", [Sides(300, 250), Sides(64, 64), Sides(400, 190)])
def test_the_graph_detects_what_the_detector_does(name: str, sides: Sides, tmp_path: Path) -> None:
    model = build_random(name, tmp_path).for_inference()
    image = draw_noise(sides, seed=1)
    with torch.inference_mode():
        (expected,) = model.detect([torch.from_numpy(image).permute(2, 0, 1)])
    found = detect_in_graph(build_graph(model), image)
    assert len(expected) > 5
    order, other = (np.lexsort((*each.boxes.T, each.labels)) for each in (expected, found))
    np.testing.assert_array_equal(found.labels[other], expected.labels[order])
    np.testing.assert_allclose(found.boxes[other], expected.boxes[order], atol=1e-3)
    np.testing.assert_allclose(found.scores[other], expected.scores[order], atol=1e-5)


@pytest.mark.parametrize("count", [0, 1, 50])
def test_rois_are_pooled_from_the_maps_that_torchvision_chooses(count: int) -> None:
    model = build_random("fpn", Path()).eval()
    maps = [torch.randn(1, 8, side, side) for side in (64, 32, 16, 8)]
    corners = torch.rand(count, 2) * 100
    rois = torch.cat([corners, corners + torch.rand(count, 1) ** 3 * 150 + 1], dim=1)
    strides = (4, 8, 16, 32)
    ordered, pooled = pool_pyramid(maps, rois, strides=strides, side=7)
    expected = model.roi_head.pool([*maps, maps[-1]], [ordered])
    torch.testing.assert_close(pooled, expected)
    assert sorted(ordered.tolist()) == sorted(rois.tolist())


@pytest.mark.parametrize(
    "spec",
    [
        DetectorSpec(mask_head=MaskHeadSpec()),
        DetectorSpec(
            kind="torchvision", name="maskrcnn_resnet50_fpn", backbone=BackboneSpec(pretrained=False)
        ),
    ],
    ids=lambda spec: spec.kind,
)
def test_a_detector_of_masks_is_refused(spec: DetectorSpec) -> None:
    with pytest.raises(ExportError, match="predicts masks cannot be exported"):
        check_exportable(spec)
