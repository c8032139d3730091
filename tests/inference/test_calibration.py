"""What a run has chosen on its validation images: written, read and checked."""

import json
from pathlib import Path

import pytest

from sniper.config.experiment import PredictSpec
from sniper.errors import RunError
from sniper.inference.calibration import Calibration, MergeCandidate, load_calibration, save_calibration
from sniper.runs.run import Run


def calibration(step: int) -> Calibration:
    candidate = MergeCandidate(merge="fusion", soft_nms_sigma=0.55, merge_iou=0.45, ap=0.4, ap50=0.6)
    return Calibration(
        step=step,
        num_images=75,
        num_compared=75,
        merge="fusion",
        soft_nms_sigma=0.55,
        merge_iou=0.45,
        min_score=step / 100,
        f1=0.6,
        precision=0.7,
        recall=0.5,
        candidates=(candidate,),
    )


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run.create(tmp_path / "run", config="")
    for step in (10, 20, 30):
        (run.folder / "checkpoints" / f"{step:08d}").mkdir()
    return run


def test_choices_are_read_by_the_step_of_the_weights(run: Run) -> None:
    assert load_calibration(run) is None
    for step in (10, 20, 30):
        save_calibration(run, calibration(step))
    assert load_calibration(run, step=20) == calibration(20)
    assert load_calibration(run) == load_calibration(run, step=25) == calibration(30)
    save_calibration(run, calibration(10))  # evaluated again, such as on all images
    assert load_calibration(run) == calibration(10)
    assert load_calibration(run, step=30) == calibration(30)


def test_choices_with_checkpoints_that_were_removed_are_dropped(run: Run) -> None:
    for step in (10, 20):
        save_calibration(run, calibration(step))
    (run.folder / "checkpoints" / "00000010").rmdir()
    save_calibration(run, calibration(30))
    assert load_calibration(run, step=10) == calibration(30)
    assert load_calibration(run, step=20) == calibration(20)


def test_a_new_run_has_chosen_nothing(tmp_path: Path) -> None:
    save_calibration(Run.create(tmp_path / "run", config=""), calibration(10))
    assert load_calibration(Run.create(tmp_path / "run", config="")) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "Invalid JSON"),
        ("[" * 100_000, "Invalid JSON"),
        ("{}", "Input should be"),
        ([{"step": "10"}], r"0\.step: Input should be a valid integer"),
        ([{"f1": "x", "recall": 2}], r"0\.f1: .*; 0\.recall: Input should be less than or equal to 1"),
        ("[{}]", r"0\.step: Missing required argument|0\.step: Field required"),
        ([{"min_score": 1.5}], r"0\.min_score: Input should be less than or equal to 1"),
        ([{"merge": "auto"}], r"0\.merge: Input should be 'gaussian', 'linear', 'hard' or 'fusion'"),
        ([{"sigma": 1}], r"0\.sigma: Unexpected keyword argument"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(
    run: Run, content: str | list[dict[str, object]], message: str
) -> None:
    save_calibration(run, calibration(10))
    if isinstance(content, list):
        (entry,) = json.loads(run.calibration_path.read_text())
        content = json.dumps([entry | content[0]])
    run.calibration_path.write_text(content)
    with pytest.raises(RunError, match=rf"calibration\.json: cannot be read \(.*({message}).*\); delete it"):
        load_calibration(run)


def test_only_auto_is_replaced_by_the_choice() -> None:
    chosen = calibration(10).resolve(PredictSpec(merge="auto", max_detections=7))
    assert chosen == PredictSpec(merge="fusion", merge_iou=0.45, max_detections=7)
    assert calibration(10).resolve(PredictSpec()) == PredictSpec()
