"""A web server on loopback, and a cache of remote files of its own for each test."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from sniper.remote import Settings, client, configure, urls
from tests.cli.commands import CommandLine
from tests.remote.server import Server, serving

pytest.importorskip("aiohttp", reason="needs the extra remote")


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Use a cache of the test's own, short pauses, and no credentials of other tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(client, "_FIRST_PAUSE", 0.01)
    client._state.forget()
    client._warned[:] = b"\0\0"
    configure(Settings(timeout=5.0))
    yield
    client._state.forget()
    configure(Settings())
    urls._logins.clear()
    urls._queries.clear()


@pytest.fixture
def served(tmp_path: Path) -> Path:
    """Return the folder that `server` serves."""
    folder = tmp_path / "served"
    folder.mkdir()
    return folder


@pytest.fixture
def server(served: Path) -> Iterator[Server]:
    with serving(served) as running:
        yield running


@pytest.fixture
def sniper(capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(capsys)
