"""The data part of an experiment: its data sets, how images are read, and how chips are fed to training."""

from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt

from sniper.chips.baselines import TileSpec, WholeSpec
from sniper.remote import Settings, configure
from sniper.specs import Fraction, spec_dataclass

_MAX_GIGABYTES = 70_000.0  # SQLite counts 2^32 pages
_MAX_WORKERS = 1024


@spec_dataclass
class SourceSpec:
    """One data set on disk. Paths in an experiment file are relative to that file.

    Attributes:
        annotations: COCO JSON file, YOLO's `data.yaml`, or a folder; `docs/formats.md` lists the formats.
        images: folder that its file names are relative to; None is the usual folder of the format, for COCO JSON the
            one that has the image files, such as `images` beside the annotations.
        split: of a data set with several: `train`, `val`, `test`, another name in it, or `all`; None is `train` for
            `data.train`, and `val`, else `test`, for `data.test`.
    """

    annotations: str = ""
    images: str | None = None
    split: str | None = None


@spec_dataclass
class ReadSpec:
    """How image files become pixels, in training, prediction and evaluation alike.

    Attributes:
        exif_orientation: `apply` rotates and mirrors images by their EXIF orientation, as viewers and annotation tools
            do; `ignore` takes the pixels as stored. The annotations refer to the result.
        intensity_range: the black and the white value of images with more than 8 bits a channel, which are mapped
            linearly to 8 bits; None refuses such images.
        bands: numbers, from 1, of the bands that are read as red, green and blue, or of the only one, read as grey.
            None reads the first three of 3 or 4 bands, or the only one, and refuses images of other numbers of bands.
        max_pixels: images of more pixels are refused, as a protection against files that exhaust memory; large TIFFs
            that are read in windows are exempt.
    """

    exif_orientation: Literal["apply", "ignore"] = "apply"
    intensity_range: tuple[float, float] | None = None
    bands: tuple[PositiveInt, ...] | None = None
    max_pixels: PositiveInt = 1_000_000_000

    def __post_init__(self) -> None:
        if self.intensity_range is not None and not self.intensity_range[0] < self.intensity_range[1]:
            raise ValueError(
                f"intensity_range: the value of black must be below that of white, not {list(self.intensity_range)}"
            )
        if self.bands is not None and len(self.bands) not in (1, 3):
            raise ValueError(f"bands: expected one band or three, not {list(self.bands)}")


@spec_dataclass
class CacheSpec:
    """A cache on the local disk for images that are slow to read: of cut chips or, for remote images, of their files.

    Attributes:
        folder: of the cache; runs that name the same folder share it. None keeps no chips, and remote files in the
            cache folder of the user.
        gigabytes: size limit; what does not fit is cut or read again each time. None is half of what the disk has free
            with what is in the cache.
        format: `jpeg`, or `png`, which is lossless, larger and slower.
        quality: of JPEG, from 1 to 100.
    """

    folder: str | None = None
    gigabytes: Annotated[float, Ge(0.01), Le(_MAX_GIGABYTES)] | None = None
    format: Literal["jpeg", "png"] = "jpeg"
    quality: Annotated[int, Ge(1), Le(100)] = 95


@spec_dataclass
class RemoteSpec:
    """How files behind URLs are read.

    Attributes:
        timeout: seconds for a request of up to 4 MB; after these the server counts as stalled.
        tries: how often a request that stalls or fails is sent, after growing pauses, before the file is one that
            cannot be read.
    """

    timeout: Annotated[float, Gt(0), Le(3600)] = 30.0
    tries: Annotated[int, Ge(1), Le(100)] = 5


@spec_dataclass
class ColorJitterSpec:
    """Random changes of a chip's colours, by torchvision's `ColorJitter`.

    Attributes:
        brightness: the factor is drawn from 1 - `brightness` to 1 + `brightness`.
        contrast: the factor is drawn from 1 - `contrast` to 1 + `contrast`.
        saturation: the factor is drawn from 1 - `saturation` to 1 + `saturation`.
        hue: the shift is drawn from -`hue` to `hue`, as a share of the colour circle.
    """

    brightness: Fraction = 0.0
    contrast: Fraction = 0.0
    saturation: Fraction = 0.0
    hue: Annotated[float, Ge(0), Le(0.5)] = 0.0


