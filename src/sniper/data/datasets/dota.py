"""Read DOTA data sets: one text file of oriented boxes for each image."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sniper.data.datasets.collect import Collector, ImageIndex, envelope, names_by_stem, numbered
from sniper.data.datasets.raw import RawDataset
from sniper.data.datasets.splits import choose_splits, find_split_folders
from sniper.data.datasets.text_files import read_text
from sniper.data.spec import DataSpec
from sniper.errors import AnnotationError
from sniper.remote import read_ahead

_IMAGE_FOLDERS = ("images", "Images", "JPEGImages")
_HEADERS = ("imagesource:", "gsd:")


@dataclass(frozen=True, kw_only=True)
class LabelFolders:
    """Folders of label files, and of the images that they belong to.

    Attributes:
        path: of the data set.
        splits: folder of labels and folders of images, by canonical name; under an empty name where there are none.
    """

    path: Path
    splits: Mapping[str, tuple[Path, Sequence[Path]]]

    @property
    def split_names(self) -> list[str]:
        """Canonical names of the splits; empty where there are none."""
        return [name for name in self.splits if name]

    def read(
        self,
        names: Sequence[str],
        image_root: Path | None,
        collector: Collector,
        read_file: Callable[[Path, Path], None],
    ) -> None:
        """Read the label files of some splits, and count images without one.

        Args:
            names: of the splits.
            image_root: folder of the images; None looks in the usual ones.
            collector: that the images are added to.
            read_file: adds an image to it, from its label file and its image file.
        """
        for name in names:
            labels, folders = self.splits[name]
            images = ImageIndex([image_root] if image_root is not None else folders)
            names_of = names_by_stem(labels, ".txt")
            files = read_ahead(labels / file for file in names_of.values())
            for stem, file in zip(names_of, files, strict=True):
                read_file(file, images.find(stem))
            collector.note_unused(images, kind="without a label file, not used")


def find_dota(path: Path) -> LabelFolders | None:
    """Find the folders of a DOTA data set; None if there is none.

    Args:
        path: a folder with `labelTxt` (or `labelTxt-v1.5` and the like) and `images`, or with folders train and
            val that have these.
    """
    if not path.is_dir():
        return None
    labels = _find_labels(path)
    if labels is None:
        parts = {name: find_dota(folder) for name, folder in find_split_folders(path).items()}
        splits = {
            name: part.splits[""] for name, part in parts.items() if part is not None and "" in part.splits
        }
        return LabelFolders(path=path, splits=splits) if splits else None
    images = [path / name for name in _IMAGE_FOLDERS]
    inner = find_split_folders(labels)
    if inner:
        return LabelFolders(
            path=path,
            splits={
                name: (folder, [image / folder.name for image in images] + images)
                for name, folder in inner.items()
            },
        )
    return LabelFolders(path=path, splits={"": (labels, [*images, path])})


def read_dota(
    source: LabelFolders, *, image_root: Path | None, split: str | None, data: DataSpec
) -> RawDataset:
    """Read the label files of a DOTA data set; oriented boxes become their envelopes, with a warning.

    The files of all splits are read, as the class names are those of the whole data set. Objects marked as difficult
    are crowds, as DOTA's scores ignore them.

    Args:
        source: its folders.
        image_root: folder of the images; None looks in the usual ones.
        split: to read, or `all`; None is the training split.
        data: how image files are read.

    Raises:
        AnnotationError: listing the problems of the files.
    """
    chosen = choose_splits(source.path, source.split_names, split) or list(source.splits)
    collector = Collector(source.path, noun="line")
    names: dict[str, int] = {}
    for name in source.splits:
        target = collector if name in chosen else Collector(source.path, noun="line")
        source.read([name], image_root, target, partial(_read_file, target, source.path, names))
    ordered = sorted(names)
    collector.replace_categories({number: ordered.index(name) for name, number in names.items()})
    return collector.build(numbered(ordered), root=image_root or source.path, data=data)


def _find_labels(path: Path) -> Path | None:
    folders = sorted(folder for folder in path.glob("labelTxt*") if folder.is_dir())
    if len(folders) > 1:
        listed = ", ".join(folder.name for folder in folders)
        plain = path / "labelTxt"
        if plain not in folders:
            raise AnnotationError(
                f"{path}: has several folders of DOTA labels ({listed}); keep one, as labelTxt"
            )
        return plain
    return folders[0] if folders else None


def _read_file(
    collector: Collector, path: Path, names: dict[str, int], labels: Path, image_file: Path
) -> None:
    image = collector.add_image(image_file, source=labels.relative_to(path).as_posix())
    try:
        text = read_text(labels)
    except AnnotationError as error:
        collector.problems.append(str(error))
        return
    for number, line in enumerate(text.split("\n"), start=1):
        fields = line.split()
        if not fields or fields[0].lower().startswith(_HEADERS):
            continue
        if len(fields) not in (9, 10):
            collector.drop(
                "without a box",
                image,
                number,
                f"has {len(fields)} values, expected 8 coordinates, a class, and whether it is difficult",
            )
            continue
        try:
            points = [float(field) for field in fields[:8]]
            is_difficult = len(fields) == 10 and int(fields[9]) != 0
        except ValueError:
            collector.drop(
                "with text in place of numbers",
                image,
                number,
                f"is {line.strip()[:80]!r}, expected 8 numbers, a class, and 0 or 1",
            )
            continue
        box = envelope(points)
        if not _is_axis_aligned(points):
            collector.correct("with oriented boxes, used as their envelopes", image, number)
        category = names.setdefault(fields[8], len(names))
        collector.add_box(image, category, box, number=number, is_crowd=is_difficult)


def _is_axis_aligned(points: Sequence[float]) -> bool:
    return len(set(points[0::2])) <= 2 and len(set(points[1::2])) <= 2
