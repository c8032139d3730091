"""COCO results of many images: stored image by image during the search, written as one JSON file at its end."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from sniper.data.datasets import ImageRecord
from sniper.data.datasets.categories import CategoryMatch, match_categories
from sniper.files import atomic_write, read_bytes, sha256
from sniper.geometry import Detections
from sniper.geometry.detections import DEFAULT_MIN_SCORE
from sniper.inference.detector import Detector, to_coco
from sniper.inference.store import BoxStore, ExactEncoding, ImageList, search_images
from sniper.runs.processes import SINGLE_PROCESS, Processes
from sniper.specs import parse_json


@dataclass(frozen=True, kw_only=True)
class ImageToSearch:
    """An image file to search.

    Attributes:
        image_id: id in the results.
        path: of the file.
        file_name: written into the results, too; None leaves it out.
        record: of the image, if it belongs to a data set.
    """

    image_id: int | str
    path: Path
    file_name: str | None = None
    record: ImageRecord | None = None


@dataclass(frozen=True, kw_only=True)
class SearchReport:
    """Summary of a search.

    Attributes:
        num_results: number of detections written.
        num_shown: number of detections from a minimum score on, without second boxes on an object.
        num_cut: number of images with `max_detections` detections, all of at least the minimum score; they may have had
            more of these.
        skipped: indices of the images that could not be read.
    """

    num_results: int
    num_shown: int
    num_cut: int
    skipped: Sequence[int]


@dataclass(frozen=True, kw_only=True)
class StoredResults:
    """Results of an earlier search.

    Attributes:
        path: of the file.
        skipped: ids of the images that could not be read.
    """

    path: Path
    skipped: tuple[int | str, ...]


@dataclass(frozen=True, kw_only=True)
class _Source:
    """What results depend on, as a hidden file beside them has it.

    Attributes:
        search: hash of images, weights and settings.
        results: hash of the file.
        skipped: ids of the images that could not be read.
    """

    search: str
    results: str
    skipped: tuple[int | str, ...]


def search_to_file(
    detector: Detector,
    images: Sequence[ImageToSearch],
    target: Path,
    *,
    match: CategoryMatch | None = None,
    source: Mapping[str, Any],
    existing: Literal["replace", "resume", "resume or replace"],
    min_score: float = DEFAULT_MIN_SCORE,
    on_progress: Callable[[float, int], None],
    on_image: Callable[[int, Detections], None] | None = None,
    on_results: Callable[[Callable[[int], Detections]], None] | None = None,
    processes: Processes = SINGLE_PROCESS,
) -> SearchReport:
    """Search images, and write their detections as COCO results; all processes call this.

    Each entry has the name of its category, too (`category_name`), so that evaluation does not depend on ids alone.

    Until all images are searched, their detections are in a hidden folder beside the file; afterwards, a hidden file
    names what they depend on, for `find_results`.

    Args:
        detector: the detector.
        images: the images; each process takes its share.
        target: COCO results file to write, whole or not at all.
        match: the categories under which detections are written; by default those of the detector.
        source: the weights, and all else that detections depend on beside the detector's `spec` and `data`.
        existing: how to treat a search that was stopped: `replace` it, `resume` it and refuse one of other images or by
            other weights or settings, or `resume or replace` it.
        min_score: minimum score of the detections that the report counts; the file has all.
        on_progress: called after each image, and within large ones, with the number of images that this process has
            searched, and of all that it is to search.
        on_image: called with the index and the detections of each image that this process has searched, before they
            are stored.
        on_results: called by the first process once the results are written, to write them in other forms: with a
            function that returns the detections of an image, by its index, labelled as in `match`. Where it is
            interrupted, `resume` calls it again.
        processes: those that search together.

    Raises:
        DetectionsError: if the search to resume is another one.
        ImageError: if an image cannot be read, and is not to be skipped; detections of others are kept for `resume`.
    """
    match = match_categories(detector.categories, ()) if match is None else match
    files = _hash_images(images)
    dependencies = _dependencies(detector, source)
    store = BoxStore.start(
        target.with_name(f".{target.name}.parts"),
        ExactEncoding(num_classes=len(detector.categories), mask_side=detector.mask_side),
        images=ImageList(digest=files, count=len(images), name="this search"),
        source=dependencies,
        existing=existing,
        processes=processes,
    )

    def find(indices: Sequence[int]) -> Iterator[Detections | None]:
        return detector.predict_many(
            (images[index].record or images[index].path for index in indices),
            on_progress=lambda num_done: on_progress(num_done, len(indices)),
        )

    search_images(store, find, processes=processes, on_progress=on_progress, on_image=on_image)

    def read(index: int) -> Detections:
        return match.relabel(store.read(index) or Detections.empty())

    if processes.is_first:
        _write_results(target, read, images, match=match)
        _write_source(
            target,
            _hash_search(files, dependencies, match),
            skipped=[images[i].image_id for i in store.unreadable],
        )
        if on_results is not None:
            on_results(read)
    report = _report(store, detector, min_score=min_score)
    processes.barrier()
    if processes.is_first:
        store.remove()
    return report


def find_results(
    detector: Detector,
    images: Sequence[ImageToSearch],
    paths: Iterable[Path],
    *,
    match: CategoryMatch,
    source: Mapping[str, Any],
) -> StoredResults | None:
    """Find results of a search of the same images by the same weights and settings; None if no path has them.

    Args:
        detector: the detector.
        images: the images.
        paths: of results files, the preferred first.
        match: as for `search_to_file`.
        source: as for `search_to_file`.
    """
    search = _hash_search(_hash_images(images), _dependencies(detector, source), match)
    for path in paths:
        try:
            content = parse_json(read_bytes(_source_path(path)), _Source)
            is_same = content.search == search and content.results == sha256(path)
        except (OSError, ValueError):  # absent, damaged, or of another version
            continue
        if is_same:
            return StoredResults(path=path, skipped=content.skipped)
    return None


def _dependencies(detector: Detector, source: Mapping[str, Any]) -> dict[str, Any]:
    """Return everything that detections depend on, as plain data."""
    return {
        **source,
        "categories": [category.category_id for category in detector.categories],
        "predict": asdict(detector.spec),
        "read": asdict(detector.data.read),
    }


def _hash_search(files: str, dependencies: Mapping[str, Any], match: CategoryMatch) -> str:
    written = [(category.category_id, category.name) for category in match.categories]
    content = [files, dependencies, written, match.labels.tolist()]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _source_path(target: Path) -> Path:
    return target.with_name(f".{target.name}.source")


def _write_source(target: Path, search: str, *, skipped: Sequence[int | str]) -> None:
    source = _Source(search=search, results=sha256(target), skipped=tuple(skipped))
    with atomic_write(_source_path(target)) as file:
        file.write(json.dumps(asdict(source)).encode())


def _report(store: BoxStore, detector: Detector, *, min_score: float) -> SearchReport:
    num_shown = num_cut = 0
    limit = detector.spec.max_detections
    for index in range(store.num_images):
        detections = store.read(index) or Detections.empty()
        num_shown += len(detections.confident(min_score))
        num_cut += len(detections) == limit and bool(detections.scores.min() >= min_score)
    return SearchReport(
        num_results=int(store.counts.sum()),
        num_shown=num_shown,
        num_cut=num_cut,
        skipped=store.unreadable,
    )


def _write_results(
    target: Path,
    read: Callable[[int], Detections],
    images: Sequence[ImageToSearch],
    *,
    match: CategoryMatch,
) -> None:
    names = {category.category_id: category.name for category in match.categories}
    separator = b"[\n"
    with atomic_write(target) as file:
        for index, image in enumerate(images):
            for entry in to_coco(read(index), image_id=image.image_id, categories=match.categories):
                entry["category_name"] = names[entry["category_id"]]
                if image.file_name is not None:
                    entry["file_name"] = image.file_name
                file.write(separator + json.dumps(entry).encode())
                separator = b",\n"
        file.write(b"\n]\n" if separator == b",\n" else b"[\n]\n")


def _hash_images(images: Sequence[ImageToSearch]) -> str:
    """Return a hash of the images' ids, paths, sizes and times of change."""
    return hashlib.sha256(json.dumps([_file_identity(image) for image in images]).encode()).hexdigest()


def _file_identity(image: ImageToSearch) -> tuple[object, ...]:
    """Return what distinguishes an image file from others, and from itself before it changed."""
    try:
        stat = image.path.stat()
    except OSError:  # reported when the file is read
        return image.image_id, str(image.path.absolute())
    return image.image_id, str(image.path.absolute()), stat.st_size, stat.st_mtime_ns
