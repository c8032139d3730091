"""Many processes, one training: who this one is, and what all of them must agree on.

Each process has a device of its own, computes its share of every batch, and holds the same weights. `torchrun` starts
them and says who is who; without it there is one.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

_LONGEST_WAIT = timedelta(hours=6)  # one process may search its share of the images long after another


@dataclass(frozen=True, kw_only=True)
class Processes:
    """The processes of a training, seen from one of them.

    Attributes:
        rank: which this one is, 0 the first. The first writes to disk.
        count: how many there are.
    """

    rank: int = 0
    count: int = 1

    @classmethod
    def from_environment(cls) -> "Processes":
        """Ask what torchrun has said."""
        return cls(rank=int(os.environ.get("RANK", "0")), count=int(os.environ.get("WORLD_SIZE", "1")))

    @property
    def is_first(self) -> bool:
        """Whether this process writes and speaks for all."""
        return self.rank == 0

    @contextmanager
    def joined(self, device: torch.device) -> Iterator["Processes"]:
        """Find the others, and part from them when all is done; alone, there is nothing to do."""
        if self.count == 1:
            yield self
            return
        # What is said by way of the CPU goes through gloo, so that no GPU is waited for.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        distributed.init_process_group(backend, timeout=_LONGEST_WAIT)
        yield self
        # After an error the others may be waiting for this process, and parting would wait for them.
        distributed.destroy_process_group()

    def wait(self) -> None:
        """Wait until all have come here."""
        if self.count > 1:
            distributed.all_reduce(torch.zeros(1))

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Give the mean of a tensor over all processes, to each of them."""
        if self.count == 1:
            return values
        total = values.clone()
        distributed.all_reduce(total)
        return total / self.count

    def gather(self, value: Any) -> Sequence[Any]:
        """Give what each process has, in their order, to all of them; plain data only."""
        if self.count == 1:
            return [value]
        gathered: list[Any] = [None] * self.count
        distributed.all_gather_object(gathered, value)
        return gathered


SINGLE_PROCESS = Processes()
