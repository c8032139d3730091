"""Measure what a focus saves: with the truth known, and with the detector of a run. One JSON line for each.

    python benchmarks/focus.py oracle hit_uav/train.json visdrone_val.json
    python benchmarks/focus.py curve RUN hit_uav/test.json --limit 200
    python benchmarks/focus.py seconds RUN hit_uav/test.json --limit 40 --focus '{min_score: 0.4, window: 256}'

`oracle` reads annotations alone. Of each level but the coarsest, cells of 256 level pixels that show an object of its
range are searched, and 64 pixels around them: the share of the finest level, and how many times as much a whole search
costs. The levels are those that `sniper plan` suggests, or `--levels`.

`curve` searches the images of even index, on which settings are chosen, and scores them on the others: by the
detections of coarser levels and by the focus head (`model.focus`), as many windows of the same side at random, and one
level, whose scale takes as long. `time` and `pixels` are shares of the whole search.

`seconds` searches with and without a focus in turn, on one thread: seconds of the processor, which other programs on
the machine change little.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import yaml
from jaxtyping import Bool, Float

from sniper.chips import ImageBoxes, Level, LevelSpec
from sniper.config.experiment import FocusSpec, widened
from sniper.data.datasets import Dataset, load_dataset
from sniper.data.datasets.categories import CategoryMatch, match_categories
from sniper.data.epoch import to_image_boxes
from sniper.evaluation.pair import GroundTruth
from sniper.geometry.boxes import Sides
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
LOSSES = (0.002, 0.005, 0.01, 0.02)
SPEED_UPS = (1.5, 2.0, 3.0)


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
    for name, measure in (("curve", measure_curve), ("seconds", measure_seconds)):
        command = commands.add_parser(name)
        command.set_defaults(measure=measure)
        command.add_argument("run", type=Path)
        command.add_argument("file", type=Path, help="COCO JSON, with images")
        command.add_argument("--limit", type=int, help="images, the first ones")
        if name == "seconds":
            command.add_argument("--focus", required=True, help="as predict.focus")
            command.add_argument("--repeats", type=int, default=3)
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


def measure_seconds(options: argparse.Namespace) -> None:
    """Print the processor seconds of a search with a focus and without, in turn."""
    import torch

    torch.set_num_threads(1)
    detector, dataset = load(options)
    focus = parse_json(json.dumps(yaml.safe_load(options.focus)).encode(), FocusSpec)
    ways = {"whole": detector, "focus": detector.with_focus(focus)}
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


if __name__ == "__main__":
    main()
