"""Batches read ahead by worker processes, each of which decodes images of its own.

The order of an epoch interleaves streams of chips (`EpochOrder.num_streams`). Every batch is read in parts, one by each
worker, and all chips of a stream by the same worker, so that an image is decoded once. The parts are joined here in the
order of the epoch: batches do not depend on the number of workers. Pixels travel in shared memory.

Workers live as long as the iterator. They ignore SIGINT, SIGTERM and SIGHUP, which reach them too if they are sent to
all processes of a command, and end by themselves when the training process is gone.
"""

import itertools
import math
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from ctypes import Array, c_byte
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.heap import Arena
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils import signal_handling

from sniper import remote
from sniper.data.batches import Batch, ChipDataset, ChipSample, ChipTransform, collate, copy_pixels
from sniper.data.epoch import EpochOrder
from sniper.data.spec import DataSpec
from sniper.errors import LoaderError, SniperError, describe_os_error

_CPU = torch.device("cpu")
_NO_PIXELS = np.zeros((0, 0, 3), dtype=np.uint8)
_NUM_AHEAD = 2  # batches after the one being read whose remote images are read ahead
_PREFETCH_FACTOR = 2  # batches, or parts of them, that a worker reads ahead
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SECONDS_TO_START, _NUM_STARTS = 60.0, 3
_SECONDS_TO_END = 1.0  # after which a worker that is still reading is killed
_WORKER_ERROR = re.compile(r"Caught (\w+) in DataLoader worker process")  # the start of torch's message


