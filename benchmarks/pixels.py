"""Measure how fast chips are read, on one thread: prints one JSON line, with ratios to Pillow in the same run.

    python benchmarks/pixels.py val2017/ --annotations person/train.json

The images are mosaics of photographs, 640×480 to 8000×6000, JPEG of quality 90. Their boxes are of 8 to 400 px, in
proportion to the square root of the area, and their chips are those of the paper's three levels. The methods:

- `pillow`, `opencv`: decode the image, resize all of it to the level, crop; for every chip.
- `alone`: ours, one decode for every chip.
- `grouped`: ours, image by image, one decode for all chips.
- `cached`: ours, from a cache on disk that is filled before; `cached_png`: from a lossless one.

With `--annotations`: the speed and the memory of 0, 1 and 2 processes that read the chips of a data set, and how many
images are mixed in a batch.
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
from sniper.geometry.boxes import Sides

NUM_IMAGES = {Sides(640, 480): 12, Sides(1920, 1080): 6, Sides(4000, 3000): 2, Sides(8000, 6000): 1}
BOXES_AT_640 = 7  # the mean of COCO
BATCH = 20

Source = tuple[Path, Chip]
"""A chip and its image file."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("photos", type=Path, help="folder of photographs to make mosaics of")
    parser.add_argument("--annotations", type=Path, help="COCO JSON of a data set to read through")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--plain-chips", type=int, default=12, help="how many chips pillow, opencv and alone read, at most"
    )
    parser.add_argument("--sizes", nargs="*", help="for example 640x480; all by default")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    sizes = [Sides(*map(int, size.split("x"))) for size in options.sizes or ()] or list(NUM_IMAGES)
    results: dict[str, Any] = {"benchmark": "pixels", "cores": os.cpu_count()}
    for sides in sizes:
        name = f"{sides.width}x{sides.height}"
        with tempfile.TemporaryDirectory() as folder:
            results[name] = time_size(
                options.photos, Path(folder), sides, repeats=options.repeats, plain_chips=options.plain_chips
            )
        print(name, json.dumps(results[name]), flush=True)
    if options.annotations is not None:
        results["loader"] = measure_loader(options.annotations)
        results["mixing"] = measure_mixing(options.annotations)
    print(json.dumps(results))


def time_size(photos: Path, folder: Path, sides: Sides, *, repeats: int, plain_chips: int) -> dict[str, Any]:
    """Time all methods on images of one size."""
    chips = write_images(photos, folder, sides)
    mixed = list(chips)
    random.Random(0).shuffle(mixed)
    few = mixed[:plain_chips]
    jpeg = CacheSpec(folder=str(folder / "jpeg"), format="jpeg")
    png = CacheSpec(folder=str(folder / "png"), format="png")
    for spec in (jpeg, png):
        read(chips, ChipReader(cache=spec))
    methods: dict[str, tuple[Callable[[], None], int]] = {
        "pillow": (lambda: cut_with_pillow(few), len(few)),
        "opencv": (lambda: cut_with_opencv(few), len(few)),
        "alone": (lambda: read_alone(few), len(few)),
        "grouped": (lambda: read(chips, ChipReader()), len(chips)),
        "cached": (lambda: read(mixed, ChipReader(cache=jpeg)), len(mixed)),
        "cached_png": (lambda: read(mixed, ChipReader(cache=png)), len(mixed)),
    }
    speeds: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(repeats):  # interleaved, so that other load slows all methods
        for name, (work, num_chips) in methods.items():
            gc.collect()
            started = time.perf_counter()
            work()
            speeds[name].append(num_chips / (time.perf_counter() - started))
    levels = [chip.level.index for _, chip in chips]
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    return {
        "chips_per_image": round(len(chips) / NUM_IMAGES[sides], 2),
        "chips_per_level": [levels.count(level) for level in range(3)],
        "chips_per_s": {name: round(value, 2) for name, value in medians.items()},
        "times_pillow": {name: round(value / medians["pillow"], 1) for name, value in medians.items()},
        "cache_bytes_per_chip": {
            name: round((folder / name / "chips.sqlite").stat().st_size / len(chips))
            for name in ("jpeg", "png")
        },
    }


