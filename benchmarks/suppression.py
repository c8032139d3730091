"""Compare ways of non-maximum suppression of proposals in training: time, memory, kernels, bytes, and equal results.

    python benchmarks/suppression.py --device cpu --repeats 5
    python benchmarks/suppression.py --device cuda --lines suppression.jsonl

`blocks` is `fixed_point_nms`, which never synchronizes with a GPU. `per image` is torchvision's `nms`, which does so
once for each image, and `padded_nms` once more for their number of candidates. Calls alternate between the two.

The candidates are the best of the paper's anchors of a chip of 512×512: those near one of twelve objects are drawn
towards it, and score by their overlap with it, all with noise. `flat` candidates are anchors that all have the same
score, in the order of their position, as in an image without content: the longest chains of overlaps.

Operators and bytes of `blocks` are counted by torch's dispatcher: every operator that is not a view, with all inputs it
reads and outputs it writes. On a GPU an operator is mostly one kernel.
"""

import argparse
import functools
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from device import Cell, add_options, device_name, markdown, open_lines, release, run_in_turn, synchronize
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import box_iou, clip_boxes_to_image

from sniper.models.nms import fixed_point_nms, padded_nms

SIDE = 512
STRIDE = 16
ANCHOR_SIZES = (32, 64, 128, 256, 384)
ASPECT_RATIOS = (0.5, 1.0, 2.0)
NUM_OBJECTS = 12
IOU = 0.7
LIMIT = 300

