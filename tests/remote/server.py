"""A web server on loopback that serves a folder, and stalls or fails where a test tells it to."""

import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any, Literal
from urllib.parse import unquote

Fault = Literal["stall", "500", "503", "reset", "short", "403", "401"]


class Server:
    """The server, and what it was asked for.

    Attributes:
        url: of the folder.
        faults: what happens at the next requests for a path, such as `/images/a.jpg`, one after the other.
        requests: number of requests by method and path.
        queries: of all requests.
        latency: seconds before each answer.
        most_at_once: largest number of requests that were answered at the same time.
        authorization: header that requests need, if any.
    """

    def __init__(self, folder: Path) -> None:
        self.faults: dict[str, list[Fault]] = defaultdict(list)
        self.requests: Counter[str] = Counter()
        self.queries: set[str] = set()
        self.latency = 0.0
        self.at_once = self.most_at_once = 0
        self.authorization: str | None = None
        self.stopped = Event()
        server = self

        class Handler(_Handler):
            state = server

        self._http = _Http(("127.0.0.1", 0), lambda *arguments: Handler(*arguments, directory=str(folder)))
        self.port = self._http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.stopped.set()
        self._http.shutdown()
        self._http.server_close()

    @property
    def num_gets(self) -> int:
        return sum(count for name, count in self.requests.items() if name.startswith("GET"))


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # connections at a time


class _Handler(SimpleHTTPRequestHandler):
    state: Server
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        if not self._refused():
            super().do_HEAD()

    def do_GET(self) -> None:
        if self._refused():
            return
        path = Path(self.translate_path(self.path))
        ranges = self.headers.get("Range")
        if path.is_dir() or ranges is None or not path.exists():
            super().do_GET()
            return
        content = path.read_bytes()
        first, _, last = ranges.removeprefix("bytes=").partition("-")
        start, stop = int(first), min(int(last) + 1, len(content))
        if start >= len(content):
            self.send_error(416)
            return
        self.send_response(206)
        self.send_header("Content-Length", str(stop - start))
        self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
        self.end_headers()
        self.wfile.write(content[start:stop])

    def _refused(self) -> bool:
        path, _, query = self.path.partition("?")
        path = unquote(path)
        self.state.requests[f"{self.command} {path}"] += 1
        self.state.queries.add(query)
        self.state.at_once += 1
        self.state.most_at_once = max(self.state.most_at_once, self.state.at_once)
        time.sleep(self.state.latency)
        self.state.at_once -= 1
        expected = self.state.authorization
        if expected is not None and self.headers.get("Authorization") != expected:
            self.send_error(401)
            return True
        faults = self.state.faults.get(path)
        if not faults or self.command == "HEAD":
            return False
        self._fail(faults.pop(0))
        return True

    def _fail(self, fault: Fault) -> None:
        self.close_connection = True
        if fault == "stall":
            self.state.stopped.wait(60)
        elif fault == "short":
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            self.wfile.write(b"only this")
        elif fault != "reset":
            self.send_error(int(fault))

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    server = Server(folder)
    try:
        yield server
    finally:
        server.close()
