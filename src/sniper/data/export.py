"""Write chips, tiles, whole images or windows of a search as a data set for other trainers."""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any

import cv2
import numpy as np
from jaxtyping import UInt8

from sniper.chips import Chip, ChipTable, PyramidSpec
from sniper.chips.image_boxes import ScoredBoxes
from sniper.chips.negatives import NegativeSpec, choose_on_alarms, draw_negatives
from sniper.chips.visibility import chip_visibility
from sniper.data.chip_labels import ChipFileSpec, ChipLabels, blur_boxes, label_chip
from sniper.data.chip_manifest import MANIFEST, ChipEntry, ManifestHead, read_head, write_manifest
from sniper.data.datasets import Dataset, ImageRecord
from sniper.data.datasets.write import check_new_folder, image_folder, join_categories, write_annotations
from sniper.data.epoch import choose_positive_chips, to_image_boxes
from sniper.data.images.files import ImageReader
from sniper.data.images.regions import cut_chip
from sniper.data.reader import open_record
from sniper.data.spec import DataSpec
from sniper.errors import ConfigError, ImageError
from sniper.files import is_temporary, naming_path, read_bytes, remove_folder, write_bytes
from sniper.geometry.boxes import Sides, area
from sniper.geometry.mask_frames import encode_masks, move_masks
from sniper.geometry.masks import MaskArrays

EXPERIMENT = "experiment.yaml"
"""Name of the file with the settings that chips were chosen with, in a folder of chips."""

_HEAD = ".unfinished.digest"  # in the hidden folder
_VERSION = 2  # of how chips are written
_COLUMNS = ("image_indices", "level", "x", "y", "widths", "heights", "is_negative", "moved_to")
_GROUP_PIXELS = 64_000_000  # of decoded images that chips are cut from at once
_NUM_THREADS = min(os.cpu_count() or 1, 8)
_MAX_STEM = 160  # bytes: names of files have at most 255
_UNSAFE = re.compile(r"[\x00-\x1f\x7f/\\:*?\"<>|]")
_PNG_COMPRESSION = (
    3  # as that of the cache: a third of the time of the default, for a few per cent of the bytes
)


@dataclass(frozen=True, kw_only=True, eq=False)
class EmptyChips:
    """Negative chips that show no object.

    Attributes:
        table: the chips that were drawn, ordered by image.
        num_positives: number of positive chips, which the dose refers to.
        num_windows: number of windows that were chosen on the false alarms.
        num_with_objects: number of those that show at least a part of an object, a crowd or a region to ignore.
    """

    table: ChipTable
    num_positives: int
    num_windows: int
    num_with_objects: int


