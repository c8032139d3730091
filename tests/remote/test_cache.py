"""The cache of remote files stays within its bound, whatever happens to the processes that share it."""

import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from sniper.remote.cache import FileCache


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*/*"))


def test_a_file_is_found_under_its_key(tmp_path: Path) -> None:
    cache = FileCache(tmp_path, limit=100)
    key = cache.key("https://host/a.jpg", "")
    assert cache.find(key) is None
    path = cache.add(key, b"content")
    assert path is not None
    assert path.read_bytes() == b"content"
    assert FileCache(tmp_path, limit=100).find(key) == path


def test_keys_differ_where_their_parts_do() -> None:
    assert len({FileCache.key(*parts) for parts in (("a", "b"), ("ab", ""), ("a", "b", ""), ("ab",))}) == 4


def test_no_file_is_stored_beyond_the_bound(tmp_path: Path) -> None:
    cache = FileCache(tmp_path, limit=1000)
    stored = [cache.add(cache.key(str(number)), bytes(300)) for number in range(5)]
    assert [path is not None for path in stored] == [True, True, True, False, False]
    assert size_of(tmp_path) == 900
    assert cache.find(cache.key("0")) is not None  # the first ones stay


def test_files_that_are_not_used_for_a_day_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = FileCache(tmp_path, limit=1000)
    paths = [cache.add(cache.key(str(number)), bytes(300)) for number in range(3)]
    days_ago = time.time() - 200_000
    for path in paths[:2]:
        assert path is not None
        os.utime(path, (days_ago, days_ago))
    assert cache.find(cache.key("0")) is not None  # is a use
    assert cache.add(cache.key("new"), bytes(300)) is not None
    assert [cache.find(cache.key(name)) is not None for name in ("0", "1", "2", "new")] == [
        True,
        False,
        True,
        True,
    ]
    assert size_of(tmp_path) == 900


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    cache = FileCache(tmp_path, limit=1000)

    def write() -> None:
        with cache.adding("ab12", 600) as file:
            assert file is not None
            file.write(b"part")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert cache.find("ab12") is None
    assert size_of(tmp_path) == 0
    assert cache.add("ab13", bytes(1000)) is not None


def test_the_same_file_stored_twice_counts_once(tmp_path: Path) -> None:
    caches = [FileCache(tmp_path, limit=1000) for _ in range(2)]
    with caches[0].adding("ab12", 400) as file:
        assert file is not None
        file.write(bytes(400))
        assert caches[1].add("ab12", bytes(400)) is not None
    assert caches[0].add("ab13", bytes(600)) is not None


def test_the_bound_is_half_of_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    cache = FileCache(tmp_path)
    assert cache.limit == 500
    cache.add("ab12", bytes(400))
    usage = usage._replace(free=600)  # as the disk then has
    assert FileCache(tmp_path).limit == 500


def fill(folder: Path, seed: int) -> None:
    rng = random.Random(seed)
    cache = FileCache(folder, limit=200_000)
    while True:
        content = rng.randbytes(rng.randint(1, 5_000))
        cache._full_until = 0.0
        path = cache.add(cache.key(f"{rng.random()}"), content)
        if path is not None and rng.random() < 0.5:
            os.utime(path, (0, 0))


@pytest.mark.processes
def test_processes_that_are_killed_never_exceed_the_bound(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    rng = random.Random(0)
    FileCache(tmp_path, limit=200_000)
    workers = [context.Process(target=fill, args=(tmp_path, number)) for number in range(3)]
    for worker in workers:
        worker.start()
    largest = 0
    for number in range(40):
        time.sleep(0.02)
        sizes = []
        for path in tmp_path.glob("*/*"):
            try:
                sizes.append(path.stat().st_size)
            except FileNotFoundError:
                continue
        largest = max(largest, sum(sizes))
        victim = rng.randrange(3)
        pid = workers[victim].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        workers[victim].join()
        workers[victim] = context.Process(target=fill, args=(tmp_path, 100 + number))
        workers[victim].start()
    for worker in workers:
        worker.kill()
        worker.join()
    assert (
        100_000 < largest <= 200_000 + 5_000
    )  # files that are replaced while sizes are added may count twice
    complete = [path for path in tmp_path.glob("*/*") if not path.name.startswith(".")]
    assert complete
