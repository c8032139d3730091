"""The devices that a test runs on: the CPU, and a GPU if there is one."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

GPU = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")],
)
DEVICES = ["cpu", GPU]


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute convolutions in fp32 without TF32, whose products have 10 bits, for comparisons with a CPU."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield
