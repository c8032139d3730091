"""Check the boxes and the image files of a data set of any format, so that later code can trust it.

`docs/annotations.md` lists what is accepted, corrected, dropped and refused.
"""

import os
import reprlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Bool, Float, Int

from sniper.chips.targets import is_learnable
from sniper.data.datasets.check_masks import check_masks
from sniper.data.datasets.dataset import Dataset
from sniper.data.datasets.image_files import (
    AS_STORED,
    ImageFiles,
    find_bad_files,
    find_file_problem,
    locate_image_files,
)
from sniper.data.datasets.raw import (
    MAX_CATEGORIES,
    MAX_NAME,
    MAX_SIDE,
    Findings,
    RawDataset,
    raise_for,
)
from sniper.data.images.files import read_image_sides
from sniper.data.spec import DataSpec
from sniper.errors import count_and_list, counted
from sniper.files import no_garbage_collection
from sniper.geometry.boxes import Sides, area
from sniper.geometry.masks import MaskArrays

SKIPPED = ", to be skipped "
"""Part of the warning that lists image files that are skipped."""

_MAX_EXAMPLES = 3  # listed in a warning or a problem
_TOLERANCE = 1e-3  # pixels by which rounded decimals may reach beyond the border of an image
_NOTABLE_CROWDS = 0.1  # share of the boxes from which crowds are reported

# Of COCO's boxes, 16 % are inside their image when they are read as corners, and hardly any reaches far over the
# border; of other data sets, fewer. Files with corners have some bad boxes, too.
_FAR = 0.1  # share of a side by which a box reaches far over the border
_MIN_FAR = 3  # number of such boxes from which a data set looks like corners
_MIN_FAR_SHARE = 0.2
_MIN_CORNERS_SHARE = 0.9
_MIN_FRACTIONS_SHARE = 0.9
_MIN_FRAME = 16  # pixels, sides of images whose boxes can be recognised as fractions

_HASH_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # 2^64 divided by the golden ratio


@no_garbage_collection()  # the objects that `raw` was read from would be searched
def check_dataset(raw: RawDataset, *, has_images: bool = True, data: DataSpec = DataSpec()) -> Dataset:
    """Check a data set as a reader returns it.

    Args:
        raw: the data set.
        has_images: whether the image files are available; their headers are compared with the annotations.
        data: how images are read (`read`), and what happens to those and to boxes that cannot be used (`on_bad_image`,
            `on_bad_box`, `crowds`); the data sets that it names are not used.

    Returns:
        The data set; its `warnings` list what was corrected, dropped or cannot be used.

    Raises:
        AnnotationError: listing the problems of the data set, one a line; the first 20 in words, the rest as a count.
    """
    has_unknown_sides = bool(((raw.widths < 1) | (raw.heights < 1)).any())
    files = locate_image_files(
        raw.path,
        raw.file_names.tolist(),
        image_root=raw.image_root,
        is_complete=has_images or has_unknown_sides,
    )
    raw, side_problems, side_findings = _complete_sides(raw, files, data)
    problems = [*raw.problems, *_find_excess(raw), *side_problems]
    has_unchecked_files = has_images and not raw.are_files_checked
    file_problems = _find_bad_files(raw, files, data) if has_unchecked_files else []
    raw, file_problems, turned_findings, advice = _exchange_stored_sides(raw, file_problems)
    bad_files = [_name_file_problem(raw, *problem) for problem in file_problems]
    if data.on_bad_image == "refuse":
        problems += [*bad_files, *advice]
        bad_files, advice = [], []
    frames = _frames(raw)
    if data.boxes_from_masks == "all" and raw.masks is not None:
        bounds = raw.masks.bounds()
        raw = replace(raw, boxes=np.where(np.isnan(bounds), raw.boxes, bounds), show_box=None)
    problems += _find_other_formats(raw, frames)
    is_usable, unusable = _find_unusable(raw, frames)
    masks, bad_masks = check_masks(raw, frames)
    dropped = [*raw.dropped, *unusable]
    num_unlisted = 0
    if data.on_bad_box == "refuse":
        unused = [*dropped, *bad_masks]
        problems += [line for findings in unused for line in findings.examples]
        num_unlisted = sum(findings.count - len(findings.examples) for findings in unused)
    raise_for(raw.path, problems, num_unlisted=num_unlisted)
    raw = replace(raw, masks=masks)
    if unusable:
        raw, frames = _select(raw, is_usable), frames[is_usable]
    if data.crowds == "objects":
        raw = replace(raw, is_crowd=np.zeros(len(raw.boxes), dtype=np.bool_))
    clipped = _clip(raw.boxes, frames)
    num_dropped = sum(findings.count for findings in dropped)
    warnings = [
        *raw.warnings,
        *_describe_repeated_names(raw),
        *files.warnings,
        *_list_findings([*side_findings, *turned_findings, _find_shared_files(raw, files)]),
        *_describe_dropped(dropped, num_boxes=num_dropped + len(clipped)),
        *_list_findings(bad_masks),
        *_list_findings(_find_notable(raw, clipped=clipped, frames=frames)),
        *_describe_crowds(raw),
        *_describe_bad_files(bad_files),
        *advice,
    ]
    return _assemble(
        raw,
        clipped,
        files=files,
        follow_links=data.follow_links,
        num_dropped=num_dropped,
        warnings=tuple(f"{raw.path}: {line}" for line in warnings),
    )


