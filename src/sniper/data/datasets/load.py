"""Load a data set of any format: detect the format, read it, and check it.

`docs/formats.md` lists the formats, `docs/annotations.md` what is accepted, corrected and refused.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sniper.data.datasets.check import check_dataset
from sniper.data.datasets.coco import LABELME, is_labelme, read_coco
from sniper.data.datasets.coco_folders import CocoSource, find_coco, join
from sniper.data.datasets.collect import Collector
from sniper.data.datasets.cvat import cvat_splits, read_cvat
from sniper.data.datasets.dataset import Dataset
from sniper.data.datasets.dota import find_dota, read_dota
from sniper.data.datasets.geojson import find_geojson, is_geojson, read_geojson
from sniper.data.datasets.openimages import find_open_images, read_open_images
from sniper.data.datasets.raw import RawDataset
from sniper.data.datasets.splits import ALL, by_split, choose_splits, scored_split
from sniper.data.datasets.text_files import read_start
from sniper.data.datasets.visdrone import find_visdrone, read_visdrone
from sniper.data.datasets.voc import find_voc, read_voc, root_tag
from sniper.data.datasets.yolo import find_yolo, read_yolo
from sniper.data.spec import DataSpec
from sniper.errors import AnnotationError, describe_os_error
from sniper.files import expand_path, is_folder, read_json

_VECTOR_SUFFIXES = (".gpkg", ".shp", ".fgb", ".kmz")
_MAX_LISTED = 12  # names of a folder's content, in an error


@dataclass(frozen=True, kw_only=True)
class _Source:
    """A data set on disk whose format is known.

    Attributes:
        read: reads a split, see `load_dataset`.
        list_splits: returns the names of the splits; empty where there are none.
        missing: one line for each split that the data set names and that is not there.
    """

    read: Callable[[str | None, DataSpec], RawDataset]
    list_splits: Callable[[], Sequence[str]]
    missing: Sequence[str] = ()


_Open = Callable[[Path, Path | None], _Source | None]


def load_dataset(
    path: str | os.PathLike[str],
    *,
    image_root: str | os.PathLike[str] | None = None,
    split: str | None = None,
    has_images: bool = True,
    data: DataSpec = DataSpec(),
) -> Dataset:
    """Load a data set and check it.

    The format is detected: COCO JSON, YOLO, Pascal VOC, CVAT, DOTA, VisDrone, Open Images or GeoJSON; see
    `docs/formats.md`.

    Args:
        path: of the annotation file, of YOLO's `data.yaml`, or of the folder.
        image_root: folder that file names are relative to; by default the usual folder of the format. For COCO JSON it
            is the one under which the files are, see `locate_image_files`.
        split: `train`, `val`, `test` or another name in the data set, or `all`. By default the training split where
            there are splits, everything otherwise.
        has_images: whether the image files are available; their headers are compared with the annotations. Formats
            without the sides of images need the headers all the same.
        data: how images are read (`read`), what happens to those and to boxes that cannot be used (`on_bad_image`,
            `on_bad_box`, `crowds`), and whether files may be links that leave the image root (`follow_links`); the data
            sets that it names are not used.

    Returns:
        The data set; its `warnings` list what was corrected, dropped or cannot be used.

    Raises:
        AnnotationError: listing the problems of the data set, one a line; the first 20 in words, the rest as a count.
    """
    data.configure_remote()
    root = None if image_root is None else expand_path(image_root)
    raw = _open(expand_path(path), root).read(split, data)
    return check_dataset(raw, has_images=has_images, data=data)


def load_splits(
    path: str | os.PathLike[str],
    *,
    image_root: str | os.PathLike[str] | None = None,
    split: str | None = None,
    has_images: bool = True,
    data: DataSpec = DataSpec(),
) -> dict[str, Dataset]:
    """Load the splits of a data set one by one.

    Args:
        path: as in `load_dataset`.
        image_root: as in `load_dataset`.
        split: to load; None loads all, without lists that join others, such as VOC's trainval.
        has_images: as in `load_dataset`.
        data: as in `load_dataset`.

    Returns:
        The splits by canonical name; one under an empty name where there are none.

    Raises:
        AnnotationError: if one cannot be used.
    """
    data.configure_remote()
    path, root = expand_path(path), None if image_root is None else expand_path(image_root)
    source = _open(path, root)
    available = list(source.list_splits())
    names = choose_splits(path, available, ALL if split is None else split)
    if split in (None, ALL) and {"train", "val"} <= set(names):
        names = [name for name in names if name != "trainval"]
    raws = {name: source.read(name or None, data) for name in names or [""]}
    if split in (None, ALL):
        first, raw = next(iter(raws.items()))
        raws[first] = replace(raw, warnings=(*source.missing, *raw.warnings))
    return {name: check_dataset(raw, has_images=has_images, data=data) for name, raw in raws.items()}


def load_image_files(files: Sequence[Path], *, path: Path, data: DataSpec = DataSpec()) -> Dataset:
    """Return image files as a data set without objects and categories; image ids count from 1.

    Args:
        files: of the images.
        path: name of the data set in messages.
        data: how images are read, and whether those that cannot be are left out.

    Raises:
        AnnotationError: listing the files that cannot be read, if they are not to be left out.
    """
    collector = Collector(path, noun="line")
    for number, file in enumerate(files, start=1):
        collector.add_image(file, source=str(file), image_id=number)
    raw = collector.build((), root=Path(), data=replace(data, follow_links=True))
    return check_dataset(raw, has_images=False, data=data)


def find_splits(path: str | os.PathLike[str]) -> list[str]:
    """Return the names of the splits of a data set; empty where there are none.

    Raises:
        AnnotationError: if there is no data set, or its splits cannot be read.
    """
    return list(_open(expand_path(path), None).list_splits())


def find_scored_split(path: str | os.PathLike[str]) -> str | None:
    """Return the split of a data set that scores are computed on: val, else test; None where there is neither.

    Raises:
        AnnotationError: if there is no data set, or its splits cannot be read.
    """
    return scored_split(find_splits(path))


def _open(path: Path, image_root: Path | None) -> _Source:
    if is_folder(path):
        return _open_folder(path, image_root)
    try:
        suffix = path.suffix.lower()
        start = read_start(path)
    except AnnotationError:
        return _open_coco_file(path, image_root)  # the error is the same for all formats
    if suffix in (".yaml", ".yml", ".data"):
        return _known(path, _open_yolo(path, image_root))
    if suffix == ".csv":
        return _known(path, _open_open_images(path, image_root))
    if suffix == ".xml" or start.startswith(b"<"):
        return _open_xml(path, image_root)
    if suffix in (".json", ".geojson") or start.startswith((b"{", b"[")):
        return _open_json(path, image_root)
    if suffix == ".txt":
        raise AnnotationError(
            f"{path}: is a text file; expected the folder of the data set, or YOLO's data.yaml"
        )
    advice = (
        f" (ogr2ogr -f GeoJSON {path.with_suffix('.geojson').name} {path.name} converts it to GeoJSON)"
        if suffix in _VECTOR_SUFFIXES
        else ""
    )
    raise AnnotationError(
        f"{path}: has no known format; expected COCO JSON, YOLO's data.yaml, CVAT's XML, the CSV of Open Images, "
        f"GeoJSON, or the folder of a data set{advice}"
    )


def _known(path: Path, source: _Source | None) -> _Source:
    if source is None:
        raise AnnotationError(f"{path}: has no known format")
    return source


def _open_folder(path: Path, image_root: Path | None) -> _Source:
    """Open the data set in a folder; where it fits several formats, the first is read, with a warning."""
    fitting = [
        (name, source) for name, _, open_ in _FORMATS if (source := open_(path, image_root)) is not None
    ]
    if not fitting:
        raise AnnotationError(f"{path}: {_describe_nothing(path)}")
    (first, source), *others = fitting
    if not others:
        return source
    warning = f"is read as {first}, but also looks like {' and '.join(name for name, _ in others)}"

    def read(split: str | None, data: DataSpec) -> RawDataset:
        raw = source.read(split, data)
        return replace(raw, warnings=(*raw.warnings, warning))

    return replace(source, read=read)


def _describe_nothing(path: Path) -> str:
    """Describe what was looked for in a folder, what is there, and which folder in or above it has a data set."""
    try:
        content = sorted(
            entry.name + "/" * entry.is_dir() for entry in path.iterdir() if entry.name[0] != "."
        )
    except OSError as error:
        return f"cannot be read ({describe_os_error(error)})"
    file = next((path / name for name in content if name.endswith(".json")), None)
    if file is not None and _is_labelme_file(file):
        return f"{file.name} {LABELME.format(path)}"
    lines = ["is no data set; looked for"]
    lines += [f"{name}: {looked_for}" for name, looked_for, _ in _FORMATS]
    hidden = len(content) - _MAX_LISTED
    listed = ", ".join(content[:_MAX_LISTED]) + (f" and {hidden} more" if hidden > 0 else "")
    lines.append(f"in the folder: {listed or 'nothing'}")
    near = [path / name for name in content[:_MAX_LISTED] if name.endswith("/") and _is_dataset(path / name)]
    near = near or [folder for folder in _enclosing(path) if _is_dataset(folder)]
    if near:
        lines.append(f"did you mean {' or '.join(map(str, near))}?")
    return "\n  ".join(lines)


def _is_labelme_file(path: Path) -> bool:
    try:
        return is_labelme(read_json(path, error=AnnotationError))
    except AnnotationError:
        return False


def _enclosing(path: Path) -> list[Path]:
    """Return the folder of a data set that a folder of its images or labels, or of a split of these, is in."""
    path = path.absolute()
    return [
        folder.parent
        for folder in (path, path.parent)
        if folder.name.lower() in ("images", "labels", "jpegimages")
    ]


def _is_dataset(path: Path) -> bool:
    try:
        return any(open_(path, None) is not None for _, _, open_ in _FORMATS)
    except (AnnotationError, OSError):
        return False


def _open_json(path: Path, image_root: Path | None) -> _Source:
    if is_geojson(path):
        return _known(path, _open_geojson(path, image_root))
    return _open_coco_file(path, image_root)


def _open_coco_file(path: Path, image_root: Path | None) -> _Source:
    return _open_coco(CocoSource(path=path, splits={"": path}), image_root)


def _open_coco(source: CocoSource, image_root: Path | None) -> _Source:
    def read(split: str | None, data: DataSpec) -> RawDataset:
        chosen = choose_splits(source.path, source.split_names, split) or list(source.splits)
        parts = {
            name: read_coco(source.splits[name], image_root=image_root, has_masks=data.masks == "read")
            for name in chosen
        }
        return join(source.path, parts)

    return _Source(read=read, list_splits=lambda: source.split_names)


def _open_coco_folder(path: Path, image_root: Path | None) -> _Source | None:
    source = find_coco(path)
    return None if source is None else _open_coco(source, image_root)


def _open_yolo(path: Path, image_root: Path | None) -> _Source | None:
    source = find_yolo(path, base=image_root)
    if source is None:
        return None
    return _Source(
        read=lambda split, data: read_yolo(source, split=split, data=data),
        list_splits=lambda: source.split_names,
        missing=source.list_missing(),
    )


def _open_xml(path: Path, image_root: Path | None) -> _Source:
    if root_tag(path) == "annotation":
        raise AnnotationError(
            f"{path}: is the XML of one image in Pascal VOC's format; expected the folder of all"
        )
    return _Source(
        read=lambda split, data: read_cvat(path, image_root=image_root, split=split, data=data),
        list_splits=lambda: cvat_splits(path),
    )


def _open_cvat_folder(path: Path, image_root: Path | None) -> _Source | None:
    files = [file for file in sorted(path.glob("*.xml")) if root_tag(file) == "annotations"]
    if len(files) == 1:
        return _open_xml(files[0], image_root)
    named = by_split((file.stem, file) for file in files)
    if not files:
        return None
    if not named:
        listed = ", ".join(file.name for file in files)
        raise AnnotationError(f"{path}: has several XML files of CVAT, name one of {listed}")

    def read(split: str | None, data: DataSpec) -> RawDataset:
        chosen = choose_splits(path, list(named), split)
        parts = {
            name: read_cvat(named[name], image_root=image_root, split="all", data=data) for name in chosen
        }
        return join(path, parts)

    return _Source(read=read, list_splits=lambda: list(named))


def _opener(find: Callable[[Path], Any], read: Callable[..., RawDataset]) -> _Open:
    """Return the function that opens a format, made of those that find its parts and read them."""

    def open_(path: Path, image_root: Path | None) -> _Source | None:
        source = find(path)
        if source is None:
            return None
        return _Source(
            read=lambda split, data: read(source, image_root=image_root, split=split, data=data),
            list_splits=lambda: source.split_names,
        )

    return open_


_open_open_images = _opener(find_open_images, read_open_images)
_open_geojson = _opener(find_geojson, read_geojson)

_FORMATS: tuple[tuple[str, str, _Open], ...] = (
    (
        "COCO JSON",
        "annotations/*.json, train/_annotations.coco.json, result.json, train.json, or one .json file",
        _open_coco_folder,
    ),
    ("YOLO", "data.yaml or dataset.yaml, or images/ and labels/, or classes.txt", _open_yolo),
    ("DOTA", "labelTxt/*.txt", _opener(find_dota, read_dota)),
    ("VisDrone", "annotations/*.txt with 8 numbers between commas", _opener(find_visdrone, read_visdrone)),
    ("CVAT", "annotations.xml, or other XML files of CVAT", _open_cvat_folder),
    ("Pascal VOC", "Annotations/*.xml, or XML files beside the images", _opener(find_voc, read_voc)),
    ("Open Images", "*-annotations-bbox.csv", _open_open_images),
    ("GeoJSON", "*.geojson, here or up to two folders below", _open_geojson),
)
"""Name, what is looked for in a folder, and the function that opens it; in the order of precedence."""
