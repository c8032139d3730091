"""Find the COCO JSON files in a folder, and join those of several splits."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from sniper.data.datasets.collect import relative_names
from sniper.data.datasets.dataset import Category
from sniper.data.datasets.file_names import leaves_root
from sniper.data.datasets.image_files import ImageFiles, locate_image_files
from sniper.data.datasets.raw import RawDataset
from sniper.data.datasets.splits import by_split, canonical, find_split_folders
from sniper.data.datasets.text_files import read_start
from sniper.errors import AnnotationError
from sniper.files import open_regular
from sniper.geometry.masks import MaskArrays

_SINGLE = (
    "result.json",
    "annotations.json",
    "instances.json",
    "labels.json",
    "coco.json",
    "_annotations.coco.json",
)
_NUM_START_BYTES = 65_536  # of a file, by which COCO JSON is recognized


@dataclass(frozen=True, kw_only=True)
class CocoSource:
    """The COCO JSON files of a data set.

    Attributes:
        path: of the data set.
        splits: file by canonical name; under an empty name where there are none.
    """

    path: Path
    splits: Mapping[str, Path]

    @property
    def split_names(self) -> list[str]:
        """Canonical names of the splits; empty where there are none."""
        return [name for name in self.splits if name]


def find_coco(path: Path) -> CocoSource | None:
    """Find the COCO JSON files in a folder; None if there are none.

    Args:
        path: a folder as Roboflow exports it (`train/_annotations.coco.json`), as COCO has it
            (`annotations/instances_train2017.json` and `train2017`), with `train.json` and the like, or with one file.
    """
    if not path.is_dir():
        return None
    exported = {
        name: folder / file
        for name, folder in find_split_folders(path).items()
        for file in _SINGLE
        if (folder / file).is_file()
    }
    if exported:
        return CocoSource(path=path, splits=exported)
    for folder in (path / "annotations", path / "labels", path):
        files = sorted(folder.glob("*.json")) if folder.is_dir() else []
        named = by_split((_split_of(file), file) for file in files if not _is_other(file))
        if named:
            return CocoSource(path=path, splits=named)
        single = [file for file in files if file.name in _SINGLE or (len(files) == 1 and _is_coco(file))]
        if single:
            return CocoSource(path=path, splits={"": single[0]})
    return None


def _split_of(file: Path) -> str:
    """Return the split that a file is named after: `train` for instances_train2017.json; its whole name if none."""
    words = file.stem.lower().replace("-", "_").replace(".", "_").split("_")
    names = (canonical(word.rstrip("0123456789")) for word in words)
    return next((name for name in names if name in ("train", "val", "test")), file.stem)


def _is_coco(file: Path) -> bool:
    """Check whether a JSON file of any name has one of COCO's keys near its start.

    Label Studio writes a file with categories alone, notes.json, beside the labels of YOLO.
    """
    try:
        start = read_start(file, num_bytes=_NUM_START_BYTES)
    except AnnotationError:
        return False
    with open_regular(file) as opened:
        is_whole = opened.seek(0, os.SEEK_END) <= _NUM_START_BYTES
    keys = (b'"images"', b'"annotations"', *([] if is_whole else [b'"categories"']))
    return any(key in start for key in keys)


def _is_other(file: Path) -> bool:
    """Check whether a file of COCO's own folder has captions or keypoints instead of objects."""
    return file.name.startswith(("captions_", "person_keypoints_", "stuff_", "panoptic_"))


