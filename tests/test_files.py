"""Paths are expanded, regular files alone are opened, writes are atomic, and JSON is read or refused with its place."""

import errno
import fcntl
import gc
import hashlib
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from sniper.errors import ConfigError, DetectionsError
from sniper.files import (
    FileLock,
    atomic_folder,
    atomic_write,
    check_regular,
    expand_path,
    is_temporary,
    naming_path,
    no_garbage_collection,
    open_regular,
    read_bytes,
    read_json,
    read_typed_json,
    remove_folder,
    remove_leftovers,
    sha256,
    temporary_folder,
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


def test_a_file_and_its_name_are_on_disk_in_this_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    synced = []

    def sync(descriptor: int) -> None:
        synced.append((stat.S_ISDIR(os.fstat(descriptor).st_mode), path.exists()))

    monkeypatch.setattr(os, "fsync", sync)
    with atomic_write(path) as file:
        file.write(b"new")
    assert synced == [(False, False), (True, True)]


def test_a_file_system_that_cannot_sync_folders_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", sync)
    with atomic_write(tmp_path / "file") as file:
        file.write(b"new")
    assert (tmp_path / "file").read_bytes() == b"new"


def test_a_folder_appears_once_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    with atomic_folder(path) as folder:
        (folder / "file").write_bytes(b"new")
        assert not list(path.iterdir())
    assert [path.name for path in path.iterdir()] == ["file"]
    with pytest.raises(RuntimeError, match="disk"), atomic_folder(tmp_path / "other"):
        raise RuntimeError("disk")
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_with_files_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_bytes(b"old")
    with pytest.raises(OSError, match="not empty"), atomic_folder(tmp_path / "folder"):
        pass
    assert (tmp_path / "folder" / "file").read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def test_nothing_is_left_under_the_name_of_a_folder_whose_removal_was_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "file").write_bytes(b"")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", interrupt)
        with pytest.raises(KeyboardInterrupt):
            remove_folder(folder)
    assert not folder.exists()
    remove_leftovers(tmp_path)
    assert not list(tmp_path.iterdir())


def test_temporary_folders_of_a_process_at_work_are_kept(tmp_path: Path) -> None:
    with temporary_folder(tmp_path) as first, temporary_folder(tmp_path) as second:
        assert first != second
        assert is_temporary(first.name)
        remove_leftovers(tmp_path)
        assert sorted(tmp_path.iterdir()) == sorted((first, second))
        with atomic_write(tmp_path / "file"):
            pass
        assert first.is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("name", "is_ours"),
    [
        (".unfinished-gpu1-17-0123abcd", True),
        (".unfinished-a_container-1-ffffffff", True),
        (".unfinished-gpu1-17-0123abc", False),
        ("unfinished", False),
        (".unfinished-work", False),
    ],
)
def test_only_folders_with_our_names_are_leftovers(name: str, is_ours: bool, tmp_path: Path) -> None:
    folder = tmp_path / name
    folder.mkdir()
    os.utime(folder, (0, 0))
    assert is_temporary(name) == is_ours
    remove_leftovers(tmp_path)
    assert folder.exists() != is_ours


def test_leftovers_of_other_hosts_are_kept_for_a_day(tmp_path: Path) -> None:
    folder = tmp_path / ".unfinished-another_host-17-0123abcd"
    folder.mkdir()
    (folder / "file").write_bytes(b"")
    for hours, is_left in ((0, True), (23, True), (25, False)):
        for path in (folder / "file", folder):
            os.utime(path, (time.time() - 3600 * hours,) * 2)
        remove_leftovers(tmp_path)
        assert folder.exists() == is_left


def test_a_temporary_file_that_was_left_is_kept_for_a_day(tmp_path: Path) -> None:
    file = tmp_path / ".unfinished-host-17-0123abcd"
    file.touch()
    for hours, is_left in ((23, True), (25, False)):
        os.utime(file, (time.time() - 3600 * hours,) * 2)
        remove_leftovers(tmp_path)
        assert file.exists() == is_left


def test_a_lock_is_held_once_and_its_file_goes_with_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    lock = FileLock(path)
    lock.write(b"a long text")
    lock.write(b"text")
    assert path.read_bytes() == b"text"
    with pytest.raises(BlockingIOError):
        FileLock(path)
    assert path.read_bytes() == b"text"
    lock.release()
    assert not path.exists()
    assert not lock.is_held
    again = FileLock(path)
    lock.release()  # does nothing
    assert again.is_held
    assert path.exists()
    again.release()


def without_locks(*_: object) -> None:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def test_without_locks_of_the_file_system_leftovers_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", without_locks)
    lock = FileLock(tmp_path / "lock")
    assert lock.problem == "No locks available"
    lock.release()
    with temporary_folder(tmp_path) as folder:
        remove_leftovers(tmp_path)
        assert folder.is_dir()
    assert not list(tmp_path.iterdir())


def run_script(code: str, *arguments: object) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


KILLED_WHILE_WRITING = """
import os, signal, sys
from pathlib import Path
from sniper.files import atomic_folder, atomic_write
with atomic_write(Path(sys.argv[1]) / "file") as file, atomic_folder(Path(sys.argv[1]) / "folder") as folder:
    file.write(b"half")
    file.flush()
    (folder / "file").touch()
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.processes
def test_what_a_killed_process_left_is_removed_by_the_next_one(tmp_path: Path) -> None:
    killed = run_script(KILLED_WHILE_WRITING, tmp_path)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    leftovers = list(tmp_path.iterdir())
    assert len(leftovers) == 2
    assert all(is_temporary(path.name) and f"-{killed.pid}-" in path.name for path in leftovers)
    with atomic_write(tmp_path / "file") as file:
        file.write(b"whole")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


KILLED_WITH_A_FORKED_PROCESS = """
import os, signal, sys, time
from pathlib import Path
from sniper.files import FileLock
lock = FileLock(Path(sys.argv[1]))
if os.fork() == 0:
    print(os.getpid(), lock.is_held, flush=True)
    lock.release()
    while True:
        time.sleep(1)
sys.stdin.readline()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.processes
def test_a_lock_of_a_killed_process_is_free_while_forked_processes_live(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    holder = run_script(KILLED_WITH_A_FORKED_PROCESS, path)
    assert holder.stdin is not None
    assert holder.stdout is not None
    child, is_held = holder.stdout.readline().split()
    try:
        assert is_held == "False"
        with pytest.raises(BlockingIOError):
            FileLock(path)
        holder.stdin.write("\n")
        holder.stdin.flush()
        assert holder.wait(600) == -signal.SIGKILL
        assert path.exists()
        FileLock(path).release()
        os.kill(int(child), 0)  # it lives
    finally:
        os.kill(int(child), signal.SIGKILL)
    holder.communicate()


COUNT_UNDER_A_LOCK = """
import sys
from pathlib import Path
from sniper.files import FileLock
folder, left = Path(sys.argv[1]), 300
while left:
    try:
        lock = FileLock(folder / "lock")
    except BlockingIOError:
        continue
    count = int((folder / "count").read_text())
    (folder / "count").write_text(str(count + 1))
    lock.release()
    left -= 1
"""


@pytest.mark.processes
def test_processes_that_take_turns_never_hold_a_lock_together(tmp_path: Path) -> None:
    (tmp_path / "count").write_text("0")
    processes = [run_script(COUNT_UNDER_A_LOCK, tmp_path) for _ in range(3)]
    assert [process.wait(600) for process in processes] == [0, 0, 0]
    for process in processes:
        process.communicate()
    assert (tmp_path / "count").read_text() == "900"


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
