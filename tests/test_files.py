"""Paths are expanded, regular files alone are opened, writes are atomic, and JSON is read or refused with its place."""

import errno
import gc
import hashlib
import os
import socket
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from sniper.errors import ConfigError, DetectionsError
from sniper.files import (
    atomic_write,
    check_regular,
    expand_path,
    naming_path,
    no_garbage_collection,
    open_regular,
    read_bytes,
    read_json,
    read_typed_json,
    sha256,
    write_bytes,
)
from tests.limits import file_limit


def write_atomically(path: Path, content: bytes) -> None:
    with atomic_write(path) as file:
        file.write(content)


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


@pytest.mark.parametrize("write", [write_bytes, write_atomically])
def test_a_write_that_fails_names_the_file_and_leaves_it_unchanged(
    tmp_path: Path, write: Callable[[Path, bytes], None]
) -> None:
    path = tmp_path / "file"
    write(path, b"old")
    with file_limit(1000), pytest.raises(OSError, match="File too large") as raised:
        write(path, b"new" * 1000)
    assert raised.value.filename == str(path)
    assert raised.value.errno == errno.EFBIG
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("write", [write_bytes, write_atomically])
def test_a_name_that_is_too_long_is_named(tmp_path: Path, write: Callable[[Path, bytes], None]) -> None:
    path = tmp_path / ("a" * 300)
    with pytest.raises(OSError, match="File name too long") as raised:
        write(path, b"new")
    assert raised.value.filename == str(path)


def test_files_under_a_temporary_folder_are_named_by_their_later_path(tmp_path: Path) -> None:
    temporary = tmp_path / ".temporary"
    with (
        pytest.raises(FileNotFoundError) as raised,
        naming_path(tmp_path / "out", written_as=temporary),
    ):
        (temporary / "labels" / "a.txt").write_text("")
    assert raised.value.filename == str(tmp_path / "out" / "labels" / "a.txt")


def test_a_file_that_an_error_names_is_kept(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as raised, naming_path(tmp_path / "out"):
        (tmp_path / "absent").read_bytes()
    assert raised.value.filename == str(tmp_path / "absent")


def test_a_full_device_is_named() -> None:
    path = Path("/dev/full")
    with pytest.raises(OSError, match="No space left on device") as raised, naming_path(path):
        path.write_bytes(b"new")
    assert raised.value.filename == "/dev/full"


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
        (b"", r"file\.json: is not JSON, but empty"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "but a pointer of Git LFS; git lfs pull",
        ),
        (b"/annex/objects/MD5-s1--0\n", "but a pointer of git-annex; git annex get"),
        (b"\n<!DOCTYPE html>", "but a web page"),
        (b"\x1f\x8b\x08\x00", "but compressed with gzip"),
        (b"PK\x03\x04\x14\x00", "but a zip archive"),
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


@pytest.mark.parametrize(
    ("path", "expanded"),
    [
        ("a/b", "a/b"),
        ("", "."),
        ("~", "/home/me"),
        ("~/a", "/home/me/a"),
        ("a/~/b", "a/~/b"),
        ("~nobody-here/a", "~nobody-here/a"),
        ("$DATA/a", "/data/x/a"),
        ("${DATA}/a", "/data/x/a"),
        ("$DATA", "/data/x"),
        ("/a/$NAME.json", "/a/n.json"),
        ("a/${NAME}_$NAME", "a/n_n"),
        ("a/$DATA/b", "a/data/x/b"),
        ("costs $5", "costs $5"),
        ("a$", "a$"),
        ("there $NAME/$NAME", "there $NAME/n"),  # the folder exists as it is written
        ("~there", "~there"),
        ("$NOT_DEFINED", "$NOT_DEFINED"),
    ],
)
def test_paths_are_expanded_where_they_do_not_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, expanded: str
) -> None:
    for name in ("there $NAME", "~there", "$NOT_DEFINED"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    for name, value in (("HOME", "/home/me"), ("DATA", "/data/x"), ("NAME", "n")):
        monkeypatch.setenv(name, value)
    assert expand_path(path) == Path(expanded)
    monkeypatch.chdir("/")
    assert expand_path(path, folder=tmp_path) == Path(expanded)


@pytest.mark.parametrize("path", ["$NONE/a", "a/${NONE}.json", "$EMPTY/a"])
def test_a_variable_that_is_not_defined_is_named(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.delenv("NONE", raising=False)
    monkeypatch.setenv("EMPTY", "")
    with pytest.raises(ConfigError, match=r"the environment variable (NONE|EMPTY) is not defined"):
        expand_path(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(path.name)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (os.mkfifo, "a pipe, not a regular file"),
        (make_socket, "a socket, not a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "a device, not a regular file"),
        (Path.mkdir, "Is a directory"),
        (lambda path: path.symlink_to(path.name), "Too many levels of symbolic links"),
        (lambda path: None, "No such file or directory"),
    ],
)
@pytest.mark.parametrize("read", [open_regular, check_regular, read_bytes, sha256])
def test_only_regular_files_are_opened(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[Path], object],
    reason: str,
    read: Callable[[Path], object],
) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "it")
    with pytest.raises(OSError, match=reason) as refused:
        read(tmp_path / "it")
    assert refused.value.strerror == reason
    assert refused.value.filename == str(tmp_path / "it")


def test_a_pipe_that_replaces_a_file_while_it_is_opened_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "it")
    monkeypatch.setattr("sniper.files.check_regular", lambda path: None)
    with pytest.raises(OSError, match="a pipe, not a regular file"):
        open_regular(tmp_path / "it")


def test_a_regular_file_is_read_through_links(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("file")
    with open_regular(tmp_path / "link") as file:
        assert file.read() == b"content"


class Point(msgspec.Struct):
    """A point in the plane."""

    x: int


def test_json_of_a_type_is_read(tmp_path: Path) -> None:
    path = tmp_path / "point.json"
    path.write_bytes(b'{"y": [[1], {}], "x": 3}')
    assert read_typed_json(path, Point) == Point(x=3)


@pytest.mark.parametrize("content", [b"", b"{", b'{"x": "3"}', b"[3]", b'{"x": \xff}', b"[" * 100_000])
def test_json_of_another_type_is_not_read(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "point.json"
    path.write_bytes(content)
    assert read_typed_json(path, Point) is None


def test_an_absent_file_and_a_pipe_have_no_json(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "absent", tmp_path / "pipe", tmp_path):
        assert read_typed_json(path, Point) is None


def test_garbage_collection_is_resumed_if_it_was_enabled() -> None:
    assert gc.isenabled()
    with no_garbage_collection():
        with no_garbage_collection():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()
