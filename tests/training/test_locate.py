"""Every way to name a checkpoint, and every way to name one that is none."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_checkpoint import cut_short, drop_manifest, make_recipe, save_steps

from pipeline.errors import LongtailError, RecipeError, StorageError
from pipeline.training.checkpoint import export_detector
from pipeline.training.locate import locate_checkpoint


def write_recipe(folder: Path, output: Path) -> Path:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(make_recipe(output).model_dump(mode="json")))
    return path


def test_a_folder_a_run_and_a_recipe_are_the_same_checkpoint(tmp_path: Path) -> None:
    older, newer = save_steps(tmp_path, 5, 6)
    exported = export_detector(locate_checkpoint(older), tmp_path / "exported")
    elsewhere = write_recipe(tmp_path, tmp_path / "nowhere")
    recipe = make_recipe(tmp_path)
    assert locate_checkpoint(older).directory == older
    assert locate_checkpoint(str(exported)).directory == exported
    assert locate_checkpoint(tmp_path / "run").directory == newer
    assert locate_checkpoint(exported).recipe == recipe
    named = locate_checkpoint(elsewhere, [f"output={tmp_path}", "evaluation.use_ema=false"])
    assert named.directory == newer
    assert not named.recipe.evaluation.use_ema, "the named recipe says how to evaluate"


def test_an_export_holds_the_recipe_that_was_asked_for(tmp_path: Path) -> None:
    [directory] = save_steps(tmp_path, 5)
    recipe = write_recipe(tmp_path, tmp_path)
    words = ["evaluation.use_ema=false", "data.transforms.evaluation_short_side=320"]
    found = locate_checkpoint(recipe, words)
    exported = locate_checkpoint(export_detector(found, tmp_path / "exported"))
    assert exported.recipe == found.recipe
    assert exported.recipe.data.transforms.evaluation_short_side == 320
    assert exported.manifest.recipe_hash == found.recipe.hash() != found.manifest.recipe_hash
    weights = load_file(exported.directory / "weights.safetensors")
    plain = load_file(directory / "weights.safetensors")
    assert all(torch.equal(weights[name], plain[name]) for name in weights)


def test_a_recipe_that_learns_otherwise_is_refused(tmp_path: Path) -> None:
    [directory] = save_steps(tmp_path, 5)
    recipe = write_recipe(tmp_path, tmp_path)
    for override, message in [
        ("detector.num_queries=7", r"detector.num_queries was 900 and is 7.*name .*step_00000005"),
        ("training.steps=7", r"run.yaml with its overrides: training.steps was \d+ and is 7"),
    ]:
        with pytest.raises(RecipeError, match=message):
            locate_checkpoint(recipe, [override])
    assert locate_checkpoint(recipe, ["output=" + str(tmp_path)]).directory == directory


def test_a_run_gives_its_newest_whole_checkpoint(tmp_path: Path) -> None:
    older, newer = save_steps(tmp_path, 5, 6)
    cut_short(newer)
    assert locate_checkpoint(tmp_path / "run").directory == older


def test_half_of_a_checkpoint_is_refused(tmp_path: Path) -> None:
    older, newer = save_steps(tmp_path, 5, 6)
    cut_short(older)
    with pytest.raises(StorageError, match=r"weights.safetensors has \d+ bytes, the manifest says"):
        locate_checkpoint(older)
    drop_manifest(newer)
    with pytest.raises(StorageError, match=r"step_00000006 has no manifest.json.*did not finish"):
        locate_checkpoint(newer)
    unfinished = newer.rename(newer.with_name("step_00000006.tmp"))
    for path in unfinished.iterdir():
        path.unlink()
    with pytest.raises(StorageError, match="did not finish"):
        locate_checkpoint(unfinished)


def test_what_is_no_checkpoint_is_refused_with_the_forms_that_are(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "weights.safetensors").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "manifest.json").write_text(json.dumps({"files": []}))
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    recipe = write_recipe(tmp_path, tmp_path)
    cases: list[tuple[str, type[LongtailError], str]] = [
        ("absent", RecipeError, "absent does not exist; give an exported folder"),
        ("absent.yaml", RecipeError, "absent.yaml does not exist"),
        ("weights.safetensors", StorageError, "could not be read"),
        ("notes.txt", RecipeError, "is a file, and a checkpoint is a folder"),
        ("empty", RecipeError, "is not a checkpoint and holds none; give an exported folder"),
        ("other", StorageError, "damaged"),
        ("run", StorageError, "no checkpoint in"),
        (recipe.name, StorageError, "no checkpoint in"),
    ]
    for name, error, message in cases:
        with pytest.raises(error, match=message):
            locate_checkpoint(tmp_path / name)
    with pytest.raises(RecipeError, match=r"seed=1: overrides belong to a recipe"):
        locate_checkpoint(tmp_path / "empty", ["seed=1"])
