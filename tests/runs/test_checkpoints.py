"""What a checkpoint must have: progress, counters, and the state of the optimizer of every parameter."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from sniper.errors import CheckpointError
from sniper.runs.checkpoints import (
    EMA,
    OPTIMIZER,
    WEIGHTS,
    Checkpoint,
    fill_optimizer,
    load_weights,
    optimizer_tensors,
    read_progress,
)
from tests.training.experiments import TrainedRun

SOURCE = Path("optimizer.safetensors")
Tensors = dict[str, torch.Tensor]


def rewrite(path: Path, **values: Any) -> None:
    """Replace values of the head of a file, which then has no checksum; None removes one."""
    with safe_open(path, framework="pt") as file:
        head = json.loads(file.metadata()["head"]) | {"crc32": None} | values
    head = {name: value for name, value in head.items() if value is not None}
    save_file(load_file(path), path, metadata={"head": json.dumps(head)})


@pytest.fixture
def newest(trained: TrainedRun) -> Path:
    return trained.run.checkpoints[-1]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"step": None}, "step: (Field required|Missing required argument)"),
        ({"step": "7"}, "step: Input should be a valid integer"),
        ({"step": -7}, "step: Input should be greater than or equal to 0"),
        ({"step": 2**70}, "expected the progress of step"),
        ({"epoch": 1.5}, "epoch: Input should be a valid integer"),
        ({"epoch": 10**6}, "epoch 1000000 and"),
        ({"step_in_epoch": 10**6}, "and 1000000 steps"),
        ({"step_in_epoch": True}, "step_in_epoch: Input should be a valid integer"),
        ({"num_shares": 0}, "num_shares: Input should be greater than 0"),
        ({"loss_scale": []}, "loss_scale: Input should be"),
        ({"loss_scale": {"scale": "x"}}, r"loss_scale\.scale"),
        ({"environment": {"device": 7}}, r"environment\.device: Input should be a valid string"),
        ({"more": 1}, "more: Unexpected keyword argument"),
    ],
)
def test_progress_and_counters_of_other_values_are_refused(
    newest: Path, values: dict[str, Any], message: str
) -> None:
    rewrite(newest / OPTIMIZER, **values)
    for read in (Checkpoint.load, read_progress):
        with pytest.raises(CheckpointError, match=rf"optimizer\.safetensors: .*{message}"):
            read(newest)


def test_a_checkpoint_of_an_earlier_version_is_read(newest: Path) -> None:
    rewrite(newest / OPTIMIZER, environment=None, num_shares=None)
    checkpoint = Checkpoint.load(newest)
    assert (checkpoint.counters.environment, checkpoint.counters.num_shares) == (None, None)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"categories": 7}, "categories: Input should be"),
        ({"categories": [7]}, r"categories\.0: Input should be"),
        ({"categories": [{"category_id": 1.5, "name": "a"}]}, r"categories\.0\.category_id"),
        ({"categories": [{"category_id": 1}]}, r"categories\.0\.name"),
        ({"digest": None}, "digest: (Field required|Missing required argument)"),
        ({"categories": []}, r"roi_head\.classes\.weight has 3 rows for 0 classes and the background"),
    ],
)
def test_weights_of_other_categories_than_their_rows_are_refused(
    newest: Path, values: dict[str, Any], message: str
) -> None:
    rewrite(newest / WEIGHTS, **values)
    with pytest.raises(CheckpointError, match=rf"weights\.safetensors: .*{message}"):
        load_weights(newest / WEIGHTS)


def test_a_moving_average_is_checked_as_the_weights_are(newest: Path) -> None:
    (newest / EMA).write_bytes((newest / WEIGHTS).read_bytes())
    assert Checkpoint.load(newest).ema is not None
    rewrite(newest / EMA, categories=[])
    with pytest.raises(CheckpointError, match=r"ema\.safetensors: .*rows for 0 classes"):
        Checkpoint.load(newest)


def build(kind: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Build a small model whose second layer is not trained, with an optimizer that has updated it once."""
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2).requires_grad_(False))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer: torch.optim.Optimizer
    if kind == "adamw":
        optimizer = torch.optim.AdamW(parameters)
    else:
        optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9 if kind == "sgd" else 0.0)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("kind", ["sgd", "adamw", "sgd without momentum"])
def test_the_state_of_an_optimizer_is_restored(kind: str) -> None:
    model, optimizer = build(kind)
    saved = optimizer_tensors(optimizer, model)
    other, restored = build(kind)
    restored.state.clear()
    fill_optimizer(restored, other, saved, source=SOURCE)
    again = optimizer_tensors(restored, other)
    assert again.keys() == saved.keys()
    assert all(torch.equal(again[name], saved[name]) for name in saved)


def test_an_optimizer_that_has_made_no_update_has_no_state() -> None:
    model, optimizer = build("sgd")
    optimizer.state.clear()
    fill_optimizer(optimizer, model, {}, source=SOURCE)
    assert not optimizer.state


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def having(name: str, value: torch.Tensor) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, name: value}


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("sgd", without("0.bias/momentum_buffer"), r"0\.bias/momentum_buffer is missing"),
        (
            "sgd",
            having("0.bias/momentum_buffer", torch.zeros(1)),
            r"0\.bias/momentum_buffer is \(1,\), not \(2,\)",
        ),
        (
            "sgd",
            having("0.weight/momentum_buffer", torch.zeros(())),
            r"0\.weight/momentum_buffer is \(\), not",
        ),
        ("sgd", having("0.weight/momentum_buffer", torch.zeros(2, 3).long()), "is int64, not float32"),
        (
            "sgd",
            having("0.weight/momentum_buffer", torch.full((2, 3), torch.inf)),
            "has values that are not finite",
        ),
        (
            "sgd",
            having("1.bias/momentum_buffer", torch.zeros(2)),
            r"1\.bias/momentum_buffer is not part of the opt",
        ),
        ("sgd", having("0.bias/exp_avg", torch.zeros(2)), r"0\.bias/exp_avg is not part of the optimizer"),
        ("sgd", having("momentum_buffer", torch.zeros(2)), "momentum_buffer is not part of the optimizer"),
        (
            "sgd without momentum",
            having("0.bias/momentum_buffer", torch.zeros(2)),
            "is not part of the optimizer",
        ),
        ("adamw", without("0.bias/step"), r"0\.bias/step is missing"),
        ("adamw", having("0.bias/step", torch.tensor(-1.0)), r"0\.bias/step has negative values"),
        ("adamw", having("0.bias/step", torch.ones(2)), r"0\.bias/step is \(2,\), not \(\)"),
        ("adamw", having("0.bias/exp_avg_sq", -torch.ones(2)), r"0\.bias/exp_avg_sq has negative values"),
    ],
)
def test_other_tensors_leave_the_optimizer_as_it_was(
    kind: str, change: Callable[[Tensors], Tensors], message: str
) -> None:
    model, optimizer = build(kind)
    saved = {name: tensor.clone() for name, tensor in optimizer_tensors(optimizer, model).items()}
    with pytest.raises(
        CheckpointError, match=rf"optimizer\.safetensors: does not fit the model: .*{message}"
    ):
        fill_optimizer(optimizer, model, change(saved), source=SOURCE)
    after = optimizer_tensors(optimizer, model)
    assert all(torch.equal(after[name], saved[name]) for name in saved)
