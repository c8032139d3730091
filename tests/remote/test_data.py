"""Data sets of every format behind a URL are those on disk, and their images are only those below the image root."""

import json
from pathlib import Path

import numpy as np
import pytest

from sniper.data.datasets import Dataset, load_dataset
from sniper.data.images.files import open_image, read_image_sides
from sniper.data.images.georeference import read_georeference
from sniper.data.reader import find_bad_images, open_record
from sniper.data.spec import DataSpec, ReadSpec
from sniper.errors import AnnotationError, ImageError
from sniper.remote import RemotePath, client, to_path
from tests.cli.commands import CommandLine
from tests.data.geotiffs import write_geotiff
from tests.data.tiny import write_dataset
from tests.remote.server import Server

DOTA = "30 30 70 30 70 60 30 60 ship 0\n"
VISDRONE = "30,30,40,30,1,4,0,0\n"


def check_alike(remote: Dataset, local: Dataset) -> None:
    """Check that two data sets are equal, in the pixels of their images, too."""
    assert remote.identity == local.identity
    assert isinstance(remote.image_root, RemotePath)
    for ours, theirs in zip(remote, local, strict=True):
        window = (0, 0, theirs.width, theirs.height)
        pixels = open_record(ours, ReadSpec()).read(window)
        np.testing.assert_array_equal(pixels, open_record(theirs, ReadSpec()).read(window))


@pytest.mark.parametrize("name", ["coco", "yolo", "voc"])
def test_a_data_set_behind_a_url_is_that_on_disk(
    name: str, server: Server, served: Path, tmp_path: Path, sniper: CommandLine
) -> None:
    sniper.text("convert", write_dataset(tmp_path / "source"), served / name, "--to", name)
    check_alike(load_dataset(f"{server.url}/{name}"), load_dataset(served / name))


@pytest.mark.parametrize(("folder", "line"), [("labelTxt", DOTA), ("annotations", VISDRONE)])
def test_text_files_behind_a_url_are_those_on_disk(
    folder: str, line: str, server: Server, served: Path
) -> None:
    write_dataset(served)
    (served / folder).mkdir()
    for image in (served / "images").iterdir():
        (served / folder / f"{image.stem}.txt").write_text(line)
    (served / "train.json").unlink()
    check_alike(load_dataset(server.url), load_dataset(served))


def test_an_image_root_may_be_elsewhere_than_the_annotations(
    server: Server, served: Path, tmp_path: Path
) -> None:
    annotations = write_dataset(served)
    local = load_dataset(annotations)
    (tmp_path / "train.json").write_bytes(annotations.read_bytes())
    check_alike(load_dataset(tmp_path / "train.json", image_root=f"{server.url}/images"), local)
    annotations.rename(served / "moved.json")
    other = load_dataset(f"{server.url}/moved.json", image_root=served / "images")
    assert other.identity == local.identity
    assert not isinstance(other.image_root, RemotePath)


def test_a_local_data_yaml_names_a_remote_folder(
    server: Server, served: Path, tmp_path: Path, sniper: CommandLine
) -> None:
    sniper.text("convert", write_dataset(tmp_path / "source"), served / "yolo", "--to", "yolo")
    (tmp_path / "data.yaml").write_text(
        f"path: {server.url}/yolo\ntrain: images\nnames: {{0: dark, 1: bright}}\n"
    )
    check_alike(load_dataset(tmp_path / "data.yaml"), load_dataset(served / "yolo"))


def test_the_headers_of_remote_images_are_not_read_in_advance(server: Server, served: Path) -> None:
    write_dataset(served, sides=[(60, 60)] * 40)
    load_dataset(f"{server.url}/train.json")
    assert 1 <= sum(name.startswith("GET /images/") for name in server.requests) <= 8


@pytest.mark.parametrize("name", ["../secret.png", "/secret.png", "a/../../secret.png"])
def test_an_image_outside_the_root_is_not_requested(name: str, server: Server, served: Path) -> None:
    write_dataset(served, sides=[(60, 60)])
    (served / "images" / "train_0.png").rename(served / "secret.png")
    content = json.loads((served / "train.json").read_text())
    content["images"][0]["file_name"] = name
    (served / "train.json").write_text(json.dumps(content))
    with pytest.raises(AnnotationError, match=r"images/.*secret.png (leaves the image root|cannot be read)"):
        load_dataset(f"{server.url}/train.json", image_root=f"{server.url}/images")
    dataset = load_dataset(f"{server.url}/train.json", image_root=f"{server.url}/images", has_images=False)
    with pytest.raises(ImageError, match=r"leaves the image root|does not exist"):
        open_record(dataset[0], ReadSpec())
    assert not any(request.endswith(" /secret.png") for request in server.requests)


def test_an_image_root_without_the_images_is_refused(server: Server, served: Path) -> None:
    annotations = write_dataset(served)
    message = (
        rf"none of 4 images that were tried can be read: {server.url}/elsewhere/train_0.png .*does not exist"
    )
    with pytest.raises(AnnotationError, match=message):
        load_dataset(annotations, image_root=f"{server.url}/elsewhere")


def test_check_finds_the_remote_images_that_cannot_be_read(
    server: Server, served: Path, tmp_path: Path
) -> None:
    dataset = load_dataset(write_dataset(served), image_root=f"{server.url}/images")
    (served / "images" / "train_1.png").write_bytes(b"no image")
    (served / "images" / "train_2.png").unlink()
    client._state.forget()
    for path in (tmp_path / "cache").rglob("??/*"):  # the sample that was read
        path.unlink()
    good, broken, missing, other = find_bad_images(dataset, ReadSpec())
    assert good is other is None
    assert broken is not None
    assert missing is not None
    assert broken.startswith(f"{server.url}/images/train_1.png: cannot be read as an image (cannot identify")
    assert missing.endswith("train_2.png: cannot be read as an image (does not exist)")


def test_a_remote_geotiff_is_read_in_windows(server: Server, served: Path) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (96, 128, 3), dtype=np.uint8)
    local = write_geotiff(served / "a.tif", pixels)
    remote = to_path(f"{server.url}/a.tif")
    np.testing.assert_array_equal(open_image(remote).read((8, 8, 64, 64)), pixels[8:64, 8:64])
    assert read_image_sides(remote) == (128, 96)
    ours, theirs = (read_georeference(path, ReadSpec()) for path in (remote, local))
    assert ours is not None
    assert theirs is not None
    assert (ours.crs, ours.transform) == (theirs.crs, theirs.transform)


def test_a_missing_annotation_file_is_named(server: Server) -> None:
    with pytest.raises(
        AnnotationError, match=rf"^{server.url}/none.json: cannot be read \(does not exist\)$"
    ):
        load_dataset(f"{server.url}/none.json")


def test_local_and_remote_images_are_not_mixed(server: Server, served: Path, tmp_path: Path) -> None:
    from sniper.data.datasets.load import load_image_files

    write_dataset(served, sides=[(60, 60)])
    files = [served / "images" / "train_0.png", to_path(f"{server.url}/images/train_0.png")]
    assert len(load_image_files(files[1:], path=Path("list"))) == 1
    with pytest.raises(
        AnnotationError, match=r"the images of a data set are in http://127.* and local folders"
    ):
        load_image_files(files, path=Path("list"), data=DataSpec())
