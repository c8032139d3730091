"""Compare parts of a training step with their peers, in one run on one thread.

    python benchmarks/parts.py

- `suppression`: proposals of a chip, 300 kept, with the kernel of a CPU and with torchvision's `nms`. Candidates are
  the best of the paper's anchors of a chip of 512×512: those near one of twelve objects are drawn towards it and score
  by their overlap with it, all with noise.

Calls alternate between the two; times are medians in processor milliseconds.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from device import markdown
from torchvision.ops import box_iou, clip_boxes_to_image, nms

from sniper.models.nms import padded_nms

SIDE, STRIDE = 512, 16
ANCHOR_SIZES, ASPECT_RATIOS = (32, 64, 128, 256, 384), (0.5, 1.0, 2.0)
NUM_OBJECTS = 12
IOU, LIMIT = 0.7, 300

Row = tuple[str, str, Mapping[str, float]]
"""What is measured, its unit, and the values by name: ours first."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare parts of a training step with their peers.")
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = []
    for what, unit, values in compare_suppression(options.repeats):
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


if __name__ == "__main__":
    main()
