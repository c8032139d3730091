"""Chips kept on disk come back as they were, whoever kept them, and never grow beyond their bound."""

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
    return CacheSpec(folder=str(folder / "kept"), format="png")


def test_a_chip_out_of_the_cache_is_the_chip_that_was_cut(tmp_path: Path) -> None:
    path = write_image(tmp_path / "image.png")
    cut = [ChipReader().read(path, chip_at(x)) for x in (0, 37, 304)]
    for _ in range(2):  # kept, and found
        reader = ChipReader(cache=lossless(tmp_path))
        for x, wanted in zip((0, 37, 304), cut, strict=True):
            np.testing.assert_array_equal(reader.read(path, chip_at(x)), wanted)


def test_a_jpeg_in_the_cache_is_nearly_the_chip(tmp_path: Path) -> None:
    path = write_image(tmp_path / "image.png")
    cut = ChipReader().read(path, chip_at(50)).astype(np.int64)
    spec = CacheSpec(folder=str(tmp_path / "kept"))
    ChipReader(cache=spec).read(path, chip_at(50))
    difference = np.abs(ChipReader(cache=spec).read(path, chip_at(50)) - cut)
    assert difference.mean() < 2
    assert difference.max() <= 24


def test_what_is_kept_is_read_without_decoding_the_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_image(tmp_path / "image.png")
    wanted = ChipReader(cache=lossless(tmp_path)).read(path, chip_at(10))

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("sniper.data.reader.open_image", refuse)
    np.testing.assert_array_equal(ChipReader(cache=lossless(tmp_path)).read(path, chip_at(10)), wanted)


def test_a_changed_image_window_level_or_way_of_reading_is_cut_anew(tmp_path: Path) -> None:
    path = write_image(tmp_path / "image.png")
    cache = ChipCache(lossless(tmp_path), ReadSpec())
    stored = ChipCache(lossless(tmp_path), ReadSpec(exif_orientation="ignore"))
    as_jpeg = ChipCache(CacheSpec(folder=str(tmp_path / "kept")), ReadSpec())
    other_level = LevelSpec(factor=3.0).at(width=200, height=160)
    stamp = cache.stamp(path)
    keys = [cache.key(stamp, chip) for chip in (chip_at(10), chip_at(11), chip_at(10, y=5))]
    keys.append(cache.key(stamp, Chip(level=other_level, x=10, y=0, width=96, height=96)))
    keys += [other.key(stamp, chip_at(10)) for other in (stored, as_jpeg)]
    write_image(path, seed=1)
    os.utime(path, ns=(0, 0))
    keys.append(cache.key(cache.stamp(path), chip_at(10)))
    assert len(set(keys)) == len(keys)
    assert cache.key(cache.stamp(path), chip_at(10)) == keys[-1]


def test_a_changed_image_is_seen(tmp_path: Path) -> None:
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


def test_processes_that_fill_a_cache_at_once_lose_nothing(tmp_path: Path) -> None:
    path = write_image(tmp_path / "image.png")
    context = multiprocessing.get_context("fork")
    fillers = [context.Process(target=fill, args=(tmp_path, path, start)) for start in (0, 30, 60, 90)]
    for one in fillers:
        one.start()
    for one in fillers:
        one.join()
    assert [one.exitcode for one in fillers] == [0, 0, 0, 0]
    cache = ChipCache(lossless(tmp_path), ReadSpec())
    for x in range(150):
        assert cache.get(cache.key(cache.stamp(path), chip_at(x))) is not None


def test_a_reader_that_was_used_before_a_fork_is_of_use_after_it(tmp_path: Path) -> None:
    path = write_image(tmp_path / "image.png")
    reader = ChipReader(cache=lossless(tmp_path))
    reader.read(path, chip_at(0))
    child = multiprocessing.get_context("fork").Process(target=reader.read, args=(path, chip_at(1)))
    child.start()
    child.join()
    assert child.exitcode == 0
    cache = ChipCache(lossless(tmp_path), ReadSpec())
    assert cache.get(cache.key(cache.stamp(path), chip_at(1))) is not None


