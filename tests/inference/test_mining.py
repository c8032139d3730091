"""Mining: every image searched once, in however many processes and pieces."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sniper.chips import LevelSpec
from sniper.config.experiment import ExperimentSpec, MineSpec, PredictSpec
from sniper.data.datasets import Dataset, ImageRecord
from sniper.errors import DetectionsError, RunError
from sniper.evaluation.results import load_detections
from sniper.geometry import Detections
from sniper.geometry.boxes import iou
from sniper.inference.mining import Miner, false_alarms, mine, mine_alarms, proposals_from_detections
from sniper.inference.store import BoxStore
from sniper.models.weights import save_tensors
from sniper.runs.checkpoints import load_weights
from sniper.runs.run import Run
from tests.models.batches import TINY, build_tiny
from tests.training.experiments import TrainedRun

CPU = torch.device("cpu")


@pytest.fixture
def run(trained_once: TrainedRun) -> Run:
    return trained_once.run


def ignore(num_done: int, num_images: int) -> None:
    pass


def propose(
    images: Sequence[np.ndarray], *levels: LevelSpec, batch_megapixels: float = 8.0
) -> list[Detections]:
    spec = ExperimentSpec(
        mine=MineSpec(batch_megapixels=batch_megapixels),
        predict=PredictSpec(levels=levels, precision="fp32"),
    )
    results = list(Miner(model=build_tiny().eval(), spec=spec, device=CPU).search(images))
    return [proposals for proposals in results if proposals is not None]


def noise(*sides: tuple[int, int]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for w, h in sides]


def test_proposals_of_all_levels_are_merged_in_the_image_frame_best_first() -> None:
    levels = (LevelSpec(factor=2.0), LevelSpec(long_side=64))
    images = noise((90, 60), (64, 64), (1, 50))
    results = propose(images, *levels)
    for image, proposals in zip(images, results, strict=True):
        height, width = image.shape[:2]
        boxes = proposals.boxes
        assert len(proposals) <= 2 * TINY.rpn.post_nms_top_n
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        assert (boxes >= 0).all()
        assert (boxes <= np.array([width, height, width, height])).all()
        assert (np.diff(proposals.scores) <= 0).all()
        assert np.triu(iou(boxes, boxes), k=1).max(initial=0) <= 0.7 + 1e-6
    assert len(propose(images, levels[0])[0]) < len(results[0])


def test_images_searched_in_one_batch_have_the_proposals_of_each_alone() -> None:
    images = noise((64, 64), (64, 64), (64, 64))
    together = propose(images, LevelSpec(factor=1.0))
    alone = propose(images, LevelSpec(factor=1.0), batch_megapixels=0.004)
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_allclose(one.boxes, other.boxes, atol=1e-3)
        np.testing.assert_allclose(one.scores, other.scores, atol=1e-5)


def assert_same(one: BoxStore, other: BoxStore) -> None:
    assert one.num_images == other.num_images
    for index in range(one.num_images):
        proposals, others = one.read(index), other.read(index)
        assert proposals is not None
        assert others is not None
        np.testing.assert_array_equal(proposals.boxes, others.boxes)
        np.testing.assert_array_equal(proposals.scores, others.scores)


def test_a_killed_miner_continues_and_finds_the_same(
    run: Run, spec: ExperimentSpec, dataset: Dataset, tmp_path: Path
) -> None:
    whole = mine(run, spec, dataset, tmp_path / "whole", device=CPU, on_progress=ignore)

    def kill(num_done: int, num_images: int) -> None:
        if num_done == 3:
            raise KeyboardInterrupt

    folder = tmp_path / "resumed"
    with pytest.raises(KeyboardInterrupt):
        mine(run, spec, dataset, folder, device=CPU, on_progress=kill)
    progress: list[tuple[int, int]] = []

    def note(num_done: int, num_images: int) -> None:
        progress.append((num_done, num_images))

    assert_same(mine(run, spec, dataset, folder, device=CPU, on_progress=note), whole)
    assert progress == [(1, 1)]
    assert_same(mine(run, spec, dataset, folder, device=CPU, on_progress=note), whole)
    assert progress == [(1, 1)]  # nothing is searched twice


def test_other_weights_or_settings_are_mined_anew(
    trained: TrainedRun, spec: ExperimentSpec, dataset: Dataset, tmp_path: Path
) -> None:
    run = trained.run

    def count(spec: ExperimentSpec) -> int:
        searched: list[int] = []
        mine(
            run,
            spec,
            dataset,
            tmp_path / "found",
            device=CPU,
            on_progress=lambda done, _: searched.append(done),
        )
        return len(searched)

    assert count(spec) == 4
    assert count(spec) == 0
    stricter = ExperimentSpec(model=spec.model, predict=spec.predict, mine=MineSpec(nms_iou=0.5))
    assert count(stricter) == 4
    tensors, identity = load_weights(run.weights_path)
    changed = {name: tensor * 2 if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    save_tensors(run.weights_path, changed, head=dataclasses.asdict(identity))
    assert count(stricter) == 4


def test_a_run_without_weights_cannot_mine(spec: ExperimentSpec, dataset: Dataset, tmp_path: Path) -> None:
    run = Run.create(tmp_path / "new", config="")
    with pytest.raises(RunError, match="no checkpoint yet"):
        mine(run, spec, dataset, tmp_path / "found", device=CPU, on_progress=ignore)


def entry_of(
    image_id: int, bbox: Sequence[float], score: float, *, category_id: int = 10
) -> dict[str, object]:
    return {"image_id": image_id, "category_id": category_id, "bbox": list(bbox), "score": score}


ENTRIES = [
    entry_of(2, (5, 5, 20, 20), 0.5),
    entry_of(2, (5, 5, 20, 21), 0.9, category_id=11),  # the same object, as another class
    entry_of(2, (50, 150, 90, 90), 0.7),  # reaches over the border
    entry_of(4, (1, 2, 3, 4), 0.1),
]


@pytest.fixture
def take(dataset: Dataset, tmp_path: Path) -> Callable[[list[dict[str, object]]], BoxStore]:
    def take(entries: list[dict[str, object]]) -> BoxStore:
        source = tmp_path / "found.json"
        source.write_text(json.dumps(entries))
        return proposals_from_detections(
            load_detections(source), dataset, tmp_path / "proposals", spec=MineSpec(), source=source
        )

    return take


def test_detections_of_another_detector_become_proposals(
    take: Callable[[list[dict[str, object]]], BoxStore],
) -> None:
    store = take(ENTRIES)
    assert store.counts.tolist() == [0, 2, 0, 1]
    proposals = store.read(1)
    assert proposals is not None
    np.testing.assert_allclose(proposals.boxes, [[5, 5, 25, 26], [50, 150, 96, 200]], atol=0.01)
    assert take([]).counts.tolist() == [0, 0, 0, 0]


def test_detections_of_an_unknown_image_are_refused(
    take: Callable[[list[dict[str, object]]], BoxStore],
) -> None:
    with pytest.raises(DetectionsError, match=r"found\.json: .*train\.json has no image 77"):
        take([*ENTRIES, entry_of(77, (1, 2, 3, 4), 0.5)])


RECORD = ImageRecord(
    image_id=1,
    file_name="a.png",
    path=Path("a.png"),
    image_root=Path(),
    width=100,
    height=100,
    boxes=np.array([[10.0, 10, 30, 30], [50, 50, 90, 90]]),
    labels=np.array([0, 0]),
    is_crowd=np.array([False, True]),
)


@pytest.mark.parametrize(
    ("box", "is_alarm"),
    [
        ([10, 10, 30, 30], False),  # an object
        ([10, 10, 30, 71], True),  # IoU 0.33 with it would be at 60 px
        ([10, 10, 30, 70], False),
        ([40, 10, 45, 20], True),
        ([60, 60, 70, 70], False),  # inside a crowd
        ([80, 60, 100, 80], False),  # half inside
        ([81, 60, 101, 80], True),
    ],
)
def test_a_false_alarm_is_on_no_object_and_in_no_crowd(box: list[float], is_alarm: bool) -> None:
    detections = Detections(
        boxes=np.array([box], dtype=np.float64), scores=np.array([0.5]), labels=np.array([1])
    )
    assert len(false_alarms(detections, RECORD, max_iou=1 / 3)) == is_alarm


def test_false_alarms_are_kept_and_searched_once(trained_once: TrainedRun, tmp_path: Path) -> None:
    spec, dataset = trained_once.spec, trained_once.dataset
    searched: list[int] = []
    stores = [
        mine_alarms(
            trained_once.run,
            spec,
            dataset,
            tmp_path / "alarms",
            device=CPU,
            on_progress=lambda done, total: searched.append(done),
        )
        for _ in range(2)
    ]
    assert searched == [1, 2, 3, 4]
    assert_same(*stores)
    assert stores[0].counts.sum() > 0
    for index in range(len(dataset)):
        alarms = stores[0].read(index)
        assert alarms is not None
        assert len(false_alarms(alarms, dataset[index], max_iou=0.3)) >= len(alarms) - 1  # 16-bit boxes


def test_only_the_images_given_have_false_alarms(trained_once: TrainedRun, tmp_path: Path) -> None:
    options: dict[str, Any] = {"device": CPU, "on_progress": lambda done, total: None}
    inputs = (trained_once.run, trained_once.spec, trained_once.dataset)
    all_searched = mine_alarms(*inputs, tmp_path / "all", **options)
    some_searched = mine_alarms(*inputs, tmp_path / "some", images=np.array([1, 3]), **options)
    assert some_searched.counts.tolist() == [0, all_searched.counts[1], 0, all_searched.counts[3]]
    replaced = mine_alarms(*inputs, tmp_path / "some", images=np.array([0]), **options)
    assert replaced.counts.tolist() == [all_searched.counts[0], 0, 0, 0]
