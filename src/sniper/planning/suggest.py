"""The suggested pyramid: the fewest pixels at which nearly every box has a useful size in some chip.

A candidate has some finer levels, each a factor and a range of box sizes from short lists of round numbers, and a
coarsest level that shows the whole image in one chip. Neighbouring ranges overlap about as in the paper. The search
works on a sample of the images. What a level costs and shows depends on the chip size and the level alone, so each is
computed once, however many candidates contain it. Only the chips of the suggestion are chosen on all images.
"""

import itertools
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, TypeVar

import numpy as np
from jaxtyping import Bool, Float, Int

from sniper.chips.cover import count_chips, cover, is_coverable
from sniper.chips.image_boxes import ImageBoxes
from sniper.chips.pyramid import LevelSpec, PyramidSpec
from sniper.chips.table import ChipTable
from sniper.config.experiment import ExperimentSpec
from sniper.config.loading import is_given
from sniper.errors import ConfigError, counted
from sniper.geometry.boxes import size
from sniper.planning.cost import USEFUL_SIZES, CostPlan, chips_megapixels, compute_cost, levels_megapixels

Number = TypeVar("Number", int, float)

CHIP_SIZES = (256, 384, 512, 768, 1024)
"""The chip sizes to try, pixels: steps of about √2, multiples of the largest stride of a feature pyramid."""

MAX_LEVELS = 4
"""Pyramids of 1 to this many levels are tried, the whole image included."""

USUAL_SHARE, HIGH_SHARE = 0.95, 0.99
"""The shares of the boxes to bring to a useful size: the usual one, and the one taken where it costs little more."""