def _find_excess(raw: RawDataset) -> Iterator[str]:
    """Yield a problem for each image that is too large, for too many categories, and for names that are too long."""
    is_large = (raw.widths > MAX_SIDE) | (raw.heights > MAX_SIDE)
    for index in np.flatnonzero(is_large).tolist():
        yield (
            f"{raw.name_image(index)}: width and height are {raw.widths[index]} and {raw.heights[index]}, expected at "
            f"most {MAX_SIDE:,} pixels"
        )
    if len(raw.categories) > MAX_CATEGORIES:
        yield f"there are {len(raw.categories):,} categories, expected at most {MAX_CATEGORIES:,}"
    for category in raw.categories:
        if len(category.name) > MAX_NAME:
            yield (
                f"category {reprlib.repr(category.category_id)}: name {reprlib.repr(category.name)} has "
                f"{len(category.name):,} characters, expected at most {MAX_NAME:,}"
            )


def _describe_repeated_names(raw: RawDataset) -> Iterator[str]:
    """Yield a line for each name that several categories have."""
    ids_of: dict[str, list[int | str]] = {}
    for category in raw.categories:
        ids_of.setdefault(category.name, []).append(category.category_id)
    for name, ids in ids_of.items():
        if len(ids) > 1:
            yield (
                f"{len(ids)} categories have the name {reprlib.repr(name)} and remain separate classes: ids "
                f"{', '.join(map(str, ids))}"
            )


# Images


def _complete_sides(
    raw: RawDataset, files: ImageFiles, data: DataSpec
) -> tuple[RawDataset, list[str], list[Findings]]:
    """Read the sides that the annotations lack from the image files.

    Returns:
        The data set with all sides, problems of images whose file cannot be read, and what was completed.
    """
    is_unknown = (raw.widths == 0) | (raw.heights == 0)
    is_unknown &= (raw.widths >= 0) & (raw.heights >= 0) & (raw.file_names != "")
    if not is_unknown.any():
        return raw, [], []
    widths, heights, problems = raw.widths.copy(), raw.heights.copy(), []
    is_read = is_unknown.copy()
    for index in np.flatnonzero(is_unknown).tolist():
        path = files.root / files.names[index]
        problem = find_file_problem(
            path, files.root, data.read, expected=None, follow_links=data.follow_links
        )
        if problem is not None:
            is_read[index] = False
            problems.append(
                f"{raw.name_image(index)}: width and height are missing, and {raw.file_names[index]} {problem}"
            )
        else:
            widths[index], heights[index] = read_image_sides(path, data.read)
    completed = Findings.collect(
        "without width and height, which are read from their files",
        is_read,
        lambda i: f"{raw.name_image(i)}: {widths[i]}x{heights[i]}",
        noun="image",
        plural="images",
    )
    return replace(raw, widths=widths, heights=heights), problems, [completed]


