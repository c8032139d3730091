"""Measure inference with the paper's test pyramid: images per second, peak memory, and time by stage.

    python benchmarks/inference.py --annotations test.json --device cuda --lines inference.jsonl

The images are searched by `Detector.predict_many` at the levels of the experiment, from files or, with `decoded`, from
arrays in memory; `32 MP` has batches of 32 million pixels instead of the experiment's. The networks have initial
weights; `--weights` names pretrained ones for the backbone of MobileNetV2. The scores of such networks are all alike:
all classes of all proposals would be detections, or none. Class weights and the background's bias are therefore
adjusted until `--detections` class scores of each proposal exceed the threshold, on average over the first image, as
with a trained detector. The table has the detections of an image before and after merging.

Time is divided by what the main thread does: it waits for pixels that other threads read; runs the network, which
includes proposals, copies to the device, and the results' way back; merges the levels; and the rest.
"""

import argparse
import functools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from device import Cell, add_options, device_name, markdown, open_lines, run_in_turn, synchronize

import sniper.inference.detector as detector_module
import sniper.inference.search as search_module
from sniper.chips import LevelSpec
from sniper.config.experiment import ExperimentSpec
from sniper.config.loading import load_experiment
from sniper.data.datasets import Dataset, load_dataset
from sniper.data.images.files import load_image
from sniper.inference.detector import Detector
from sniper.inference.sources import ImageSource
from sniper.models.build import build_detector
from sniper.models.spec import Precision
from sniper.models.two_stage import TwoStageDetector

CONFIGS = Path(__file__).parents[1] / "configs"
PAPER, LIGHT = "coco_r101_paper", "coco_mobilenetv2_paper"
NUM_CLASSES = 80
LARGE_BATCH = 32.0  # megapixels
LOGIT_SPREAD = 2.0  # standard deviation of class logits


@dataclass(frozen=True, kw_only=True)
class CellSpec:
    """What a cell measures.

    Attributes:
        name: of the experiment.
        precision: of autocast.
        is_decoded: whether images are arrays in memory instead of files.
        batch_megapixels: of a batch; None is the experiment's.
    """

    name: str
    precision: Precision
    is_decoded: bool = False
    batch_megapixels: float | None = None

    def __str__(self) -> str:
        parts = [self.name, self.precision, "decoded" if self.is_decoded else "files"]
        return ":".join(parts if self.batch_megapixels is None else [*parts, f"{self.batch_megapixels:g}MP"])


