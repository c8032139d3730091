"""`sniper recipes`, and the commands that take a recipe's name."""

from pathlib import Path

import pytest

from sniper.config.recipes import list_recipes
from tests.cli.commands import CommandLine


def test_recipes_are_listed_with_their_first_line(sniper: CommandLine) -> None:
    lines = sniper.text("recipes").out.splitlines()
    for line, recipe in zip(lines, list_recipes(), strict=True):
        assert line.split(maxsplit=1) == [recipe.name, recipe.summary]


def test_recipes_are_listed_as_json(sniper: CommandLine) -> None:
    listed = sniper.json("recipes")["recipes"]
    assert {"name", "summary"} == set(listed[0])
    assert [recipe["name"] for recipe in listed] == [recipe.name for recipe in list_recipes()]


def test_train_takes_the_name_of_a_recipe(
    sniper: CommandLine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "data.train.annotations is missing" in sniper.error("train", "coco_r50_fpn")
    message = sniper.error("train", "coco_r50")
    assert "coco_r50: neither a file nor a recipe; did you mean coco_r50_fpn" in message
