"""`sniper recipes`: list the experiments of the package."""

from sniper.cli.options import Json
from sniper.cli.output import print_result


def recipes(*, json: Json = False) -> None:
    """List the experiments that come with the package.

    Their names are used like experiment files: `sniper train NAME`.
    """
    from sniper.config.recipes import list_recipes

    found = list_recipes()
    if json:
        listed = [{"name": recipe.name, "summary": recipe.summary} for recipe in found]
        print_result({"recipes": listed}, is_json=True)
    else:
        print_result({recipe.name: recipe.summary for recipe in found}, is_json=False)
