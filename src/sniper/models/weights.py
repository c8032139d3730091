"""Read and write tensors as safetensors files with a JSON head; reading one executes no code."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from sniper.errors import CheckpointError, count_and_list
from sniper.files import check_regular


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
        raise OSError(f"{path}: {error}") from error
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
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        return tensors, json.loads(metadata["head"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
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