def _find_bad_files(raw: RawDataset, files: ImageFiles, data: DataSpec) -> list[tuple[int | None, str]]:
    """Compare the image files with the annotations, reading only headers; return one problem for each bad file."""
    sides = [
        Sides(width, height) if width > 0 and height > 0 else None
        for width, height in zip(raw.widths.tolist(), raw.heights.tolist(), strict=True)
    ]
    problems = find_bad_files(
        files, raw.file_names.tolist(), sides, read=data.read, follow_links=data.follow_links
    )
    return [
        (index, problem)
        for index, problem in problems
        if index is None
        or (raw.file_names[index] and raw.widths[index] and raw.heights[index])  # a problem already
    ]


def _name_file_problem(raw: RawDataset, index: int | None, problem: str) -> str:
    return problem if index is None else f"{raw.name_image(index)}: {problem}"


def _exchange_stored_sides(
    raw: RawDataset, problems: list[tuple[int | None, str]]
) -> tuple[RawDataset, list[tuple[int | None, str]], list[Findings], list[str]]:
    """Exchange width and height that are those of the file as stored, where the boxes are in the oriented image.

    Some tools write the sides of the file as stored, and boxes as they were drawn on the oriented image. Boxes that are
    inside the image in only one of the two frames show which one they refer to.

    Args:
        raw: the data set.
        problems: of its image files, by the index of the image.

    Returns:
        The data set, the problems that are left, what was corrected, and what to do where it is not certain.
    """
    is_stored = np.zeros(len(raw.widths), dtype=np.bool_)
    is_stored[[index for index, problem in problems if index is not None and problem.endswith(AS_STORED)]] = (
        True
    )
    if not is_stored.any():
        return raw, problems, [], []
    frames = _frames(raw)
    is_beyond_stored = (raw.boxes[:, 2:] > frames + 1).any(axis=1)
    is_beyond_oriented = (raw.boxes[:, 2:] > frames[:, ::-1] + 1).any(axis=1)
    is_asked = is_stored[raw.image_indices]
    num_stored = int((is_asked & is_beyond_oriented & ~is_beyond_stored).sum())
    num_oriented = int((is_asked & is_beyond_stored & ~is_beyond_oriented).sum())
    if not num_oriented or num_stored:
        return raw, problems, [], [_advise_orientation(num_stored, num_oriented)]
    exchanged = replace(
        raw,
        widths=np.where(is_stored, raw.heights, raw.widths),
        heights=np.where(is_stored, raw.widths, raw.heights),
    )
    boxes = "1 box is" if num_oriented == 1 else f"{num_oriented} boxes are"
    findings = Findings.collect(
        "with the width and height of the file as stored, exchanged, since "
        f"{boxes} inside the image only as its EXIF orientation shows it",
        is_stored,
        lambda i: f"{raw.name_image(i)}: {exchanged.widths[i]}x{exchanged.heights[i]}",
        noun="image",
        plural="images",
    )
    left = [(index, problem) for index, problem in problems if index is None or not is_stored[index]]
    return exchanged, left, [findings], []


def _advise_orientation(num_stored: int, num_oriented: int) -> str:
    """Explain what to do with images whose annotated sides are those of the file as stored."""
    if num_stored and num_oriented:
        return (
            f"{num_stored} boxes of these images are inside only as their files are stored, and {num_oriented} only in "
            "the EXIF orientation, expected one frame for all: exchange width and height of the latter images"
        )
    if num_stored:
        return (
            f"{num_stored} boxes of these images are inside only as their files are stored; "
            "data.read.exif_orientation: ignore reads them so"
        )
    return (
        "the boxes of these images are inside both as the files are stored and in the EXIF orientation: look at one in "
        "a viewer, which applies the orientation; if the boxes are on their objects there, exchange width and height "
        "in the annotations, otherwise set data.read.exif_orientation: ignore"
    )


