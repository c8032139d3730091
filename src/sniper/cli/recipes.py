"""`sniper recipes`: the experiments that come with the package."""

import json as json_module
from typing import Annotated

from cyclopts import Parameter


def recipes(*, json: Annotated[bool, Parameter(name="--json", negative=())] = False) -> None:
    """List the experiments that come with the package, for sniper train NAME.

    Args:
        json: print one JSON object and nothing else.
    """
    from sniper.config.recipes import list_recipes

    found = list_recipes()
    if json:
        listed = [{"name": recipe.name, "summary": recipe.summary} for recipe in found]
        print(json_module.dumps({"recipes": listed}))
        return
    width = max(len(recipe.name) for recipe in found)
    for recipe in found:
        print(f"{recipe.name:<{width}}  {recipe.summary}")
