"""Files of tensors: their head and checksum, and what a module or an optimizer takes from them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sniper.errors import CheckpointError
from sniper.models.weights import fill_module, load_head, load_tensors, save_tensors, transfer_weights


@dataclass(frozen=True, kw_only=True)
class Head:
    """The head of a file."""

    step: int


def tensors() -> dict[str, torch.Tensor]:
    return {
        "weight": torch.arange(6.0).reshape(2, 3),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "count": torch.tensor(7),
        "none": torch.zeros(0, 4),
        "flags": torch.tensor([True, False]),
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_tensors(tmp_path / "a.safetensors", tensors(), head={"step": 3})
    return tmp_path / "a.safetensors"


def test_tensors_and_head_are_read_as_they_were_written(path: Path) -> None:
    read, head = load_tensors(path, Head)
    assert head == load_head(path, Head) == Head(step=3)
    expected = tensors()
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[name], expected[name]) for name in expected)


def test_a_changed_bit_of_a_tensor_or_of_the_head_is_noticed(path: Path) -> None:
    content = path.read_bytes()
    for changed in (content[:-1] + bytes([content[-1] ^ 1]), content.replace(b": 3,", b": 4,")):
        path.write_bytes(changed)
        with pytest.raises(
            CheckpointError, match=r"a\.safetensors: .*it is damaged: its checksum is another"
        ):
            load_tensors(path, Head)


def test_the_same_tensors_and_head_make_the_same_bytes(path: Path) -> None:
    expected = path.read_bytes()
    for _ in range(10):
        save_tensors(path, tensors(), head={"step": 3})
        assert path.read_bytes() == expected


def test_a_file_without_a_checksum_is_read(path: Path) -> None:
    save_file(tensors(), path, metadata={"head": '{"step": 3}'})
    assert load_tensors(path, Head)[1] == Head(step=3)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ("[1]", "Input should be a valid dictionary|Input should be an object"),
        ("[" * 5000, "Invalid JSON"),
        ('{"step": "3"}', "step: Input should be a valid integer"),
        ("", "Invalid JSON"),
    ],
)
def test_a_damaged_head_is_refused(path: Path, head: str, message: str) -> None:
    save_file(tensors(), path, metadata={"head": head})
    for load in (load_tensors, load_head):
        with pytest.raises(CheckpointError, match=rf"a\.safetensors: cannot be read .*({message})"):
            load(path, Head)


@pytest.mark.parametrize("length", [0, 5, 10**8, 2**63, 2**64 - 1])
def test_a_damaged_length_is_refused(path: Path, length: int) -> None:
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_tensors(path, Head)


def test_a_damaged_header_is_refused(path: Path) -> None:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header: dict[str, Any] = json.loads(content[8 : 8 + length])
    for change in ({"shape": [2**40, 2**40]}, {"dtype": "Q8"}, {"data_offsets": [0, 2**60]}, {"shape": -1}):
        text = json.dumps(header | {"weight": header["weight"] | change}).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
        with pytest.raises(CheckpointError, match="cannot be read"):
            load_tensors(path, Head)


def module() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("0.weight", torch.zeros(3), r"0\.weight is \(3,\), not \(2, 3\)"),
        ("0.weight", torch.zeros(2, 3, dtype=torch.int64), r"0\.weight is int64, not float32"),
        (
            "0.weight",
            torch.zeros(2, 3, dtype=torch.float8_e4m3fn),
            r"0\.weight is float8_e4m3fn, not float32",
        ),
        ("0.weight", torch.full((2, 3), torch.nan), r"0\.weight has values that are not finite"),
        ("0.bias", torch.tensor([0.0, -torch.inf]), r"0\.bias has values that are not finite"),
        ("1.running_var", torch.tensor([1.0, -1.0]), r"1\.running_var has negative values"),
        ("1.num_batches_tracked", torch.tensor(1.0), r"1\.num_batches_tracked is float32, not int64"),
        ("1.num_batches_tracked", torch.tensor(-1), r"1\.num_batches_tracked has negative values"),
    ],
)
def test_a_tensor_that_does_not_fit_leaves_the_module_as_it_was(
    name: str, value: torch.Tensor, message: str
) -> None:
    filled, source = module(), Path("a.safetensors")
    before = {key: tensor.clone() for key, tensor in filled.state_dict().items()}
    damaged = {key: tensor + 1 for key, tensor in before.items()} | {name: value}
    with pytest.raises(CheckpointError, match=rf"a\.safetensors: does not fit the model: {message}"):
        fill_module(filled, damaged, source=source)
    with pytest.raises(CheckpointError, match=message):
        transfer_weights(filled, damaged, rows={}, source=source)
    assert all(torch.equal(before[key], tensor) for key, tensor in filled.state_dict().items())


def test_floats_of_another_precision_are_taken() -> None:
    filled = module()
    halves = {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in filled.state_dict().items()
    }
    fill_module(filled, halves, source=Path("a.safetensors"))
    assert all(
        torch.equal(tensor, halves[name].to(tensor.dtype)) for name, tensor in filled.state_dict().items()
    )


def test_tensors_of_other_rows_must_have_the_other_dimensions() -> None:
    rows = {"0.weight": (None, 4), "0.bias": (None, 4)}
    weights = {"0.weight": torch.ones(5, 3), "0.bias": torch.ones(5)}
    filled = nn.Sequential(nn.Linear(3, 2))
    transfer_weights(filled, weights, rows=rows, source=Path("a.safetensors"))
    assert torch.equal(filled.state_dict()["0.weight"][1], torch.ones(3))
    with pytest.raises(CheckpointError, match=r"0\.weight is \(5, 4\), not \(5, 3\)"):
        transfer_weights(
            filled, weights | {"0.weight": torch.ones(5, 4)}, rows=rows, source=Path("a.safetensors")
        )