def _find_shared_files(raw: RawDataset, files: ImageFiles) -> Findings:
    names = [name and os.path.normpath(name) for name in files.names]
    is_repeat = np.zeros(len(names), dtype=np.bool_)
    if len(set(names)) < len(names):
        _, first = np.unique(names, return_index=True)
        is_repeat[:] = True
        is_repeat[first] = False
    return Findings.collect(
        "with the file of an earlier image",
        is_repeat,
        lambda i: f"{raw.name_image(i)}: {raw.file_names[i]}",
        noun="image",
        plural="images",
    )


# Boxes


def _frames(raw: RawDataset) -> Float[np.ndarray, "n 2"]:
    """Return width and height of the image of each box; NaN where they are unknown."""
    sides = np.stack([raw.widths, raw.heights], axis=1).astype(np.float64)
    sides[(sides < 1).any(axis=1)] = np.nan
    return sides[raw.image_indices] if len(sides) else np.full((len(raw.boxes), 2), np.nan)


def _show(raw: RawDataset, index: int) -> str:
    if raw.show_box is not None:
        return raw.show_box(index)
    return f"the box from x1, y1 to x2, y2 is {raw.boxes[index].tolist()}"


def _find_unusable(
    raw: RawDataset, frames: Float[np.ndarray, "n 2"]
) -> tuple[Bool[np.ndarray, " n"], list[Findings]]:
    """Find boxes that are not finite, have no extent, or are wholly outside their image."""
    x1, y1, x2, y2 = raw.boxes.T
    width, height = frames.T
    is_finite = _are_finite(raw.boxes)
    has_extent = (x2 > x1) & (y2 > y1)
    is_outside = (x1 >= width) | (y1 >= height) | (x2 <= 0) | (y2 <= 0)

    def collect(
        problem: str, is_affected: Bool[np.ndarray, " n"], describe: Callable[[int], str]
    ) -> Findings:
        return Findings.collect(
            problem, is_affected, lambda i: f"{raw.name_box(i)}: {_show(raw, i)}, {describe(i)}"
        )

    findings = [
        collect("with numbers that are not finite", ~is_finite, lambda _: "expected finite numbers"),
        collect(
            "without width or height", is_finite & ~has_extent, lambda _: "expected width and height above 0"
        ),
        collect(
            "outside the image",
            is_finite & has_extent & is_outside,
            lambda i: f"outside its image of {_show_sides(frames[i])} pixels",
        ),
    ]
    return is_finite & has_extent & ~is_outside, [each for each in findings if each.count]


def _clip(boxes: Float[np.ndarray, "n 4"], frames: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, "n 4"]:
    rows = np.flatnonzero(_reach_over(boxes, frames, by=0.0))
    clipped = boxes.copy()
    clipped[rows] = np.clip(boxes[rows], 0.0, np.tile(frames[rows], 2))
    return clipped


def _reach_over(
    boxes: Float[np.ndarray, "n 4"], frames: Float[np.ndarray, "n 2"], *, by: float
) -> Bool[np.ndarray, " n"]:
    """Check which boxes reach over the border of their image by more than some pixels."""
    x1, y1, x2, y2 = boxes.T
    return np.logical_or.reduce([x1 < -by, y1 < -by, x2 > frames[:, 0] + by, y2 > frames[:, 1] + by])


def _are_finite(rows: Float[np.ndarray, "n k"]) -> Bool[np.ndarray, " n"]:
    return np.logical_and.reduce(list(np.isfinite(rows).T))


def _show_sides(frame: Float[np.ndarray, "2"]) -> str:
    return f"{frame[0]:.0f}x{frame[1]:.0f}"


