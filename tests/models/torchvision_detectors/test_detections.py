"""Images of any sides are searched at their scale, alone as in a batch, as torchvision searches them."""

import copy

import numpy as np
import pytest
import torch
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.image_list import ImageList

from sniper.models.protocol import ProposingModel
from sniper.models.torchvision_detectors.one_stage import FixedDefaultBoxes
from tests.models.torchvision_detectors.specs import SPECS, SSD, build


def noise(width: int, height: int, *, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (3, height, width), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("name", SPECS)
def test_images_of_any_sides_are_searched(name: str) -> None:
    model = build(name).eval()
    for width, height in ((1, 1), (40, 90), (350, 20)):
        (detections,) = model.detect([noise(width, height)])
        assert (detections.boxes >= 0).all()
        assert (detections.boxes <= np.array([width, height, width, height])).all()
        assert (detections.boxes[:, 2:] > detections.boxes[:, :2]).all()
        assert set(detections.labels.tolist()) <= {0, 1, 2}


@pytest.mark.parametrize("name", SPECS)
def test_an_image_has_the_same_detections_in_a_batch_as_alone(name: str) -> None:
    model = build(name).eval()
    images = [noise(100, 120), noise(128, 70, seed=1)]
    for alone, image in zip(model.detect(images), images, strict=True):
        (expected,) = model.detect([image])
        order = np.lexsort(alone.boxes.round(2).T), np.lexsort(expected.boxes.round(2).T)
        np.testing.assert_allclose(alone.boxes[order[0]], expected.boxes[order[1]], atol=1e-2)
        np.testing.assert_allclose(alone.scores[order[0]], expected.scores[order[1]], atol=1e-5)


@pytest.mark.parametrize("name", SPECS)
def test_the_copy_for_inference_has_the_same_detections(name: str) -> None:
    model = build(name).eval()
    state = copy.deepcopy(model.state_dict())
    (expected,), (detections,) = (each.detect([noise(128, 128)]) for each in (model, model.for_inference()))
    np.testing.assert_allclose(detections.scores[:10], expected.scores[:10], atol=1e-5)
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


def test_detections_equal_those_of_torchvision_itself() -> None:
    # Its transform leaves images of 320 pixels as they are.
    model, image = build(SSD).eval(), noise(320, 320)
    model.net.score_thresh = 0.2
    (detections,) = model.detect([image])
    (expected,) = model.net([image.float() / 255])
    assert len(detections) > 0
    np.testing.assert_allclose(detections.boxes, expected["boxes"].detach().numpy(), atol=1e-4)
    assert detections.labels.tolist() == (expected["labels"] - 1).tolist()


def test_proposals_are_those_of_torchvision() -> None:
    model, image = build("faster_rcnn").eval(), noise(128, 128)
    assert isinstance(model, ProposingModel)
    (proposals,) = model.propose([image])
    maps = model.features(image[None])
    (expected,), _ = model.net.rpn(ImageList(image[None].float(), [(128, 128)]), maps)
    torch.testing.assert_close(proposals.boxes, expected)
    assert (proposals.scores.diff() <= 0).all()


@pytest.mark.parametrize(
    ("generator", "side", "grids"),
    [
        (
            DefaultBoxGenerator(
                [[2], [2, 3], [2, 3], [2, 3], [2], [2]],
                scales=[0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05],
                steps=[8, 16, 32, 64, 100, 300],
            ),
            300,
            (38, 19, 10, 5, 3, 1),
        ),
        (
            DefaultBoxGenerator([[2, 3] for _ in range(6)], min_ratio=0.2, max_ratio=0.95),
            320,
            (20, 10, 5, 3, 2, 1),
        ),
    ],
)
def test_default_boxes_are_those_of_torchvision_at_its_size_and_no_larger_beyond(
    generator: DefaultBoxGenerator, side: int, grids: tuple[int, ...]
) -> None:
    fixed = FixedDefaultBoxes(generator, side=side)

    def images_of(side: int) -> ImageList:
        return ImageList(torch.zeros(1, 3, side, side), [(side, side)])

    maps = [torch.zeros(1, 1, grid, grid) for grid in grids]
    (boxes,), (expected,) = fixed(images_of(side), maps), generator(images_of(side), maps)
    torch.testing.assert_close(boxes, expected, atol=1e-3, rtol=0)
    larger = [torch.zeros(1, 1, 2 * grid, 2 * grid) for grid in grids]
    (boxes_of_larger,) = fixed(images_of(2 * side), larger)

    def sizes_of(boxes: torch.Tensor) -> set[tuple[float, ...]]:
        return {tuple(sides) for sides in (boxes[:, 2:] - boxes[:, :2]).round(decimals=1).tolist()}

    assert sizes_of(boxes_of_larger) == sizes_of(boxes)
