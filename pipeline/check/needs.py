"""What a stage needs: sources to prepare, and whether CLIP."""

from pipeline.errors import RecipeError
from pipeline.recipe import Recipe, Source


def sources_of(recipe: Recipe) -> list[Source]:
    """Every source that the stage prepares, those captions included that its teacher trains on."""
    found = list(recipe.data.sources)
    if recipe.teacher.train and needs_teacher(recipe):
        captions = recipe.teacher.train.captions
        same = [source for source in found if source.name == captions.name]
        if not same:
            found.append(captions)
        elif (same[0].format, same[0].images, same[0].annotations) != (
            captions.format,
            captions.images,
            captions.annotations,
        ):
            raise RecipeError(
                f"teacher.train.captions and a source of data are both named {captions.name!r} but "
                "are not the same data; give one of them another name"
            )
    return found


def needs_teacher(recipe: Recipe) -> bool:
    """Whether the stage needs CLIP: for the text rows of the class head, or for soft labels."""
    return recipe.semantic is not None or recipe.detector.class_head.kind == "language"
