"""Mining: what an RPN takes for objects in the training images, at every level, kept as proposals (SNIPER §3.2).

Shards of images are the unit of work: a miner that was killed goes on with the first shard missing, and miners started
side by side by torchrun each take their own.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torchvision.ops import nms

from sniper.config.experiment import ExperimentSpec, MineSpec
from sniper.data.datasets import Dataset
from sniper.errors import DetectionsError, ProposalsError
from sniper.files import sha256
from sniper.geometry import Detections
from sniper.geometry.boxes import clip, from_xywh
from sniper.inference.proposals import ProposalStore, ShardProposals
from sniper.inference.search import Search, Source
from sniper.models.build import autocast, build_detector, build_inference_model
from sniper.models.two_stage import TwoStageDetector
from sniper.models.weights import fill_module
from sniper.runs.run import Run

_LONGEST_WAIT = 600  # seconds
_NOTHING = (np.zeros((0, 4)), np.zeros(0))  # boxes and scores in an image that cannot be read


@dataclass(frozen=True, kw_only=True)
class Miner:
    """A detector whose proposals are wanted.

    Attributes:
        model: in evaluation mode.
        spec: the experiment: levels, windows and precision as for prediction, merging and batches as for mining.
        device: where to compute.
    """

    model: TwoStageDetector
    spec: ExperimentSpec
    device: torch.device

    def __call__(self, sources: Iterable[Source]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Find the proposals of images.

        Args:
            sources: files, or arrays (h, w, 3) of RGB grey levels.

        Returns:
            For each image (n, 4) xyxy boxes, image frame, and (n,) scores, best first: those of all levels, after
            suppression; none for a file that cannot be read, if such are to be skipped.

        Raises:
            ImageError: if a file cannot be read, and is not to be skipped.
        """
        search = Search(
            detect=self._propose,
            levels=self.spec.predict.levels,
            keeps_range=False,
            window=self.spec.predict.window,
            batch_megapixels=self.spec.mine.batch_megapixels,
            device=self.device,
            data=self.spec.data,
        )
        for searched in search(sources):
            if searched is None:
                yield _NOTHING
                continue
            yield _merged(
                searched.detections.boxes,
                searched.detections.scores,
                sides=(searched.width, searched.height),
                nms_iou=self.spec.mine.nms_iou,
            )

    def _propose(self, images: Sequence[torch.Tensor]) -> list[Detections]:
        """Give proposals as detections of one class."""
        with torch.inference_mode(), autocast(self.spec.predict.precision, self.device):
            found = self.model.propose(images)
        return [
            Detections(
                boxes=one.boxes.double().cpu().numpy(),
                scores=one.scores.double().cpu().numpy(),
                labels=np.zeros(len(one.scores), dtype=np.int64),
            )
            for one in found
        ]


def mine(
    run: Run,
    spec: ExperimentSpec,
    annotations: Dataset,
    folder: Path,
    *,
    device: torch.device,
    watch: Callable[[int, int], None],
    share: tuple[int, int] = (0, 1),
) -> ProposalStore:
    """Find the proposals of every image with the newest weights of a run; goes on where it was stopped.

    Args:
        run: whose weights are taken.
        spec: of the run.
        annotations: the images.
        folder: where the proposals go; found by the same weights in the same way before, they are not looked for again.
        device: where to compute.
        watch: told after every image how many are done, and how many there are.
        share: which of how many miners this is; the first begins the store, each takes its shards.

    Returns:
        The store; complete, unless other miners are at work beside this one.

    Raises:
        RunError: if the run has no checkpoint.
        CheckpointError: if it cannot be read, or belongs to another model.
        ImageError: if an image cannot be read and is not to be skipped.
        ProposalsError: if the folder holds something else.
    """
    tensors, categories, path = run.load_weights()
    source = {
        "weights": sha256(path),
        "levels": [asdict(level) for level in spec.predict.levels],
        "rpn": asdict(spec.model.rpn),
        "precision": spec.predict.precision,
        "window": spec.predict.window,
        "nms_iou": spec.mine.nms_iou,
    }
    store = _begin(folder, annotations, source=source, rank=share[0])
    shards = _own_share(store, share)
    if not shards:
        return store
    model = build_detector(spec.model, seed=spec.seed, num_classes=len(categories), has_weights=False)
    fill_module(model, tensors, source=path)
    miner = Miner(model=build_inference_model(model.to(device).eval()), spec=spec, device=device)
    num_images = sum(len(store.images_of(shard)) for shard in shards)
    num_done = 0
    for shard in shards:
        found = []
        for proposals in miner(annotations[image].path for image in store.images_of(shard)):
            found.append(proposals)
            num_done += 1
            watch(num_done, num_images)
        store.write(shard, _packed(found))
    return store


