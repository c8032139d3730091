"""Measure what a focus saves: with the truth known, and with the detector of a run. One JSON line for each.

    python benchmarks/focus.py oracle hit_uav/train.json visdrone_val.json
    python benchmarks/focus.py curve RUN hit_uav/test.json --limit 200
    python benchmarks/focus.py seconds RUN hit_uav/test.json --limit 40 --focus '{min_score: 0.4, window: 256}'
    python benchmarks/focus.py large RUN hit_uav/test.json --focus '{min_score: 0.4, window: 256}' \\
        --levels '[{factor: 1.5, below: 48}, {factor: 0.4, at_least: 20}]'

`oracle` reads annotations alone. Of each level but the coarsest, cells of 256 level pixels that show an object of its
range are searched, and 64 pixels around them: the share of the finest level, and how many times as much a whole search
costs. The levels are those that `sniper plan` suggests, or `--levels`.

`curve` searches the images of even index, on which settings are chosen, and scores them on the others: by the
detections of coarser levels and by the focus head (`model.focus`), as many windows of the same side at random, and one
level, whose scale takes as long. `time` and `pixels` are shares of the whole search.

`seconds` searches with and without a focus in turn, on one thread: seconds of the processor, which other programs on
the machine change little.

`large` searches an image of 12,000×9,000 pixels in a process of its own for each way: a tenth of its area shows images
of the file side by side, the rest patches of them without objects. `--levels` are those of the search: a level with
`long_side` or `short_side` would shrink a large image beyond recognition.
"""

import argparse
import json
import math
import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

os.environ.setdefault("OMP_NUM_THREADS", "1")

import cv2
import numpy as np
import yaml
from jaxtyping import Bool, Float, Int64, UInt8

from sniper.chips import ImageBoxes, Level, LevelSpec
from sniper.config.experiment import FocusSpec, widened
from sniper.data.datasets import Dataset, load_dataset
from sniper.data.datasets.categories import CategoryMatch, match_categories
from sniper.data.epoch import to_image_boxes
from sniper.data.images.files import load_image
from sniper.evaluation.pair import GroundTruth
from sniper.geometry.boxes import Sides, intersections, iou
from sniper.inference.detector import Detector
from sniper.inference.focus import FocusWindow, LevelResult, choose_windows
from sniper.inference.focus_curve import (
    CUES,
    FocusPoint,
    Replay,
    WindowCost,
    candidates_for,
    choose_focus,
    measure_replays,
)
from sniper.inference.windows import GRID, Window
from sniper.planning.suggest import suggest_pyramid
from sniper.reports.focus import best_points
from sniper.specs import parse_json

CELL = 256  # level pixels
PATCH = 128  # image pixels
LOSSES = (0.002, 0.005, 0.01, 0.02)
SPEED_UPS = (1.5, 2.0, 3.0)

