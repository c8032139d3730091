"""Build a detector of transformers from its spec."""

from sniper.models.spec import DetectorSpec
from sniper.models.transformers_detectors.adapter import TransformersModel, build_net
from sniper.models.transformers_detectors.config import resolve


def build_transformers(spec: DetectorSpec, *, num_classes: int) -> TransformersModel:
    """Build a detector of transformers with random weights; trained ones are loaded by `sniper.runs.initial`.

    Args:
        spec: the configuration. If it has no architecture, that of its name is read.
        num_classes: without background.

    Raises:
        ConfigError: if transformers is not installed, or does not have such a detector.
        WeightsError: if the configuration must be downloaded and cannot be.
    """
    resolved = resolve(spec)
    return TransformersModel(resolved, build_net(resolved, num_classes), num_classes=num_classes)
