"""`sniper demo`: its options, and what it prints."""

from pathlib import Path
from typing import Any

import pytest

import sniper.demo.run as demo
from tests.cli.commands import CommandLine

RESULT = {
    "run": "runs/demo",
    "pictures": "runs/demo/pictures",
    "page": "runs/demo/report.html",
    "minutes": 3.21,
    "num_images": 20,
    "ap": 0.7,
    "ap50": 0.9,
    "ar_100": 0.75,
    "ar_100_any_class": 0.8,
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, demo.DemoSpec]]:
    """Replace the demo by a constant result, and return the folders and specs that it is called with."""
    made: list[tuple[Path, demo.DemoSpec]] = []

    def run_demo(folder: Path, *, spec: demo.DemoSpec, **_: Any) -> dict[str, Any]:
        made.append((folder, spec))
        return RESULT

    monkeypatch.setattr(demo, "run_demo", run_demo)
    return made


def test_scores_are_labelled_and_followed_by_pictures_and_the_next_command(
    sniper: CommandLine, calls: list[tuple[Path, demo.DemoSpec]]
) -> None:
    out = sniper.text("demo").out
    assert calls == [(Path("runs/demo"), demo.DemoSpec())]
    assert "trained and tested in 3.2 minutes, on 20 test images" in out
    assert "AP50           0.900  at IoU 0.5" in out
    assert "AR, any class  0.800" in out
    assert "levels.jpg" in out
    assert "sniper train your_data" in out
    assert "quick look" not in out


def test_a_quick_look_is_announced_as_such(
    sniper: CommandLine, calls: list[tuple[Path, demo.DemoSpec]]
) -> None:
    out = sniper.text("demo", "--quick", "--seed", "4", "--run", "here").out
    assert calls == [(Path("here"), demo.quick_look(4))]
    assert "This was a quick look" in out


def test_json_is_the_result_alone(sniper: CommandLine, calls: list[tuple[Path, demo.DemoSpec]]) -> None:
    assert sniper.json("demo") == RESULT


@pytest.mark.parametrize("seed", ["-1", "x"])
def test_a_seed_that_is_no_natural_number_is_refused(
    sniper: CommandLine, calls: list[tuple[Path, demo.DemoSpec]], seed: str
) -> None:
    assert "--seed" in sniper.error("demo", "--seed", seed)
    assert calls == []
