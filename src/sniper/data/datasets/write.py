"""Write data sets as COCO JSON, YOLO or Pascal VOC, with their images."""

import itertools
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

import numpy as np
import yaml
from jaxtyping import UInt8
from PIL import Image

from sniper.data.datasets.dataset import Category, Dataset, ImageRecord
from sniper.data.datasets.rings import to_single_rings
from sniper.data.datasets.voc_masks import MASK_FOLDER, MAX_OBJECTS, draw_object_masks
from sniper.errors import AnnotationError, ConfigError, count_and_list, describe_os_error
from sniper.files import atomic_folder, check_regular, naming_path, open_regular
from sniper.geometry.mask_frames import move_masks
from sniper.geometry.masks import MaskArrays
from sniper.remote import is_remote

FormatName = Literal["coco", "yolo", "voc"]
ImageTransfer = Literal["copy", "link", "none"]

_FRACTION_DECIMALS = 10  # of a side: boxes are read back to within 0.00001 pixels
_PIXEL_DECIMALS = 6
_NUM_ORIENTED = 8  # numbers of a line that readers may take for the corners of an oriented box
_NOT_XML = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_UNSAFE = re.compile(r"[^\w-]")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def write_dataset(
    splits: Mapping[str, Dataset], folder: Path, *, to: FormatName, images: ImageTransfer = "copy"
) -> list[str]:
    """Write the splits of a data set to a folder, which appears only once it is complete.

    Args:
        splits: by name; one under an empty name where there are no splits. At least one.
        folder: to write, absent or empty.
        to: `coco` writes `annotations/instances_SPLIT.json` and `images/SPLIT`; `yolo` writes `data.yaml`,
            `images/SPLIT` and `labels/SPLIT`; `voc` writes `Annotations`, `JPEGImages` and `ImageSets/Main/SPLIT.txt`.
        images: `copy` them, `link` them (hard links), or `none`.

    Returns:
        What the format cannot express, one line for each kind.

    Raises:
        AnnotationError: if names cannot be written.
        ConfigError: if the folder is not empty, or an image cannot be copied or linked.
    """
    check_new_folder(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(folder) as unfinished:
        return _write(splits, unfinished, to=to, images=images, target=folder)


def write_annotations(splits: Mapping[str, Dataset], folder: Path, *, to: FormatName) -> list[str]:
    """Write the annotations of a data set to a folder that has its images in their `image_folder` already.

    Args:
        splits: as in `write_dataset`. Their file names must be distinct without suffix, and have no folders.
        folder: to write into.
        to: format, as in `write_dataset`.

    Returns:
        What the format cannot express, one line for each kind.

    Raises:
        AnnotationError: if names cannot be written.
    """
    return _write(splits, folder, to=to, images="none", target=folder)


def count_boxes(dataset: Dataset, *, to: FormatName) -> int:
    """Return how many boxes of a data set are written: YOLO cannot express crowds, which are left out."""
    return int((~dataset.is_crowd).sum()) if to == "yolo" else len(dataset.boxes)


def join_categories(splits: Mapping[str, Dataset], *, to: FormatName) -> list[Category]:
    """Return the categories of all splits, each name once, in the order in which YOLO's classes are written.

    Raises:
        AnnotationError: if names of categories or images cannot be written in a format, or a name stands for two
            categories of a data set.
    """
    categories = _join_categories(splits)
    if to == "voc":
        _check_xml(categories, splits)
    return categories


def written_ids(categories: Sequence[Category]) -> list[int]:
    """Return the ids of joined categories as COCO JSON is written with them: integers, distinct."""
    return _to_integers([category.category_id for category in categories])


def image_folder(split: str, *, to: FormatName) -> str:
    """Return the folder of the images of a split, relative to that of the data set.

    Example:
        >>> image_folder("train", to="yolo"), image_folder("", to="coco")
        ('images/train', 'images')
    """
    return "JPEGImages" if to == "voc" else os.path.join("images", _UNSAFE.sub("_", split)).rstrip("/")


def _write(
    splits: Mapping[str, Dataset], folder: Path, *, to: FormatName, images: ImageTransfer, target: Path
) -> list[str]:
    write = {"coco": _write_coco, "yolo": _write_yolo, "voc": _write_voc}[to]
    splits = {_UNSAFE.sub("_", name): dataset for name, dataset in splits.items()}
    writer = _Writer(folder, _join_categories(splits), images, target=target)
    write(writer, splits)
    return writer.warnings


def check_new_folder(folder: Path) -> None:
    """Check that a folder to write to is absent or empty.

    Raises:
        ConfigError: if it is not.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder}: is not empty, expected a new folder to write to")


@dataclass(frozen=True, kw_only=True)
class _Image:
    """An image to write.

    Attributes:
        record: its facts.
        name: of its file, relative to the folder of images.
    """

    record: ImageRecord
    name: str

    @property
    def stem(self) -> str:
        """The name without suffix."""
        return os.path.splitext(self.name)[0]


class _Writer:
    """What the formats have in common: names of files, images, categories.

    Args:
        folder: to write to.
        categories: of all splits, by name.
        images: how images get to the folder.
        target: the name of the folder once it is complete.
    """

    def __init__(
        self, folder: Path, categories: Sequence[Category], images: ImageTransfer, *, target: Path
    ) -> None:
        self.folder, self.categories, self._target = folder, categories, target
        self.warnings: list[str] = []
        self._images = images
        self._renamed: list[str] = []

    @property
    def label_of(self) -> dict[str, int]:
        """Index of each category, by name."""
        return {category.name: label for label, category in enumerate(self.categories)}

    def name_images(
        self, dataset: Dataset, *, is_flat: bool = False, used: set[str] | None = None
    ) -> list[_Image]:
        """Return the images of a data set with names that are distinct without their suffix.

        Args:
            dataset: the data set.
            is_flat: whether the names must not have folders.
            used: names of other images in the same folder, without suffix; new ones are added.
        """
        used = set() if used is None else used
        common = os.path.commonpath([os.path.dirname(name) for name in dataset.file_names.tolist()] or [""])
        images = []
        for record in dataset:
            name = record.file_name.removeprefix(f"{common}/" if common else "")
            *folders, last = _CONTROL.sub("_", name).split("/")
            # Readers of YOLO look for labels beside the last folder `images` of a path.
            parts = [*(folder for folder in folders if folder != "images"), last]
            stem, suffix = os.path.splitext(("_" if is_flat else "/").join(parts))
            free, number = stem, 1
            while free in used:
                number += 1
                free = f"{stem}_{number}"
            used.add(free)
            if free + suffix != name:
                self._renamed.append(f"{record.file_name} is {free + suffix}")
            images.append(_Image(record=record, name=free + suffix))
        return images

    def transfer(self, images: Sequence[_Image], folder: str) -> None:
        """Copy or link images into a folder."""
        target = self.folder / folder
        target.mkdir(parents=True, exist_ok=True)
        for image in images if self._images != "none" else ():
            file = target / image.name
            file.parent.mkdir(parents=True, exist_ok=True)
            try:
                if is_remote(image.record.path):
                    with open_regular(image.record.path) as source, file.open("wb") as copy:
                        shutil.copyfileobj(source, copy)
                    continue
                check_regular(image.record.path)
                if self._images == "link":
                    os.link(os.path.realpath(image.record.path), file)
                else:
                    shutil.copyfile(image.record.path, file)
            except OSError as error:
                hint = "; try --images copy" if self._images == "link" else ""
                raise ConfigError(
                    f"{image.record.path}: cannot be written to {self._target / folder / image.name} "
                    f"({describe_os_error(error)}){hint}"
                ) from error

    def write_text(self, name: str, text: str) -> None:
        """Write a text file."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with naming_path(path):
            path.write_text(text, encoding="utf-8", errors="surrogateescape")

    def write_png(self, name: str, pixels: UInt8[np.ndarray, "h w"]) -> None:
        """Write an image of numbers, in the colours of VOC's palette."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(pixels, "P")
        image.putpalette(_voc_palette())
        with naming_path(path):
            image.save(path, "PNG")

    def finish(self) -> None:
        """Report renamed images."""
        if self._renamed:
            self.warnings.append(f"images renamed: {len(self._renamed)} ({count_and_list(self._renamed)})")


def _write_coco(writer: _Writer, splits: Mapping[str, Dataset]) -> None:
    category_ids = written_ids(writer.categories)
    image_ids = _to_integers(
        [image_id for dataset in splits.values() for image_id in dataset.image_ids.tolist()]
    )
    label_of, num_images, num_boxes = writer.label_of, 0, 0
    for split, dataset in splits.items():
        images = writer.name_images(dataset)
        writer.transfer(images, image_folder(split, to="coco"))
        content = dataset.to_coco()
        id_of = {}
        for entry, image in zip(content["images"], images, strict=True):
            id_of[entry["id"]] = image_ids[num_images]
            entry |= {"id": image_ids[num_images], "file_name": image.name}
            num_images += 1
        name_of = {category.category_id: category.name for category in dataset.categories}
        for entry in content["annotations"]:
            num_boxes += 1
            entry["id"] = num_boxes
            entry["image_id"] = id_of[entry["image_id"]]
            entry["category_id"] = category_ids[label_of[name_of[entry["category_id"]]]]
        content["categories"] = [
            {"id": number, "name": category.name}
            for number, category in zip(category_ids, writer.categories, strict=True)
        ]
        writer.write_text(f"annotations/instances{split and f'_{split}'}.json", json.dumps(content))
    writer.finish()


def _to_integers(ids: Sequence[int | str]) -> list[int]:
    """Return ids for COCO JSON: as they are if they are distinct integers, else 1, 2, ..."""
    whole = [number for number in ids if isinstance(number, int)]
    return whole if len(set(whole)) == len(ids) else list(range(1, len(ids) + 1))


def _write_yolo(writer: _Writer, splits: Mapping[str, Dataset]) -> None:
    crowds: list[str] = []
    without_mask: list[str] = []
    label_of = writer.label_of
    has_masks = any(dataset.masks is not None for dataset in splits.values())
    for split, dataset in splits.items():
        images = writer.name_images(dataset)
        writer.transfer(images, image_folder(split, to="yolo"))
        for image in images:
            lines = _yolo_lines(image.record, dataset, label_of, has_masks=has_masks)
            writer.write_text(os.path.join("labels", split, f"{image.stem}.txt"), "".join(lines))
        crowds += [
            image.record.file_name for image in images for _ in range(int(image.record.is_crowd.sum()))
        ]
        if has_masks:
            without_mask += [
                image.record.file_name for image in images for _ in range(_count_bare(image.record))
            ]
    keys = {split or "train": image_folder(split, to="yolo") for split in splits}
    # Without `path`, which Ultralytics takes relative to the working directory, folders are relative to this file.
    content = {**keys, "names": {label: name for name, label in label_of.items()}}
    writer.write_text("data.yaml", yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
    if crowds:
        writer.warnings.append(
            f"crowds and regions to ignore left out, as YOLO cannot express them: {len(crowds)} "
            f"({count_and_list(list(dict.fromkeys(crowds)))})"
        )
    if without_mask:
        writer.warnings.append(
            "objects without a mask written with the outline of their box, as YOLO cannot have lines of both kinds: "
            f"{len(without_mask)} ({count_and_list(list(dict.fromkeys(without_mask)))})"
        )
    writer.finish()


def _count_bare(record: ImageRecord) -> int:
    """Count the objects without a mask, crowds aside."""
    is_bare = ~record.is_crowd
    return int((is_bare if record.masks is None else is_bare & ~record.masks.has_mask).sum())


def _yolo_lines(
    record: ImageRecord, dataset: Dataset, label_of: Mapping[str, int], *, has_masks: bool
) -> Iterator[str]:
    rings = _yolo_rings(record) if has_masks else [None] * len(record.boxes)
    for box, label, is_crowd, ring in zip(
        record.boxes.tolist(), record.labels.tolist(), record.is_crowd.tolist(), rings, strict=True
    ):
        if is_crowd:
            continue
        x1, y1, x2, y2 = box
        values = [(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1] if ring is None else ring
        sides = itertools.cycle((record.width, record.height))
        numbers = " ".join(
            _format(value / side, _FRACTION_DECIMALS) for value, side in zip(values, sides, strict=False)
        )
        yield f"{label_of[dataset.categories[label].name]} {numbers}\n"


def _yolo_rings(record: ImageRecord) -> Iterator[list[float]]:
    """Iterate over x, y, x, y, ... of each object: of its mask as one ring, or else of its box."""
    masks = boxes = MaskArrays.from_boxes(record.boxes)
    if record.masks is not None:
        cropped = move_masks(record.masks, lambda points: points, sides=record.sides)
        joined = to_single_rings(cropped.select(~record.is_crowd)).spread(~record.is_crowd)
        rows = np.arange(len(boxes))
        masks = MaskArrays.concatenate([joined, boxes]).select(
            np.where(joined.has_mask, rows, len(rows) + rows)
        )
    for ring in masks.to_coco():
        points = ring[0]
        if len(points) == _NUM_ORIENTED:
            points = [*points[:2], (points[0] + points[2]) / 2, (points[1] + points[3]) / 2, *points[2:]]
        yield points


def _write_voc(writer: _Writer, splits: Mapping[str, Dataset]) -> None:
    _check_xml(writer.categories, splits)
    covered: list[str] = []
    crowded: list[str] = []
    used: set[str] = set()
    for split, dataset in splits.items():
        images = writer.name_images(dataset, is_flat=True, used=used)
        writer.transfer(images, image_folder(split, to="voc"))
        for image in images:
            root = _voc_element(image, dataset)
            masks = image.record.masks
            if masks is not None and masks.has_mask.any():
                if len(masks) > MAX_OBJECTS:
                    crowded.append(image.record.file_name)
                else:
                    numbers, hidden = draw_object_masks(masks, image.record.sides)
                    writer.write_png(f"{MASK_FOLDER}/{image.stem}.png", numbers)
                    covered += [image.record.file_name] * len(hidden)
                    ElementTree.SubElement(root, "segmented").text = "1"
            ElementTree.indent(root)
            writer.write_text(
                f"Annotations/{image.stem}.xml", ElementTree.tostring(root, encoding="unicode") + "\n"
            )
        if split:
            writer.write_text(f"ImageSets/Main/{split}.txt", "".join(f"{image.stem}\n" for image in images))
    for files, problem in (
        (crowded, f"images without their masks, as VOC numbers at most {MAX_OBJECTS} objects"),
        (covered, "masks without the pixels that they share with others, as VOC has one object a pixel"),
    ):
        if files:
            listed = count_and_list(list(dict.fromkeys(files)))
            writer.warnings.append(f"{problem}: {len(files)} ({listed})")
    writer.finish()


def _voc_element(image: _Image, dataset: Dataset) -> ElementTree.Element:
    record = image.record
    root = ElementTree.Element("annotation")
    ElementTree.SubElement(root, "folder").text = "JPEGImages"
    ElementTree.SubElement(root, "filename").text = image.name
    size = ElementTree.SubElement(root, "size")
    for key, value in (("width", record.width), ("height", record.height), ("depth", 3)):
        ElementTree.SubElement(size, key).text = str(value)
    for box, label, is_crowd in zip(
        record.boxes.tolist(), record.labels.tolist(), record.is_crowd.tolist(), strict=True
    ):
        item = ElementTree.SubElement(root, "object")
        ElementTree.SubElement(item, "name").text = dataset.categories[label].name
        ElementTree.SubElement(item, "difficult").text = str(int(is_crowd))
        bounds = ElementTree.SubElement(item, "bndbox")
        x1, y1, x2, y2 = box
        for key, value in (("xmin", x1 + 1), ("ymin", y1 + 1), ("xmax", x2), ("ymax", y2)):
            ElementTree.SubElement(bounds, key).text = _format(value, _PIXEL_DECIMALS)
    return root


def _voc_palette() -> list[int]:
    """Return VOC's colours of the numbers 0 to 255: their bits in turn are the high bits of red, green and blue."""
    bits = (np.arange(256)[:, None] >> np.arange(8)) & 1  # (256, 8)
    weights = 1 << np.array([7, 6, 5])
    return (
        np.stack([bits[:, channel::3] @ weights[: bits[:, channel::3].shape[1]] for channel in range(3)], 1)
        .ravel()
        .tolist()
    )


def _check_xml(categories: Sequence[Category], splits: Mapping[str, Dataset]) -> None:
    names = [category.name for category in categories]
    names += [name for dataset in splits.values() for name in dataset.file_names.tolist()]
    wrong = [repr(name) for name in names if _NOT_XML.search(_CONTROL.sub("", name)) or not name.strip()]
    wrong += [repr(category.name) for category in categories if _CONTROL.search(category.name)]
    if wrong:
        raise AnnotationError(f"{len(wrong)} names cannot be written in XML ({count_and_list(wrong)})")


def _join_categories(splits: Mapping[str, Dataset]) -> list[Category]:
    """Return the categories of all splits, each name once.

    Raises:
        AnnotationError: if a name stands for two categories of a data set.
    """
    joined: dict[str, Category] = {}
    for dataset in splits.values():
        names = [category.name for category in dataset.categories]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise AnnotationError(f"{dataset.path}: two categories have the name {count_and_list(repeated)}")
        for category in dataset.categories:
            joined.setdefault(category.name, category)
    return list(joined.values())


def _format(value: float, decimals: int) -> str:
    """Return a number with as many decimals as it needs.

    Example:
        >>> _format(3.0, 6), _format(0.25, 6)
        ('3', '0.25')
    """
    return f"{value:.{decimals}f}".rstrip("0").rstrip(".") or "0"
