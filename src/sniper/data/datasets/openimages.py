"""Read the CSV files of Open Images."""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sniper.data.datasets.collect import Collector, ImageIndex, numbered
from sniper.data.datasets.raw import RawDataset
from sniper.data.datasets.splits import by_split, choose_splits, find_split_folders
from sniper.data.datasets.text_files import flag_of, naming, read_start, read_text
from sniper.data.spec import DataSpec
from sniper.errors import AnnotationError
from sniper.files import open_regular

_COLUMNS = ("ImageID", "LabelName", "XMin", "XMax", "YMin", "YMax")


@dataclass(frozen=True, kw_only=True)
class OpenImagesSource:
    """What an Open Images data set consists of.

    Attributes:
        path: of the data set.
        splits: CSV files by canonical name; under an empty name where there are none.
    """

    path: Path
    splits: Mapping[str, Path]

    @property
    def split_names(self) -> list[str]:
        """Canonical names of the splits; empty where there are none."""
        return [name for name in self.splits if name]


def find_open_images(path: Path) -> OpenImagesSource | None:
    """Find the CSV files of an Open Images data set; None if there are none.

    Args:
        path: a CSV file, or a folder that has some, such as `validation-annotations-bbox.csv`.
    """
    if path.suffix.lower() == ".csv" and not path.is_dir():
        return OpenImagesSource(path=path, splits={"": path})
    if not path.is_dir():
        return None
    files = [
        file
        for folder in (path, path / "annotations", path / "labels")
        for file in sorted(folder.glob("*.csv"))
        if has_boxes(file)
    ]
    named = by_split(
        (file.name.removeprefix("oidv6-").split("-")[0].removesuffix(".csv"), file) for file in files
    )
    if not named and len(files) > 1:
        listed = ", ".join(file.name for file in files)
        raise AnnotationError(f"{path}: has several CSV files of Open Images, name one of {listed}")
    return OpenImagesSource(path=path, splits=named or {"": files[0]}) if files else None


def has_boxes(file: Path) -> bool:
    """Check whether a CSV file has the columns of Open Images."""
    try:
        header = read_start(file, num_bytes=10_000).decode(errors="replace").split("\n")[0]
    except AnnotationError:
        return False
    return set(_COLUMNS) <= {name.strip() for name in header.split(",")}


def read_open_images(
    source: OpenImagesSource, *, image_root: Path | None, split: str | None, data: DataSpec
) -> RawDataset:
    """Read the CSV files of an Open Images data set.

    Groups (`IsGroupOf`) are crowds. Images without a file are left out with a warning, as subsets of Open Images come
    with the CSV files of all images.

    Args:
        source: its files.
        image_root: folder of the images; None looks in the usual ones.
        split: to read, or `all`; None is the training split.
        data: how image files are read; the CSV files have fractions of their sides.

    Raises:
        AnnotationError: listing the problems of the files.
    """
    chosen = choose_splits(source.path, source.split_names, split) or list(source.splits)
    collector = Collector(source.path, noun="line", are_fractions=True)
    descriptions = _read_descriptions(source)
    names = {label: number for number, label in enumerate(descriptions)}
    folder = source.path if source.path.is_dir() else source.path.parent
    for name in chosen:
        folders = [folder / "images", *_split_folders(folder, name), folder / "data", folder]
        images = ImageIndex([image_root] if image_root is not None else folders)
        _read_file(collector, source.splits[name], images, names)
    if not descriptions:
        for name in source.splits.keys() - set(chosen):
            for row in _rows(Collector(source.path, noun="line"), source.splits[name]):
                names.setdefault(row.label, len(names))
    if not len(collector) and not collector.problems:
        raise AnnotationError(
            f"{source.path}: none of the images is in {image_root or folder}, or images in it"
        )
    if descriptions:
        known = [descriptions.get(label, label) for label in names]
    else:
        known = sorted(names)
        collector.replace_categories({number: known.index(label) for label, number in names.items()})
    return collector.build(numbered(known), root=image_root or folder, data=data)


def _split_folders(folder: Path, split: str) -> list[Path]:
    """Return the folders of images that are named after a split."""
    existing = [base for base in (folder, folder / "images") if base.is_dir()]
    return [folders[split] for folders in map(find_split_folders, existing) if split in folders]


@dataclass(frozen=True, kw_only=True)
class _Row:
    number: int
    image_id: str
    label: str
    box: Sequence[float]
    is_group: bool


def _rows(collector: Collector, file: Path) -> Iterator[_Row]:
    """Yield the rows of a CSV file; those that cannot be read become problems."""
    try:
        with naming(file), open_regular(file) as binary:
            stream = io.TextIOWrapper(binary, encoding="utf-8-sig", newline="")
            reader = csv.reader(stream)
            header = [name.strip() for name in next(reader, [])]
            missing = [name for name in _COLUMNS if name not in header]
            if missing:
                raise AnnotationError(
                    f"{file}: has no column {', '.join(missing)}; expected those of Open Images: "
                    f"{', '.join(_COLUMNS)}"
                )
            columns = [header.index(name) for name in _COLUMNS]
            group = header.index("IsGroupOf") if "IsGroupOf" in header else None
            for fields in reader:
                if not fields:
                    continue
                number = reader.line_num
                if len(fields) < len(header):
                    collector.drop_line(
                        "without a box",
                        f"{file.name}, line {number}: has {len(fields)} values, expected {len(header)}",
                    )
                    continue
                image_id, label, *texts = (fields[column].strip() for column in columns)
                try:
                    x1, x2, y1, y2 = map(float, texts)
                except ValueError:
                    collector.drop_line(
                        "with text in place of numbers",
                        f"{file.name}, line {number}: the box is {', '.join(texts)[:80]!r}, expected 4 numbers",
                    )
                    continue
                is_group = group is not None and flag_of(fields[group])
                yield _Row(
                    number=number, image_id=image_id, label=label, box=(x1, y1, x2, y2), is_group=is_group
                )
    except (UnicodeDecodeError, csv.Error) as error:
        raise AnnotationError(f"{file}: is not CSV in UTF-8 ({error})") from error


def _read_file(collector: Collector, file: Path, images: ImageIndex, names: dict[str, int]) -> None:
    indices: dict[str, int | None] = {}
    for row in _rows(collector, file):
        category = names.setdefault(row.label, len(names))
        if row.image_id not in indices:
            image = images.get(row.image_id)
            indices[row.image_id] = None if image is None else collector.add_image(image, source=file.name)
            if image is None:
                collector.note("image", "without a file, left out with their boxes", row.image_id)
        index = indices[row.image_id]
        if index is not None:
            collector.add_box(index, category, row.box, number=row.number, is_crowd=row.is_group)


def _read_descriptions(source: OpenImagesSource) -> dict[str, str]:
    """Read the names of classes by label, such as Tortoise for /m/011k07; empty where there is no such file."""
    folder = source.path if source.path.is_dir() else source.path.parent
    patterns = ("*class-descriptions*.csv", "classes.csv")
    folders = [
        parent / name for parent in (folder, folder.parent) for name in (".", "annotations", "metadata")
    ]
    file = next(
        (file for base in folders for pattern in patterns for file in sorted(base.glob(pattern))), None
    )
    if file is None:
        return {}
    rows = [row for row in csv.reader(read_text(file).split("\n")) if len(row) >= 2]
    return {label.strip(): name.strip() for label, name, *_ in rows if label.strip() != "LabelName"}
