"""The annotations of any format as they were read: the value between the readers of formats and the checks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int64, Shaped

from sniper.data.datasets.dataset import Category
from sniper.errors import AnnotationError, counted, shorten_repeated
from sniper.geometry.masks import MaskArrays

MAX_LISTED = 20
"""Number of problems of a data set that an error lists; the rest are counted."""

MAX_SIDE = 1_000_000
"""The longest side of an image, pixels: enlarged eight times, its coordinates are still whole numbers in float32."""

MAX_CATEGORIES = 20_000
"""The most categories of a data set: scores of more do not fit into memory. V3Det, the largest known, has 13,204."""

MAX_NAME = 1024
"""The most characters of the name of a category."""

_MAX_EXAMPLES = 3  # listed in a warning


@dataclass(frozen=True, kw_only=True)
class Findings:
    """Boxes, images or other items that have a problem in common.

    Attributes:
        problem: follows their number, such as `without width or height`.
        count: number of items.
        examples: one line for each of the first `MAX_LISTED`: its name, what it has, what was expected.
        noun: for one item.
        plural: for several.
    """

    problem: str
    count: int
    examples: tuple[str, ...]
    noun: str = "box"
    plural: str = "boxes"

    @classmethod
    def collect(
        cls,
        problem: str,
        is_affected: Bool[np.ndarray, " n"],
        describe: Callable[[int], str],
        *,
        noun: str = "box",
        plural: str = "boxes",
    ) -> "Findings":
        """Return the findings of a check.

        Args:
            problem: see `Findings`.
            is_affected: (n,) whether each item has the problem. May be empty.
            describe: returns the line of an item by its index; called for the first few.
            noun: see `Findings`.
            plural: see `Findings`.
        """
        indices = np.flatnonzero(is_affected)
        examples = tuple(describe(index) for index in indices[:MAX_LISTED].tolist())
        return cls(problem=problem, count=len(indices), examples=examples, noun=noun, plural=plural)

    def __str__(self) -> str:
        examples = self.examples[:_MAX_EXAMPLES]
        hidden = self.count - len(examples)
        listed = "; ".join([*examples, *([f"and {hidden} more"] if hidden else [])])
        return f"{counted(self.count, self.noun, self.plural)} {self.problem} ({listed})"


@dataclass(frozen=True, kw_only=True, eq=False)
class RawDataset:
    """Categories, images and boxes as a reader found them: of the right types, but not checked further.

    Attributes:
        path: the annotation file or folder, for messages.
        image_root: folder that the file names are relative to; None where the files are to be looked for.
        categories: in any order, their ids distinct; annotations refer to them by index.
        image_ids: (m,) int64, or text where the format has text; distinct.
        file_names: (m,) text, relative to the image root; empty for one that is among the problems.
        widths: (m,) of the images, pixels; 0 where the annotations do not have them, -1 for one among the problems.
        heights: (m,) of the images, pixels; 0 where the annotations do not have them, -1 for one among the problems.
        image_indices: (n,) the image of each box, as an index.
        category_indices: (n,) the category of each box, as an index.
        boxes: (n, 4) xyxy, image frame, pixels, as in the file: not clipped, perhaps without extent or not finite.
        is_crowd: (n,) whether each box is a crowd or a region to ignore.
        areas: (n,) of the objects, square image pixels; NaN where the file has none.
        name_image: returns the name of an image for messages, by index, such as `image 139`.
        name_box: returns the name of a box for messages, by index, such as `annotation 12 of image 139`
            or `labels/a.txt, line 3`.
        show_box: returns the numbers of a box as the file has them, by index, such as `bbox is [1, 2, 3, 4]`; None
            shows the corners.
        masks: of the n objects, image frame, pixels; None if none has a mask, or masks are not read.
        bad_masks: masks that the reader could not read, and left out.
        dropped: boxes that the reader could not read, and left out.
        are_files_checked: whether the reader has opened the header of every image file, so that it need not be again.
        left_out: one line for each image that is not in the data set, as its file cannot be read.
        problems: for which the data set is refused, one line each.
        warnings: of the reader, one line for each kind, without the path.
    """

    path: Path
    image_root: Path | None
    categories: tuple[Category, ...]
    image_ids: Shaped[np.ndarray, " m"]
    file_names: Shaped[np.ndarray, " m"]
    widths: Int64[np.ndarray, " m"]
    heights: Int64[np.ndarray, " m"]
    image_indices: Int64[np.ndarray, " n"]
    category_indices: Int64[np.ndarray, " n"]
    boxes: Float[np.ndarray, "n 4"]
    is_crowd: Bool[np.ndarray, " n"]
    areas: Float[np.ndarray, " n"]
    name_image: Callable[[int], str]
    name_box: Callable[[int], str]
    show_box: Callable[[int], str] | None = None
    masks: MaskArrays | None = None
    bad_masks: tuple[Findings, ...] = ()
    dropped: tuple[Findings, ...] = ()
    are_files_checked: bool = False
    left_out: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def raise_for(path: Path, problems: Sequence[str], *, num_unlisted: int = 0) -> None:
    """Raise an error that lists the problems of a data set, if there are any.

    Args:
        path: of the data set.
        problems: one line each.
        num_unlisted: number of further problems.

    Raises:
        AnnotationError: with the first `MAX_LISTED`, one a line, and the number of the others.
    """
    if problems:
        count = len(problems) + num_unlisted
        hidden = count - min(len(problems), MAX_LISTED)
        lines = [*shorten_repeated(problems[:MAX_LISTED]), *([f"and {hidden} more"] if hidden else [])]
        raise AnnotationError(f"{path}: {counted(count, 'problem')}\n  " + "\n  ".join(lines))
