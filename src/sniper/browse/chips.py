"""Choose the chips that training would cut, in a thread, while the page is in use already."""

import threading
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from sniper.chips import ChipTable, PyramidSpec
from sniper.chips.negatives import NegativeSpec
from sniper.data.datasets import Dataset
from sniper.data.epoch import choose_positive_chips, to_image_boxes
from sniper.errors import SniperError
from sniper.planning.suggest import suggest_pyramid

if TYPE_CHECKING:
    from sniper.inference.store import BoxStore

State = Literal["choosing", "ready", "none", "failed"]


@dataclass(frozen=True, kw_only=True, eq=False)
class ChosenChips:
    """The chips of a data set.

    Attributes:
        pyramid: that they are cut from.
        table: the chips, ordered by image.
        is_suggested: whether the pyramid is the one that suits the data set, as `sniper train` derives it.
        min_visible_side: see `assign_targets`.
    """

    pyramid: PyramidSpec
    table: ChipTable
    is_suggested: bool
    min_visible_side: float


def choose_chips(
    dataset: Dataset,
    pyramid: PyramidSpec | None,
    *,
    min_visible_side: float = 10.0,
    seed: int = 0,
    proposals: "BoxStore | None" = None,
    negatives: NegativeSpec = NegativeSpec(),
) -> ChosenChips | None:
    """Choose the positive chips of a data set and, if there are proposals, the negative ones.

    Args:
        dataset: the images and their boxes.
        pyramid: to cut chips from; None takes the one that is suggested for the data set.
        min_visible_side: see `assign_targets`.
        seed: breaks ties between equally good chips.
        proposals: that `sniper mine` collected on the same images.
        negatives: which of them count; all negative chips are shown, of which an epoch of training draws some.

    Returns:
        The chips; None if there is no box to learn from.

    Raises:
        ConfigError: if the levels make an image too large.
    """
    boxes, generator = to_image_boxes(dataset), np.random.default_rng(seed)
    if not boxes.is_required.any():
        return None
    is_suggested = pyramid is None
    if pyramid is None:
        suggestion = suggest_pyramid(boxes, seed=seed)
        assert suggestion is not None  # there is a box to learn from
        pyramid, table = suggestion.pyramid, suggestion.table
    else:
        table = choose_positive_chips(dataset, pyramid, generator=generator)
    if proposals is not None:
        from sniper.inference.proposals import add_negatives  # imports torch

        table = add_negatives(table, proposals, negatives, pyramid=pyramid, generator=generator)
    return ChosenChips(
        pyramid=pyramid, table=table, is_suggested=is_suggested, min_visible_side=min_visible_side
    )


class ChipChooser:
    """Chooses chips in a thread that starts at once; see `choose_chips` for the arguments.

    Attributes:
        chips: None until they are chosen, and if there are none.
        problem: why they cannot be chosen; empty otherwise.
    """

    def __init__(self, dataset: Dataset, pyramid: PyramidSpec | None, **options: Any) -> None:
        self.chips: ChosenChips | None = None
        self.problem = ""
        self._choose = partial(choose_chips, dataset, pyramid, **options)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def state(self) -> State:
        """Whether the chips are being chosen, are ready, are none, or cannot be chosen."""
        if self._thread.is_alive():
            return "choosing"
        if self.problem:
            return "failed"
        return "none" if self.chips is None else "ready"

    def wait(self) -> None:
        """Wait until the chips are chosen."""
        self._thread.join()

    def _run(self) -> None:
        try:
            self.chips = self._choose()
        except (SniperError, MemoryError) as error:
            self.problem = str(error) or "there is not enough memory"
