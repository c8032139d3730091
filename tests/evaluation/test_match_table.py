"""The file of matches: scores of images drawn with replacement are the same before and after."""

from pathlib import Path

import numpy as np
import pytest

from sniper.errors import DetectionsError
from sniper.evaluation.comparison import ResampledAP, bounds_of, resample
from sniper.evaluation.match_table import MatchTable, digest_of
from sniper.evaluation.pair import EvaluationPair, GroundTruth
from tests.evaluation.test_diagnosis import random_results


@pytest.mark.parametrize("num_ious", [1, 10])
def test_resampled_scores_survive_the_file(tmp_path: Path, num_ious: int) -> None:
    pair = EvaluationPair.of(*random_results(1))
    MatchTable.of(pair, step=7).save(tmp_path / "matches.npz")
    loaded = MatchTable.load(tmp_path / "matches.npz")
    assert loaded.step == 7
    assert loaded.digest == digest_of(pair.truth)
    weights = np.random.default_rng(0).integers(0, 4, pair.truth.num_images)
    expected = ResampledAP(pair, num_ious=num_ious)(weights)
    assert expected > 0
    assert ResampledAP(loaded, num_ious=num_ious)(weights) == pytest.approx(expected, abs=1e-12)


def test_a_table_without_detections_and_objects_survives_the_file(tmp_path: Path) -> None:
    truth = {"images": [{"id": 1}, {"id": 2}], "categories": [{"id": 1}], "annotations": []}
    MatchTable.of(EvaluationPair.of([], truth)).save(tmp_path / "matches.npz")
    loaded = MatchTable.load(tmp_path / "matches.npz")
    assert (loaded.num_images, list(loaded.classes)) == (2, [])


def test_other_objects_have_another_digest() -> None:
    _, truth = random_results(1)
    before = digest_of(GroundTruth.of(truth))
    truth["annotations"][0]["bbox"][0] += 1
    assert digest_of(GroundTruth.of(truth)) != before


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "matches.npz"
    path.write_bytes(b"no archive")
    with pytest.raises(DetectionsError, match=r"matches\.npz: not a table of matches"):
        MatchTable.load(path)
    nothing = np.zeros(0, dtype=np.int32)
    np.savez_compressed(
        path,
        digest=np.array("a"),
        step=np.array(1),
        num_images=np.array(1),
        offsets=np.array([0, 0]),
        num_objects=np.array([1]),
        image_indices=nothing,
        true_positives=nothing,
        false_positives=np.zeros(3, dtype=np.int32),
    )
    with pytest.raises(
        DetectionsError, match=r"matches\.npz: damaged: expected 0 detections, got \[0, 0, 3\]"
    ):
        MatchTable.load(path)


def test_the_same_images_are_drawn_for_all_scores() -> None:
    score = ResampledAP(EvaluationPair.of(*random_results(2)))
    draws = resample([score, score], generator=np.random.default_rng(0), num_resamples=20)
    assert (draws[:, 0] == draws[:, 1]).all()
    assert len(np.unique(draws[:, 0])) > 5
    low, high = bounds_of(draws[:, 0])
    assert draws.min() <= low < high <= draws.max()
    assert np.isnan(bounds_of(np.full(4, np.nan))).all()
