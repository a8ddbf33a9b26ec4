"""`longtail study`: what a study needs is prepared, then the study itself, in this process."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.errors import RecipeError
from pipeline.recipe import Recipe
from pipeline.recipe_file import load_recipe

if TYPE_CHECKING:
    import torch

    from pipeline.study.output import Outcome


def run_study(arguments: argparse.Namespace, words: Sequence[str], overrides: Sequence[str]) -> str:
    """Run the study that `arguments` name on the recipe or places in `words`; what to print.

    Raises `RecipeError` for words that are none of what the study takes, and as the study does.
    """
    if arguments.study == "drop-annotations":
        from pipeline.study.drop import drop_annotations

        place = _one(words, "annotation file or recipe")
        return drop_annotations(
            place, overrides, arguments.output, fraction=arguments.fraction, seed=arguments.seed
        )
    from pipeline.study.output import write_outcome

    if arguments.study == "frequency":
        from pipeline.study.frequency import frequency

        return write_outcome(arguments.output, frequency(words, overrides))
    recipe = _recipe(words, overrides)
    if arguments.study == "qualitative":
        from pipeline.study.qualitative import qualitative

        outcome = qualitative(
            recipe,
            arguments.checkpoints,
            images=arguments.images,
            score_threshold=arguments.score_threshold,
            seed=arguments.seed,
            device=_device(arguments.device),
        )
        return write_outcome(arguments.output, outcome)
    return write_outcome(arguments.output, _of_teacher(arguments, recipe))


def _of_teacher(arguments: argparse.Namespace, recipe: Recipe) -> "Outcome":
    from pipeline.study.noise import noise, scales_of
    from pipeline.study.teacher_ranks import check_images, validation_source
    from pipeline.study.zero_shot import zero_shot

    source = validation_source(recipe)
    device = _device(arguments.device)
    check_images(arguments.images)
    scales = scales_of(arguments.levels) if arguments.study == "teacher-noise" else []
    from pipeline.run import prepare_teacher

    prepare_teacher(recipe, [source])
    if arguments.study == "teacher-zero-shot":
        return zero_shot(recipe, device=device, seed=arguments.seed, images=arguments.images)
    return noise(recipe, scales, device=device, seed=arguments.seed, images=arguments.images)


def _recipe(words: Sequence[str], overrides: Sequence[str]) -> Recipe:
    return load_recipe(_one(words, "recipe"), overrides)


def _one(words: Sequence[str], what: str) -> str:
    if len(words) != 1:
        raise RecipeError(f"this study takes one {what}, and {len(words)} are named: {words}")
    return words[0]


def _device(asked: str | None) -> "torch.device":
    import torch

    if asked == "cuda" and not torch.cuda.is_available():
        raise RecipeError("--device cuda is asked for, and torch finds no GPU; leave it out")
    return torch.device(asked or ("cuda" if torch.cuda.is_available() else "cpu"))
