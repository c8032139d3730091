"""Cover the boxes of images by as few chips as a greedy search finds, on a grid of windows (SNIPER §3.1, §3.2).

In each axis, the windows that contain a box are an interval of grid positions. The number of boxes per window is
therefore a sum of rectangles: a two-dimensional difference array, integrated once. The windows are then kept sorted by
that number (bucket sort); a box that becomes covered decrements the windows of its rectangle, and a decrement moves a
window by one position. So the cost is linear in boxes plus grid cells, whatever the number of chips. Boxes that are
not connected through shared windows are covered separately: in a large image only windows near boxes are visited.
"""

import numpy as np
from jaxtyping import Bool, Float, Int

from sniper.chips.image_boxes import ImageBoxes, ScoredBoxes
from sniper.chips.pyramid import LevelSpec, PyramidSpec
from sniper.chips.table import ChipTable
from sniper.geometry.kernels import kernel, run_in_threads

_IMAGES_AT_ONCE = 65_536
_TOLERANCE = 1e-6  # level pixels; rounding errors of a box edge
_MIN_CELLS = 4096  # of a level, from which on it matters how many are empty
_MAX_WINDOWS = 1 << 24  # of a group of boxes, 12 bytes for each; 131,072 px square at stride 32
_NUM_DRAWS = 8  # of equally good windows, of which the one with the most false alarms is taken


def cover(
    pyramid: PyramidSpec,
    images: ImageBoxes,
    *,
    generator: np.random.Generator,
    alarms: ScoredBoxes | None = None,
) -> ChipTable:
    """Choose the positive chips of many images at all levels.

    For each image and level, windows are chosen one by one, each time one that covers the most boxes not yet covered;
    ties are broken at random. A window covers a box that lies wholly inside it. A box that no window of its level can
    cover moves to the next coarser level that can.

    Args:
        pyramid: levels, chip size and stride.
        images: the images, and the boxes to cover.
        generator: breaks ties, and draws the offset of the grid. Equal states give equal chips.
        alarms: false alarms in the same images. Of several equally good windows that are drawn, the one with the
            highest sum of their scores is taken; each counts at the levels in whose range its size is, and once.

    Returns:
        The chips, image after image and level after level; none is negative.

    Example:
        >>> table = cover(
        ...     PyramidSpec(),
        ...     ImageBoxes(
        ...         widths=np.array([640]),
        ...         heights=np.array([480]),
        ...         offsets=np.array([0, 2]),
        ...         boxes=np.array([[10.0, 10.0, 40.0, 40.0], [300.0, 200.0, 460.0, 400.0]]),
        ...         is_required=np.array([True, True]),
        ...     ),
        ...     generator=np.random.default_rng(0),
        ... )
        >>> table.level.tolist()
        [0, 2]
    """
    min_boxes = np.ones(len(pyramid.levels), dtype=np.int64)
    if alarms is None:
        alarms = ScoredBoxes.none(images)
    return _choose(
        pyramid, images, is_excluded=None, min_boxes=min_boxes, alarms=alarms, generator=generator
    )[0]


def cover_dense(
    pyramid: PyramidSpec,
    images: ImageBoxes,
    *,
    is_excluded: Bool[np.ndarray, "n l"],
    min_boxes: Int[np.ndarray, " l"],
    generator: np.random.Generator,
    scores: Float[np.ndarray, " n"] | None = None,
) -> tuple[ChipTable, Float[np.ndarray, " c"]]:
    """Choose windows as `cover` does, but only while a window adds enough boxes; no box moves to another level.

    Args:
        pyramid: levels, chip size and stride.
        images: the images and their boxes. A required box counts at the levels in whose range its size is.
        is_excluded: (n, l) the boxes that do not count at a level.
        min_boxes: (l,) the fewest boxes that a window of each level must add.
        generator: see `cover`.
        scores: (n,) of the boxes. Of several windows that add equally many, the one with the highest sum is taken.

    Returns:
        The windows, and for each the sum of the scores of the boxes that it adds; 0 without scores.
    """
    alarms = ScoredBoxes.none(images) if scores is None else ScoredBoxes(images=images, scores=scores)
    return _choose(
        pyramid, images, is_excluded=is_excluded, min_boxes=min_boxes, alarms=alarms, generator=generator
    )


