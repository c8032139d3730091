"""Pipes in the place of files, and images that may not be opened, in every command."""

import base64
import io
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import numpy as np
import pytest
from PIL import Image

from sniper.data.datasets import load_dataset
from tests.cli.commands import CommandLine

_TIMEOUT = 60  # seconds; a pipe that is opened waits for ever


@pytest.fixture(autouse=True)
def timeout() -> Iterator[None]:
    def fail(number: int, frame: FrameType | None) -> None:
        raise AssertionError(f"no answer after {_TIMEOUT} seconds")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(_TIMEOUT)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize(
    ("command", "pipe"),
    [
        ("check PIPE", "p.json"),
        ("check train.json --config PIPE", "p.yaml"),
        ("check train.json", "images/train_1.png"),
        ("plan PIPE", "p.json"),
        ("plan train.json --proposals store", "store/head.json"),
        ("chips PIPE -o c.npz", "p.json"),
        ("evaluate PIPE train.json", "p.json"),
        ("evaluate results.json PIPE", "p.json"),
        ("evaluate results.json train.json --against PIPE", "p.json"),
        ("train PIPE", "p.yaml"),
        ("train experiment.yaml --run new --data.train.annotations PIPE", "p.json"),
        ("train experiment.yaml --run new", "images/train_1.png"),
        ("train experiment.yaml --run new --data.chips PIPE", "p.npz"),
        ("train experiment.yaml --run new --model.backbone.weights PIPE", "p.safetensors"),
        ("train experiment.yaml --run new --data.cache.folder cache", "cache/chips.sqlite"),
        ("train experiment.yaml --run new --data.cache.folder cache", "cache/.chips.sqlite.lock"),
        ("mine run PIPE", "p.json"),
        ("mine run --from PIPE", "p.json"),
        ("mine run", "images/train_1.png"),
        ("mine run -o store", "store/head.json"),
        ("predict run PIPE", "p.jpg"),
        ("predict run PIPE", "p.txt"),
        ("predict run --annotations PIPE", "p.json"),
        ("predict run", "images/train_1.png"),
        ("predict run images", "run/config.yaml"),
        ("predict run images", "CHECKPOINT/weights.safetensors"),
    ],
)
def test_a_pipe_is_refused_at_once(
    trained_folder: Path, monkeypatch: pytest.MonkeyPatch, sniper: CommandLine, command: str, pipe: str
) -> None:
    monkeypatch.chdir(trained_folder)
    Path("results.json").write_text("[]")
    (checkpoint,) = Path("run/checkpoints").iterdir()
    path = Path(pipe.replace("CHECKPOINT", str(checkpoint)))
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    message = sniper.error(*command.replace("PIPE", str(path)).split())
    assert re.search(r"a pipe, not a regular file|there is no run|contains something else", message)


@pytest.fixture
def outside(trained_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder whose first image is a link to a red one outside the image root."""
    monkeypatch.chdir(trained_folder)
    image = trained_folder / "images" / "train_0.png"
    with Image.open(image) as opened:
        Image.new("RGB", opened.size, "red").save(trained_folder / "secret.png")
    image.unlink()
    image.symlink_to(trained_folder / "secret.png")
    return trained_folder


def shows_red(page: Path) -> bool:
    jpegs = re.findall(r"data:image/jpeg;base64,([^\"]+)", page.read_text())
    pictures = [np.asarray(Image.open(io.BytesIO(base64.b64decode(jpeg)))) for jpeg in jpegs]
    means = [picture.mean(axis=(0, 1)) for picture in pictures]
    return any(red > 180 and green < 60 for red, green, _ in means)


def test_every_command_refuses_a_link_outside_the_image_root(outside: Path, sniper: CommandLine) -> None:
    for command in (
        "check train.json",
        "train experiment.yaml --run new",
        "mine run",
        "predict run",
        "predict run --annotations train.json",
    ):
        message = sniper.error(*command.split())
        assert "train_0.png is a link to" in message, command
        assert "data.follow_links: true or --follow-links allows it" in message
    sniper.json("plan", "train.json", "-o", "page")
    assert not shows_red(Path("page/plan.html"))
    assert "is a link to" in Path("page/plan.html").read_text()


def test_every_command_follows_a_link_that_is_allowed(outside: Path, sniper: CommandLine) -> None:
    assert sniper.json("check", "train.json", "--follow-links")["num_images"] == 4
    assert sniper.json("mine", "run", "--follow-links")["skipped_images"] == []
    assert sniper.json("predict", "run", "--follow-links")["skipped_images"] == []
    train = ("train", "experiment.yaml", "--run", "new", "--train.epochs", "0.2")
    trained = sniper.json(*train, "--data.follow_links", "true")
    assert trained["step"] > 0
    sniper.json("plan", "train.json", "-o", "page", "--follow-links")
    assert shows_red(Path("page/plan.html"))
    assert "follow_links: true" in Path("page/suggested.yaml").read_text()


def test_an_image_that_is_skipped_is_never_opened(outside: Path, sniper: CommandLine) -> None:
    """Other sides than annotated, and a link outside: `skip` leaves out both, in training and in search."""
    Image.new("RGB", (11, 7)).save("images/train_1.png")
    config = Path("run/config.yaml")
    config.write_text(config.read_text().replace("on_bad_image: refuse", "on_bad_image: skip"))
    with pytest.warns(UserWarning, match=r"train_[01]\.png.*; skipped"):
        predicted = sniper.json("predict", "run", "--draw", "pictures")
    assert [Path(path).name for path in predicted["skipped_images"]] == ["train_0.png", "train_1.png"]
    assert sorted(path.name for path in Path("pictures").iterdir()) == [
        "000003_train_2.jpg",
        "000004_train_3.jpg",
    ]
    with pytest.warns(UserWarning, match=r"train_[01]\.png.*; skipped"):
        mined = sniper.json("mine", "run")
    assert [Path(path).name for path in mined["skipped_images"]] == ["train_0.png", "train_1.png"]


def test_chips_of_an_image_that_is_skipped_are_replaced(outside: Path) -> None:
    from sniper.data.batches import ChipDataset
    from sniper.data.epoch import order_chips
    from sniper.data.spec import DataSpec
    from tests.training.experiments import tiny_experiment

    data = DataSpec(on_bad_image="skip")
    dataset = load_dataset("train.json", data=data)
    pyramid = tiny_experiment(dataset.path).pyramid
    order = order_chips(dataset, pyramid, batch_size=2, flip=0.0, seed=0, epoch=0)
    chips = ChipDataset(order, spec=data)
    with pytest.warns(UserWarning, match=r"train_0\.png: is a link to .*; skipped"):
        samples = [chips[index] for index in range(len(chips))]
    assert any(sample.skipped for sample in samples)
    assert not any(sample.name.startswith("train_0") for sample in samples)


def test_a_name_of_any_bytes_is_searched_and_reported(
    trained_folder: Path, monkeypatch: pytest.MonkeyPatch, sniper: CommandLine
) -> None:
    monkeypatch.chdir(trained_folder)
    name = os.fsdecode(b"\xb2\xe2.png")
    Path("good").mkdir()
    Path("images/train_0.png").rename(Path("good") / name)
    assert sniper.json("predict", "run", "good")["num_images"] == 1
    sniper.text("predict", "run", "good")
    (Path("good") / name).write_bytes(b"no image")
    assert r"(good/\xb2\xe2.png)" in sniper.error("predict", "run", "good")
    assert r"good/\xb2\xe2.png: cannot be read as an image" in sniper.error("predict", "run", f"good/{name}")
