"""Measure how fast chips are read, and what share of a training step waits for them.

    python benchmarks/loader.py --annotations train.json --device cpu --workers 0 1 2
    python benchmarks/loader.py --annotations train.json --device cuda --lines loader.jsonl

The cells, the most important first:

- `train`: a short training of MobileNetV2, `coco_mobilenetv2_paper`, on the device by the loop of `sniper train`, with
  positive chips. `chips/s` is that of the loop, `step alone` without the waits for data. The first steps are left out.
- `read`: one epoch of the same chips with some number of workers, and nothing else. `cold` also fills a new chip cache,
  `warm` reads from it. On a GPU batches are copied to it. `trainer, ms/chip` is the processor time of the training
  process, all threads together.
- `ready`: how long the training waits for a batch that all workers have read, while they have nothing to do.
- `assemble`: one batch made from chips in memory, as they are and mirrored, in this process.

Chips are counted from the moment that the workers have started and decoded their first images.
"""

import argparse
import contextlib
import functools
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from device import Cell, add_options, device_name, markdown, open_lines, run_in_turn

import sniper
from sniper.chips import BoxStatus, ChipTarget
from sniper.config.experiment import ExperimentSpec
from sniper.config.loading import load_experiment
from sniper.data.batches import ChipSample, collate, flip_horizontally
from sniper.data.datasets import Dataset, load_dataset
from sniper.data.epoch import EpochOrder, order_chips
from sniper.data.loader import load_batches
from sniper.data.spec import CacheSpec, SourceSpec

CONFIG = Path(__file__).parents[1] / "configs" / "coco_mobilenetv2_paper.yaml"
WARMUP_STEPS = 8

