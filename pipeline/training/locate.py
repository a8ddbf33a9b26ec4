"""Which checkpoint a command means: a folder, a run's newest, or a recipe's (free of torch)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import RecipeError, StorageError
from pipeline.recipe import Recipe
from pipeline.recipe_file import load_recipe, recipe_from_tree
from pipeline.training.manifest import (
    CHECKPOINT_NAME,
    DETECTOR_FILES,
    MANIFEST,
    Manifest,
    checkpoints_dir,
    is_one_file,
    learnt_otherwise,
    newest_verified,
    read_manifest,
    verify,
)

FORMS = (
    "give an exported folder or .safetensors, a checkpoints/step_N folder, a run directory, or a "
    "recipe (.yaml); `longtail import-checkpoint` takes in those of public code"
)
RECIPE_SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose detector files are verified, and the recipe that says how it is used: the
    one that was named, or else the one that the checkpoint was trained with."""

    directory: Path
    recipe: Recipe
    manifest: Manifest


def locate_checkpoint(path: str | Path, overrides: Sequence[str] = ()) -> Checkpoint:
    """The checkpoint that `path` means.

    An exported folder or file and a `step_N` folder are themselves; a run directory is its newest
    checkpoint that verifies, a recipe that of its run, after `section.key=value` overrides. Raises
    `RecipeError` for what cannot be a checkpoint, or a recipe that would have learnt otherwise, and
    `StorageError` for one that is not whole, or for a run without any.
    """
    place = Path(path)
    if place.suffix in RECIPE_SUFFIXES and not place.is_dir():
        recipe = load_recipe(place, overrides)
        directory = _newest(recipe.run_dir)
        manifest = read_manifest(directory)
        _refuse_another(directory, manifest, recipe, place)
        return Checkpoint(directory, recipe, manifest)
    if overrides:
        raise RecipeError(
            f"{' '.join(overrides)}: overrides belong to a recipe, and {place} is none; leave them "
            "out, or name the recipe in its place"
        )
    directory = _folder(place)
    manifest = read_manifest(directory)
    return Checkpoint(directory, _trained_with(directory, manifest), manifest)


def _trained_with(directory: Path, manifest: Manifest) -> Recipe:
    return recipe_from_tree(manifest.recipe, f"the recipe of {directory}")


def _refuse_another(directory: Path, manifest: Manifest, recipe: Recipe, place: Path) -> None:
    trained_with = _trained_with(directory, manifest).model_dump(mode="json")
    changed = learnt_otherwise(trained_with, recipe)
    if changed:
        raise RecipeError(
            f"{directory} was trained by another recipe than {place} with its overrides: "
            f"{'; '.join(changed)}. Leave that as it was, or name {directory} in the recipe's place"
        )


def _folder(place: Path) -> Path:
    if not place.exists():
        raise RecipeError(f"checkpoint {place} does not exist; {FORMS}")
    if is_one_file(place):
        return place
    if not place.is_dir():
        raise RecipeError(f"{place} is a file, and a checkpoint is a folder; {FORMS}")
    if (place / MANIFEST).exists():
        verify(place, DETECTOR_FILES)
        return place
    if checkpoints_dir(place).is_dir():
        return _newest(place)
    if CHECKPOINT_NAME.match(place.name.removeprefix(".").split(".")[0]) or any(
        place.glob("*.safetensors")
    ):
        raise StorageError(
            f"{place} has no {MANIFEST}: writing it did not finish, or the file was lost; name "
            "another checkpoint of the run, or the run directory, whose newest whole one is taken"
        )
    raise RecipeError(f"{place} is not a checkpoint and holds none; {FORMS}")


def _newest(run_dir: Path) -> Path:
    newest = newest_verified(run_dir, DETECTOR_FILES)
    if newest is None:
        raise StorageError(f"no checkpoint in {run_dir}; run `longtail train` first")
    return newest
