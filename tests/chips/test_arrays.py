"""Arrays of `.npz` files: read as they were written, or refused whatever their headers state."""

import io
import resource
import zipfile
from pathlib import Path

import numpy as np
import pytest

from sniper.chips.arrays import read_arrays


def write(path: Path, *, header: bytes, content: bytes = b"", method: int = zipfile.ZIP_STORED) -> Path:
    """Write an archive of one array with any header."""
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("a.npy", header + content)
    return path


def header(text: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


@pytest.mark.parametrize("is_compressed", [True, False])
@pytest.mark.parametrize(
    "array",
    [
        np.arange(5),
        np.arange(6, dtype=np.int8)[::2],
        np.arange(3, dtype=">i4"),
        np.array([True, False]),
        np.array("{}"),
        np.zeros(0, dtype=np.int32),
    ],
)
def test_arrays_are_read_as_numpy_wrote_them(array: np.ndarray, is_compressed: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    (np.savez_compressed if is_compressed else np.savez)(path, a=array, b=array)
    read = read_arrays(path, ["a"])["a"]
    np.testing.assert_array_equal(read, array)
    assert read.dtype == array.dtype.newbyteorder("=")
    assert read.flags.writeable


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            header("{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000000,), }\n"),
            "not 1000000000000 items",
        ),
        (
            header("{'descr': '<i8', 'fortran_order': False, 'shape': (1, 1), }\n") + bytes(8),
            "no array of flags",
        ),
        (
            header("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }\n") + bytes(8),
            "no array of flags",
        ),
        (
            header("{'descr': '<f8', 'fortran_order': False, 'shape': (1,), }\n") + bytes(8),
            "no array of flags",
        ),
        (
            header("{'descr': '<i3', 'fortran_order': False, 'shape': (1,), }\n") + bytes(3),
            "unknown type of numbers",
        ),
        (header("{'descr': '<U0', 'fortran_order': False, 'shape': (99,), }\n"), "itemsize"),
        (header("(" * 1000), "no array of flags"),
        (b"", "no array of flags"),
    ],
)
def test_a_header_that_cannot_be_right_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_arrays(write(tmp_path / "a.npz", header=content), ["a"])


def test_a_header_does_not_decide_how_much_memory_is_taken(tmp_path: Path) -> None:
    text = "{'descr': '<i8', 'fortran_order': False, 'shape': (500000000,), }\n"
    path = write(tmp_path / "a.npz", header=header(text))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="items"):
        read_arrays(path, ["a"])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kilobytes


def test_archives_that_numpy_does_not_write_are_refused(tmp_path: Path) -> None:
    target = io.BytesIO()
    np.lib.format.write_array(target, np.arange(3))
    with pytest.raises(ValueError, match="compressed by another method"):
        read_arrays(write(tmp_path / "a.npz", header=target.getvalue(), method=zipfile.ZIP_BZIP2), ["a"])
    with pytest.raises(ValueError, match="b is missing"):
        read_arrays(write(tmp_path / "a.npz", header=target.getvalue()), ["b"])
    (tmp_path / "a.npz").write_bytes(b"no archive")
    with pytest.raises(ValueError, match="not a zip file"):
        read_arrays(tmp_path / "a.npz", ["a"])
    with pytest.raises(OSError, match="No such file"):
        read_arrays(tmp_path / "none.npz", ["a"])


def test_a_changed_byte_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, a=np.arange(1000))
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="Bad CRC-32"):
        read_arrays(path, ["a"])
