"""Measure a training step: chips per second, peak memory, time by part of the model, and utilization of the device.

    python benchmarks/train.py --device cpu --configs coco_r101_paper coco_r50_fpn --batches 4
    python benchmarks/train.py --device cuda --lines train.jsonl

Without `--configs` these are the cells, the most important first: the rate of large matrix products in each precision;
ResNet-101 of the paper with 20 chips in bf16 and in fp16, and with the most chips that fit; MobileNetV2 and the feature
pyramid with 16 to 128 chips; torchvision's Faster R-CNN with ResNet-50 and FPN on images of 800×1333 with about the
pixels of 20 chips; ResNet-101 once more with `cudnn.benchmark`, and in fp32.

On a GPU all cells run in one process, and memory is the peak that torch has allocated for a cell. On a CPU each runs in
its own process, whose resident memory is measured. The chips are noise with boxes, built beforehand, so data loading is
not included. The parts of the model are timed in separate steps that synchronize with the device after each part; chips
per second come from steps without that. Layout and settings of cuDNN are those of `sniper train`.
"""

import argparse
import functools
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from device import (
    Cell,
    add_options,
    device_name,
    markdown,
    open_lines,
    release,
    run_in_turn,
    seconds_per_call,
    synchronize,
)
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from sniper.chips import BoxStatus, ChipTarget
from sniper.config.loading import load_experiment
from sniper.data.batches import Batch, ChipSample, collate
from sniper.errors import OutOfMemory
from sniper.models.build import autocast
from sniper.models.spec import Precision
from sniper.models.two_stage import TwoStageDetector
from sniper.training.learner import Learner

CONFIGS = Path(__file__).parents[1] / "configs"
PARTS = ("backbone", "rpn", "rpn targets", "proposals", "roi head", "backward", "optimizer")
PAPER, PAPER_BATCH = "coco_r101_paper", 20
SCALING, SCALING_BATCHES = ("coco_mobilenetv2_paper", "coco_r50_fpn"), (16, 32, 64, 128)
BASELINE = "torchvision"
BASELINE_SIDES = (800, 1333)
MATRIX = "matrix"
LARGEST = "largest"
MAX_BATCH = 1024
MAX_TRIALS = 6