Kind = Literal["rpn", "flat"]
Suppress = Callable[[], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Boxes to suppress.

    Attributes:
        boxes: (B, n, 4) xyxy, best first.
        scores: (B, n), descending.
    """

    boxes: torch.Tensor
    scores: torch.Tensor


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare ways of non-maximum suppression in training.")
    add_options(parser)
    parser.add_argument("--candidates", nargs="+", type=int, default=[6000, 2000, 1000])
    parser.add_argument("--batches", nargs="+", type=int, default=[20, 1])
    parser.add_argument("--repeats", type=int, help="timed pairs of calls, after one pair for warm-up")
    options = parser.parse_args()
    if options.tiny:
        options.candidates, options.batches = [600, 100], [2, 1]
    device = torch.device(options.device)
    repeats = options.repeats or (20 if device.type == "cuda" else 1 if options.tiny else 5)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    lines = open_lines(options, "suppression")
    kinds: tuple[Kind, ...] = ("rpn", "flat")
    cells: dict[str, Cell] = {
        f"{kind}:{count}:{batch}": functools.partial(
            measure, kind, count=count, batch=batch, repeats=repeats, device=device
        )
        for kind in kinds
        for count in options.candidates
        for batch in options.batches
    }
    run_in_turn(cells, lines, device, only=options.only)
    print(to_table(lines.results))


def measure(kind: Kind, *, count: int, batch: int, repeats: int, device: torch.device) -> Mapping[str, Any]:
    candidates = build_candidates(kind, count=count, batch=batch, device=device)
    ways: dict[str, Suppress] = {
        name: functools.partial(suppress_by_blocks if name == "blocks" else suppress_per_image, candidates)
        for name in ("blocks", "per image")
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, suppress in ways.items():
            synchronize(device)
            started = time.perf_counter()
            suppress()
            synchronize(device)
            seconds[name].append(time.perf_counter() - started)
    peaks = {name: peak_of(suppress, device) for name, suppress in ways.items()}
    (indices, is_kept), (expected, is_expected) = (suppress() for suppress in ways.values())
    is_equal = (is_kept == is_expected) & ((indices == expected) | ~is_kept)
    with OperatorCounter() as counter:
        ways["blocks"]()
    return {
        "kind": kind,
        "candidates": count,
        "batch": batch,
        "device": device_name(device),
        "milliseconds": {name: statistics.median(times[1:]) * 1e3 for name, times in seconds.items()},
        "peak_mb": peaks,
        "operators": counter.num_operators,
        "megabytes_per_chip": counter.num_bytes / batch / 1e6,
        "kept_per_chip": float(is_expected.sum()) / batch,
        "equal_images": float(is_equal.all(dim=1).float().mean()),
    }


def suppress_by_blocks(candidates: Candidates) -> tuple[torch.Tensor, torch.Tensor]:
    is_real = candidates.scores > -torch.inf
    return fixed_point_nms(candidates.boxes, is_real, iou=IOU, limit=LIMIT)


def suppress_per_image(candidates: Candidates) -> tuple[torch.Tensor, torch.Tensor]:
    return padded_nms(candidates.boxes, candidates.scores, iou=IOU, limit=LIMIT, may_sync=True)


def peak_of(suppress: Suppress, device: torch.device) -> float | None:
    """Return the memory that a call allocates on a GPU, megabytes; None on a CPU, where torch does not count it."""
    if device.type != "cuda":
        return None
    release(device)
    before = torch.cuda.memory_allocated(device)
    suppress()
    synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 1e6


def build_candidates(kind: Kind, *, count: int, batch: int, device: torch.device) -> Candidates:
    """Build the best candidates of each chip, descending."""
    generator = torch.Generator().manual_seed(0)
    anchors = build_anchors()  # (a, 4)
    per_image = []
    for _ in range(batch):
        if kind == "flat":
            boxes, scores = anchors, torch.zeros(len(anchors))
        else:
            boxes, scores = regress(anchors, generator=generator)
        boxes = clip_boxes_to_image(boxes, (SIDE, SIDE))
        best = scores.sort(descending=True, stable=True).indices[:count]
        per_image.append((boxes[best], scores[best]))
    boxes, scores = (torch.stack(parts) for parts in zip(*per_image, strict=True))
    return Candidates(boxes=boxes.to(device), scores=scores.to(device))


def build_anchors() -> torch.Tensor:
    """Return the anchors of a chip that are at least half inside it, (a, 4) xyxy."""
    centers = torch.arange(0, SIDE, STRIDE) + STRIDE / 2
    sizes = torch.tensor(
        [(size * ratio**-0.5, size * ratio**0.5) for size in ANCHOR_SIZES for ratio in ASPECT_RATIOS]
    )
    rows, columns = torch.meshgrid(centers, centers, indexing="ij")
    middle = torch.stack([columns, rows], dim=2).reshape(-1, 1, 2)
    return torch.cat([middle - sizes / 2, middle + sizes / 2], dim=2).reshape(-1, 4)


def regress(anchors: torch.Tensor, *, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw anchors towards random objects, the nearer ones farther, and score them by their overlap."""
    sides = 24 * (320 / 24) ** torch.rand(NUM_OBJECTS, 1, generator=generator)
    sides = sides * 1.5 ** (torch.rand(NUM_OBJECTS, 2, generator=generator) - 0.5)
    corners = torch.rand(NUM_OBJECTS, 2, generator=generator) * (SIDE - sides).clamp(min=1)
    objects = torch.cat([corners, corners + sides], dim=1)
    overlap, nearest = box_iou(anchors, objects).max(dim=1)
    extent = (anchors[:, 2:] - anchors[:, :2]).repeat(1, 2)
    noise = torch.randn(anchors.shape, generator=generator) * extent * 0.05
    boxes = anchors + overlap[:, None] * (objects[nearest] - anchors) + noise
    return boxes, overlap + 0.1 * torch.randn(len(anchors), generator=generator)


class OperatorCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operators, views left out, and the bytes of the tensors that they read and write."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_operators = self.num_bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        is_view = any(
            returned.alias_info is not None and not returned.alias_info.is_write
            for returned in func._schema.returns
        )
        if not is_view:
            self.num_operators += 1
            leaves = torch.utils._pytree.tree_leaves((args, kwargs, result))
            self.num_bytes += sum(stored_bytes(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor))
        return result


def stored_bytes(tensor: torch.Tensor) -> int:
    """Return the bytes of a tensor, without those repeated by expanding it."""
    count = tensor.element_size()
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else 1
    return count


def to_table(results: Sequence[Mapping[str, Any]]) -> str:
    header = [
        *("candidates", "batch", "blocks, ms", "per image, ms", "blocks, peak MB", "per image, peak MB"),
        *("operators", "MB/chip", "kept/chip", "equal images"),
    ]
    rows = []
    for line in results:
        if "error" in line:
            rows.append([line["cell"], "", line["error"].partition(":")[0], *[""] * (len(header) - 3)])
            continue
        times, peaks = line["milliseconds"].values(), line["peak_mb"].values()
        rows.append(
            [
                f"{line['candidates']}{', flat' if line['kind'] == 'flat' else ''}",
                str(line["batch"]),
                *(f"{value:.2f}" for value in times),
                *("" if value is None else f"{value:.0f}" for value in peaks),
                str(line["operators"]),
                f"{line['megabytes_per_chip']:.0f}",
                f"{line['kept_per_chip']:.0f}",
                f"{line['equal_images']:.0%}",
            ]
        )
    return markdown(header, rows)


if __name__ == "__main__":
    main()
