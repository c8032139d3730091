"""Speed and accuracy of several ways of prediction with the same weights: a table and one JSON line.

    python benchmarks/predict.py RUN annotations.json --limit 50 --sahi ENV

The ways:

- `one level`: the whole image with a short side of 800, at most 1333 long, the usual setting of detectors.
- `plain pyramid`: the levels of the run, one image and one level at a time, NMS class by class in a loop.
- `ours`: `Detector`. `ours, unfolded` does not fold batch norm. `ours ×1` omits the levels that enlarge, to see the
  same scale as SAHI.
- `SAHI 512`: SAHI's sliced prediction with slices of 512, an overlap of 0.2 and the whole image, its other settings at
  their defaults, with the same detector (folded) at the image's own scale. `SAHI 512 ×2` enlarges every slice twice.

Detections below `--min-score` are dropped in every way. Each way runs in a separate process, for its peak memory.
`--sahi` is a folder with SAHI and its dependencies: `pip install --no-deps --target ENV sahi shapely fire click tqdm
requests termcolor`. `merge` is the time of merging 80 classes of 900 boxes, 200 kept.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from torchvision.ops import nms

from sniper.chips import LevelSpec
from sniper.config.experiment import ExperimentSpec
from sniper.config.loading import load_experiment
from sniper.data.datasets import load_dataset
from sniper.data.images.files import load_image, open_image
from sniper.data.images.regions import cut_window
from sniper.evaluation.coco import evaluate
from sniper.geometry import Detections
from sniper.geometry.nms import soft_nms
from sniper.inference.detector import Detector, to_coco
from sniper.models.build import autocast, build_detector
from sniper.models.two_stage import TwoStageDetector
from sniper.models.weights import fill_module
from sniper.runs.run import Run

SLICE = 512
OVERLAP = 0.2
ONE_LEVEL = LevelSpec(short_side=800, max_long_side=1333)

Search = Callable[[Sequence[Path]], Sequence[Detections]]


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed and accuracy of several ways of prediction.")
    parser.add_argument("run", type=Path)
    parser.add_argument("annotations", type=Path)
    parser.add_argument("--limit", type=int, default=50)
    parser.add_argument("--min-score", type=float, default=0.05)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sahi", type=Path)
    parser.add_argument("--ways", nargs="+", default=None, choices=list(WAYS))
    parser.add_argument("--way", choices=list(WAYS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measure(options)))
        return
    ways = options.ways or [way for way in WAYS if options.sahi or not way.startswith("SAHI")]
    results = {}
    for way in ways:
        command = [sys.executable, __file__, *sys.argv[1:], "--way", way]
        path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(options.sahi or "")]))
        done = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
        )
        results[way] = json.loads(done.stdout.splitlines()[-1])
        print(f"{way:16}", json.dumps(results[way]), flush=True)
    print(
        json.dumps({"benchmark": "predict", "cores": os.cpu_count(), "ways": results, "merge": time_merge()})
    )


def measure(options: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(options.device)
    if device.type == "cpu":
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    dataset = load_dataset(options.annotations)
    dataset = dataset.select(np.arange(min(options.limit, len(dataset))))
    records = list(dataset)
    run = Run.open(options.run)
    spec = load_experiment(run.config_path)
    spec = replace(spec, predict=replace(spec.predict, score_threshold=options.min_score))
    tensors, categories, source = run.load_weights()
    model = build_detector(spec.model, num_classes=len(categories), has_weights=False)
    fill_module(model, tensors, source=source)
    search = WAYS[options.way](
        model.to(device).eval(), spec, device, [category.name for category in categories]
    )
    search([records[0].path])  # warm-up: compiles kernels, allocates memory
    started, cpu = time.perf_counter(), time.process_time()
    per_image = search([record.path for record in records])
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    results = [
        entry
        for record, detections in zip(records, per_image, strict=True)
        for entry in to_coco(detections, image_id=record.image_id, categories=categories)
    ]
    scores = evaluate(results, dataset)
    names = ("ap", "ap50", "ap_small", "ap_medium", "ap_large", "ar")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 1e9
    return {
        **{name: round(getattr(scores, name), 4) for name in names},
        "images_per_s": round(len(records) / seconds, 4),
        "cpu_s_per_image": round(cpu / len(records), 3),
        "detections_per_image": round(len(results) / len(records), 1),
        "peak_gb": round(peak, 2),
    }


def search_ours(
    model: TwoStageDetector, spec: ExperimentSpec, device: torch.device, _: Sequence[str]
) -> Search:
    detector = Detector.from_model(model, spec=spec, categories=(), device=device)
    return lambda paths: [detections for detections in detector.predict_many(paths) if detections is not None]


def search_unfolded(
    model: TwoStageDetector, spec: ExperimentSpec, device: torch.device, _: Sequence[str]
) -> Search:
    detector = replace(
        Detector.from_model(model, spec=spec, categories=(), device=device),
        detect=lambda images: detect(model, images, spec, device),
    )
    return lambda paths: [detections for detections in detector.predict_many(paths) if detections is not None]


def search_one_level(
    model: TwoStageDetector, spec: ExperimentSpec, device: torch.device, names: Sequence[str]
) -> Search:
    predict = replace(spec.predict, levels=(ONE_LEVEL,))
    return search_ours(model, replace(spec, predict=predict), device, names)


def search_without_enlarging(
    model: TwoStageDetector, spec: ExperimentSpec, device: torch.device, names: Sequence[str]
) -> Search:
    finest, *others = (rule for rule in spec.predict.levels if rule.factor is None or rule.factor <= 1)
    levels = (replace(finest, at_least=0.0), *others)
    return search_ours(model, replace(spec, predict=replace(spec.predict, levels=levels)), device, names)


def search_plainly(
    model: TwoStageDetector, spec: ExperimentSpec, device: torch.device, _: Sequence[str]
) -> Search:
    def search_one(path: Path) -> Detections:
        reader = open_image(path, spec.data.read)
        per_level = []
        for index, rule in enumerate(spec.predict.levels):
            level = rule.at(width=reader.width, height=reader.height, index=index)
            pixels = cut_window(reader, level, (0, 0, level.width, level.height), largest_reduction=1)
            image = torch.from_numpy(pixels.copy()).permute(2, 0, 1).to(device)
            (detections,) = detect(model, [image], spec, device)
            detections = replace(detections, boxes=level.to_image(detections.boxes))
            is_valid = level.valid_range.contains(detections.boxes)
            per_level.append(detections[is_valid & (detections.scores >= spec.predict.score_threshold)])
        joined = Detections.join(per_level)
        per_class = []
        for label in range(model.num_classes):
            of_class = joined[joined.labels == label]
            kept = nms(torch.from_numpy(of_class.boxes), torch.from_numpy(of_class.scores), 0.5)
            per_class.append(of_class[kept.numpy()])
        merged = Detections.join(per_class)
        return merged[np.argsort(-merged.scores, kind="stable")[: spec.predict.max_detections]]

    return lambda paths: [search_one(path) for path in paths]


def detect(
    model: TwoStageDetector, images: Sequence[torch.Tensor], spec: ExperimentSpec, device: torch.device
) -> Sequence[Detections]:
    with torch.inference_mode(), autocast(spec.predict.precision, device):
        return model.detect(images)


def search_with_sahi(zoom: int) -> Callable[..., Search]:
    def build(
        model: TwoStageDetector, spec: ExperimentSpec, device: torch.device, names: Sequence[str]
    ) -> Search:
        from sahi.models.base import DetectionModel
        from sahi.predict import get_sliced_prediction
        from sahi.prediction import ObjectPrediction

        searcher = model.for_inference()

        class Ours(DetectionModel):  # type: ignore[misc]  # sahi has no types
            def set_model(self, model: Any, **_: Any) -> None:
                self.model = model

            def perform_inference(self, image: np.ndarray) -> None:
                pixels = torch.from_numpy(image.copy()).permute(2, 0, 1).to(device)
                if zoom > 1:
                    enlarged = torch.nn.functional.interpolate(
                        pixels[None].float(), scale_factor=zoom, mode="bilinear"
                    )
                    pixels = enlarged[0].round().to(torch.uint8)
                self._original_predictions = detect(self.model, [pixels], spec, device)

            def _create_object_prediction_list_from_original_predictions(
                self, shift_amount_list: Any = None, full_shape_list: Any = None
            ) -> None:
                shifts = shift_amount_list or [[0, 0]]
                shifts = shifts if isinstance(shifts[0], list) else [shifts]
                shapes = full_shape_list
                if shapes is not None and not isinstance(shapes[0], list):
                    shapes = [shapes]
                self._object_prediction_list_per_image = [
                    [
                        ObjectPrediction(
                            bbox=(box / zoom).tolist(),
                            category_id=int(label),
                            category_name=names[label],
                            score=float(score),
                            shift_amount=shifts[index],
                            full_shape=None if shapes is None else shapes[index],
                        )
                        for box, score, label in zip(
                            detections.boxes, detections.scores, detections.labels, strict=True
                        )
                        if score >= self.confidence_threshold
                    ]
                    for index, detections in enumerate(self._original_predictions)
                ]

        driver = Ours(
            model=searcher,
            device=str(device),
            confidence_threshold=spec.predict.score_threshold,
            category_mapping={str(label): name for label, name in enumerate(names)},
        )

        def search_one(path: Path) -> Detections:
            predictions = get_sliced_prediction(
                load_image(path, spec.data.read),
                driver,
                slice_height=SLICE,
                slice_width=SLICE,
                overlap_height_ratio=OVERLAP,
                overlap_width_ratio=OVERLAP,
                verbose=0,
            ).object_prediction_list
            return Detections(
                boxes=np.array(
                    [prediction.bbox.to_xyxy() for prediction in predictions], dtype=np.float64
                ).reshape(-1, 4),
                scores=np.array([prediction.score.value for prediction in predictions], dtype=np.float64),
                labels=np.array([prediction.category.id for prediction in predictions], dtype=np.int64),
            )

        return lambda paths: [search_one(path) for path in paths]

    return build


WAYS: dict[str, Callable[..., Search]] = {
    "one level": search_one_level,
    "plain pyramid": search_plainly,
    "ours": search_ours,
    "ours, unfolded": search_unfolded,
    "ours ×1": search_without_enlarging,
    "SAHI 512": search_with_sahi(1),
    "SAHI 512 ×2": search_with_sahi(2),
}


def time_merge(repeats: int = 9) -> dict[str, float]:
    """Time the merging of 80 classes of 900 boxes, milliseconds."""
    generator = np.random.default_rng(0)
    low = generator.uniform(0, 900, (80 * 900, 2))
    crowd = Detections(
        boxes=np.concatenate([low, low + generator.uniform(10, 200, low.shape)], axis=1),
        scores=generator.uniform(0.1, 1, len(low)) ** 3,
        labels=np.repeat(np.arange(80), 900),
    )
    medians = {}
    for name, max_detections in (("200 kept", 200), ("all kept", None)):
        times = []
        for _ in range(repeats):
            started = time.perf_counter()
            soft_nms(crowd, max_detections=max_detections)
            times.append((time.perf_counter() - started) * 1e3)
        medians[name] = round(statistics.median(times), 2)
    return medians


if __name__ == "__main__":
    main()
