"""Serve the page to this machine alone: on a loopback address, at an address with a random token.

Another web site that a browser has open can send requests to a loopback address, too, and a name of its own may lead
there (DNS rebinding). A request without the token, or for another host than this machine, is refused. Requests only
read.
"""

import json
import math
import re
import secrets
import socketserver
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from typing import Any
from urllib.parse import parse_qs

from sniper.browse.chips import ChipChooser
from sniper.browse.content import MatchedDetections, describe_image
from sniper.browse.selection import ERROR_KINDS, KINDS, Filter, select_images
from sniper.browse.tiles import TILE, ImageTiles
from sniper.chips import BoxStatus
from sniper.data.datasets import Dataset
from sniper.errors import SniperError, printable
from sniper.reports.page import resize_rule
from sniper.reports.palette import (
    BLUE,
    CLASS_COLORS,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY_BLUE,
    VERMILION,
    YELLOW,
)

LOOPBACK = "127.0.0.1"
"""The address that is listened on."""

_HOSTS = (LOOPBACK, "localhost")  # with any port, since a tunnel (ssh -L) may have another one
_MAX_FIELDS = 20  # of a query
_IDLE = 60.0  # seconds after which a connection is closed
_FILES = {
    "": ("page.html", "text/html"),
    "browse.css": ("browse.css", "text/css"),
    "browse.js": ("browse.js", "text/javascript"),
}
_SECURITY = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_COLORS = {
    "true": SKY_BLUE,
    "false": ORANGE,
    "ignored": GREY,
    "detected": GREEN,
    "missed": PURPLE,
    "crowd": GREY,
    "classes": CLASS_COLORS,
    # First those that stand for no match.
    "levels": (YELLOW, VERMILION, BLUE, PURPLE, GREEN, ORANGE, SKY_BLUE),
    "status": {BoxStatus.VALID: SKY_BLUE, BoxStatus.OUT_OF_RANGE: ORANGE, BoxStatus.IGNORE: GREY},
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Content:
    """What is browsed.

    Attributes:
        name: of the data set, as the page shows it.
        dataset: the images and their objects.
        tiles: of the images.
        chips: those that training would cut.
        detections: of the images; None without detections.
        min_score: from which detections are shown at first.
    """

    name: str
    dataset: Dataset
    tiles: ImageTiles
    chips: ChipChooser
    detections: MatchedDetections | None = None
    min_score: float = 0.0

    def describe(self) -> dict[str, Any]:
        """Return what is the same for all images, as JSON values."""
        return {
            "name": printable(self.name),
            "num_images": len(self.dataset),
            "classes": [printable(category.name) for category in self.dataset.categories],
            "has_detections": self.detections is not None,
            "min_score": self.min_score,
            "tile": TILE,
            "colors": _COLORS,
            "left_out": [printable(line) for line in self.dataset.left_out],
        }

    def describe_chips(self) -> dict[str, Any]:
        """Return how far the choice of chips has come and, when they are chosen, their levels."""
        state, chips = self.chips.state, self.chips.chips
        if state != "ready" or chips is None:
            return {"state": state, "problem": printable(self.chips.problem)}
        return {
            "state": state,
            "size": chips.pyramid.chip_size,
            "is_suggested": chips.is_suggested,
            "levels": [
                {
                    "name": resize_rule(level),
                    "sizes": level.valid_range.describe(),
                    "at_least": level.at_least,
                    "below": None if level.below == math.inf else level.below,
                }
                for level in chips.pyramid.levels
            ],
        }

    def describe_image(self, index: int) -> dict[str, Any]:
        """Return the facts of an image, or the problem with its file, and what is drawn on it."""
        record = self.dataset[index]
        facts: dict[str, Any] = {
            "name": printable(record.file_name),
            "width": record.width,
            "height": record.height,
            "zooms": self.tiles.zooms(index),
            "problem": None,
            "overview": None,
            **describe_image(self.dataset, index, detections=self.detections, chips=self.chips.chips),
        }
        try:
            facts["overview"] = self.tiles.needs_overview(index)
        except (SniperError, MemoryError) as error:
            facts["problem"] = _explain(error)
        return facts

    def select(self, chosen: Filter) -> list[int]:
        """Return the indices of the images that a filter keeps.

        Raises:
            ValueError: if it needs detections or chips, and there are none.
        """
        return select_images(
            self.dataset, chosen, detections=self.detections, chips=self.chips.chips
        ).tolist()


class BrowseServer(ThreadingHTTPServer):
    """Serves the page until it is closed.

    Args:
        content: what is browsed.
        port: to listen on; 0 takes a free one.

    Attributes:
        content: what is browsed.
        token: that every address has to start with.
        launch_code: of an address that leads to the page once, for the command line of a browser, which other users of
            the machine can read. None once it is used.

    Raises:
        OSError: if the port cannot be listened on.
    """

    daemon_threads = True
    allow_reuse_port = False
    request_queue_size = 128

    def __init__(self, content: Content, *, port: int = 0) -> None:
        self.content = content
        self.token = secrets.token_urlsafe(24)
        self.launch_code: str | None = secrets.token_urlsafe(24)
        super().__init__((LOOPBACK, port), _Handler)

    def server_bind(self) -> None:
        """Bind the socket, without the look-up of the host's name that `HTTPServer` does."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = LOOPBACK, self.server_address[1]

    @property
    def url(self) -> str:
        """The address of the page."""
        return f"http://{LOOPBACK}:{self.server_port}/{self.token}/"

    @property
    def launch_url(self) -> str:
        """An address that leads to the page once."""
        return f"http://{LOOPBACK}:{self.server_port}/launch/{self.launch_code}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print the traceback of an error, unless the browser has closed the connection."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


@dataclass(kw_only=True, eq=False)
class _Refusal(Exception):
    """A request that is not answered with content."""

    status: HTTPStatus
    reason: str


class _Handler(BaseHTTPRequestHandler):
    """Answers the requests of one connection."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = "sniper", ""
    timeout = _IDLE
    server: BrowseServer

    def do_GET(self) -> None:
        """Answer a request."""
        try:
            path = self._check()
            if path is None:
                return
            self._answer(path)
        except _Refusal as refusal:
            self._send_json({"problem": refusal.reason}, status=refusal.status)
        except (SniperError, MemoryError) as error:
            self._send_json({"problem": _explain(error)}, status=HTTPStatus.UNPROCESSABLE_ENTITY)
        except OSError as error:
            if isinstance(error, ConnectionError | TimeoutError):
                raise
            self._send_json({"problem": printable(str(error))}, status=HTTPStatus.UNPROCESSABLE_ENTITY)
        except Exception:
            problem = "This is a fault of sniper browse; its terminal has the details."
            self._send_json({"problem": problem}, status=HTTPStatus.INTERNAL_SERVER_ERROR)
            raise

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing: the terminal shows the address and errors alone."""

    def _check(self) -> str | None:
        """Return the path after the token; None if the request is answered with it.

        Raises:
            _Refusal: if it is for another host, or lacks the token.
        """
        host = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
        if host.lower() not in _HOSTS:
            raise _Refusal(
                status=HTTPStatus.FORBIDDEN, reason=f"expected the host {' or '.join(_HOSTS)} in the address"
            )
        first, separator, path = self.path.partition("?")[0].removeprefix("/").partition("/")
        if secrets.compare_digest(first.encode(), self.server.token.encode()):
            if not separator:
                self._redirect()
                return None
            return path
        code = self.server.launch_code
        if first == "launch" and code is not None and secrets.compare_digest(path.encode(), code.encode()):
            self.server.launch_code = None
            self._redirect()
            return None
        raise _Refusal(
            status=HTTPStatus.FORBIDDEN,
            reason="expected the address that `sniper browse` has printed, with its token",
        )

    def _answer(self, path: str) -> None:
        content = self.server.content
        if path in _FILES:
            name, kind = _FILES[path]
            self._send(_asset(name), f"{kind}; charset=utf-8")
            return
        for pattern, answer in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match is not None:
                try:
                    result = answer(content, [int(group) for group in match.groups()], self._query)
                except IndexError:
                    break
                if isinstance(result, bytes):
                    self._send(result, "image/png")
                else:
                    self._send_json(result)
                return
        raise _Refusal(status=HTTPStatus.NOT_FOUND, reason="there is no such image, tile or page")

    @property
    def _query(self) -> dict[str, str]:
        try:
            values = parse_qs(self.path.partition("?")[2], max_num_fields=_MAX_FIELDS)
        except ValueError as error:
            raise _Refusal(status=HTTPStatus.BAD_REQUEST, reason=str(error)) from error
        return {name: each[-1] for name, each in values.items()}

    def _redirect(self) -> None:
        self.send_response(HTTPStatus.SEE_OTHER)
        self.send_header("Location", f"/{self.server.token}/")
        self._end(0)

    def _send_json(self, value: Mapping[str, Any], *, status: HTTPStatus = HTTPStatus.OK) -> None:
        self._send(json.dumps(value, allow_nan=False).encode(), "application/json", status=status)

    def _send(self, body: bytes, kind: str, *, status: HTTPStatus = HTTPStatus.OK) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self._end(len(body))
        self.wfile.write(body)

    def _end(self, length: int) -> None:
        self.send_header("Content-Length", str(length))
        for name, value in _SECURITY.items():
            self.send_header(name, value)
        self.end_headers()


def _asset(name: str) -> bytes:
    return resources.files("sniper.browse").joinpath(name).read_bytes()


def _explain(error: SniperError | MemoryError) -> str:
    """Return a problem in words, and how a field of an experiment that it names is set."""
    text = printable(str(error)) or "there is not enough memory for this image"
    return f"{text} (sniper browse --config FILE)" if "data.read." in text else text


def _parse_filter(content: Content, query: Mapping[str, str]) -> Filter:
    """Read a filter from a query.

    Raises:
        _Refusal: naming the value that is not as expected.
    """

    def number(name: str, convert: Callable[[str], Any], default: Any, *, below: float = math.inf) -> Any:
        text = query.get(name, "")
        if not text:
            return default
        try:
            value = convert(text)
        except ValueError:
            value = -1
        if not 0 <= value < below:
            raise _Refusal(status=HTTPStatus.BAD_REQUEST, reason=f"{name}: {text!r} is out of range")
        return value

    kind = query.get("kind", "all")
    if kind not in KINDS or (kind in ERROR_KINDS and content.detections is None):
        raise _Refusal(
            status=HTTPStatus.BAD_REQUEST, reason=f"kind: {kind!r} is not one of the kinds of images"
        )
    chips = content.chips.chips
    return Filter(
        kind=kind,
        label=number("class", int, None, below=len(content.dataset.categories)),
        at_least=number("at_least", float, 0.0),
        below=number("below", float, math.inf),
        level=number("level", int, None, below=0 if chips is None else len(chips.pyramid.levels)),
        name=query.get("name", ""),
        min_score=number("min_score", float, content.min_score, below=1.0 + 1e-9),
    )


def _describe_image(content: Content, numbers: list[int], _: Mapping[str, str]) -> dict[str, Any]:
    return content.describe_image(numbers[0])


def _read_tile(content: Content, numbers: list[int], _: Mapping[str, str]) -> bytes:
    index, zoom, column, row = numbers
    return content.tiles.read_png(index, zoom=zoom, column=column, row=row)


_NUMBER = "([0-9]{1,9})"
_ROUTES: tuple[tuple[str, Callable[[Content, list[int], Mapping[str, str]], Any]], ...] = (
    ("dataset", lambda content, *_: content.describe()),
    ("chips", lambda content, *_: content.describe_chips()),
    ("select", lambda content, _, query: {"images": content.select(_parse_filter(content, query))}),
    (f"image/{_NUMBER}", _describe_image),
    (f"overview/{_NUMBER}", lambda content, numbers, _: {"done": content.tiles.build_overview(numbers[0])}),
    (f"tile/{_NUMBER}/{_NUMBER}/{_NUMBER}/{_NUMBER}", _read_tile),
)
"""Paths after the token, and what answers them: PNG as bytes, or JSON values."""