_MOST_LEVELS = 8  # that can be asked for
_FACTORS = (0.125, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0)
_SIZES = (1, 2, 3, *(int(2**power * step) for power in range(2, 16) for step in (1.0, 1.25, 1.5)))
_OVERLAP, _LAST_OVERLAP = 0.4, 0.8  # lower bound of a range over upper bound of the one before (SNIPER §4)
_MAX_CHIP_SHARE = 0.9  # of a chip's side that a box may fill at a finer level
_MIN_LEVEL_SHARE = 0.01  # of the boxes that a finer level must learn from
_MIN_RATIO = 1.3  # between the factors of neighbouring levels
_TEST_WEIGHT = 0.01  # of the test pixels in the objective: training sees an image many times
_LITTLE_MORE = 1.05  # cost ratio up to which fewer levels, or a higher share, are preferred
_SEARCH_BOXES, _CHECK_BOXES = 1_500, 20_000
_SAMPLE_TOLERANCE = 0.02  # of the share; the small sample may miss it by this much
_MARGIN = 0.001  # added to a share that was missed
_NUM_ROUNDS, _NUM_TRIES = 6, 3
_LOWER_SHARES = (0.9, 0.75, 0.5, 0.25, 0.0)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a pyramid costs and reaches on a sample of the images.

    Attributes:
        pyramid: the pyramid.
        goal: the share of the boxes that must have a useful size in some chip.
        share_useful: the share that has.
        chips_per_image: positive chips per image with boxes.
        megapixels: of these chips, per image with boxes.
        test_megapixels: of the whole image at every level, per image with boxes.
    """

    pyramid: PyramidSpec
    goal: float
    share_useful: float
    chips_per_image: float
    megapixels: float
    test_megapixels: float

    @property
    def objective(self) -> float:
        """What the search minimizes: training pixels plus a hundredth of the test pixels, megapixels per image."""
        return self.megapixels + _TEST_WEIGHT * self.test_megapixels

    def is_cheaper(self, other: "Estimate") -> bool:
        """Check whether this pyramid costs less than another by more than the difference that is disregarded."""
        return _LITTLE_MORE * self.objective < other.objective


@dataclass(frozen=True, kw_only=True, eq=False)
class Suggestion:
    """The pyramid that suits a data set, and why.

    Attributes:
        goal: the share of the boxes that must have a useful size in some chip.
        cost: what the pyramid costs and reaches on all images.
        table: its chips.
        reason: why it was chosen, in sentences.
        alternatives: pyramids of fewer levels, of a higher share, and, where it is cheaper, of a lower share.
        num_sampled: images that the alternatives are estimated on.
    """

    goal: float
    cost: CostPlan
    table: ChipTable
    reason: str
    alternatives: tuple[Estimate, ...]
    num_sampled: int

    @property
    def pyramid(self) -> PyramidSpec:
        """The pyramid."""
        return self.cost.pyramid


def suggest_pyramid(
    images: ImageBoxes,
    *,
    base: PyramidSpec = PyramidSpec(),
    num_levels: int | None = None,
    share: float | None = None,
    chip_sizes: Sequence[int] = CHIP_SIZES,
    useful_sizes: tuple[float, float] = USEFUL_SIZES["fpn"],
    seed: int = 0,
) -> Suggestion | None:
    """Suggest a pyramid: the one with the fewest levels within 5 % of the least cost.

    Cost is training pixels plus a hundredth of the test pixels. Where no pyramid reaches the share, the next lower of
    90, 75, 50, 25 and 0 % is aimed at.

    Args:
        images: the images and their boxes.
        base: the pyramid whose stride and random offset are kept.
        num_levels: the number of levels, the whole image included; None chooses from 1 to `MAX_LEVELS`.
        share: share of the required boxes that must have a useful size in some chip; None takes `USUAL_SHARE`, or
            `HIGH_SHARE` where that costs at most 5 % more.
        chip_sizes: the sides of chips to try, pixels.
        useful_sizes: the sizes, from and to, at which a detector does well, chip pixels.
        seed: breaks ties between equally good chips of the suggestion.

    Returns:
        The suggestion; None if there is no required box. Equal arguments give equal suggestions.

    Raises:
        ConfigError: if the number of levels is not from 1 to 8.
    """
    if num_levels is not None and not 1 <= num_levels <= _MOST_LEVELS:
        raise ConfigError(f"expected 1 to {_MOST_LEVELS} levels, not {num_levels}")
    if not images.is_required.any():
        return None
    search = _Search(images, base=base, chip_sizes=chip_sizes, useful_sizes=useful_sizes, seed=seed)
    goals = [HIGH_SHARE, USUAL_SHARE] if share is None else [share]
    bests = {goal: search.best_by_level(goal, num_levels=num_levels) for goal in goals}
    for goal in _LOWER_SHARES:
        if goal < min(goals) and not any(bests.values()):
            bests[goal] = search.best_by_level(goal, num_levels=num_levels)
    goal = min(goal for goal, best in bests.items() if best)
    chosen = _fewest_levels(bests[goal])
    if (
        bests[goals[0]]
        and (higher := _fewest_levels(bests[goals[0]])).objective <= _LITTLE_MORE * chosen.objective
    ):
        goal, chosen = goals[0], higher
    lower = next((lower for lower in _LOWER_SHARES if lower < min(bests)), None)
    if lower:
        bests[lower] = search.best_by_level(lower, num_levels=num_levels)
    num_levels_of_chosen = len(chosen.pyramid.levels)
    alternatives = [
        *(other for other in bests[goal] if len(other.pyramid.levels) < num_levels_of_chosen),
        *(_fewest_levels(best) for other, best in bests.items() if other > goal and best),
        *(_fewest_levels(best) for other, best in bests.items() if other < goal and best),
    ]
    alternatives = [other for other in alternatives if other.goal >= goal or other.is_cheaper(chosen)]
    table, cost = search.reach(chosen)
    return Suggestion(
        goal=goal,
        cost=cost,
        table=table,
        reason=_explain(cost, goal=goal, asked=share, alternatives=alternatives),
        alternatives=tuple(alternatives),
        num_sampled=search.num_sampled,
    )


def suggest_unless_given(
    images: ImageBoxes, spec: ExperimentSpec, names: Collection[str], *, neck: Literal["concat", "fpn"]
) -> Suggestion | None:
    """Suggest a pyramid for an experiment of which some fields were set: its chip size, if it was set, is kept.

    Args:
        images: the images and their boxes.
        spec: the experiment; its stride, random offset and seed are used.
        names: dotted names of the fields that were set.
        neck: of the detector, on which the useful sizes depend.
    """
    base = spec.pyramid
    sizes = (base.chip_size,) if is_given("pyramid.chip_size", names) else CHIP_SIZES
    return suggest_pyramid(
        images, base=base, chip_sizes=sizes, useful_sizes=USEFUL_SIZES[neck], seed=spec.seed
    )


def _explain(cost: CostPlan, *, goal: float, asked: float | None, alternatives: Sequence["Estimate"]) -> str:
    """Explain a suggestion in sentences."""
    pyramid, (low, high), megapixels = cost.pyramid, cost.useful_sizes, cost.megapixels
    sentences = [
        f"Chips of {pyramid.chip_size} px at {counted(len(pyramid.levels), 'level')} show "
        f"{100 * cost.share_useful:.1f} % of the objects at a size of {low:g} to {high:g} px, where detectors do well. "
        f"They have {megapixels.chips:.2f} megapixels per image, {megapixels.ratio_800x1333:.2f} times those of "
        "one pass at 800×1333."
    ]
    wanted = USUAL_SHARE if asked is None else asked
    if goal < wanted:
        sentences.append(
            f"No pyramid reaches {100 * wanted:g} %: the other objects are too small even at ×{_FACTORS[-1]:g}."
        )
    for other in alternatives:
        ratio = other.megapixels / megapixels.chips
        if other.goal == goal:
            sentences.append(
                f"With {counted(len(other.pyramid.levels), 'level')}, training would take {ratio:.2g} times the pixels."
            )
        elif other.goal > goal:
            test_ratio = other.test_megapixels / megapixels.pyramid
            sentences.append(
                f"To show {100 * other.goal:g} % of the objects at such a size, training would take {ratio:.2g} times "
                f"and prediction {test_ratio:.2g} times the pixels."
            )
    if asked is None and goal == HIGH_SHARE:
        sentences.append(f"To show {100 * USUAL_SHARE:g} % would cost nearly as much.")
    return " ".join(sentences)


@dataclass(frozen=True, kw_only=True)
class _Shape:
    """The free parameters of a pyramid.

    Attributes:
        chip_size: side of a chip, pixels.
        levels: the factor of each finer level, and the smallest box size that is too large for it, image pixels.
    """

    chip_size: int
    levels: tuple[tuple[float, int], ...]

    def is_valid(self) -> bool:
        """Check that the levels are in order, and that the boxes of each fit into its chips."""
        in_order = all(
            finer[0] >= _MIN_RATIO * coarser[0] and finer[1] < coarser[1]
            for finer, coarser in itertools.pairwise(self.levels)
        )
        return in_order and all(
            factor * below <= _MAX_CHIP_SHARE * self.chip_size for factor, below in self.levels
        )

    def specs(self) -> tuple[LevelSpec, ...]:
        """Return the levels, the whole image included."""
        return _specs(self)


@lru_cache(maxsize=10_000)
def _specs(shape: _Shape) -> tuple[LevelSpec, ...]:
    specs, at_least = [], 0
    for index, (factor, below) in enumerate(shape.levels):
        specs.append(_finer_level(factor, at_least, below))
        overlap = _LAST_OVERLAP if index == len(shape.levels) - 1 else _OVERLAP
        at_least = _nearest_size(overlap * below)
    return (*specs, _last_level(shape.chip_size, at_least))


@lru_cache(maxsize=10_000)
def _finer_level(factor: float, at_least: int, below: int) -> LevelSpec:
    return LevelSpec(factor=factor, at_least=at_least, below=below)


@lru_cache(maxsize=10_000)
def _last_level(chip_size: int, at_least: int) -> LevelSpec:
    return LevelSpec(long_side=chip_size, at_least=at_least)


@lru_cache(maxsize=10_000)
def _nearest_size(value: float) -> int:
    """Return the round size that is nearest by ratio."""
    return min(_SIZES, key=lambda known: abs(math.log(known / value)))


def _nearest_factor(value: float) -> float:
    return min(_FACTORS, key=lambda known: abs(math.log(known / value)))


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    """A shape that shows enough boxes of the sample at a useful size, and its cost in megapixels per image."""

    shape: _Shape
    cost: float


def _fewest_levels(estimates: Sequence[Estimate]) -> Estimate:
    """Return the estimate with the fewest levels that costs little more than the cheapest."""
    least = min(estimate.objective for estimate in estimates)
    return min(
        (estimate for estimate in estimates if estimate.objective <= _LITTLE_MORE * least),
        key=lambda estimate: len(estimate.pyramid.levels),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _LevelFacts:
    """What a finer level shows of the boxes of a sample.

    Attributes:
        is_learned: (n,) boxes that the level learns from: in range, required, and coverable.
        is_useful: (n,) those that have a useful size there.
        num_learned: number of boxes that the level learns from.
        num_images: images with such boxes, and so the fewest chips.
    """

    is_learned: Bool[np.ndarray, " n"]
    is_useful: Bool[np.ndarray, " n"]
    num_learned: int
    num_images: int


class _Sample:
    """Some images, with what each level costs and shows there; each is computed once."""

    def __init__(
        self, images: ImageBoxes, *, num_images: float, stride: int, useful_sizes: tuple[float, float]
    ) -> None:
        self.images, self.num_images = images, num_images
        self.stride, self.useful_sizes = stride, useful_sizes
        self.sizes = size(images.boxes)
        self.num_required = int(images.is_required.sum())
        self._image_of_box = images.image_of_box
        self._long_side = np.maximum(images.widths, images.heights)[self._image_of_box]
        self._coverable: dict[tuple[int, float], Bool[np.ndarray, " n"]] = {}
        self._levels: dict[tuple[int, LevelSpec], _LevelFacts] = {}
        self._num_chips: dict[tuple[int, LevelSpec], int] = {}
        self._test_megapixels: dict[tuple[float | None, int | None], float] = {}

    def share_useful(self, shape: _Shape) -> float:
        """Compute the share of the boxes at a useful size; 0 if a finer level learns from too few boxes."""
        *finer, last = shape.specs()
        facts = [self._level(shape.chip_size, level) for level in finer]
        fewest = max(_MIN_LEVEL_SHARE * self.num_required, 1)
        if any(level.num_learned < fewest for level in facts):
            return 0.0
        is_useful = self._is_learned_last(facts, last) & self._is_useful(
            self.sizes * (shape.chip_size / self._long_side)
        )
        for level in facts:
            is_useful |= level.is_useful
        return int(np.count_nonzero(is_useful)) / self.num_required

    def count_chips(self, shape: _Shape) -> int:
        """Count the chips of a shape."""
        *finer, _ = shape.specs()
        return self._num_whole(shape) + sum(self._chips(shape.chip_size, level) for level in finer)

    def count_fewest(self, shape: _Shape) -> int:
        """Return a lower bound of the chips of a shape: one for each image and level with boxes."""
        *finer, _ = shape.specs()
        return self._num_whole(shape) + sum(self._level(shape.chip_size, level).num_images for level in finer)

    def objective(self, shape: _Shape, *, num_chips: int) -> float:
        """Compute the training pixels plus a hundredth of the test pixels, megapixels per image."""
        training = num_chips * shape.chip_size**2 / 1e6 / self.num_images
        return training + _TEST_WEIGHT * self.test_megapixels(shape.specs())

    def _num_whole(self, shape: _Shape) -> int:
        *finer, last = shape.specs()
        is_learned = self._is_learned_last([self._level(shape.chip_size, level) for level in finer], last)
        return int(np.count_nonzero(np.bincount(self._image_of_box[is_learned])))

    def _is_learned_last(self, facts: Sequence[_LevelFacts], last: LevelSpec) -> Bool[np.ndarray, " n"]:
        """Check which boxes the coarsest level learns from."""
        is_learned = self.sizes >= last.at_least
        if facts:
            # A box that no window of its levels can cover moves to a coarser level, mostly to the last.
            is_learned |= ~np.logical_or.reduce([level.is_learned for level in facts])
        return is_learned & self.images.is_required

    def test_megapixels(self, levels: Iterable[LevelSpec]) -> float:
        """Compute the megapixels per image of the whole images at all levels."""
        total = 0.0
        for level in levels:
            rule = (level.factor, level.long_side)
            if rule not in self._test_megapixels:
                self._test_megapixels[rule] = levels_megapixels([level], self.images) / len(self.images)
            total += self._test_megapixels[rule]
        return total

    def _is_useful(self, sizes: Float[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
        return (sizes >= self.useful_sizes[0]) & (sizes <= self.useful_sizes[1])

    def _level(self, chip_size: int, level: LevelSpec) -> _LevelFacts:
        key = (chip_size, level)
        if key not in self._levels:
            is_in_range = (self.sizes >= level.at_least) & (self.sizes < level.below)
            is_learned = is_in_range & self.images.is_required & self._is_coverable(chip_size, level)
            assert level.factor is not None
            self._levels[key] = _LevelFacts(
                is_learned=is_learned,
                is_useful=is_learned & self._is_useful(self.sizes * level.factor),
                num_learned=int(np.count_nonzero(is_learned)),
                num_images=int(np.count_nonzero(np.bincount(self._image_of_box[is_learned]))),
            )
        return self._levels[key]

    def _is_coverable(self, chip_size: int, level: LevelSpec) -> Bool[np.ndarray, " n"]:
        assert level.factor is not None
        key = (chip_size, level.factor)
        if key not in self._coverable:
            self._coverable[key] = is_coverable(level, self.images, chip_size=chip_size, stride=self.stride)
        return self._coverable[key]

    def _chips(self, chip_size: int, level: LevelSpec) -> int:
        key = (chip_size, level)
        if key not in self._num_chips:
            self._num_chips[key] = count_chips(level, self.images, chip_size=chip_size, stride=self.stride)
        return self._num_chips[key]


class _Search:
    """The search on a small sample of the images, checked on a larger one and then on all."""

    def __init__(
        self,
        images: ImageBoxes,
        *,
        base: PyramidSpec,
        chip_sizes: Sequence[int],
        useful_sizes: tuple[float, float],
        seed: int,
    ) -> None:
        self._images, self._base, self._useful_sizes, self._seed = images, base, useful_sizes, seed
        self._chip_sizes = [side for side in chip_sizes if side >= base.stride]
        samples = []
        for number in (_SEARCH_BOXES, _CHECK_BOXES):
            drawn, num_images = _draw(images, number)
            samples.append(
                _Sample(drawn, num_images=num_images, stride=base.stride, useful_sizes=useful_sizes)
            )
        self._few, self._many = samples
        if len(self._few.sizes) == len(self._many.sizes):
            self._few = self._many
        self._required = np.sort(self._many.sizes[self._many.images.is_required])

    @property
    def num_sampled(self) -> int:
        """The number of images that candidates are checked on."""
        return len(self._many.images)

    def best_by_level(self, goal: float, *, num_levels: int | None) -> list[Estimate]:
        """Search for the cheapest pyramid of each number of levels, until one more level is not cheaper.

        Args:
            goal: the share of the boxes that must have a useful size in some chip.
            num_levels: the only number of levels to return; None for all.

        Returns:
            Estimates on the larger sample, fewest levels first. Empty if no pyramid reaches the goal.
        """
        bests: list[Estimate] = []
        starts: dict[int, _Shape] = {}
        for num_finer in range(num_levels or MAX_LEVELS):
            best, starts = self._best_of(num_finer, starts, goal=goal)
            if best is not None:
                is_cheaper = not bests or best.is_cheaper(bests[-1])
                bests.append(best)
                if not is_cheaper and num_levels is None:
                    break
        return [best for best in bests if num_levels in (None, len(best.pyramid.levels))]

    def reach(self, estimate: Estimate) -> tuple[ChipTable, CostPlan]:
        """Choose the chips on all images; where the share is missed there, search for a higher one."""
        (table, cost), goal = self._cost(estimate.pyramid), estimate.goal
        for _ in range(_NUM_TRIES):
            if cost.share_useful >= estimate.goal:
                break
            goal = min(goal + estimate.goal - cost.share_useful + _MARGIN, 1.0)
            others = self.best_by_level(goal, num_levels=len(estimate.pyramid.levels))
            if not others:
                break
            table, cost = self._cost(others[0].pyramid)
        return table, cost

    def _best_of(
        self, num_finer: int, starts: dict[int, _Shape], *, goal: float
    ) -> tuple[Estimate | None, dict[int, _Shape]]:
        """Search for the cheapest pyramid of one number of levels.

        Returns:
            Its estimate, or None if there is none; and the best shape of each chip size, to start from with one more
            level.
        """
        candidates = self._best_by_chip_size(num_finer, starts, goal=goal)
        if not candidates:
            return None, {}
        best = min(candidates, key=lambda candidate: candidate.cost)
        starts = {candidate.shape.chip_size: candidate.shape for candidate in candidates}
        return self._estimate(best.shape, goal=goal), starts

    def _smallest(self, goal: float) -> float:
        """Return the size that a share `goal` of the boxes have at least, image pixels."""
        return float(
            self._required[min(math.floor((1 - goal) * len(self._required)), len(self._required) - 1)]
        )

    def _estimate(self, shape: _Shape, *, goal: float) -> Estimate:
        num_chips = self._many.count_chips(shape)
        pyramid = replace(self._base, chip_size=shape.chip_size, levels=shape.specs())
        return Estimate(
            pyramid=pyramid,
            goal=goal,
            share_useful=self._many.share_useful(shape),
            chips_per_image=num_chips / self._many.num_images,
            megapixels=chips_megapixels(pyramid, num_chips) / self._many.num_images,
            test_megapixels=self._many.test_megapixels(pyramid.levels),
        )

    def _cost(self, pyramid: PyramidSpec) -> tuple[ChipTable, CostPlan]:
        table = cover(pyramid, self._images, generator=np.random.default_rng(self._seed))
        return table, compute_cost(table, self._images, pyramid=pyramid, useful_sizes=self._useful_sizes)

    def _best_by_chip_size(
        self, num_finer: int, starts: dict[int, _Shape], *, goal: float
    ) -> list[_Candidate]:
        """Search for the cheapest shape of each chip size that can compete."""
        candidates: list[_Candidate] = []
        for chip_size in self._chip_sizes:
            least = min((candidate.cost for candidate in candidates), default=math.inf)
            best = self._best(
                self._initial(chip_size, num_finer, starts.get(chip_size), goal=goal),
                goal=goal,
                limit=1.3 * least,
            )
            for _ in range(_NUM_ROUNDS if num_finer > 1 else 0):
                better = best and self._best(_neighbours(best.shape), goal=goal, limit=best.cost)
                if not better:
                    break
                best = better
            if best is not None:
                candidates.append(best)
        return candidates

    def _best(self, shapes: Iterable[_Shape], *, goal: float, limit: float) -> _Candidate | None:
        """Return the cheapest of some shapes that reach the goal below a cost."""
        few, best = self._few, None
        possible = [
            (few.objective(shape, num_chips=few.count_fewest(shape)), shape)
            for shape in dict.fromkeys(shapes)
            if shape.is_valid() and few.share_useful(shape) >= goal - _SAMPLE_TOLERANCE
        ]
        for bound, shape in sorted(possible, key=lambda pair: pair[0]):
            if bound >= limit:
                break  # before the slow part, choosing chips
            cost = few.objective(shape, num_chips=few.count_chips(shape))
            if cost < limit and self._many.share_useful(shape) >= goal:
                limit, best = cost, _Candidate(shape=shape, cost=cost)
        return best

    def _initial(
        self, chip_size: int, num_finer: int, start: _Shape | None, *, goal: float
    ) -> Iterator[_Shape]:
        """Iterate over a grid of shapes: all with one finer level, some with more."""
        if num_finer == 0:
            yield _Shape(chip_size=chip_size, levels=())
        elif num_finer == 1:
            for factor, below in itertools.product(_FACTORS, _SIZES):
                yield _Shape(chip_size=chip_size, levels=((factor, below),))
        else:
            yield from self._spread(chip_size, num_finer, goal=goal)
            if start is not None and start.levels:
                yield from _split(start)

    def _spread(self, chip_size: int, num_finer: int, *, goal: float) -> Iterator[_Shape]:
        """Iterate over shapes of factors in equal ratios, the finest of which makes the smallest boxes useful."""
        enough = [factor for factor in _FACTORS if factor * self._smallest(goal) >= self._useful_sizes[0]]
        for finest, ratio, chip_share in itertools.product(
            (enough or _FACTORS[-1:])[:3], (2.0, 3.0, 4.0), (0.3, 0.45, 0.6, _MAX_CHIP_SHARE)
        ):
            factors = [_nearest_factor(finest / ratio**index) for index in range(num_finer)]
            belows = [_nearest_size(chip_share * chip_size / factor) for factor in factors]
            yield _Shape(chip_size=chip_size, levels=tuple(zip(factors, belows, strict=True)))


def _split(shape: _Shape) -> Iterator[_Shape]:
    """Iterate over the shapes in which one level is two: the finer one for smaller boxes, and a coarser one."""
    for index, (factor, below) in enumerate(shape.levels):
        before, after = shape.levels[:index], shape.levels[index + 1 :]
        coarser = [known for known in _FACTORS if known * _MIN_RATIO <= factor]
        smaller = [known for known in _SIZES if known < below]
        for other, limit in itertools.product(coarser[-5:], smaller[-8:]):
            for wider in (below, _nearest_size(below * factor / other)):
                levels = (*before, (factor, limit), (other, wider), *after)
                yield replace(shape, levels=levels)


def _neighbours(shape: _Shape) -> Iterator[_Shape]:
    """Iterate over the shapes with the next factor, the next range, or both, at one level."""
    for index, (factor, below) in enumerate(shape.levels):
        factors, sizes = _around(_FACTORS, factor), _around(_SIZES, below)
        for level in itertools.product(factors, sizes):
            levels = [*shape.levels]
            levels[index] = level
            yield replace(shape, levels=tuple(levels))


def _around(known: Sequence[Number], value: Number) -> Sequence[Number]:
    index = known.index(value)
    return known[max(index - 1, 0) : index + 2]


def _draw(images: ImageBoxes, num_boxes: int) -> tuple[ImageBoxes, float]:
    """Draw images with boxes until there are enough boxes; always the same.

    Of an image with more boxes than that, only the boxes in a neighbourhood are kept.

    Returns:
        The images, and their number, where an image with a part of its boxes counts as that part.
    """
    rng = np.random.default_rng(0)
    indices: Int[np.ndarray, " k"] = rng.permutation(np.flatnonzero(images.has_required))
    counts = np.diff(images.offsets)[indices]
    num_images = int(np.searchsorted(np.cumsum(np.minimum(counts, num_boxes)), num_boxes)) + 1
    drawn = images.select(np.sort(indices[:num_images]))
    counts = np.diff(drawn.offsets)
    if counts.max() <= num_boxes:
        return drawn, float(len(drawn))
    is_kept = np.ones(len(drawn.boxes), dtype=np.bool_)
    for image in np.flatnonzero(counts > num_boxes).tolist():
        rows = slice(drawn.offsets[image], drawn.offsets[image + 1])
        centers = drawn.boxes[rows, :2] + drawn.boxes[rows, 2:]
        required = np.flatnonzero(drawn.is_required[rows])
        distances = np.abs(centers - centers[required[rng.integers(len(required))]]).max(axis=1)
        is_kept[rows] = False
        is_kept[rows.start + np.argsort(distances, kind="stable")[:num_boxes]] = True
    kept = np.add.reduceat(is_kept, drawn.offsets[:-1], dtype=np.int64)
    part = replace(
        drawn,
        offsets=np.concatenate([[0], np.cumsum(kept)]),
        boxes=drawn.boxes[is_kept],
        is_required=drawn.is_required[is_kept],
    )
    return part, float((kept / counts).sum())
