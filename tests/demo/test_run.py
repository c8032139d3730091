"""The demo trains, scores, and draws pictures."""

import json
from pathlib import Path

import pytest
import torch

from sniper.demo.run import run_demo
from sniper.errors import RunError


@pytest.mark.slow
def test_the_demo_detects_objects_and_draws_pictures(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    scores = run_demo(folder, device=torch.device("cpu"), watch=lambda report: None, log=lambda line: None)
    assert scores["ap50"] >= 0.2  # varies from run to run, see docs/benchmarks.md
    assert (folder / "pictures" / "chips.png").is_file()
    assert len(list((folder / "pictures").glob("detections_*.png"))) == 4
    assert len(json.loads((folder / "detections.json").read_text())) > 0


def test_a_folder_with_a_demo_is_refused_and_left_unchanged(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(RunError, match="already has a demo; remove it"):
        run_demo(tmp_path, device=torch.device("cpu"), watch=lambda report: None, log=lambda line: None)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
