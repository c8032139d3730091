"""The matches of all detections of an evaluation in one file, from which scores can be resampled without images."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int

from sniper.chips.arrays import read_arrays
from sniper.errors import DetectionsError, describe_os_error
from sniper.evaluation.matching import ClassMatches, COCOEvaluation, matches_by_class, run_coco_eval
from sniper.evaluation.pair import EvaluationPair, GroundTruth
from sniper.files import atomic_write

_NUM_IOUS = 10  # 0.50, 0.55 … 0.95
_FLAT = ("image_indices", "true_positives", "false_positives")
_SCALARS = ("digest", "step", "num_images")
_ARRAYS = (*_SCALARS, "offsets", "num_objects", *_FLAT)


@dataclass(frozen=True, kw_only=True, eq=False)
class MatchTable:
    """The detections that count, matched with the objects of their images.

    Attributes:
        digest: of the images and their objects, see `digest_of`. Scores of equal digests can be compared.
        step: of the weights.
        num_images: images that were scored.
        classes: the matches of each class that has objects or detections, at COCO's ten IoUs. Scores that were read
            from a file are ranks, from the last.
    """

    digest: str
    step: int
    num_images: int
    classes: Sequence[ClassMatches]

    @classmethod
    def of(cls, pair: EvaluationPair, *, max_detections: int = 100, step: int = 0) -> "MatchTable":
        """Match detections by the COCO rules.

        Args:
            pair: detections and ground truth.
            max_detections: how many detections of each image and class count.
            step: of the weights.

        Raises:
            DetectionsError: if there are too many boxes on each other to be compared.
        """
        return cls.from_evaluation(run_coco_eval(pair, max_detections=[max_detections]), pair, step=step)

    @classmethod
    def from_evaluation(
        cls, evaluation: COCOEvaluation, pair: EvaluationPair, *, step: int = 0
    ) -> "MatchTable":
        """Return the matches of an evaluation with a single range of areas and all ten IoUs."""
        return cls(
            digest=digest_of(pair.truth),
            step=step,
            num_images=pair.truth.num_images,
            classes=matches_by_class(evaluation, pair),
        )

    def save(self, path: Path) -> None:
        """Write the table as one compressed `.npz` file; an existing file is replaced atomically."""
        with atomic_write(path) as file:
            np.savez_compressed(
                file,
                digest=np.array(self.digest),
                step=np.array(self.step),
                num_images=np.array(self.num_images),
                offsets=np.cumsum([0, *(len(part.scores) for part in self.classes)]),
                num_objects=_join([part.num_objects for part in self.classes]),
                image_indices=_join([part.image_indices for part in self.classes]),
                true_positives=_join([_pack(part.is_true_positive) for part in self.classes]),
                false_positives=_join([_pack(part.is_false_positive) for part in self.classes]),
            )

    @classmethod
    def load(cls, path: Path) -> "MatchTable":
        """Read a table that `save` wrote.

        Raises:
            DetectionsError: if the file cannot be read, or is no such table.
        """
        try:
            arrays = read_arrays(path, _ARRAYS)
        except OSError as error:
            raise DetectionsError(f"{path}: cannot be read ({describe_os_error(error)})") from error
        except ValueError as error:
            raise DetectionsError(f"{path}: not a table of matches ({error})") from error
        problem = _find_problem(arrays)
        if problem is not None:
            raise DetectionsError(f"{path}: damaged: {problem}; `sniper evaluate` writes it again")
        offsets, num_images = arrays["offsets"], int(arrays["num_images"])
        num_objects = arrays["num_objects"].astype(np.int64).reshape(-1, num_images)  # (k, m)
        classes = []
        for index, (start, stop) in enumerate(pairwise(offsets.tolist())):
            classes.append(
                ClassMatches(
                    scores=np.arange(stop - start, 0.0, -1.0),
                    image_indices=arrays["image_indices"][start:stop].astype(np.int64),
                    is_true_positive=_unpack(arrays["true_positives"][start:stop]),
                    is_false_positive=_unpack(arrays["false_positives"][start:stop]),
                    num_objects=num_objects[index],
                )
            )
        return cls(
            digest=str(arrays["digest"]), step=int(arrays["step"]), num_images=num_images, classes=classes
        )


def digest_of(truth: GroundTruth) -> str:
    """Return the SHA-256 digest of images, objects and the names of their classes, in hexadecimal."""
    digest = hashlib.sha256()
    names = [category.name for category in truth.categories]
    digest.update(json.dumps([names, [str(each) for each in truth.image_ids.tolist()]]).encode())
    for array in (truth.image_indices, truth.labels, truth.boxes, truth.areas, truth.is_crowd):
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _join(arrays: Sequence[Int[np.ndarray, " _"]]) -> Int[np.ndarray, " n"]:
    """Concatenate arrays, perhaps none, as 32 bits."""
    return np.concatenate([np.zeros(0, dtype=np.int32), *arrays]).astype(np.int32)


def _pack(flags: Bool[np.ndarray, "t d"]) -> Int[np.ndarray, " d"]:
    """Return the flags of each detection as the bits of one number."""
    weights = 1 << np.arange(len(flags))
    packed: np.ndarray = (flags * weights[:, None]).sum(axis=0).astype(np.int32)
    return packed


def _unpack(packed: Int[np.ndarray, " d"]) -> Bool[np.ndarray, "t d"]:
    return (packed[None] >> np.arange(_NUM_IOUS)[:, None] & 1).astype(np.bool_)


def _find_problem(arrays: dict[str, np.ndarray]) -> str | None:
    """Describe what no table of matches has; None if there is nothing."""
    for name, array in arrays.items():
        is_scalar = name in _SCALARS
        if array.dtype.kind != ("U" if name == "digest" else "i") or (array.ndim == 0) != is_scalar:
            return f"{name} is of type {array.dtype} and shape {array.shape}"
    offsets, num_images, num_objects = arrays["offsets"], int(arrays["num_images"]), arrays["num_objects"]
    if len(offsets) == 0 or offsets[0] != 0 or (np.diff(offsets) < 0).any():
        return "offsets do not rise from 0"
    lengths = [len(arrays[name]) for name in _FLAT]
    if any(length != offsets[-1] for length in lengths):
        return f"expected {offsets[-1]} detections, got {lengths}"
    if num_images < 0 or len(num_objects) != (len(offsets) - 1) * num_images or (num_objects < 0).any():
        return f"expected numbers of objects in {num_images} images, got {len(num_objects)}"
    indices = arrays["image_indices"]
    if ((indices < 0) | (indices >= num_images)).any():
        return f"image_indices are not from 0 to {num_images - 1}"
    return None