Cache = Literal["none", "cold", "warm"]


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What the cells share.

    Attributes:
        spec: the experiment.
        dataset: to read.
        order: one epoch of its chips.
        device: to train on.
        steps: of a training.
        warmup: steps of these that are not counted.
        read_seconds: how long batches are read.
    """

    spec: ExperimentSpec
    dataset: Dataset
    order: EpochOrder
    device: torch.device
    steps: int
    warmup: int
    read_seconds: float

    def with_workers(self, count: int, *, cache: Path | None = None) -> ExperimentSpec:
        folder = None if cache is None else str(cache)
        data = replace(self.spec.data, num_workers=count, cache=CacheSpec(folder=folder))
        return replace(self.spec, data=data)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure how fast chips are read.")
    add_options(parser)
    parser.add_argument("--annotations", type=Path, required=True, help="COCO JSON file")
    parser.add_argument("--images", type=Path, help="folder that its file names are relative to")
    parser.add_argument("--weights", type=Path, help="pretrained weights of the backbone")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=80, help="of a training")
    parser.add_argument("--workers", nargs="+", type=int, default=[16, 8, 4, 2, 1, 0])
    options = parser.parse_args()
    if options.tiny:
        options.batch, options.steps = 2, 4
    cores = os.cpu_count() or 1
    counts = list(dict.fromkeys(min(count, cores) for count in options.workers))
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    setup = build_setup(options)
    lines = open_lines(options, "loader")
    with temporary_folder() as folder:
        run_in_turn(build_cells(setup, counts, folder=folder), lines, setup.device, only=options.only)
    print(to_table(lines.results))


def build_setup(options: argparse.Namespace) -> Setup:
    spec = load_experiment(CONFIG)
    images = None if options.images is None else str(options.images)
    source = SourceSpec(annotations=str(options.annotations), images=images)
    backbone = replace(
        spec.model.backbone,
        pretrained=False,
        weights=None if options.weights is None else str(options.weights),
    )
    model, pyramid = replace(spec.model, backbone=backbone), spec.pyramid
    if options.tiny:
        *finer, coarsest = pyramid.levels
        pyramid = replace(pyramid, chip_size=64, levels=(*finer, replace(coarsest, long_side=64)))
        model = replace(
            model,
            rpn=replace(model.rpn, post_nms_top_n_train=10),
            roi_head=replace(model.roi_head, hidden_dim=32),
        )
    spec = replace(
        spec,
        data=replace(spec.data, train=source),
        pyramid=pyramid,
        negatives=replace(spec.negatives, source="none"),
        model=model,
        train=replace(spec.train, batch_size=options.batch),
    )
    dataset = load_dataset(options.annotations, image_root=options.images)
    if options.tiny:
        dataset = dataset.select(np.arange(min(len(dataset), 16)))
    order = order_chips(
        dataset,
        spec.pyramid,
        batch_size=options.batch,
        flip=spec.data.flip,
        seed=spec.seed,
        epoch=0,
        images_at_once=spec.data.images_at_once,
    )
    return Setup(
        spec=spec,
        dataset=dataset,
        order=order,
        device=torch.device(options.device),
        steps=options.steps,
        warmup=min(WARMUP_STEPS, options.steps // 2),
        read_seconds=0.5 if options.tiny else 3.0,
    )


def build_cells(setup: Setup, counts: Sequence[int], *, folder: Path) -> dict[str, Cell]:
    preferred = (counts[0], setup.spec.data.num_workers or 4, counts[len(counts) // 2])
    some = [count for count in dict.fromkeys(preferred) if count in counts][:2]
    cells: dict[str, Cell] = {}
    for count in some:
        cells[f"train:{count}"] = functools.partial(measure_training, setup, count, folder=folder)

    def add_reading(count: int, *caches: Cache) -> None:
        for cache in caches:
            cells[f"read:{count}:{cache}"] = functools.partial(
                measure_reading,
                setup,
                count,
                cache=cache,
                folder=None if cache == "none" else folder / f"cache_{count}",
            )

    add_reading(counts[0], "none", "cold", "warm")
    for name in ("plain", "flipped"):
        cells[f"assemble:{name}"] = functools.partial(measure_assembly, setup, is_flipped=name == "flipped")
    for count in counts[1:]:
        add_reading(count, "none")
    for count in dict.fromkeys((counts[0], *some)):
        if count:
            cells[f"ready:{count}"] = functools.partial(measure_ready, setup, count)
    for count in some:
        add_reading(count, "cold", "warm")
    return cells


@contextmanager
def temporary_folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp())
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def measure_training(setup: Setup, num_workers: int, *, folder: Path) -> Mapping[str, Any]:
    """Train for some steps, and read the metrics of the run."""
    spec = setup.with_workers(num_workers)
    spec = replace(spec, train=replace(spec.train, epochs=setup.steps / setup.order.num_steps))
    run = sniper.train(spec, run=folder / f"run_{num_workers}", device=setup.device)
    entries = [entry for entry in run.entries() if entry["stage"] == "train"][setup.warmup :]
    seconds = sum(entry["seconds"] for entry in entries)
    waits = sum(entry["seconds"] * entry["data_wait"] for entry in entries)
    chips = len(entries) * spec.train.batch_size
    return {
        "kind": "train",
        "workers": num_workers,
        "cache": "none",
        "device": device_name(setup.device),
        "cores": os.cpu_count(),
        "batch": spec.train.batch_size,
        "steps": len(entries),
        "chips_per_second": chips / seconds,
        "step_chips_per_second": chips / (seconds - waits),
        "data_wait": waits / seconds,
        "peak_gb": max(entry["peak_memory_gb"] for entry in entries),
    }


def measure_reading(
    setup: Setup,
    num_workers: int,
    *,
    cache: Cache = "none",
    folder: Path | None = None,
) -> Mapping[str, Any]:
    """Read batches for some seconds; what fills a cache reads one epoch."""
    if cache == "warm" and not (folder and folder.exists()):
        measure_reading(setup, num_workers, cache="cold", folder=folder)
    spec = setup.with_workers(num_workers, cache=folder)
    order = setup.order
    if cache != "cold":
        order = repeated(order, chips=10_000 * max(num_workers, 1))
    batch_size = len(order.positions(0))
    # At first every stream decodes an image at once; later their decodes are spread over the batches.
    warmup = min(max(order.num_streams // batch_size, 2), order.num_steps // 2)
    limit = float("inf") if cache == "cold" else setup.read_seconds
    batches = load_batches(order, spec.data, steps=range(order.num_steps), device=setup.device)
    began = time.perf_counter()
    started, chips, first, processor = began, 0, None, time.process_time()
    for number, batch in enumerate(batches):
        now = time.perf_counter()
        first = now - began if first is None else first
        if number < warmup:
            started, processor = now, time.process_time()
            continue
        chips += len(batch)
        if now - started > limit:
            break
    seconds = time.perf_counter() - started
    processor = time.process_time() - processor
    return {
        "kind": "read",
        "workers": num_workers,
        "cache": cache,
        "device": device_name(setup.device),
        "cores": os.cpu_count(),
        "batch": batch_size,
        "chips": chips,
        "chips_per_second": chips / seconds,
        "trainer_milliseconds_per_chip": processor / chips * 1e3,
        "first_batch_seconds": first,
    }


def measure_ready(setup: Setup, num_workers: int) -> Mapping[str, Any]:
    """Wait until the workers are idle, again and again, and measure how long the next batch takes."""
    spec = setup.with_workers(num_workers)
    order = repeated(setup.order, chips=40 * len(setup.order.positions(0)))
    batches = load_batches(order, spec.data, steps=range(order.num_steps), device=setup.device)
    times = []
    with contextlib.closing(batches):
        next(batches)  # starts the workers
        for _ in range(3 if setup.read_seconds < 1 else 13):
            time.sleep(setup.read_seconds / 2)
            started = time.perf_counter()
            batch = next(batches)
            times.append(time.perf_counter() - started)
    wait = statistics.median(times[3:] or times)
    return {
        "kind": "ready",
        "workers": num_workers,
        "cache": "none",
        "device": device_name(setup.device),
        "cores": os.cpu_count(),
        "batch": len(batch),
        "milliseconds_per_batch": wait * 1e3,
        "chips_per_second": len(batch) / wait,
    }


def repeated(order: EpochOrder, *, chips: int) -> EpochOrder:
    """Repeat the chips of an epoch, stream by stream, until there are enough to read for some seconds."""
    batch_size = len(order.positions(0))
    whole_streams = len(order.chip_indices) // order.num_streams * order.num_streams
    count = -(-max(chips, batch_size) // batch_size) * batch_size
    return replace(
        order,
        chip_indices=np.resize(order.chip_indices[:whole_streams], count),
        is_flipped=np.resize(order.is_flipped[:whole_streams], count),
        seeds=np.resize(order.seeds[:whole_streams], count),
        offsets=np.arange(0, count + 1, batch_size),
    )


def measure_assembly(setup: Setup, *, is_flipped: bool, repeats: int = 25) -> Mapping[str, Any]:
    """Make batches of chips of noise that are in memory."""
    side, batch_size = setup.spec.pyramid.chip_size, setup.spec.train.batch_size
    generator = np.random.default_rng(0)
    samples = [
        ChipSample(
            pixels=generator.integers(256, size=(side, side, 3), dtype=np.uint8),
            target=ChipTarget(
                boxes=np.array([[8.0, 8.0, 40.0, 40.0]]),
                labels=np.zeros(1, dtype=np.int64),
                status=np.array([BoxStatus.VALID], dtype=np.int64),
            ),
            valid_sizes=(0.0, 400.0),
            seed=index,
            name=str(index),
        )
        for index in range(batch_size)
    ]
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        collate([flip_horizontally(sample) for sample in samples] if is_flipped else samples)
        times.append(time.perf_counter() - started)
    return {
        "kind": "assemble",
        "workers": 0,
        "cache": "none",
        "device": "cpu",
        "cores": os.cpu_count(),
        "batch": batch_size,
        "is_flipped": is_flipped,
        "milliseconds_per_chip": statistics.median(times) / batch_size * 1e3,
        "chips_per_second": batch_size / statistics.median(times),
    }


def to_table(results: Sequence[Mapping[str, Any]]) -> str:
    header = [
        "",
        "workers",
        "cache",
        "chips/s",
        "step alone, chips/s",
        "waiting for data",
        "ms/chip",
        "trainer, ms/chip",
    ]
    rows = []
    for line in results:
        if "error" in line:
            rows.append([line["cell"], "", "", line["error"].partition(":")[0], *[""] * (len(header) - 4)])
            continue
        name = line["kind"]
        if line.get("is_flipped"):
            name += ", mirrored"
        step = line.get("step_chips_per_second")
        wait = line.get("data_wait")
        trainer = line.get("trainer_milliseconds_per_chip")
        rows.append(
            [
                name,
                str(line["workers"]),
                line["cache"],
                f"{line['chips_per_second']:.4g}",
                "" if step is None else f"{step:.4g}",
                "" if wait is None else f"{wait:.1%}",
                f"{1e3 / line['chips_per_second']:.3g}",
                "" if trainer is None else f"{trainer:.3g}",
            ]
        )
    return markdown(header, rows)


if __name__ == "__main__":
    main()
