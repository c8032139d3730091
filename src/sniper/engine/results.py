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

from sniper.engine.predict import Predictor, to_coco
from sniper.engine.ranks import ALONE, Ranks
from sniper.errors import DetectionsError
from sniper.files import replace_whole
from sniper.geometry import Detections


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
        ranks: Ranks = ALONE,
    ) -> None:
        self._target, self._num_images, self._ranks = target, num_images, ranks
        self._head = json.dumps({"made_of": made_of, "num_images": num_images})
        if ranks.is_first and not resume:
            for old in self._parts():
                old.unlink()
        ranks.wait()
        done = {index for index, _ in self._lines()}
        self.left: Sequence[int] = [index for index in range(num_images) if index not in done]
        ranks.wait()  # all have read before one writes
        taken = sum(1 for _ in self._parts())
        self._own = target.with_name(f".{target.name}.part{taken + ranks.rank:03d}")
        ranks.wait()
        self._num_kept = 0
        self._file = self._own.open("w")
        self._file.write(f"{self._head}\n")
        self._file.flush()

    @property
    def own_share(self) -> Sequence[int]:
        """The images that this process is to search, by their place."""
        return self.left[self._ranks.rank :: self._ranks.count]

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
            DetectionsError: if a part has become unreadable.
        """
        self._file.close()
        self._ranks.wait()
        count, skipped = 0, []
        if self._ranks.is_first:
            places: dict[int, tuple[Path, int]] = {}
            for part in self._parts():
                for index, offset in _offsets(part, self._head):
                    places[index] = (part, offset)
            with replace_whole(self._target) as file:
                file.write(b"[")
                for index in range(self._num_images):
                    results = _read_at(*places[index]) if index in places else None
                    if results is None:
                        skipped.append(index)
                        continue
                    for entry in results:
                        file.write((b",\n" if count else b"\n") + json.dumps(entry).encode())
                        count += 1
                file.write(b"\n]\n")
            for part in self._parts():
                part.unlink()
        self._ranks.wait()
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
        return sorted(self._target.parent.glob(f".{self._target.name}.part[0-9]*"))

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
class ToSearch:
    """An image file to be searched.

    Attributes:
        image_id: what its results bear.
        path: of the file.
        file_name: what its results bear, too; None for nothing.
    """

    image_id: int
    path: Path
    file_name: str | None = None


def search_to_file(
    predictor: Predictor,
    images: Sequence[ToSearch],
    target: Path,
    *,
    weights: str,
    resume: bool,
    ranks: Ranks,
    watch: Callable[[int, int], None],
    show: Callable[[int, Detections], None] | None = None,
) -> tuple[int, list[int]]:
    """Find objects in images, and write them down as they come.

    Args:
        predictor: the detector.
        images: what to search; each process takes its share.
        target: COCO result file to write.
        weights: names the detector's weights, for `resume`.
        resume: go on with a search of the same images by the same weights in the same way, that was stopped.
        ranks: the processes.
        watch: told after each image how many this process has searched, and how many it is to.
        show: told what was found in an image, by its place.

    Returns:
        How many results there are, and the places of images that could not be read; to the first process.

    Raises:
        DetectionsError: if a search that is to be gone on with was another one.
        ImageError: if an image cannot be read, and is not to be skipped; what was found before is kept for `resume`.
    """
    listed = hashlib.sha256(json.dumps([(one.image_id, str(one.path)) for one in images]).encode())
    made_of = {
        "weights": weights,
        "images": listed.hexdigest(),
        "predict": json.loads(json.dumps(asdict(predictor.spec))),
        "read": json.loads(json.dumps(asdict(predictor.data.read))),
    }
    with ResultParts(target, made_of=made_of, num_images=len(images), resume=resume, ranks=ranks) as parts:
        own = parts.own_share
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
                if show is not None:
                    show(place, detections)
            watch(num_done, len(own))
        return parts.finish()
