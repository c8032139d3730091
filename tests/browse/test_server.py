"""The server answers requests with the token alone, and shows every image or says why it cannot."""

import io
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sniper.browse.chips import ChipChooser
from sniper.browse.server import BrowseServer
from sniper.data.spec import ReadSpec
from tests.browse.data import Client, load, match, noise, serving, write_coco

PIXELS = noise(700, 300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set with good images and with all kinds of bad ones."""
    folder = tmp_path_factory.mktemp("browse")
    Image.fromarray(PIXELS).save(folder / "good.png")
    Image.fromarray(PIXELS[..., 0]).save(folder / "grey.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise(90, 60)).save(folder / "turned.jpg", exif=exif)
    Image.fromarray(noise(90, 60)[..., 0].astype(np.uint16) * 200).save(folder / "deep.png")
    Image.fromarray(noise(90, 60)).save(folder / "truncated.png")
    (folder / "truncated.png").write_bytes((folder / "truncated.png").read_bytes()[:6000])
    (folder / "text.png").write_text("no image")
    Image.fromarray(noise(90, 60)).save(folder / "other_sides.png")
    (folder / "<script>.png").write_bytes((folder / "good.png").read_bytes())
    sides = {
        "good.png": (700, 300), "grey.png": (700, 300), "turned.jpg": (60, 90), "deep.png": (90, 60),
        "truncated.png": (90, 60), "text.png": (90, 60), "missing.png": (90, 60), "other_sides.png": (91, 60),
        "<script>.png": (700, 300), "/etc/passwd": (10, 10), "../outside.png": (10, 10),
    }  # fmt: skip
    boxes = {name: [(1, 5, 5, 20, 20), (2, 20, 20, 30, 30)] for name in sides if "/" not in name}
    write_coco(folder, sides, boxes)
    return folder


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[Client]:
    dataset = load(folder / "annotations.json")
    detections = match(dataset, [(1, 1, 0.9, [5, 5, 20, 20]), (1, 1, 0.3, [100, 100, 20, 20])])
    with serving(dataset, detections=detections, min_score=0.25) as client:
        yield client


def index_of(client: Client, name: str) -> int:
    names: list[str] = client.server.content.dataset.file_names.tolist()
    return names.index(name)


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/dataset",
        "/favicon.ico",
        "/launch/",
        "/launch/None",
        f"/{'a' * 32}/",
        "//",
        "/%00/",
        "/tile/0/0/0/0",
    ],
)
def test_a_request_without_the_token_is_refused(client: Client, path: str) -> None:
    answer = client.get(path, token=False)
    assert answer.status == 403
    assert "expected the address that `sniper browse` has printed" in answer.json["problem"]
    assert client.server.token not in str(answer)


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "localhost.evil.example", "127.0.0.2", "[::1]:80"]
)
def test_a_request_for_another_host_is_refused(client: Client, host: str) -> None:
    answer = client.get("dataset", host=host)
    assert answer.status == 403
    assert answer.json == {"problem": "expected the host 127.0.0.1 or localhost in the address"}


@pytest.mark.parametrize("host", ["localhost", "localhost:9000", "LOCALHOST:80", "127.0.0.1:1"])
def test_this_machine_may_be_reached_through_a_tunnel(client: Client, host: str) -> None:
    assert client.get("dataset", host=host).status == 200


@pytest.mark.parametrize(
    "path",
    [
        "../", "..%2f..%2fetc/passwd", "%2e%2e/server.py", "server.py", "page.html", "browse.css/", "/etc/passwd",
        "image/99", "image/-1", "image/0x1", "image/1e3", "image/%EF%BC%99", "image/0/", "tile/0/9/0/0", "tile/0/0/9/0",
        "tile/0/0/0/999999999", "tile/99/0/0/0", "tile/0/0/0/9999999999", "overview/99", "nothing",
    ],
)  # fmt: skip
def test_what_is_not_there_is_not_found(client: Client, path: str) -> None:
    answer = client.get(path)
    assert answer.status == 404
    assert answer.json == {"problem": "there is no such image, tile or page"}


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "HEAD", "OPTIONS"])
def test_only_reading_is_answered(client: Client, method: str) -> None:
    assert client.get("dataset", method=method).status == 501


def test_the_launch_address_leads_to_the_page_once(folder: Path) -> None:
    with serving(load(folder / "annotations.json")) as client:
        path = client.server.launch_url.partition("/launch")[2]
        first = client.get(f"/launch{path}", token=False)
        assert (first.status, first.headers["Location"]) == (303, f"/{client.server.token}/")
        assert client.get(f"/launch{path}", token=False).status == 403
        bare = client.get(f"/{client.server.token}", token=False)
        assert (bare.status, bare.headers["Location"]) == (303, f"/{client.server.token}/")


def test_the_page_may_load_nothing_from_elsewhere(client: Client) -> None:
    for path, kind in (("", "text/html"), ("browse.js", "text/javascript"), ("browse.css", "text/css")):
        answer = client.get(path)
        assert answer.status == 200
        assert answer.headers["Content-Type"] == f"{kind}; charset=utf-8"
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
        assert answer.headers["Cache-Control"] == "no-store"
        assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert b"http://" not in answer.body
        assert b"https://" not in answer.body
        assert b"innerHTML" not in answer.body


def test_the_server_listens_on_loopback_alone(client: Client) -> None:
    assert client.server.server_address[0] == "127.0.0.1"
    with socket.socket() as other, pytest.raises(OSError, match="refused"):
        other.connect(("127.0.0.2", client.server.server_port))


def test_a_port_in_use_is_an_error(client: Client) -> None:
    with pytest.raises(OSError, match="in use"):
        BrowseServer(client.server.content, port=client.server.server_port)


def test_a_tile_is_a_png_of_the_pixels(client: Client) -> None:
    answer = client.get("tile/0/0/1/0")
    assert answer.headers["Content-Type"] == "image/png"
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(answer.body))), PIXELS[:, 512:])
    grey = client.get(f"tile/{index_of(client, 'grey.png')}/0/1/0")
    expected = np.repeat(PIXELS[:, 512:, :1], 3, axis=2)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(grey.body))), expected)


def test_an_image_is_shown_in_its_exif_orientation(client: Client) -> None:
    index = index_of(client, "turned.jpg")
    facts = client.get(f"image/{index}").json
    assert (facts["width"], facts["height"], facts["problem"]) == (60, 90, None)
    assert Image.open(io.BytesIO(client.get(f"tile/{index}/0/0/0").body)).size == (60, 90)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("deep.png", "data.read.intensity_range: [0, 65535] (sniper browse --config FILE)"),
        ("text.png", "cannot be read as an image"),
        ("missing.png", "does not exist"),
        ("other_sides.png", "has 90x60 pixels, but the annotations say 91x60"),
        ("/etc/passwd", "leaves the image root"),
        ("../outside.png", "leaves the image root"),
    ],
)
def test_an_image_that_cannot_be_read_is_described_with_the_reason(
    client: Client, name: str, problem: str
) -> None:
    index = index_of(client, name)
    facts = client.get(f"image/{index}")
    assert facts.status == 200
    assert problem in facts.json["problem"]
    assert facts.json["name"] == name
    tile = client.get(f"tile/{index}/0/0/0")
    assert tile.status == 422
    assert problem in tile.json["problem"]


def test_damage_that_shows_in_the_pixels_alone_is_reported_with_the_tile(client: Client) -> None:
    index = index_of(client, "truncated.png")
    assert client.get(f"image/{index}").json["problem"] is None
    answer = client.get(f"tile/{index}/0/0/0")
    assert answer.status == 422
    assert "truncated.png: " in answer.json["problem"]
    assert client.get("tile/0/0/0/0").status == 200


def test_deep_images_are_shown_with_an_intensity_range(folder: Path) -> None:
    read = ReadSpec(intensity_range=(0.0, 65535.0))
    with serving(load(folder / "annotations.json"), read=read) as client:
        index = index_of(client, "deep.png")
        assert client.get(f"image/{index}").json["problem"] is None
        assert client.get(f"tile/{index}/0/0/0").status == 200


def test_the_data_set_and_its_chips_are_described(client: Client) -> None:
    facts = client.get("dataset").json
    assert facts["name"] == "folder/<i>annotations</i>.json"  # text, which the page never takes for markup
    assert facts["classes"] == ["car", "<b>bike</b>"]
    assert (facts["num_images"], facts["has_detections"], facts["min_score"]) == (11, True, 0.25)
    chips = client.get("chips").json
    assert chips["state"] == "ready"
    assert [level["name"] for level in chips["levels"]] == ["×2", "long side 256"]
    assert [level["below"] for level in chips["levels"]] == [60, None]
    image = client.get("image/0").json
    assert image["zooms"] == [[700, 300], [350, 150]]
    assert image["detections"]["kinds"] == ["true", "false"]
    assert len(image["chips"]) >= 1


def test_filters_come_with_the_address(client: Client) -> None:
    def select(query: str) -> Any:
        return client.get(f"select?{query}").json

    assert len(select("")["images"]) == 11
    assert select("kind=false")["images"] == [0]
    assert select("kind=false&min_score=0.31")["images"] == []
    assert select("name=GREY&kind=missed&class=1&at_least=10&below=40&level=")["images"] == [1]
    assert client.get("select?kind=other").status == 400
    assert select("class=2") == {"problem": "class: '2' is out of range"}
    for query in (
        "level=9",
        "at_least=-1",
        "below=nan",
        "min_score=1.5",
        "class=a",
        "&".join("a=b" for _ in range(99)),
    ):
        assert client.get(f"select?{query}").status == 400, query


def test_errors_of_a_filter_need_detections(folder: Path) -> None:
    with serving(load(folder / "annotations.json")) as client:
        assert client.get("select?kind=errors").status == 400
        assert client.get("select?kind=empty").status == 200


def test_chips_that_are_not_chosen_yet_are_reported_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ChipChooser, "state", "choosing")
    with serving(load(folder / "annotations.json")) as client:
        assert client.get("chips").json == {"state": "choosing", "problem": ""}
        assert client.get("select?level=0").status in (200, 400)


def test_a_fault_is_printed_and_ends_one_request_alone(
    client: Client, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a fault")

    monkeypatch.setattr(client.server.content.tiles, "read_png", fail)
    answer = client.get("tile/0/0/0/0")
    assert answer.status == 500
    assert "its terminal has the details" in answer.json["problem"]
    printed = ""
    deadline = time.monotonic() + 30
    while "RuntimeError: a fault" not in printed:  # it is printed after the answer
        assert time.monotonic() < deadline
        printed += capsys.readouterr().err
    assert client.get("dataset").status == 200


def test_a_browser_that_closes_the_connection_is_no_fault(
    client: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    for request in (b"GET / HTTP/1.1\r\n", b"\x16\x03\x01 garbage\r\n\r\n", b""):
        with socket.create_connection(("127.0.0.1", client.server.server_port)) as connection:
            connection.sendall(request)
    assert client.get("dataset").status == 200
    assert "Traceback" not in capsys.readouterr().err


def test_json_is_valid_where_sizes_have_no_bound(client: Client) -> None:
    assert "Infinity" not in json.dumps(client.get("chips").json)