def proposals_from_detections(
    detections: Sequence[Mapping[str, Any]],
    annotations: Dataset,
    folder: Path,
    *,
    spec: MineSpec,
    source: Path,
    share: tuple[int, int] = (0, 1),
) -> ProposalStore:
    """Take the detections of any detector for proposals, whatever their classes.

    Args:
        detections: COCO results.
        annotations: the images.
        folder: where the proposals go.
        spec: how to merge.
        source: the file that the detections came from.
        share: see `mine`.

    Raises:
        DetectionsError: if a detection is of an image that the annotations do not have.
        ProposalsError: if the folder holds something else.
    """
    place_of = {image_id: place for place, image_id in enumerate(annotations.image_ids.tolist())}
    strangers = [entry["image_id"] for entry in detections if entry["image_id"] not in place_of]
    if strangers:
        raise DetectionsError(f"{source}: {annotations.path} has no image {strangers[0]}")
    store = _begin(
        folder, annotations, source={"detections": sha256(source), "nms_iou": spec.nms_iou}, rank=share[0]
    )
    images = np.array([place_of[entry["image_id"]] for entry in detections], dtype=np.int64)
    boxes = from_xywh(np.array([entry["bbox"] for entry in detections], dtype=np.float64).reshape(-1, 4))
    scores = np.array([entry["score"] for entry in detections], dtype=np.float64)
    order = np.argsort(images, kind="stable")
    starts = np.searchsorted(images[order], np.arange(len(annotations) + 1))
    for shard in _own_share(store, share):
        found = []
        for image in store.images_of(shard):
            own = order[starts[image] : starts[image + 1]]
            sides = (int(annotations.widths[image]), int(annotations.heights[image]))
            found.append(_merged(boxes[own], scores[own], sides=sides, nms_iou=spec.nms_iou))
        store.write(shard, _packed(found))
    return store


def _merged(
    boxes: Float[np.ndarray, "n 4"],
    scores: Float[np.ndarray, " n"],
    *,
    sides: tuple[int, int],
    nms_iou: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Clip boxes to an image and drop the worse of those that overlap; best first."""
    boxes = clip(boxes, width=sides[0], height=sides[1])
    has_area = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    boxes, scores = boxes[has_area], scores[has_area]
    kept = nms(torch.from_numpy(boxes), torch.from_numpy(scores), nms_iou).numpy()
    return boxes[kept], scores[kept]


def _packed(found: Sequence[tuple[np.ndarray, np.ndarray]]) -> ShardProposals:
    counts = [len(boxes) for boxes, _ in found]
    return ShardProposals(
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        boxes=np.concatenate([np.zeros((0, 4)), *(boxes for boxes, _ in found)]),
        scores=np.concatenate([np.zeros(0), *(scores for _, scores in found)]),
    )


def _begin(folder: Path, annotations: Dataset, *, source: Mapping[str, Any], rank: int) -> ProposalStore:
    """Begin a store, or join the one that the first process begins."""
    deadline = time.monotonic() + _LONGEST_WAIT
    while rank > 0 and not ProposalStore.is_begun(folder, annotations, source=source):
        if time.monotonic() > deadline:
            raise ProposalsError(f"{folder}: the first process has not begun it in {_LONGEST_WAIT} s")
        time.sleep(0.1)
    return ProposalStore.begin(folder, annotations, source=source)


def _own_share(store: ProposalStore, share: tuple[int, int]) -> list[int]:
    """Give the missing shards that this miner is to write."""
    rank, num_miners = share
    return [shard for shard in store.missing if shard % num_miners == rank]
