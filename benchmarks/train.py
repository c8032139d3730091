"""Measure a training step: chips per second, peak memory, time by part of the model, and utilization of the device.

    python benchmarks/train.py --device cpu --configs coco_r101_paper coco_r50_fpn --batches 4
    python benchmarks/train.py --device cuda --batches 4 8 16 20 32 64 128 --precision bf16

Each cell (experiment × batch size) runs in its own process, to measure its peak memory: the memory that torch has
allocated on a GPU, the resident memory of the process on a CPU. The chips are noise with boxes, built beforehand, so
data loading is not included. The parts of the model are timed in separate steps that synchronize with the device after
each part; chips per second come from steps without that. For comparison the same run measures torchvision's Faster
R-CNN with ResNet-50 and FPN on images of 800×1333, in megapixels per second, and the rate of large matrix products on
the same device in the same precision. Prints a table and one JSON line.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from sniper.chips import BoxStatus, ChipTarget
from sniper.config.experiment import ExperimentSpec
from sniper.config.loading import load_experiment
from sniper.data.batches import Batch, ChipSample, collate
from sniper.errors import OutOfMemory
from sniper.models.build import autocast
from sniper.training.learner import Learner

CONFIGS = Path(__file__).parents[1] / "configs"
PARTS = ("backbone", "rpn", "rpn targets", "proposals", "roi head", "backward", "optimizer")
BASELINE = "torchvision"
BASELINE_SIDES = (800, 1333)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure a training step.")
    names = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    parser.add_argument("--configs", nargs="+", default=names, choices=names)
    parser.add_argument("--batches", nargs="+", type=int, default=[4, 8, 16, 32, 64, 128])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"])
    parser.add_argument("--side", type=int, default=512, help="of a chip, pixels")
    parser.add_argument("--steps", type=int, default=5, help="timed steps, after two for warm-up")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--baseline-batches", nargs="*", type=int, default=[1])
    parser.add_argument("--cell", help="run only this cell, NAME:BATCH")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if options.cell:
        name, _, batch = options.cell.partition(":")
        run_cell = run_baseline if name == BASELINE else run_ours
        print(json.dumps(run_cell(name, int(batch), options)))
        return
    cells = [f"{name}:{batch}" for name in options.configs for batch in options.batches]
    cells += [f"{BASELINE}:{batch}" for batch in options.baseline_batches]
    results = [run_in_process(cell) for cell in cells]
    rate = matrix_rate(torch.device(options.device), options.precision)
    print(to_table(results, rate))
    summary = {
        "benchmark": "train",
        "device": device_name(options.device),
        "precision": options.precision,
        "matrix_tflops": round(rate / 1e12, 3),
        "cells": results,
    }
    print(json.dumps(summary))


def run_in_process(cell: str) -> dict[str, Any]:
    completed = subprocess.run(
        [sys.executable, *sys.argv, "--cell", cell], stdout=subprocess.PIPE, text=True, check=False
    )
    if completed.returncode:
        raise SystemExit(f"{cell} failed")
    result: dict[str, Any] = json.loads(completed.stdout.splitlines()[-1])
    print(f"{cell}: {result}", file=sys.stderr)
    return result


def run_ours(name: str, batch_size: int, options: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(options.device)
    spec = load_experiment(CONFIGS / f"{name}.yaml")
    train = replace(spec.train, batch_size=batch_size, precision=options.precision, compile=options.compile)
    backbone = replace(spec.model.backbone, pretrained=False)
    spec = replace(spec, train=train, model=replace(spec.model, backbone=backbone))
    learner = Learner(spec, num_classes=80, device=device, has_weights=False)
    batch = build_noise(batch_size, options.side)
    if device.type == "cuda":
        batch = batch.pin_memory()
    cell: dict[str, Any] = {"config": name, "batch": batch_size}
    try:
        seconds = median_seconds(
            lambda step: learner.update(batch, learning_rate=1e-4, step=step), device, steps=options.steps
        )
    except OutOfMemory as error:
        return {**cell, "out_of_memory": str(error)}
    peak = peak_memory(device)
    flops = count_flops(learner, batch.part(0, 1), spec) * batch_size
    return {
        **cell,
        "chips_per_second": batch_size / seconds,
        "megapixels_per_second": batch_size * options.side**2 / 1e6 / seconds,
        "peak_gb": peak,
        "tflops": flops / seconds / 1e12,
        "shares": measure_shares(learner, batch, device, steps=max(options.steps // 2, 1)),
    }


def run_baseline(name: str, batch_size: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train torchvision's detector on whole images of the size that it resizes to."""
    device = torch.device(options.device)
    height, width = BASELINE_SIDES
    backbone = resnet_fpn_backbone(
        backbone_name="resnet50", weights=None, trainable_layers=3
    )  # frozen batch norm
    model = FasterRCNN(backbone, num_classes=81, min_size=height, max_size=width)
    model.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, height, width, generator=generator).to(device) for _ in range(batch_size)]
    corners = torch.rand(12, 2, generator=generator) * 600
    boxes = torch.cat([corners, corners + 20 + torch.rand(12, 2, generator=generator) * 150], dim=1)
    targets = [
        {"boxes": boxes.to(device), "labels": torch.ones(12, dtype=torch.int64, device=device)}
        for _ in images
    ]

    def update(_: int) -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast(options.precision, device):
            losses = model(images, targets)
        torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    cell: dict[str, Any] = {"config": name, "batch": batch_size}
    try:
        seconds = median_seconds(update, device, steps=options.steps)
    except torch.OutOfMemoryError as error:
        return {**cell, "out_of_memory": str(error)}
    return {
        **cell,
        "images_per_second": batch_size / seconds,
        "megapixels_per_second": batch_size * height * width / 1e6 / seconds,
        "peak_gb": peak_memory(device),
    }


