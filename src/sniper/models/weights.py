"""Read and write tensors as safetensors files with a JSON head, and load them into modules.

Reading a file executes no code. A checksum of head and tensors finds damage, which the format itself does not.
"""

import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from sniper.errors import CheckpointError, count_and_list
from sniper.files import check_regular
from sniper.specs import parse_json

T = TypeVar("T")

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_NOT_NEGATIVE = ("running_var", "num_batches_tracked", "/step", "/exp_avg_sq")
"""Ends of the names of tensors of batch norm and of optimizers."""

_CHECKSUM = re.compile(r', "crc32": "([0-9a-f]{8})"}\Z')
_OS_ERROR = re.compile(r"(?:os error |code: )(\d+)")  # in messages of safetensors


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], *, head: Mapping[str, Any]) -> None:
    """Write tensors and a head to one file, and sync it to disk.

    Args:
        path: the `.safetensors` file; overwritten if it exists.
        tensors: by name.
        head: JSON data, stored in the file's metadata with the checksum. The same tensors and head make the same bytes.

    Raises:
        OSError: if it cannot be written.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(head)
    try:
        # In one entry, since safetensors writes several in a random order.
        save_file(plain, path, metadata={"head": _seal(text, _checksum(text, plain))})
    except SafetensorError as error:  # also raised for errors of the operating system
        number = _OS_ERROR.search(str(error))
        if number is None:
            raise
        code = int(number[1])
        raise OSError(code, os.strerror(code), str(path)) from error
    with path.open("rb") as file:
        os.fsync(file.fileno())


def load_tensors(path: Path, kind: type[T]) -> tuple[dict[str, torch.Tensor], T]:
    """Read the tensors and the head of a file written by `save_tensors`.

    Args:
        path: the `.safetensors` file.
        kind: of the head; see `parse_json`.

    Raises:
        CheckpointError: if the file is missing, damaged, or not written by `save_tensors`.
    """
    with _opened(path) as (file, metadata):
        text, checksum = _unseal(metadata["head"])
        head = parse_json(text, kind)
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        if checksum is not None and checksum != _checksum(text, tensors):
            raise ValueError("it is damaged: its checksum is another")
        return tensors, head


def load_head(path: Path, kind: type[T]) -> T:
    """Read the head of a file written by `save_tensors`, without its tensors.

    Args:
        path: the `.safetensors` file.
        kind: of the head; see `parse_json`.

    Raises:
        CheckpointError: if the file is missing, truncated, or not written by `save_tensors`.
    """
    with _opened(path) as (_, metadata):
        return parse_json(_unseal(metadata["head"])[0], kind)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, dict[str, str]]]:
    """Open a file written by `save_tensors`; also provide its metadata. Errors in the block are those of the file."""
    try:
        check_regular(path)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if "head" not in metadata:
                raise ValueError("it was not written by sniper")
            yield file, metadata
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: cannot be read as a checkpoint ({error})") from error


def _seal(head: str, checksum: str) -> str:
    """Add a checksum as the last member of a JSON object."""
    return f'{head[:-1]}, "crc32": "{checksum}"}}'


def _unseal(text: str) -> tuple[str, str | None]:
    """Split what `_seal` has joined. Heads of earlier versions have no checksum."""
    match = _CHECKSUM.search(text)
    return (text, None) if match is None else (f"{text[: match.start()]}}}", match[1])


def _checksum(head: str, tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the CRC-32 of a head and of contiguous tensors on the CPU, in hexadecimal."""
    value = zlib.crc32(head.encode())
    for name in sorted(tensors):
        content = tensors[name].reshape(-1).view(torch.uint8).numpy()
        value = zlib.crc32(content.data, zlib.crc32(name.encode(), value))
    return f"{value:08x}"