def join(path: Path, parts: Mapping[str, RawDataset]) -> RawDataset:
    """Join the splits of a data set.

    Categories are joined by name, with the ids of the first split that has them.
    Image ids that two splits use become text: the split, a slash, and the id.

    Args:
        path: of the data set.
        parts: by name of the split. At least one.
    """
    raws = list(parts.values())
    if len(raws) == 1 and raws[0].path == path:
        return raws[0]
    located = [_locate(raw) for raw in raws]
    categories = _join_categories(raws)
    index_of = {category.name: index for index, category in enumerate(categories)}
    paths = [files.root / _without_climb(name) for files in located for name in files.names]
    root, names = relative_names(paths, located[0].root if len(raws) == 1 else path)
    ids = np.concatenate([raw.image_ids.astype(object) for raw in raws]).tolist()
    if len(set(ids)) < len(ids):
        ids = [f"{name}/{image_id}" for name, raw in parts.items() for image_id in raw.image_ids.tolist()]
    num_images, num_boxes = [len(raw.image_ids) for raw in raws], [len(raw.boxes) for raw in raws]
    first_images, first_boxes = np.cumsum([0, *num_images]), np.cumsum([0, *num_boxes])

    def locate(index: int, firsts: np.ndarray) -> tuple[RawDataset, int]:
        part = int(np.searchsorted(firsts, index, side="right")) - 1
        return raws[part], index - int(firsts[part])

    def name_image(index: int) -> str:
        raw, image = locate(index, first_images)
        return f"{raw.path.name}: {raw.name_image(image)}"

    def name_box(index: int) -> str:
        raw, box = locate(index, first_boxes)
        return f"{raw.path.name}: {raw.name_box(box)}"

    def show_box(index: int) -> str:
        raw, box = locate(index, first_boxes)
        return f"the box is {raw.boxes[box].tolist()}" if raw.show_box is None else raw.show_box(box)

    return RawDataset(
        path=path,
        image_root=root,
        categories=tuple(categories),
        image_ids=np.array(ids),
        file_names=np.array(names, dtype=np.str_),
        widths=np.concatenate([raw.widths for raw in raws]),
        heights=np.concatenate([raw.heights for raw in raws]),
        image_indices=np.concatenate(
            [raw.image_indices + first for raw, first in zip(raws, first_images, strict=False)]
        ),
        category_indices=np.concatenate([_map_categories(raw, index_of) for raw in raws]),
        boxes=np.concatenate([raw.boxes for raw in raws]),
        is_crowd=np.concatenate([raw.is_crowd for raw in raws]),
        areas=np.concatenate([raw.areas for raw in raws]),
        name_image=name_image,
        name_box=name_box,
        show_box=show_box,
        masks=_join_masks(raws),
        bad_masks=tuple(findings for raw in raws for findings in raw.bad_masks),
        dropped=tuple(findings for raw in raws for findings in raw.dropped),
        are_files_checked=all(raw.are_files_checked for raw in raws),
        left_out=tuple(f"{raw.path.name}: {line}" for raw in raws for line in raw.left_out),
        problems=tuple(f"{raw.path.name}: {problem}" for raw in raws for problem in raw.problems),
        warnings=tuple(
            f"{raw.path.name}: {warning}"
            for raw, files in zip(raws, located, strict=True)
            for warning in (*raw.warnings, *files.warnings)
        ),
    )


def _locate(raw: RawDataset) -> ImageFiles:
    names = raw.file_names.tolist()
    return locate_image_files(raw.path, names, image_root=raw.image_root, is_complete=False)


def _without_climb(name: str) -> str:
    """Return a name that stays below its root. One that leaves it stands for no file, or it would be corrected."""
    return os.path.normpath(f"/{name}").lstrip("/") if leaves_root(name) else name


def _map_categories(raw: RawDataset, index_of: Mapping[str, int]) -> np.ndarray:
    indices = np.array([index_of[category.name] for category in raw.categories], dtype=np.int64)
    return indices[raw.category_indices] if len(indices) else raw.category_indices


def _join_categories(raws: Sequence[RawDataset]) -> list[Category]:
    """Return each category once, by name; one whose id belongs to another already gets the next free one."""
    joined: dict[str, Category] = {}
    used: set[int | str] = set()
    for category in (category for raw in raws for category in raw.categories):
        if category.name not in joined:
            number = category.category_id
            if number in used:
                number = 1 + max((known for known in used if isinstance(known, int)), default=0)
            joined[category.name] = replace(category, category_id=number)
            used.add(number)
    return list(joined.values())


def _join_masks(raws: Sequence[RawDataset]) -> MaskArrays | None:
    if all(raw.masks is None for raw in raws):
        return None
    return MaskArrays.concatenate(
        [MaskArrays.none(len(raw.boxes)) if raw.masks is None else raw.masks for raw in raws]
    )