def _find_other_formats(raw: RawDataset, frames: Float[np.ndarray, "n 2"]) -> Iterator[str]:
    """Yield a problem if the numbers of the boxes are corners, or fractions of the image, instead of x, y and sides."""
    x1, y1, x2, y2 = raw.boxes.T
    frame_width, frame_height = frames.T
    with np.errstate(over="ignore", invalid="ignore"):
        width, height = x2 - x1, y2 - y1
    has_extent = (width > 0) & (height > 0) & (width < np.inf) & (height < np.inf)
    is_readable = has_extent & (frame_width > 0) & (frame_height > 0)
    num_boxes = int(is_readable.sum())
    if not num_boxes:
        return

    def examples(is_affected: Bool[np.ndarray, " n"]) -> str:
        return "; ".join(
            f"{raw.name_box(i)}: {_show(raw, i)} in {_show_sides(frames[i])}"
            for i in np.flatnonzero(is_affected)[:_MAX_EXAMPLES].tolist()
        )

    is_above_1 = (width > 1) | (height > 1) | (np.abs(x1) > 1) | (np.abs(y1) > 1)
    is_small = (frame_width < _MIN_FRAME) | (frame_height < _MIN_FRAME)
    is_fraction = is_readable & ~(is_above_1 | is_small)
    num_fractions = int(is_fraction.sum())
    if num_fractions >= _MIN_FRACTIONS_SHARE * num_boxes:
        yield (
            "the boxes look like fractions of their image, expected pixels: no number is above 1 in "
            f"{num_fractions} of {num_boxes} boxes ({examples(is_fraction)})"
        )
    is_far = is_readable & ((x2 > (1 + _FAR) * frame_width) | (y2 > (1 + _FAR) * frame_height))
    num_far = int(is_far.sum())
    if num_far < max(_MIN_FAR, _MIN_FAR_SHARE * num_boxes):
        return
    has_corners = (x1 >= -_FAR * frame_width) & (width > x1) & (width <= (1 + _FAR) * frame_width)
    has_corners &= (y1 >= -_FAR * frame_height) & (height > y1) & (height <= (1 + _FAR) * frame_height)
    if (is_readable & has_corners).sum() >= _MIN_CORNERS_SHARE * num_boxes:
        yield (
            "the boxes look like corners (x1, y1, x2, y2), expected x, y, width, height: "
            f"{num_far} of {num_boxes} boxes reach far over the border of their image, and as corners "
            f"they are inside ({examples(is_far)})"
        )


def _find_notable(
    raw: RawDataset, *, clipped: Float[np.ndarray, "n 4"], frames: Float[np.ndarray, "n 2"]
) -> list[Findings]:
    """Find boxes that are used otherwise than as they are in the file, or twice."""

    def collect(problem: str, is_affected: Bool[np.ndarray, " n"]) -> Findings:
        return Findings.collect(
            problem, is_affected, lambda i: f"{raw.name_box(i)}: {_show(raw, i)} in {_show_sides(frames[i])}"
        )

    is_over = _reach_over(raw.boxes, frames, by=_TOLERANCE)
    return [
        collect("reaching over the border, clipped", is_over),
        collect(
            "less than 1 pixel wide or high, too small to learn from", ~is_learnable(clipped) & ~raw.is_crowd
        ),
        collect("equal to an earlier box of the same image and category, all used", _find_repeats(raw)),
        collect("with an area of 0 in the file, scored as small objects", raw.areas == 0),
    ]


def _find_repeats(raw: RawDataset) -> Bool[np.ndarray, " n"]:
    """Check which boxes have image, category and coordinates of an earlier box."""
    is_repeat = np.zeros(len(raw.boxes), dtype=np.bool_)
    corners = (raw.boxes[:, [0, 3]] + 0.0).view(np.uint64)  # -0.0 + 0.0 is 0.0
    keys = raw.image_indices.astype(np.uint64)
    for column in corners.T:  # two numbers select few candidates
        keys = (keys ^ (keys >> np.uint64(29))) * _HASH_FACTOR + column
    in_order = np.sort(keys)
    repeated = in_order[1:][in_order[1:] == in_order[:-1]]
    if len(repeated):
        candidates = np.flatnonzero(np.isin(keys, repeated))
        rows = np.column_stack([raw.image_indices, raw.category_indices, raw.boxes])[candidates]
        _, first = np.unique(rows, axis=0, return_index=True)
        is_repeat[candidates] = True
        is_repeat[candidates[first]] = False
    return is_repeat


