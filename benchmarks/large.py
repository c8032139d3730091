"""Time and memory of reading chips from large images, and of searching them: a line per size, and one JSON line.

    python benchmarks/large.py FOLDER --sides 5000 15000 30000

Writes tiled TIFFs (JPEG compression, with overviews) into the folder. Then, in a separate process for each, reads chips
of the paper's three levels from all over the image, as training does, and searches the whole image at ×1 and at 512 px
in windows, with a detector that detects nothing, so that only reading is measured. The peak is the memory of the
process above that after its imports.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import rasterio
import torch
from rasterio.enums import Resampling
from rasterio.windows import Window

from sniper.chips import Chip, LevelSpec, PyramidSpec
from sniper.config.experiment import PredictSpec
from sniper.data.reader import ChipReader
from sniper.geometry import Detections
from sniper.inference.detector import Detector

NUM_CHIPS = 60
LEVELS = (LevelSpec(factor=1.0, below=100), LevelSpec(long_side=512, at_least=90))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sides", type=int, nargs="+", default=[5000, 15_000, 30_000])
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=rasterio.errors.NotGeoreferencedWarning)
    if options.one is not None:
        print(json.dumps(measure(options.one)))
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    results = {}
    for side in options.sides:
        path = options.folder / f"{side}.tif"
        if not path.exists():
            write(path, side)
        done = subprocess.run(
            [sys.executable, __file__, str(options.folder), "--one", str(path)],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        results[side] = json.loads(done.stdout.splitlines()[-1])
        print(f"{side}²", json.dumps(results[side]), flush=True)
    print(json.dumps({"benchmark": "large", "cores": os.cpu_count(), "sides": results}))


def write(path: Path, side: int) -> None:
    """Write a textured image tile by tile."""
    generator = np.random.default_rng(0)
    tile = 2048
    coarse = generator.integers(0, 256, (tile // 8, tile // 8, 3), dtype=np.uint8)
    pattern = np.moveaxis(coarse.repeat(8, axis=0).repeat(8, axis=1), 2, 0)
    with rasterio.open(
        path.with_suffix(".part.tif"),
        "w",
        driver="GTiff",
        width=side,
        height=side,
        count=3,
        dtype=np.uint8,
        tiled=True,
        blockxsize=512,
        blockysize=512,
        compress="jpeg",
        photometric="ycbcr",
    ) as file:
        for y in range(0, side, tile):
            for x in range(0, side, tile):
                width, height = min(tile, side - x), min(tile, side - y)
                file.write(pattern[:, :height, :width], window=Window(x, y, width, height))
        file.build_overviews([2, 4, 8, 16, 32], Resampling.average)
    path.with_suffix(".part.tif").rename(path)


def measure(path: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    with rasterio.open(path) as file:
        width, height = file.width, file.height
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    generator = np.random.default_rng(0)
    reader = ChipReader()
    levels = PyramidSpec().at(width=width, height=height)
    started = time.perf_counter()
    for number in range(NUM_CHIPS):
        level = levels[number % 3]
        x, y = (int(generator.integers(0, max(side - 512, 0) + 1)) for side in (level.width, level.height))
        reader.read(path, Chip(level=level, x=x, y=y, width=512, height=512))
    chips_seconds = time.perf_counter() - started
    chips_peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    detector = Detector(
        detect=detect_nothing,
        spec=PredictSpec(levels=LEVELS),
        categories=(),
        device=torch.device("cpu"),
    )
    started = time.perf_counter()
    detector.predict(path)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "whole_gb": round(3 * width * height / 1e9, 2),
        "chips_per_s": round(NUM_CHIPS / chips_seconds, 1),
        "chips_peak_gb": round((chips_peak - before) / 1e6, 2),
        "search_megapixels_per_s": round(width * height / 1e6 / seconds, 1),
        "search_peak_gb": round((peak - before) / 1e6, 2),
    }


def detect_nothing(images: Sequence[torch.Tensor]) -> list[Detections]:
    return [Detections.empty() for _ in images]


if __name__ == "__main__":
    main()
