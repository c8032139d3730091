"""Measure how fast chips are read from a server, cold and from the cache, against the local disk.

    python benchmarks/remote.py --annotations coco_person/train.json --rounds 3
    python benchmarks/remote.py --annotations coco_person/train.json --url s3://bucket/images \
        --endpoint http://127.0.0.1:5000

The cells, in turn, in each round:

- `disk`: one epoch of chips from the local files;
- `cold`: the same from a server, with an empty cache, so that every image is requested;
- `warm`: again, from the cache that `cold` has filled;
- `full`: from a cache that has room for half of the images, filled;
- `faults`: with an empty cache; one request in 50 fails with status 500, and one of these stalls.

All give the same batches, which is checked. The script serves the images itself, in a process of its own, or passes
requests on to the S3 server at `--endpoint`; either answers after `--latency` milliseconds. Times are wall-clock, and
batches are discarded.
"""

import argparse
import hashlib
import multiprocessing
import os
import shutil
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from http.client import HTTPConnection
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from device import markdown

from sniper.chips import PyramidSpec
from sniper.data.datasets import Dataset, load_dataset
from sniper.data.epoch import EpochOrder, order_chips
from sniper.data.loader import load_batches
from sniper.data.spec import CacheSpec, DataSpec, RemoteSpec

_EVERY = 50  # request for an image that fails
_STALL = 60.0  # seconds


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What is read in turn.

    Attributes:
        name: of the cell.
        order: the chips, of local or remote images.
        cache: folder; None for local images.
        is_kept: whether the cache is that of an earlier cell.
        gigabytes: bound of the cache.
        faults: whether the server fails.
    """

    name: str
    order: EpochOrder
    cache: Path | None = None
    is_kept: bool = False
    gigabytes: float | None = None
    faults: bool = False


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure how fast chips are read from a server.")
    parser.add_argument(
        "--annotations", type=Path, required=True, help="COCO JSON file, with images beside it"
    )
    parser.add_argument("--url", help="s3:// folder that has the same images, instead of serving them")
    parser.add_argument("--endpoint", help="of the S3 server that has them")
    parser.add_argument("--latency", type=float, default=0.0, help="milliseconds before each answer")
    parser.add_argument("--workers", type=int, default=1, help="loader processes")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10**9, help="of an epoch that are read")
    parser.add_argument(
        "--timeout", type=float, default=5.0, help="seconds, after which a request has stalled"
    )
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if (options.url is None) != (options.endpoint is None):
        parser.error("--url and --endpoint belong together")
    local = load_dataset(options.annotations)
    with tempfile.TemporaryDirectory() as folder, serving(local.image_root, options) as (url, control):
        remote = load_dataset(options.annotations, image_root=url)
        cells = list(list_cells(local, remote, Path(folder), batch=options.batch))
        print(
            markdown(
                ("cell", "chips/s", "range", "of disk", "requests"), list(measure(cells, options, control))
            )
        )


def list_cells(local: Dataset, remote: Dataset, folder: Path, *, batch: int) -> Iterator[Cell]:
    on_disk, on_server = (order_of(dataset, batch=batch) for dataset in (local, remote))
    num_bytes = sum(record.path.stat().st_size for record in local)
    yield Cell(name="disk", order=on_disk)
    yield Cell(name="cold", order=on_server, cache=folder / "cold")
    yield Cell(name="warm", order=on_server, cache=folder / "cold", is_kept=True)
    half = max(num_bytes / 2e9, 0.01)
    yield Cell(name="(filling)", order=on_server, cache=folder / "full", gigabytes=half)
    yield Cell(name="full", order=on_server, cache=folder / "full", is_kept=True, gigabytes=half)
    yield Cell(name="faults", order=on_server, cache=folder / "faults", faults=True)


def order_of(dataset: Dataset, *, batch: int) -> EpochOrder:
    return order_chips(
        dataset, PyramidSpec(), batch_size=batch, flip=0.5, seed=0, epoch=0, images_at_once=None
    )


def measure(cells: list[Cell], options: argparse.Namespace, control: Connection) -> Iterator[tuple[str, ...]]:
    """Read all cells in each round; yield a row for each cell."""
    rates: dict[str, list[float]] = {cell.name: [] for cell in cells}
    requests: dict[str, str] = {}
    digests = set()
    for _ in range(options.rounds):
        for cell in cells:
            if cell.cache is not None and not cell.is_kept:
                shutil.rmtree(cell.cache, ignore_errors=True)
            control.send(cell.faults)
            control.recv()
            rate, digest = read(cell, options)
            rates[cell.name].append(rate)
            digests.add(digest)
            control.send(False)
            requests[cell.name] = str(control.recv())
    assert len(digests) == 1, "the batches differ"
    disk = statistics.median(rates["disk"])
    for cell in cells:
        if cell.name.startswith("("):
            continue
        values = rates[cell.name]
        median = statistics.median(values)
        span = f"{min(values):.0f} to {max(values):.0f}"
        yield cell.name, f"{median:.0f}", span, f"{median / disk:.2f}", requests[cell.name]


def read(cell: Cell, options: argparse.Namespace) -> tuple[float, str]:
    """Read an epoch; return chips a second, and a digest of all pixels."""
    spec = DataSpec(
        num_workers=options.workers,
        cache=CacheSpec(folder=None if cell.cache is None else str(cell.cache), gigabytes=cell.gigabytes),
        remote=RemoteSpec(timeout=options.timeout),
    )
    spec = spec if cell.cache is not None else replace(spec, cache=CacheSpec())
    spec.configure_remote()
    steps = range(min(cell.order.num_steps, options.steps))
    digest = hashlib.blake2b()
    with warnings.catch_warnings(), closing(load_batches(cell.order, spec, steps=steps)) as batches:
        warnings.simplefilter("ignore")
        started = time.monotonic()
        num_chips = 0
        for batch in batches:
            num_chips += len(batch)
            digest.update(batch.images.numpy().tobytes())
    return num_chips / (time.monotonic() - started), digest.hexdigest()


@contextmanager
def serving(folder: Path, options: argparse.Namespace) -> Iterator[tuple[str, Connection]]:
    """Serve a folder, or an S3 server, in another process, which counts requests, and fails when it is told to."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.Process(
        target=serve, args=(folder, options.endpoint, options.latency / 1e3, theirs), daemon=True
    )
    process.start()
    try:
        url = f"http://127.0.0.1:{ours.recv()}"
        if options.url is not None:
            os.environ["AWS_ENDPOINT_URL"] = url
        yield options.url or url, ours
    finally:
        process.kill()


def serve(folder: Path, endpoint: str | None, latency: float, control: Connection) -> None:
    state = {"count": 0, "faults": False, "has_stalled": False}

    class Handler(SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            super().do_HEAD() if endpoint is None else self.pass_on(endpoint)

        def do_GET(self) -> None:
            state["count"] += 1
            time.sleep(latency)
            if state["faults"] and state["count"] % _EVERY == 0:
                self.close_connection = True
                if not state["has_stalled"]:
                    state["has_stalled"] = True
                    time.sleep(_STALL)
                else:
                    self.send_error(500)
                return
            super().do_GET() if endpoint is None else self.pass_on(endpoint)

        def pass_on(self, endpoint: str) -> None:
            connection = HTTPConnection(endpoint.partition("://")[2])
            connection.request(self.command, self.path, headers=dict(self.headers))
            answer = connection.getresponse()
            content = answer.read()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("connection", "date", "server", "transfer-encoding"):
                    self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)
            connection.close()

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

    server = Server(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    control.send(server.server_address[1])
    while True:
        faults = control.recv()
        count = state["count"]
        state.update(count=0, faults=faults, has_stalled=False)
        control.send(count)


if __name__ == "__main__":
    main()