CELLS = (
    CellSpec(name=PAPER, precision="bf16"),
    CellSpec(name=LIGHT, precision="bf16"),
    CellSpec(name=PAPER, precision="bf16", batch_megapixels=LARGE_BATCH),
    CellSpec(name=PAPER, precision="fp32"),
    CellSpec(name=LIGHT, precision="bf16", is_decoded=True),
    CellSpec(name=LIGHT, precision="fp32"),
    CellSpec(name=PAPER, precision="bf16", is_decoded=True),
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure inference with the paper's test pyramid.")
    add_options(parser)
    parser.add_argument("--annotations", type=Path, required=True, help="COCO JSON file")
    parser.add_argument("--images", type=Path, help="folder that its file names are relative to")
    parser.add_argument("--weights", type=Path, help="pretrained weights of MobileNetV2")
    parser.add_argument("--limit", type=int, default=64, help="images, after 8 for warm-up")
    parser.add_argument("--detections", type=float, default=5.0, help="of a proposal, before merging")
    options = parser.parse_args()
    if options.tiny:
        options.limit = 2
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    device = torch.device(options.device)
    dataset = load_dataset(options.annotations, image_root=options.images)
    lines = open_lines(options, "inference")
    cells: dict[str, Cell] = {str(cell): functools.partial(measure, cell, dataset, options) for cell in CELLS}
    run_in_turn(cells, lines, device, only=options.only)
    print(to_table(lines.results))


def measure(cell: CellSpec, dataset: Dataset, options: argparse.Namespace) -> Mapping[str, Any]:
    device = torch.device(options.device)
    spec = build_spec(cell, options)
    paths = [dataset[index].path for index in range(min(options.limit, len(dataset)))]
    model = build_detector(spec.model, num_classes=NUM_CLASSES, has_weights=True)
    assert isinstance(model, TwoStageDetector)
    model = model.to(device).eval()
    first = torch.from_numpy(load_image(paths[0], spec.data.read).copy()).permute(2, 0, 1).to(device)
    spread_scores(model, first, spec=spec, per_proposal=options.detections)
    detector = Detector.from_model(model, spec=spec, categories=(), device=device)
    sources: list[ImageSource] = list(paths)
    if cell.is_decoded:
        sources = [load_image(path, spec.data.read) for path in paths]
    num_before = 0
    for _ in detector.predict_many(sources[:8]):  # warm-up: libraries of the GPU, kernels of merging
        pass
    synchronize(device)
    spent = dict.fromkeys(("read", "network", "merge"), 0.0)

    def count_detections(call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(detections: Any, *args: Any) -> Any:
            nonlocal num_before
            num_before += len(detections)
            return call(detections, *args)

        return counted

    detector = replace(detector, detect=timed(detector.detect, "network", spent))
    with (
        patched(detector_module, "merge", lambda call: count_detections(timed(call, "merge", spent))),
        patched(search_module._Batch, "wait_for_pixels", lambda call: timed(call, "read", spent)),
    ):
        started = time.perf_counter()
        num_after = sum(len(found) for found in detector.predict_many(sources) if found is not None)
        seconds = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None
    shares = {stage: time_of_stage / seconds for stage, time_of_stage in spent.items()}
    return {
        "config": cell.name,
        "precision": cell.precision,
        "source": "decoded" if cell.is_decoded else "files",
        "batch_megapixels": spec.predict.batch_megapixels,
        "device": device_name(device),
        "cores": os.cpu_count(),
        "images": len(sources),
        "images_per_second": len(sources) / seconds,
        "detections_before_merging": num_before / len(sources),
        "detections": num_after / len(sources),
        "peak_gb": peak,
        "shares": {**shares, "rest": 1 - sum(shares.values())},
    }


def build_spec(cell: CellSpec, options: argparse.Namespace) -> ExperimentSpec:
    spec = load_experiment(CONFIGS / f"{cell.name}.yaml")
    weights = options.weights if cell.name == LIGHT else None
    backbone = replace(
        spec.model.backbone, pretrained=False, weights=None if weights is None else str(weights)
    )
    predict = replace(spec.predict, precision=cell.precision)
    if cell.batch_megapixels is not None:
        predict = replace(predict, batch_megapixels=cell.batch_megapixels)
    if options.tiny:
        predict = replace(predict, levels=tuple(map(shrunk, predict.levels)))
    return replace(spec, model=replace(spec.model, backbone=backbone), predict=predict)


def shrunk(level: LevelSpec) -> LevelSpec:
    """Return a level with sides of an eighth."""
    return replace(
        level,
        short_side=cast(int, level.short_side) // 8,
        max_long_side=cast(int, level.max_long_side) // 8,
    )


def spread_scores(
    model: TwoStageDetector, image: torch.Tensor, *, spec: ExperimentSpec, per_proposal: float
) -> None:
    """Adjust the classifier until a proposal has so many detections on average, before merging.

    Raises:
        ValueError: if no bias of the background leads to about as many.
    """
    logits = []
    hook = model.roi_head.classes.register_forward_hook(lambda *call: logits.append(call[2].float()))
    with torch.inference_mode():
        model.detect([image])
    hook.remove()
    (initial,) = logits
    centered = initial - initial.mean(dim=0)
    factor = LOGIT_SPREAD / centered.std().clamp(min=1e-6)
    spread = centered * factor
    low, high = -50.0, 50.0
    for _ in range(30):
        bias = (low + high) / 2
        shifted = torch.cat([spread[:, :-1], spread[:, -1:] + bias], dim=1).softmax(dim=1)[:, :-1]
        num_detections = (shifted >= model.spec.roi_head.score_threshold).sum(dim=1).float().mean().item()
        low, high = (bias, high) if num_detections > per_proposal else (low, bias)
    if not 0.5 * per_proposal < num_detections < 2 * per_proposal:
        raise ValueError(f"{num_detections:g} detections of a proposal instead of {per_proposal:g}")
    classes = model.roi_head.classes
    with torch.no_grad():
        mean = initial.mean(dim=0)
        classes.bias.sub_(mean).mul_(factor)
        classes.weight.mul_(factor)
        classes.bias[-1] += bias


def timed(call: Callable[..., Any], stage: str, spent: dict[str, float]) -> Callable[..., Any]:
    """Wrap a function to add its duration to a stage."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return call(*args, **kwargs)
        finally:
            spent[stage] += time.perf_counter() - started

    return wrapper


@contextmanager
def patched(owner: Any, name: str, wrap: Callable[[Any], Any]) -> Iterator[None]:
    """Replace an attribute by its wrapper within a block."""
    plain = getattr(owner, name)
    setattr(owner, name, wrap(plain))
    try:
        yield
    finally:
        setattr(owner, name, plain)


def to_table(results: Sequence[Mapping[str, Any]]) -> str:
    stages = ["read", "network", "merge", "rest"]
    header = [
        *("", "precision", "images", "MP/batch", "images/s", "peak, GB"),
        *("detections before merging", "after", *stages),
    ]
    rows = []
    for line in results:
        if "error" in line:
            rows.append([line["cell"], *[""] * 3, line["error"].partition(":")[0], *[""] * 7])
            continue
        peak = line["peak_gb"]
        rows.append(
            [
                line["config"],
                line["precision"],
                line["source"],
                f"{line['batch_megapixels']:g}",
                f"{line['images_per_second']:.3g}",
                "" if peak is None else f"{peak:.2f}",
                f"{line['detections_before_merging']:.0f}",
                f"{line['detections']:.0f}",
                *(f"{line['shares'][stage]:.0%}" for stage in stages),
            ]
        )
    return markdown(header, rows)


if __name__ == "__main__":
    main()