def write_images(photos: Path, folder: Path, sides: Sides) -> list[Source]:
    """Write images of one size and choose their chips; return those image by image."""
    width, height = sides
    count = NUM_IMAGES[sides]
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
        box_sides = np.exp(generator.uniform(np.log(8), np.log(400), (boxes_per_image, 1)))
        corners = generator.uniform(0, 1, (boxes_per_image, 2)) * ([width, height] - box_sides)
        boxes.append(np.concatenate([corners, corners + box_sides], axis=1))
    images = ImageBoxes(
        widths=np.full(count, width),
        heights=np.full(count, height),
        offsets=np.arange(count + 1) * boxes_per_image,
        boxes=np.concatenate(boxes),
        is_required=np.ones(count * boxes_per_image, dtype=np.bool_),
    )
    table = cover(PyramidSpec(), images, generator=generator)
    indices = table.image_indices.tolist()
    return [(paths[image], table.chip(i)) for i, image in enumerate(indices)]


def cut_with_pillow(chips: Sequence[Source]) -> None:
    for path, chip in chips:
        level = (
            Image.open(path)
            .convert("RGB")
            .resize((chip.level.width, chip.level.height), Image.Resampling.BILINEAR)
        )
        np.asarray(level.crop((chip.x, chip.y, chip.x + chip.width, chip.y + chip.height)))


def cut_with_opencv(chips: Sequence[Source]) -> None:
    for path, chip in chips:
        image = cv2.imread(str(path), cv2.IMREAD_COLOR_RGB)
        if image is None:
            raise FileNotFoundError(path)
        shrinks = chip.level.scale < 1
        level = cv2.resize(
            image,
            (chip.level.width, chip.level.height),
            interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR,
        )
        pixels = np.zeros((chip.height, chip.width, 3), dtype=np.uint8)
        shown = level[chip.y : chip.y + chip.height, chip.x : chip.x + chip.width]
        pixels[: shown.shape[0], : shown.shape[1]] = shown


def read_alone(chips: Sequence[Source]) -> None:
    for path, chip in chips:
        ChipReader().read(path, chip)


def read(chips: Sequence[Source], reader: ChipReader) -> None:
    for path, chip in chips:
        reader.read(path, chip)


def measure_loader(annotations: Path) -> dict[str, Any]:
    """Read a data set with 0, 1 and 2 processes; the memory is that which a process shares with no other."""
    dataset = load_dataset(annotations)
    results: dict[str, Any] = {}
    for images_at_once in (0, 256):
        order = order_chips(
            dataset,
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
            for step, _ in enumerate(load_batches(order, spec, steps=range(order.num_steps))):
                if step % max(order.num_steps // 8, 1) == 0:
                    memory.append(round(max(map(own_memory, children() or [os.getpid()])) / 1e6))
            seconds = time.perf_counter() - started
            results[f"{images_at_once} at once, {processes} processes"] = {
                "chips_per_s": round(len(order.chip_indices) / seconds, 1),
                "own_megabytes": memory,
            }
    return results


def children() -> list[int]:
    """Return the ids of the processes that read."""
    return [int(pid) for pid in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()]


def own_memory(process: int) -> int:
    """Return the bytes that a process shares with no other."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:  # it has ended
        return 0
    fields = {line.split(":")[0]: line.split()[1] for line in lines[1:]}
    return (int(fields["Private_Clean"]) + int(fields["Private_Dirty"])) * 1024


def measure_mixing(annotations: Path) -> dict[str, Any]:
    """Measure the images in a batch, and the share of its chips whose images are in the ten batches before, too."""
    dataset = load_dataset(annotations, has_images=False)
    results = {}
    for images_at_once in (0, 8, 20, 64, 256):
        order = order_chips(
            dataset, PyramidSpec(), batch_size=BATCH, flip=0.5, seed=0, epoch=0, images_at_once=images_at_once
        )
        batches = order.table.image_indices[order.chip_indices].reshape(-1, BATCH)
        seen = [
            np.isin(batch, batches[max(step - 10, 0) : step]).mean() for step, batch in enumerate(batches)
        ]
        results[str(images_at_once)] = {
            "images_per_batch": round(float(np.mean([len(np.unique(batch)) for batch in batches])), 2),
            "seen_in_ten_before": round(float(np.mean(seen[10:])), 3),
        }
    return results


if __name__ == "__main__":
    main()
