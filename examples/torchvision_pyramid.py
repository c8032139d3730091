"""Any detector on the pyramid: one of torchvision, searched at three levels, in windows where an image is large.

python examples/torchvision_pyramid.py shots/*.jpg
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torchvision.models.detection import (
    FasterRCNN,
    FasterRCNN_MobileNet_V3_Large_FPN_Weights,
    fasterrcnn_mobilenet_v3_large_fpn,
)

from sniper import Detections, Detector, LevelSpec
from sniper.config.experiment import PredictSpec
from sniper.data.datasets import Category


def build_predictor(model: FasterRCNN, names: Sequence[str], device: torch.device) -> Detector:
    """Hand a torchvision detector to the pyramid.

    Args:
        model: in evaluation mode, on the device.
        names: of its classes, in the order of its labels, which begin at 1.
        device: where it is.
    """

    def detect_one(image: torch.Tensor) -> Detections:
        # The level has decided the scale: torchvision is to resize to what there is.
        height, width = image.shape[1:]
        model.transform.min_size, model.transform.max_size = (min(height, width),), max(height, width)
        with torch.inference_mode():
            (found,) = model([image.float() / 255])
        return Detections(
            boxes=found["boxes"].double().cpu().numpy(),
            scores=found["scores"].double().cpu().numpy(),
            labels=found["labels"].cpu().numpy() - 1,
        )

    def detect(images: Sequence[torch.Tensor]) -> list[Detections]:
        return [detect_one(image) for image in images]

    spec = PredictSpec(
        levels=(
            LevelSpec(factor=2.0, below=90),
            LevelSpec(factor=1.0, at_least=32, below=180),
            LevelSpec(long_side=640, at_least=75),
        ),
        merge="hard",
    )
    categories = tuple(Category(category_id=number, name=name) for number, name in enumerate(names, start=1))
    return Detector(detect=detect, spec=spec, categories=categories, device=device)


def main() -> None:
    weights = FasterRCNN_MobileNet_V3_Large_FPN_Weights.DEFAULT
    model = fasterrcnn_mobilenet_v3_large_fpn(weights=weights)
    predictor = build_predictor(model.eval(), weights.meta["categories"][1:], torch.device("cpu"))
    for path in map(Path, sys.argv[1:]):
        found = predictor(path)
        for box, score, label in zip(found.boxes, found.scores, found.labels, strict=True):
            if score >= 0.5:
                print(path, predictor.categories[label].name, f"{score:.2f}", box.round(1).tolist())


if __name__ == "__main__":
    main()
