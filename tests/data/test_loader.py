"""Batches read by worker processes: the same for any number of workers, each image decoded once."""

import dataclasses
import errno
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from sniper.data.batches import Batch, ChipDataset, collate
from sniper.data.datasets import Dataset, load_dataset
from sniper.data.epoch import EpochOrder, order_chips
from sniper.data.images.files import ImageReader, open_image
from sniper.data.loader import load_batches
from sniper.data.spec import DataSpec
from sniper.errors import ImageError, LoaderError
from tests.chips.worlds import SMALL_PYRAMID
from tests.data.assertions import assert_equal_batches
from tests.data.tiny import write_dataset
from tests.devices import GPU

SIDES = [(160, 120), (96, 200), (200, 200), (150, 90)] * 3


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return load_dataset(write_dataset(tmp_path, sides=SIDES, boxes_per_image=6))


def order_epoch(
    dataset: Dataset, images_at_once: int | None, *, batch_size: int = 4, epoch: int = 0
) -> EpochOrder:
    return order_chips(
        dataset,
        SMALL_PYRAMID,
        batch_size=batch_size,
        flip=0.5,
        seed=0,
        epoch=epoch,
        images_at_once=images_at_once,
    )


def images_of(order: EpochOrder) -> np.ndarray:
    return order.table.image_indices[order.chip_indices]


@pytest.mark.parametrize("images_at_once", [1, 2, 3, 5, 64])
def test_streams_contain_every_chip_image_by_image(dataset: Dataset, images_at_once: int) -> None:
    order = order_epoch(dataset, images_at_once)
    chip_indices = order.chip_indices[: len(order.table)]
    assert sorted(chip_indices.tolist()) == list(range(len(order.table)))
    assert order.chip_indices[len(order.table) :].tolist() == chip_indices[: order.num_padding].tolist()
    assert order.num_streams == {1: 1, 2: 2, 3: 2, 5: 4, 64: 12}[images_at_once]  # of 12 images, batches of 4
    images = order.table.image_indices[chip_indices]
    streams = [images[i :: order.num_streams] for i in range(order.num_streams)]
    changes = sum(int((stream[1:] != stream[:-1]).sum()) for stream in streams)
    # To the next image, or to the rest of one that begins in another stream.
    assert changes <= len(dataset) - 1


def test_the_order_of_images_changes_each_epoch(dataset: Dataset) -> None:
    orders = [order_epoch(dataset, 3, epoch=epoch) for epoch in (0, 0, 1)]
    assert (
        orders[0].chip_indices.tolist() == orders[1].chip_indices.tolist() != orders[2].chip_indices.tolist()
    )
    assert len({tuple(dict.fromkeys(images_of(order).tolist())) for order in orders}) == 2


def test_a_batch_mixes_as_many_images_as_there_are_streams(dataset: Dataset) -> None:
    mixed = images_of(order_epoch(dataset, 4)).reshape(-1, 4)
    assert np.mean([len(set(batch)) for batch in mixed.tolist()]) > 3.5
    single = images_of(order_epoch(dataset, 1)).reshape(-1, 4)
    assert np.mean([len(set(batch)) for batch in single.tolist()]) < 2.5


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
@pytest.mark.parametrize(
    ("images_at_once", "num_workers", "share"),
    [
        (0, 0, (0, 1)),
        (0, 2, (1, 2)),
        (1, 2, (0, 1)),
        (3, 1, (0, 1)),
        (3, 2, (1, 2)),
        (4, 2, (0, 1)),
        (4, 3, (0, 2)),  # one of the three workers never has a part
        (7, 3, (0, 1)),
    ],
)
def test_batches_do_not_depend_on_the_number_of_workers(
    dataset: Dataset, images_at_once: int, num_workers: int, share: tuple[int, int]
) -> None:
    order = order_epoch(dataset, images_at_once)
    chips = ChipDataset(order)
    spec = DataSpec(num_workers=num_workers)
    steps = range(1, order.num_steps)
    batches = list(load_batches(order, spec, steps=steps, share=share))
    assert len(batches) == len(steps)
    for step, batch in zip(steps, batches, strict=True):
        indices = range(step * 4 + share[0], (step + 1) * 4, share[1])
        assert_equal_batches(batch, collate([chips[index] for index in indices]))


