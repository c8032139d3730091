"""Read the arrays of an `.npz` file of ours, without trusting what the file says about them."""

import re
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from sniper.files import open_regular

_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00.."
    rb"\{'descr': '([<>|][biuU]\d{1,9})', 'fortran_order': False, 'shape': \((?:(\d{1,18}),)?\), \} *\n",
    re.DOTALL,
)
"""The header that NumPy writes before an array of flags, integers or text with at most one dimension."""

_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_ERRORS = (ValueError, RuntimeError, EOFError, zipfile.BadZipFile, zlib.error)
"""What `zipfile` raises for a file that is damaged or no archive."""


def read_arrays(path: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Read arrays of flags, integers or text, with one dimension or none.

    No more memory is taken than the contents of the file need, whatever shapes it states.

    Args:
        path: a file that `numpy.savez` or `numpy.savez_compressed` wrote.
        names: of the arrays. Others are ignored.

    Raises:
        OSError: if the file cannot be opened.
        ValueError: if it is not such a file, is damaged, or lacks an array.
    """
    with open_regular(path) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                members = {member.filename: member for member in archive.infolist()}
                return {name: _read_array(archive, members.get(f"{name}.npy"), name) for name in names}
        except (*_ERRORS, OSError) as error:  # seeking to a damaged offset is an OSError, too
            raise ValueError(str(error)) from error


def _read_array(archive: zipfile.ZipFile, member: zipfile.ZipInfo | None, name: str) -> np.ndarray:
    if member is None:
        raise ValueError(f"{name} is missing")
    if member.compress_type not in _METHODS:
        raise ValueError(f"{name} is compressed by another method than NumPy's")
    content = archive.read(member)
    header = _HEADER.match(content)
    if header is None:
        raise ValueError(f"{name} is no array of flags, integers or text with one dimension")
    try:
        dtype = np.dtype(header[1].decode())
    except TypeError as error:
        raise ValueError(f"{name} has an unknown type of numbers ({error})") from error
    count = 1 if header[2] is None else int(header[2])
    if len(content) - header.end() != count * dtype.itemsize:
        raise ValueError(
            f"{name} has {len(content) - header.end()} bytes, not {count} items of {dtype.itemsize}"
        )
    array = np.frombuffer(content, dtype=dtype, offset=header.end()).astype(dtype.newbyteorder("="))
    return array if header[2] is not None else array.reshape(())