def choose_empty_chips(
    dataset: Dataset,
    alarms: ScoredBoxes,
    spec: NegativeSpec,
    *,
    dose: float,
    pyramid: PyramidSpec,
    generator: np.random.Generator,
) -> EmptyChips:
    """Choose windows on false alarms that show no object, crowd or region to ignore, not even in part.

    Args:
        dataset: the images with their objects.
        alarms: false alarms in the same images.
        spec: which false alarms the positive chips exclude, and the most chips of an image.
        dose: the most chips, as a share of the positive chips. They are drawn with probabilities in proportion to the
            scores of their false alarms; see `draw_negatives`.
        pyramid: to cut chips from.
        generator: breaks ties and draws.
    """
    positives = choose_positive_chips(dataset, pyramid, generator=generator)
    windows, masses = choose_on_alarms(positives, alarms, spec, pyramid=pyramid, generator=generator)
    _, num_boxes = chip_visibility(windows, to_image_boxes(dataset))
    is_empty = num_boxes == 0
    table = positives.merge(windows.select(np.flatnonzero(is_empty)))
    masses_of_table = np.zeros(len(table))
    masses_of_table[table.is_negative] = masses[is_empty]
    drawn = draw_negatives(
        table, per_image=spec.per_image, dose=dose, masses=masses_of_table, generator=generator
    )
    return EmptyChips(
        table=table.select(drawn[table.is_negative[drawn]]),
        num_positives=len(positives),
        num_windows=len(windows),
        num_with_objects=int((~is_empty).sum()),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class ChipSplit:
    """The chips of a split.

    Attributes:
        dataset: the images that they are cut from.
        tables: the chips of each epoch, ordered by image.
        has_labels: whether annotations are written.
        window: longest side of the windows of a search, where the chips are such windows.
    """

    dataset: Dataset
    tables: tuple[ChipTable, ...]
    has_labels: bool = True
    window: int | None = None


@dataclass(frozen=True, kw_only=True)
class WrittenChips:
    """What was written.

    Attributes:
        counts: of images, chips and boxes, by name.
        skipped_images: of which no chip was written, as they cannot be read and are to be skipped.
        warnings: one line for each kind.
    """

    counts: Mapping[str, Any]
    skipped_images: tuple[Path, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _ChipFile:
    """A chip to write.

    Attributes:
        chip_id: from 1.
        split: name of the split.
        epoch: index of the table.
        index: of the chip in the table.
        name: of the image file.
    """

    chip_id: int
    split: str
    epoch: int
    index: int
    name: str


@dataclass(frozen=True, kw_only=True, eq=False)
class _LabelledChip:
    """A chip to write, and its annotations."""

    file: _ChipFile
    chip: Chip
    record: ImageRecord
    labels: ChipLabels
    is_negative: bool


class ChipExport:
    """Writes chips as images with annotations to a folder, which appears only once it is complete.

    Processes write their shares together, and an export that was stopped is continued: call `start` in the first
    process, then `write` in all, then `finish` in the first. Until then the images are in a hidden folder beside the
    one that is written, which belongs to these chips, images and settings.

    A chip's name is that of its image, with the level and the visible window in image pixels: `day/a.jpg` becomes
    `day_a_level0_128_0_640_512.jpg`. The manifest `chips.jsonl` has a line for each chip.

    Args:
        splits: by name; one under an empty name where there are none.
        folder: to write, absent or empty.
        spec: how chips are written.
        data: how images are read, and whether those that cannot be read are skipped.
        experiment: settings that the chips were chosen with, as YAML; None writes none.

    Raises:
        ConfigError: if the format cannot express what is to be written.
        AnnotationError: if names cannot be written.
    """

    def __init__(
        self,
        splits: Mapping[str, ChipSplit],
        folder: Path,
        spec: ChipFileSpec,
        *,
        data: DataSpec,
        experiment: str | None = None,
    ) -> None:
        spec.check()
        joined = join_categories({name: split.dataset for name, split in splits.items()}, to=spec.to)
        self._categories = tuple(joined)
        self._splits, self._folder, self._spec, self._data = dict(splits), folder, spec, data
        self._experiment = experiment
        self._unfinished = folder.absolute().with_name(f".{folder.absolute().name}.parts")
        self._files = list(_name_files(splits, spec))
        self._digest = self._hash()

    @property
    def num_chips(self) -> int:
        """Number of chips to write, as far as they are not skipped."""
        return len(self._files)

    def find_written(self) -> WrittenChips | None:
        """Return what was written before, if the folder has the same chips already.

        Raises:
            ConfigError: if the folder has something else.
        """
        head = read_head(self._folder / MANIFEST)
        if head is not None and head.digest == self._digest:
            (self._folder / _HEAD).unlink(missing_ok=True)
            return WrittenChips(counts=head.counts)
        if head is not None:
            raise ConfigError(
                f"{self._folder}: has chips of other images or settings; expected a new folder to write to"
            )
        check_new_folder(self._folder)
        return None

    def start(self) -> None:
        """Create the hidden folder, or keep that of the same chips.

        Raises:
            ConfigError: if there is something else under its name.
        """
        head = self._unfinished / _HEAD
        if self._unfinished.is_dir() and not head.is_file() and any(self._unfinished.iterdir()):
            raise ConfigError(f"{self._unfinished}: is in the way; it is no unfinished folder of chips")
        if head.is_file() and read_bytes(head) != self._digest.encode():
            remove_folder(self._unfinished)
        self._unfinished.mkdir(parents=True, exist_ok=True)
        with naming_path(head):
            head.write_text(self._digest)
        for split in self._splits:
            (self._unfinished / image_folder(split, to=self._spec.to)).mkdir(parents=True, exist_ok=True)

    def write(self, share: tuple[int, int] = (0, 1), *, on_progress: Callable[[int, int], None]) -> None:
        """Write the images of a share of the chips that are not written yet.

        Args:
            share: index of this process, and number of processes. All chips of an image are written by one.
            on_progress: called with the number of chips that this process has written, and of its share.

        Raises:
            ImageError: if an image cannot be read and is not to be skipped.
            OSError: if a file cannot be written.
        """
        images = list(self._by_image())[share[0] :: share[1]]
        total = sum(len(files) for _, _, files in images)
        missing = [
            (split, image, [file for file in files if not self._path(file).exists()])
            for split, image, files in images
        ]
        missing = [each for each in missing if each[2]]
        num_done = total - sum(len(files) for _, _, files in missing)
        threads, is_done = ThreadPoolExecutor(_NUM_THREADS), False
        try:
            for group in self._groups(missing):
                for future in [threads.submit(self._write_file, file, image) for file, image in group]:
                    future.result()
                    num_done += 1
                    on_progress(num_done, total)
            is_done = True
        finally:
            threads.shutdown(wait=is_done, cancel_futures=True)

    def finish(self) -> WrittenChips:
        """Write the annotations and the manifest, and move the folder to its name.

        Raises:
            ConfigError: if images were removed meanwhile, or something was written to the folder.
        """
        chips = [self._labelled(file) for file in self._files]
        to_write = [each for each in chips if not each.labels.is_skipped]
        unreadable = sorted({each.record.path for each in to_write if not self._path(each.file).exists()})
        if unreadable and self._data.on_bad_image != "skip":
            raise ConfigError(
                f"{self._unfinished}: {len(unreadable)} images were removed meanwhile; the same command writes them "
                "again"
            )
        bad = set(unreadable)
        for each in to_write:
            if each.record.path in bad:  # some of its chips may have been written before it failed
                self._path(each.file).unlink(missing_ok=True)
        written = [each for each in to_write if each.record.path not in bad]
        counts = self._count(chips, written)
        datasets = {
            name: self._to_dataset(name, [each for each in written if each.file.split == name])
            for name in self._splits
        }
        warnings = write_annotations(datasets, self._unfinished, to=self._spec.to)
        if self._experiment is not None:
            write_bytes(self._unfinished / EXPERIMENT, self._experiment.encode())
        head = ManifestHead(
            digest=self._digest,
            categories=self._categories,
            counts=counts | {"unreadable_images": len(unreadable)},
        )
        write_manifest(self._unfinished / MANIFEST, head, map(self._entry, written))
        for path in list(self._unfinished.rglob("*")):
            if is_temporary(path.name):  # of processes that were killed
                path.unlink()
        check_new_folder(self._folder)
        with naming_path(self._folder):
            self._unfinished.replace(self._folder)
        (self._folder / _HEAD).unlink()
        return WrittenChips(counts=head.counts, skipped_images=tuple(unreadable), warnings=tuple(warnings))

    def _hash(self) -> str:
        """Return a hash of everything that the written files depend on."""
        digest = hashlib.sha256(json.dumps([_VERSION, asdict(self._spec), self._experiment]).encode())
        digest.update(json.dumps(asdict(self._data.read)).encode())
        for name, split in self._splits.items():
            names = [category.name for category in split.dataset.categories]
            head = [name, split.dataset.digest, names, split.has_labels, split.window, len(split.tables)]
            digest.update(json.dumps(head).encode())
            used: set[int] = set()
            for table in split.tables:
                for column in _COLUMNS:
                    digest.update(np.ascontiguousarray(getattr(table, column)).astype("<i8").tobytes())
                levels = [(asdict(level.valid_range), repr(level)) for level in table.levels]
                digest.update(json.dumps(levels, default=str).encode())
                used |= set(table.image_indices.tolist())
            for image in sorted(used):
                digest.update(repr(_identify(split.dataset[image].path)).encode())
        return digest.hexdigest()

    def _path(self, file: _ChipFile) -> Path:
        return self._unfinished / image_folder(file.split, to=self._spec.to) / file.name

    def _table(self, file: _ChipFile) -> ChipTable:
        return self._splits[file.split].tables[file.epoch]

    def _record(self, file: _ChipFile) -> ImageRecord:
        return self._splits[file.split].dataset[int(self._table(file).image_indices[file.index])]

    def _by_image(self) -> Iterator[tuple[str, int, list[_ChipFile]]]:
        """Group the chips of all epochs by image: split, index of the image, and its chips."""
        groups: dict[tuple[str, int], list[_ChipFile]] = {}
        for file in self._files:
            image = int(self._table(file).image_indices[file.index])
            groups.setdefault((file.split, image), []).append(file)
        return ((split, image, files) for (split, image), files in groups.items())

    def _groups(
        self, images: Sequence[tuple[str, int, list[_ChipFile]]]
    ) -> Iterator[list[tuple[_ChipFile, "_Source"]]]:
        """Group the chips of so many images as may be decoded at once."""
        group: list[tuple[_ChipFile, _Source]] = []
        num_pixels = 0
        for split, image, files in images:
            dataset = self._splits[split].dataset
            pixels = int(dataset.widths[image]) * int(dataset.heights[image])
            if group and num_pixels + pixels > _GROUP_PIXELS:
                yield group
                group, num_pixels = [], 0
            source = _Source(dataset[image], self._data)
            group += [(file, source) for file in files]
            num_pixels += pixels
        if group:
            yield group

    def _labelled(self, file: _ChipFile) -> _LabelledChip:
        split, table, record = self._splits[file.split], self._table(file), self._record(file)
        chip = table.chip(file.index)
        moved_to = table.moved_to[split.dataset.boxes_of(int(table.image_indices[file.index]))]
        if not split.has_labels:
            moved_to = np.zeros(0, dtype=np.int64)
            record = replace(
                record,
                boxes=np.zeros((0, 4)),
                labels=moved_to,
                is_crowd=moved_to.astype(np.bool_),
                masks=None,
            )
        return _LabelledChip(
            file=file,
            chip=chip,
            record=record,
            labels=label_chip(chip, record, self._spec, is_moved_here=moved_to == chip.level.index),
            is_negative=bool(table.is_negative[file.index]),
        )

    def _write_file(self, file: _ChipFile, source: "_Source") -> None:
        each = self._labelled(file)
        pixels = None if each.labels.is_skipped else source.cut(each.chip)
        if pixels is None:
            return
        pixels = blur_boxes(pixels, each.labels.blurred, kept=each.labels.boxes[~each.labels.is_crowd])
        width, height = self._sides(each.chip)
        write_bytes(self._path(file), _encode(pixels[:height, :width], self._spec))

    def _count(self, chips: Sequence[_LabelledChip], written: Sequence[_LabelledChip]) -> dict[str, Any]:
        """Count what is written and what is not; objects that are in several chips count in each."""
        num_objects = num_labelled = 0
        for name, split in self._splits.items():
            if not split.has_labels:
                continue
            is_labelled = np.zeros(len(split.dataset.boxes), dtype=np.bool_)
            for each in written:
                if each.file.split == name:
                    image = int(self._table(each.file).image_indices[each.file.index])
                    rows = each.labels.rows[~each.labels.is_crowd]
                    is_labelled[split.dataset.boxes_of(image).start + rows] = True
            num_objects += int((~split.dataset.is_crowd).sum())
            num_labelled += int(is_labelled.sum())
        labels = [each.labels for each in written]
        return {
            "num_images": sum(len(split.dataset) for split in self._splits.values()),
            "num_chips": len(written),
            "chips_per_split": dict(Counter(each.file.split for each in written)),
            "num_negative_chips": sum(each.is_negative for each in written),
            "num_labels": sum(int((~each.is_crowd).sum()) for each in labels),
            "num_objects": num_objects,
            "objects_in_no_chip": num_objects - num_labelled,
            "out_of_range_labelled": sum(each.num_out_of_range for each in labels),
            "out_of_range_blurred": sum(each.num_blurred_out_of_range for each in labels),
            "chips_skipped": sum(each.labels.is_skipped for each in chips),
            "cut_objects": sum(each.num_cut for each in labels),
            "crowds": sum(each.num_crowds for each in labels),
        }

    def _to_dataset(self, name: str, chips: Sequence[_LabelledChip]) -> Dataset:
        """Return the written chips of a split as a data set."""
        labels = [each.labels for each in chips]
        sides = np.array([self._sides(each.chip) for each in chips], dtype=np.int32).reshape(-1, 2)
        names = np.array([each.file.name for each in chips], dtype=np.str_)
        boxes = np.concatenate([np.zeros((0, 4)), *[each.boxes for each in labels]])
        none = np.zeros(0, dtype=np.int64)
        masks = self._masks(name, chips)
        areas = area(boxes)
        if masks is not None:
            counts = np.array([len(each.labels) for each in labels], dtype=np.int64)
            encoded = encode_masks(masks, np.repeat(sides, counts, axis=0))
            areas = np.where(masks.has_mask, encoded.measure().areas, areas)
        return Dataset(
            path=self._folder,
            image_root=self._unfinished / image_folder(name, to=self._spec.to),
            categories=self._splits[name].dataset.categories,
            image_ids=np.array([each.file.chip_id for each in chips], dtype=np.int64),
            file_names=names,
            image_paths=names,
            widths=sides[:, 0],
            heights=sides[:, 1],
            offsets=np.cumsum([0, *[len(each.labels) for each in labels]], dtype=np.int64),
            boxes=boxes,
            labels=np.concatenate([none, *[each.labels for each in labels]]),
            is_crowd=np.concatenate([none.astype(np.bool_), *[each.is_crowd for each in labels]]),
            areas=areas,
            masks=masks,
        )

    def _masks(self, name: str, chips: Sequence[_LabelledChip]) -> MaskArrays | None:
        """Return the masks of all annotations of a split, each in the frame of its chip; None if it has none."""
        if self._splits[name].dataset.masks is None:
            return None
        return MaskArrays.concatenate(
            [
                move_masks(
                    each.record.masks.select(each.labels.rows),
                    each.chip.to_chip,
                    sides=self._sides(each.chip),
                )
                for each in chips
                if each.record.masks is not None
            ]
        )

    def _sides(self, chip: Chip) -> Sides:
        return Sides(chip.width, chip.height) if self._spec.is_padded else chip.visible

    def _entry(self, each: _LabelledChip) -> ChipEntry:
        return ChipEntry.of(
            each.chip,
            is_padded=self._spec.is_padded,
            chip_id=each.file.chip_id,
            file_name=f"{image_folder(each.file.split, to=self._spec.to)}/{each.file.name}",
            split=each.file.split,
            epoch=each.file.epoch,
            image_id=each.record.image_id,
            image=each.record.file_name,
            is_negative=each.is_negative,
            num_boxes=int((~each.labels.is_crowd).sum()),
            window=self._splits[each.file.split].window,
        )


class _Source:
    """An image that is opened when the first of its chips is cut.

    Args:
        record: of the image.
        data: how it is read, and whether it is skipped if it cannot be.
    """

    def __init__(self, record: ImageRecord, data: DataSpec) -> None:
        self.record, self._data = record, data
        self._reader: ImageReader | None = None
        self._is_bad = False
        self._lock = Lock()

    def cut(self, chip: Chip) -> UInt8[np.ndarray, "h w 3"] | None:
        """Cut a chip; return None if the image cannot be read and is to be skipped.

        Raises:
            ImageError: if it cannot be read and is not to be skipped.
        """
        try:
            with self._lock:
                if self._is_bad:
                    return None
                if self._reader is None:
                    self._reader = open_record(self.record, self._data.read)
            return cut_chip(self._reader, chip)
        except ImageError:
            if self._data.on_bad_image != "skip":
                raise
            self._is_bad = True
            return None


def _name_files(splits: Mapping[str, ChipSplit], spec: ChipFileSpec) -> Iterator[_ChipFile]:
    """Yield the files of all chips, with names that are distinct without their suffix, also among splits."""
    used: set[str] = set()
    chip_id = 0
    for name, split in splits.items():
        stems = _image_stems(split.dataset)
        for epoch, table in enumerate(split.tables):
            of_epoch = f"_epoch{epoch}" if len(split.tables) > 1 else ""
            for index, image in enumerate(table.image_indices.tolist()):
                stem = f"{stems[image]}{_describe_window(table.chip(index))}{of_epoch}"
                free, number = stem, 1
                while free in used:
                    number += 1
                    free = f"{stem}_{number}"
                used.add(free)
                chip_id += 1
                yield _ChipFile(
                    chip_id=chip_id, split=name, epoch=epoch, index=index, name=free + spec.suffix
                )


def _image_stems(dataset: Dataset) -> list[str]:
    """Return the names of images without suffix, as parts of a file name."""
    names = dataset.file_names.tolist()
    common = os.path.commonpath([os.path.dirname(name) for name in names] or [""])
    stems = []
    for name in names:
        stem = os.path.splitext(name.removeprefix(common).lstrip("/"))[0]
        stem = _UNSAFE.sub("_", stem)
        while len(os.fsencode(stem)) > _MAX_STEM:
            stem = stem[1:]
        stems.append(stem)
    return stems


def _describe_window(chip: Chip) -> str:
    """Return the level and the visible window in image pixels, as the end of a name."""
    width, height = chip.visible
    window = np.array([[chip.x, chip.y, chip.x + width, chip.y + height]], dtype=np.float64)
    x1, y1, x2, y2 = chip.level.to_image(window)[0].round().astype(int).tolist()
    return f"_level{chip.level.index}_{x1}_{y1}_{x2}_{y2}"


def _identify(path: Path) -> tuple[object, ...]:
    """Return what distinguishes a file from others, and from itself before it changed."""
    try:
        stat = path.stat()
    except OSError:  # reported when it is read
        return (str(path.absolute()),)
    return str(path.absolute()), stat.st_size, stat.st_mtime_ns


def _encode(pixels: UInt8[np.ndarray, "h w 3"], spec: ChipFileSpec) -> bytes:
    if spec.encoding == "jpeg":
        options = [cv2.IMWRITE_JPEG_QUALITY, spec.quality]
    else:
        options = [cv2.IMWRITE_PNG_COMPRESSION, _PNG_COMPRESSION]
    _, encoded = cv2.imencode(spec.suffix, cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), options)
    return encoded.tobytes()