def test_an_image_is_decoded_once_for_all_its_chips(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Path] = []

    def record(path: Path, *args: Any, **kwargs: Any) -> ImageReader:
        opened.append(path)
        return open_image(path, *args, **kwargs)

    monkeypatch.setattr("sniper.data.reader.open_image", record)

    def count_opened(images_at_once: int) -> int:
        opened.clear()
        order = order_epoch(dataset, images_at_once)
        spec = DataSpec(num_workers=0)
        list(load_batches(order, spec, steps=range(order.num_steps)))
        return len(opened)

    num_chips = len(order_epoch(dataset, 0).chip_indices)
    assert count_opened(0) > 0.7 * num_chips
    # Once each; again where a stream ends within an image, and for the chips that fill the last batch.
    assert count_opened(4) <= len(dataset) + 3 + 4
    assert count_opened(64) <= 2 * len(dataset) + 3
    assert num_chips > 2 * (len(dataset) + 7)


def test_the_default_number_of_streams_is_limited_by_memory(tmp_path: Path) -> None:
    sides = [(60, 50)] * 260
    many = load_dataset(write_dataset(tmp_path / "many", sides=sides, boxes_per_image=1))
    assert order_epoch(many, None).num_streams == 256
    large = dataclasses.replace(many, widths=many.widths * 200, heights=many.heights * 200)  # 360 MB each
    assert order_epoch(large, None).num_streams == 4
    assert order_epoch(large, None, batch_size=25).num_streams == 5
    tiffs = dataclasses.replace(large, file_names=np.array([f"{i}.tif" for i in range(260)]))
    assert order_epoch(tiffs, None).num_streams == 256  # read in windows


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_streams_are_divided_among_training_processes(dataset: Dataset, world_size: int) -> None:
    order = order_epoch(dataset, 8)
    assert order.num_streams == 8
    streams_of_rank = [
        {index % order.num_streams for index in range(len(order.chip_indices)) if index % world_size == rank}
        for rank in range(world_size)
    ]
    assert sum(map(len, streams_of_rank)) == order.num_streams


@pytest.mark.parametrize("device", [GPU])
@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_batches_are_copied_to_a_gpu_unchanged(dataset: Dataset, num_workers: int, device: str) -> None:
    order, spec = order_epoch(dataset, 4), DataSpec(num_workers=num_workers)
    steps = range(order.num_steps)
    copied = list(load_batches(order, spec, steps=steps, device=torch.device(device)))
    expected = list(load_batches(order, spec, steps=steps))
    assert len(copied) == len(expected) == order.num_steps
    for batch, on_cpu in zip(copied, expected, strict=True):
        assert batch.images.device.type == batch.targets.boxes.device.type == "cuda"
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        moved = batch.to(torch.device("cpu"))
        torch.cuda.synchronize()
        assert_equal_batches(moved, on_cpu)


def test_batches_that_are_read_ahead_do_not_change_those_before(dataset: Dataset) -> None:
    order = order_epoch(dataset, 4)
    batches = []
    with closing(load_batches(order, DataSpec(num_workers=2), steps=range(order.num_steps))) as loaded:
        for batch in loaded:
            batches.append(batch)
            time.sleep(0.1)  # the workers read as many as they may
    assert len(batches) > 4
    for batch, expected in zip(batches, read_all(order), strict=True):
        assert_equal_batches(batch, expected)


