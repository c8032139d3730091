"""Several processes: who they are, and the device of each."""

import pytest
import torch

from sniper.errors import ConfigError
from sniper.runs.processes import SINGLE_PROCESS, Processes, select_device


def test_rank_and_world_size_come_from_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Processes.from_environment() == SINGLE_PROCESS
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    processes = Processes.from_environment()
    assert (processes.rank, processes.world_size, processes.is_first) == (2, 4, False)


def test_one_process_needs_no_process_group() -> None:
    with SINGLE_PROCESS.process_group(torch.device("cpu")) as processes:
        processes.barrier()
        assert processes.all_gather("value") == ["value"]
        assert processes.mean(torch.ones(2)).tolist() == [1.0, 1.0]
    assert not torch.distributed.is_initialized()


def test_a_device_that_cannot_be_used_is_named() -> None:
    assert select_device("cpu") == select_device(torch.device("cpu")) == torch.device("cpu")
    with pytest.raises(ConfigError, match="device abacus: there is no such device"):
        select_device("abacus")
