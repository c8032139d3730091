"""Measure prediction by engine: torch, ONNX Runtime and OpenVINO, with the detector of one run and the same images.

    OMP_NUM_THREADS=1 python benchmarks/engines.py runs/data test.json --limit 100

Every engine searches all images from their files to merged detections, as `sniper predict` does, and is scored. Rounds
are interleaved: each engine takes its turn on a part of the images, so that other work on the machine slows all alike.
Times are those of the processor, of all threads. The first round, which compiles kernels and graphs, does not count.
"""

import argparse
import os
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NUMBA_NUM_THREADS", "1")

import numpy as np
import torch

from sniper.config.experiment import ExperimentSpec
from sniper.config.loading import load_experiment
from sniper.data.datasets import Dataset, load_dataset
from sniper.data.datasets.categories import match_categories
from sniper.evaluation.coco import score
from sniper.evaluation.pair import GroundTruth
from sniper.geometry import Detections
from sniper.inference.detector import Detector
from sniper.inference.exporting import load_engine
from sniper.inference.validation import pair_detections
from sniper.models.spec import Precision
from sniper.runs.run import Run

ENGINES: dict[str, tuple[str, Precision]] = {
    "torch fp32": ("torch", "fp32"),
    "torch bf16": ("torch", "bf16"),
    "ONNX Runtime fp32": ("onnx", "fp32"),
    "OpenVINO fp32": ("openvino", "fp32"),
    "OpenVINO bf16": ("openvino", "bf16"),
}
WARM_UP = 20  # images, after which OpenVINO has compiled its graph for their sides


@dataclass
class Measured:
    """What an engine has done.

    Attributes:
        detector: the detector in the engine.
        seconds: of the processor.
        found: detections by index of the image.
    """

    detector: Detector
    seconds: float = 0.0
    found: dict[int, Detections] = field(default_factory=dict)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure prediction by engine.")
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("annotations", type=Path, help="data set to search and to score against")
    parser.add_argument("--limit", type=int, help="images")
    parser.add_argument(
        "--rounds", type=int, default=4, help="parts of the images, one for each turn of an engine"
    )
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    run = Run.open(options.run)
    spec = load_experiment(run.config_path)
    dataset = load_dataset(options.annotations)
    count = min(len(dataset), options.limit or len(dataset))
    measured = {name: Measured(load(run, spec, *engine)) for name, engine in ENGINES.items()}
    for each in measured.values():
        search(each, dataset, range(WARM_UP))
        each.seconds = 0.0
    for part in range(options.rounds):
        for each in measured.values():
            search(each, dataset, range(part, count, options.rounds))
    truth = GroundTruth.of(dataset).select_images(np.arange(count))
    match = match_categories(measured["torch fp32"].detector.categories, dataset.categories)
    reference = measured["torch fp32"].seconds
    print("| engine | images/s | ratio | AP | AP50 |\n|---|---|---|---|---|")
    for name, each in measured.items():
        relabelled = {index: match.relabel(each.found[index]) for index in sorted(each.found)}
        scores = score(pair_detections(relabelled, truth))
        print(
            f"| {name} | {count / each.seconds:.2f} | {reference / each.seconds:.2f} | {scores.ap:.4f} | "
            f"{scores.ap50:.4f} |"
        )


def load(run: Run, spec: ExperimentSpec, engine: str, precision: Precision) -> Detector:
    """Load the detector of a run in an engine."""
    spec = replace(spec, predict=replace(spec.predict, precision=precision))
    if engine == "torch":
        return Detector.load(run, "cpu", spec=spec)
    return load_engine(run, "onnx" if engine == "onnx" else "openvino", spec=spec)


def search(measured: Measured, images: Dataset, indices: range) -> None:
    """Search some images, and add what that took."""
    started = time.process_time()
    found = measured.detector.predict_many(images[index] for index in indices)
    for index, detections in zip(indices, found, strict=True):
        assert detections is not None
        measured.found[index] = detections
    measured.seconds += time.process_time() - started


if __name__ == "__main__":
    main()