def count_chips(level: LevelSpec, images: ImageBoxes, *, chip_size: int, stride: int) -> int:
    """Count the chips of one level that cover the required boxes whose size is in its range; see `cover`.

    Boxes that no window can cover are left out.

    Args:
        level: the level.
        images: the images and their boxes.
        chip_size: side of a chip, level pixels.
        stride: spacing of the grid, level pixels.

    Returns:
        The number of chips of all images. Equal arguments give equal numbers.
    """
    counts, _, _ = _choose_in_group(
        np.stack(level.resized(images.widths, images.heights))[None],
        np.stack([images.widths, images.heights]).astype(np.int64),
        images.offsets,
        np.ascontiguousarray(images.boxes, dtype=np.float64),
        images.is_required,
        np.array([[level.at_least, level.below]]),
        (chip_size, stride, 0, 0),
        np.uint64(0),
        np.zeros((len(images.boxes), 1), dtype=np.bool_),
        np.ones(1, dtype=np.int64),
        np.full(len(images.boxes), -1, dtype=np.int8),
        _arrays_of(ScoredBoxes.none(images), slice(None)),
    )
    return int(counts.sum())


def is_coverable(
    level: LevelSpec, images: ImageBoxes, *, chip_size: int, stride: int
) -> Bool[np.ndarray, " n"]:
    """Check which boxes some window of a level can cover, with the grid at offset 0.

    Args:
        level: the level.
        images: the images and their boxes.
        chip_size: side of a chip, level pixels.
        stride: spacing of the grid, level pixels.

    Returns:
        (n,) one flag for each box, whatever its size.
    """
    image_of_box = images.image_of_box
    is_inside = np.ones(len(images.boxes), dtype=np.bool_)
    resized = level.resized(images.widths, images.heights)
    for axis, (sides, old) in enumerate(zip(resized, (images.widths, images.heights), strict=True)):
        scale, side = (sides / old)[image_of_box], sides[image_of_box]
        low, high = images.boxes[:, axis] * scale, np.minimum(images.boxes[:, axis + 2] * scale, side)
        max_start = np.maximum(side - chip_size, 0)
        last = -(-max_start // stride)
        first_fit = np.clip(np.ceil((high - chip_size - _TOLERANCE) / stride), 0, last)
        last_fit = np.where(low + _TOLERANCE >= max_start, last, np.floor((low + _TOLERANCE) / stride))
        is_inside &= first_fit <= last_fit
    return is_inside


def _choose(
    pyramid: PyramidSpec,
    images: ImageBoxes,
    *,
    is_excluded: Bool[np.ndarray, "n l"] | None,
    min_boxes: Int[np.ndarray, " l"],
    alarms: ScoredBoxes,
    generator: np.random.Generator,
) -> tuple[ChipTable, Float[np.ndarray, " c"]]:
    """Choose windows, and return the false alarms that each adds; boxes may move where `is_excluded` is None."""
    if is_excluded is None:
        is_excluded = np.zeros((0, len(pyramid.levels)), dtype=np.bool_)
    seed = generator.integers(1, 2**63, dtype=np.int64)
    shift = generator.integers(0, pyramid.stride, size=2) if pyramid.random_offset else np.zeros(2, np.int64)
    resized = [level.resized(images.widths, images.heights) for level in pyramid.levels]
    bounds = np.array([[level.at_least, level.below] for level in pyramid.levels])
    moved_to = np.full(len(images.boxes), -1, dtype=np.int8)
    parts = []
    for first in range(0, len(images), _IMAGES_AT_ONCE):
        group = slice(first, first + _IMAGES_AT_ONCE)
        offsets = images.offsets[first : first + _IMAGES_AT_ONCE + 1]
        rows = slice(offsets[0], offsets[-1])
        parts.append(
            _choose_in_group(
                np.stack([np.stack([w[group], h[group]]) for w, h in resized]),
                np.stack([images.widths[group], images.heights[group]]).astype(np.int64),
                offsets - offsets[0],
                np.ascontiguousarray(images.boxes[rows], dtype=np.float64),
                images.is_required[rows],
                bounds,
                (pyramid.chip_size, pyramid.stride, int(shift[0]), int(shift[1])),
                np.uint64(seed) + np.uint64(first),
                is_excluded[rows],
                min_boxes,
                moved_to[rows],
                _arrays_of(alarms, group),
            )
        )
    counts = np.concatenate([part[0] for part in parts]) if parts else np.zeros(0, np.int64)
    chips = np.concatenate([part[1] for part in parts]) if parts else np.zeros((0, 3), np.int32)
    masses = np.concatenate([part[2] for part in parts]) if parts else np.zeros(0)
    table = ChipTable(
        levels=pyramid.levels,
        image_widths=images.widths,
        image_heights=images.heights,
        image_indices=np.repeat(np.arange(len(images)), counts),
        level=chips[:, 0].astype(np.int8),
        x=chips[:, 1],
        y=chips[:, 2],
        widths=np.full(len(chips), pyramid.chip_size, dtype=np.int32),
        heights=np.full(len(chips), pyramid.chip_size, dtype=np.int32),
        is_negative=np.zeros(len(chips), dtype=np.bool_),
        moved_to=moved_to,
    )
    return table, masses


def _arrays_of(
    alarms: ScoredBoxes, images: slice
) -> tuple[Int[np.ndarray, " m_plus_1"], Float[np.ndarray, "a 4"], Float[np.ndarray, " a"]]:
    """Return where the false alarms of each of some consecutive images begin, their boxes and their scores."""
    first, last, _ = images.indices(len(alarms.images))
    offsets = alarms.images.offsets[first : last + 1]
    rows = slice(offsets[0], offsets[-1])
    boxes = np.ascontiguousarray(alarms.images.boxes[rows], dtype=np.float64)
    return offsets - offsets[0], boxes, np.ascontiguousarray(alarms.scores[rows], dtype=np.float64)


def _choose_in_group(
    level_sides: Int[np.ndarray, "l 2 m"],
    image_sides: Int[np.ndarray, "2 m"],
    offsets: Int[np.ndarray, " m_plus_1"],
    boxes: Float[np.ndarray, "n 4"],
    is_required: Bool[np.ndarray, " n"],
    bounds: Float[np.ndarray, "l 2"],
    grid: tuple[int, int, int, int],
    seed: np.uint64,
    is_excluded: Bool[np.ndarray, "t l"],
    min_boxes: Int[np.ndarray, " l"],
    moved_to: Int[np.ndarray, " n"],
    alarms: tuple[Int[np.ndarray, " m_plus_1"], Float[np.ndarray, "a 4"], Float[np.ndarray, " a"]],
) -> tuple[Int[np.ndarray, " m"], Int[np.ndarray, "c 3"], Float[np.ndarray, " c"]]:
    """Choose windows of some images, and fill `moved_to`.

    Returns:
        The number of chips per image, (level, x, y) of each chip, and the scores of the false alarms that it adds.
    """
    num_levels = len(bounds)
    # Every chip covers at least one box of its level that no other chip does.
    buffer = np.empty((num_levels * len(boxes), 3), dtype=np.int32)
    masses = np.empty(num_levels * len(boxes))
    counts = np.zeros(len(offsets) - 1, dtype=np.int64)

    def cover_slice(first: int, last: int) -> None:
        _cover_images(
            first, last, level_sides, image_sides, offsets, boxes, is_required, bounds, grid, seed, is_excluded,
            min_boxes, moved_to, *alarms, buffer, masses, counts,
        )  # fmt: skip

    run_in_threads(cover_slice, offsets)
    starts = num_levels * offsets[:-1]
    firsts = np.cumsum(counts) - counts
    index = np.arange(counts.sum()) + np.repeat(starts - firsts, counts)
    return counts, buffer[index], masses[index]


@kernel
def _mix(state: np.uint64) -> np.uint64:
    """Mix 64 bits (the finalizer of SplitMix64)."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


@kernel
def _num_positions(side: int, chip_size: int, stride: int, shift: int) -> int:
    """Count the windows along one axis: those on the grid, and those flush with the borders."""
    max_start = side - chip_size
    return 1 if max_start <= 0 else (max_start + shift + stride - 1) // stride + 1


@kernel
def _position(index: int, side: int, chip_size: int, stride: int, shift: int) -> int:
    """Return the left or top edge of a window."""
    return min(max(index * stride - shift, 0), max(side - chip_size, 0))


@kernel
def _interval(low: float, high: float, side: int, chip_size: int, stride: int, shift: int) -> tuple[int, int]:
    """Return the first and last window along one axis that contain [low, high]; first > last if none does."""
    last = _num_positions(side, chip_size, stride, shift) - 1
    max_start = side - chip_size
    start = high - chip_size - _TOLERANCE
    first_fit = 0 if start <= 0 else min(int(np.ceil((start + shift) / stride)), last)
    last_fit = last if low + _TOLERANCE >= max_start else int(np.floor((low + _TOLERANCE + shift) / stride))
    return first_fit, last_fit


@kernel
def _count_boxes(rects: np.ndarray, num_x: int, num_y: int) -> tuple[np.ndarray, np.ndarray]:
    """Count the boxes inside each window, and for each such count the windows that have it.

    `rects` (k, 4): the first and last column, first and last row of the windows that contain each box.
    """
    counts = np.zeros((num_y + 1, num_x + 1), dtype=np.int32)
    for r in range(len(rects)):
        left, right, top, bottom = rects[r]
        counts[top, left] += 1
        counts[top, right + 1] -= 1
        counts[bottom + 1, left] -= 1
        counts[bottom + 1, right + 1] += 1
    num_windows = np.zeros(len(rects) + 1, dtype=np.int32)
    for y in range(num_y):
        run = 0
        for x in range(num_x):
            run += counts[y, x]
            count = run + (counts[y - 1, x] if y > 0 else 0)
            counts[y, x] = count
            num_windows[count] += 1
    return counts[:num_y, :num_x], num_windows


@kernel
def _sort_by_count(counts: np.ndarray, num_windows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sort the windows that contain a box by their counts.

    Returns the windows as y * num_x + x, grouped by count; the position of each window in that order; and where each
    count starts, followed by the end.
    """
    num_y, num_x = counts.shape
    starts = np.zeros(len(num_windows) + 1, dtype=np.int32)
    for count in range(1, len(num_windows)):
        starts[count + 1] = starts[count] + num_windows[count]
    windows = np.empty(starts[-1], dtype=np.int32)
    position = np.empty((num_y, num_x), dtype=np.int32)
    free = starts.copy()
    for y in range(num_y):
        for x in range(num_x):
            count = counts[y, x]
            if count > 0:
                windows[free[count]] = y * num_x + x
                position[y, x] = free[count]
                free[count] += 1
    return windows, position, starts


@kernel
def _remove_box(
    rect: np.ndarray, counts: np.ndarray, windows: np.ndarray, position: np.ndarray, starts: np.ndarray
) -> None:
    """Decrement every window that contains a covered box: each swaps with the first of its count and moves down."""
    num_x = counts.shape[1]
    for y in range(rect[2], rect[3] + 1):
        for x in range(rect[0], rect[1] + 1):
            count = counts[y, x]
            front, here = starts[count], position[y, x]
            other = windows[front]
            windows[front], windows[here] = y * num_x + x, other
            position[other // num_x, other % num_x] = here
            position[y, x] = front
            starts[count] += 1
            counts[y, x] = count - 1


@kernel
def _draw(state: np.uint64, count: int) -> tuple[np.uint64, np.int64]:
    """Draw an integer below `count`; return the new random state and the integer."""
    state += np.uint64(0x9E3779B97F4A7C15)
    return state, np.int64(_mix(state) % np.uint64(count))


@kernel
def _mass(alarms: np.ndarray, scores: np.ndarray, x: int, y: int) -> float:
    """Sum the scores of the false alarms inside a window. `alarms` (a, 4) is as `rects` in `_count_boxes`."""
    mass = 0.0
    for a in range(len(alarms)):
        if alarms[a, 0] <= x <= alarms[a, 1] and alarms[a, 2] <= y <= alarms[a, 3]:
            mass += scores[a]
    return mass


@kernel
def _take_alarms(alarms: np.ndarray, scores: np.ndarray, x: int, y: int) -> float:
    """Return the sum of the scores of the false alarms inside a window, and set them to 0."""
    mass = _mass(alarms, scores, x, y)
    if mass > 0:
        for a in range(len(alarms)):
            if alarms[a, 0] <= x <= alarms[a, 1] and alarms[a, 2] <= y <= alarms[a, 3]:
                scores[a] = 0.0
    return mass


@kernel
def _pick_common(
    rects: np.ndarray,
    pick: np.ndarray,
    state: np.uint64,
    alarms: np.ndarray,
    scores: np.ndarray,
    first_x: int,
    first_y: int,
) -> tuple[bool, np.uint64]:
    """Draw one of the windows that contain all boxes into `pick`; return whether there is any, and the new state.

    Of several draws, the one with the most false alarms is taken. Columns and rows start at `first_x` and `first_y`.
    """
    left, right, top, bottom = rects[0]
    for r in range(1, len(rects)):
        left, right = max(left, rects[r, 0]), min(right, rects[r, 1])
        top, bottom = max(top, rects[r, 2]), min(bottom, rects[r, 3])
        if right < left or bottom < top:
            return False, state
    num_x, num_y = right - left + 1, bottom - top + 1
    most = -1.0
    for _ in range(_NUM_DRAWS if len(alarms) else 1):
        state, drawn = _draw(state, num_x * num_y)
        x, y = left + drawn % num_x, top + drawn // num_x
        mass = _mass(alarms, scores, first_x + x, first_y + y)
        if mass > most:
            most = mass
            pick[0], pick[1] = x, y
    return True, state


@kernel
def _drop_covered(rects: np.ndarray, num_left: int, x: int, y: int) -> int:
    """Move the boxes inside a window behind the remaining ones; return the number of remaining boxes."""
    r = 0
    while r < num_left:
        if rects[r, 0] <= x <= rects[r, 1] and rects[r, 2] <= y <= rects[r, 3]:
            num_left -= 1
            for k in range(4):
                rects[r, k], rects[num_left, k] = rects[num_left, k], rects[r, k]
        else:
            r += 1
    return num_left


@kernel
def _cover_group(
    rects: np.ndarray,
    min_boxes: int,
    picked: np.ndarray,
    masses: np.ndarray,
    state: np.uint64,
    alarms: np.ndarray,
    scores: np.ndarray,
) -> tuple[int, np.uint64]:
    """Cover boxes that are near each other greedily.

    `rects` (k, 4) and `alarms` (a, 4) are as in `_count_boxes`; the rows of `rects` are reordered. The columns and rows
    of the chosen windows go to `picked` (k, 2), the scores of the false alarms that each adds to `masses` (k,); their
    number and the new random state are returned. Windows that add fewer than `min_boxes` boxes are not chosen. Counting
    is skipped once a window contains all remaining boxes, which is mostly so from the start.
    """
    if len(rects) < min_boxes:
        return 0, state
    is_done, state = _pick_common(rects, picked[0], state, alarms, scores, 0, 0)
    if is_done:
        masses[0] = _take_alarms(alarms, scores, picked[0, 0], picked[0, 1])
        return 1, state
    first_x, last_x, first_y, last_y = _extent(rects)
    _shift(rects, first_x, first_y)
    counts, num_windows = _count_boxes(rects, last_x - first_x + 1, last_y - first_y + 1)
    windows, position, starts = _sort_by_count(counts, num_windows)
    num_left, num_picked, most = len(rects), 0, len(rects)
    while not is_done:
        while most >= min_boxes and starts[most + 1] == starts[most]:
            most -= 1
        if most < min_boxes:
            break
        best = -1.0
        for _ in range(_NUM_DRAWS if len(alarms) else 1):
            state, drawn = _draw(state, starts[most + 1] - starts[most])
            y, x = divmod(windows[starts[most] + drawn], counts.shape[1])
            mass = _mass(alarms, scores, first_x + x, first_y + y)
            if mass > best:
                best = mass
                picked[num_picked, 0], picked[num_picked, 1] = x, y
        x, y = picked[num_picked]
        masses[num_picked] = _take_alarms(alarms, scores, first_x + x, first_y + y)
        num_picked += 1
        before, num_left = num_left, _drop_covered(rects, num_left, x, y)
        if num_left < min_boxes:
            break
        is_done, state = _pick_common(
            rects[:num_left], picked[num_picked], state, alarms, scores, first_x, first_y
        )
        if is_done:
            x, y = picked[num_picked]
            masses[num_picked] = _take_alarms(alarms, scores, first_x + x, first_y + y)
            num_picked += 1
        if not is_done:
            for r in range(num_left, before):
                _remove_box(rects[r], counts, windows, position, starts)
    for p in range(num_picked):
        picked[p, 0] += first_x
        picked[p, 1] += first_y
    return num_picked, state


@kernel
def _extent(rects: np.ndarray) -> tuple[int, int, int, int]:
    """Return the first and last column, first and last row of the windows that contain any of some boxes."""
    first_x, last_x, first_y, last_y = rects[0]
    for r in range(1, len(rects)):
        first_x, last_x = min(first_x, rects[r, 0]), max(last_x, rects[r, 1])
        first_y, last_y = min(first_y, rects[r, 2]), max(last_y, rects[r, 3])
    return int(first_x), int(last_x), int(first_y), int(last_y)


@kernel
def _shift(rects: np.ndarray, first_x: int, first_y: int) -> None:
    """Make columns and rows start at those given."""
    for r in range(len(rects)):
        rects[r, 0] -= first_x
        rects[r, 1] -= first_x
        rects[r, 2] -= first_y
        rects[r, 3] -= first_y


@kernel
def _reorder(rects: np.ndarray, order: np.ndarray) -> None:
    """Put rows into another order."""
    before = rects.copy()
    for r in range(len(rects)):
        for k in range(4):
            rects[r, k] = before[order[r], k]


@kernel
def _distinct(keys: np.ndarray) -> np.ndarray:
    """Return the distinct ones of some keys, ascending."""
    cells = np.empty(len(keys), dtype=np.int64)
    num_cells = 0
    for index in np.argsort(keys, kind="mergesort"):
        if num_cells == 0 or keys[index] != cells[num_cells - 1]:
            cells[num_cells] = keys[index]
            num_cells += 1
    return cells[:num_cells]


@kernel
def _group(rects: np.ndarray) -> np.ndarray:
    """Sort boxes into groups, such that no window contains boxes of two groups.

    Boxes are put into square cells as wide as the longest interval of windows that contain one box, so that boxes that
    share a window are in neighbouring cells; connected cells make a group. Returns where each group starts, followed by
    the end.
    """
    num_rects = len(rects)
    first_x, first_y, last_x, last_y, span = rects[0, 0], rects[0, 2], rects[0, 0], rects[0, 2], 1
    for r in range(num_rects):
        left, right, top, bottom = rects[r]
        first_x, last_x, first_y, last_y = (
            min(first_x, left),
            max(last_x, left),
            min(first_y, top),
            max(last_y, top),
        )
        span = max(span, right - left + 1, bottom - top + 1)
    num_x, num_y = (last_x - first_x) // span + 1, (last_y - first_y) // span + 1
    if num_x <= 2 and num_y <= 2:
        return np.array([0, num_rects])
    starts = np.zeros(num_rects + 1, dtype=np.int64)
    columns, rows = np.empty(num_rects, dtype=np.int64), np.empty(num_rects, dtype=np.int64)
    keys = np.empty(num_rects, dtype=np.int64)
    for r in range(num_rects):
        columns[r], rows[r] = (rects[r, 0] - first_x) // span, (rects[r, 2] - first_y) // span
        keys[r] = rows[r] * num_x + columns[r]
    num_cells = np.int64(num_y) * num_x
    cells = np.zeros(0, dtype=np.int64)
    if num_cells > _MIN_CELLS + 8 * num_rects:  # few boxes far apart: only cells with boxes are kept
        cells = _distinct(keys)
        num_cells = len(cells)
    # A linked list for each cell; `older` points to the next box.
    newest = np.full(num_cells, -1, dtype=np.int32)
    older = np.empty(num_rects, dtype=np.int32)
    for r in range(num_rects):
        cell = _find_cell(cells, keys[r])
        older[r] = newest[cell]
        newest[cell] = r
    order = np.empty(num_rects, dtype=np.int32)
    num_ordered, num_groups = 0, 0
    for seed in range(num_rects):
        cell = _find_cell(cells, keys[seed])
        if newest[cell] < 0:
            continue  # it is in a group already
        reached = num_ordered
        num_ordered = _pop_cell(newest, older, cell, order, num_ordered)
        while reached < num_ordered:
            box = order[reached]
            for y in range(max(rows[box] - 1, 0), min(rows[box] + 2, num_y)):
                for x in range(max(columns[box] - 1, 0), min(columns[box] + 2, num_x)):
                    cell = _find_cell(cells, np.int64(y) * num_x + x)
                    if cell >= 0:
                        num_ordered = _pop_cell(newest, older, cell, order, num_ordered)
            reached += 1
        num_groups += 1
        starts[num_groups] = num_ordered
    _reorder(rects, order)
    return starts[: num_groups + 1]


@kernel
def _find_cell(cells: np.ndarray, key: int) -> int:
    """Return the index of a cell by its key, -1 if there is none; without `cells`, all cells are there in order."""
    if len(cells) == 0:
        return key
    index = int(np.searchsorted(cells, key))
    return index if index < len(cells) and cells[index] == key else -1


@kernel
def _pop_cell(newest: np.ndarray, older: np.ndarray, cell: int, order: np.ndarray, num_ordered: int) -> int:
    """Move the boxes of a cell to the end of `order`; return its new length."""
    box = newest[cell]
    newest[cell] = -1
    while box >= 0:
        order[num_ordered] = box
        num_ordered += 1
        box = older[box]
    return num_ordered


@kernel
def _cover_level(
    rects: np.ndarray,
    min_boxes: int,
    picked: np.ndarray,
    masses: np.ndarray,
    state: np.uint64,
    alarms: np.ndarray,
    scores: np.ndarray,
) -> tuple[int, np.uint64]:
    """Cover the boxes of a level group by group; see `_cover_group`.

    The boxes of a group that extends over too many windows are covered in halves, left and right or top and bottom.
    """
    starts = _group(rects)
    num_picked = 0
    firsts, lasts = np.empty(64, dtype=np.int64), np.empty(64, dtype=np.int64)  # a stack of halves
    for g in range(len(starts) - 1):
        firsts[0], lasts[0], num_parts = starts[g], starts[g + 1], 1
        while num_parts > 0:
            num_parts -= 1
            first, last = firsts[num_parts], lasts[num_parts]
            part = rects[first:last]
            first_x, last_x, first_y, last_y = _extent(part)
            num_x, num_y = last_x - first_x + 1, last_y - first_y + 1
            if num_x * num_y <= _MAX_WINDOWS or last - first == 1:
                count, state = _cover_group(
                    part, min_boxes, picked[num_picked:], masses[num_picked:], state, alarms, scores
                )
                num_picked += count
                continue
            axis = 0 if num_x >= num_y else 2
            _reorder(part, np.argsort(part[:, axis].astype(np.int64), kind="mergesort"))
            middle = (first + last) // 2
            firsts[num_parts], lasts[num_parts] = middle, last
            firsts[num_parts + 1], lasts[num_parts + 1] = first, middle
            num_parts += 2
    return num_picked, state


@kernel
def _find_windows(
    box: np.ndarray,
    level_sides: np.ndarray,
    image_sides: np.ndarray,
    bounds: np.ndarray,
    grid: tuple[int, int, int, int],
    rect: np.ndarray,
) -> bool:
    """Write the windows of a level that contain a box to `rect`, as in `_count_boxes`; return whether there are any.

    There are none for a box whose size is not in the range of the level.
    """
    if not bounds[0] <= np.sqrt((box[2] - box[0]) * (box[3] - box[1])) < bounds[1]:
        return False
    chip_size, stride, shift_x, shift_y = grid
    width, height = level_sides
    scale_x, scale_y = width / image_sides[0], height / image_sides[1]
    rect[0], rect[1] = _interval(
        box[0] * scale_x, min(box[2] * scale_x, float(width)), width, chip_size, stride, shift_x
    )
    rect[2], rect[3] = _interval(
        box[1] * scale_y, min(box[3] * scale_y, float(height)), height, chip_size, stride, shift_y
    )
    return rect[0] <= rect[1] and rect[2] <= rect[3]


@kernel
def _cover_images(
    first_image: int,
    last_image: int,
    level_sides: np.ndarray,
    image_sides: np.ndarray,
    offsets: np.ndarray,
    boxes: np.ndarray,
    is_required: np.ndarray,
    bounds: np.ndarray,
    grid: tuple[int, int, int, int],
    seed: np.uint64,
    is_excluded: np.ndarray,
    min_boxes: np.ndarray,
    moved_to: np.ndarray,
    alarm_offsets: np.ndarray,
    alarm_boxes: np.ndarray,
    alarm_scores: np.ndarray,
    buffer: np.ndarray,
    masses: np.ndarray,
    counts: np.ndarray,
) -> None:
    """Cover some images at every level; fill `moved_to`, `buffer`, `masses` and `counts`."""
    chip_size, stride, shift_x, shift_y = grid
    num_levels = len(bounds)
    may_move = len(is_excluded) == 0
    for image in range(first_image, last_image):
        first, last = offsets[image], offsets[image + 1]
        if first == last:
            continue
        state = _mix(seed + np.uint64(image))
        num_chips = 0
        is_pending = np.zeros(last - first, dtype=np.bool_)  # too long for the windows so far
        is_covered = np.zeros(last - first, dtype=np.bool_)
        rects = np.empty((last - first, 4), dtype=np.int32)
        picked = np.empty((last - first, 2), dtype=np.int32)
        scores = np.empty(alarm_offsets[image + 1] - alarm_offsets[image])
        alarms = np.empty((len(scores) + 1, 4), dtype=np.int32)  # with a row to write to
        for level in range(num_levels):
            width, height = level_sides[level, 0, image], level_sides[level, 1, image]
            scale_x, scale_y = width / image_sides[0, image], height / image_sides[1, image]
            num_rects, num_alarms = 0, 0
            for b in range(first, last):
                if not is_required[b]:
                    continue
                x1, y1, x2, y2 = boxes[b, 0], boxes[b, 1], boxes[b, 2], boxes[b, 3]
                box_size = np.sqrt((x2 - x1) * (y2 - y1))
                is_in_range = bounds[level, 0] <= box_size < bounds[level, 1]
                if not (is_in_range or is_pending[b - first]) or (not may_move and is_excluded[b, level]):
                    continue
                left, right = _interval(
                    x1 * scale_x, min(x2 * scale_x, float(width)), width, chip_size, stride, shift_x
                )
                top, bottom = _interval(
                    y1 * scale_y, min(y2 * scale_y, float(height)), height, chip_size, stride, shift_y
                )
                if right < left or bottom < top:
                    is_pending[b - first] = may_move and not is_covered[b - first]
                    continue
                if not is_in_range:
                    moved_to[b] = level
                is_pending[b - first], is_covered[b - first] = False, True
                rects[num_rects, 0], rects[num_rects, 1] = left, right
                rects[num_rects, 2], rects[num_rects, 3] = top, bottom
                num_rects += 1
            if num_rects == 0:
                continue
            for a in range(alarm_offsets[image], alarm_offsets[image + 1]):
                rect = alarms[num_alarms]
                # In `cover_dense`, the false alarms are the boxes to cover.
                is_counted = may_move or not is_excluded[a, level]
                if is_counted and _find_windows(
                    alarm_boxes[a],
                    level_sides[level, :, image],
                    image_sides[:, image],
                    bounds[level],
                    grid,
                    rect,
                ):
                    scores[num_alarms] = alarm_scores[a]
                    num_alarms += 1
            num_picked, state = _cover_level(
                rects[:num_rects],
                min_boxes[level],
                picked,
                masses[num_levels * first + num_chips :],
                state,
                alarms[:num_alarms],
                scores[:num_alarms],
            )
            for p in range(num_picked):
                row = num_levels * first + num_chips
                buffer[row, 0] = level
                buffer[row, 1] = _position(picked[p, 0], width, chip_size, stride, shift_x)
                buffer[row, 2] = _position(picked[p, 1], height, chip_size, stride, shift_y)
                num_chips += 1
        counts[image] = num_chips