def _select(raw: RawDataset, is_kept: Bool[np.ndarray, " n"]) -> RawDataset:
    """Return a data set of some of the boxes."""
    indices = np.flatnonzero(is_kept)
    show_box = raw.show_box
    return replace(
        raw,
        image_indices=raw.image_indices[indices],
        category_indices=raw.category_indices[indices],
        boxes=raw.boxes[indices],
        is_crowd=raw.is_crowd[indices],
        areas=raw.areas[indices],
        masks=None if raw.masks is None else raw.masks.select(indices),
        name_box=lambda index: raw.name_box(int(indices[index])),
        show_box=None if show_box is None else lambda index: show_box(int(indices[index])),
    )


# Warnings


def _list_findings(findings: Sequence[Findings]) -> list[str]:
    return [str(each) for each in findings if each.count]


def _describe_dropped(dropped: Sequence[Findings], *, num_boxes: int) -> Iterator[str]:
    for findings in dropped:
        yield str(replace(findings, problem=f"{findings.problem}, dropped"))
    num_dropped = sum(findings.count for findings in dropped)
    if 2 * num_dropped > num_boxes:
        yield f"{num_dropped} of {num_boxes} boxes are dropped"


def _describe_crowds(raw: RawDataset) -> Iterator[str]:
    num_crowds = int(raw.is_crowd.sum())
    if num_crowds == len(raw.is_crowd) > 0 or num_crowds > max(5, _NOTABLE_CROWDS * len(raw.is_crowd)):
        share = num_crowds / len(raw.is_crowd)
        yield (
            f"{num_crowds} of {len(raw.is_crowd)} boxes ({share:.0%}) are crowds or regions to ignore, "
            "neither trained nor scored on; data.crowds: objects takes them for objects (--crowds objects, to score or "
            "convert)"
        )


def _describe_bad_files(problems: Sequence[str]) -> Iterator[str]:
    if problems:
        files = counted(len(problems), "bad image file")
        yield f"{files}{SKIPPED}({count_and_list(problems, limit=_MAX_EXAMPLES)})"


def _assemble(
    raw: RawDataset,
    clipped: Float[np.ndarray, "n 4"],
    *,
    files: ImageFiles,
    follow_links: bool,
    num_dropped: int,
    warnings: tuple[str, ...],
) -> Dataset:
    """Build the data set: boxes by image, labels in the order of the category ids."""
    category_order = sorted(range(len(raw.categories)), key=lambda index: raw.categories[index].category_id)
    label_of_category = np.zeros(len(category_order), dtype=np.int64)
    label_of_category[category_order] = np.arange(len(category_order))
    positions = np.arange(len(raw.boxes))
    box_order = (
        np.sort(raw.image_indices << 32 | positions) & 0xFFFFFFFF
    )  # a stable argsort, at twice the speed
    counts = np.bincount(raw.image_indices, minlength=len(raw.image_ids))
    areas = np.where(np.isnan(raw.areas), area(clipped), raw.areas)
    return Dataset(
        path=raw.path,
        image_root=files.root,
        categories=tuple(raw.categories[index] for index in category_order),
        image_ids=raw.image_ids,
        file_names=raw.file_names,
        image_paths=np.array(files.names, dtype=np.str_) if files.is_corrected else raw.file_names,
        follow_links=follow_links,
        widths=raw.widths.astype(np.int32),
        heights=raw.heights.astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        boxes=clipped[box_order],
        labels=label_of_category[raw.category_indices[box_order]],
        is_crowd=raw.is_crowd[box_order],
        areas=areas[box_order],
        masks=_order_masks(raw.masks, box_order),
        num_dropped=num_dropped,
        left_out=raw.left_out,
        warnings=warnings,
    )


def _order_masks(masks: MaskArrays | None, order: Int[np.ndarray, " n"]) -> MaskArrays | None:
    """Return the masks in the order of their boxes; without a copy where it is that of the file, as usual."""
    if masks is None or not masks.has_mask.any():
        return None
    return masks if (np.diff(order) == 1).all() else masks.select(order)
