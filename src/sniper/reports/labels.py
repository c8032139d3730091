"""Place the labels of boxes in a picture where they cover no other box and no other label."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from sniper.geometry.boxes import area, intersections

_MAX_COVERED = 0.1  # of the area of a box, by a label that lies wholly inside it
_TOLERANCE = 1e-6  # of areas, square pixels


@dataclass(frozen=True, kw_only=True)
class Label:
    """A label, and its place.

    Attributes:
        index: of its box.
        text: one line.
        box: (4,) xyxy of its ground, picture frame, whole pixels.
    """

    index: int
    text: str
    box: Float[np.ndarray, "4"]


def place_labels(
    boxes: Float[np.ndarray, "n 4"],
    texts: Sequence[Sequence[str]],
    *,
    measure: Callable[[str], tuple[int, int]],
    width: int,
    height: int,
) -> list[Label]:
    """Place labels, those of the first boxes first; a box whose label has no place gets none.

    A label lies outside the other boxes or, where it is small, wholly inside them; it overlaps no other label and does
    not leave the picture. It is above its box, below it, or inside it where it is small.

    Args:
        boxes: (n, 4) xyxy with their outlines, picture frame, pixels. May be empty.
        texts: for each box the texts of its label; the first that has a place is used.
        measure: returns width and height of the ground of a text, pixels.
        width: of the picture, pixels.
        height: of the picture, pixels.
    """
    corners = np.clip(boxes, 0, [width, height, width, height])
    areas = area(boxes)
    taken = np.empty((0, 4))
    labels = []
    for index, of_box in enumerate(texts):
        places = ((text, place) for text in of_box for place in _places(corners[index], *measure(text)))
        for text, place in places:
            is_inside = (place >= 0).all() and place[2] <= width and place[3] <= height
            if is_inside and _is_free(place, boxes, areas, taken):
                labels.append(Label(index=index, text=text, box=place))
                taken = np.concatenate([taken, place[None]])
                break
    return labels


def _places(box: Float[np.ndarray, "4"], width: int, height: int) -> Iterator[Float[np.ndarray, "4"]]:
    """Iterate the places for a label of a box, the best first: above, below, and inside, left and right."""
    x1, y1, x2, y2 = np.round(box)
    for y in (y1 - height, y2, y1):
        for x in (x1, x2 - width):
            yield np.array([x, y, x + width, y + height])


def _is_free(
    place: Float[np.ndarray, "4"],
    boxes: Float[np.ndarray, "n 4"],
    areas: Float[np.ndarray, " n"],
    taken: Float[np.ndarray, "k 4"],
) -> bool:
    """Check that a label covers no other label, and no box but a small part of one that contains it."""
    (of_label,) = area(place[None])
    (covered,) = intersections(place[None], boxes)  # (n,)
    is_small = (covered >= of_label - _TOLERANCE) & (covered <= _MAX_COVERED * areas)
    is_covered = (covered > _TOLERANCE) & ~is_small
    return not is_covered.any() and not (intersections(place[None], taken) > _TOLERANCE).any()
