"""What a study is about, by the word on the command line: a recipe's source, shards or a file."""

import re
from collections.abc import Sequence

from pipeline.errors import RecipeError
from pipeline.recipe import Recipe, Source
from pipeline.recipe_file import load_recipe

_RECIPE = re.compile(r"(.+\.ya?ml)(?::(.*))?")


def recipe_place(place: str, overrides: Sequence[str]) -> tuple[Recipe, Source | None] | None:
    """The recipe that `RECIPE.yaml` or `RECIPE.yaml:SOURCE` means, and the source if one is named;
    None for another kind of place.

    Raises `RecipeError` for a source that the recipe does not have.
    """
    parts = _RECIPE.fullmatch(place)
    if parts is None:
        return None
    recipe = load_recipe(parts[1], overrides)
    if parts[2] is None:
        return recipe, None
    for source in recipe.data.sources:
        if source.name == parts[2]:
            return recipe, source
    names = ", ".join(source.name for source in recipe.data.sources)
    raise RecipeError(f"{place}: {parts[2]!r} is no source of the recipe (it has {names})")


def refuse_overrides(place: str, overrides: Sequence[str]) -> None:
    """Raises `RecipeError` where overrides stand behind something that is no recipe."""
    if overrides:
        raise RecipeError(f"{overrides[0]} belongs to a recipe, and {place} is none")
