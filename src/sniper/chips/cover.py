"""The fewest chips that cover the valid boxes, found greedily on a grid of windows (SNIPER §3.1).

A box that fits a window is covered by an interval of grid positions in each axis. The number of boxes that each window
covers is therefore a sum of rectangles: a two-dimensional difference array, summed up once. Windows then lie sorted by
that number, and each box that is covered takes one from every window of its rectangle, which moves a window by one
place among the sorted. So the cost grows with boxes plus grid cells, whatever the number of rounds. Boxes that share no
window, not even by way of others, are covered apart: of a large image only the windows near boxes are looked at.
"""

import numba
import numpy as np
from jaxtyping import Bool, Float, Int

from sniper.chips.image_boxes import ImageBoxes
from sniper.chips.pyramid import PyramidSpec
from sniper.chips.table import ChipTable

_IMAGES_AT_ONCE = 65_536
_SLACK = 1e-6  # level pixels by which rounding may move an edge


def cover(pyramid: PyramidSpec, images: ImageBoxes, *, generator: np.random.Generator) -> ChipTable:
    """Choose the positive chips of many images at all levels.

    Per image and level, windows are taken one by one, each time one that covers most still uncovered boxes; a box is
    covered by a window that it lies wholly inside. Among equally good windows one is drawn at random. A box that no
    window of its level can hold moves on to the next coarser level that can.

    Args:
        pyramid: levels, chip size and stride.
        images: their sides, and the boxes to cover.
        generator: draws the ties and the offset of the grid. Equal states give equal chips.

    Returns:
        The chips, image after image and level after level; none is negative.

    Example:
        >>> one = cover(
        ...     PyramidSpec(),
        ...     ImageBoxes(
        ...         widths=np.array([640]),
        ...         heights=np.array([480]),
        ...         offsets=np.array([0, 2]),
        ...         boxes=np.array([[10.0, 10.0, 40.0, 40.0], [300.0, 200.0, 460.0, 400.0]]),
        ...         is_wanted=np.array([True, True]),
        ...     ),
        ...     generator=np.random.default_rng(0),
        ... )
        >>> one.level.tolist()
        [0, 2]
    """
    is_taken = np.zeros((0, len(pyramid.levels)), dtype=np.bool_)
    least = np.ones(len(pyramid.levels), dtype=np.int64)
    return _choose(pyramid, images, is_taken=is_taken, least=least, generator=generator)


