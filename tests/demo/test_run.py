"""The demo learns its world."""

import json
from pathlib import Path

import pytest
import torch

from sniper.demo.run import run_demo
from sniper.errors import RunError


@pytest.mark.slow
def test_the_demo_finds_much_of_what_there_is_and_leaves_pictures(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    told = run_demo(folder, device=torch.device("cpu"), watch=lambda report: None, say=lambda words: None)
    assert told["ap50"] >= 0.2  # from 0.32 to 0.62 so far, see docs/benchmarks.md
    assert (folder / "pictures" / "chips.png").is_file()
    assert len(list((folder / "pictures").glob("found_*.png"))) == 4
    assert len(json.loads((folder / "detections.json").read_text())) > 0


def test_a_demo_that_is_there_already_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "world").mkdir()
    with pytest.raises(RunError, match="a demo is already there; remove it"):
        run_demo(tmp_path, device=torch.device("cpu"), watch=lambda report: None, say=lambda words: None)
    assert [path.name for path in tmp_path.iterdir()] == ["world"]