def test_an_image_that_is_read_ahead_and_is_bad_stops_after_the_batch_before_it(
    dataset: Dataset,
) -> None:
    order = order_epoch(dataset, 1)
    images = order.table.image_indices[order.chip_indices]
    bad = int(images[-1])
    path = dataset[bad].path
    path.write_bytes(path.read_bytes()[:200])
    num_good = int(np.flatnonzero(images == bad)[0]) // len(order.positions(0))
    batches = load_batches(order, DataSpec(num_workers=1), steps=range(order.num_steps))
    for _ in range(num_good):
        next(batches)
        time.sleep(0.1)
    with pytest.raises(ImageError, match=path.name):
        next(batches)


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_remote_images_of_the_next_two_batches_are_read_ahead(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, num_workers: int
) -> None:
    asked: Any = multiprocessing.SimpleQueue()
    monkeypatch.setattr(ChipDataset, "read_ahead", lambda _, indices: asked.put(list(indices)))
    order = order_epoch(dataset, 4)
    list(load_batches(order, DataSpec(num_workers=num_workers), steps=range(5)))
    calls: list[list[int]] = []
    while not asked.empty():
        calls.append(asked.get())
    assert Counter(itertools.chain(*calls)) == {index: min(index // 4, 2) + 1 for index in range(20)}
    for call in calls:  # a process asks for what it reads itself
        assert len({index % 4 % max(num_workers, 1) for index in call}) == 1


def test_memory_that_cannot_be_shared_is_an_error_with_advice(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    batches = load_batches(order_epoch(dataset, 4), DataSpec(num_workers=2), steps=range(2))
    with pytest.raises(
        LoaderError, match=r"MB of memory for .* \(No space left on device.*; enlarge /dev/shm"
    ):
        next(batches)
    assert multiprocessing.active_children() == []


def read_all(order: EpochOrder) -> list[Batch]:
    return list(load_batches(order, DataSpec(num_workers=0), steps=range(order.num_steps)))


def wait_until(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300  # a busy machine is no fault
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_the_death_of_a_worker_is_raised_where_a_batch_is_awaited(dataset: Dataset, num_workers: int) -> None:
    order = order_epoch(dataset, 4)
    with closing(
        load_batches(order, DataSpec(num_workers=num_workers), steps=range(order.num_steps))
    ) as batches:
        next(batches)
        worker = multiprocessing.active_children()[0]
        worker.kill()
        wait_until(lambda: not worker.is_alive())  # raises nothing
        with pytest.raises(LoaderError, match=r"was killed \(SIGKILL\), probably since the machine ran out"):
            next(batches)
    assert multiprocessing.active_children() == []


def test_the_death_of_a_worker_while_others_start_is_explained(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(iterator: Any, *args: Any, **options: Any) -> None:
        iterator._workers[0].kill()
        wait_until(lambda: not iterator._workers[0].is_alive())
        reset(iterator, *args, **options)

    reset = _MultiProcessingDataLoaderIter._reset
    monkeypatch.setattr(_MultiProcessingDataLoaderIter, "_reset", kill)
    order = order_epoch(dataset, 4)
    with pytest.raises(LoaderError, match=r"was killed \(SIGKILL\), probably since the machine ran out"):
        next(load_batches(order, DataSpec(num_workers=2), steps=range(2)))
    assert multiprocessing.active_children() == []


class Hanging:
    """A function of a starting worker that hangs, as a fork may, except for the last of some workers."""

    def __init__(self, num_hanging: int) -> None:
        self.num_started = multiprocessing.Value("i", 0)
        self.num_hanging = num_hanging

    def __call__(self, has_started: Any, shared: Any, number: int) -> None:
        with self.num_started.get_lock():
            self.num_started.value += 1
            is_hanging = self.num_started.value <= self.num_hanging
        if is_hanging:
            time.sleep(1000)
        has_started[number] = 1


@pytest.mark.parametrize("num_hanging", [1, 2, 3])
def test_workers_that_do_not_start_are_started_again(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, num_hanging: int
) -> None:
    monkeypatch.setattr("sniper.data.loader._start_worker", Hanging(num_hanging))
    monkeypatch.setattr("sniper.data.loader._SECONDS_TO_START", 2.0)
    order = order_epoch(dataset, 4)
    batches = load_batches(order, DataSpec(num_workers=1), steps=range(order.num_steps))
    if num_hanging == 3:
        with pytest.raises(LoaderError, match="did not start in 2 seconds, 3 times; read them in the"):
            next(batches)
    else:
        for batch, expected in zip(batches, read_all(order), strict=True):
            assert_equal_batches(batch, expected)
    assert multiprocessing.active_children() == []


def test_a_signal_while_workers_start_is_handled_after_it(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[int] = []
    handled: list[list[int]] = []

    def start(process: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)  # another thread receives it
        time.sleep(0.1)
        original(process)
        started.append(process.pid)

    original = multiprocessing.Process.start
    monkeypatch.setattr(multiprocessing.Process, "start", start)
    previous = signal.signal(signal.SIGTERM, lambda *_: handled.append([*started]))
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    try:
        order = order_epoch(dataset, 4)
        with closing(load_batches(order, DataSpec(num_workers=2), steps=range(2))) as batches:
            next(batches)
        assert handled
        assert all(len(pids) == 2 for pids in handled)
    finally:
        signal.signal(signal.SIGTERM, previous)
        stop.set()
        thread.join()


class SlowTransform:
    """A transform that takes long from the fifth chip on, as to read a huge image does."""

    num_chips = 0

    def __call__(self, image: Any, target: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        self.num_chips += 1
        if self.num_chips > 4:
            time.sleep(1000)
        return image, target


def test_the_death_of_a_worker_is_raised_while_a_batch_is_awaited(dataset: Dataset) -> None:
    order = order_epoch(dataset, 4)
    with closing(
        load_batches(order, DataSpec(num_workers=1), steps=range(order.num_steps), transform=SlowTransform())
    ) as batches:
        next(batches)
        (worker,) = multiprocessing.active_children()
        threading.Timer(0.2, worker.kill).start()
        with pytest.raises(LoaderError, match="was killed"):
            next(batches)


def test_workers_that_are_still_reading_end_with_the_iterator(dataset: Dataset) -> None:
    order = order_epoch(dataset, 4)
    batches = load_batches(
        order, DataSpec(num_workers=1), steps=range(order.num_steps), transform=SlowTransform()
    )
    next(batches)
    before = signal.getsignal(signal.SIGCHLD)
    batches.close()
    assert multiprocessing.active_children() == []
    assert signal.getsignal(signal.SIGCHLD) != before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_workers_ignore_signals_of_others(dataset: Dataset, number: signal.Signals) -> None:
    order = order_epoch(dataset, 4)
    batches = load_batches(order, DataSpec(num_workers=1), steps=range(order.num_steps))
    first = next(batches)
    (worker,) = multiprocessing.active_children()
    subprocess.run(["kill", f"-{number.name.removeprefix('SIG')}", str(worker.pid)], check=True)
    for batch, expected in zip([first, *batches], read_all(order), strict=True):
        assert_equal_batches(batch, expected)


UNCLOSED = """
import sys
from pathlib import Path
from sniper.data.datasets import load_dataset
from sniper.data.loader import load_batches
from sniper.data.spec import DataSpec
from sniper.errors import LoaderError
from tests.data.test_loader import order_epoch

order = order_epoch(load_dataset(Path(sys.argv[1])), 4)
batches = load_batches(order, DataSpec(num_workers=2), steps=range(order.num_steps))
next(batches)
print("read")
"""


@pytest.mark.processes
def test_a_process_ends_that_has_not_closed_its_iterator(dataset: Dataset) -> None:
    done = subprocess.run(
        [sys.executable, "-c", UNCLOSED, dataset.path],
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("read\n", "")


def test_memory_that_a_worker_lacks_is_an_error_with_advice(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> ImageReader:
        np.empty(2**50)
        raise AssertionError

    monkeypatch.setattr("sniper.data.reader.open_image", fail)
    order = order_epoch(dataset, 4)
    with pytest.raises(LoaderError, match=r"ran out of memory; use fewer of them \(data\.num_workers: 1"):
        next(load_batches(order, DataSpec(num_workers=2), steps=range(2)))
