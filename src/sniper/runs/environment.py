"""What computes a run, as far as the bits of its weights depend on it beside the experiment."""

import platform
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import cv2
import numpy as np
import PIL
import timm
import torch
import torchvision
from pydantic import PositiveInt

from sniper.data.images.formats import has_simplejpeg
from sniper.models.build import choose_precision
from sniper.models.spec import Precision
from sniper.specs import spec_dataclass

_PACKAGES = {
    "sniper": import_module("sniper"),  # by a string, as the root names modules of higher layers
    "torch": torch,
    "torchvision": torchvision,
    "timm": timm,
    "numpy": np,
    "opencv": cv2,
    "pillow": PIL,
}
"""Those that compute weights or pixels, by the name of their distribution."""


@spec_dataclass
class Environment:
    """Hardware, software and processes that compute the steps of a run.

    Attributes:
        device: its type, such as `cpu` or `cuda`.
        device_name: name of the GPU, or of the processor with its vector instructions.
        num_threads: threads of torch; None on other devices than a CPU, where they change nothing.
        world_size: number of processes.
        accumulation_steps: parts into which each process splits its share of a batch.
        precision: of the forward pass.
        compile: whether the backbone is compiled.
        versions: of the packages that compute, by name.
    """

    device: str
    device_name: str
    num_threads: PositiveInt | None
    world_size: PositiveInt
    accumulation_steps: PositiveInt
    precision: str
    compile: bool
    versions: dict[str, str]

    @classmethod
    def current(
        cls,
        device: torch.device,
        *,
        world_size: int,
        accumulation_steps: int,
        precision: Precision,
        compile: bool,
        libraries: Sequence[str] = (),
    ) -> "Environment":
        """Return the environment of this process; `auto` precision is resolved.

        Args:
            device: that computes.
            world_size: see the attributes.
            accumulation_steps: see the attributes.
            precision: see the attributes.
            compile: see the attributes.
            libraries: names of installed packages that compute, beside those that always do.
        """
        is_cpu = device.type == "cpu"
        decoders = ("simplejpeg",) if has_simplejpeg() else ()
        return cls(
            device=device.type,
            device_name=_cpu_name() if is_cpu else _gpu_name(device),
            num_threads=torch.get_num_threads() if is_cpu else None,
            world_size=world_size,
            accumulation_steps=accumulation_steps,
            precision=choose_precision(precision, device),
            compile=compile,
            versions={name: str(package.__version__) for name, package in _PACKAGES.items()}
            | {name: version(name) for name in (*decoders, *libraries)},
        )

    def differences(self, now: "Environment") -> list[str]:
        """Describe what is different now, one phrase each."""
        before, after = self._by_label(), now._by_label()
        return [
            f"{label} was {before.get(label, 'absent')} and is {after.get(label, 'absent')}"
            for label in dict.fromkeys((*before, *after))
            if before.get(label) != after.get(label)
        ]

    def _by_label(self) -> dict[str, str | int | None]:
        return {
            "the device": self.device,
            "the name of the device": self.device_name,
            "the number of threads": self.num_threads,
            "the number of processes": self.world_size,
            "train.accumulation_steps": self.accumulation_steps,
            "the precision": self.precision,
            "train.compile": str(self.compile).lower(),
            **self.versions,
        }


@cache
def _cpu_name() -> str:
    """Return the processor's name and its vector instructions, by which torch chooses its kernels."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def _gpu_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
