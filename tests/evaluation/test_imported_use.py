"""What was imported is evaluated and fine-tuned like a checkpoint of ours."""

import json
from pathlib import Path

import pytest
import torch
from public_checkpoints import public_state, save, training_arguments
from tiny_world import in_line, prepare_here, run_command, tiny_recipe, write_recipe

from pipeline.check import check_stages
from pipeline.data.shards.preparing import prepare_source
from pipeline.errors import RecipeError
from pipeline.evaluation.checkpoints import evaluate_newest
from pipeline.evaluation.import_checkpoint import import_checkpoint
from pipeline.recipe import Recipe
from pipeline.training.checkpoint import load_state, load_weights
from pipeline.training.loop import train_here
from pipeline.training.manifest import checkpoint_dir, read_manifest

VALIDATION = {
    "name": "lvis_val",
    "format": "lvis",
    "images": "lvis",
    "annotations": "annotations/lvis_v1_val.json",
}


@pytest.fixture(scope="module")
def folder(module_path: Path) -> Path:
    prepare_here(module_path)
    recipe = tiny_recipe(module_path, "any", data={"validation": VALIDATION})
    assert recipe.data.validation is not None
    prepare_source(recipe.data.validation, recipe.data, in_line)
    return module_path


@pytest.fixture(scope="module")
def imported(folder: Path) -> Path:
    arguments = training_arguments(enc_n_points=4, dec_n_points=4)
    path = save(folder, public_state("detrex"), args=arguments)
    output = folder / "detrex.safetensors"
    annotations = folder / "raw" / "annotations" / "lvis_v1_train.json"
    told = import_checkpoint(path, "detrex", output, annotations=annotations)
    assert "columns: 12, in the order of the category ids" in told
    return output


def recipe_for(folder: Path, imported: Path, name: str, **changes: object) -> Recipe:
    """The tiny world with the imported detector and the plain class loss."""
    return tiny_recipe(
        folder,
        name,
        data={"validation": VALIDATION, "extra": []},
        semantic=None,
        initialize_from=str(imported),
        detector=read_manifest(imported).recipe["detector"],
        cluster={"workers": 1},
        **changes,
    )


def test_it_is_evaluated_with_a_recipe(folder: Path, imported: Path) -> None:
    recipe = recipe_for(folder, imported, "evaluated")
    text = evaluate_newest(recipe, checkpoint=imported)
    assert "APr" in text
    results = json.loads((recipe.run_dir / "results.json").read_text())
    assert results["step"] == 0 and 0 <= results["AP"] <= 1


def test_it_is_fine_tuned(folder: Path, imported: Path) -> None:
    training = {"steps": 2, "learning_rate": 1e-12, "backbone_learning_rate": 1e-12}
    recipe = recipe_for(folder, imported, "tuned", training=training)
    check_stages([recipe])
    train_here(recipe)
    source = load_weights(imported, ema=True)
    state = load_state(checkpoint_dir(recipe.run_dir, 2))
    for name, tensor in source.items():
        torch.testing.assert_close(state.weights[f"detector.{name}"], tensor, rtol=0, atol=1e-5)
    with pytest.raises(RecipeError, match=r"tuned has checkpoints of its own, .*name=ANOTHER"):
        evaluate_newest(recipe, checkpoint=imported)


def test_without_names_all_but_the_class_heads_carry_over(folder: Path, imported: Path) -> None:
    """An import without annotations starts a training whose columns are new."""
    arguments = training_arguments(enc_n_points=4, dec_n_points=4)
    path = save(folder, public_state("detrex"), args=arguments)
    nameless = folder / "nameless"
    import_checkpoint(path, "detrex", nameless)
    training = {"steps": 1, "learning_rate": 1e-12, "backbone_learning_rate": 1e-12}
    recipe = recipe_for(folder, nameless, "new_columns", training=training)
    check_stages([recipe])
    train_here(recipe)
    source, state = load_weights(nameless, ema=True), load_state(checkpoint_dir(recipe.run_dir, 1))
    for name in ("encoder.level_embed", "bbox_embed.1.layers.0.weight", "backbone.body.bn1.bias"):
        torch.testing.assert_close(
            state.weights[f"detector.{name}"], source[name], rtol=0, atol=1e-5
        )
    ours = state.weights["detector.class_embed.0.weight"]
    assert (ours - source["class_embed.0.weight"]).abs().max() > 0.1


@pytest.mark.slow
def test_the_command_line_imports_predicts_and_evaluates(folder: Path, imported: Path) -> None:
    recipe = write_recipe(folder, recipe_for(folder, imported, "by_command"))
    public = folder / "checkpoint.pth"
    refused = run_command(
        "-m", "pipeline", "import-checkpoint", str(public), "--from", "dino", cwd=folder
    )
    assert refused.returncode == 65 and "import it --from detrex" in refused.stderr
    images = [str(path) for path in sorted((folder / "raw/lvis/val2017").glob("*.jpg"))[:2]]
    predicted = run_command(
        "-m", "pipeline", "predict", str(imported), *images, "-o", str(folder / "drawn")
    )
    assert predicted.returncode == 0, predicted.stderr
    evaluated = run_command(
        "-m", "pipeline", "evaluate", str(recipe), "--checkpoint", str(imported), seconds=300
    )
    assert evaluated.returncode == 0, evaluated.stderr
    assert "APr" in evaluated.stdout
