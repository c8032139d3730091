"""Build a detector from its spec, for training or for inference, and select the precision of its computations."""

import copy

import torch

from sniper.errors import OutOfMemory, counted
from sniper.models.folding import fold_batch_norm
from sniper.models.spec import DetectorSpec, Precision
from sniper.models.two_stage import TwoStageDetector


def build_detector(
    spec: DetectorSpec, *, num_classes: int, seed: int = 0, has_weights: bool = True
) -> TwoStageDetector:
    """Build a detector; layers without pretrained weights are initialised from the seed.

    See `TwoStageDetector` for the other arguments and errors.

    Raises:
        OutOfMemory: if it does not fit into memory.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return TwoStageDetector(spec, num_classes=num_classes, has_weights=has_weights)
        except RuntimeError as error:
            if "can't allocate memory" not in str(error):
                raise
            raise OutOfMemory(
                f"model: a detector of {counted(num_classes, 'class', 'classes')} with rpn.channels "
                f"{spec.rpn.channels}, roi_head.channels {spec.roi_head.channels}, roi_head.pool_size "
                f"{spec.roi_head.pool_size} and roi_head.hidden_dim {spec.roi_head.hidden_dim} does not fit into memory"
            ) from error


def build_inference_model(model: TwoStageDetector) -> TwoStageDetector:
    """Return a faster copy of a detector for inference: batch norm folded, weights in channels-last layout.

    Args:
        model: in evaluation mode; it is not changed.
    """
    model = copy.deepcopy(model)
    model.backbone.trunk = fold_batch_norm(model.backbone.trunk)
    return model.to(memory_format=torch.channels_last)


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