def fits(pyramid: PyramidSpec, images: ImageBoxes) -> Bool[np.ndarray, "n l"]:
    """Tell which boxes some window of each level can hold, the grid not shifted.

    Args:
        pyramid: levels, chip size and stride.
        images: with their boxes.

    Returns:
        (n, l) one flag for each box and level.
    """
    can_hold = []
    for level in pyramid.levels:
        resized = level.resized(images.widths, images.heights)
        is_held = np.ones(len(images.boxes), dtype=np.bool_)
        for axis, (sides, old) in enumerate(zip(resized, (images.widths, images.heights), strict=True)):
            scale, side = (sides / old)[images.image_of_box], sides[images.image_of_box]
            low, high = images.boxes[:, axis] * scale, np.minimum(images.boxes[:, axis + 2] * scale, side)
            room = np.maximum(side - pyramid.chip_size, 0)
            last = -(-room // pyramid.stride)
            first_fit = np.clip(np.ceil((high - pyramid.chip_size - _SLACK) / pyramid.stride), 0, last)
            last_fit = np.where(low + _SLACK >= room, last, np.floor((low + _SLACK) / pyramid.stride))
            is_held &= first_fit <= last_fit
        can_hold.append(is_held)
    return np.stack(can_hold, axis=1)


def gather(
    pyramid: PyramidSpec,
    images: ImageBoxes,
    *,
    is_taken: Bool[np.ndarray, "n l"],
    least: Int[np.ndarray, " l"],
    generator: np.random.Generator,
) -> ChipTable:
    """Choose the windows in which enough boxes gather, by the greed of `cover`, until no window holds enough.

    Args:
        pyramid: levels, chip size and stride.
        images: their sides and boxes; those that are wanted count at the levels in whose range their size lies.
        is_taken: (n, l) the boxes that do not count at a level.
        least: (l,) the fewest boxes that a window of each level must add.
        generator: see `cover`.

    Returns:
        The windows; no box moves to another level.
    """
    return _choose(pyramid, images, is_taken=is_taken, least=least, generator=generator)


def _choose(
    pyramid: PyramidSpec,
    images: ImageBoxes,
    *,
    is_taken: Bool[np.ndarray, "t l"],
    least: Int[np.ndarray, " l"],
    generator: np.random.Generator,
) -> ChipTable:
    """Choose windows; where no box is marked as taken or not, boxes move to other levels."""
    seed = generator.integers(1, 2**63, dtype=np.int64)
    shift = generator.integers(0, pyramid.stride, size=2) if pyramid.random_offset else np.zeros(2, np.int64)
    resized = [level.resized(images.widths, images.heights) for level in pyramid.levels]
    bounds = np.array([[level.at_least, level.below] for level in pyramid.levels])
    moved_to = np.full(len(images.boxes), -1, dtype=np.int8)
    parts = []
    for first in range(0, len(images), _IMAGES_AT_ONCE):
        some = slice(first, first + _IMAGES_AT_ONCE)
        starts = images.offsets[first : first + _IMAGES_AT_ONCE + 1]
        own = slice(starts[0], starts[-1])
        parts.append(
            _choose_some(
                np.stack([np.stack([w[some], h[some]]) for w, h in resized]),
                np.stack([images.widths[some], images.heights[some]]).astype(np.int64),
                starts - starts[0],
                np.ascontiguousarray(images.boxes[own], dtype=np.float64),
                images.is_wanted[own],
                bounds,
                (pyramid.chip_size, pyramid.stride, int(shift[0]), int(shift[1])),
                np.uint64(seed) + np.uint64(first),
                is_taken[own],
                least,
                moved_to[own],
            )
        )
    counts = np.concatenate([part[0] for part in parts]) if parts else np.zeros(0, np.int64)
    chips = np.concatenate([part[1] for part in parts]) if parts else np.zeros((0, 3), np.int32)
    return ChipTable(
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


def _choose_some(
    level_sides: Int[np.ndarray, "l 2 m"],
    image_sides: Int[np.ndarray, "2 m"],
    offsets: Int[np.ndarray, " m_plus_1"],
    boxes: Float[np.ndarray, "n 4"],
    is_wanted: Bool[np.ndarray, " n"],
    bounds: Float[np.ndarray, "l 2"],
    grid: tuple[int, int, int, int],
    seed: np.uint64,
    is_taken: Bool[np.ndarray, "t l"],
    least: Int[np.ndarray, " l"],
    moved_to: Int[np.ndarray, " n"],
) -> tuple[Int[np.ndarray, " m"], Int[np.ndarray, "c 3"]]:
    """Choose windows of some images; fills `moved_to`, gives chips per image and (level, x, y) of each chip."""
    num_levels = len(bounds)
    room = np.empty(
        (num_levels * len(boxes), 3), dtype=np.int32
    )  # a chip covers at least one box of its level
    counts = np.zeros(len(offsets) - 1, dtype=np.int64)
    _cover_all(
        level_sides, image_sides, offsets, boxes, is_wanted, bounds, grid, seed, is_taken, least, moved_to, room, counts
    )  # fmt: skip
    starts = num_levels * offsets[:-1]
    firsts = np.cumsum(counts) - counts
    index = np.arange(counts.sum()) + np.repeat(starts - firsts, counts)
    return counts, room[index]


@numba.njit(cache=True)
def _mix(state: np.uint64) -> np.uint64:
    """Scramble 64 bits (the finaliser of SplitMix64)."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


@numba.njit(cache=True)
def _num_positions(side: int, chip_size: int, stride: int, shift: int) -> int:
    """Count the windows along one axis: on the grid, and flush with both borders."""
    room = side - chip_size
    return 1 if room <= 0 else (room + shift + stride - 1) // stride + 1


@numba.njit(cache=True)
def _position(index: int, side: int, chip_size: int, stride: int, shift: int) -> int:
    """Give the edge of a window along one axis."""
    return min(max(index * stride - shift, 0), max(side - chip_size, 0))


@numba.njit(cache=True)
def _interval(low: float, high: float, side: int, chip_size: int, stride: int, shift: int) -> tuple[int, int]:
    """Give the first and last window along one axis that hold [low, high]; the last is less if none does."""
    last = _num_positions(side, chip_size, stride, shift) - 1
    room = side - chip_size
    start = high - chip_size - _SLACK
    first_fit = 0 if start <= 0 else min(int(np.ceil((start + shift) / stride)), last)
    last_fit = last if low + _SLACK >= room else int(np.floor((low + _SLACK + shift) / stride))
    return first_fit, last_fit


@numba.njit(cache=True)
def _count_boxes(rects: np.ndarray, num_x: int, num_y: int) -> tuple[np.ndarray, np.ndarray]:
    """Count for each window the boxes that it holds, and for each such count the windows that have it.

    `rects` (k, 4) holds the first and last column, first and last row of the windows that hold each box.
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


@numba.njit(cache=True)
def _sort_by_count(counts: np.ndarray, num_windows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sort the windows that hold a box by their counts.

    Gives the windows as y * num_x + x, those of one count side by side; the place of each window among them; and where
    each count starts, with the end as the last.
    """
    num_y, num_x = counts.shape
    starts = np.zeros(len(num_windows) + 1, dtype=np.int32)
    for count in range(1, len(num_windows)):
        starts[count + 1] = starts[count] + num_windows[count]
    windows = np.empty(starts[-1], dtype=np.int32)
    place = np.empty((num_y, num_x), dtype=np.int32)
    free = starts.copy()
    for y in range(num_y):
        for x in range(num_x):
            count = counts[y, x]
            if count > 0:
                windows[free[count]] = y * num_x + x
                place[y, x] = free[count]
                free[count] += 1
    return windows, place, starts


@numba.njit(cache=True)
def _forget_box(
    rect: np.ndarray, counts: np.ndarray, windows: np.ndarray, place: np.ndarray, starts: np.ndarray
) -> None:
    """Take a covered box from every window that holds it: each swaps with the first of its count and falls by one."""
    num_x = counts.shape[1]
    for y in range(rect[2], rect[3] + 1):
        for x in range(rect[0], rect[1] + 1):
            count = counts[y, x]
            front, here = starts[count], place[y, x]
            other = windows[front]
            windows[front], windows[here] = y * num_x + x, other
            place[other // num_x, other % num_x] = here
            place[y, x] = front
            starts[count] += 1
            counts[y, x] = count - 1


@numba.njit(cache=True)
def _draw(state: np.uint64, count: int) -> tuple[np.uint64, np.int64]:
    """Draw one of so many; gives the new random state and the number drawn."""
    state += np.uint64(0x9E3779B97F4A7C15)
    return state, np.int64(_mix(state) % np.uint64(count))


@numba.njit(cache=True)
def _pick_common(rects: np.ndarray, pick: np.ndarray, state: np.uint64) -> tuple[bool, np.uint64]:
    """Draw one of the windows that hold all these boxes into `pick`; tells whether there is any."""
    left, right, top, bottom = rects[0]
    for r in range(1, len(rects)):
        left, right = max(left, rects[r, 0]), min(right, rects[r, 1])
        top, bottom = max(top, rects[r, 2]), min(bottom, rects[r, 3])
    if right < left or bottom < top:
        return False, state
    num_x, num_y = right - left + 1, bottom - top + 1
    state, drawn = _draw(state, num_x * num_y)
    pick[0], pick[1] = left + drawn % num_x, top + drawn // num_x
    return True, state


@numba.njit(cache=True)
def _take_covered(rects: np.ndarray, num_left: int, x: int, y: int) -> int:
    """Move the boxes that a window holds behind those that are left; gives how many are left now."""
    r = 0
    while r < num_left:
        if rects[r, 0] <= x <= rects[r, 1] and rects[r, 2] <= y <= rects[r, 3]:
            num_left -= 1
            for k in range(4):
                rects[r, k], rects[num_left, k] = rects[num_left, k], rects[r, k]
        else:
            r += 1
    return num_left


@numba.njit(cache=True)
def _cover_group(
    rects: np.ndarray, least: int, picked: np.ndarray, state: np.uint64
) -> tuple[int, np.uint64]:
    """Cover boxes that lie near each other by as few windows as greed finds.

    `rects` (k, 4) is as in `_count_boxes`, and its order changes: the boxes left stand first. The columns and rows of
    the chosen windows go to `picked` (k, 2); their number and the new random state are returned. Windows that add fewer
    than `least` boxes are not taken. Once a window holds all boxes that are left, as one mostly does from the start, it
    is the last and nothing needs counting.
    """
    if len(rects) < least:
        return 0, state
    is_done, state = _pick_common(rects, picked[0], state)
    if is_done:
        return 1, state
    first_x, first_y = rects[:, 0].min(), rects[:, 2].min()
    rects[:, :2] -= first_x
    rects[:, 2:] -= first_y
    counts, num_windows = _count_boxes(rects, rects[:, 1].max() + 1, rects[:, 3].max() + 1)
    windows, place, starts = _sort_by_count(counts, num_windows)
    num_left, num_picked, most = len(rects), 0, len(rects)
    while not is_done:
        while most >= least and starts[most + 1] == starts[most]:
            most -= 1
        if most < least:
            break
        state, drawn = _draw(state, starts[most + 1] - starts[most])
        y, x = divmod(windows[starts[most] + drawn], counts.shape[1])
        picked[num_picked, 0], picked[num_picked, 1] = x, y
        num_picked += 1
        before, num_left = num_left, _take_covered(rects, num_left, x, y)
        if num_left < least:
            break
        is_done, state = _pick_common(rects[:num_left], picked[num_picked], state)
        num_picked += is_done
        if not is_done:
            for r in range(num_left, before):
                _forget_box(rects[r], counts, windows, place, starts)
    picked[:num_picked, 0] += first_x
    picked[:num_picked, 1] += first_y
    return num_picked, state


@numba.njit(cache=True)
def _group(rects: np.ndarray) -> np.ndarray:
    """Bring boxes into an order in which those that share windows, if only by way of others, stand side by side.

    Boxes are put into square cells as wide as the most windows that hold one box, so that those that share a window lie
    in neighbouring cells; cells that hang together make a group. Gives where each group starts, with the end as last.
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
    columns, rows = (rects[:, 0] - first_x) // span, (rects[:, 2] - first_y) // span
    newest = np.full((num_y, num_x), -1, dtype=np.int32)  # box of each cell; the one before it is in `older`
    older = np.empty(num_rects, dtype=np.int32)
    for r in range(num_rects):
        older[r] = newest[rows[r], columns[r]]
        newest[rows[r], columns[r]] = r
    order = np.empty(num_rects, dtype=np.int32)
    num_ordered, num_groups = 0, 0
    for seed in range(num_rects):
        if newest[rows[seed], columns[seed]] < 0:
            continue  # its cell was emptied into a group
        reached = num_ordered
        num_ordered = _empty_cell(newest, older, columns[seed], rows[seed], order, num_ordered)
        while reached < num_ordered:
            box = order[reached]
            for y in range(max(rows[box] - 1, 0), min(rows[box] + 2, num_y)):
                for x in range(max(columns[box] - 1, 0), min(columns[box] + 2, num_x)):
                    num_ordered = _empty_cell(newest, older, x, y, order, num_ordered)
            reached += 1
        num_groups += 1
        starts[num_groups] = num_ordered
    rects[:] = rects[order]
    return starts[: num_groups + 1]


@numba.njit(cache=True)
def _empty_cell(
    newest: np.ndarray, older: np.ndarray, x: int, y: int, order: np.ndarray, num_ordered: int
) -> int:
    """Append the boxes of a cell to an order; gives its new length."""
    box = newest[y, x]
    newest[y, x] = -1
    while box >= 0:
        order[num_ordered] = box
        num_ordered += 1
        box = older[box]
    return num_ordered


@numba.njit(cache=True)
def _cover_level(
    rects: np.ndarray, least: int, picked: np.ndarray, state: np.uint64
) -> tuple[int, np.uint64]:
    """Cover all boxes of a level, group by group; as `_cover_group`."""
    starts = _group(rects)
    num_picked = 0
    for g in range(len(starts) - 1):
        count, state = _cover_group(rects[starts[g] : starts[g + 1]], least, picked[num_picked:], state)
        num_picked += count
    return num_picked, state


@numba.njit(cache=True, parallel=True)
def _cover_all(
    level_sides: np.ndarray,
    image_sides: np.ndarray,
    offsets: np.ndarray,
    boxes: np.ndarray,
    is_wanted: np.ndarray,
    bounds: np.ndarray,
    grid: tuple[int, int, int, int],
    seed: np.uint64,
    is_taken: np.ndarray,
    least: np.ndarray,
    moved_to: np.ndarray,
    room: np.ndarray,
    counts: np.ndarray,
) -> None:
    """Cover every image at every level; fills `moved_to`, `room` and `counts`."""
    chip_size, stride, shift_x, shift_y = grid
    num_levels = len(bounds)
    may_move = len(is_taken) == 0
    for image in numba.prange(len(counts)):
        first, last = offsets[image], offsets[image + 1]
        if first == last:
            continue
        state = _mix(seed + np.uint64(image))
        num_chips = 0
        is_carried = np.zeros(last - first, dtype=np.bool_)  # own levels could not hold it, none has yet
        is_covered = np.zeros(last - first, dtype=np.bool_)
        rects = np.empty((last - first, 4), dtype=np.int32)
        picked = np.empty((last - first, 2), dtype=np.int32)
        for level in range(num_levels):
            width, height = level_sides[level, 0, image], level_sides[level, 1, image]
            scale_x, scale_y = width / image_sides[0, image], height / image_sides[1, image]
            num_rects = 0
            for b in range(first, last):
                if not is_wanted[b]:
                    continue
                x1, y1, x2, y2 = boxes[b, 0], boxes[b, 1], boxes[b, 2], boxes[b, 3]
                box_size = np.sqrt((x2 - x1) * (y2 - y1))
                is_own = bounds[level, 0] <= box_size < bounds[level, 1]
                if not (is_own or is_carried[b - first]) or (not may_move and is_taken[b, level]):
                    continue
                left, right = _interval(
                    x1 * scale_x, min(x2 * scale_x, float(width)), width, chip_size, stride, shift_x
                )
                top, bottom = _interval(
                    y1 * scale_y, min(y2 * scale_y, float(height)), height, chip_size, stride, shift_y
                )
                if right < left or bottom < top:
                    is_carried[b - first] = may_move and not is_covered[b - first]
                    continue
                if not is_own:
                    moved_to[b] = level
                is_carried[b - first] = False
                is_covered[b - first] = True
                rects[num_rects, 0], rects[num_rects, 1] = left, right
                rects[num_rects, 2], rects[num_rects, 3] = top, bottom
                num_rects += 1
            if num_rects == 0:
                continue
            num_picked, state = _cover_level(rects[:num_rects], least[level], picked, state)
            for p in range(num_picked):
                row = num_levels * first + num_chips
                room[row, 0] = level
                room[row, 1] = _position(picked[p, 0], width, chip_size, stride, shift_x)
                room[row, 2] = _position(picked[p, 1], height, chip_size, stride, shift_y)
                num_chips += 1
        counts[image] = num_chips
