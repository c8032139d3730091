"""A torchvision detector on the pyramid: three levels, and windows where an image is large.

python examples/torchvision_pyramid.py photos/*.jpg
"""

import sys
from collections.abc import Sequence

import torch
from torchvision.models.detection import (
    FasterRCNN,
    FasterRCNN_MobileNet_V3_Large_FPN_Weights,
    fasterrcnn_mobilenet_v3_large_fpn,
)

from sniper import Detections, Detector, LevelSpec
from sniper.config.experiment import PredictSpec
from sniper.data.datasets import Category

SPEC = PredictSpec(
    levels=(
        LevelSpec(factor=2.0, below=90),
        LevelSpec(factor=1.0, at_least=32, below=180),
        LevelSpec(long_side=640, at_least=75),
    ),
    merge="hard",
)


def build_detector(model: FasterRCNN, class_names: Sequence[str], device: torch.device) -> Detector:
    """Wrap a torchvision detector.

    Args:
        model: in evaluation mode, on the device.
        class_names: in the order of the model's labels, which start at 1; 0 is the background.
        device: device of the model.
    """

    def detect_one(image: torch.Tensor) -> Detections:
        # The level decides the scale, so torchvision must not resize: its sides become those of the image.
        sides = image.shape[1:]
        model.transform.min_size, model.transform.max_size = (min(sides),), max(sides)
        with torch.inference_mode():
            (output,) = model([image.float() / 255])
        return Detections(
            boxes=output["boxes"].double().cpu().numpy(),
            scores=output["scores"].double().cpu().numpy(),
            labels=output["labels"].cpu().numpy() - 1,
        )

    return Detector(
        detect=lambda images: [detect_one(image) for image in images],
        spec=SPEC,
        categories=tuple(
            Category(category_id=label, name=name) for label, name in enumerate(class_names, start=1)
        ),
        device=device,
    )


def main() -> None:
    weights = FasterRCNN_MobileNet_V3_Large_FPN_Weights.DEFAULT
    model = fasterrcnn_mobilenet_v3_large_fpn(weights=weights).eval()
    detector = build_detector(model, weights.meta["categories"][1:], torch.device("cpu"))
    for path in sys.argv[1:]:
        detections = detector.predict(path, min_score=0.5)
        print(path, detections)
        for box, score, name in zip(detections.boxes, detections.scores, detections.names, strict=True):
            print(f"  {name} {score:.2f}", box.round(1).tolist())


if __name__ == "__main__":
    main()
