"""Remote files are read again where that helps, and once where they are in the cache."""

import os
import time
import warnings
from pathlib import Path

import pytest

from sniper.errors import CacheError
from sniper.remote import RemotePath, Settings, client, configure, read_ahead, to_path
from tests.remote.server import Fault, Server


def remote(server: Server, name: str) -> RemotePath:
    path = to_path(f"{server.url}/{name}")
    assert isinstance(path, RemotePath)
    return path


def read(path: RemotePath, *, is_fixed: bool = True) -> bytes:
    with path.open_binary(is_fixed=is_fixed) as file:
        return file.read()


@pytest.mark.parametrize("fault", ["500", "503", "reset", "short"])
def test_a_request_that_fails_is_sent_again(server: Server, served: Path, fault: Fault) -> None:
    (served / "a").write_bytes(b"content")
    server.faults["/a"] = [fault, fault]
    with pytest.warns(
        UserWarning, match=rf"^{server.url}/a: .*tried again, .* up to 5 times \(reported once\)"
    ):
        assert read(remote(server, "a")) == b"content"
    assert server.requests["GET /a"] == 3


def test_a_request_that_stalls_is_sent_again(server: Server, served: Path) -> None:
    (served / "a").write_bytes(b"content")
    server.faults["/a"] = ["stall"]
    configure(Settings(timeout=0.3))
    started = time.monotonic()
    with pytest.warns(UserWarning, match="no answer came in 0.3 seconds"):
        assert read(remote(server, "a")) == b"content"
    assert 0.3 < time.monotonic() - started < 3


def test_failures_are_reported_once(server: Server, served: Path) -> None:
    for name in ("a", "b"):
        (served / name).write_bytes(b"content")
        server.faults[f"/{name}"] = ["500"]
    with pytest.warns(UserWarning, match="status 500"):
        read(remote(server, "a"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read(remote(server, "b"))


def test_a_file_that_fails_each_time_is_given_up(server: Server, served: Path) -> None:
    (served / "a").write_bytes(b"content")
    server.faults["/a"] = ["503"] * 9
    configure(Settings(tries=3))
    with pytest.raises(OSError, match=r"the server answered with status 503, 3 times") as caught:
        read(remote(server, "a"))
    assert caught.value.filename == f"{server.url}/a"
    assert server.requests["GET /a"] == 3


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        (None, FileNotFoundError, "does not exist"),
        ("403", PermissionError, r"refuses access \(403\); give credentials, or check the URL"),
        ("401", PermissionError, r"refuses access \(401\)"),
    ],
)
def test_what_cannot_change_is_not_tried_again(
    server: Server, fault: Fault | None, kind: type[OSError], message: str
) -> None:
    server.faults["/a"] = [fault] * 9 if fault else []
    with pytest.raises(kind, match=message):
        read(remote(server, "a"))
    assert server.requests["GET /a"] == 1


def test_a_server_that_is_not_there_is_named(server: Server) -> None:
    server.close()
    configure(Settings(tries=2))
    with pytest.raises(OSError, match="2 times") as caught:
        read(remote(server, "a"))
    assert caught.value.filename == f"{server.url}/a"


def test_a_file_is_requested_once(server: Server, served: Path) -> None:
    (served / "a").write_bytes(b"content")
    for _ in range(3):
        assert read(remote(server, "a")) == b"content"
        client._state.forget()  # as another process
    assert server.requests == {"GET /a": 1}


def test_a_changed_file_is_read_again_unless_it_is_an_image(server: Server, served: Path) -> None:
    path = remote(server, "a.json")
    for content in (b"old", b"newer"):
        (served / "a.json").write_bytes(content)
        assert read(path, is_fixed=False) == content
        client._state.forget()
    assert read(path) == b"newer"
    (served / "a.json").write_bytes(b"newest!")
    assert read(path) == b"newer"


