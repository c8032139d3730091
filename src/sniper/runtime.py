"""Detect objects with an exported detector, by ONNX Runtime or OpenVINO; torch is neither needed nor imported.

    import sniper.runtime

    detector = sniper.runtime.load("model.onnx")
    detections = detector.predict("photo.jpg", min_score=0.3)

Whole images are searched as by every detector: at all levels, in windows where they are large, with the detections
of all windows merged. `load` returns a `Detector`.
"""

import os
from collections.abc import Mapping
from typing import Any

from sniper.files import expand_path
from sniper.inference.detector import Detector
from sniper.inference.exported import load_exported


def load(
    path: str | os.PathLike[str], device: str | None = None, *, predict: Mapping[str, Any] | None = None
) -> Detector:
    """Load a detector that `sniper export` has written; see `load_exported`, whose errors it raises."""
    return load_exported(expand_path(path), device=device, predict=predict)


__all__ = ["Detector", "load"]
