"""The suggested pyramid: the fewest training pixels at which nearly every box has a useful size in some chip.

The search covers pyramids with some finer levels, each a fixed factor, and a coarsest level that shows the whole image
in one chip. Neighbouring ranges overlap as in the paper. Chips are actually chosen for each candidate, on a sample of
the images: many candidates on a few images, then the best of them on more images, then a local search around the
cheapest.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Int

from sniper.chips.cover import cover, is_coverable
from sniper.chips.image_boxes import ImageBoxes
from sniper.chips.pyramid import LevelSpec, PyramidSpec
from sniper.geometry.boxes import size
from sniper.planning.cost import (
    USEFUL_SIZES,
    CostPlan,
    chips_megapixels,
    compute_cost,
    learned_boxes,
    levels_megapixels,
    share_useful,
)

CHIP_SIZES = (512, 768, 1024)
"""The chip sizes to try, pixels. A smaller chip cannot contain a box at the upper end of the useful sizes."""

_MAX_FACTOR = 8.0
_OVERLAP, _LAST_OVERLAP = 0.4, 0.8  # lower bound of a range over upper bound of the one before (SNIPER §4)
_MAX_CHIP_SHARE = 0.9  # of a chip's side that a box may fill at a finer level
_FEW_BOXES, _MANY_BOXES = 1_000, 5_000
_NUM_FINALISTS = 12
_TEST_WEIGHT = 0.01  # weight of the test pixels in the objective, which decides near ties
_MARGIN = 0.001  # of the share, for the sampling error
_SAMPLE_TOLERANCE = 0.01  # of the share; a small sample may miss it by this much
_MAX_MOVED = 0.01  # of the share; no more boxes than this become useful by moving to another level
_NUM_ROUNDS, _NUM_TRIES = 8, 3
_LOWER_SHARES = (0.95, 0.9)
_STEPS = (0.8, 0.9, 0.95, 1.05, 1.1, 1.25)


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """A pyramid that suits a data set.

    Attributes:
        goal: the share of the boxes that must have a useful size in some chip.
        cost: what the pyramid costs and reaches on the whole data set.
    """

    goal: float
    cost: CostPlan


def suggest_pyramids(
    images: ImageBoxes, *, base: PyramidSpec, num_levels: Sequence[int], share: float
) -> list[Suggestion]:
    """Search for the cheapest pyramid of each number of levels, and for cheaper pyramids that reach a lower share.

    Args:
        images: the images and their boxes.
        base: the pyramid whose stride and random offset are kept.
        num_levels: the numbers of levels to try, the whole image included.
        share: the share of the required boxes that must have a useful size in some chip.

    Returns:
        Suggestions for `share`, cheapest first; then at most one for each lower share. Empty if none reaches any share.
    """
    suggestions = _sorted(_suggest(images, base, number, share) for number in num_levels)
    likely_levels = [len(suggestions[0].cost.pyramid.levels)] if suggestions else num_levels
    for goal in _LOWER_SHARES:
        if goal < share:
            suggestions += _sorted(_suggest(images, base, number, goal) for number in likely_levels)[:1]
    return suggestions


def _sorted(suggestions: Iterable[Suggestion | None]) -> list[Suggestion]:
    """Sort the suggestions that are not None, cheapest first."""
    return sorted(filter(None, suggestions), key=lambda suggestion: suggestion.cost.megapixels.chips)


def _suggest(images: ImageBoxes, base: PyramidSpec, num_levels: int, share: float) -> Suggestion | None:
    pyramid = suggest_pyramid(images, num_levels=num_levels, share=share)
    if pyramid is None:
        return None
    pyramid = replace(pyramid, stride=base.stride, random_offset=base.random_offset)
    table = cover(pyramid, images, generator=np.random.default_rng(0))
    return Suggestion(goal=share, cost=compute_cost(table, images, pyramid=pyramid))


def suggest_pyramid(images: ImageBoxes, *, num_levels: int, share: float = 0.99) -> PyramidSpec | None:
    """Search for the cheapest pyramid of some number of levels that shows enough boxes at a useful size.

    Args:
        images: the images and their boxes.
        num_levels: the number of levels, the whole image included.
        share: the share of the required boxes that must have a useful size (`USEFUL_SIZES`) in some chip.

    Returns:
        The pyramid, or None if the search finds none, or there is no required box.
    """
    if not images.is_required.any():
        return None
    goal = min(share + _MARGIN, 1.0)
    for _ in range(_NUM_TRIES):
        pyramid = _search(images, num_levels=num_levels, share=goal)
        if pyramid is None:
            return None
        moved_to = cover(pyramid, images, generator=np.random.default_rng(0)).moved_to
        reached = _share_useful(pyramid, images, moved_to=moved_to)
        if reached >= share:
            return pyramid
        goal = min(goal + share - reached + _MARGIN, 1.0)  # the share of the sample was too optimistic
    return None


def _search(images: ImageBoxes, *, num_levels: int, share: float) -> PyramidSpec | None:
    """Search on samples; `share` is that of the sample."""
    few, many = _sample(images, _FEW_BOXES), _sample(images, _MANY_BOXES)
    shapes = _initial_shapes(many, num_levels=num_levels, share=share)
    entrants = _evaluate_all(shapes, few, share=share - _SAMPLE_TOLERANCE)
    finalists = [candidate.shape for candidate in entrants[:_NUM_FINALISTS]]
    ranked = _evaluate_all(finalists, many, share=share)
    if not ranked:
        return None
    best = ranked[0]
    for _ in range(_NUM_ROUNDS):
        ranked = _evaluate_all(_neighbours(best.shape), many, share=share)
        if not ranked or ranked[0].cost >= best.cost:
            break
        best = ranked[0]
    return best.pyramid


@dataclass(frozen=True, kw_only=True)
class _Shape:
    """The free parameters of a pyramid.

    Attributes:
        chip_size: side of a chip, pixels.
        factors: the factor of each finer level.
        limits: the smallest box size too large for each finer level, chip pixels.
    """

    chip_size: int
    factors: tuple[float, ...]
    limits: tuple[float, ...]

    def build(self) -> PyramidSpec | None:
        """Build the pyramid; None if its ranges are out of order."""
        levels = []
        at_least = 0
        for index, (exact, limit) in enumerate(zip(self.factors, self.limits, strict=True)):
            factor = _rounded(exact)
            below = round(limit / factor) if factor else 0
            if below <= at_least:
                return None
            levels.append(LevelSpec(factor=factor, at_least=at_least, below=below))
            is_last = index == len(self.factors) - 1
            at_least = round(below * (_LAST_OVERLAP if is_last else _OVERLAP))
        levels.append(LevelSpec(long_side=self.chip_size, at_least=at_least))
        try:
            return PyramidSpec(chip_size=self.chip_size, levels=tuple(levels))
        except ValueError:  # ranges out of order
            return None


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    """A pyramid that shows enough boxes of a sample at a useful size, and its cost there in megapixels."""

    shape: _Shape
    pyramid: PyramidSpec
    cost: float


def _rounded(factor: float) -> float:
    """Round to two decimals: factors are read by people."""
    return round(float(factor), 2)


def _sample(images: ImageBoxes, num_boxes: int) -> ImageBoxes:
    """Draw images with boxes until there are enough boxes; always the same images."""
    indices = np.random.default_rng(0).permutation(np.flatnonzero(images.has_required))
    counts = np.diff(images.offsets)[indices]
    num_images = int(np.searchsorted(np.cumsum(counts), num_boxes)) + 1
    return images.select(np.sort(indices[:num_images]))


def _initial_shapes(sample: ImageBoxes, *, num_levels: int, share: float) -> Iterator[_Shape]:
    """Iterate over a coarse grid of candidates, whose finest factor makes the smallest boxes just large enough."""
    num_fine = num_levels - 1
    if num_fine == 0:
        yield from (_Shape(chip_size=side, factors=(), limits=()) for side in CHIP_SIZES)
        return
    quantiles = np.array([0.0, 0.5, 1.0]) * max(1 - share, 0.0)
    smallest = np.quantile(size(sample.boxes[sample.is_required]), quantiles)
    finest = sorted({_rounded(min(USEFUL_SIZES[0] / side * 1.01, _MAX_FACTOR)) for side in smallest})
    ratios = (1.8, 2.5, 3.5, 5.0) if num_fine > 1 else (1.0,)
    chip_shares = (0.12, 0.2, 0.3, 0.47, 0.7, _MAX_CHIP_SHARE)
    for side, factor, ratio, chip_share in itertools.product(CHIP_SIZES, finest, ratios, chip_shares):
        factors = tuple(factor / ratio**index for index in range(num_fine))
        yield _Shape(chip_size=side, factors=factors, limits=(chip_share * side,) * num_fine)


def _neighbours(shape: _Shape) -> Iterator[_Shape]:
    """Iterate over the shapes with another factor, another limit, or both, at one level."""
    for index, step in itertools.product(range(len(shape.factors)), _STEPS):
        factors, limits = list(shape.factors), list(shape.limits)
        factors[index] = min(factors[index] * step, _MAX_FACTOR)
        limits[index] = min(limits[index] * step, _MAX_CHIP_SHARE * shape.chip_size)
        yield replace(shape, factors=tuple(factors))
        yield replace(shape, limits=tuple(limits))
        yield replace(shape, factors=tuple(factors), limits=tuple(limits))


def _evaluate_all(shapes: Iterable[_Shape], sample: ImageBoxes, *, share: float) -> list[_Candidate]:
    """Evaluate shapes; return those that show enough boxes at a useful size, cheapest first."""
    candidates = [_evaluate(shape, sample, share=share) for shape in shapes]
    return sorted(filter(None, candidates), key=lambda candidate: candidate.cost)


def _evaluate(shape: _Shape, sample: ImageBoxes, *, share: float) -> _Candidate | None:
    """Choose the chips of a shape; None if it is no pyramid, or shows too few boxes at a useful size."""
    pyramid = shape.build()
    if pyramid is None:
        return None
    unmoved = np.full(len(sample.boxes), -1)
    if _share_useful(pyramid, sample, moved_to=unmoved) < share - _MAX_MOVED:
        return None  # before the slow part, choosing chips
    table = cover(pyramid, sample, generator=np.random.default_rng(0))
    if _share_useful(pyramid, sample, moved_to=table.moved_to) < share:
        return None
    test_cost = _TEST_WEIGHT * levels_megapixels(pyramid.levels, sample)
    return _Candidate(shape=shape, pyramid=pyramid, cost=chips_megapixels(pyramid, len(table)) + test_cost)


def _share_useful(pyramid: PyramidSpec, images: ImageBoxes, *, moved_to: Int[np.ndarray, " n"]) -> float:
    """Compute the share of boxes at a useful size; 0 if a finer level learns from no box."""
    is_learned, sizes = learned_boxes(pyramid, images, moved_to)
    is_learned &= is_coverable(pyramid, images)
    if not is_learned[:, :-1].any(axis=0).all():
        return 0.0
    return share_useful(is_learned, sizes, images.is_required)
