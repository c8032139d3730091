"""Detections are those of the image processors of transformers, in the frame of each image."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.ops import box_convert, clip_boxes_to_image

from sniper.models.transformers_detectors.adapter import TransformersModel
from tests.models.transformers_detectors.specs import ALL, build, transformers

PROCESSORS = {
    "conditional_detr": "ConditionalDetrImageProcessor",
    "deformable_detr": "DeformableDetrImageProcessor",
    "detr": "DetrImageProcessor",
    "rt_detr": "RTDetrImageProcessor",
    "rt_detr_v2": "RTDetrImageProcessor",
    "yolos": "YolosImageProcessor",
}


def image(width: int, height: int) -> torch.Tensor:
    values = np.random.default_rng(0).integers(0, 256, (3, height, width), dtype=np.uint8)
    return torch.from_numpy(values)


def spread(model: TransformersModel) -> TransformersModel:
    """Make random layers predict different scores, in evaluation mode."""
    generator, layouts = torch.Generator().manual_seed(0), model.class_layouts
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in layouts or "query" in name or "detection_tokens" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 2)
    return model.eval()


def outputs_of(model: TransformersModel, pixels: torch.Tensor) -> Any:
    """Run transformers' detector on an image that is not padded."""
    return model.net(pixel_values=(pixels[None].float() / 255 - model.mean) / model.std)


@pytest.mark.parametrize("name", PROCESSORS)
def test_detections_equal_those_of_the_image_processor(name: str, tmp_path: Path) -> None:
    model = spread(build(name, tmp_path, score_threshold=0.0, detections_per_window=20))
    pixels = image(192, 128)
    (detections,) = model.detect([pixels])
    with torch.no_grad():
        outputs = outputs_of(model, pixels)
    processor = getattr(transformers, PROCESSORS[name])()
    options = {"top_k": 20} if name in ("conditional_detr", "deformable_detr") else {}
    (expected,) = processor.post_process_object_detection(
        outputs, threshold=0.0, target_sizes=[(128, 192)], **options
    )
    order = expected["scores"].argsort(descending=True, stable=True)
    boxes = clip_boxes_to_image(expected["boxes"][order], (128, 192))
    has_area = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    assert len(detections) == has_area.sum() > 5
    assert detections.labels.tolist() == expected["labels"][order][has_area].tolist()
    np.testing.assert_allclose(detections.scores, expected["scores"][order][has_area], rtol=1e-5)
    np.testing.assert_allclose(detections.boxes, boxes[has_area], atol=1e-3)


def test_padding_is_left_out_where_there_is_a_mask(tmp_path: Path) -> None:
    model = spread(build("deformable_detr", tmp_path, score_threshold=0.0))
    pixels = image(130, 70)
    (detections,) = model.detect([pixels])  # padded to 192 × 128
    with torch.no_grad():
        outputs = outputs_of(model, pixels)
    scores, boxes = (
        outputs.logits[0].sigmoid().flatten(),
        box_convert(outputs.pred_boxes[0], "cxcywh", "xyxy"),
    )
    best = boxes[scores.argmax() // 3] * torch.tensor([130, 70, 130, 70])
    # The features at the border differ slightly.
    assert np.abs(detections.boxes - clip_boxes_to_image(best, (70, 130)).numpy()).max(axis=1).min() < 3


def test_boxes_are_relative_to_the_padded_image_where_there_is_no_mask(tmp_path: Path) -> None:
    model = spread(build("yolos", tmp_path, score_threshold=0.0))
    pixels = image(150, 120)
    (detections,) = model.detect([pixels])
    padded = torch.zeros((1, 3, 128, 192))
    padded[:, :, :120, :150] = ((pixels.float() / 255 - model.mean) / model.std)[0]
    with torch.no_grad():
        outputs = model.net(pixel_values=padded)
    boxes = box_convert(outputs.pred_boxes[0], "cxcywh", "xyxy") * torch.tensor([192, 128, 192, 128])
    clipped = clip_boxes_to_image(boxes, (120, 150))[outputs.logits[0].softmax(-1)[:, :-1].amax(1).argmax()]
    np.testing.assert_allclose(detections.boxes[0], clipped, atol=1e-3)


@pytest.mark.parametrize("name", ALL)
def test_images_of_any_sides_are_searched_in_one_batch(name: str, tmp_path: Path) -> None:
    model = spread(build(name, tmp_path, score_threshold=0.0, num_queries=30))
    images = [image(20, 30), image(100, 64), image(130, 70)]
    together = model.detect(images)
    for pixels, detections in zip(images, together, strict=True):
        height, width = pixels.shape[1:]
        assert (detections.boxes >= 0).all()
        assert (detections.boxes <= [width, height, width, height]).all()
        assert (detections.boxes[:, 2:] > detections.boxes[:, :2]).all()
        assert set(detections.labels.tolist()) <= {0, 1, 2}
    (alone,) = model.detect(images[2:])
    assert len(alone) == len(together[2])
    np.testing.assert_allclose(alone.scores, together[2].scores, rtol=1e-3)


def test_an_image_with_fewer_places_than_queries_is_padded(tmp_path: Path) -> None:
    model = build("rt_detr_v2", tmp_path, num_queries=300)
    assert model.min_side == 128
    (detections,) = model.eval().detect([image(10, 10)])
    assert (detections.boxes <= 10).all()


def test_detections_are_limited_in_number_and_score(tmp_path: Path) -> None:
    model = spread(build("rt_detr_v2", tmp_path, detections_per_window=7, score_threshold=0.0))
    (detections,) = model.detect([image(128, 128)])
    assert 0 < len(detections) <= 7
    assert (np.diff(detections.scores) <= 0).all()
    middle = float(np.median(detections.scores))
    limited = spread(build("rt_detr_v2", tmp_path, detections_per_window=7, score_threshold=middle))
    (better,) = limited.detect([image(128, 128)])
    assert len(better) == (detections.scores >= middle).sum()


def test_a_copy_for_inference_detects_the_same(tmp_path: Path) -> None:
    model = spread(build("d_fine", tmp_path))
    (expected,) = model.detect([image(128, 128)])
    (detections,) = model.for_inference().detect([image(128, 128)])
    np.testing.assert_allclose(detections.boxes, expected.boxes, atol=1e-3)