@dataclass(frozen=True, kw_only=True)
class CellSpec:
    """What a cell measures.

    Attributes:
        name: of an experiment, or `torchvision` or `matrix`.
        batch: chips or images; None is the most chips that fit into memory.
        precision: of autocast.
        variant: `plain`, `cudnn.benchmark` or `compile`.
    """

    name: str
    batch: int | None
    precision: Precision
    variant: str = "plain"

    def __str__(self) -> str:
        batch = LARGEST if self.batch is None else self.batch
        return f"{self.name}:{batch}:{self.precision}:{self.variant}"

    @classmethod
    def parse(cls, text: str) -> "CellSpec":
        name, batch, precision, variant = text.split(":")
        return cls(
            name=name,
            batch=None if batch == LARGEST else int(batch),
            precision=cast(Precision, precision),
            variant=variant,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure a training step.")
    names = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    add_options(parser)
    parser.add_argument("--configs", nargs="+", choices=names, help="instead of the cells above")
    parser.add_argument("--batches", nargs="+", type=int, default=[4, 8, 16, 32, 64, 128])
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"])
    parser.add_argument("--side", type=int, default=512, help="of a chip, pixels")
    parser.add_argument("--steps", type=int, default=8, help="timed steps, after two for warm-up")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--baseline-batches", nargs="*", type=int, default=[1])
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tiny:
        options.side, options.steps = 64, 1
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if options.cell:
        print(json.dumps(measure(CellSpec.parse(options.cell), options)))
        return
    device = torch.device(options.device)
    lines = open_lines(options, "train")
    is_isolated = device.type == "cpu" and not options.tiny
    run = measure_in_process if is_isolated else functools.partial(measure, options=options)
    specs = default_cells(tiny=options.tiny) if options.configs is None else chosen_cells(options)
    cells: dict[str, Cell] = {str(spec): functools.partial(run, spec) for spec in specs}
    run_in_turn(cells, lines, device, only=options.only)
    print(to_table(lines.results))


def default_cells(*, tiny: bool) -> list[CellSpec]:
    """Return the cells to measure on a GPU, the most important first."""
    paper_batch, scaling_batches = (2, (2, 4)) if tiny else (PAPER_BATCH, SCALING_BATCHES)
    height, width = BASELINE_SIDES
    baseline_batch = 1 if tiny else round(paper_batch * 512**2 / (height * width))
    paper = CellSpec(name=PAPER, batch=paper_batch, precision="bf16")
    return [
        CellSpec(name=MATRIX, batch=1, precision="bf16"),
        paper,
        replace(paper, precision="fp16"),
        CellSpec(name=MATRIX, batch=1, precision="fp16"),
        replace(paper, batch=None),
        *(
            CellSpec(name=name, batch=batch, precision="bf16")
            for name in SCALING
            for batch in scaling_batches
        ),
        CellSpec(name=BASELINE, batch=baseline_batch, precision="bf16"),
        replace(paper, variant="cudnn.benchmark"),
        CellSpec(name=MATRIX, batch=1, precision="fp32"),
        replace(paper, precision="fp32"),
    ]


def chosen_cells(options: argparse.Namespace) -> list[CellSpec]:
    """Return the cells that the options name."""
    variant = "compile" if options.compile else "plain"
    cells = [
        CellSpec(name=name, batch=batch, precision=options.precision, variant=variant)
        for name in options.configs
        for batch in options.batches
    ]
    return [
        CellSpec(name=MATRIX, batch=1, precision=options.precision),
        *cells,
        *(
            CellSpec(name=BASELINE, batch=batch, precision=options.precision)
            for batch in options.baseline_batches
        ),
    ]


def measure_in_process(spec: CellSpec) -> Mapping[str, Any]:
    command = [sys.executable, *sys.argv, "--cell", str(spec)]
    completed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if completed.returncode:
        raise RuntimeError(f"{spec} failed with {completed.returncode}")
    result: dict[str, Any] = json.loads(completed.stdout.splitlines()[-1])
    return result


def measure(spec: CellSpec, options: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(options.device)
    cell = {
        "config": spec.name,
        "batch": spec.batch,
        "precision": spec.precision,
        "variant": spec.variant,
        "device": device_name(device),
    }
    if spec.name == MATRIX:
        rate = matrix_rate(device, spec.precision, side=256 if options.tiny else None)
        return {**cell, "tflops": rate / 1e12}
    run = measure_baseline if spec.name == BASELINE else measure_ours
    with cudnn_benchmark(enabled=spec.variant == "cudnn.benchmark"):
        try:
            return {**cell, **run(spec, options)}
        except (OutOfMemory, torch.OutOfMemoryError) as error:
            return {**cell, "error": f"out of memory: {str(error).partition(chr(10))[0]}"}


@contextmanager
def cudnn_benchmark(*, enabled: bool) -> Iterator[None]:
    """Let cuDNN choose its algorithms by measurement."""
    previous = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = enabled
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = previous


def measure_ours(cell: CellSpec, options: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(options.device)
    batch_size = cell.batch
    search: dict[str, Any] = {}
    if batch_size is None:
        batch_size, search = find_largest(cell, options)
        release(device)
    steps = min(options.steps, 3) if search else options.steps
    learner = build_learner(cell, device, tiny=options.tiny)
    batch = build_noise(batch_size, options.side, device)
    seconds = seconds_per_call(
        lambda step: learner.update(batch, learning_rate=1e-4, step=step), device, count=steps
    )
    peak = peak_memory(device)
    flops = count_flops(cell, options) * batch_size
    return {
        "batch": batch_size,
        **search,
        "chips_per_second": batch_size / seconds,
        "megapixels_per_second": batch_size * options.side**2 / 1e6 / seconds,
        "seconds_per_step": seconds,
        "peak_gb": peak,
        "tflops": flops / seconds / 1e12,
        "shares": measure_shares(learner, batch, device, steps=max(steps // 2, 1)),
    }


def find_largest(cell: CellSpec, options: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """Find the most chips that fit into the memory of the device, to a few percent.

    Two small batches give a first estimate, the trials that follow correct it.
    """
    device = torch.device(options.device)
    first, second = (1, 2) if options.tiny else (8, 16)
    learner = build_learner(cell, device, tiny=options.tiny)

    def peak_of(batch_size: int) -> float | None:
        """Return the peak memory of a step in bytes, or None if it does not fit."""
        learner._optimizer.zero_grad(set_to_none=True)
        release(device)
        try:
            batch = build_noise(batch_size, options.side, device)
            for step in range(2):
                learner.update(batch, learning_rate=1e-4, step=step)
            synchronize(device)
        except (OutOfMemory, torch.OutOfMemoryError):
            return None
        if device.type == "cuda":
            return float(torch.cuda.max_memory_reserved(device))
        return peak_memory(device) * 1e9

    peaks = peak_of(first), peak_of(second)
    if peaks[0] is None or peaks[1] is None:
        raise OutOfMemory(f"{second} chips do not fit into the memory of {device}")
    per_chip = max((peaks[1] - peaks[0]) / (second - first), 1.0)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        room = float(free) + torch.cuda.memory_reserved(device) - peaks[1]
        estimate = second + int(room / per_chip)
    else:
        estimate = 2 * second  # resident memory has no limit to estimate from
    fits = functools.cache(lambda batch_size: peak_of(batch_size) is not None)
    limit = 2 * second if device.type == "cpu" else MAX_BATCH
    largest, trials = search_largest(fits, known=second, estimate=min(estimate, limit), limit=limit)
    return largest, {"estimated_batch": estimate, "gb_per_chip": per_chip / 1e9, "trials": trials}


def search_largest(
    fits: Callable[[int], bool], *, known: int, estimate: int, limit: int
) -> tuple[int, dict[int, bool]]:
    """Search the largest batch that fits, to a thirty-second of its size, in a few trials.

    Args:
        fits: checks a batch size.
        known: a size that fits.
        estimate: of the largest.
        limit: largest size to try.

    Returns:
        The largest size that fitted, and the outcome of each trial.
    """
    low, high = known, limit + 1
    trials: dict[int, bool] = {}
    candidate = min(max(estimate, low + 1), limit)
    while len(trials) < MAX_TRIALS and high - low > max(low // 32, 1):
        trials[candidate] = fits(candidate)
        if trials[candidate]:
            low = candidate
            candidate = min(low + max(low // 16, 1), (low + high) // 2)
        else:
            high = candidate
            candidate = max(high - max(high // 16, 1), (low + high) // 2)
    return low, trials


def build_learner(cell: CellSpec, device: torch.device, *, tiny: bool) -> Learner:
    """Build the learner of an experiment, without pretrained weights; `tiny` has few proposals."""
    spec = load_experiment(CONFIGS / f"{cell.name}.yaml")
    # The batch size only scales the learning rate, which the steps here set.
    train = replace(spec.train, precision=cell.precision, compile=cell.variant == "compile")
    model = replace(spec.model, backbone=replace(spec.model.backbone, pretrained=False))
    if tiny:
        model = replace(
            model,
            rpn=replace(model.rpn, post_nms_top_n_train=10),
            roi_head=replace(model.roi_head, hidden_dim=32),
        )
    spec = replace(spec, train=train, model=model)
    return Learner(spec, num_classes=80, device=device, has_weights=False)


def measure_baseline(cell: CellSpec, options: argparse.Namespace) -> dict[str, Any]:
    """Train torchvision's detector on whole images of the size that it resizes to."""
    device, batch_size = torch.device(options.device), cell.batch or 1
    height, width = (64, 96) if options.tiny else BASELINE_SIDES
    backbone = resnet_fpn_backbone(
        backbone_name="resnet50", weights=None, trainable_layers=3
    )  # frozen batch norm
    model = FasterRCNN(backbone, num_classes=81, min_size=height, max_size=width)
    model.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4, momentum=0.9)
    scaler = torch.amp.GradScaler(device.type, enabled=cell.precision == "fp16")
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, height, width, generator=generator).to(device) for _ in range(batch_size)]
    corners = torch.rand(12, 2, generator=generator) * (height * 0.7)
    boxes = torch.cat([corners, corners + 20 + torch.rand(12, 2, generator=generator) * 150], dim=1)
    targets = [
        {"boxes": boxes.to(device), "labels": torch.ones(12, dtype=torch.int64, device=device)}
        for _ in images
    ]

    def update(_: int) -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast(cell.precision, device):
            losses = model(images, targets)
        scaler.scale(torch.stack(list(losses.values())).sum()).backward()  # type: ignore[no-untyped-call]
        scaler.step(optimizer)
        scaler.update()

    seconds = seconds_per_call(update, device, count=options.steps)
    return {
        "images_per_second": batch_size / seconds,
        "megapixels_per_second": batch_size * height * width / 1e6 / seconds,
        "seconds_per_step": seconds,
        "peak_gb": peak_memory(device),
    }


def build_noise(batch_size: int, side: int, device: torch.device) -> Batch:
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
    batch = collate(samples)
    return batch.pin_memory() if device.type == "cuda" else batch


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
        synchronize(device)
        started = time.perf_counter()
        for step in range(steps):
            learner.update(batch, learning_rate=1e-4, step=step)
        synchronize(device)
        total = time.perf_counter() - started
    shares = {part: seconds / total for part, seconds in spent.items()}
    return {**shares, "rest": 1 - sum(shares.values())}


def count_flops(cell: CellSpec, options: argparse.Namespace) -> int:
    """Count the multiplications and additions of the forward and backward pass of one chip."""
    return _count_flops(cell.name, options.side, torch.device(options.device), tiny=options.tiny)


@functools.cache
def _count_flops(name: str, side: int, device: torch.device, *, tiny: bool) -> int:
    learner = build_learner(CellSpec(name=name, batch=1, precision="fp32"), device, tiny=tiny)

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
    chip = build_noise(1, side, device).to(device)
    assert isinstance(learner.model, TwoStageDetector)
    learner.model.rpn.eval()  # NMS by torchvision, whose arithmetic is not counted
    with counter:
        losses = learner.model.losses(chip)
        torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
    return int(counter.get_total_flops())


def matrix_rate(device: torch.device, precision: Precision, *, side: int | None = None) -> float:
    """Measure the rate of large matrix products, operations per second."""
    side = side or (8192 if device.type == "cuda" else 2048)
    context = autocast(precision, device)
    dtype = context.fast_dtype if context._enabled else torch.float32
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / seconds_per_call(lambda _: left @ right, device, count=20, warmup=3)


def to_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Format results as a table; utilization is relative to the matrix rate of the same precision."""
    rates = {line["precision"]: line.get("tflops") for line in results if line["config"] == MATRIX}
    header = ["", "batch", "precision", "chips/s", "megapixels/s", "peak, GB", "TFLOP/s", "% of matmul peak"]
    rows = []
    for line in results:
        name = line["config"] if line["variant"] == "plain" else f"{line['config']}, {line['variant']}"
        row = [name, str(line["batch"] or LARGEST), line["precision"]]
        if "error" in line:
            rows.append([*row, line["error"].partition(":")[0], *[""] * (len(PARTS) + 5)])
            continue
        for key, digits in (("chips_per_second", 2), ("megapixels_per_second", 3), ("peak_gb", 2)):
            row.append(f"{line[key]:.{digits}f}" if key in line else "")
        rate = rates.get(line["precision"])
        tflops = line.get("tflops")
        row.append("" if tflops is None else f"{tflops:.3g}")
        row.append("" if tflops is None or not rate else f"{tflops / rate:.0%}")
        shares = line.get("shares")
        row += [""] * (len(PARTS) + 1) if shares is None else [f"{share:.0%}" for share in shares.values()]
        rows.append(row)
    return markdown([*header, *PARTS, "rest"], rows)


if __name__ == "__main__":
    main()