def test_a_full_cache_says_so_once_and_chips_are_cut_anew(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (160, 200, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "image.png")
    spec = CacheSpec(folder=str(tmp_path / "kept"), format="png", gigabytes=0.01)
    level = LevelSpec(factor=1.0).at(width=200, height=160)
    reader, plain = ChipReader(cache=spec), ChipReader()
    chips = [Chip(level=level, x=x, y=0, width=160, height=160) for x in range(200)]
    with pytest.warns(UserWarning, match=r"chips\.sqlite: is full \(data\.cache\.gigabytes: 0\.01") as told:
        read = [reader.read(tmp_path / "image.png", chip) for chip in chips]
    assert len(told) == 1
    for place in (0, 100, 199):
        np.testing.assert_array_equal(read[place], plain.read(tmp_path / "image.png", chips[place]))
    assert 5e6 < (tmp_path / "kept" / "chips.sqlite").stat().st_size <= 1.01e7


def test_kept_pixels_that_were_damaged_are_cut_anew(tmp_path: Path) -> None:
    path = write_image(tmp_path / "image.png")
    wanted = ChipReader(cache=lossless(tmp_path)).read(path, chip_at(10))
    with sqlite3.connect(tmp_path / "kept" / "chips.sqlite") as file:
        file.execute("UPDATE chips SET pixels = substr(pixels, 1, 2000)")
    np.testing.assert_array_equal(ChipReader(cache=lossless(tmp_path)).read(path, chip_at(10)), wanted)
    cache = ChipCache(lossless(tmp_path), ReadSpec())
    assert cache.get(cache.key(cache.stamp(path), chip_at(10))) is not None


def test_a_folder_that_holds_something_else_is_named(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "chips.sqlite").write_text(
        "not a database, but long enough to be taken for one" * 20
    )
    with pytest.raises(CacheError, match=r"chips\.sqlite: cannot be used as a chip cache"):
        ChipReader(cache=lossless(tmp_path))
    (tmp_path / "file").touch()
    with pytest.raises(CacheError, match=r"file: cannot be used as the folder"):
        ChipReader(cache=CacheSpec(folder=str(tmp_path / "file")))


def test_an_image_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"none\.png: cannot be read as an image"):
        ChipReader(cache=lossless(tmp_path)).read(tmp_path / "none.png", chip_at(0))


def test_what_is_learnt_does_not_depend_on_what_was_kept_before(tmp_path: Path) -> None:
    path = write_image(tmp_path / "image.png")
    spec = CacheSpec(folder=str(tmp_path / "kept"), quality=50)
    cold = ChipReader(cache=spec).read(path, chip_at(20))
    warm = ChipReader(cache=spec).read(path, chip_at(20))
    np.testing.assert_array_equal(cold, warm)
    assert (cold != ChipReader().read(path, chip_at(20))).any()


def test_an_image_that_changes_while_it_is_decoded_is_not_kept_under_its_new_name(tmp_path: Path) -> None:
    path = write_image(tmp_path / "image.png")
    reader = ChipReader(cache=lossless(tmp_path), kept_images=4)
    reader.read(path, chip_at(0))
    write_image(path, seed=1)
    os.utime(path, ns=(1, 1))
    wanted = ChipReader().read(path, chip_at(1))
    np.testing.assert_array_equal(reader.read(path, chip_at(1)), wanted)
    np.testing.assert_array_equal(ChipReader(cache=lossless(tmp_path)).read(path, chip_at(1)), wanted)


def make(folder: Path) -> None:
    for number in range(5):
        ChipCache(CacheSpec(folder=str(folder / f"kept{number}")), ReadSpec()).close()


def test_processes_that_make_a_cache_at_once_do_not_meet(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    makers = [context.Process(target=make, args=(tmp_path,)) for _ in range(6)]
    for one in makers:
        one.start()
    for one in makers:
        one.join()
    assert [one.exitcode for one in makers] == [0] * 6


def test_a_table_of_another_kind_is_not_taken_for_a_full_one(tmp_path: Path) -> None:
    folder = tmp_path / "full"
    folder.mkdir()
    with sqlite3.connect(folder / "chips.sqlite") as file:
        file.execute("CREATE TABLE chips (key BLOB, pixels BLOB)")
    with pytest.raises(CacheError, match="no such column"):
        ChipReader(cache=CacheSpec(folder=str(folder))).read(write_image(tmp_path / "a.png"), chip_at(0))
