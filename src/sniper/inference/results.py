"""What is found in many images, kept on disk as it comes, and put together when all is there.

Beside the file of results lies a part for each process: a line for each image, the first line telling what the results
depend on. A search that was stopped goes on where it was.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from sniper.errors import DetectionsError
from sniper.files import atomic_write
from sniper.geometry import Detections
from sniper.inference.detector import Detector, to_coco
from sniper.runs.processes import SINGLE_PROCESS, Processes


class ResultParts:
    """The parts of a file of results, of one search by one or several processes.

    Args:
        target: the file to come.
        made_of: what the results depend on, as plain data.
        num_images: how many images are to be searched, by all processes.
        resume: whether to go on with parts that are there; they are begun anew otherwise.
        ranks: the processes; all make this, and agree on what is left to do.

    Raises:
        DetectionsError: if parts that are to be gone on with are of another search.
    """

    def __init__(
        self,
        target: Path,
        *,
        made_of: Mapping[str, Any],
        num_images: int,
        resume: bool,
        ranks: Processes = SINGLE_PROCESS,
    ) -> None:
        self._target, self._num_images, self._ranks = target, num_images, ranks
        self._prefix = f".{target.name}.part"
        self._head = json.dumps({"made_of": made_of, "num_images": num_images})
        if ranks.is_first and not resume:
            for old in self._parts():
                old.unlink()
        ranks.barrier()
        done = {index for index, _ in self._lines()}
        self.left: Sequence[int] = [index for index in range(num_images) if index not in done]
        ranks.barrier()  # all have read before one writes
        numbers = [int(part.name.removeprefix(self._prefix)) for part in self._parts()]
        number = max(numbers, default=-1) + 1 + ranks.rank
        self._own = target.with_name(f"{self._prefix}{number:03d}")
        ranks.barrier()
        self._num_kept = 0
        self._file = self._own.open("x")
        self._file.write(f"{self._head}\n")
        self._file.flush()

    @property
    def own_share(self) -> Sequence[int]:
        """The images that this process is to search, by their place."""
        return self.left[self._ranks.rank :: self._ranks.world_size]

    def keep(self, index: int, results: Sequence[Mapping[str, Any]] | None) -> None:
        """Write down what was found in an image; None for one that could not be read.

        Raises:
            ValueError: if a number is not finite.
        """
        self._file.write(json.dumps([index, results], allow_nan=False) + "\n")
        self._file.flush()
        self._num_kept += 1

    def finish(self) -> tuple[int, list[int]]:
        """Put the results of all images together, in their order; the parts are gone then.

        Returns:
            How many results there are, and the places of the images that could not be read; to the first process.

        Raises:
            DetectionsError: if results of an image are missing.
        """
        self._file.close()
        self._ranks.barrier()
        count, skipped = 0, []
        if self._ranks.is_first:
            places: dict[int, tuple[Path, int]] = {}
            for part in self._parts():
                for index, offset in _offsets(part, self._head):
                    places[index] = (part, offset)
            missing = [index for index in range(self._num_images) if index not in places]
            if missing:
                raise DetectionsError(
                    f"{self._target}: the results of {len(missing)} images are in no part beside it, which must "
                    "have been removed; --resume looks for them again"
                )
            with atomic_write(self._target) as file:
                file.write(b"[")
                for index in range(self._num_images):
                    results = _read_at(*places[index])
                    if results is None:
                        skipped.append(index)
                        continue
                    for entry in results:
                        file.write((b",\n" if count else b"\n") + json.dumps(entry).encode())
                        count += 1
                file.write(b"\n]\n")
            for part in self._parts():
                part.unlink()
        self._ranks.barrier()
        return count, skipped

    def close(self) -> None:
        """Stop before the end; what was kept stays."""
        self._file.close()
        if not self._num_kept:
            self._own.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _parts(self) -> list[Path]:
        names = (path.name for path in self._target.parent.iterdir())
        own = (name for name in names if name.startswith(self._prefix))
        return sorted(
            self._target.with_name(name) for name in own if name.removeprefix(self._prefix).isdigit()
        )

    def _lines(self) -> Iterator[tuple[int, int]]:
        for part in self._parts():
            yield from _offsets(part, self._head)


def _offsets(part: Path, head: str) -> Iterator[tuple[int, int]]:
    """Give the place of each image in a part and where its line begins; a last line cut short is left out."""
    with part.open("rb") as file:
        first = file.readline().decode(errors="replace")
        if not first.endswith("\n"):
            return  # killed as it began
        if first.rstrip("\n") != head:
            raise DetectionsError(
                f"{part}: is of another search (other images, weights or settings); "
                "without --resume it is begun anew"
            )
        offset = file.tell()
        for line in file:
            if line.endswith(b"\n"):
                yield int(line[1 : line.index(b",")]), offset
            offset += len(line)


def _read_at(part: Path, offset: int) -> list[dict[str, Any]] | None:
    with part.open("rb") as file:
        file.seek(offset)
        return json.loads(file.readline())[1]


@dataclass(frozen=True, kw_only=True)
class ImageToSearch:
    """An image file to be searched.

    Attributes:
        image_id: what its results bear.
        path: of the file.
        file_name: what its results bear, too; None for nothing.
    """

    image_id: int
    path: Path
    file_name: str | None = None


@dataclass(frozen=True, kw_only=True)
class SearchReport:
    """How a search went.

    Attributes:
        num_results: detections written.
        num_full: images of this search in which as many were found as may be, so that others were cut off.
        skipped: the places of images that could not be read.
    """

    num_results: int
    num_full: int
    skipped: Sequence[int]


def search_to_file(
    predictor: Detector,
    images: Sequence[ImageToSearch],
    target: Path,
    *,
    made_of: Mapping[str, Any],
    resume: bool,
    ranks: Processes,
    watch: Callable[[int, int], None],
    show: Callable[[int, Detections], None] | None = None,
) -> "SearchReport":
    """Find objects in images, and write them down as they come.

    Args:
        predictor: the detector.
        images: what to search; each process takes its share.
        target: COCO result file to write.
        made_of: names the detector, its weights and all that it depends on, for `resume`.
        resume: go on with a search of the same images by the same weights in the same way, that was stopped.
        ranks: the processes.
        watch: told after each image how many this process has searched, and how many it is to.
        show: told what was found in an image, by its place.

    Returns:
        How it went; complete in the first process.

    Raises:
        DetectionsError: if a search that is to be gone on with was another one.
        ImageError: if an image cannot be read, and is not to be skipped; what was found before is kept for `resume`.
    """
    listed = hashlib.sha256(json.dumps([_identity(one) for one in images]).encode())
    made_of = {
        **made_of,
        "categories": [one.category_id for one in predictor.categories],
        "images": listed.hexdigest(),
        "predict": asdict(predictor.spec),
        "read": asdict(predictor.data.read),
    }
    with ResultParts(target, made_of=made_of, num_images=len(images), resume=resume, ranks=ranks) as parts:
        own = parts.own_share
        num_full = 0
        found = predictor.search(images[place].path for place in own)
        for num_done, (place, detections) in enumerate(zip(own, found, strict=True), start=1):
            one = images[place]
            if detections is None:
                parts.keep(place, None)
            else:
                entries = to_coco(detections, image_id=one.image_id, categories=predictor.categories)
                if one.file_name is not None:
                    entries = [{**entry, "file_name": one.file_name} for entry in entries]
                parts.keep(place, entries)
                num_full += len(detections) == predictor.spec.max_detections
                if show is not None:
                    show(place, detections)
            watch(num_done, len(own))
        num_full = sum(ranks.all_gather(num_full))
        num_results, skipped = parts.finish()
        return SearchReport(num_results=num_results, num_full=num_full, skipped=skipped)


def _identity(image: ImageToSearch) -> tuple[object, ...]:
    """Tell an image file from another, and from what it was before it changed."""
    try:
        stat = image.path.stat()
    except OSError:  # it is told when it is read
        return image.image_id, str(image.path.absolute())
    return image.image_id, str(image.path.absolute()), stat.st_size, stat.st_mtime_ns