def check_tensor(name: str, tensor: torch.Tensor, expected: torch.Tensor) -> str | None:
    """Describe why a tensor of a file does not fit one of a module or an optimizer; None if it does.

    Args:
        name: of the tensor.
        tensor: of the file, on the CPU.
        expected: of the shape and the kind of numbers that it must have; the precision of floats may differ.
    """
    if tensor.shape != expected.shape:
        return f"{name} is {tuple(tensor.shape)}, not {tuple(expected.shape)}"
    has_kind = tensor.dtype in _FLOATS if expected.is_floating_point() else tensor.dtype == expected.dtype
    if not has_kind:
        return f"{name} is {_dtype(tensor)}, not {_dtype(expected)}"
    if not tensor.isfinite().all():
        return f"{name} has values that are not finite"
    if name.endswith(_NOT_NEGATIVE) and (tensor < 0).any():
        return f"{name} has negative values"
    return None


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def fill_module(module: nn.Module, tensors: Mapping[str, torch.Tensor], *, source: Path) -> None:
    """Load tensors into a module whose own have the same names, shapes and kinds of numbers.

    Args:
        module: to load into.
        tensors: by name.
        source: their file, for the error message.

    Raises:
        CheckpointError: if names or shapes differ, or values are not finite; the module is then not changed.
    """
    expected = module.state_dict()
    missing = [f"{name} is missing" for name in expected if name not in tensors]
    unexpected = [f"{name} is not part of the model" for name in tensors if name not in expected]
    differing = [
        check_tensor(name, tensors[name], tensor) for name, tensor in expected.items() if name in tensors
    ]
    refuse(missing + unexpected + differing, source=source)
    module.load_state_dict(dict(tensors))


def refuse(problems: Sequence[str | None], *, source: Path) -> None:
    """Raise an error with the problems of the tensors of a file, if there are any.

    Raises:
        CheckpointError: with the problems that are not None.
    """
    described = [problem for problem in problems if problem is not None]
    if described:
        raise CheckpointError(f"{source}: does not fit the model: {count_and_list(described)}")


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


@dataclass(frozen=True, kw_only=True, eq=False)
class LibraryWeights:
    """The weights of a whole detector of a library.

    Attributes:
        source: their file.
        tensors: by the names that they have in the adapter. Those with rows for classes have rows for `class_names`,
            and are left out if these are unknown.
        lacking: names of tensors that are left out.
        class_names: by label; empty if they are unknown.
        category_ids: of the classes, the labels of the library: of torchvision's, COCO's ids.
    """

    source: Path
    tensors: Mapping[str, torch.Tensor]
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    lacking: tuple[str, ...] = ()


def transfer_weights(
    module: nn.Module,
    tensors: Mapping[str, torch.Tensor],
    *,
    rows: Mapping[str, Sequence[int | None]],
    source: Path,
    lacking: tuple[str, ...] = (),
) -> Transfer:
    """Load the tensors of a similar module; submodules of which it has no tensor keep their initial values.

    Args:
        module: to load into. On the device `meta` it is only checked.
        tensors: by name.
        rows: for tensors whose first dimension may differ, the row to copy for each of the module's rows; None keeps
            the initial values of a row.
        source: the file of the tensors, for the error message.
        lacking: starts of the names of tensors that may be missing, and keep their initial values.

    Raises:
        CheckpointError: if a submodule that both have lacks tensors, or shapes differ, or values are not finite; the
            module is then not changed.
    """
    expected = module.state_dict()
    submodules = {_submodule(name) for name in tensors}
    loaded = [name for name in expected if name in tensors]
    missing = [
        f"{name} is missing"
        for name in expected
        if name not in tensors
        and (_submodule(name) in submodules or not loaded)
        and not name.startswith(lacking)
    ]
    of_any_rows = {name: _with_rows_of(tensors[name], expected[name]) for name in loaded if name in rows}
    differing = [check_tensor(name, tensors[name], of_any_rows.get(name, expected[name])) for name in loaded]
    refuse(missing + differing, source=source)
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


def _with_rows_of(tensor: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Return a tensor like the second that has as many rows as the first."""
    return expected.new_empty(tensor.shape[:1] + expected.shape[1:], device="meta")
