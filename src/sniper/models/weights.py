"""Weights on disk: safetensors with a small head of plain data; opening them executes nothing."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from sniper.errors import CheckpointError


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], *, head: Mapping[str, Any]) -> None:
    """Write tensors and a head of JSON data to one file, and see to it that they have reached the disk.

    Args:
        path: the `.safetensors` file; one already there is overwritten.
        tensors: by name.
        head: plain data, kept as JSON in the file's metadata.

    Raises:
        OSError: if it cannot be written.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(plain, path, metadata={"head": json.dumps(head)})
    except SafetensorError as error:  # its words for what the system said
        raise OSError(f"{path}: {error}") from error
    with path.open("rb") as file:
        os.fsync(file.fileno())


def load_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read tensors and head of a file written by `save_tensors`.

    Raises:
        CheckpointError: if the file is absent, cut short, or not one of ours.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        return tensors, json.loads(metadata["head"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as a checkpoint ({error})") from error


def fill_module(module: nn.Module, tensors: Mapping[str, torch.Tensor], *, source: Path) -> None:
    """Load tensors into a module of the same names and shapes.

    Args:
        module: what to fill.
        tensors: by name.
        source: the file they came from, for the message.

    Raises:
        CheckpointError: if names or shapes differ; the module is then unchanged.
    """
    own = module.state_dict()
    missing = [name for name in own if name not in tensors]
    extra = [name for name in tensors if name not in own]
    differing = [
        f"{name} is {tuple(tensors[name].shape)}, not {tuple(own[name].shape)}"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    problems = (
        [f"it lacks {name}" for name in missing] + [f"it has {name} besides" for name in extra] + differing
    )
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(f"{source}: belongs to another model: {'; '.join(problems[:3])}{more}")
    module.load_state_dict(dict(tensors))
