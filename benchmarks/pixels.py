"""How fast chips are read: one JSON line, with ratios to the plain way of the same run, on one thread.

    python benchmarks/pixels.py val2017/ --annotations person/train.json

The images are made of photographs laid side by side, 640×480 to 8000×6000, JPEG of quality 90; their boxes are of 8 to
400 px, as many as the root of the area asks for, and their chips those of the paper's three levels. The ways:

- `pillow`, `opencv`: decode the image, resize all of it to the level, crop; for every chip.
- `alone`: ours, one decode for every chip.
- `grouped`: ours, chip by chip of an image, one decode for all.
- `cached`: ours, out of a cache on disk that was filled before; `cached_png`: without loss.

With `--annotations`: how the chips of a data set are read by 0, 1 and 2 processes, what memory those keep, and how many
images a batch mixes.
"""

import argparse
import gc
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image

from sniper.chips import Chip, ImageBoxes, PyramidSpec
from sniper.chips.cover import cover
from sniper.data.datasets import load_dataset
from sniper.data.epoch import order_chips
from sniper.data.loader import load_batches
from sniper.data.reader import ChipReader
from sniper.data.spec import CacheSpec, DataSpec

SIZES = {(640, 480): 12, (1920, 1080): 6, (4000, 3000): 2, (8000, 6000): 1}  # how many images of each
BOXES_AT_640 = 7  # as many as an image of COCO has on average
BATCH = 20

Place = tuple[Path, Chip]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("photos", type=Path, help="folder of photographs to make images of")
    parser.add_argument("--annotations", type=Path, help="COCO JSON of a data set to read through")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--plain-chips", type=int, default=12, help="at most so many are cut the plain ways")
    parser.add_argument("--sizes", nargs="*", help="such as 640x480; all by default")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    sizes = [tuple(map(int, size.split("x"))) for size in options.sizes or ()] or list(SIZES)
    told: dict[str, Any] = {"benchmark": "pixels", "cores": os.cpu_count()}
    for width, height in sizes:
        with tempfile.TemporaryDirectory() as folder:
            told[f"{width}x{height}"] = time_size(
                options.photos, Path(folder), width, height, options.repeats, options.plain_chips
            )
        print(f"{width}x{height}", json.dumps(told[f"{width}x{height}"]), flush=True)
    if options.annotations is not None:
        told["loader"] = measure_loader(options.annotations)
        told["mixing"] = measure_mixing(options.annotations)
    print(json.dumps(told))


def time_size(
    photos: Path, folder: Path, width: int, height: int, repeats: int, plain_chips: int
) -> dict[str, Any]:
    places = write_images(photos, folder, width, height, count=SIZES[width, height])
    mixed = list(places)
    random.Random(0).shuffle(mixed)
    few = mixed[:plain_chips]
    cache = {name: CacheSpec(folder=str(folder / name), format=name) for name in ("jpeg", "png")}
    for spec in cache.values():
        read(places, ChipReader(cache=spec))
    ways: dict[str, tuple[Callable[[], None], int]] = {
        "pillow": (lambda: cut_with_pillow(few), len(few)),
        "opencv": (lambda: cut_with_opencv(few), len(few)),
        "alone": (lambda: read_alone(few), len(few)),
        "grouped": (lambda: read(places, ChipReader()), len(places)),
        "cached": (lambda: read(mixed, ChipReader(cache=cache["jpeg"])), len(mixed)),
        "cached_png": (lambda: read(mixed, ChipReader(cache=cache["png"])), len(mixed)),
    }
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):  # in turns, so that a busy neighbour slows all of them
        for name, (work, num_chips) in ways.items():
            gc.collect()
            started = time.perf_counter()
            work()
            speeds[name].append(num_chips / (time.perf_counter() - started))
    levels = [chip.level.index for _, chip in places]
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    return {
        "chips_per_image": round(len(places) / SIZES[width, height], 2),
        "chips_per_level": [levels.count(level) for level in range(3)],
        "chips_per_s": {name: round(value, 2) for name, value in medians.items()},
        "times_pillow": {name: round(value / medians["pillow"], 1) for name, value in medians.items()},
        "cache_bytes_per_chip": {
            name: round((folder / name / "chips.sqlite").stat().st_size / len(places)) for name in cache
        },
    }


