"""The recipes that come with the package: experiments whose every number has its source."""

import difflib
from dataclasses import dataclass
from pathlib import Path

from sniper.errors import ConfigError
from sniper.files import similar_files

_FOLDER = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One experiment of the package.

    Attributes:
        name: for `load_experiment` and `sniper train`.
        summary: one line about it.
        path: its YAML file.
    """

    name: str
    summary: str
    path: Path


def list_recipes() -> list[Recipe]:
    """List the recipes by name."""
    return [
        Recipe(name=path.stem, summary=_summary(path.read_text(encoding="utf-8")), path=path)
        for path in sorted(_FOLDER.glob("*.yaml"))
    ]


def find_recipe(path: Path) -> Path:
    """Find the file of a recipe by its name.

    Args:
        path: as given by a user; not an existing file.

    Returns:
        The recipe's file. A path that cannot be the name of a recipe, since it has a folder or a suffix, is returned
        unchanged.

    Raises:
        ConfigError: if there is no recipe of that name, with the nearest ones, or else with similar names of files.
    """
    if path.name != str(path) or path.suffix:
        return path
    recipes = {recipe.name: recipe.path for recipe in list_recipes()}
    if path.name in recipes:
        return recipes[path.name]
    near = difflib.get_close_matches(path.name, recipes, cutoff=0.5) or similar_files(path)
    hint = f"did you mean {' or '.join(near)}?" if near else f"the recipes are {', '.join(recipes)}"
    raise ConfigError(f"{path}: neither a file nor a recipe; {hint}")


def _summary(text: str) -> str:
    """Return the first line of the comment that a recipe starts with."""
    return text.partition("\n")[0].removeprefix("# ")