def build_noise(batch_size: int, side: int) -> Batch:
    """Build chips of noise with boxes: six valid ones each, six out of range, and a crowd."""
    rng = np.random.default_rng(0)
    samples = []
    for index in range(batch_size):
        corners = rng.uniform(0, side * 0.7, (13, 2))
        boxes = np.concatenate([corners, corners + rng.uniform(12, side * 0.3, (13, 2))], axis=1)
        status = [BoxStatus.VALID] * 6 + [BoxStatus.OUT_OF_RANGE] * 6 + [BoxStatus.IGNORE]
        target = ChipTarget(
            boxes=boxes, labels=rng.integers(0, 80, 13), status=np.array(status, dtype=np.int64)
        )
        pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
        samples.append(
            ChipSample(pixels=pixels, target=target, valid_sizes=(0.0, 400.0), seed=index, name=str(index))
        )
    return collate(samples)


def median_seconds(update: Callable[[int], object], device: torch.device, *, steps: int) -> float:
    """Return the median duration of a step, after two steps for warm-up."""
    seconds = []
    for step in range(steps + 2):
        synchronize(device)
        started = time.perf_counter()
        update(step)
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[2:])


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def measure_shares(learner: Learner, batch: Batch, device: torch.device, *, steps: int) -> dict[str, float]:
    """Measure which fraction of a step each part of the model takes."""
    spent = dict.fromkeys(PARTS, 0.0)

    @contextmanager
    def timed(owner: Any, method: str, part: str) -> Iterator[None]:
        plain = getattr(owner, method)

        def call(*args: Any, **kwargs: Any) -> Any:
            synchronize(device)
            started = time.perf_counter()
            try:
                return plain(*args, **kwargs)
            finally:
                synchronize(device)
                spent[part] += time.perf_counter() - started

        setattr(owner, method, call)
        try:
            yield
        finally:
            setattr(owner, method, plain)

    model = learner.model
    with (
        timed(model.backbone, "forward", "backbone"),
        timed(model.rpn, "forward", "rpn"),
        timed(model.rpn, "losses", "rpn targets"),
        timed(model.rpn, "propose", "proposals"),
        timed(model.roi_head, "losses", "roi head"),
        timed(torch.Tensor, "backward", "backward"),
        timed(learner._optimizer, "step", "optimizer"),
    ):
        started = time.perf_counter()
        for step in range(steps):
            learner.update(batch, learning_rate=1e-4, step=step)
        synchronize(device)
        total = time.perf_counter() - started
    shares = {part: seconds / total for part, seconds in spent.items()}
    return {**shares, "rest": 1 - sum(shares.values())}


def count_flops(learner: Learner, chip: Batch, spec: ExperimentSpec) -> int:
    """Count the multiplications and additions of the forward and backward pass of one chip."""

    def convolution(out_shape: Any, weight_shape: Any) -> int:
        batch, out, rows, columns = out_shape
        _, in_channels, height, width = weight_shape  # of one group
        return int(2 * batch * rows * columns * out * in_channels * height * width)

    def backward(gradient_shape: Any, _: Any, weight_shape: Any, *rest: Any, **__: Any) -> int:
        # torch's count takes every group of a depthwise convolution for all of its channels.
        return int(sum(rest[-1][:2])) * convolution(gradient_shape, weight_shape)

    def deform(_: Any, weight_shape: Any, offset_shape: Any, *__: Any, **___: Any) -> int:
        return convolution((offset_shape[0], weight_shape[0], *offset_shape[2:]), weight_shape)

    def deform_backward(_: Any, *shapes: Any, **__: Any) -> int:
        return 2 * deform(*shapes)

    ops = torch.ops.torchvision
    mapping = {
        torch.ops.aten.convolution_backward: backward,
        ops.deform_conv2d: deform,
        ops._deform_conv2d_backward: deform_backward,
    }
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    chip = chip.to(learner.device)
    learner.model.rpn.eval()  # NMS by torchvision, whose arithmetic is not counted
    with counter:
        with autocast(spec.train.precision, learner.device):
            losses = learner.model.losses(chip)
        torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
    learner.model.rpn.train()
    return int(counter.get_total_flops())


def matrix_rate(device: torch.device, precision: Any) -> float:
    """Measure the rate of large matrix products, operations per second."""
    side = 8192 if device.type == "cuda" else 2048
    context = autocast(precision, device)
    dtype = context.fast_dtype if context._enabled else torch.float32
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    count = 10 if device.type == "cuda" else 1

    def multiply(_: int) -> None:
        for _ in range(count):
            left @ right

    return count * 2 * side**3 / median_seconds(multiply, device, steps=5)


def device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"


def to_table(results: list[dict[str, Any]], rate: float) -> str:
    lines = [
        "| | batch | chips/s | megapixels/s | peak, GB | of the matrix rate | "
        + " | ".join(PARTS)
        + " | rest |",
        "|---|--:|--:|--:|--:|--:|" + "--:|" * (len(PARTS) + 1),
    ]
    for cell in results:
        head = f"| {cell['config']} | {cell['batch']} | "
        if "out_of_memory" in cell:
            lines.append(f"{head}out of memory |" + " |" * (len(PARTS) + 4))
            continue
        speed = cell.get("chips_per_second", cell.get("images_per_second"))
        numbers = f"{speed:.2f} | {cell['megapixels_per_second']:.2f} | {cell['peak_gb']:.2f} | "
        if "shares" not in cell:
            lines.append(head + numbers + " |" * (len(PARTS) + 2))
            continue
        parts = " | ".join(f"{share:.0%}" for share in cell["shares"].values())
        lines.append(f"{head}{numbers}{cell['tflops'] * 1e12 / rate:.0%} | {parts} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
