"""Measure what a focus costs and finds, on images that are searched once as a whole.

What a search with a focus would find is replayed from the detections of the whole search, for each candidate.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, Self, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, UInt8

from sniper.chips import Level, LevelSpec
from sniper.config.experiment import FocusSpec, PredictSpec
from sniper.data.datasets import Dataset
from sniper.data.datasets.categories import CategoryMatch
from sniper.errors import AnnotationError, counted
from sniper.evaluation.coco import score
from sniper.evaluation.pair import GroundTruth
from sniper.geometry import Detections
from sniper.geometry.boxes import Sides
from sniper.geometry.focus_cells import FocusCells
from sniper.inference.detector import Detector
from sniper.inference.focus import LevelResult, choose_windows, focused_levels
from sniper.inference.merging import merge
from sniper.inference.search import SearchResult
from sniper.inference.validation import SharedSearch, counting, pair_detections
from sniper.inference.windows import FreeWindow, Window, join_windows
from sniper.runs.processes import SINGLE_PROCESS, Processes

MIN_SCORES = (0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2)
"""Sums of scores that are compared."""

CUES: tuple[Literal["detections", "head"], ...] = ("detections", "head")
"""Sources of cues that are compared, if a detector has them."""

WINDOWS = (128, 256, 512)
"""Sides of windows that are compared, level pixels."""


_NUM_REPEATS = 3
_MEASURED_PIXELS = 1_048_576  # of a batch


@runtime_checkable
class ChooseWindows(Protocol):
    """Chooses the windows of a level as `choose_windows` does."""

    def __call__(
        self, level: Level, coarser: Sequence[LevelResult], *, focus: FocusSpec, limit: int | Sides
    ) -> Sequence[Window]:
        """Return the windows; see `choose_windows`."""


@dataclass(frozen=True, kw_only=True)
class WindowCost:
    """What a detector takes for a window: a second stage costs as much in a small one as in a large one.

    Attributes:
        per_window: seconds.
        per_megapixel: seconds.
    """

    per_window: float
    per_megapixel: float

    @classmethod
    def measure(cls, detector: Detector) -> Self:
        """Measure searches of small and of large images of noise: processor seconds, or with a GPU those of a clock."""
        single = replace(detector, spec=replace(detector.spec, levels=(LevelSpec(factor=1.0),), focus=None))
        is_cpu = detector.device is None or detector.device.type == "cpu"
        clock = time.process_time if is_cpu else time.perf_counter
        small, large = WINDOWS[0], WINDOWS[-1]
        seconds: dict[int, list[float]] = {small: [], large: []}
        for repeat in range(_NUM_REPEATS + 1):
            for side, measured in seconds.items():
                images = _draw_noise(side, count=_MEASURED_PIXELS // side**2)
                started = clock()
                for _ in single.search(images, with_masks=False):
                    pass
                if repeat:  # the first warms up
                    measured.append((clock() - started) / len(images))
        of_small, of_large = (statistics.median(seconds[side]) for side in (small, large))
        per_pixel = max((of_large - of_small) / (large**2 - small**2), 0.0)
        return cls(
            per_window=max(of_small - per_pixel * small**2, 0.0), per_megapixel=max(per_pixel * 1e6, 1e-9)
        )

    def seconds(self, *, num_windows: int, megapixels: float) -> float:
        """Return the seconds of windows that have some pixels together."""
        return self.per_window * num_windows + self.per_megapixel * megapixels


def _draw_noise(side: int, *, count: int) -> list[UInt8[np.ndarray, "s s 3"]]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (side, side, 3), dtype=np.uint8) for _ in range(count)]


@dataclass(frozen=True, kw_only=True)
class FocusPoint:
    """A candidate, and what a search with it finds.

    Attributes:
        focus: None for a whole search.
        megapixels: level pixels that are searched, padding included, mean over images.
        pixel_share: of a whole search.
        seconds: of the detector, mean over images, by `WindowCost`.
        time_share: of a whole search.
        ap: COCO's AP; -1 without objects.
        ap50: the same at IoU 0.5.
        ap_small: the same of small objects.
    """

    focus: FocusSpec | None
    megapixels: float
    pixel_share: float
    seconds: float
    time_share: float
    ap: float
    ap50: float
    ap_small: float


def candidates_for(
    levels: Sequence[LevelSpec], *, cues: Sequence[Literal["detections", "head"]] = CUES[:1]
) -> list[FocusSpec]:
    """Return the candidates to compare: of windows that the objects of every level but the coarsest fit into.

    Args:
        levels: of inference. Those without a factor, or without an upper bound of their range, do not limit windows.
        cues: their sources.
    """
    longest = max(
        (
            level.below * level.factor
            for level in levels
            if level.factor is not None and np.isfinite(level.below)
        ),
        default=0.0,
    )
    windows = [window for window in WINDOWS if window >= longest] or [WINDOWS[-1]]
    return [
        FocusSpec(min_score=min_score, window=window, cues=source)
        for source in cues
        for window in windows
        for min_score in MIN_SCORES
    ]


def check_objects(images: Dataset, levels: Sequence[LevelSpec]) -> None:
    """Check that the AP on images says what a focus loses: they show objects of the levels that it searches less of.

    Args:
        images: to choose a focus on.
        levels: of inference.

    Raises:
        AnnotationError: if they show none.
    """
    num_objects = int((~images.is_crowd).sum())
    if not num_objects:
        raise AnnotationError(
            f"{images.path}: has no objects to score; a focus is chosen by AP, on annotated images"
        )
    ranges: dict[str, None] = {}
    for record in images:
        objects = record.boxes[~record.is_crowd]
        for level in focused_levels(levels, record.sides):
            if level.valid_range.contains(objects).any():
                return
            ranges[f"[{level.valid_range.at_least:g}, {level.valid_range.below:g})"] = None
    of_ranges = f" ({', '.join(ranges)} pixels)" if ranges else ""
    raise AnnotationError(
        f"{images.path}: none of {counted(num_objects, 'object')} is in the range of a level that a focus searches "
        f"less of{of_ranges}, so AP does not say what is lost; choose on images with smaller objects"
    )


def measure_focus(
    detector: Detector,
    images: Dataset,
    *,
    truth: GroundTruth,
    match: CategoryMatch,
    candidates: Sequence[FocusSpec],
    cost: WindowCost,
    processes: Processes = SINGLE_PROCESS,
    on_image: Callable[[int, int], None] = lambda *_: None,
) -> list[FocusPoint]:
    """Search images as a whole, and replay what each candidate would find; all processes call this.

    Args:
        detector: the detector; its own focus is not used.
        images: to search; each process takes its share.
        truth: of the images.
        match: of the detector's classes with the categories of the images.
        candidates: to compare.
        cost: of the detector's windows.
        processes: those that search together.
        on_image: called after each image with the number of images that this process has searched, and of all that it
            is to search.

    Returns:
        The whole search, and the candidates in the order given.
    """
    ways = [Replay(spec=detector.spec, focus=focus) for focus in (None, *candidates)]
    return measure_replays(
        detector,
        images,
        truth=truth,
        match=match,
        replays=ways,
        cost=cost,
        processes=processes,
        on_image=on_image,
    )


def measure_replays(
    detector: Detector,
    images: Dataset,
    *,
    truth: GroundTruth,
    match: CategoryMatch,
    replays: Sequence["Replay"],
    cost: WindowCost,
    processes: Processes = SINGLE_PROCESS,
    on_image: Callable[[int, int], None] = lambda *_: None,
) -> list[FocusPoint]:
    """Search images as a whole, and measure what each replay takes of it; see `measure_focus`.

    Args:
        detector: see `measure_focus`.
        images: likewise.
        truth: likewise.
        match: likewise.
        replays: the first of the whole search.
        cost: see `measure_focus`.
        processes: see `measure_focus`.
        on_image: likewise.
    """
    search = SharedSearch(
        detector=detector.with_focus(None),
        images=images,
        match=match,
        processes=processes,
        on_image=counting(on_image, len(range(processes.rank, len(images), processes.world_size))),
        keeps_all_sizes=True,
    )
    tables = search(range(len(images)), replays)
    counts = np.sum(
        processes.all_gather([(replay.num_pixels, replay.num_windows) for replay in replays]), axis=0
    ).tolist()
    seconds = [cost.seconds(num_windows=windows, megapixels=pixels / 1e6) for pixels, windows in counts]
    points = []
    for row, (replay, table, (pixels, _)) in enumerate(zip(replays, tables, counts, strict=True)):
        scores = score(pair_detections(table, truth))
        num_images = max(len(table), 1)
        points.append(
            FocusPoint(
                focus=replay.focus,
                megapixels=pixels / 1e6 / num_images,
                pixel_share=pixels / max(counts[0][0], 1),
                seconds=seconds[row] / num_images,
                time_share=seconds[row] / seconds[0] if seconds[0] else 1.0,
                ap=scores.ap,
                ap50=scores.ap50,
                ap_small=scores.ap_small,
            )
        )
    return points


def choose_focus(points: Sequence[FocusPoint], *, loss: float, speed_up: float | None = None) -> FocusPoint:
    """Choose a candidate.

    Args:
        points: the whole search first.
        loss: of AP, at most: the fastest with it is chosen. Not used with a speed-up.
        speed_up: of the whole search, at least: the best AP with it is chosen.

    Returns:
        The candidate; the whole search if no other will do.

    Raises:
        ValueError: if the whole search finds none of the objects, or there are none.
    """
    whole, *others = points
    if whole.ap <= 0:
        raise ValueError(f"expected a whole search with an AP above 0, not {whole.ap:g}")
    if speed_up is None:
        allowed = [point for point in others if point.ap >= whole.ap - loss]
        fastest = min(allowed, key=lambda point: point.time_share, default=whole)
        return fastest if fastest.time_share < 1 else whole
    allowed = [point for point in others if point.time_share * speed_up <= 1]
    return max(allowed, key=lambda point: point.ap, default=whole)


@dataclass(kw_only=True, eq=False)
class Replay:
    """Takes from the detections of a whole search those that a search with a focus would find.

    Attributes:
        spec: levels and merging.
        focus: where levels are searched; None takes all.
        choose: chooses the windows of a level.
        num_pixels: level pixels that would have been searched in all images so far.
        num_windows: the same in windows.
    """

    spec: PredictSpec
    focus: FocusSpec | None
    choose: ChooseWindows = choose_windows
    num_pixels: int = field(default=0, init=False)
    num_windows: int = field(default=0, init=False)

    def __call__(self, result: SearchResult) -> Detections:
        """Return the merged detections of an image; `result` has all that was found at each level."""
        if self.focus is None:
            self.num_pixels += result.num_pixels
            self.num_windows += sum(len(of_level.windows) for of_level in result.by_level)
            return merge(result.detections, self.spec)
        found: list[LevelResult] = []
        for of_level in result.by_level:
            chosen = self.choose(of_level.level, found, focus=self.focus, limit=self.spec.window)
            self.num_pixels += sum(
                window.padded_sides.width * window.padded_sides.height for window in chosen
            )
            self.num_windows += len(chosen)
            found.append(_seen(of_level, chosen))
        kept = [
            each.select(of_level.level.valid_range.contains(each.detections.boxes))
            for of_level in found
            for each in of_level.windows.values()
        ]
        return merge(join_windows(kept), self.spec)


def _seen(found: LevelResult, windows: Sequence[Window]) -> LevelResult:
    """Select what lies in one of the windows; detections that are not truncated by it."""
    if not all(isinstance(window, FreeWindow) for window in windows):  # the level is searched as a whole
        return found
    selected = {}
    for searched, each in found.windows.items():
        boxes = found.level.to_level(each.detections.boxes)
        is_seen = np.zeros(len(boxes), dtype=np.bool_)
        for window in windows:
            x1, y1, _, _ = window.corners
            is_seen |= _contains(window, boxes) & ~window.is_truncated(boxes - np.array([x1, y1, x1, y1]))
        selected[searched] = each.select(is_seen)
    return replace(
        found,
        windows=selected,
        cells=None if found.cells is None else _seen_cells(found.cells, windows),
    )


def _seen_cells(cells: FocusCells, windows: Sequence[Window]) -> FocusCells | None:
    """Return the cells with those outside of all windows set to 0; None without windows."""
    if not windows:
        return None
    is_seen = np.zeros(cells.probabilities.shape, dtype=np.bool_)
    for window in windows:
        x1, y1, x2, y2 = window.corners
        rows, columns = (
            slice(low // cells.stride, -(-high // cells.stride)) for low, high in ((y1, y2), (x1, x2))
        )
        is_seen[rows, columns] = True
    return replace(cells, probabilities=np.where(is_seen, cells.probabilities, 0))


def _contains(window: Window, boxes: Float[np.ndarray, "n 4"]) -> Bool[np.ndarray, " n"]:
    """Check which boxes, level frame, have their centre in a window."""
    x1, y1, x2, y2 = window.corners
    x, y = (boxes[:, 0] + boxes[:, 2]) / 2, (boxes[:, 1] + boxes[:, 3]) / 2
    return (x >= x1) & (x <= x2) & (y >= y1) & (y <= y2)
