"""Compare parts of reading and of a training step with their peers, in one run on one thread.

    python benchmarks/parts.py --annotations person/train.json

- `suppression`: proposals of a chip, 300 kept, with the kernel of a CPU and with torchvision's `nms`. Candidates are
  the best of the paper's anchors of a chip of 512×512: those near one of twelve objects are drawn towards it and score
  by their overlap with it, all with noise.
- `merging`: 900 detections of each of 80 classes, 200 kept, by NMS with ours and with torchvision's `batched_nms`, and
  by soft-NMS, which torchvision does not have.
- `decoding`: photographs of the data set as JPEG, side by side: `load_image`, Pillow and OpenCV. Memory is the peak of
  a process of its own above that after its imports, relative to the decoded pixels. A quarter of the sides is what a
  level that shrinks an image eightfold is made from.

Calls alternate between sniper and its peers; times are medians in processor milliseconds.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import cv2
import numpy as np
import torch
from device import markdown
from PIL import Image
from torchvision.ops import batched_nms, box_iou, clip_boxes_to_image, nms

from sniper.data.datasets import load_dataset
from sniper.data.images.files import load_image
from sniper.geometry import Detections
from sniper.geometry.nms import soft_nms
from sniper.models.nms import padded_nms

SIDE, STRIDE = 512, 16
ANCHOR_SIZES, ASPECT_RATIOS = (32, 64, 128, 256, 384), (0.5, 1.0, 2.0)
NUM_OBJECTS = 12
IOU, LIMIT = 0.7, 300
NUM_CLASSES, NUM_OF_CLASS, NUM_KEPT, MERGE_IOU = 80, 900, 200, 0.5
PHOTOS = ((640, 480), (4000, 3000), (12_000, 9000))

Row = tuple[str, str, Mapping[str, float]]
"""What is measured, its unit, and the values by name: ours first."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare parts of reading and training with their peers.")
    parser.add_argument("--annotations", type=Path, required=True, help="COCO JSON file of photographs")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--decode", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    Image.MAX_IMAGE_PIXELS = None
    if options.decode is not None:
        name, path = options.decode
        print(json.dumps(measure_decoding(name, Path(path))))
        return
    rows = [*compare_suppression(options.repeats), compare_merging(options.repeats)]
    with tempfile.TemporaryDirectory() as folder:
        rows += compare_decoding(options, Path(folder))
    table = []
    for what, unit, values in rows:
        first, *others = values.values()
        peers = ", ".join(
            f"{name} {value:.3g} ({value / first:.1f}×)"
            for name, value in zip([*values][1:], others, strict=True)
        )
        table.append([what, unit, f"{first:.3g}", peers])
    print(markdown(["", "", "sniper", "peers, relative to it"], table))


