"""Data sets to browse, detections of them, and a server in this process."""

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np

from sniper.browse.chips import ChipChooser
from sniper.browse.content import MatchedDetections
from sniper.browse.server import BrowseServer, Content
from sniper.browse.tiles import ImageTiles
from sniper.chips import LevelSpec, PyramidSpec
from sniper.data.datasets import Dataset, load_dataset
from sniper.data.spec import DataSpec, ReadSpec
from sniper.evaluation.pair import EvaluationPair

PYRAMID = PyramidSpec(
    chip_size=256, levels=(LevelSpec(factor=2.0, below=60), LevelSpec(long_side=256, at_least=40))
)


def write_coco(
    folder: Path,
    sides: Mapping[str, tuple[int, int]],
    boxes: Mapping[str, Sequence[tuple[float, ...]]],
    *,
    crowds: Mapping[str, list[int]] | None = None,
) -> Path:
    """Write annotations of images by file name; boxes are (category, x, y, width, height) of categories 1 and 2."""
    ids = {name: index for index, name in enumerate(sides, start=1)}
    annotations = [
        {
            "id": 100 * ids[name] + index,
            "image_id": ids[name],
            "category_id": int(category),
            "bbox": box,
            "area": box[2] * box[3],
            "iscrowd": int(index in (crowds or {}).get(name, [])),
        }
        for name, rows in boxes.items()
        for index, (category, *box) in enumerate(rows)
    ]
    path = folder / "annotations.json"
    path.write_text(
        json.dumps(
            {
                "images": [
                    {"id": ids[name], "file_name": name, "width": width, "height": height}
                    for name, (width, height) in sides.items()
                ],
                "annotations": annotations,
                "categories": [{"id": 1, "name": "car"}, {"id": 2, "name": "<b>bike</b>"}],
            }
        )
    )
    return path


def match(dataset: Dataset, rows: list[tuple[int, int, float, list[float]]]) -> MatchedDetections:
    """Match detections, each (image id, category id, score, xywh)."""
    entries = [
        {"image_id": image, "category_id": category, "score": score, "bbox": box}
        for image, category, score, box in rows
    ]
    return MatchedDetections.of(EvaluationPair.of(entries, dataset))


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An answer of the server."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)


@dataclass(frozen=True, kw_only=True)
class Client:
    """Sends requests to a server."""

    server: BrowseServer

    def get(self, path: str, *, token: bool = True, host: str | None = None, method: str = "GET") -> Answer:
        """Send a request, below the token unless it is left out."""
        connection = HTTPConnection("127.0.0.1", self.server.server_port, timeout=60)
        try:
            connection.putrequest(method, f"/{self.server.token}/{path}" if token else path, skip_host=True)
            connection.putheader("Host", host or f"127.0.0.1:{self.server.server_port}")
            connection.endheaders()
            response = connection.getresponse()
            return Answer(status=response.status, headers=dict(response.getheaders()), body=response.read())
        finally:
            connection.close()


@contextmanager
def serving(
    dataset: Dataset,
    *,
    detections: MatchedDetections | None = None,
    min_score: float = 0.0,
    pyramid: PyramidSpec = PYRAMID,
    read: ReadSpec = ReadSpec(),
) -> Iterator[Client]:
    """Serve a data set in a thread; its chips are chosen already."""
    chips = ChipChooser(dataset, pyramid)
    chips.wait()
    content = Content(
        name="folder/<i>annotations</i>.json",
        dataset=dataset,
        tiles=ImageTiles(dataset, read),
        chips=chips,
        detections=detections,
        min_score=min_score,
    )
    server = BrowseServer(content)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield Client(server=server)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def load(path: Path) -> Dataset:
    """Load a data set as the command does."""
    return load_dataset(path, data=DataSpec(on_bad_image="skip"))


def noise(width: int, height: int, *, seed: int = 0) -> np.ndarray:
    """Return an image of noise, (h, w, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
