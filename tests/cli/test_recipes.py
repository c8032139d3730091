"""`sniper recipes`, and the commands that take a recipe's name."""

import json
from pathlib import Path

import pytest

from sniper.cli import run
from sniper.config.recipes import list_recipes


def test_recipes_are_listed_with_their_first_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for line, recipe in zip(lines, list_recipes(), strict=True):
        assert line.split(maxsplit=1) == [recipe.name, recipe.summary]


def test_recipes_are_listed_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["recipes", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["recipes"]
    assert {"name", "summary"} == set(listed[0])
    assert [recipe["name"] for recipe in listed] == [recipe.name for recipe in list_recipes()]


def test_train_takes_the_name_of_a_recipe(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["train", "coco_r50_fpn"]) == 2
    assert "coco_r50_fpn: data.train.annotations is missing" in capsys.readouterr().err
    assert run(["train", "coco_r50"]) == 2
    assert "coco_r50: neither a file nor a recipe; did you mean coco_r50_fpn" in capsys.readouterr().err
