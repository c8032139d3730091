"""The cache of chips: its entries, several processes at a time, and its size limit."""

import multiprocessing
import os
import sqlite3
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sniper.chips import Chip, LevelSpec
from sniper.data.images.cache import ChipCache
from sniper.data.reader import ChipReader
from sniper.data.spec import CacheSpec, ReadSpec
from sniper.errors import CacheError, ImageError

LEVEL = LevelSpec(factor=2.0).at(width=200, height=160)


def chip_at(x: int, y: int = 0) -> Chip:
    return Chip(level=LEVEL, x=x, y=y, width=96, height=96)


def write_image(path: Path, seed: int = 0) -> Path:
    coarse = np.random.default_rng(seed).integers(0, 256, (16, 20, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((200, 160), Image.Resampling.BICUBIC).save(path)
    return path


def lossless(folder: Path) -> CacheSpec:
    return CacheSpec(folder=str(folder / "cache"), format="png")


def test_a_chip_from_a_lossless_cache_is_unchanged(tmp_path: Path) -> None:
    path = write_image(tmp_path / "image.png")
    cut = [ChipReader().read(path, chip_at(x)) for x in (0, 37, 304)]
    for _ in range(2):  # first a miss, then a hit
        reader = ChipReader(cache=lossless(tmp_path))
        for x, expected in zip((0, 37, 304), cut, strict=True):
            np.testing.assert_array_equal(reader.read(path, chip_at(x)), expected)


def test_a_chip_from_a_jpeg_cache_is_nearly_unchanged(tmp_path: Path) -> None:
    path = write_image(tmp_path / "image.png")
    cut = ChipReader().read(path, chip_at(50)).astype(np.int64)
    spec = CacheSpec(folder=str(tmp_path / "cache"))
    ChipReader(cache=spec).read(path, chip_at(50))
    difference = np.abs(ChipReader(cache=spec).read(path, chip_at(50)) - cut)
    assert difference.mean() < 2
    assert difference.max() <= 24


def test_a_cached_chip_is_read_without_decoding_the_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_image(tmp_path / "image.png")
    expected = ChipReader(cache=lossless(tmp_path)).read(path, chip_at(10))

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("sniper.data.reader.open_image", refuse)
    np.testing.assert_array_equal(ChipReader(cache=lossless(tmp_path)).read(path, chip_at(10)), expected)


def test_keys_differ_by_file_version_window_level_and_settings(tmp_path: Path) -> None:
    path = write_image(tmp_path / "image.png")
    cache = ChipCache(lossless(tmp_path), ReadSpec())
    ignoring_exif = ChipCache(lossless(tmp_path), ReadSpec(exif_orientation="ignore"))
    as_jpeg = ChipCache(CacheSpec(folder=str(tmp_path / "cache")), ReadSpec())
    other_level = LevelSpec(factor=3.0).at(width=200, height=160)
    stamp = cache.stamp(path)
    keys = [cache.key(stamp, chip) for chip in (chip_at(10), chip_at(11), chip_at(10, y=5))]
    keys.append(cache.key(stamp, Chip(level=other_level, x=10, y=0, width=96, height=96)))
    keys += [other.key(stamp, chip_at(10)) for other in (ignoring_exif, as_jpeg)]
    write_image(path, seed=1)
    os.utime(path, ns=(0, 0))
    keys.append(cache.key(cache.stamp(path), chip_at(10)))
    assert len(set(keys)) == len(keys)
    assert cache.key(cache.stamp(path), chip_at(10)) == keys[-1]


def test_a_changed_image_is_cut_again(tmp_path: Path) -> None:
    path = write_image(tmp_path / "image.png")
    ChipReader(cache=lossless(tmp_path)).read(path, chip_at(10))
    write_image(path, seed=1)
    os.utime(path, ns=(1, 1))
    pixels = ChipReader(cache=lossless(tmp_path)).read(path, chip_at(10))
    np.testing.assert_array_equal(pixels, ChipReader().read(path, chip_at(10)))


def fill(folder: Path, path: Path, start: int) -> None:
    reader = ChipReader(cache=lossless(folder))
    for x in range(start, start + 60):
        reader.read(path, chip_at(x))


def test_processes_can_fill_a_cache_at_the_same_time(tmp_path: Path) -> None:
    path = write_image(tmp_path / "image.png")
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=fill, args=(tmp_path, path, start)) for start in (0, 30, 60, 90)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0, 0]
    cache = ChipCache(lossless(tmp_path), ReadSpec())
    for x in range(150):
        assert cache.get(cache.key(cache.stamp(path), chip_at(x))) is not None


def test_a_reader_can_be_used_before_and_after_a_fork(tmp_path: Path) -> None:
    path = write_image(tmp_path / "image.png")
    reader = ChipReader(cache=lossless(tmp_path))
    reader.read(path, chip_at(0))
    child = multiprocessing.get_context("fork").Process(target=reader.read, args=(path, chip_at(1)))
    child.start()
    child.join()
    assert child.exitcode == 0
    cache = ChipCache(lossless(tmp_path), ReadSpec())
    assert cache.get(cache.key(cache.stamp(path), chip_at(1))) is not None


