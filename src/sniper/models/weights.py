"""Read and write tensors as safetensors files with a JSON head, and load them into modules.

Reading a file executes no code.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from sniper.errors import CheckpointError, count_and_list
from sniper.files import check_regular

_OS_ERROR = re.compile(r"(?:os error |code: )(\d+)")  # in messages of safetensors


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], *, head: Mapping[str, Any]) -> None:
    """Write tensors and a head to one file, and sync it to disk.

    Args:
        path: the `.safetensors` file; overwritten if it exists.
        tensors: by name.
        head: JSON data, stored in the file's metadata.

    Raises:
        OSError: if it cannot be written.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(plain, path, metadata={"head": json.dumps(head)})
    except SafetensorError as error:  # also raised for errors of the operating system
        number = _OS_ERROR.search(str(error))
        if number is None:
            raise
        code = int(number[1])
        raise OSError(code, os.strerror(code), str(path)) from error
    with path.open("rb") as file:
        os.fsync(file.fileno())


def load_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read the tensors and the head of a file written by `save_tensors`.

    Raises:
        CheckpointError: if the file is missing, truncated, or not written by `save_tensors`.
    """
    try:
        check_regular(path)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if "head" not in metadata:
                raise ValueError("it was not written by sniper")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        return tensors, json.loads(metadata["head"])
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as a checkpoint ({error})") from error


def fill_module(module: nn.Module, tensors: Mapping[str, torch.Tensor], *, source: Path) -> None:
    """Load tensors into a module whose own have the same names and shapes.

    Args:
        module: to load into.
        tensors: by name.
        source: their file, for the error message.

    Raises:
        CheckpointError: if names or shapes differ; the module is then not changed.
    """
    expected = module.state_dict()
    missing = [f"{name} is missing" for name in expected if name not in tensors]
    unexpected = [f"{name} is not part of the model" for name in tensors if name not in expected]
    differing = [
        f"{name} is {tuple(tensors[name].shape)}, not {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    problems = missing + unexpected + differing
    if problems:
        raise CheckpointError(f"{source}: belongs to another model: {count_and_list(problems)}")
    module.load_state_dict(dict(tensors))


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """The tensors of a module that was filled from another one, by name.

    Attributes:
        loaded: copied, whole or in some of their rows.
        renewed: kept as initialised, since the other module has nothing of their kind.
        unused: tensors of the other module that this one lacks.
    """

    loaded: tuple[str, ...]
    renewed: tuple[str, ...]
    unused: tuple[str, ...]


def transfer_weights(
    module: nn.Module,
    tensors: Mapping[str, torch.Tensor],
    *,
    rows: Mapping[str, Sequence[int | None]],
    source: Path,
) -> Transfer:
    """Load the tensors of a similar module; submodules of which it has no tensor keep their initial values.

    Args:
        module: to load into. On the device `meta` it is only checked.
        tensors: by name.
        rows: for tensors whose first dimension may differ, the row to copy for each of the module's rows; None keeps
            the initial values of a row.
        source: the file of the tensors, for the error message.

    Raises:
        CheckpointError: if a submodule that both have lacks tensors, or shapes differ; the module is then not changed.
    """
    expected = module.state_dict()
    submodules = {_submodule(name) for name in tensors}
    loaded = [name for name in expected if name in tensors]
    missing = [
        f"{name} is missing"
        for name in expected
        if name not in tensors and (_submodule(name) in submodules or not loaded)
    ]
    differing = [
        f"{name} is {tuple(tensors[name].shape)}, not {tuple(expected[name].shape)}"
        for name in loaded
        if _fixed_shape(tensors[name], name, rows) != _fixed_shape(expected[name], name, rows)
    ]
    if missing or differing:
        raise CheckpointError(f"{source}: belongs to another model: {count_and_list(missing + differing)}")
    changed = {name: tensors[name] for name in loaded if name not in rows}
    for name in rows.keys() & tensors.keys():
        changed[name] = expected[name].clone()
        for index, row in enumerate(rows[name]):
            if row is not None:
                changed[name][index] = tensors[name][row]
    if not any(tensor.is_meta for tensor in expected.values()):
        module.load_state_dict({**expected, **changed})
    return Transfer(
        loaded=tuple(loaded),
        renewed=tuple(name for name in expected if name not in tensors),
        unused=tuple(name for name in tensors if name not in expected),
    )


def _submodule(name: str) -> str:
    return name.partition(".")[0]


def _fixed_shape(
    tensor: torch.Tensor, name: str, rows: Mapping[str, Sequence[int | None]]
) -> tuple[int, ...]:
    """Return the shape of a tensor without its number of rows, if that may differ."""
    return tuple(tensor.shape[1:] if name in rows else tensor.shape)