@spec_dataclass
class DataSpec:
    """The data sets of an experiment, and how their chips are read.

    Attributes:
        train: data set to train on.
        test: data set to evaluate on; without `annotations`, the split val or test of `train`, if it has one.
        holdout: share of the images of `train` that are held out and evaluated on, instead of `test`. The seed and the
            file names determine which.
        chips: chip table of the training set, as written by `sniper chips`, used in every epoch; None chooses chips
            for each epoch.
        whole: train on whole images instead of chips.
        tiles: train on a grid of tiles instead of chips.
        read: how image files become pixels.
        on_bad_image: `refuse` stops with an error that names the file; `skip` warns, uses another chip instead, and
            counts the skipped chips.
        follow_links: whether image files may be links to files outside the folder of the images.
        on_bad_box: `drop` warns of boxes that cannot be used, with counts and examples, and leaves them out; `refuse`
            stops with an error that lists them. `docs/annotations.md` says which boxes these are.
        masks: `read` reads the masks of objects where the annotations have them; `ignore` uses boxes alone. Masks that
            cannot be used are left out with a warning, and `on_bad_box: refuse` refuses them.
        boxes_from_masks: `missing` computes the boxes of objects that have a mask and no box; `all` computes those of
            all objects with a mask, whatever the annotations say.
        crowds: `ignore` trains and scores on boxes that are marked as crowds as regions to ignore; `objects` takes them
            for objects, as some annotation tools mark masks so.
        class_property: property of GeoJSON features that has the class; `none` takes all objects for one class. None is
            `class`, `label` or another usual name.
        images_at_once: number of decoded images whose chips are interleaved, like a shuffle buffer; each image is
            decoded once for all its chips. Rounded down to a multiple or a divisor of the batch size. None uses 256, or
            fewer if those would take more than 2 GB of memory. 0 samples chips of all images, and decodes an image for
            each.
        cache: cut chips, or remote files, on the local disk.
        remote: how files behind URLs are read.
        flip: fraction of chips that are flipped horizontally.
        scale_jitter: chips are enlarged or reduced about their centres by a random factor of up to 1 + `scale_jitter`;
            those that show the whole image are reduced only.
        color_jitter: random changes of colours.
        min_visible_side: chip pixels that a clipped box must show along both axes; other clipped boxes are ignored.
        num_workers: processes that read chips in parallel to the training; 0 reads them in the training process. None
            starts with 1 on a CPU and 4 on a GPU, and doubles the number while steps spend a tenth of their time
            waiting for chips, up to the number of cores.
    """

    train: SourceSpec = SourceSpec()
    test: SourceSpec = SourceSpec()
    holdout: Annotated[float, Ge(0), Lt(1)] = 0.0
    chips: str | None = None
    whole: WholeSpec | None = None
    tiles: TileSpec | None = None
    read: ReadSpec = ReadSpec()
    on_bad_image: Literal["refuse", "skip"] = "refuse"
    follow_links: bool = False
    on_bad_box: Literal["drop", "refuse"] = "drop"
    masks: Literal["read", "ignore"] = "read"
    boxes_from_masks: Literal["missing", "all"] = "missing"
    crowds: Literal["ignore", "objects"] = "ignore"
    class_property: str | None = None
    images_at_once: NonNegativeInt | None = None
    cache: CacheSpec = CacheSpec()
    remote: RemoteSpec = RemoteSpec()
    flip: Fraction = 0.5
    scale_jitter: Fraction = 0.0
    color_jitter: ColorJitterSpec = ColorJitterSpec()
    min_visible_side: NonNegativeFloat = 10.0
    num_workers: Annotated[NonNegativeInt, Le(_MAX_WORKERS)] | None = None

    def configure_remote(self) -> None:
        """Read remote files in this process as these fields say, from now on."""
        cache = self.cache
        configure(
            Settings(
                folder=None if cache.folder is None else Path(cache.folder),
                limit=None if cache.gigabytes is None else int(cache.gigabytes * 1e9),
                timeout=self.remote.timeout,
                tries=self.remote.tries,
            )
        )

    def __post_init__(self) -> None:
        if self.holdout and (self.test.annotations or self.test.split):
            raise ValueError(
                "holdout must be 0 with test.annotations or test.split, whose images are evaluated on"
            )
        if self.scale_jitter and self.cache.folder is not None:
            raise ValueError("scale_jitter must be 0 with cache.folder: no chip would be cut twice")
        if self.boxes_from_masks == "all" and self.masks == "ignore":
            raise ValueError("boxes_from_masks must be missing with masks: ignore, which reads no masks")
        given = [name for name in ("chips", "whole", "tiles") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"only one of chips, whole and tiles can be given, not {' and '.join(given)}")