def load_batches(
    order: EpochOrder,
    spec: DataSpec,
    *,
    steps: range,
    share: tuple[int, int] = (0, 1),
    device: torch.device = _CPU,
    transform: ChipTransform | None = None,
) -> Generator[Batch, None, None]:
    """Iterate over this training process's share of each batch.

    An iterator that is not exhausted should be closed (`contextlib.closing`), which ends the workers.

    Args:
        order: the chips of the epoch.
        spec: how chips are read; without `num_workers` by one process.
        steps: which batches.
        share: (rank, world size) of this training process; the batch size must be divisible by the world size.
        device: a GPU that the batches are copied to while the training computes; they stay in memory for others.
        transform: see `ChipDataset`.

    Raises:
        ImageError: if an image cannot be read and `spec.on_bad_image` is `refuse`.
        CacheError: if the chip cache cannot be used.
        LoaderError: if a worker was killed, or ran out of memory.
        TransformError: if the transform fails, or returns something other than a chip.
    """
    rank, world_size = share
    # Streams that every training process reads from cannot be divided among workers.
    num_streams = order.num_streams // world_size if order.num_streams % world_size == 0 else 1
    num_workers = 1 if spec.num_workers is None else spec.num_workers
    num_parts = max(min(num_workers, num_streams), 1)
    batches = [order.positions(step)[rank::world_size] for step in steps]
    chips = ChipDataset(order, spec=spec, transform=transform, kept_images=math.ceil(num_streams / num_parts))
    copier = _Copier(device)
    if num_workers == 0:
        for number, indices in enumerate(batches):
            chips.read_ahead(itertools.chain(*batches[number : number + 1 + _NUM_AHEAD]))
            yield copier.receive(copier.send(collate([chips[index] for index in indices])))
        return
    num_workers = num_workers if num_parts == 1 else num_parts
    rows = [
        {
            row: index
            for row, index in enumerate(indices)
            if index % order.num_streams // world_size % num_parts == part
        }
        for indices in batches
        for part in range(num_parts)
    ]
    parts = [
        _Part(
            number=k // num_parts,
            part=k % num_parts,
            rows=of_part,
            ahead=tuple(
                index
                for later in rows[k + num_parts : k + 1 + _NUM_AHEAD * num_parts : num_parts]
                for index in later.values()
            ),
        )
        for k, of_part in enumerate(rows)
    ]
    # A slot for each batch that is being read, for one that is copied, and for the next, which is complete.
    num_slots = min(_PREFETCH_FACTOR * num_workers // num_parts + 2, len(batches))
    slots = _Slots([_shape_of(order, indices) for indices in batches], num_slots, num_parts=num_parts)
    has_started = multiprocessing.RawArray("b", num_workers)
    loader = DataLoader(
        _PartDataset(chips, slots),
        batch_sampler=parts,  # type: ignore[arg-type]  # `_PartDataset` takes parts, not lists of indices
        num_workers=num_workers,
        prefetch_factor=_PREFETCH_FACTOR,
        collate_fn=_keep,
        worker_init_fn=partial(_start_worker, has_started, remote.share()),
    )
    with _Parts(loader, has_started).closed_at_end() as loaded, ThreadPoolExecutor(1) as executor:

        def copy(number: int) -> "Future[_Sent]":
            samples: dict[int, ChipSample] = {}
            for _ in range(num_parts):
                samples |= loaded.next()
            ordered = [samples[row] for row in range(len(samples))]
            return executor.submit(copier.copy, ordered, slots.pixels(number))

        following: Future[_Sent] | None = None
        for number in range(len(batches)):
            loaded.check()
            current = following or copy(number)
            following = None
            if number + 1 < len(batches) and slots.is_read(number + 1):
                try:
                    following = copy(number + 1)
                except Exception:  # raised after the batch before it
                    yield copier.receive(current.result())
                    raise
            yield copier.receive(current.result())


@dataclass(frozen=True, kw_only=True)
class _Part:
    """The part of a batch that one worker reads.

    Attributes:
        number: of the batch, 0 the first that is loaded.
        part: of the batch.
        rows: the position in the epoch of each of its chips, by its row in the batch. May be empty.
        ahead: the positions of chips that are read after them, whose remote images are read ahead.
    """

    number: int
    part: int
    rows: dict[int, int]
    ahead: tuple[int, ...]


class _Slots:
    """Memory shared with the workers, for the pixels of the batches that are read at a time.

    Workers write pixels to their place in a batch. As tensors, each part would take memory that is new to both
    processes, and would be copied once more where parts are joined.

    Args:
        shapes: (b, h, w, 3) of each batch.
        num_slots: batches that are in memory at a time.
        num_parts: of a batch.

    Raises:
        LoaderError: if there is not enough memory.
    """

    def __init__(
        self, shapes: Sequence[tuple[int, int, int, int]], num_slots: int, *, num_parts: int
    ) -> None:
        self._shapes = shapes
        num_bytes = max(map(math.prod, shapes), default=0)
        self._memory = [_share_memory(num_bytes) for _ in range(num_slots)]
        self._read = [multiprocessing.RawArray("q", num_parts) for _ in range(num_slots)]

    def pixels(self, number: int) -> UInt8[np.ndarray, "b h w 3"]:
        """Return the pixels of a batch."""
        shape = self._shapes[number]
        memory = np.frombuffer(self._memory[number % len(self._memory)].buffer, dtype=np.uint8)
        return memory[: math.prod(shape)].reshape(shape)

    def mark_read(self, part: _Part) -> None:
        """Note that a part is read."""
        self._read[part.number % len(self._read)][part.part] = part.number + 1

    def is_read(self, number: int) -> bool:
        """Check whether all parts of a batch are read; they can then be received at once."""
        return all(read == number + 1 for read in self._read[number % len(self._read)])


def _share_memory(num_bytes: int) -> Arena:
    """Reserve memory that workers share: in /dev/shm, or in the temporary folder if there is not enough.

    Raises:
        LoaderError: if there is not enough in either.
    """
    try:
        arena = Arena(num_bytes)
        # Without this, which macOS lacks, writing to memory that is full ends the process.
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(arena.fd, 0, num_bytes)
    except OSError as error:
        raise LoaderError(
            f"{num_bytes / 1e6:,.0f} MB of memory for the processes that read images cannot be reserved "
            f"({describe_os_error(error)}); enlarge /dev/shm (docker run --shm-size 2g), use fewer of them "
            "(data.num_workers), or read in the training process (data.num_workers: 0)"
        ) from error
    return arena


def _shape_of(order: EpochOrder, indices: range) -> tuple[int, int, int, int]:
    """Return the shape of a batch of chips, which are all of one size."""
    first = order.chip_indices[indices.start]
    return len(indices), int(order.table.heights[first]), int(order.table.widths[first]), 3


class _PartDataset(Dataset[dict[int, ChipSample]]):
    """Reads parts of batches in a worker.

    Args:
        chips: of the epoch.
        slots: that their pixels are written to.
    """

    def __init__(self, chips: ChipDataset, slots: _Slots) -> None:
        self._chips, self._slots = chips, slots

    def __getitems__(self, part: _Part) -> dict[int, ChipSample]:
        """Read a part, and return its chips by row, without pixels; called by torch."""
        self._chips.read_ahead((*part.rows.values(), *part.ahead))
        pixels = self._slots.pixels(part.number)
        samples = {}
        for row, index in part.rows.items():
            sample = self._chips[index]
            copy_pixels(sample, to=pixels[row])
            samples[row] = replace(sample, pixels=_NO_PIXELS)
        self._slots.mark_read(part)
        return samples


def _keep(samples: Any) -> Any:
    return samples


_Sent = tuple[Batch, "torch.cuda.Event | None"]
"""A batch, and what has to happen before it is used: the end of its copy to a GPU."""


class _Copier:
    """Copies batches out of shared memory and on to a GPU, in a stream and a thread beside those of the training.

    Args:
        device: of the training.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def copy(self, samples: Sequence[ChipSample], pixels: UInt8[np.ndarray, "b h w 3"]) -> _Sent:
        """Copy a batch out of shared memory, and begin to copy it to the device."""
        with self._in_stream():
            images = torch.empty(pixels.shape, dtype=torch.uint8, pin_memory=self._stream is not None)
            np.copyto(images.numpy(), pixels)  # torch would start threads for it
            return self.send(Batch.of(samples, images.permute(0, 3, 1, 2)))

    def send(self, batch: Batch) -> _Sent:
        """Begin to copy a batch to the device, if that is a GPU."""
        if self._stream is None:
            return batch, None
        with self._in_stream():
            return batch.pin_memory().to(self._device), self._stream.record_event()

    def receive(self, sent: _Sent) -> Batch:
        """Make the current stream wait for a batch, and return it."""
        batch, event = sent
        if event is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(event)
            batch.map(partial(_record_use, stream=stream))
        return batch

    def _in_stream(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


def _record_use(tensor: torch.Tensor, *, stream: torch.cuda.Stream) -> torch.Tensor:
    """Note that a stream uses a tensor, so that its memory is not used again before that."""
    tensor.record_stream(stream)
    return tensor


class _Parts:
    """Iterates over a torch loader, and ends its workers.

    torch raises the death of a worker wherever the main thread happens to be, which may be in the middle of an
    optimizer update. Here it is raised where a part is awaited.
    """

    def __init__(self, loader: "DataLoader[Any]", has_started: "Array[c_byte]") -> None:
        self._parts: Iterator[Any] | None = None
        self._workers: list[Any] = []
        self._num_workers = loader.num_workers
        self._is_awaited = self._has_failed = False
        for _ in range(_NUM_STARTS):
            if self._start(loader, has_started):
                return
            self._end_failed(self._parts)
        raise LoaderError(
            f"a process that reads images did not start in {_SECONDS_TO_START:g} seconds, {_NUM_STARTS} times; "
            f"{_advise(self._num_workers)}"
        )

    def _start(self, loader: "DataLoader[Any]", has_started: "Array[c_byte]") -> bool:
        """Start the workers, and return whether they have started.

        Raises:
            LoaderError: if one was killed meanwhile.
            KeyboardInterrupt: at a signal; the workers are ended.
        """
        others = multiprocessing.active_children()
        has_started[:] = [0] * len(has_started)
        signal_handling._set_SIGCHLD_handler()  # now, since torch would install it while workers start
        try:
            with _handling_children(_ignore), _deferred_signals():  # workers inherit that they are blocked
                parts = self._parts = iter(loader)
            self._workers = list(getattr(parts, "_workers", ()))
            return self._have_started(has_started)
        except KeyboardInterrupt:
            self._close()
            raise
        except Exception as error:
            self._workers = [each for each in multiprocessing.active_children() if each not in others]
            try:
                self._explain(error)
            finally:
                self._end_failed(error)
            raise

    def _have_started(self, has_started: "Array[c_byte]") -> bool:
        """Wait until all workers have started, or one has ended.

        A fork may deadlock in the worker: Python before 3.12 does not reset a lock that a thread of a library may hold
        while it is made known to Python.
        """
        deadline = time.monotonic() + _SECONDS_TO_START
        with _handling_children(_ignore):
            while not all(has_started) and all(worker.is_alive() for worker in self._workers):
                if time.monotonic() > deadline:
                    return False
                time.sleep(0.001)
        return True

    @contextmanager
    def closed_at_end(self) -> Iterator["_Parts"]:
        """Raise the death of a worker for the duration of a block, and end the workers after it."""
        with _handling_children(self._on_child) if self._workers else nullcontext():
            # Without it, a worker that is killed while it sends a part would be awaited for ever.
            try:
                yield self
            finally:
                self._close()

    def check(self) -> None:
        """Check that no worker was killed.

        Raises:
            LoaderError: if one was.
        """
        self._has_failed = True
        self._check_workers()
        self._has_failed = False

    def next(self) -> dict[int, ChipSample]:
        """Return the chips of the next part by row, without pixels.

        Raises:
            SniperError: what a worker raised; its traceback is in the cause.
            LoaderError: if a worker was killed, or ran out of memory.
        """
        assert self._parts is not None
        self._has_failed, self._is_awaited = True, True
        try:
            self._check_workers()
            part: dict[int, ChipSample] = next(self._parts)
        except LoaderError:
            raise
        except Exception as error:
            self._explain(error)
            raise
        finally:
            self._is_awaited = False
        self._has_failed = False
        return part

    def _explain(self, error: Exception) -> None:
        """Raise the error of a user, or that a worker has ended, instead of an error of torch."""
        _raise_without_traceback(error, num_workers=self._num_workers)
        # A part of a worker that is just ending cannot be received, with one error or another.
        if self._workers:
            self._wait_for_death()

    def _wait_for_death(self) -> None:
        """Check whether a worker is just ending."""
        ended = wait([worker.sentinel for worker in self._workers], _SECONDS_TO_END)
        for worker in self._workers:
            if worker.sentinel in ended:
                worker.join(_SECONDS_TO_END)
        self._check_workers()

    def _on_child(self, *_: object) -> None:
        if self._is_awaited:
            self._check_workers()

    def _check_workers(self) -> None:
        codes = [worker.exitcode for worker in self._workers]
        for code in codes:
            if code:
                raise LoaderError(_describe_end(code, num_workers=len(codes)))

    def _close(self) -> None:
        if not self._workers or sys.is_finalizing():  # multiprocessing has ended them
            return
        if self._has_failed:
            self._end_failed(self._parts)
            return
        timer = threading.Timer(_SECONDS_TO_END, self._kill)
        timer.daemon = True
        timer.start()
        self._parts = None  # torch ends the workers, and waits for them
        timer.cancel()

    def _end_failed(self, kept: object) -> None:
        """Kill all workers, and keep the iterator of torch that they belong to, or an error that refers to it."""
        with _handling_children(_ignore):
            self._kill()
            for worker in self._workers:
                worker.join(_SECONDS_TO_END)
        _FAILED.append(kept)

    def _kill(self) -> None:
        for worker in self._workers:
            worker.kill()


_FAILED: list[Any] = []
"""Iterators of torch whose workers were killed. To end them, torch would wait for locks that these may have held."""


def _start_worker(has_started: "Array[c_byte]", shared: remote.Shared, number: int) -> None:
    """Make a worker end with the training process, and when that asks for it; called in the worker."""
    remote.use_shared(shared)
    has_started[number] = 1
    sys.excepthook = _ignore_lost_connection
    threading.Thread(target=_watch_parent, args=(os.getppid(),), daemon=True).start()


def _ignore_lost_connection(kind: type[BaseException], error: BaseException, traceback: Any) -> None:
    """Print an error, except that the training process has ended while it was sent a part.

    A thread of multiprocessing calls this. What fails in the loader itself is sent to the training process.
    """
    if not issubclass(kind, EOFError | ConnectionError):
        sys.__excepthook__(kind, error, traceback)


def _watch_parent(parent: int) -> None:
    trainer = multiprocessing.parent_process()
    assert trainer is not None
    while os.getppid() == parent and trainer.is_alive():
        if not hasattr(signal, "sigtimedwait"):  # macOS
            time.sleep(1)
            continue
        # The signals are blocked. At its end, the training process sends SIGTERM to its workers and waits for them.
        received = signal.sigtimedwait({signal.SIGTERM}, 1)
        if received is not None and received.si_pid == trainer.pid:
            break
    os._exit(0)


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _ignore(*_: object) -> None:
    pass


@contextmanager
def _handling_children(handler: Callable[..., None]) -> Iterator[None]:
    """Handle the end of child processes for the duration of a block, instead of torch."""
    if not _is_main_thread():
        yield
        return
    previous = signal.signal(signal.SIGCHLD, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, previous or signal.SIG_DFL)


@contextmanager
def _deferred_signals() -> Iterator[None]:
    """Block signals in this thread and in the processes that it starts, and handle them after the block.

    Blocking alone would not do: another thread may receive a signal, and Python then calls its handler in this one.
    """
    received: list[int] = []
    handlers = {}
    if _is_main_thread():
        for number in _SIGNALS:
            if callable(signal.getsignal(number)):
                handlers[number] = signal.signal(number, lambda number, _: received.append(number))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for caught in received:
            signal.raise_signal(caught)


def _raise_without_traceback(error: Exception, *, num_workers: int) -> None:
    """Raise a user's error without the traceback of the worker that torch adds to its message."""
    if isinstance(error, SniperError):
        kind = type(error)
        message = str(error).rstrip().rpartition(f"{kind.__module__}.{kind.__qualname__}: ")[2]
        raise kind(message) from error
    match = _WORKER_ERROR.match(str(error))
    if match is not None and match[1].endswith("MemoryError"):
        raise LoaderError(f"a process that reads images ran out of memory; {_advise(num_workers)}") from error


def _describe_end(code: int, *, num_workers: int) -> str:
    """Describe why a worker has ended, and what to do."""
    if code > 0:
        return f"a process that reads images ended with exit code {code}"
    name = signal.Signals(-code).name
    if -code == signal.SIGKILL:
        return (
            f"a process that reads images was killed ({name}), probably since the machine ran out of memory; "
            f"{_advise(num_workers)}"
        )
    if -code == signal.SIGBUS:
        return (
            f"a process that reads images was killed ({name}), probably since shared memory is full; enlarge /dev/shm "
            f"(docker run --shm-size 2g), or {_advise(num_workers)}"
        )
    return f"a process that reads images was killed ({name})"


def _advise(num_workers: int) -> str:
    fewer = num_workers // 2
    return (
        f"use fewer of them (data.num_workers: {fewer} instead of {num_workers})"
        if num_workers > 1
        else ("read them in the training process (data.num_workers: 0)")
    )
