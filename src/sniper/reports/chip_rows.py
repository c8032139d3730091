"""Cut the chips of an epoch that the page of a run shows: a row for each level, with boxes by status."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from sniper.chips import BoxStatus
from sniper.data.batches import ChipDataset, ChipSample
from sniper.data.epoch import EpochOrder
from sniper.data.spec import CacheSpec, DataSpec
from sniper.errors import SniperError
from sniper.geometry.detection_masks import DetectionMasks
from sniper.reports.crops import shrink
from sniper.reports.images import to_path
from sniper.reports.page import resize_rule, sizes_text
from sniper.reports.parts import Budget, ChipRow, ChipsPart, Mark, MarkedPicture

_PER_LEVEL, _MAX_CHIPS = 6, 48
_SIDE = 224  # pixels of a picture

_STATUS = {BoxStatus.VALID: "valid", BoxStatus.OUT_OF_RANGE: "out", BoxStatus.IGNORE: "ignore"}


def cut_chips(order: EpochOrder, data: DataSpec, *, epoch: int, budget: Budget) -> ChipsPart:
    """Cut some chips of an epoch as training sees them, with mirroring and jitter but without a user's transform.

    No random draw of the training is used, and nothing is written to the cache of chips.

    Args:
        order: of the epoch.
        data: how chips are read.
        epoch: 0 for the first.
        budget: for the pictures.
    """
    table, names = order.table, [category.name for category in order.dataset.categories]
    chips = ChipDataset(order, spec=replace(data, cache=CacheSpec(), on_bad_image="refuse"))
    levels = table.level[order.chip_indices]
    per_level = max(min(_PER_LEVEL, _MAX_CHIPS // len(table.levels)), 1)
    rows = []
    for index, spec in enumerate(table.levels):
        pictures = []
        for position in _choose(order, np.flatnonzero(levels == index), count=per_level):
            if budget.is_spent:
                budget.num_left_out += 1
                continue
            try:
                marked = _draw(chips[position], names)
            except SniperError:
                budget.num_left_out += 1
                continue
            budget.add(marked)
            pictures.append(marked)
        of_level = table.level == index
        rows.append(
            ChipRow(
                level=resize_rule(spec),
                sizes=sizes_text(spec),
                num_chips=int(of_level.sum()),
                num_negative=int((of_level & table.is_negative).sum()),
                chips=pictures,
            )
        )
    return ChipsPart(epoch=epoch + 1, num_left_out=budget.num_left_out, rows=rows)


def _choose(order: EpochOrder, positions: np.ndarray, *, count: int) -> Sequence[int]:
    """Choose positions of a level evenly, one in three of negative chips if there are any; neighbours share images."""
    is_negative = order.table.is_negative[order.chip_indices[positions]]
    num_negative = min(count // 3, int(is_negative.sum()))
    chosen = [
        group[np.unique(np.linspace(0, len(group) - 1, min(number, len(group))).round().astype(int))]
        for group, number in (
            (positions[~is_negative], count - num_negative),
            (positions[is_negative], num_negative),
        )
        if len(group) and number
    ]
    return np.concatenate(chosen).tolist() if chosen else []


def _draw(sample: ChipSample, names: Sequence[str]) -> MarkedPicture:
    height, width = sample.pixels.shape[:2]
    picture = shrink(np.ascontiguousarray(sample.pixels), max_side=_SIDE)
    boxes = (sample.target.boxes * (picture.width / width)).round(1).tolist()
    masks = sample.target.masks
    grids = (
        None if masks is None else DetectionMasks.from_arrays(masks, window=np.array([0.0, 0, width, height]))
    )
    marks = [
        Mark(
            box=box,
            kind=_STATUS[BoxStatus(status)],
            text=names[label],
            outline=to_path(grids, row, zoom=picture.width / width),
        )
        for row, (box, status, label) in enumerate(
            zip(boxes, sample.target.status.tolist(), sample.target.labels.tolist(), strict=True)
        )
    ]
    marks.sort(key=lambda mark: mark.kind == "valid")  # on top
    return MarkedPicture(picture=picture, marks=marks, caption=f"{sample.name}, {width} × {height} px")
