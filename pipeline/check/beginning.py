"""What a stage begins from: its own checkpoint, or the run that it names, must fit it."""

from pipeline.data.vocabulary.categories import Vocabulary
from pipeline.errors import RecipeError
from pipeline.recipe import DetectorSection, Recipe
from pipeline.recipe_file import recipe_from_tree
from pipeline.training.checkpoint import find_source
from pipeline.training.manifest import newest_verified, read_manifest, refuse_another_recipe


def check_beginning(
    recipe: Recipe, earlier: dict[str, Recipe], vocabulary: Vocabulary | None
) -> list[str]:
    """Its own checkpoint to continue from, or the other run that it starts from, must fit.

    Returns a line on what of that run it does not take, as `initialize` will decide it.
    """
    own = newest_verified(recipe.run_dir)
    if own is not None:
        refuse_another_recipe(own, recipe)
        theirs = Vocabulary.from_json(read_manifest(own).vocabulary)
        if vocabulary is not None and theirs.digest != vocabulary.digest:
            raise RecipeError(
                f"{own} was trained on another vocabulary: {theirs.difference(vocabulary)}; give "
                "the recipe a new name"
            )
        return []
    if recipe.initialize_from is None:
        return []
    before = earlier.get(recipe.initialize_from)
    if before is None:
        manifest = read_manifest(find_source(recipe))
        before = recipe_from_tree(manifest.recipe, f"the recipe of {recipe.initialize_from}")
    anew = _heads_begin_anew(recipe, before)
    here, there = _structure(recipe.detector), _structure(before.detector)
    if anew is not None:
        del here["class_head"]
    for key, value in here.items():
        if value != there[key]:
            raise RecipeError(
                f"recipe {recipe.name} starts from {before.name}, whose detector.{key} is another: "
                f"{there[key]} there, {value} here; make them equal"
            )
    return [] if anew is None else [f"  beginning   from {before.name}; class heads begin {anew}"]


def _heads_begin_anew(recipe: Recipe, before: Recipe) -> str | None:
    """Why, where they do: `initialize` takes what they learnt for one kind of head and one text.

    Raises `RecipeError` for two models whose text has one width: whether it is of one space is not
    known before there is any.
    """
    kinds = before.detector.class_head.kind, recipe.detector.class_head.kind
    if kinds[0] != kinds[1]:
        return f"anew: they are {kinds[0]} there and {kinds[1]} here"
    models = before.teacher.model, recipe.teacher.model
    if kinds[0] == "linear" or models[0] == models[1]:
        return None
    from pipeline.semantics.clip import model_config

    widths = [model_config(model)["embed_dim"] for model in models]
    if widths[0] != widths[1]:
        return f"anew: text is of {models[0]} there and of {models[1]} here"
    raise RecipeError(
        f"recipe {recipe.name} starts from {before.name}, whose class head works in the text space "
        f"of {models[0]}, not of {models[1]}; use one teacher"
    )


def _structure(section: DetectorSection) -> dict[str, object]:
    """The values of a detector that its weights depend on, by key."""
    trained = {"denoising", "losses", "dropout", "kernel", "backbone"}
    values: dict[str, object] = section.model_dump(exclude=trained)
    how = {"weights", "frozen_stages", "layer_decay", "drop_path", "checkpointed_stages"}
    body = section.backbone.model_dump(exclude=how)
    body["name"] = body["name"].partition(".")[0]  # What follows the point names weights.
    return values | {f"backbone.{key}": value for key, value in body.items()}