@pytest.mark.parametrize("num_bytes", [0, 1, 999, 1000, 1001, 2000, 3456])
def test_a_large_file_comes_in_pieces(
    server: Server, served: Path, num_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_CHUNK", 1000)
    content = bytes(i % 251 for i in range(num_bytes))
    (served / "a").write_bytes(content)
    assert read(remote(server, "a")) == content
    client._state.forget()
    assert read(remote(server, "a")) == content
    assert server.requests["GET /a"] == max(-(-num_bytes // 1000), 1)


def test_a_failure_in_the_middle_of_a_large_file_loses_nothing(
    server: Server, served: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_CHUNK", 1000)
    (served / "a").write_bytes(bytes(range(250)) * 20)
    original = client._cat

    async def cat(url: str, start: int, stop: int) -> tuple[bytes, str | None]:
        if start == 2000 and not server.faults["/a"]:
            server.faults["/a"] = ["reset", "500"]
        return await original(url, start, stop)

    monkeypatch.setattr(client, "_cat", cat)
    with pytest.warns(UserWarning, match="tried again"):
        assert read(remote(server, "a")) == bytes(range(250)) * 20


def test_files_without_room_in_the_cache_are_read_all_the_same(server: Server, served: Path) -> None:
    configure(Settings(limit=1500))
    names = [f"{number}.jpg" for number in range(4)]
    for name in names:
        (served / name).write_bytes(name.encode() * 200)
    with pytest.warns(
        UserWarning, match=r"the cache of remote files in .* is full \(1.5e-06 GB, data.cache.giga"
    ):
        contents = [read(remote(server, name)) for name in names]
    assert contents == [name.encode() * 200 for name in names]
    client._state.forget()
    before = server.num_gets
    assert read(remote(server, "0.jpg")) == contents[0]  # the first is in the cache
    assert server.num_gets == before
    for _ in range(2):  # as for its header, and its pixels
        assert read(remote(server, "3.jpg")) == contents[3]
    assert server.num_gets == before + 1


def test_a_file_larger_than_the_cache_is_refused(
    server: Server, served: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_CHUNK", 1000)
    configure(Settings(limit=1500))
    (served / "a.tif").write_bytes(bytes(5000))
    with pytest.raises(OSError, match=r"has 5e-06 GB, for which the cache of 1.5e-06 GB has no room"):
        read(remote(server, "a.tif"))


def test_files_are_read_ahead_in_order(server: Server, served: Path) -> None:
    names = [f"{number}.jpg" for number in range(40)]
    for name in names:
        (served / name).write_bytes(name.encode())
    server.latency = 0.05
    paths = read_ahead([remote(server, name) for name in names], is_fixed=True)
    contents = [read(path) for path in paths if isinstance(path, RemotePath)]
    assert contents == [name.encode() for name in names]
    assert server.num_gets == 40
    assert 4 < server.most_at_once <= client.MAX_AHEAD + 1


def test_files_that_are_soon_used_are_not_forgotten(server: Server, served: Path) -> None:
    names = [f"{number}.jpg" for number in range(3 * client.MAX_AHEAD)]
    for name in names:
        (served / name).write_bytes(name.encode())
    for start in range(0, len(names), 8):  # as batches of 8 images, with the next two
        client.read_ahead([f"{server.url}/{name}" for name in names[start : start + 24]], is_fixed=True)
        time.sleep(0.05)
        for name in names[start : start + 8]:
            assert read(remote(server, name)) == name.encode()
    assert max(server.requests.values()) == 1


def test_a_cache_that_cannot_be_written_is_named(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    configure(Settings(folder=tmp_path / "file"))
    with pytest.raises(CacheError, match=rf"^{tmp_path}/file: cannot be used as the cache of remote files"):
        read(remote(server, "a"))


def test_a_fork_reads_files_that_its_parent_reads_ahead(server: Server, served: Path) -> None:
    for name in ("a", "b"):
        (served / name).write_bytes(name.encode())
    server.latency = 0.2
    read(remote(server, "a"))
    client.read_ahead([f"{server.url}/b"], is_fixed=True)
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if read(remote(server, "b")) == b"b" else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert read(remote(server, "b")) == b"b"


def test_credentials_are_sent_and_not_shown(server: Server, served: Path) -> None:
    (served / "a.json").write_bytes(b"content")
    server.authorization = "Basic bWU6c2VjcmV0"  # me:secret
    given = f"{server.url.replace('//', '//me:secret@')}/a.json?sig=topsecret"
    path = to_path(given)
    assert isinstance(path, RemotePath)
    assert read(path) == b"content"
    assert server.queries == {"sig=topsecret"}
    server.authorization = "Basic other"
    with pytest.raises(PermissionError) as caught:
        read(path / "b")
    text = f"{caught.value!r} {caught.value.filename}"
    assert "secret" not in text
    assert text.endswith(f"{server.url}/a.json/b")
