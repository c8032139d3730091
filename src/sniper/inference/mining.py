"""Mining: the false alarms of a detector, or the proposals of an RPN (SNIPER §3.3), in all training images.

Mining is prediction: the same search fills the same kind of store.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from torchvision.ops import nms

from sniper.config.experiment import ExperimentSpec, MineSpec
from sniper.data.datasets import Category, Dataset, ImageRecord
from sniper.errors import DetectionsError
from sniper.evaluation.pair import look_up_ids
from sniper.evaluation.results import DetectionTable
from sniper.files import sha256
from sniper.geometry import Detections
from sniper.geometry.boxes import Sides, area, clip, from_xywh, intersections, iou
from sniper.inference.detector import Detector
from sniper.inference.proposals import start_proposals
from sniper.inference.search import Search
from sniper.inference.sources import ImageSource
from sniper.inference.store import BoxStore, search_images
from sniper.models.build import autocast, build_detector
from sniper.models.protocol import DetectorModel, ProposingModel
from sniper.models.weights import fill_module
from sniper.runs.processes import SINGLE_PROCESS, Processes
from sniper.runs.run import Run


@dataclass(frozen=True, kw_only=True)
class Miner:
    """An RPN that proposes boxes in images of any size.

    Attributes:
        model: in evaluation mode.
        spec: the experiment. Levels, windows and precision are those of prediction, merging and batches those of
            mining.
        device: of the model.
    """

    model: ProposingModel
    spec: ExperimentSpec
    device: torch.device

    def search(self, sources: Iterable[ImageSource]) -> Iterator[Detections | None]:
        """Propose boxes in images.

        Args:
            sources: the images.

        Returns:
            For each image the proposals of all levels after NMS: image frame, best first, all of label 0. None for a
            file that cannot be read, if such files are skipped.

        Raises:
            ImageError: if a file cannot be read, and is not to be skipped.
            OutOfMemory: if a window does not fit into the device's memory.
        """
        search = Search(
            detect=self._propose,
            levels=self.spec.predict.levels,
            in_valid_range=False,
            window=self.spec.predict.window,
            batch_megapixels=self.spec.mine.batch_megapixels,
            device=self.device,
            data=self.spec.data,
        )
        for result in search(sources):
            if result is None:
                yield None
            else:
                sides = Sides(result.width, result.height)
                yield _merge(result.detections, sides, nms_iou=self.spec.mine.nms_iou)

    def _propose(self, images: Sequence[torch.Tensor]) -> list[Detections]:
        """Return proposals as detections of one class."""
        with torch.inference_mode(), autocast(self.spec.predict.precision, self.device):
            proposals = self.model.propose(images)
        return [
            Detections(
                boxes=image.boxes.double().cpu().numpy(),
                scores=image.scores.double().cpu().numpy(),
                labels=np.zeros(len(image.scores), dtype=np.int64),
            )
            for image in proposals
        ]


def mine(
    run: Run,
    spec: ExperimentSpec,
    dataset: Dataset,
    folder: Path,
    *,
    device: torch.device,
    on_progress: Callable[[int, int], None],
    processes: Processes = SINGLE_PROCESS,
) -> BoxStore:
    """Store the proposals of every image by the newest weights of a run; continue where it was stopped.

    Args:
        run: run whose weights are used.
        spec: experiment of the run.
        dataset: the images.
        folder: of the store. Images that were searched by the same weights and settings are not searched again.
        device: device to compute on.
        on_progress: called after each image with the number of images that this process has searched, and of all that
            it is to search.
        processes: those that mine together; all call this.

    Returns:
        The complete store.

    Raises:
        RunError: if the run has no checkpoint.
        CheckpointError: if it cannot be read, or belongs to another model.
        ImageError: if an image cannot be read and is not to be skipped.
        ProposalsError: if the folder contains something else.
    """
    weights = _Weights.newest_of(run)
    source = {
        "weights": weights.digest,
        "levels": [asdict(level) for level in spec.predict.levels],
        "rpn": asdict(spec.model.rpn if spec.model.kind == "two_stage" else spec.model.torchvision),
        "precision": spec.predict.precision,
        "window": spec.predict.window,
        "nms_iou": spec.mine.nms_iou,
    }
    store = start_proposals(folder, dataset, source=source, processes=processes)

    def find(indices: Sequence[int]) -> Iterator[Detections | None]:
        model = weights.load(spec, device).for_inference()
        if not isinstance(model, ProposingModel):
            raise ValueError("a detector without a region proposal network proposes nothing")
        miner = Miner(model=model, spec=spec, device=device)
        return miner.search(dataset[index] for index in indices)

    search_images(store, find, processes=processes, on_progress=on_progress)
    return store


def mine_alarms(
    run: Run,
    spec: ExperimentSpec,
    dataset: Dataset,
    folder: Path,
    *,
    device: torch.device,
    on_progress: Callable[[int, int], None],
    images: Int[np.ndarray, " n"] | None = None,
    processes: Processes = SINGLE_PROCESS,
) -> BoxStore:
    """Store the false alarms of the newest weights of a run; see `mine` and `false_alarms`.

    Args:
        run: see `mine`, as all others.
        spec: its section `mine` states what a false alarm is.
        dataset: the images.
        folder: of the store.
        device: device to compute on.
        on_progress: called after each image.
        images: (n,) indices of those to search; the others have no false alarms. None searches all.
        processes: those that mine together.
    """
    weights = _Weights.newest_of(run)
    plain = {name: value for name, value in asdict(spec.predict).items() if name != "batch_megapixels"}
    source = {
        "weights": weights.digest,
        "predict": plain,
        "nms_iou": spec.mine.nms_iou,
        "max_iou": spec.mine.max_iou,
    }
    if images is not None:
        source["images"] = hashlib.sha256(images.astype(np.int64).tobytes()).hexdigest()
    drawn = frozenset(range(len(dataset)) if images is None else images.tolist())
    store = start_proposals(folder, dataset, source=source, processes=processes)

    def find(indices: Sequence[int]) -> Iterator[Detections | None]:
        detector = Detector.from_model(
            weights.load(spec, device), spec=spec, categories=weights.categories, device=device
        )
        detector = replace(detector, detect_masks=None)  # false alarms are boxes
        found = detector.predict_many(dataset[index] for index in indices if index in drawn)
        for index in indices:
            detections = next(found) if index in drawn else Detections.empty()
            yield None if detections is None else _alarms_in(detections, dataset[index], spec.mine)

    search_images(store, find, processes=processes, on_progress=on_progress)
    return store


def false_alarms(detections: Detections, record: ImageRecord, *, max_iou: float) -> Detections:
    """Return the detections that are on no object of an image, whatever their labels.

    Args:
        detections: image frame.
        record: the image with its objects. A detection that lies at least half inside a crowd or a region to ignore is
            no false alarm.
        max_iou: nor is one whose IoU with an object is at least this.
    """
    objects, crowds = record.boxes[~record.is_crowd], record.boxes[record.is_crowd]
    is_on_object = (iou(detections.boxes, objects) >= max_iou).any(axis=1)
    is_inside = intersections(detections.boxes, crowds) >= 0.5 * area(detections.boxes)[:, None]
    return detections[np.flatnonzero(~is_on_object & ~is_inside.any(axis=1))]


def _alarms_in(detections: Detections, record: ImageRecord, spec: MineSpec) -> Detections:
    merged = _merge(detections, Sides(record.width, record.height), nms_iou=spec.nms_iou)
    return false_alarms(merged, record, max_iou=spec.max_iou)


@dataclass(frozen=True, kw_only=True)
class _Weights:
    """The weights of a run.

    Attributes:
        tensors: by name.
        categories: classes of the run, by label.
        path: the file.
        digest: of the file.
    """

    tensors: Mapping[str, torch.Tensor]
    categories: tuple[Category, ...]
    path: Path
    digest: str

    @classmethod
    def newest_of(cls, run: Run) -> "_Weights":
        (tensors, categories, path), digest = run.read_weights(
            "last", lambda weights: (run.load_weights(int(weights.parent.name)), sha256(weights))
        )
        return cls(tensors=tensors, categories=categories, path=path, digest=digest)

    def load(self, spec: ExperimentSpec, device: torch.device) -> DetectorModel:
        """Return a detector with the weights, in evaluation mode."""
        model = build_detector(
            spec.model, seed=spec.seed, num_classes=len(self.categories), has_weights=False
        )
        fill_module(model, self.tensors, source=self.path)
        return model.to(device).eval()


def proposals_from_detections(
    detections: DetectionTable,
    dataset: Dataset,
    folder: Path,
    *,
    spec: MineSpec,
    source: Path,
    only_false_alarms: bool = False,
    processes: Processes = SINGLE_PROCESS,
) -> BoxStore:
    """Store the detections of any detector as proposals or false alarms, whatever their classes.

    Args:
        detections: of any categories.
        dataset: the images.
        folder: of the store.
        spec: how overlapping detections are merged, and which are false alarms.
        source: the file that the detections come from.
        only_false_alarms: leave out those on objects; see `false_alarms`.
        processes: see `mine`.

    Raises:
        DetectionsError: if a detection is of an image that the data set does not have.
        ProposalsError: if the folder contains something else.
    """
    images = look_up_ids(detections.image_ids, dataset.image_ids)
    if (images < 0).any():
        raise DetectionsError(f"{source}: {dataset.path} has no image {detections.image_ids[images < 0][0]}")
    order = np.argsort(images, kind="stable")
    starts = np.searchsorted(images[order], np.arange(len(dataset) + 1))
    proposals = Detections(
        boxes=from_xywh(detections.boxes),
        scores=detections.scores,
        labels=np.zeros(len(detections), dtype=np.int64),
    )[order]

    def find(indices: Sequence[int]) -> Iterator[Detections]:
        for index in indices:
            of_image = proposals[starts[index] : starts[index + 1]]
            if only_false_alarms:
                yield _alarms_in(of_image, dataset[index], spec)
            else:
                sides = Sides(int(dataset.widths[index]), int(dataset.heights[index]))
                yield _merge(of_image, sides, nms_iou=spec.nms_iou)

    store = start_proposals(
        folder,
        dataset,
        source={
            "detections": sha256(source),
            "nms_iou": spec.nms_iou,
            "max_iou": spec.max_iou if only_false_alarms else None,
        },
        processes=processes,
    )
    search_images(store, find, processes=processes, on_progress=lambda num_done, num_images: None)
    return store


def _merge(detections: Detections, sides: Sides, *, nms_iou: float) -> Detections:
    """Clip boxes to an image, and merge those that overlap by NMS whatever their labels; best first."""
    boxes = clip(detections.boxes, width=sides.width, height=sides.height)
    has_area = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    clipped = replace(detections, boxes=boxes)[has_area]
    kept = nms(torch.from_numpy(clipped.boxes), torch.from_numpy(clipped.scores), nms_iou)
    return clipped[kept.numpy()]
