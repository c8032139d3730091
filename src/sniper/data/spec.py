"""What there is to learn from, and how it is fed: the data part of an experiment."""

import math
from dataclasses import dataclass
from typing import Literal

from sniper.chips.baselines import TileSpec, WholeSpec


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
class ReadSpec:
    """How image files become pixels, for training and everything after it.

    Attributes:
        exif_orientation: `apply` turns an image as its EXIF orientation says, which is how viewers and annotation tools
            show it; `ignore` takes the pixels as stored. The annotations refer to the result.
        intensity_range: of images with more than 8 bits a channel, the values that are black and white, with a straight
            line between them; None refuses such images.
        max_pixels: an image of more is refused, as a file made to exhaust memory; a large TIFF that is read in windows
            is not.
    """

    exif_orientation: Literal["apply", "ignore"] = "apply"
    intensity_range: tuple[float, float] | None = None
    max_pixels: int = 1_000_000_000

    def __post_init__(self) -> None:
        if self.intensity_range is not None and not (
            -math.inf < self.intensity_range[0] < self.intensity_range[1] < math.inf
        ):
            raise ValueError(
                f"intensity_range is the black value and a higher one, the white, not {self.intensity_range}"
            )
        if self.max_pixels < 1:
            raise ValueError(f"max_pixels must be at least 1, not {self.max_pixels}")


@dataclass(frozen=True, kw_only=True)
class CacheSpec:
    """Chips kept on disk once they are cut, for images that are slow to read.

    Attributes:
        folder: where; shared by all runs that name it. None keeps none.
        gigabytes: what it may grow to; what does not fit is cut anew each time.
        format: `jpeg`, or `png`: without loss, larger, slower.
        quality: of JPEG, up to 100.
    """

    folder: str | None = None
    gigabytes: float = 50.0
    format: Literal["jpeg", "png"] = "jpeg"
    quality: int = 95

    def __post_init__(self) -> None:
        if not 0.01 <= self.gigabytes < math.inf:
            raise ValueError(f"gigabytes must be at least 0.01, not {self.gigabytes}")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality is from 1 to 100, not {self.quality}")


@dataclass(frozen=True, kw_only=True)
class ColorJitterSpec:
    """Colours changed at random, by torchvision's `ColorJitter`.

    Attributes:
        brightness: each chip's factor is drawn from 1 - this to 1 + this.
        contrast: likewise.
        saturation: likewise.
        hue: the hue is turned by at most this part of the full circle, either way.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0

    def __post_init__(self) -> None:
        for name, most in {"brightness": 1, "contrast": 1, "saturation": 1, "hue": 0.5}.items():
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"{name} is from 0 to {most}, not {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """The data sets of an experiment, and how chips of them are fed.

    Attributes:
        train: what to train on.
        test: what to evaluate on.
        chips: chip table of the training set, as `sniper chips` writes it, for all epochs; None chooses chips anew
            each epoch.
        whole: learn from whole images instead of chips.
        tiles: learn from a grid of tiles instead of chips.
        read: how image files become pixels.
        on_bad_image: `refuse` ends what is under way, naming the file; `skip` warns of it, takes another chip in its
            place, and counts.
        images_at_once: so many images are learnt from side by side, chip by chip, and each is decoded once for all its
            chips; rounded to a multiple or a divisor of the batch. None takes 256, or as many as take 2 GB of memory. 0
            draws chips from all images, and decodes one for every chip.
        cache: chips kept on disk.
        flip: share of chips mirrored left to right.
        color_jitter: colours changed at random.
        min_visible_side: chip pixels that a clipped box must show in both axes, or it is ignored.
        num_workers: processes that read chips beside the training; 0 reads them in the training process.
    """

    train: SourceSpec = SourceSpec()
    test: SourceSpec = SourceSpec()
    chips: str | None = None
    whole: WholeSpec | None = None
    tiles: TileSpec | None = None
    read: ReadSpec = ReadSpec()
    on_bad_image: Literal["refuse", "skip"] = "refuse"
    images_at_once: int | None = None
    cache: CacheSpec = CacheSpec()
    flip: float = 0.5
    color_jitter: ColorJitterSpec = ColorJitterSpec()
    min_visible_side: float = 10.0
    num_workers: int = 1

    def __post_init__(self) -> None:
        ways = [name for name in ("chips", "whole", "tiles") if getattr(self, name) is not None]
        if len(ways) > 1:
            raise ValueError(f"there is one way to feed a detector at a time, not both {' and '.join(ways)}")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip is a share from 0 to 1, not {self.flip}")
        if not 0 <= self.min_visible_side < math.inf:
            raise ValueError(f"min_visible_side must not be negative, not {self.min_visible_side}")
        if self.images_at_once is not None and self.images_at_once < 0:
            raise ValueError(f"images_at_once must not be negative, not {self.images_at_once}")
        if self.num_workers < 0:
            raise ValueError(f"num_workers must not be negative, not {self.num_workers}")
