"""The processes of a distributed run: rank, world size, device, and the collectives that the package uses.

Each process has its own device, computes its share of every batch, and keeps the same weights. `torchrun` starts the
processes and sets their ranks; without it there is one, which needs no torch.
"""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from sniper.errors import ConfigError, RunError

if TYPE_CHECKING:
    import torch

_TIMEOUT = timedelta(hours=6)  # one process may take long to mine or score its share of the images
_LOST = re.compile(
    r"connection (was )?(closed|reset)|broken pipe|connection refused", re.IGNORECASE
)  # of gloo


@dataclass(frozen=True, kw_only=True)
class Processes:
    """The processes of a run, as seen from one of them.

    Attributes:
        rank: index of this process. Rank 0 writes to disk and reports.
        world_size: number of processes.
    """

    rank: int = 0
    world_size: int = 1

    @classmethod
    def from_environment(cls) -> "Processes":
        """Read rank and world size from the environment variables that torchrun sets."""
        return cls(rank=int(os.environ.get("RANK", "0")), world_size=int(os.environ.get("WORLD_SIZE", "1")))

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes to disk and reports."""
        return self.rank == 0

    @contextmanager
    def process_group(self, device: "torch.device | None") -> Iterator["Processes"]:
        """Initialize torch's process group for the duration of a block; a no-op with one process.

        Args:
            device: of this process; None for a detector that runs without torch.

        Raises:
            RunError: if another process ends inside the block.
        """
        if self.world_size == 1:
            yield self
            return
        from torch import distributed

        # CPU tensors are exchanged by gloo, so that a collective on them never waits for the GPU.
        backend = "cpu:gloo,cuda:nccl" if device is not None and device.type == "cuda" else "gloo"
        distributed.init_process_group(backend, timeout=_TIMEOUT)
        try:
            yield self
        except RuntimeError as error:
            if _LOST.search(str(error)) is None:
                raise
            raise RunError(
                f"process {self.rank} of {self.world_size}: another process has ended, see its error; what was saved "
                "before is kept"
            ) from error
        # Not after an error: the other processes may wait in a collective, and destroying would wait for them.
        distributed.destroy_process_group()

    def barrier(self) -> None:
        """Wait until all processes have reached this call."""
        if self.world_size > 1:
            import torch
            from torch import distributed

            distributed.all_reduce(torch.zeros(1))  # distributed.barrier would use NCCL and wait for the GPU

    def mean(self, values: "torch.Tensor") -> "torch.Tensor":
        """Return the mean of a tensor over all processes, in each of them."""
        if self.world_size == 1:
            return values
        from torch import distributed

        total = values.clone()
        distributed.all_reduce(total)
        return total / self.world_size

    def all_gather(self, value: Any) -> Sequence[Any]:
        """Return the values of all processes by rank, in each of them; plain data only."""
        if self.world_size == 1:
            return [value]
        from torch import distributed

        gathered: list[Any] = [None] * self.world_size
        distributed.all_gather_object(gathered, value)
        return gathered


SINGLE_PROCESS = Processes()


def select_device(name: "str | torch.device | None" = None) -> "torch.device":
    """Return the device to compute on, and make it torch's current one.

    Args:
        name: such as `cpu` or `cuda:0`. None is a GPU if there is one, else the CPU. Under torchrun `cuda` is the GPU
            of the local rank.

    Raises:
        ConfigError: if the device cannot be used.
    """
    import torch

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if str(name) == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    try:
        device = torch.device(name)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        devices = available_devices()
        is_known = str(name) in devices
        reason = (
            f"cannot be used ({str(error).partition(chr(10))[0]})" if is_known else "there is no such device"
        )
        raise ConfigError(f"device {name}: {reason}; this machine has {' and '.join(devices)}") from error
    return device


def available_devices() -> list[str]:
    """Return the names of the devices that torch can compute on."""
    import torch

    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    return [*devices, "mps"] if torch.backends.mps.is_available() else devices
