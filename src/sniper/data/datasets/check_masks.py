"""Check the masks of a data set, of any format. A mask that cannot be used is left out; its box remains."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float

from sniper.data.datasets.raw import Findings, RawDataset
from sniper.geometry.masks import MaskArrays

_TOLERANCE = 1.0  # pixels by which polygons may reach beyond the border: tools round and draw on it


def check_masks(
    raw: RawDataset, frames: Float[np.ndarray, "n 2"]
) -> tuple[MaskArrays | None, tuple[Findings, ...]]:
    """Check masks against their images and boxes.

    Args:
        raw: the data set.
        frames: (n, 2) width and height of the image of each box; NaN where they are unknown.

    Returns:
        The masks that can be used, None if there are none, and what is wrong with others. Points outside the image are
        kept: everything that masks are used for is inside.
    """
    if raw.masks is None:
        return None, raw.bad_masks
    masks = raw.masks
    measures = masks.measure()
    x1, y1, x2, y2 = measures.boxes.T
    width, height = frames.T
    is_left_out = np.zeros(len(masks), dtype=np.bool_)
    findings = list(raw.bad_masks)

    def collect(problem: str, is_affected: Bool[np.ndarray, " n"], describe: Callable[[int], str]) -> None:
        findings.append(
            Findings.collect(
                problem,
                is_affected & ~is_left_out,
                lambda i: f"{raw.name_box(i)}: {describe(i)}",
                noun="mask",
                plural="masks",
            )
        )

    def leave_out(problem: str, is_bad: Bool[np.ndarray, " n"], describe: Callable[[int], str]) -> None:
        collect(f"{problem}, left out", is_bad, describe)
        is_left_out[is_bad] = True

    def show(index: int) -> str:
        corners = " ".join(f"{number:g}" for number in measures.boxes[index].tolist())
        return f"the mask spans {corners} (x1 y1 x2 y2)"

    sides = masks.sides.astype(np.float64)
    leave_out(
        "of another size than the image",
        masks.is_encoded & (sides != frames).any(axis=1) & ~np.isnan(width),
        lambda i: f"the run lengths are of {_show(sides[i])} pixels, the image of {_show(frames[i])}",
    )
    leave_out(
        "whose run lengths do not fill their size",
        measures.is_invalid,
        lambda i: f"expected run lengths of {_show(sides[i])} pixels",
    )
    is_finite = np.isfinite(measures.boxes).all(axis=1)
    leave_out("without a pixel", measures.areas == 0, lambda _: "no pixel is set")
    leave_out(
        "with numbers that are not finite", masks.has_mask & ~is_finite, lambda _: "expected finite numbers"
    )
    leave_out("without width or height", is_finite & ((x2 <= x1) | (y2 <= y1)), show)
    leave_out(
        "outside the image",
        (x1 >= width) | (y1 >= height) | (x2 <= 0) | (y2 <= 0),
        lambda i: f"{show(i)}, outside its image of {_show(frames[i])} pixels",
    )
    box_x1, box_y1, box_x2, box_y2 = raw.boxes.T
    leave_out(
        "outside the box",
        (x1 >= box_x2) | (y1 >= box_y2) | (x2 <= box_x1) | (y2 <= box_y1),
        lambda i: f"{show(i)}, outside its box of {raw.boxes[i].tolist()}",
    )
    is_over = (x1 < -_TOLERANCE) | (y1 < -_TOLERANCE)
    is_over |= (x2 > width + _TOLERANCE) | (y2 > height + _TOLERANCE)
    collect(
        "with points outside the image, used inside it",
        is_over,
        lambda i: f"{show(i)} in {_show(frames[i])}",
    )
    if is_left_out.any():
        masks = masks.select(~is_left_out).spread(~is_left_out)
    return masks if masks.has_mask.any() else None, tuple(each for each in findings if each.count)


def _show(sides: Float[np.ndarray, "2"]) -> str:
    return f"{sides[0]:.0f}x{sides[1]:.0f}"
