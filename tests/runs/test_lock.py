"""Locks of runs and outputs: one holder at a time, which the error names, and nothing is left of them."""

import errno
import fcntl
import json
import os
import socket
from pathlib import Path

import pytest

from sniper.errors import InUseError
from sniper.runs.lock import FOLDER_LOCK, lock_file, lock_folder
from tests.runs.locks import held_by_another_thread


def test_a_lock_that_is_held_is_refused_with_the_name_of_its_holder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["/usr/bin/sniper", "train", "my data.yaml"])
    folder = tmp_path / "run"
    message = (
        rf"run: another process writes there: sniper train 'my data\.yaml' \(process {os.getpid()} on "
        rf"{socket.gethostname()}, since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d\)\. Wait until it has ended, "
        rf"stop it \(kill {os.getpid()}\), or write elsewhere \(--run\)\."
    )
    with held_by_another_thread(lock_folder(folder, option="--run")):
        content = (folder / FOLDER_LOCK).read_bytes()
        with pytest.raises(InUseError, match=message), lock_folder(folder, option="--run"):
            pass
        assert (folder / FOLDER_LOCK).read_bytes() == content
    with lock_folder(folder, option="--run"):
        pass


def test_a_holder_on_another_machine_is_named_with_it(tmp_path: Path) -> None:
    with held_by_another_thread(lock_folder(tmp_path, option="-o")):
        holder = {"command": "sniper demo", "pid": 7, "host": "gpu7", "since": "2026-01-02 03:04:05+00:00"}
        (tmp_path / FOLDER_LOCK).write_text(json.dumps(holder))
        message = r"sniper demo \(process 7 on gpu7, since 2026.*stop it \(kill 7 on gpu7\)"
        with pytest.raises(InUseError, match=message), lock_folder(tmp_path, option="-o"):
            pass


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"pid": 1}'])
def test_a_holder_that_cannot_be_read_is_another_process(content: str, tmp_path: Path) -> None:
    with held_by_another_thread(lock_folder(tmp_path, option="-o")):
        (tmp_path / FOLDER_LOCK).write_text(content)
        message = r"another process writes there; wait until it has ended, or write elsewhere \(-o\)"
        with pytest.raises(InUseError, match=message), lock_folder(tmp_path, option="-o"):
            pass


def test_a_long_command_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["sniper", "predict", *["photo.jpg"] * 1000])
    with (
        held_by_another_thread(lock_folder(tmp_path, option="-o")),
        pytest.raises(InUseError) as refused,
        lock_folder(tmp_path, option="-o"),
    ):
        pass
    assert len(str(refused.value)) < 700
    assert "photo.jpg photo.j" in str(refused.value)


def test_the_thread_that_holds_a_lock_may_take_it_again(tmp_path: Path) -> None:
    with lock_folder(tmp_path, option="--run"):
        with lock_folder(tmp_path / ".." / tmp_path.name, option="--run"):
            pass
        assert (tmp_path / FOLDER_LOCK).exists()
    assert not list(tmp_path.iterdir())


def test_a_lock_is_released_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="disk"), lock_folder(tmp_path, option="--run"):
        raise RuntimeError("disk")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_was_created_for_a_lock_is_removed_if_it_stays_empty(tmp_path: Path) -> None:
    with lock_folder(tmp_path / "runs" / "data", option="--run"):
        assert (tmp_path / "runs" / "data").is_dir()
    assert not list(tmp_path.iterdir())
    with lock_folder(tmp_path / "runs" / "data", option="--run"):
        (tmp_path / "runs" / "data" / "config.yaml").touch()
    assert [path.name for path in (tmp_path / "runs" / "data").iterdir()] == ["config.yaml"]


def test_an_empty_folder_that_was_there_before_is_kept(tmp_path: Path) -> None:
    with lock_folder(tmp_path, option="--run"):
        pass
    assert tmp_path.is_dir()


def test_the_lock_of_a_file_is_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "detections.json"
    with held_by_another_thread(lock_file(path, option="-o")):
        assert [path.name for path in tmp_path.iterdir()] == [".detections.json.lock"]
        with lock_file(tmp_path / "other.json", option="-o"), lock_folder(tmp_path, option="--run"):
            pass
        with pytest.raises(InUseError, match=r"detections\.json: another"), lock_file(path, option="-o"):
            pass
    assert not list(tmp_path.iterdir())


def test_a_path_that_cannot_be_a_folder_is_left_to_the_command(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("content")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with lock_folder(path, option="--run"):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_only_the_first_process_of_torchrun_holds_a_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with held_by_another_thread(lock_folder(tmp_path, option="--run")):
        assert not list(tmp_path.iterdir())
    monkeypatch.setenv("RANK", "0")
    with held_by_another_thread(lock_folder(tmp_path, option="--run")):
        with pytest.raises(InUseError), lock_folder(tmp_path, option="--run"):
            pass
        monkeypatch.setenv("RANK", "1")
        with lock_folder(tmp_path, option="--run"):
            pass


def test_a_file_system_without_locks_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_locks(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", without_locks)
    message = r"its file system has no locks \(Function not implemented\), so make sure that no other"
    with pytest.warns(UserWarning, match=message), lock_folder(tmp_path, option="--run"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_a_lock_without_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", fail)
    with (
        held_by_another_thread(lock_folder(tmp_path, option="--run")),
        pytest.raises(InUseError, match="another process writes there; wait"),
        lock_folder(tmp_path, option="--run"),
    ):
        pass


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, *_: object) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(PermissionError) as refused, lock_folder(tmp_path, option="--run"):
        pass
    assert str(refused.value.filename) == str(tmp_path / FOLDER_LOCK)
