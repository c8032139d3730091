"""Atomic writes leave either the old file or the new one; JSON is read or refused with its place."""

import hashlib
from pathlib import Path

import pytest

from sniper.errors import DetectionsError
from sniper.files import atomic_write, read_json, sha256


def test_a_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with atomic_write(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_unchanged_when_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail() -> None:
        with atomic_write(path) as file:
            file.write(b"new")
            raise RuntimeError("disk")

    with pytest.raises(RuntimeError, match="disk"):
        fail()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", [b"", b"some bytes" * 100_000])
def test_a_digest_is_that_of_the_content(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    assert sha256(path) == hashlib.sha256(content).hexdigest()


def test_json_is_read(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text('{"a": [1, 2.5, null]}')
    assert read_json(path, error=DetectionsError) == {"a": [1, 2.5, None]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"file\.json: cannot be read \(No such file or directory\)"),
        (b"", r"file\.json: is not JSON \(Expecting value in line 1, column 1\)"),
        (b"{\n 1: 2}", r"file\.json: is not JSON \(.* in line 2, column 2\)"),
        (b"\xff\xfe\xfa", r"file\.json: is not JSON"),
        (b"[" * 200_000, r"file\.json: is not JSON"),
    ],
)
def test_a_file_that_is_not_json_is_refused(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DetectionsError, match=message):
        read_json(path, error=DetectionsError)