def test_a_full_cache_warns_once_and_chips_are_cut_again(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (160, 200, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "image.png")
    spec = CacheSpec(folder=str(tmp_path / "cache"), format="png", gigabytes=0.01)
    level = LevelSpec(factor=1.0).at(width=200, height=160)
    reader, plain = ChipReader(cache=spec), ChipReader()
    chips = [Chip(level=level, x=x, y=0, width=160, height=160) for x in range(200)]
    with pytest.warns(UserWarning, match=r"chips\.sqlite: is full \(data\.cache\.gigabytes: 0\.01") as warned:
        read = [reader.read(tmp_path / "image.png", chip) for chip in chips]
    assert len(warned) == 1
    for index in (0, 100, 199):
        np.testing.assert_array_equal(read[index], plain.read(tmp_path / "image.png", chips[index]))
    assert 5e6 < (tmp_path / "cache" / "chips.sqlite").stat().st_size <= 1.01e7


def test_a_damaged_entry_is_cut_again(tmp_path: Path) -> None:
    path = write_image(tmp_path / "image.png")
    expected = ChipReader(cache=lossless(tmp_path)).read(path, chip_at(10))
    with sqlite3.connect(tmp_path / "cache" / "chips.sqlite") as file:
        file.execute("UPDATE chips SET pixels = substr(pixels, 1, 2000)")
    np.testing.assert_array_equal(ChipReader(cache=lossless(tmp_path)).read(path, chip_at(10)), expected)
    cache = ChipCache(lossless(tmp_path), ReadSpec())
    assert cache.get(cache.key(cache.stamp(path), chip_at(10))) is not None


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE chips SET pixels = (SELECT pixels FROM chips LIMIT 1), checksum = (SELECT checksum FROM chips LIMIT 1)",
        "UPDATE chips SET pixels = 'text'",
        "UPDATE chips SET pixels = NULL, checksum = NULL",
        "UPDATE chips SET pixels = 7, checksum = 'x'",
    ],
)
def test_an_entry_with_the_pixels_of_another_one_is_cut_again(tmp_path: Path, statement: str) -> None:
    path = write_image(tmp_path / "image.png")
    expected = [ChipReader().read(path, chip_at(x)) for x in (0, 37)]
    reader = ChipReader(cache=lossless(tmp_path))
    for x in (0, 37):
        reader.read(path, chip_at(x))
    with sqlite3.connect(tmp_path / "cache" / "chips.sqlite") as file:
        file.execute(statement)
    for x, pixels in zip((0, 37), expected, strict=True):
        np.testing.assert_array_equal(ChipReader(cache=lossless(tmp_path)).read(path, chip_at(x)), pixels)


def test_a_folder_that_is_not_a_cache_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "chips.sqlite").write_text(
        "not a database, but long enough to be taken for one" * 20
    )
    with pytest.raises(CacheError, match=r"chips\.sqlite: cannot be used as a chip cache"):
        ChipReader(cache=lossless(tmp_path))
    (tmp_path / "file").touch()
    with pytest.raises(CacheError, match=r"file: cannot be used as the folder"):
        ChipReader(cache=CacheSpec(folder=str(tmp_path / "file")))


def test_an_absent_image_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"none\.png: cannot be read as an image"):
        ChipReader(cache=lossless(tmp_path)).read(tmp_path / "none.png", chip_at(0))


def test_a_chip_does_not_depend_on_earlier_entries(tmp_path: Path) -> None:
    path = write_image(tmp_path / "image.png")
    spec = CacheSpec(folder=str(tmp_path / "cache"), quality=50)
    cold = ChipReader(cache=spec).read(path, chip_at(20))
    warm = ChipReader(cache=spec).read(path, chip_at(20))
    np.testing.assert_array_equal(cold, warm)
    assert (cold != ChipReader().read(path, chip_at(20))).any()


def test_an_image_that_changes_after_decoding_is_decoded_again(tmp_path: Path) -> None:
    path = write_image(tmp_path / "image.png")
    reader = ChipReader(cache=lossless(tmp_path), kept_images=4)
    reader.read(path, chip_at(0))
    write_image(path, seed=1)
    os.utime(path, ns=(1, 1))
    expected = ChipReader().read(path, chip_at(1))
    np.testing.assert_array_equal(reader.read(path, chip_at(1)), expected)
    np.testing.assert_array_equal(ChipReader(cache=lossless(tmp_path)).read(path, chip_at(1)), expected)


def create(folder: Path) -> None:
    for number in range(5):
        ChipCache(CacheSpec(folder=str(folder / f"cache{number}")), ReadSpec()).close()


def test_processes_can_create_a_cache_at_the_same_time(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=create, args=(tmp_path,)) for _ in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 6


def test_a_database_of_other_columns_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "full"
    folder.mkdir()
    with sqlite3.connect(folder / "chips.sqlite") as file:
        file.execute("CREATE TABLE chips (key BLOB, pixels BLOB)")
    with pytest.raises(CacheError, match="no such column"):
        ChipReader(cache=CacheSpec(folder=str(folder))).read(write_image(tmp_path / "a.png"), chip_at(0))
