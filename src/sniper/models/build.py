"""Build a detector from its spec, for training or for inference, and select the precision of its computations."""

import torch

from sniper.errors import OutOfMemory, counted
from sniper.models import backbone
from sniper.models.protocol import DetectorModel
from sniper.models.spec import DetectorSpec, Precision
from sniper.models.two_stage import TwoStageDetector
from sniper.models.weights import LibraryWeights


def build_detector(
    spec: DetectorSpec, *, num_classes: int, seed: int = 0, has_weights: bool = True
) -> DetectorModel:
    """Build a detector; layers without pretrained weights are initialised from the seed.

    See `TwoStageDetector` for the other arguments and errors.

    Raises:
        OutOfMemory: if it does not fit into memory.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            if spec.kind == "torchvision":
                from sniper.models.torchvision_detectors.build import build_torchvision

                return build_torchvision(spec, num_classes=num_classes, has_weights=has_weights)
            if spec.kind == "transformers":
                from sniper.models.transformers_detectors.build import build_transformers

                return build_transformers(spec, num_classes=num_classes)
            return TwoStageDetector(spec, num_classes=num_classes, has_weights=has_weights)
        except RuntimeError as error:
            if "can't allocate memory" not in str(error):
                raise
            if spec.kind != "two_stage":
                raise OutOfMemory(
                    f"model: {spec.name} with {num_classes} classes does not fit into memory"
                ) from error
            raise OutOfMemory(
                f"model: a detector of {counted(num_classes, 'class', 'classes')} with rpn.channels "
                f"{spec.rpn.channels}, roi_head.channels {spec.roi_head.channels}, roi_head.pool_size "
                f"{spec.roi_head.pool_size} and roi_head.hidden_dim {spec.roi_head.hidden_dim} does not fit into memory"
            ) from error


def check_available(spec: DetectorSpec) -> None:
    """Check that the weights that a detector starts from are on this machine, or that the server that has them answers.

    Raises:
        ConfigError: if there is no such detector, or it has no such weights.
        WeightsError: if they must be downloaded and the server does not answer within a few seconds.
    """
    if spec.kind == "transformers":
        from sniper.models.transformers_detectors import hub

        hub.check_available(spec)
    elif spec.has_own_backbone:
        from sniper.models.torchvision_detectors import weights

        weights.check_available(spec)
    else:
        backbone.check_available(spec.backbone)


def find_download(spec: DetectorSpec) -> str | None:
    """Describe the weights that must be downloaded, with their size; None if there are none. Uses no network."""
    if spec.kind == "transformers":
        from sniper.models.transformers_detectors import hub

        return hub.find_download(spec)
    if spec.has_own_backbone:
        from sniper.models.torchvision_detectors import weights

        return weights.find_download(spec)
    return backbone.find_download(spec.backbone)


def resolve(spec: DetectorSpec, *, earlier: DetectorSpec | None = None) -> DetectorSpec:
    """Return a detector with what its name stands for, so that it can be built again without files of a library.

    Args:
        spec: the configuration.
        earlier: the same detector, resolved, from which it is taken without reading files; None reads them.

    Raises:
        ConfigError: if there is no such detector.
        WeightsError: if its configuration must be downloaded and cannot be.
    """
    if spec.kind != "transformers":
        return spec
    from sniper.models.transformers_detectors import config

    return config.resolve(spec, earlier=earlier)


def load_library_weights(spec: DetectorSpec) -> LibraryWeights:
    """Load the weights of a whole detector that its library has, or a file for it.

    Raises:
        ConfigError: if there are no such weights.
        WeightsError: if they cannot be downloaded, read, or belong to another detector.
    """
    if spec.kind == "transformers":
        from sniper.models.transformers_detectors import weights as of_transformers

        return of_transformers.load_library_weights(spec)
    from sniper.models.torchvision_detectors import weights as of_torchvision

    return of_torchvision.load_library_weights(spec)


def choose_precision(precision: Precision, device: torch.device) -> Precision:
    """Return a precision; in place of `auto`, bf16 where the device computes it natively, else fp32."""
    if precision != "auto":
        return precision
    is_native = _gpu_has_bf16(device) if device.type == "cuda" else _cpu_has_bf16()
    return "bf16" if is_native else "fp32"


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """Return the autocast context of a precision; see `choose_precision`."""
    precision = choose_precision(precision, device)
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=precision != "fp32")


def _gpu_has_bf16(device: torch.device) -> bool:
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)


def _cpu_has_bf16() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