Pixels: TypeAlias = UInt8[np.ndarray, "h w 3"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    oracle = commands.add_parser("oracle")
    oracle.set_defaults(measure=measure_oracle)
    oracle.add_argument("files", type=Path, nargs="+", help="COCO JSON")
    oracle.add_argument(
        "--levels", help="as in an experiment: [{factor: 2, below: 40}, {long_side: 256, at_least: 30}]"
    )
    for name, measure in (("curve", measure_curve), ("seconds", measure_seconds), ("large", measure_large)):
        command = commands.add_parser(name)
        command.set_defaults(measure=measure)
        command.add_argument("run", type=Path)
        command.add_argument("file", type=Path, help="COCO JSON, with images")
        command.add_argument("--limit", type=int, help="images, the first ones")
        if name == "seconds":
            command.add_argument("--focus", required=True, help="as predict.focus")
            command.add_argument("--repeats", type=int, default=3)
        if name == "large":
            command.add_argument("--focus", required=True, nargs="+", help="as predict.focus; several")
            command.add_argument("--levels", required=True, help="as in an experiment")
            command.add_argument("--sides", type=int, nargs=2, default=(12_000, 9_000), help="in pixels")
            command.add_argument("--objects", type=int, default=300, help="about as many")
    options = parser.parse_args()
    options.measure(options)


def measure_oracle(options: argparse.Namespace) -> None:
    """Print for each data set what a search costs that knows where the objects are."""
    for path in options.files:
        images = to_image_boxes(load_dataset(path, has_images=False))
        levels = parse_levels(options.levels) if options.levels else suggest_levels(images)
        result = {"benchmark": "focus", "file": "/".join(path.parts[-2:]), **cost_with_truth(levels, images)}
        print(json.dumps(result), flush=True)


def parse_levels(text: str) -> tuple[LevelSpec, ...]:
    """Return the levels that are given as in an experiment."""
    return tuple(LevelSpec(**level) for level in yaml.safe_load(text))


def suggest_levels(images: ImageBoxes) -> tuple[LevelSpec, ...]:
    """Return the levels of inference of the pyramid that is suggested for a data set."""
    suggestion = suggest_pyramid(images)
    if suggestion is None:
        raise SystemExit("no objects")
    return widened(suggestion.pyramid.levels)


def cost_with_truth(levels: Sequence[LevelSpec], images: ImageBoxes) -> dict[str, Any]:
    """Return the share of the finest level that shows objects, and the cost of a whole search relative to it."""
    whole = np.zeros(len(levels))
    focused = np.zeros(len(levels))
    for index in range(len(images.widths)):
        rows = slice(images.offsets[index], images.offsets[index + 1])
        boxes = images.boxes[rows][images.is_required[rows]]
        for number, spec in enumerate(levels):
            level = spec.at(width=int(images.widths[index]), height=int(images.heights[index]), index=number)
            of_level = boxes[level.valid_range.contains(boxes)]
            blocks = find_blocks(level, level.to_level(of_level))
            whole[number] += blocks.size
            focused[number] += blocks.size if number + 1 == len(levels) else blocks.sum()
    return {
        "images": len(images.widths),
        "levels": [rule(level) for level in levels],
        "share_of_finest": round(float(focused[0] / whole[0]), 3),
        "times_cheaper": round(float(whole.sum() / focused.sum()), 2),
    }


def rule(level: LevelSpec) -> str:
    """Return a level as text."""
    scale = (
        f"x{level.factor:g}" if level.factor is not None else f"side {level.long_side or level.short_side}"
    )
    return f"{scale}, {level.valid_range.describe()}"


def find_blocks(level: Level, boxes: Float[np.ndarray, "n 4"]) -> Bool[np.ndarray, "y x"]:
    """Return which blocks of 64 level pixels are searched: those of cells with objects, and one block around them.

    Args:
        level: the level.
        boxes: (n, 4) xyxy, level frame, of its objects.
    """
    num_cells = [-(-side // CELL) for side in (level.height, level.width)]
    is_full = np.zeros(num_cells, dtype=np.bool_)
    for x1, y1, x2, y2 in (boxes / CELL).tolist():
        is_full[int(y1) : int(np.ceil(y2)), int(x1) : int(np.ceil(x2))] = True
    per_cell = CELL // GRID
    blocks = np.pad(is_full.repeat(per_cell, axis=0).repeat(per_cell, axis=1), 1)
    rows, columns = (blocks.shape[axis] - 2 for axis in (0, 1))
    dilated = np.logical_or.reduce(
        [blocks[y : y + rows, x : x + columns] for y in range(3) for x in range(3)]
    )
    return dilated[: -(-level.height // GRID), : -(-level.width // GRID)]


@dataclass(frozen=True, kw_only=True, eq=False)
class Objects:
    """The objects of a made-up image.

    Attributes:
        boxes: (n, 4) xyxy, pixels of the image.
        labels: (n,) 0..C-1, in the order of the data set.
    """

    boxes: Float[np.ndarray, "n 4"]
    labels: Int64[np.ndarray, " n"]


@dataclass(frozen=True, kw_only=True)
class RandomWindows:
    """Chooses as many windows of the same side as a focus, at random from a grid.

    Attributes:
        generator: draws them.
    """

    generator: np.random.Generator

    def __call__(
        self, level: Level, coarser: Sequence[LevelResult], *, focus: FocusSpec, limit: int | Sides
    ) -> Sequence[Window]:
        chosen = choose_windows(level, coarser, focus=focus, limit=limit)
        if not all(isinstance(window, FocusWindow) for window in chosen):
            return chosen
        starts = [
            [
                min(start, max(-(-(side - focus.window) // GRID) * GRID, 0))
                for start in range(0, side, focus.window)
            ]
            for side in (level.width, level.height)
        ]
        corners = [
            (x, y, min(x + focus.window, level.width), min(y + focus.window, level.height))
            for y in starts[1]
            for x in starts[0]
        ]
        count = min(len(chosen), len(corners))
        drawn = [corners[row] for row in self.generator.permutation(len(corners))[:count].tolist()]
        return [
            FocusWindow(level=level, corners=each, others=tuple(other for other in drawn if other != each))
            for each in drawn
        ]


@dataclass(frozen=True, kw_only=True, eq=False)
class Half:
    """A half of the images.

    Attributes:
        images: of the half.
        truth: of them.
        match: of the classes.
        cost: of the detector's windows.
    """

    images: Dataset
    truth: GroundTruth
    match: CategoryMatch
    cost: WindowCost

    @classmethod
    def of(cls, dataset: Dataset, *, first: int, detector: Detector, cost: WindowCost) -> "Half":
        """Return every second image."""
        images = dataset.select(np.arange(first, len(dataset), 2))
        return cls(
            images=images,
            truth=GroundTruth.of(images),
            match=match_categories(detector.categories, images.categories),
            cost=cost,
        )

    def measure(self, detector: Detector, replays: Sequence[Replay]) -> list[FocusPoint]:
        """Search the images as a whole, and measure what each replay takes of it."""
        return measure_replays(
            detector, self.images, truth=self.truth, match=self.match, replays=replays, cost=self.cost
        )


def measure_curve(options: argparse.Namespace) -> None:
    """Print AP and pixels of settings that were chosen on other images, and of the controls."""
    detector, dataset = load(options)
    cues = CUES if detector.detect_focused is not None else CUES[:1]
    candidates = candidates_for(detector.spec.levels, cues=cues)
    cost = WindowCost.measure(detector)
    chosen_on, scored_on = (Half.of(dataset, first=first, detector=detector, cost=cost) for first in (0, 1))

    def replays(*, is_random: bool = False) -> list[Replay]:
        of_focus = [
            Replay(
                spec=detector.spec,
                focus=focus,
                choose=RandomWindows(generator=np.random.default_rng(0)) if is_random else choose_windows,
            )
            for focus in candidates
        ]
        return of_focus if is_random else [Replay(spec=detector.spec, focus=None), *of_focus]

    before = chosen_on.measure(detector, replays())
    points = scored_on.measure(detector, [*replays(), *replays(is_random=True)])
    whole, after, at_random = points[0], points[1 : len(candidates) + 1], points[len(candidates) + 1 :]
    result = {
        "run": options.run.name,
        "file": "/".join(options.file.parts[-2:]),
        "scored": len(scored_on.images),
    }
    print_point({**result, "way": "whole search"}, whole)
    for source in cues:
        of_source = [point for point in after if point.focus is not None and point.focus.cues == source]
        for point in best_points(of_source):
            print_point({**result, "way": source, "is_chosen_on_others": False}, point)
    for source in cues:
        rows = [row for row, focus in enumerate(candidates) if focus.cues == source]
        for name, limits in (("loss", LOSSES), ("speed_up", SPEED_UPS)):
            for limit in limits:
                chosen = choose_focus(
                    [before[0], *(before[row + 1] for row in rows)],
                    loss=limit if name == "loss" else 0.0,
                    speed_up=limit if name == "speed_up" else None,
                )
                if chosen.focus is None:
                    continue
                row = candidates.index(chosen.focus)
                asked = {**result, name: limit, "is_chosen_on_others": True}
                print_point({**asked, "way": source}, after[row])
                print_point({**asked, "way": f"random for {source}"}, at_random[row])
                if name == "speed_up":
                    one_level = measure_level(detector, scored_on, after[row], whole)
                    print_point({**asked, "way": f"one level for {source}"}, one_level)


def measure_level(detector: Detector, half: Half, point: FocusPoint, whole: FocusPoint) -> FocusPoint:
    """Return what one level finds whose scale takes as long, with objects of all sizes."""
    available = np.mean([record.width * record.height for record in half.images]) / 1e6
    megapixels = max(point.seconds - half.cost.per_window, 0.0) / half.cost.per_megapixel
    level = LevelSpec(factor=max(round(float(np.sqrt(megapixels / available)), 3), 0.05))
    single = replace(detector, spec=replace(detector.spec, levels=(level,)))
    (found,) = half.measure(single, [Replay(spec=single.spec, focus=None)])
    return replace(
        found, pixel_share=found.megapixels / whole.megapixels, time_share=found.seconds / whole.seconds
    )


def print_point(result: dict[str, Any], point: FocusPoint) -> None:
    focus = {} if point.focus is None else {"window": point.focus.window, "min_score": point.focus.min_score}
    line = {
        "benchmark": "focus",
        **result,
        **focus,
        "time": round(point.time_share, 3),
        "pixels": round(point.pixel_share, 3),
        "megapixels": round(point.megapixels, 3),
        "ap": round(point.ap, 4),
        "ap_small": round(point.ap_small, 4),
    }
    print(json.dumps(line), flush=True)


def load(options: argparse.Namespace) -> tuple[Detector, Dataset]:
    """Load the detector on the CPU, and the images."""
    dataset = load_dataset(options.file)
    if options.limit is not None:
        dataset = dataset.select(np.arange(min(options.limit, len(dataset))))
    return Detector.load(options.run, "cpu").with_focus(None), dataset


def parse_focus(text: str) -> FocusSpec:
    """Return the focus that is given as in an experiment."""
    return parse_json(json.dumps(yaml.safe_load(text)).encode(), FocusSpec)


def measure_seconds(options: argparse.Namespace) -> None:
    """Print the processor seconds of a search with a focus and without, in turn."""
    import torch

    torch.set_num_threads(1)
    detector, dataset = load(options)
    ways = {"whole": detector, "focus": detector.with_focus(parse_focus(options.focus))}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    pixels: dict[str, int] = {}
    records = list(dataset)
    for repeat in range(options.repeats + 1):
        for name, way in ways.items():
            started = time.process_time()
            results = [result for result in way.search(records) if result is not None]
            if repeat:  # the first warms up
                seconds[name].append(time.process_time() - started)
            pixels[name] = sum(result.num_pixels for result in results)
    ratios = [whole / part for whole, part in zip(seconds["whole"], seconds["focus"], strict=True)]
    line = {
        "benchmark": "focus",
        "run": options.run.name,
        "file": "/".join(options.file.parts[-2:]),
        "images": len(records),
        "pixels": round(pixels["focus"] / pixels["whole"], 3),
        **{
            f"seconds_{name}": round(statistics.median(values) / len(records), 4)
            for name, values in seconds.items()
        },
        "times_faster": [round(ratio, 2) for ratio in ratios],
    }
    print(json.dumps(line), flush=True)


def measure_large(options: argparse.Namespace) -> None:
    """Print processor seconds, memory and recall of searches of a large image, without a focus and with each."""
    dataset, levels = load_dataset(options.file), yaml.safe_load(options.levels)
    common = {"benchmark": "focus", "run": options.run.name, "file": "/".join(options.file.parts[-2:])}
    with TemporaryDirectory() as folder:
        path = Path(folder) / "large.png"
        truth = write_large(path, dataset, sides=options.sides, num_objects=options.objects)
        for focus in (None, *map(parse_focus, options.focus)):
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                found = pool.submit(search_large, options.run, path, levels, focus, truth).result()
            way = {"focus": None if focus is None else asdict(focus)}
            print(json.dumps({**common, "objects": len(truth.labels), **way, **found}), flush=True)


def write_large(path: Path, dataset: Dataset, *, sides: tuple[int, int], num_objects: int) -> Objects:
    """Write an image with objects in a tenth of its area, and return them.

    Images of the data set lie side by side in a rectangle of the same shape as the image, off its centre: the first
    ones that have enough objects for `num_objects` in all. Around it are patches without objects, drawn at random, each
    mirrored or not.
    """
    generator = np.random.default_rng(0)
    width, height = sides
    canvas = np.empty((height, width, 3), dtype=np.uint8)
    patches: list[Pixels] = []
    field = (int(width * math.sqrt(0.1)), int(height * math.sqrt(0.1)))
    left, top = width // 2, height // 3
    boxes, labels = [], []
    tiles: list[tuple[int, int, Pixels]] = []
    x = y = row = 0
    for record in dataset:
        pixels = load_image(record.path)
        patches += find_empty(pixels, record.boxes)
        least = num_objects / ((field[0] // record.width) * (field[1] // record.height))
        if (~record.is_crowd).sum() < least:
            continue
        if x + record.width > field[0]:
            x, y, row = 0, y + row, 0
        if y + record.height > field[1]:
            continue
        tiles.append((left + x, top + y, pixels))
        boxes.append(record.boxes[~record.is_crowd] + np.array([left + x, top + y] * 2))
        labels.append(record.labels[~record.is_crowd])
        x, row = x + record.width, max(row, record.height)
    if not patches:
        raise SystemExit(f"no patch of {PATCH} pixels without objects")
    for start_y in range(0, height, PATCH):
        for start_x in range(0, width, PATCH):
            patch = patches[int(generator.integers(len(patches)))][:, :: int(generator.choice([-1, 1]))]
            place = canvas[start_y : start_y + PATCH, start_x : start_x + PATCH]
            place[...] = patch[: place.shape[0], : place.shape[1]]
    for start_x, start_y, pixels in tiles:
        canvas[start_y : start_y + pixels.shape[0], start_x : start_x + pixels.shape[1]] = pixels
    cv2.imwrite(str(path), canvas[..., ::-1])
    return Objects(boxes=np.concatenate(boxes), labels=np.concatenate(labels))


def find_empty(pixels: Pixels, boxes: Float[np.ndarray, "n 4"]) -> list[Pixels]:
    """Return the squares of `PATCH` pixels of an image, side by side, that show no box."""
    rows, columns = (side // PATCH for side in pixels.shape[:2])
    corners = PATCH * np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), axis=-1).reshape(-1, 2)
    squares = np.concatenate([corners, corners + PATCH], axis=1).astype(np.float64)
    is_empty = ~(intersections(squares, boxes) > 0).any(axis=1)
    return [pixels[y : y + PATCH, x : x + PATCH] for x, y in corners[is_empty].tolist()]


def search_large(
    run: Path, path: Path, levels: list[dict[str, float]], focus: FocusSpec | None, truth: Objects
) -> dict[str, Any]:
    """Search an image, in a process of its own.

    Returns:
        processor seconds, the peak memory of the process in GB, how much of it the search added, and the share of the
        objects that 1,000 detections find with an IoU of 0.5 and their class.
    """
    import torch

    torch.set_num_threads(1)
    fields = {"max_detections": 1000, "levels": levels}
    detector = Detector.load(run, "cpu", predict=fields).with_focus(focus)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    detections = detector.predict(path)
    seconds = time.process_time() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    overlaps = iou(truth.boxes, detections.boxes) * (truth.labels[:, None] == detections.labels)
    return {
        "seconds": round(seconds, 1),
        "peak_gb": round(peak / 1e6, 2),
        "added_gb": round((peak - before) / 1e6, 2),
        "recall": round(float((overlaps.max(axis=1, initial=0.0) >= 0.5).mean()), 3),
    }


if __name__ == "__main__":
    main()