def medians(ways: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Return the median processor milliseconds of each way, called in turn, after a first call of each."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, call in ways.items():
            started = time.process_time()
            call()
            times[name].append(time.process_time() - started)
    return {name: statistics.median(of_way[1:]) * 1e3 for name, of_way in times.items()}


def compare_suppression(repeats: int) -> Iterator[Row]:
    for count in (6000, 2000, 1000):
        boxes, scores = build_candidates(count)

        def ours(boxes: torch.Tensor = boxes, scores: torch.Tensor = scores) -> list[int]:
            indices, is_kept = padded_nms(boxes[None], scores[None], iou=IOU, limit=LIMIT)
            kept: list[int] = indices[is_kept].tolist()
            return kept

        def torchvision(boxes: torch.Tensor = boxes, scores: torch.Tensor = scores) -> list[int]:
            kept: list[int] = nms(boxes, scores, IOU)[:LIMIT].tolist()
            return kept

        if ours() != torchvision():
            raise AssertionError("the results differ")
        values = medians({"sniper": ours, "torchvision": torchvision}, repeats)
        yield f"suppression, {count:,} candidates", "ms/chip", values


def compare_merging(repeats: int) -> Row:
    generator = np.random.default_rng(0)
    count = NUM_CLASSES * NUM_OF_CLASS
    centres, sides = generator.uniform(0, 1000, (count, 2)), generator.uniform(10, 200, (count, 2))
    detections = Detections(
        boxes=np.concatenate([centres - sides / 2, centres + sides / 2], axis=1),
        scores=generator.uniform(0.001, 1, count),
        labels=np.repeat(np.arange(NUM_CLASSES), NUM_OF_CLASS),
    )
    boxes, scores, labels = (
        torch.from_numpy(values) for values in (detections.boxes, detections.scores, detections.labels)
    )

    def ours() -> Detections:
        return soft_nms(detections, decay="hard", iou_threshold=MERGE_IOU, max_detections=NUM_KEPT)

    def torchvision() -> torch.Tensor:
        return batched_nms(boxes, scores, labels, MERGE_IOU)[:NUM_KEPT]

    if not np.array_equal(ours().boxes, boxes[torchvision()].numpy()):
        raise AssertionError("the results differ")
    ways = {
        "sniper": ours,
        "torchvision": torchvision,
        "sniper, soft-NMS": lambda: soft_nms(detections, max_detections=NUM_KEPT),
    }
    return f"merging, {NUM_CLASSES} × {NUM_OF_CLASS} detections", "ms/image", medians(ways, repeats)


def build_candidates(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the boxes and scores of the best candidates of a chip, descending."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.arange(0, SIDE, STRIDE) + STRIDE / 2
    sizes = torch.tensor(
        [(size * ratio**-0.5, size * ratio**0.5) for size in ANCHOR_SIZES for ratio in ASPECT_RATIOS]
    )
    rows, columns = torch.meshgrid(centers, centers, indexing="ij")
    middle = torch.stack([columns, rows], dim=2).reshape(-1, 1, 2)
    anchors = torch.cat([middle - sizes / 2, middle + sizes / 2], dim=2).reshape(-1, 4)
    sides = 24 * (320 / 24) ** torch.rand(NUM_OBJECTS, 1, generator=generator)
    sides = sides * 1.5 ** (torch.rand(NUM_OBJECTS, 2, generator=generator) - 0.5)
    corners = torch.rand(NUM_OBJECTS, 2, generator=generator) * (SIDE - sides).clamp(min=1)
    objects = torch.cat([corners, corners + sides], dim=1)
    overlap, nearest = box_iou(anchors, objects).max(dim=1)
    extent = (anchors[:, 2:] - anchors[:, :2]).repeat(1, 2)
    noise = torch.randn(anchors.shape, generator=generator) * extent * 0.05
    boxes = clip_boxes_to_image(
        anchors + overlap[:, None] * (objects[nearest] - anchors) + noise, (SIDE, SIDE)
    )
    scores = overlap + 0.1 * torch.randn(len(anchors), generator=generator)
    best = scores.sort(descending=True, stable=True).indices[:count]
    return boxes[best], scores[best]


DECODERS: Mapping[str, Callable[[Path], np.ndarray]] = {
    "sniper": load_image,
    "sniper, a quarter of the sides": lambda path: load_image(path, reduction=4),
    "Pillow": lambda path: np.asarray(Image.open(path).convert("RGB")),
    "OpenCV": lambda path: np.asarray(cv2.imread(str(path), cv2.IMREAD_COLOR_RGB)),
}


def compare_decoding(options: argparse.Namespace, folder: Path) -> Iterator[Row]:
    photos = [
        np.asarray(Image.open(record.path).convert("RGB"))
        for record in itertools.islice(load_dataset(options.annotations), 40)
    ]
    for width, height in PHOTOS:
        path = folder / f"{width}.jpg"
        write_mosaic(path, photos, width=width, height=height)
        measured: dict[str, list[Mapping[str, float]]] = {name: [] for name in DECODERS}
        for _ in range(max(options.repeats // 3, 1)):
            for name in DECODERS:
                command = [sys.executable, __file__, "--annotations", "-", "--decode", name, str(path)]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                measured[name].append(json.loads(done.stdout))
        for key, unit in (("milliseconds", "ms"), ("peak", "× its pixels")):
            if key == "milliseconds" or width > 4000:
                values = {name: statistics.median(each[key] for each in measured[name]) for name in DECODERS}
                label = "memory to decode" if key == "peak" else "decoding"
                yield f"{label}, {width}×{height}", unit, values


def write_mosaic(path: Path, photos: Sequence[np.ndarray], *, width: int, height: int) -> None:
    """Write photographs side by side as one JPEG."""
    pixels, number = np.zeros((height, width, 3), dtype=np.uint8), 0
    for top in range(0, height, 480):
        for left in range(0, width, 640):
            photo = photos[number % len(photos)][: height - top, : width - left][:480, :640]
            pixels[top : top + photo.shape[0], left : left + photo.shape[1]] = photo
            number += 1
    Image.fromarray(pixels).save(path, quality=90)


def measure_decoding(name: str, path: Path) -> dict[str, Any]:
    """Decode an image once in this process, and some more times if it is small."""
    decode = DECODERS[name]
    small = np.zeros((8, 8, 3), dtype=np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        Image.fromarray(small).save(Path(folder) / "small.jpg")
        decode(Path(folder) / "small.jpg")  # what is imported late
    before = resident_bytes("VmRSS")
    times = []
    for _ in range(1 if path.stat().st_size > 1e6 else 25):
        started = time.process_time()
        pixels = decode(path)
        times.append(time.process_time() - started)
    peak = resident_bytes("VmHWM") - before
    return {"milliseconds": statistics.median(times) * 1e3, "peak": peak / pixels.nbytes}


def resident_bytes(field: str) -> int:
    """Return the resident memory of this process, or its peak; that of `getrusage` may be the parent's."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


if __name__ == "__main__":
    main()
