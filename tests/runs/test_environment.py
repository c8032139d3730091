"""What a checkpoint records of the machine, and how differences are described."""

from dataclasses import replace

import torch

from sniper.runs.environment import Environment


def current() -> Environment:
    return Environment.current(
        torch.device("cpu"), world_size=2, accumulation_steps=1, precision="auto", compile=False
    )


def test_an_environment_does_not_differ_from_itself() -> None:
    assert current().differences(current()) == []


def test_the_environment_is_that_of_this_process() -> None:
    environment = current()
    assert environment.num_threads == torch.get_num_threads()
    assert environment.versions["torch"] == torch.__version__
    assert environment.versions.keys() >= {"sniper", "torch", "torchvision", "timm", "numpy"}
    assert environment.precision in ("bf16", "fp32")
    assert torch.backends.cpu.get_cpu_capability() in environment.device_name


def test_each_difference_is_one_phrase() -> None:
    before = replace(current(), num_threads=3, versions={"torch": "1.0", "timm": "1.0"})
    now = replace(before, num_threads=4, compile=True, versions={"torch": "2.0", "numpy": "2.0"})
    assert before.differences(now) == [
        "the number of threads was 3 and is 4",
        "train.compile was false and is true",
        "torch was 1.0 and is 2.0",
        "timm was 1.0 and is absent",
        "numpy was absent and is 2.0",
    ]
