"""Damage to files: at any byte, and to what the formats of the package mean by them.

A mutation takes the generator that it draws from and the content of a file, and returns other content.
"""

import io
import json
import sqlite3
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import load, save

Mutation = Callable[[Random, bytes], bytes]

ODD_VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2**31,
    2**53,
    2**63,
    2**64,
    10**400,
    0.5,
    -0.5,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "7",
    "a\0b",
    "\ud800",
    "\x1b[2J",
    "../../..",
    "9" * 5000,
    [],
    {},
    [1],
    [[[]]],
    [None] * 50,
    {"a": 1},
    "@raw@",
    "@raw@",
    "@raw@",
]
"""Values of all types; the last is replaced by text that no dump writes."""

RAW_JSON = [
    "[" * 100_000,
    "[" * 500 + "]" * 500,
    '{"a":' * 5000 + "1" + "}" * 5000,
    "1e999",
    "-0",
    "9" * 5000,
    '"\\ud800"',
    '{"a": 1, "a": 2}',
    "NaN",
    "01",
    "'x'",
    "",
]
RAW_YAML = [
    "*a",
    "&a [*a]",
    "&a {b: *a}",
    "["
    + ", ".join(
        [
            "&a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]",
            *(f"&a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)),
        ]
    )
    + "]",
    "!!int x",
    "!!int ''",
    "!!bool x",
    "!!float x",
    "!!timestamp x",
    "!!binary x",
    "!!set {a, b}",
    "!!omap [a: 1]",
    "!!str [a]",
    "!!map [a]",
    "!!python/object/apply:os.system [ls]",
    "2001-99-99",
    "2001-01-01",
    "0x_",
    "0b_",
    "1:59:59",
    "0x" + "f" * 5000,
    "{a: 1, a: 2}",
    "{? [a] : 1}",
    "{<<: 1}",
    "{<<: {a: 1}, a: 2}",
    "[" * 3000,
    "[" * 100 + "]" * 100,
    "'",
    "|",
    ".inf",
    ".nan",
    "1e999",
    "9" * 5000,
    '"\\0"',
    '"\\ud800"',
    "@",
    "\t",
    "\x00",
]


def mutate_bytes(generator: Random, content: bytes) -> bytes:
    """Cut content short, or change, remove, repeat or insert some of its bytes."""
    changed = bytearray(content)
    if generator.random() < 0.2:
        return bytes(changed[: generator.randrange(len(changed) + 1)])
    for _ in range(generator.choice([1, 1, 2, 5, 20])):
        start = generator.randrange(len(changed) + 1)
        end = min(start + generator.choice([1, 1, 4, 8, 64, 4096]), len(changed))
        kind = generator.randrange(6)
        if kind == 0 and start < len(changed):
            changed[start] ^= 1 << generator.randrange(8)
        elif kind == 1:
            changed[start:end] = generator.randbytes(end - start)
        elif kind == 2:
            changed[start:end] = bytes(end - start)
        elif kind == 3:
            del changed[start:end]
        elif kind == 4:
            changed[start:start] = changed[start:end]
        else:
            changed[start:start] = generator.randbytes(end - start)
    return bytes(changed)


def mutate_value(generator: Random, value: Any) -> Any:
    """Replace, remove, add or repeat a value among nested lists and mappings, in place; or replace all of it."""
    holders = [holder for holder in _holders(value) if holder]
    if not holders or generator.random() < 0.05:
        return generator.choice(ODD_VALUES)
    holder = generator.choice(holders)
    keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
    key, kind = generator.choice(keys), generator.random()
    if kind < 0.7:
        holder[key] = generator.choice(ODD_VALUES)
    elif kind < 0.85:
        del holder[key]
    elif isinstance(holder, dict):
        holder[generator.choice(["", "x", "7", "a\0b", "\ud800", "__class__", f"{key}s"])] = holder[key]
    else:
        holder += holder
    return value


def _holders(value: Any) -> list[Any]:
    """Return all lists and mappings among nested values."""
    inner = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    return ([value] if isinstance(value, dict | list) else []) + [
        each for item in inner for each in _holders(item)
    ]


def mutate_json(generator: Random, content: bytes) -> bytes:
    """Change a value of JSON."""
    text = json.dumps(mutate_value(generator, json.loads(content)))
    return text.replace('"@raw@"', generator.choice(RAW_JSON)).encode()


def mutate_lines(generator: Random, content: bytes) -> bytes:
    """Change, join, cut or repeat lines of JSON."""
    lines = content.splitlines(keepends=True)
    index, kind = generator.randrange(len(lines)), generator.randrange(5)
    if kind < 2:
        lines[index] = mutate_json(generator, lines[index]) + b"\n"
    elif kind == 2:
        lines[index] = lines[index][: generator.randrange(len(lines[index]))]
    elif kind == 3:
        lines.insert(
            index, generator.choice([b"\n", b"\0" * 100, b"null\n", b"[]\n", b'{"step": 1', lines[0]])
        )
    else:
        lines[-1] = lines[-1][: generator.randrange(len(lines[-1]))]
    return b"".join(lines)


def mutate_yaml(generator: Random, content: bytes) -> bytes:
    """Change a value of YAML."""
    text = yaml.safe_dump(mutate_value(generator, yaml.safe_load(content)))
    raw = generator.choice(RAW_YAML)
    return text.replace("'@raw@'", raw).replace('"@raw@"', raw).encode(errors="surrogatepass")


def mutate_npz(generator: Random, content: bytes) -> bytes:
    """Change the arrays of an archive, their headers or the names of its members; checksums are right."""
    with np.load(io.BytesIO(content)) as file:
        arrays = dict(file)
    name, kind = generator.choice(list(arrays)), generator.randrange(5)
    members = {each: _npy(array) for each, array in arrays.items()}
    if kind == 0 or name == "head":
        members["head"] = _npy(np.array(mutate_json(generator, str(arrays["head"]).encode()).decode()))
    elif kind == 1:
        members[name] = _mutate_header(generator, members[name])
    elif kind == 2:
        other = generator.choice(["x", "", "a/b", generator.choice(list(arrays))])
        members[other] = members.pop(name)
    else:
        members[name] = _npy(_mutate_array(generator, arrays[name]))
    target = io.BytesIO()
    with zipfile.ZipFile(
        target, "w", generator.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
    ) as archive:
        for each, member in members.items():
            archive.writestr(f"{each}.npy", member)
    return target.getvalue()


def _npy(array: np.ndarray) -> bytes:
    target = io.BytesIO()
    np.lib.format.write_array(target, array, allow_pickle=True)
    return target.getvalue()


def _mutate_header(generator: Random, content: bytes) -> bytes:
    """Replace the header of an array; the values stay."""
    length = 10 + int.from_bytes(content[8:10], "little")
    header = generator.choice(
        [
            "{'descr': '<i8', 'fortran_order': False, 'shape': (10**12,), }",
            "{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000000,), }",
            "{'descr': '<i8', 'fortran_order': True, 'shape': (3, 4), }",
            "{'descr': '<i8', 'fortran_order': False, 'shape': (-1,), }",
            "{'descr': '<i8', 'fortran_order': False, 'shape': (4L,), }",
            "{'descr': '|O', 'fortran_order': False, 'shape': (4,), }",
            "{'descr': '<U0', 'fortran_order': False, 'shape': (1000000000,), }",
            "{'descr': '<i3', 'fortran_order': False, 'shape': (4,), }",
            "{'descr': [('a', '<i8')], 'fortran_order': False, 'shape': (4,), }",
            "{'descr': ['a'], 'fortran_order': False, 'shape': (4,), }",
            "{'descr': '<i8', 'fortran_order': 1, 'shape': 4, }",
            "{'descr': '<i8', 'shape': (4,), }",
            "(" * 500 + ")" * 500,
            "((((",
            "",
        ]
    ).encode("latin1")
    version = generator.choice([b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\x09\x00"])
    size = len(header).to_bytes(2 if version == b"\x01\x00" else 4, "little")
    return b"\x93NUMPY" + version + size + header + content[length:]


def _mutate_array(generator: Random, array: np.ndarray) -> np.ndarray:
    """Change the type, the shape or values of an array."""
    kind = generator.randrange(8)
    if kind == 0:
        dtypes = ["f4", "f8", "c8", "u8", "i1", ">i4", "?", "O", "U5", "S3", "M8[s]"]
        with np.errstate(all="ignore"):
            return array.astype(generator.choice(dtypes))
    if kind == 1:
        return array[: generator.randrange(len(array) + 1)]
    if kind == 2:
        return np.concatenate([array, array])
    if kind == 3:
        return generator.choice(
            [array[None], array[:, None], array.sum(), np.broadcast_to(array, (2, len(array)))]
        )
    if kind == 4:
        return array[::-1]
    changed = array.astype(np.int64) if kind == 5 else array.copy()
    for _ in range(generator.choice([1, 1, 5, len(array)])):
        limits = np.iinfo(changed.dtype) if changed.dtype.kind == "i" else np.iinfo(np.int8)
        value = generator.choice([-1, -2, 0, 1, 3, 100, limits.min, limits.max])
        changed[generator.randrange(len(changed))] = value
    return changed


def mutate_safetensors(generator: Random, content: bytes) -> bytes:
    """Change the header of a file of tensors, its metadata, or tensors; without a checksum as with one."""
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    if generator.random() < 0.7:
        head = json.loads(header["__metadata__"]["head"])
        head.pop("crc32", None)
        header["__metadata__"]["head"] = json.dumps(head)
    kind = generator.randrange(5)
    if kind == 0:
        header["__metadata__"]["head"] = mutate_json(
            generator, header["__metadata__"]["head"].encode()
        ).decode()
    elif kind == 1:
        header = mutate_value(generator, header)
    elif kind == 2:
        length = generator.choice([0, 1, length + 1, length - 1, 10**8, 2**40, 2**63, 2**64 - 1])
        return struct.pack("<Q", length) + content[8:]
    elif isinstance(header, dict):
        tensors = load(content)
        name = generator.choice(list(tensors))
        changed = _mutate_tensor(generator, tensors[name])
        if generator.random() < 0.15 or changed is None:
            del tensors[name]
        else:
            tensors[generator.choice([name, name, name, f"{name}x"])] = (
                changed.clone()
            )  # tensors must not share memory
        return save(tensors, metadata=header["__metadata__"])
    text = json.dumps(header).replace('"@raw@"', generator.choice(RAW_JSON)).encode()
    return struct.pack("<Q", len(text)) + text + data


def _mutate_tensor(generator: Random, tensor: torch.Tensor) -> torch.Tensor | None:
    """Change the type, the shape or values of a tensor."""
    kind = generator.randrange(4)
    if kind == 0:
        dtypes = [
            torch.int64,
            torch.int8,
            torch.float16,
            torch.float64,
            torch.bool,
            torch.float8_e4m3fn,
            torch.complex64,
        ]
        return tensor.to(generator.choice(dtypes))
    if kind == 1:
        flat = tensor.reshape(-1)
        return generator.choice(
            [flat, flat[:1], flat[:0], tensor[None].clone(), flat.sum(), torch.cat([flat, flat])]
        )
    changed = tensor.clone().reshape(-1)
    values = (
        [float("nan"), float("inf"), -1.0, 0.0, 1e30, 3e38, -3e38]
        if tensor.is_floating_point()
        else [-1, 2**62]
    )
    for _ in range(generator.choice([1, len(changed)])):
        changed[generator.randrange(len(changed))] = generator.choice(values)
    return changed.reshape(tensor.shape)


RECORD = struct.Struct("<IiI")


def mutate_records(generator: Random, content: bytes) -> bytes:
    """Change a record of a part of a store; its checksum is right."""
    start = len(b"sniper boxes\n") + 32
    index, count, _ = RECORD.unpack_from(content, start)
    end = start + RECORD.size
    size = next(size for size in (10, 44) if _has_checksum(content, start, size))
    rows = bytearray(content[end : end + max(count, 0) * size])
    rest = content[end + len(rows) :]
    kind = generator.randrange(4)
    if kind == 0:
        index = generator.choice([1, 3, 4, 2**31, 2**32 - 1])
    elif kind == 1:
        count = generator.choice([-1, -2, 0, -(2**31), 2**31 - 1, count + 1])
    elif kind == 2 and rows:
        for _ in range(generator.choice([1, 20])):
            offset = generator.randrange(len(rows) // 2) * 2
            rows[offset : offset + 2] = generator.choice(
                [b"\xff\xff", b"\x00\x7c", b"\x00\x7e", b"\xf0\x7f", b"\0\0"]
            )
    elif rows:
        rows[: size * (len(rows) // size)] = generator.randbytes(len(rows))
    checksum = zlib.crc32(bytes(rows), zlib.crc32(struct.pack("<Ii", index, count)))
    return content[:start] + RECORD.pack(index, count, checksum) + bytes(rows) + rest


def _has_checksum(content: bytes, start: int, size: int) -> bool:
    index, count, checksum = RECORD.unpack_from(content, start)
    rows = content[start + RECORD.size : start + RECORD.size + max(count, 0) * size]
    return zlib.crc32(rows, zlib.crc32(struct.pack("<Ii", index, count))) == checksum


_FIRST = "(SELECT {} FROM chips ORDER BY key LIMIT 1)"
STATEMENTS = [
    "UPDATE OR REPLACE chips SET pixels = 'text'",
    "UPDATE OR REPLACE chips SET pixels = NULL",
    "UPDATE OR REPLACE chips SET pixels = 7",
    "UPDATE OR REPLACE chips SET pixels = zeroblob(10)",
    f"UPDATE chips SET pixels = {_FIRST.format('pixels')}, checksum = {_FIRST.format('checksum')}",
    "UPDATE OR REPLACE chips SET checksum = 'x'",
    "UPDATE OR REPLACE chips SET checksum = NULL",
    "UPDATE OR REPLACE chips SET key = 'x'",
    "DELETE FROM chips",
    "DROP TABLE chips",
    "ALTER TABLE chips DROP COLUMN checksum",
    "ALTER TABLE chips RENAME TO other",
    "DROP TABLE chips; CREATE VIEW chips AS SELECT 1 AS key, 2 AS pixels, 3 AS checksum",
    "DROP TABLE chips; CREATE TABLE chips (key TEXT, pixels TEXT, checksum TEXT)",
]
"""Changes of the table of a cache of chips."""


def mutate_database(generator: Random, content: bytes) -> bytes:
    """Change the entries of a cache of chips, or its table."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        path.write_bytes(content)
        connection = sqlite3.connect(path)
        connection.execute("PRAGMA journal_mode = DELETE")
        with connection:
            connection.executescript(generator.choice(STATEMENTS))
        connection.close()
        return path.read_bytes()


def both(structured: Mutation) -> Mutation:
    """Return a mutation that damages either bytes or what they mean; the latter may refuse content."""

    def mutate(generator: Random, content: bytes) -> bytes:
        if generator.random() < 0.4:
            return mutate_bytes(generator, content)
        return structured(generator, content)

    return mutate
