"""What there is to learn from, and how it is fed: the data part of an experiment."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class SourceSpec:
    """One data set on disk. Paths in an experiment file are relative to that file.

    Attributes:
        annotations: COCO JSON file.
        images: folder that its file names start from; by default `images` beside the annotations, or their own folder.
    """

    annotations: str = ""
    images: str | None = None


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """The data sets of an experiment, and how chips of them are fed.

    Attributes:
        train: what to train on.
        test: what to evaluate on.
        chips: chip table of the training set, as `sniper chips` writes it, for all epochs; None chooses chips anew
            each epoch.
        flip: share of chips mirrored left to right.
        min_visible_side: chip pixels that a clipped box must show in both axes, or it is ignored.
        loader_processes: processes that read chips beside the training; 0 reads them in the training process.
    """

    train: SourceSpec = SourceSpec()
    test: SourceSpec = SourceSpec()
    chips: str | None = None
    flip: float = 0.5
    min_visible_side: float = 10.0
    loader_processes: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip is a share from 0 to 1, not {self.flip}")
        if not 0 <= self.min_visible_side < math.inf:
            raise ValueError(f"min_visible_side must not be negative, not {self.min_visible_side}")
        if self.loader_processes < 0:
            raise ValueError(f"loader_processes must not be negative, not {self.loader_processes}")
