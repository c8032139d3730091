"""Mining: every image searched once, whoever does it and however often it is interrupted."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from sniper.chips import LevelSpec
from sniper.config.experiment import ExperimentSpec, MineSpec, PredictSpec
from sniper.data.datasets import Dataset, load_dataset
from sniper.errors import DetectionsError, ProposalsError, RunError
from sniper.geometry.boxes import iou
from sniper.inference import proposals as module
from sniper.inference.mining import Miner, mine, proposals_from_detections
from sniper.inference.proposals import ProposalStore
from sniper.runs.run import Run
from tests.data.tiny import write_dataset
from tests.models.batches import TINY, build_tiny
from tests.training.experiments import TrainedRun, tiny_experiment

CPU = torch.device("cpu")


@pytest.fixture
def annotations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    monkeypatch.setattr(module, "IMAGES_PER_SHARD", 1)
    return load_dataset(write_dataset(tmp_path / "world"))


@pytest.fixture
def spec(annotations: Dataset) -> ExperimentSpec:
    return tiny_experiment(annotations.path)


@pytest.fixture
def run(trained_once: TrainedRun) -> Run:
    return trained_once.run


def ignore(num_done: int, num_images: int) -> None:
    pass


def miner_of(*levels: LevelSpec, batch_megapixels: float = 8.0) -> Miner:
    spec = ExperimentSpec(
        mine=MineSpec(batch_megapixels=batch_megapixels),
        predict=PredictSpec(levels=levels, precision="fp32"),
    )
    return Miner(model=build_tiny().eval(), spec=spec, device=CPU)


def noise(*sides: tuple[int, int]) -> Sequence[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for w, h in sides]


def test_proposals_of_all_levels_are_merged_in_the_image_frame_best_first() -> None:
    levels = (LevelSpec(factor=2.0), LevelSpec(long_side=64))
    images = noise((90, 60), (64, 64), (1, 50))
    for image, (boxes, scores) in zip(images, miner_of(*levels)(images), strict=True):
        assert len(boxes) == len(scores) <= 2 * TINY.rpn.post_nms_top_n
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        assert (boxes >= 0).all()
        assert (boxes <= np.array([*image.shape[1::-1], *image.shape[1::-1]])).all()
        assert (np.diff(scores) <= 0).all()
        overlaps = iou(boxes, boxes)
        assert np.triu(overlaps, k=1).max(initial=0) <= 0.7 + 1e-6
    (one_level, *_), (both, *_) = miner_of(levels[0])(images), miner_of(*levels)(images)
    assert len(one_level[0]) < len(both[0])


def test_images_of_one_shape_are_searched_together_as_one_by_one() -> None:
    images = noise((64, 64), (64, 64), (64, 64))
    together = miner_of(LevelSpec(factor=1.0))(images)
    alone = miner_of(LevelSpec(factor=1.0), batch_megapixels=0.004)(images)
    for (boxes, scores), (others, other_scores) in zip(together, alone, strict=True):
        np.testing.assert_allclose(boxes, others, atol=1e-3)
        np.testing.assert_allclose(scores, other_scores, atol=1e-5)


def test_a_miner_that_was_killed_goes_on_and_finds_the_same(
    run: Run, spec: ExperimentSpec, annotations: Dataset, tmp_path: Path
) -> None:
    whole = mine(run, spec, annotations, tmp_path / "whole", device=CPU, watch=ignore)

    def kill(num_done: int, num_images: int) -> None:
        if num_done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mine(run, spec, annotations, tmp_path / "parts", device=CPU, watch=kill)
    begun = ProposalStore.begin(
        tmp_path / "parts",
        annotations,
        source=json.loads((tmp_path / "parts/head.json").read_text())["source"],
    )
    assert begun.missing == [2, 3]
    searched: list[int] = []
    parts = mine(
        run, spec, annotations, tmp_path / "parts", device=CPU, watch=lambda done, _: searched.append(done)
    )
    assert searched == [1, 2]
    for (_, one), (_, other) in zip(whole, parts, strict=True):
        np.testing.assert_array_equal(one.boxes, other.boxes)
    mine(run, spec, annotations, tmp_path / "parts", device=CPU, watch=lambda done, _: searched.append(done))
    assert searched == [1, 2]  # nothing is looked for twice


def test_processes_side_by_side_share_the_images(
    run: Run, spec: ExperimentSpec, annotations: Dataset, tmp_path: Path
) -> None:
    for rank, missing in ((0, [1, 2]), (2, [1]), (1, [])):
        store = mine(run, spec, annotations, tmp_path / "found", device=CPU, watch=ignore, share=(rank, 3))
        assert store.missing == missing


def test_a_process_waits_for_the_first_one_to_begin(
    run: Run, spec: ExperimentSpec, annotations: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sniper.inference.mining._LONGEST_WAIT", 0.2)
    with pytest.raises(ProposalsError, match="the first process has not begun it"):
        mine(run, spec, annotations, tmp_path / "found", device=CPU, watch=ignore, share=(1, 2))


def test_a_run_without_weights_cannot_mine(
    spec: ExperimentSpec, annotations: Dataset, tmp_path: Path
) -> None:
    with pytest.raises(RunError, match="no checkpoint yet"):
        mine(
            Run.create(tmp_path / "new", config=""),
            spec,
            annotations,
            tmp_path / "found",
            device=CPU,
            watch=ignore,
        )


def test_detections_of_any_detector_are_taken(annotations: Dataset, tmp_path: Path) -> None:
    source = tmp_path / "found.json"
    entries = [
        {"image_id": 2, "category_id": 10, "bbox": [5, 5, 20, 20], "score": 0.5},
        {
            "image_id": 2,
            "category_id": 11,
            "bbox": [5, 5, 20, 21],
            "score": 0.9,
        },  # the same again, as another class
        {
            "image_id": 2,
            "category_id": 10,
            "bbox": [50, 150, 90, 90],
            "score": 0.7,
        },  # reaches over the border
        {"image_id": 4, "category_id": 10, "bbox": [1, 2, 3, 4], "score": 0.1},
    ]
    source.write_text(json.dumps(entries))
    store = proposals_from_detections(
        entries, annotations, tmp_path / "found", spec=MineSpec(), source=source
    )
    found = [shard.boxes for _, shard in store]
    assert [len(boxes) for boxes in found] == [0, 2, 0, 1]
    np.testing.assert_allclose(found[1], [[5, 5, 25, 26], [50, 150, 96, 200]], atol=0.01)
    strange = [{**entries[0], "image_id": 77}]
    with pytest.raises(DetectionsError, match="has no image 77"):
        proposals_from_detections(strange, annotations, tmp_path / "other", spec=MineSpec(), source=source)
