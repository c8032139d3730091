"""Read VisDrone's detection data sets: one text file of comma-separated boxes for each image."""

from functools import partial
from pathlib import Path

from sniper.data.datasets.collect import Collector, names_by_stem, numbered
from sniper.data.datasets.dota import LabelFolders
from sniper.data.datasets.raw import RawDataset
from sniper.data.datasets.splits import canonical, choose_splits, find_split_folders
from sniper.data.datasets.text_files import read_text
from sniper.data.spec import DataSpec
from sniper.errors import AnnotationError

CLASS_NAMES = (
    "pedestrian",
    "people",
    "bicycle",
    "car",
    "van",
    "truck",
    "tricycle",
    "awning-tricycle",
    "bus",
    "motor",
)
"""Of the categories 1 to 10. 0 is a region to ignore, 11 are other objects."""

_NUM_FIELDS = 8  # x, y, width, height, score, category, truncation, occlusion


def find_visdrone(path: Path) -> LabelFolders | None:
    """Find the folders of a VisDrone data set; None if there is none.

    Args:
        path: a folder with `annotations` of text files and `images`, or with folders of these that are named after a
            split, such as `train` or `VisDrone2019-DET-train`.
    """
    if not path.is_dir():
        return None
    labels = path / "annotations"
    if _has_labels(labels):
        return LabelFolders(path=path, splits={"": (labels, [path / "images"])})
    folders = find_split_folders(path) or {
        canonical(folder.name.rsplit("-", 1)[-1]): folder
        for folder in sorted(path.glob("VisDrone*-*"))
        if folder.is_dir()
    }
    splits = {
        name: (folder / "annotations", [folder / "images"])
        for name, folder in folders.items()
        if _has_labels(folder / "annotations")
    }
    return LabelFolders(path=path, splits=splits) if splits else None


def read_visdrone(
    source: LabelFolders, *, image_root: Path | None, split: str | None, data: DataSpec
) -> RawDataset:
    """Read the label files of a VisDrone data set.

    Regions to ignore, other objects, and objects with a score of 0 are crowds. Those without a category of their own
    get the first category.

    Args:
        source: its folders.
        image_root: folder of the images; None is `images` beside the labels.
        split: to read, or `all`; None is the training split.
        data: how image files are read.

    Raises:
        AnnotationError: listing the problems of the files.
    """
    chosen = choose_splits(source.path, source.split_names, split) or list(source.splits)
    collector = Collector(source.path, noun="line")
    source.read(chosen, image_root, collector, partial(_read_file, collector, source.path))
    return collector.build(numbered(CLASS_NAMES), root=image_root or source.path, data=data)


def _has_labels(folder: Path) -> bool:
    """Check whether a folder has text files of VisDrone, by the first line in them."""
    for name in names_by_stem(folder, ".txt").values():
        try:
            line = read_text(folder / name).strip().split("\n")[0]
        except AnnotationError:
            continue
        if line:
            return line.count(",") >= _NUM_FIELDS - 1
    return False


def _read_file(collector: Collector, path: Path, labels: Path, image_file: Path) -> None:
    image = collector.add_image(image_file, source=labels.relative_to(path).as_posix())
    try:
        text = read_text(labels)
    except AnnotationError as error:
        collector.problems.append(str(error))
        return
    for number, line in enumerate(text.split("\n"), start=1):
        fields = [field for field in line.strip().rstrip(",").split(",") if line.strip()]
        if not fields:
            continue
        if len(fields) != _NUM_FIELDS:
            collector.drop(
                "without a box",
                image,
                number,
                f"has {len(fields)} values, expected x, y, width, height, score, category, truncation, occlusion",
            )
            continue
        try:
            x, y, width, height, score = map(float, fields[:5])
            category = int(fields[5])
        except ValueError:
            collector.drop(
                "with text in place of numbers", image, number, f"is {line.strip()[:80]!r}, expected numbers"
            )
            continue
        if not 0 <= category <= len(CLASS_NAMES) + 1:
            collector.drop(
                "whose category is not listed",
                image,
                number,
                f"the category is {category}, expected 0 to {len(CLASS_NAMES) + 1}",
            )
            continue
        is_class = 1 <= category <= len(CLASS_NAMES)
        if not is_class:
            collector.correct("of regions to ignore or other objects, used as crowds", image, number)
        collector.add_box(
            image,
            category - 1 if is_class else 0,
            (x, y, x + width, y + height),
            number=number,
            is_crowd=not is_class or score == 0,
        )
