"""Which pyramid suits a data set: the least pixels at which nearly every box comes out at a useful size in some chip.

A pyramid is searched for among those with some finer levels, each a fixed factor, under one chip that shows the whole
image. Neighbouring ranges overlap as the paper's do. Each candidate's chips are really chosen, on a sample of the
images: many on a few images, the best of them on more, then the neighbours of the cheapest.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Int

from sniper.chips.cover import cover, fits
from sniper.chips.image_boxes import ImageBoxes
from sniper.chips.pyramid import LevelSpec, PyramidSpec
from sniper.geometry.boxes import size
from sniper.planning.cost import (
    USEFUL_SIZES,
    CostPlan,
    chips_megapixels,
    learnt_sizes,
    levels_megapixels,
    measure,
    share_useful,
)

CHIP_SIZES = (512, 768, 1024)
"""Sides tried, pixels. A smaller chip could not hold a box at the upper end of the useful sizes."""

_LARGEST_FACTOR = 8.0
_OVERLAP, _LAST_OVERLAP = 0.4, 0.8  # lower end of a range over upper end of the one before (SNIPER §4)
_LARGEST_PART = 0.9  # of a chip that a box may fill at a finer level
_FEW_BOXES, _MANY_BOXES = 1_000, 5_000
_NUM_FINALISTS = 12
_TEST_WEIGHT = (
    0.01  # of a pixel of the whole pyramid beside one of a chip: near ties go to what is cheaper at test
)
_MARGIN = 0.001  # of the share, for what a sample tells wrong
_ROUNDS, _TRIES = 8, 3
_LOWER_SHARES = (0.95, 0.9)
_STEPS = (0.8, 0.9, 0.95, 1.05, 1.1, 1.25)


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """A pyramid that would suit a data set.

    Attributes:
        goal: share of the boxes that it was to bring to a useful size.
        budget: what it costs on the whole set, and what it reaches.
    """

    goal: float
    budget: CostPlan


def suggest_pyramids(
    images: ImageBoxes, *, like: PyramidSpec, num_levels: Sequence[int], share: float
) -> list[Suggestion]:
    """Give the cheapest pyramid found for each number of levels, cheapest first; then what a lower share would save.

    Args:
        images: with their boxes.
        like: the pyramid whose stride and offset are kept.
        num_levels: the numbers of levels to try, the whole image among them.
        share: of the boxes to be covered that must come out at a useful size in some chip.
    """
    found = [offer for number in num_levels if (offer := _offer(images, like, number, share))]
    found.sort(key=lambda offer: offer.budget.megapixels.chips)
    likely = [len(found[0].budget.pyramid.levels)] if found else num_levels
    for goal in _LOWER_SHARES:
        lower = [offer for number in likely if goal < share and (offer := _offer(images, like, number, goal))]
        found += sorted(lower, key=lambda offer: offer.budget.megapixels.chips)[:1]
    return found


def _offer(images: ImageBoxes, like: PyramidSpec, num_levels: int, share: float) -> Suggestion | None:
    found = suggest_pyramid(images, num_levels=num_levels, share=share)
    if found is None:
        return None
    pyramid = replace(found, stride=like.stride, random_offset=like.random_offset)
    table = cover(pyramid, images, generator=np.random.default_rng(0))
    return Suggestion(goal=share, budget=measure(table, images, pyramid=pyramid))


def suggest_pyramid(images: ImageBoxes, *, num_levels: int, share: float = 0.99) -> PyramidSpec | None:
    """Search the cheapest pyramid of some number of levels that shows enough boxes at a useful size.

    Args:
        images: with their boxes.
        num_levels: how many levels, the whole image among them.
        share: of the boxes to be covered that must come out at a useful size (`USEFUL_SIZES`) in some chip.

    Returns:
        The pyramid, or None if none of so many levels was found, or there is no box.
    """
    if not images.is_wanted.any():
        return None
    goal = min(share + _MARGIN, 1.0)
    for _ in range(_TRIES):
        found = _search(images, num_levels=num_levels, share=goal)
        if found is None:
            return None
        reached = _share(
            found, images, moved_to=cover(found, images, generator=np.random.default_rng(0)).moved_to
        )
        if reached >= share:
            return found
        goal = min(goal + share - reached + _MARGIN, 1.0)  # the sample promised more than the whole set keeps
    return None


def _search(images: ImageBoxes, *, num_levels: int, share: float) -> PyramidSpec | None:
    """Search on a sample, where the share is that of the sample."""
    few, many = _sample(images, _FEW_BOXES), _sample(images, _MANY_BOXES)
    shapes = _first_shapes(many, num_levels=num_levels, share=share)
    entrants = _evaluate_all(shapes, few, share=share - 0.01)  # so few boxes tell the share but roughly
    finalists = [candidate.shape for candidate in entrants[:_NUM_FINALISTS]]
    ranked = _evaluate_all(finalists, many, share=share)
    if not ranked:
        return None
    best = ranked[0]
    for _ in range(_ROUNDS):
        ranked = _evaluate_all(_neighbours(best.shape), many, share=share)
        if not ranked or ranked[0].cost >= best.cost:
            break
        best = ranked[0]
    return best.pyramid


@dataclass(frozen=True, kw_only=True)
class _Shape:
    """The free numbers of a pyramid: the factor of each finer level, and the first size too large for it there."""

    chip_size: int
    factors: tuple[float, ...]
    limits: tuple[float, ...]  # chip pixels

    def build(self) -> PyramidSpec | None:
        """Make the pyramid; None if its ranges do not follow each other."""
        levels = []
        at_least = 0
        for place, (exact, limit) in enumerate(zip(self.factors, self.limits, strict=True)):
            factor = _rounded(exact)
            below = round(limit / factor) if factor else 0
            if below <= at_least:
                return None
            levels.append(LevelSpec(factor=factor, at_least=at_least, below=below))
            is_last = place == len(self.factors) - 1
            at_least = round(below * (_LAST_OVERLAP if is_last else _OVERLAP))
        levels.append(LevelSpec(long_side=self.chip_size, at_least=at_least))
        try:
            return PyramidSpec(chip_size=self.chip_size, levels=tuple(levels))
        except ValueError:  # ranges out of order
            return None


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    shape: _Shape
    pyramid: PyramidSpec
    cost: float


def _rounded(factor: float) -> float:
    """Keep two digits behind the point: a factor is a number that people read."""
    return round(float(factor), 2)


def _sample(images: ImageBoxes, num_boxes: int) -> ImageBoxes:
    """Draw images that have boxes, until there are enough boxes; the same ones each time."""
    indices = np.random.default_rng(0).permutation(np.flatnonzero(images.has_wanted))
    counts = np.diff(images.offsets)[indices]
    num_images = int(np.searchsorted(np.cumsum(counts), num_boxes)) + 1
    return images.select(np.sort(indices[:num_images]))


def _first_shapes(sample: ImageBoxes, *, num_levels: int, share: float) -> Iterator[_Shape]:
    """Give a coarse grid of candidates; the finest factor makes the smallest boxes just large enough."""
    num_fine = num_levels - 1
    if num_fine == 0:
        yield from (_Shape(chip_size=side, factors=(), limits=()) for side in CHIP_SIZES)
        return
    given_up = np.array([0.0, 0.5, 1.0]) * max(1 - share, 0.0)
    smallest = np.quantile(size(sample.boxes[sample.is_wanted]), given_up)
    finest = sorted({_rounded(min(USEFUL_SIZES[0] / side * 1.01, _LARGEST_FACTOR)) for side in smallest})
    falls = (1.8, 2.5, 3.5, 5.0) if num_fine > 1 else (1.0,)
    shares_of_chip = (0.12, 0.2, 0.3, 0.47, 0.7, _LARGEST_PART)
    for side, factor, fall, part in itertools.product(CHIP_SIZES, finest, falls, shares_of_chip):
        factors = tuple(factor / fall**place for place in range(num_fine))
        yield _Shape(chip_size=side, factors=factors, limits=(part * side,) * num_fine)


def _neighbours(shape: _Shape) -> Iterator[_Shape]:
    """Change one number at a time."""
    for place, step in itertools.product(range(len(shape.factors)), _STEPS):
        factors, limits = list(shape.factors), list(shape.limits)
        factors[place] = min(factors[place] * step, _LARGEST_FACTOR)
        limits[place] = min(limits[place] * step, _LARGEST_PART * shape.chip_size)
        yield replace(shape, factors=tuple(factors))
        yield replace(shape, limits=tuple(limits))
        yield replace(shape, factors=tuple(factors), limits=tuple(limits))


def _evaluate_all(shapes: Iterable[_Shape], sample: ImageBoxes, *, share: float) -> list[_Candidate]:
    """Choose the chips of candidates; gives those that show enough boxes at a useful size, cheapest first."""
    found = [_evaluate(shape, sample, share=share) for shape in shapes]
    kept = [candidate for candidate in found if candidate is not None]
    return sorted(kept, key=lambda candidate: candidate.cost)


def _evaluate(shape: _Shape, sample: ImageBoxes, *, share: float) -> _Candidate | None:
    """Choose the chips of a candidate; None if it is no pyramid, or shows too few boxes at a useful size."""
    pyramid = shape.build()
    if pyramid is None:
        return None
    nowhere = np.full(len(sample.boxes), -1)
    if (
        _share(pyramid, sample, moved_to=nowhere) < share - 0.01
    ):  # so many boxes never move to where they are useful
        return None
    chosen = cover(pyramid, sample, generator=np.random.default_rng(0))
    if _share(pyramid, sample, moved_to=chosen.moved_to) < share:
        return None
    cost = chips_megapixels(pyramid, len(chosen.level)) + _TEST_WEIGHT * levels_megapixels(
        pyramid.levels, sample
    )
    return _Candidate(shape=shape, pyramid=pyramid, cost=cost)


def _share(pyramid: PyramidSpec, images: ImageBoxes, *, moved_to: Int[np.ndarray, " n"]) -> float:
    """Give the share of boxes at a useful size; 0 if a level learns from none, but for the whole image."""
    is_learnt, sizes = learnt_sizes(pyramid, images, moved_to)
    is_learnt &= fits(pyramid, images)
    if not is_learnt[:, :-1].any(axis=0).all():
        return 0.0
    return share_useful(is_learnt, sizes, images.is_wanted)