def write_images(photos: Path, folder: Path, width: int, height: int, *, count: int) -> list[Place]:
    """Write images and choose their chips; gives those image by image."""
    generator = np.random.default_rng(0)
    names = sorted(path for path in photos.iterdir() if path.suffix.lower() in (".jpg", ".jpeg"))
    boxes_per_image = round(BOXES_AT_640 * (width * height / (640 * 480)) ** 0.5)
    boxes, paths = [], []
    for number in range(count):
        mosaic = Image.new("RGB", (width, height))
        for y in range(0, height, 480):
            for x in range(0, width, 640):
                photo = Image.open(names[int(generator.integers(len(names)))]).convert("RGB")
                mosaic.paste(photo.resize((640, 480)), (x, y))
        paths.append(folder / f"{number}.jpg")
        mosaic.save(paths[-1], quality=90)
        sides = np.exp(generator.uniform(np.log(8), np.log(400), (boxes_per_image, 1)))
        corners = generator.uniform(0, 1, (boxes_per_image, 2)) * ([width, height] - sides)
        boxes.append(np.concatenate([corners, corners + sides], axis=1))
    images = ImageBoxes(
        widths=np.full(count, width),
        heights=np.full(count, height),
        offsets=np.arange(count + 1) * boxes_per_image,
        boxes=np.concatenate(boxes),
        is_wanted=np.ones(count * boxes_per_image, dtype=np.bool_),
    )
    table = cover(PyramidSpec(), images, generator=generator)
    indices = table.image_indices.tolist()
    return [(paths[image], table.chip(i)) for i, image in enumerate(indices)]


def cut_with_pillow(places: Sequence[Place]) -> None:
    for path, chip in places:
        level = (
            Image.open(path)
            .convert("RGB")
            .resize((chip.level.width, chip.level.height), Image.Resampling.BILINEAR)
        )
        np.asarray(level.crop((chip.x, chip.y, chip.x + chip.width, chip.y + chip.height)))


def cut_with_opencv(places: Sequence[Place]) -> None:
    for path, chip in places:
        image = cv2.imread(str(path), cv2.IMREAD_COLOR_RGB)
        shrinks = chip.level.scale < 1
        level = cv2.resize(
            image,
            (chip.level.width, chip.level.height),
            interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR,
        )
        pixels = np.zeros((chip.height, chip.width, 3), dtype=np.uint8)
        shown = level[chip.y : chip.y + chip.height, chip.x : chip.x + chip.width]
        pixels[: shown.shape[0], : shown.shape[1]] = shown


def read_alone(places: Sequence[Place]) -> None:
    for path, chip in places:
        ChipReader().read(path, chip)


def read(places: Sequence[Place], reader: ChipReader) -> None:
    for path, chip in places:
        reader.read(path, chip)


def measure_loader(annotations: Path) -> dict[str, Any]:
    """Read a data set through with more and more processes; memory is what a process has for itself alone."""
    data = load_dataset(annotations)
    found: dict[str, Any] = {}
    for images_at_once in (0, 256):
        plan = order_chips(
            data,
            PyramidSpec(),
            batch_size=BATCH,
            flip=0.5,
            seed=0,
            epoch=0,
            images_at_once=images_at_once,
        )
        for processes in (0, 1, 2):
            spec = DataSpec(num_workers=processes)
            started = time.perf_counter()
            memory = []
            for step, _ in enumerate(load_batches(plan, spec, steps=range(plan.num_steps))):
                if step % max(plan.num_steps // 8, 1) == 0:
                    memory.append(round(max(map(own_memory, children() or [os.getpid()])) / 1e6))
            seconds = time.perf_counter() - started
            found[f"{images_at_once} at once, {processes} processes"] = {
                "chips_per_s": round(len(plan.chip_indices) / seconds, 1),
                "own_megabytes": memory,
            }
    return found


def children() -> list[int]:
    """Give the processes that read."""
    listed = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    return [int(one) for one in listed]


def own_memory(process: int) -> int:
    """Give the bytes that a process shares with no other."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:  # it has ended
        return 0
    fields = {line.split(":")[0]: line.split()[1] for line in lines[1:]}
    return (int(fields["Private_Clean"]) + int(fields["Private_Dirty"])) * 1024


def measure_mixing(annotations: Path) -> dict[str, Any]:
    """Count the images that a batch shows, and the share of its chips whose images the ten batches before showed."""
    data = load_dataset(annotations, has_images=False)
    found = {}
    for images_at_once in (0, 8, 20, 64, 256):
        plan = order_chips(
            data, PyramidSpec(), batch_size=BATCH, flip=0.5, seed=0, epoch=0, images_at_once=images_at_once
        )
        batches = plan.table.image_indices[plan.chip_indices].reshape(-1, BATCH)
        seen = [
            np.isin(batch, batches[max(step - 10, 0) : step]).mean() for step, batch in enumerate(batches)
        ]
        found[str(images_at_once)] = {
            "images_per_batch": round(float(np.mean([len(np.unique(batch)) for batch in batches])), 2),
            "seen_in_ten_before": round(float(np.mean(seen[10:])), 3),
        }
    return found


if __name__ == "__main__":
    main()
